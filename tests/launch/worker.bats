#!/usr/bin/env bats
# launch/on_worker.sh on a machine of its own: a home directory.
load helper

on_worker() { # words: as the launcher has one worker do it
  (
    exec 3>&- 4>&-
    cd "$BATS_TEST_TMPDIR/home" || exit
    HOME=$PWD PATH=$FAKES/worker:$PATH bash "$LAUNCHER" "$@"
  )
}

setup_file() {
  export LAUNCHER=$BATS_TEST_DIRNAME/../../launch/on_worker.sh
}

make_home() {
  mkdir -p home/msjax-pod
  cp "$LAUNCHER" home/msjax-pod
  LAUNCHER=msjax-pod/on_worker.sh
}

ended() { # waits until the command has ended
  until on_worker status | grep -qv running; do sleep 0.1; done
}

@test "status before the first command is idle" {
  cd "$BATS_TEST_TMPDIR" && make_home
  run -0 on_worker status
  tells '@ home idle'
}

@test "start detaches the command and keeps its output and its code" {
  cd "$BATS_TEST_TMPDIR" && make_home
  run -0 on_worker start "python -c 'it'\"'\"'s quoted'; exit 7"
  tells '@ home started'
  ended
  run -0 on_worker status
  tells '@ home ended'
  grep -q 'ended with code' home/msjax-run/log
}

@test "start tells the code of a command that cannot be found" {
  cd "$BATS_TEST_TMPDIR" && make_home
  on_worker start 'no-such-command --flag'
  ended
  run -0 on_worker status
  tells '@ home ended 127'
  grep -q 'no-such-command' home/msjax-run/log
}

@test "a second start is refused while the first runs, and allowed after it" {
  cd "$BATS_TEST_TMPDIR" && make_home
  on_worker start 'sleep 60'
  run -1 on_worker start 'sleep 60'
  tells 'running already'
  kill "$(cat home/msjax-run/pid)"
  ended
  run -0 on_worker status
  tells '@ home ended 143'
  run -0 on_worker start true
}

@test "stop waits for a command that saves, and says which will not end" {
  cd "$BATS_TEST_TMPDIR" && make_home
  on_worker start 'bash -c "trap \"sleep 0.3; exit 42\" TERM; for _ in {1..600}; do sleep 0.05; done"'
  sleep 0.3
  run -0 on_worker stop 10
  tells '@ home stopped 42'
  on_worker start 'bash -c "trap : TERM; for _ in {1..600}; do sleep 0.05; done"'
  sleep 0.3
  run -1 on_worker stop 1
  tells 'still runs 1 s after SIGTERM'
  kill -KILL "$(cat home/msjax-run/pid)"
}

@test "a machine that goes down: all get SIGTERM, the code is written down" {
  cd "$BATS_TEST_TMPDIR" && make_home
  on_worker start 'bash -c "trap \"exit 42\" TERM; for _ in {1..600}; do sleep 0.05; done"'
  sleep 0.3
  kill -TERM -- -"$(ps -o pgid= "$(cat home/msjax-run/pid)" | tr -d ' ')"
  ended
  run -0 on_worker status
  tells '@ home ended 42'
}

@test "a command whose end nobody saw is lost" {
  cd "$BATS_TEST_TMPDIR" && make_home
  on_worker start 'sleep 60'
  kill -KILL -- -"$(ps -o pgid= "$(cat home/msjax-run/pid)" | tr -d ' ')"
  ended
  run -0 on_worker status
  tells '@ home lost'
}

@test "setup of a clone installs the clone, and mounts once" {
  mkdir "$BATS_TEST_TMPDIR/home"
  LAUNCHER=$PWD/launch/on_worker.sh
  run -0 on_worker setup gs://my-bucket "$SHARED_DIR" 3.12 0.10.2
  called "jax[tpu]==0.10.2 $PWD/launch/.."
  on_worker setup gs://my-bucket "$SHARED_DIR" 3.12 0.10.2
  [ "$(calls gcsfuse)" = 1 ]
}

@test "a directory that is not shared is found out" {
  mkdir "$BATS_TEST_TMPDIR/home" "$BATS_TEST_TMPDIR/elsewhere"
  on_worker share "$SHARED_DIR" 123
  run -1 on_worker check "$BATS_TEST_TMPDIR/elsewhere" 123
  tells 'is it shared?'
  run -1 on_worker check "$SHARED_DIR" 122 # of a setup before
  tells 'is it shared?'
}
