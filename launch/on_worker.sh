#!/usr/bin/env bash
# What pod.sh has every worker do; `setup` copies it there. Its answers begin with "@ HOST".
#
#   on_worker.sh setup SHARED SHARED_DIR PYTHON JAX   installs msjax and jax, mounts SHARED
#   on_worker.sh share SHARED_DIR TOKEN               leaves a sign for the other workers
#   on_worker.sh check SHARED_DIR TOKEN               looks for it, tells the versions
#   on_worker.sh start COMMAND                        starts it detached, its output in ~/msjax-run/log
#   on_worker.sh status                               running PID, ended CODE, stopped CODE, lost, idle
#   on_worker.sh stop SECONDS                         SIGTERM; waits until it has ended
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
STATE=$HOME/msjax-run # log; pid while it runs; code once it has ended; stopped by `stop`
PATH=$HOME/msjax-venv/bin:$HOME/.local/bin:$PATH

answer() { # words
  echo "@ $(hostname) $*"
}

fail() { # sentence
  echo "$(hostname): $*" >&2
  exit 1
}

running() {
  [ -f "$STATE/pid" ] && kill -0 "$(cat "$STATE/pid")" 2>/dev/null
}

setup() { # shared, directory, python, jax
  local package
  package=$(ls "$HERE"/msjax-*.whl 2>/dev/null) || package=$HERE/.. # a clone
  mount_shared "$1" "$2"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  rm -rf "$HOME/msjax-venv"
  uv venv --quiet --python "$3" "$HOME/msjax-venv"
  uv pip install --quiet --python "$HOME/msjax-venv/bin/python" "jax[tpu]==$4" "$package"
  answer set up
}

mount_shared() { # shared, directory
  if mountpoint -q "$2"; then return; fi
  sudo mkdir -p "$2"
  case $1 in
    gs://*)
      command -v gcsfuse >/dev/null || install_gcsfuse
      sudo chown "$(id -u)" "$2"
      # On large machines gcsfuse caches metadata for ever and renames directories piece by piece:
      # a worker must see at once what another has written, and a checkpoint whole or not at all.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=0 "${1#gs://}" "$2"
      ;;
    *)
      install_package nfs-common
      sudo mount -t nfs "$1" "$2"
      ;;
  esac
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_package gcsfuse
}

install_package() { # name
  sudo apt-get -qq update
  # A new machine installs its own updates first, under a lock.
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$1" >/dev/null
}

share() { # directory, token
  rm -rf "$1"/.msjax-pod*
  mkdir "$1/.msjax-pod.tmp"
  touch "$1/.msjax-pod.tmp/$2"
  mv "$1/.msjax-pod.tmp" "$1/.msjax-pod" ||
    fail "$1: directories cannot be renamed there, as checkpoints are; a bucket needs a" \
      "hierarchical namespace"
  answer shared
}

check() { # directory, token
  [ -f "$1/.msjax-pod/$2" ] || fail "$1: not what the other workers have there; is it shared?"
  answer "$(python -c '
import importlib.metadata as metadata, platform
versions = [f"{name} {metadata.version(name)}" for name in ("msjax", "jax", "jaxlib", "libtpu")]
print("python", platform.python_version(), *versions)')"
}

start() { # command
  if running; then fail "process $(cat "$STATE/pid") is running already; stop it first"; fi
  mkdir -p "$STATE"
  rm -f "$STATE"/{pid,code,stopped}
  cd "$HERE"
  setsid nohup bash "$HERE/on_worker.sh" supervise "$1" >>"$STATE/log" 2>&1 </dev/null &
  for _ in $(seq 100); do
    if [ -s "$STATE/pid" ]; then answer "started $(cat "$STATE/pid")" && return; fi
    sleep 0.1
  done
  fail "the command has not started; see ~/msjax-run/log"
}

supervise() { # command: the detached part of `start`
  local code=0
  trap : TERM # a machine that goes down sends it to all: live on to write down the code
  echo "$(date -u +%FT%TZ) $1"
  bash -c 'echo $$ >"$0"; eval "exec $1"' "$STATE/pid" "$1" || code=$?
  echo "$(date -u +%FT%TZ) ended with code $code"
  echo "$code" >"$STATE/code"
}

has_ended() { # the code is written a moment after the process has gone
  for _ in $(seq 50); do
    if [ -s "$STATE/code" ]; then return; fi
    sleep 0.1
  done
  return 1
}

status() {
  if running; then
    answer "running $(cat "$STATE/pid")"
  elif [ ! -f "$STATE/pid" ]; then
    answer idle
  elif ! has_ended; then
    answer lost
  elif [ -f "$STATE/stopped" ]; then
    answer "stopped $(cat "$STATE/code")"
  else
    answer "ended $(cat "$STATE/code")"
  fi
}

stop() { # seconds
  local left=$1
  mkdir -p "$STATE" && touch "$STATE/stopped"
  if running; then kill -TERM "$(cat "$STATE/pid")"; fi
  while running; do
    [ "$left" -gt 0 ] || fail "process $(cat "$STATE/pid") still runs $1 s after SIGTERM"
    left=$((left - 1))
    sleep 1
  done
  status
}

"$@"
