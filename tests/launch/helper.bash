# shellcheck shell=bash disable=SC2154
# What the tests of launch/ share: a copy of the scripts, fake commands on PATH, a filled-in config.
bats_require_minimum_version 1.5.0

setup() {
  export FAKES=$BATS_TEST_DIRNAME/fakes CLOUD=$BATS_TEST_TMPDIR/cloud CALLS=$BATS_TEST_TMPDIR/calls
  export PATH=$FAKES:$PATH FAKE_WORKERS='0-0 0-1'
  mkdir -p "$CLOUD" "$BATS_TEST_TMPDIR/clone"
  cd "$BATS_TEST_TMPDIR/clone" || return
  cp -R "$BATS_TEST_DIRNAME/../../launch" "$BATS_TEST_DIRNAME/../../configs" .
  : >"$CALLS"
  echo 'WAITING_FOR_RESOURCES PROVISIONING ACTIVE' >"$CLOUD/lives"
  echo - >"$CLOUD/exits"
  SHARED_DIR=$BATS_TEST_TMPDIR/shared
  mkdir -p "$SHARED_DIR"
  cat >pod.env <<END
PROJECT=my-project
ZONE=us-west4-a
ACCELERATOR=v5p-16
SHARED=gs://my-bucket
SHARED_DIR=$SHARED_DIR
TRAIN='python -m msjax.train --config=configs/quickstart.py --workdir=$SHARED_DIR/runs/a'
IMAGE=us-docker.pkg.dev/my-project/images/msjax:1
CLUSTER=my-cluster
XPK_STORAGE=my-storage
POLL_SECONDS=0
STOP_SECONDS=10
END
}

teardown() { # nothing that a test has started outlives it
  local pid
  for pid in "$CLOUD"/home/*/msjax-run/pid "$BATS_TEST_TMPDIR"/home/msjax-run/pid; do
    if [ -f "$pid" ]; then kill -KILL "$(cat "$pid")" 2>/dev/null || true; fi
  done
}

launch() { # script, words: with the config of the test
  "launch/$1.sh" "${@:2}" --pod_config=pod.env
}

set_field() { # NAME=value: in the config of the test, in place of what it had
  sed -i "/^${1%%=*}=/d" pod.env
  echo "$1" >>pod.env
}

tells() { # text: fails unless the output of `run` has it
  [[ $output == *"$1"* ]] || {
    printf 'no "%s" in:\n%s\n' "$1" "$output"
    return 1
  }
}

called() { # text: fails unless a fake was called with it
  grep -qF -- "$1" "$CALLS" || {
    printf 'no "%s" in:\n' "$1"
    cat "$CALLS"
    return 1
  }
}

calls() { # text: prints how many times a fake was called with it
  grep -cF -- "$1" "$CALLS" || true
}
