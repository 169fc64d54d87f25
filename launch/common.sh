# shellcheck shell=bash disable=SC2001,SC2016,SC2034
# What the scripts of launch/ share: options, the config file, dry runs. Sourced by them.
set -euo pipefail
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ME=launch/$(basename "$0")
POD_CONFIG=$LAUNCH/pod.env
DRY_RUN='' FOLLOW='' WORKER=0 SLICE=0 VERB=''
exec 3>&1 # the commands of a dry run go there, past any $(...)

fail() { # sentence: what befell
  echo "$ME: $*" >&2
  exit 1
}

wrong() { # sentence: which input is wrong, and what was expected
  echo "$ME: $*" >&2
  exit 2
}

usage() { # prints the comment at the head of the script
  sed -n -e '/^# shellcheck/q' -e '2,$s/^# \{0,1\}//p' "$LAUNCH/${ME#launch/}"
}

parse() { # the script's arguments: sets VERB and the options
  local word
  for word in "$@"; do
    case $word in
      --help | -h) usage && exit ;;
      --dry_run) DRY_RUN=--dry_run ;;
      --follow) FOLLOW=--follow ;;
      --pod_config=*) POD_CONFIG=${word#*=} ;;
      --worker=*) WORKER=$(whole --worker "${word#*=}") || exit ;;
      --slice=*) SLICE=$(whole --slice "${word#*=}") || exit ;;
      -*) wrong "$word: no such option; see $ME --help" ;;
      *)
        [ -z "$VERB" ] || wrong "$word: one command at a time, and $VERB came first"
        VERB=$word
        ;;
    esac
  done
  [ -n "$VERB" ] || wrong "no command; see $ME --help"
}

whole() { # name, value: prints the value if it is a whole number
  case $2 in
    '' | *[!0-9]*) wrong "$1=$2: expected a whole number" ;;
  esac
  echo "$2"
}

read_config() { # names of fields that must be filled in: sets all fields
  local known message name names
  [ -f "$POD_CONFIG" ] || wrong "--pod_config=$POD_CONFIG: not found"
  known=$(fields "$LAUNCH/pod.env")
  names=$(fields "$POD_CONFIG")
  for name in $names; do
    grep -qx "$name" <<<"$known" ||
      wrong "$POD_CONFIG: $name: no such field; expected one of" "${known//$'\n'/ }"
  done
  # shellcheck source=launch/pod.env
  source "$LAUNCH/pod.env"
  message=$(bash -ec 'source "$1"; source "$2"' - "$LAUNCH/pod.env" "$POD_CONFIG" 2>&1 >/dev/null) ||
    wrong "$(tail -1 <<<"$message"); expected assignments, NAME='value'"
  # shellcheck source=launch/pod.env
  source "$POD_CONFIG"
  POD_CONFIG=$(cd "$(dirname "$POD_CONFIG")" && pwd)/$(basename "$POD_CONFIG")
  cd "$LAUNCH/.."
  for name in "$@"; do
    [ -n "${!name}" ] || wrong "$POD_CONFIG: $name is empty; fill it in"
  done
  check_config
}

fields() { # file: the names that it assigns
  sed -n 's/^\([A-Za-z_][A-Za-z_0-9]*\)=.*/\1/p' "$1"
}

check_config() { # what no tool would say before the machines are paid for
  local name
  for name in SLICES MAX_RESTARTS POLL_SECONDS STOP_SECONDS GRACE_SECONDS SLURM_NODES; do
    whole "$POD_CONFIG: $name" "${!name}" >/dev/null
  done
  for name in SLICES SLURM_NODES; do
    [ "${!name}" -gt 0 ] || wrong "$POD_CONFIG: $name=${!name}: expected 1 or more"
  done
  [[ $SHARED_DIR == /* ]] || wrong "$POD_CONFIG: SHARED_DIR=$SHARED_DIR: expected a path from /"
  [[ $ZONE =~ ^([a-z0-9-]+-[a-z])?$ ]] || wrong "$POD_CONFIG: ZONE=$ZONE: expected one as us-west4-a"
  [[ $VALID_UNTIL =~ ^([0-9]+[smhd])?$ ]] ||
    wrong "$POD_CONFIG: VALID_UNTIL=$VALID_UNTIL: expected a number of s, m, h or d, as 6h"
  [[ $JAX =~ ^[0-9.]+$ ]] || wrong "$POD_CONFIG: JAX=$JAX: expected a version, as 0.10.2"
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    wrong "$POD_CONFIG: NAME=$NAME: expected small letters, digits and -, a letter first"
  case $SPOT in
    true | false) ;;
    *) wrong "$POD_CONFIG: SPOT=$SPOT: expected true or false" ;;
  esac
  case $SHARED in
    '' | *:/[!/]*) ;;
    gs://*/*) wrong "$POD_CONFIG: SHARED=$SHARED: expected a whole bucket, gs://BUCKET" ;;
    gs://?*) ;;
    *) wrong "$POD_CONFIG: SHARED=$SHARED: expected gs://BUCKET or SERVER:/EXPORT" ;;
  esac
  case "$TRAIN " in
    *--workdir=gs://*) wrong "$POD_CONFIG: TRAIN: --workdir is a URL; expected a directory under" \
      "SHARED_DIR=$SHARED_DIR, where the bucket is mounted" ;;
    *--workdir="$SHARED_DIR"/*) ;;
    *) wrong "$POD_CONFIG: TRAIN: expected --workdir=$SHARED_DIR/...: all workers write there" ;;
  esac
}

read_slice() { # from ACCELERATOR: sets CHIPS, HOSTS (GCE machines), IMAGE_VERSION, GKE_TYPE, TOPOLOGY
  local size=${ACCELERATOR##*-} table
  whole "$POD_CONFIG: the size in ACCELERATOR" "$size" >/dev/null
  local plane="1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"
  local torus="4:2x2x1 8:2x2x2 16:2x2x4 32:2x4x4 64:4x4x4 128:4x4x8 256:4x8x8 512:8x8x8 \
1024:8x8x16 2048:8x16x16"
  case $ACCELERATOR in
    v5litepod-*) CHIPS=$size table=$plane IMAGE_VERSION=v2-alpha-tpuv5-lite GKE_TYPE=tpu-v5-lite-podslice ;;
    v6e-*) CHIPS=$size table=$plane IMAGE_VERSION=v2-alpha-tpuv6e GKE_TYPE=tpu-v6e-slice ;;
    v5p-*) CHIPS=$((size / 2)) table=$torus IMAGE_VERSION=v2-alpha-tpuv5 GKE_TYPE=tpu-v5p-slice ;;
    v4-*) CHIPS=$((size / 2)) table=$torus IMAGE_VERSION=tpu-ubuntu2204-base GKE_TYPE=tpu-v4-podslice ;;
    v5e-*) wrong "$POD_CONFIG: ACCELERATOR=$ACCELERATOR: Google calls it v5litepod-$size" ;;
    *) wrong "$POD_CONFIG: ACCELERATOR=$ACCELERATOR: expected v5litepod-N, v6e-N, v5p-N or v4-N" ;;
  esac
  TOPOLOGY=$(tr ' ' '\n' <<<"$table" | sed -n "s/^$CHIPS://p")
  [ -n "$TOPOLOGY" ] ||
    wrong "$POD_CONFIG: ACCELERATOR=$ACCELERATOR: $CHIPS chips; expected" "$(sed 's/:[0-9x]*//g' <<<"$table")"
  IMAGE_VERSION=${RUNTIME_VERSION:-$IMAGE_VERSION}
  HOSTS=$((CHIPS <= 4 ? 1 : CHIPS / 4))
  if [ "$table" = "$plane" ] && [ "$CHIPS" = 8 ]; then HOSTS=1; fi # eight chips in one machine
}

train_command() { # TRAIN, with the port of the coordinator
  echo "$TRAIN${COORDINATOR_PORT:+ --coordinator_port=$COORDINATOR_PORT}"
}

quote() { # words: as a shell takes them
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) line+=" '$(sed "s/'/'\\\\''/g" <<<"$word")'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

run() { # a command: runs it, or in a dry run prints it
  if [ -n "$DRY_RUN" ]; then
    quote "$@" >&3
  else
    command -v "$1" >/dev/null || fail "$1 is not installed here; see docs/pods.md"
    "$@"
  fi
}

fill_in() { # template, file: writes the template with its ${FIELD}s filled in
  local name text
  text=$(cat "$1")
  for name in $(grep -o '\${[A-Z_]*}' "$1" | sort -u | tr -d '${}'); do
    text=${text//"\${$name}"/"${!name}"}
  done
  run mkdir -p "$(dirname "$2")"
  if [ -n "$DRY_RUN" ]; then
    printf "cat >%s <<'END'\n%s\nEND\n" "$2" "$text" >&3
  else
    echo "$text" >"$2"
  fi
}

pod_log() { # of the Pod that is worker WORKER of slice SLICE
  run kubectl logs --tail=200 ${FOLLOW:+--follow} \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=$SLICE,batch.kubernetes.io/job-completion-index=$WORKER" ||
    fail "no log of slice $SLICE, worker $WORKER of $NAME"
}
