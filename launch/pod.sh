#!/usr/bin/env bash
# TPU slices by queued resources of Google Compute Engine, and the training run on them.
#
#   launch/pod.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   create     asks for SLICES slices of ACCELERATOR
#   wait       until they are there
#   setup      msjax, jax and the shared directory on every worker; checks that all have the same
#   run        starts TRAIN on every worker, detached
#   status     of the slices and of TRAIN on every worker
#   logs       of one worker: [--slice=0] [--worker=0] [--follow]
#   stop       saves a checkpoint and ends TRAIN
#   delete     the slices; SHARED stays
#   babysit    all of the above until TRAIN has ended: creates slices anew when they are preempted
#   firewall   lets the workers reach each other, in a network whose rules don't
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
STAGE=build/launch/msjax-pod

queued_resources() { # verb, more words
  run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

state() { # prints the state of the queued resource, NONE if there is none
  local found
  found=$(run gcloud compute tpus queued-resources list --project="$PROJECT" --zone="$ZONE" \
    --filter="name~/$NAME\$" --format='value(state.state)')
  echo "${found:-NONE}"
}

create() {
  local words=(--accelerator-type="$ACCELERATOR" --runtime-version="$IMAGE_VERSION"
    --network="$NETWORK" --tags="$NAME" --scopes=cloud-platform)
  if [ "$SLICES" -gt 1 ]; then
    words+=(--node-count="$SLICES" --node-prefix="$NAME")
  else
    words+=(--node-id="$NAME")
  fi
  if [ "$SPOT" = true ]; then words+=(--spot); fi
  if [ -n "$VALID_UNTIL" ]; then words+=(--valid-until-duration="$VALID_UNTIL"); fi
  if [ -n "$SUBNETWORK" ]; then words+=(--subnetwork="$SUBNETWORK"); fi
  if [ -n "$SERVICE_ACCOUNT" ]; then words+=(--service-account="$SERVICE_ACCOUNT"); fi
  queued_resources create "${words[@]}" ||
    fail "nothing was created; gcloud's reason is above (quota is asked for under IAM & Admin, Quotas)"
}

await() {
  local now before=''
  while :; do
    now=$(state)
    [ -z "$DRY_RUN" ] || return 0
    [ "$now" = "$before" ] || echo "$(date +%T) $NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE) fail "there is no queued resource $NAME; $ME create makes one" ;;
      FAILED) queued_resources describe && fail "$NAME: FAILED, as said above; $ME delete, then create" ;;
      SUSPEND*) fail "$NAME: preempted; $ME delete, then create, or let $ME babysit do it" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

on_workers() { # a command: runs it on all, prints what they answer; fails unless all do
  local answers all=$((SLICES * HOSTS)) some
  answers=$(queued_resources ssh --node=all --worker=all --command="$1" | tee -a /dev/stderr) ||
    fail "a worker failed; its words are above"
  [ -z "$DRY_RUN" ] || return 0
  # gcloud goes on without the slices that it can't reach, and ends with 0.
  some=$(grep -c '^@ ' <<<"$answers") || true
  [ "$some" = "$all" ] || fail "$some of $all workers answered; see $ME status"
  grep '^@ ' <<<"$answers"
}

setup() {
  local answers token
  token=$(date +%s)
  run rm -rf "$STAGE"
  run mkdir -p "$STAGE"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir="$STAGE" .
  run cp -R configs launch/on_worker.sh "$STAGE"
  # shellcheck disable=SC2016
  on_workers 'if kill -0 "$(cat msjax-run/pid 2>/dev/null)" 2>/dev/null
    then echo "TRAIN is running; stop it first" >&2; exit 1
    else rm -rf msjax-pod; echo "@ $(hostname) empty"; fi' >/dev/null
  run gcloud compute tpus queued-resources scp "$STAGE" "$NAME:" --recurse --project="$PROJECT" \
    --zone="$ZONE" --node=all --worker=all || fail "copying to the workers failed; its words are above"
  order setup "$SHARED" "$SHARED_DIR" "$PYTHON" "$JAX" >/dev/null
  queued_resources ssh --command="bash msjax-pod/on_worker.sh $(quote share "$SHARED_DIR" "$token")" ||
    fail "worker 0 can't use $SHARED_DIR; its words are above"
  answers=$(order check "$SHARED_DIR" "$token")
  [ "$(cut -d' ' -f3- <<<"$answers" | sort -u | wc -l)" -eq 1 ] ||
    fail "the workers' versions differ; run $ME setup again"
}

order() { # a command of on_worker.sh and its words: for all workers
  on_workers "bash msjax-pod/on_worker.sh $(quote "$@")"
}

status() {
  local now
  now=$(state)
  [ -n "$DRY_RUN" ] || echo "$NAME: $now"
  if [ "$now" != ACTIVE ] && [ -z "$DRY_RUN" ]; then return; fi
  # shellcheck disable=SC2016
  (on_workers 'if [ -e msjax-pod/on_worker.sh ]
    then bash msjax-pod/on_worker.sh status
    else echo "@ $(hostname) bare"; fi' 2>/dev/null) || nodes
}

nodes() { # what the slices are, when their workers don't answer
  local number=''
  if [ "$SLICES" -gt 1 ]; then number='-[0-9]*'; fi
  run gcloud compute tpus tpu-vm list --project="$PROJECT" --zone="$ZONE" \
    --filter="name~/$NAME$number\$" --format='value(name.basename(),state)'
  fail "not all workers answer; above are the states of the slices"
}

logs() {
  local follow=${FOLLOW:+ -F}
  queued_resources ssh --node="$SLICE" --worker="$WORKER" \
    --command="tail -n 200$follow msjax-run/log" ||
    fail "no log of slice $SLICE, worker $WORKER; its words are above"
}

again() { # a command of this script, in a process of its own
  bash "$LAUNCH/pod.sh" "$1" --pod_config="$POD_CONFIG" $DRY_RUN
}

babysit() {
  local look before='' trouble=0 restarts=0
  if [ -n "$DRY_RUN" ]; then
    for step in status create wait setup run status delete; do again "$step"; done
    return
  fi
  while [ "$trouble" -lt 10 ]; do
    look=$(again status) || trouble=$((trouble + 1))
    [ "$look" = "$before" ] || echo "$(date +%T) $look"
    before=$look
    if act "$look"; then
      case $look in *'@ '* | *': WAITING'*) trouble=0 ;; esac
    else
      trouble=$((trouble + 1))
    fi
    sleep "$POLL_SECONDS"
  done
  fail "something above failed ten times in a row; the slices are left as they are"
}

act() { # what status has told: does what comes next; 0 but for a step that failed
  case $1 in
    *': NONE'*) again create ;;
    *': FAILED'*) again wait || exit ;; # tells why
    *': SUSPENDED'* | *PREEMPTED* | *TERMINATED*) again delete ;;
    *': ACTIVE'*'@ '*' bare'*) again setup ;;
    *': ACTIVE'*'@ '*' running'*) ;; # if not all: jax ends the others when one is gone
    *': ACTIVE'*'@ '*' idle'*) again run ;;
    *': ACTIVE'*'@ '*' stopped '*) echo "$ME: stopped by hand" && exit ;;
    *': ACTIVE'*'@ '*) next "$(sed -n 's/^@ [^ ]* //p' <<<"$1" | sort -u)" ;;
  esac
}

next() { # how TRAIN has ended on the workers: starts it again unless it is done or beyond help
  case $1 in
    'ended 0') echo "$ME: done" && exit ;;
    'ended 42') again run && return ;; # preempted, and saved
  esac
  if grep -qx 'ended 2' <<<"$1"; then fail "TRAIN has refused its input; see $ME logs"; fi
  [ "$restarts" -lt "$MAX_RESTARTS" ] || fail "TRAIN has failed $((restarts + 1)) times; see $ME logs"
  restarts=$((restarts + 1))
  again run
}

parse "$@"
read_config PROJECT ZONE SHARED
read_slice
case $VERB in
  create | setup | status | logs | babysit) "$VERB" ;;
  wait) await ;;
  run) order start "$(train_command)" >/dev/null ;;
  stop) order stop "$STOP_SECONDS" >/dev/null ;;
  delete) queued_resources delete --force --quiet || fail "not deleted, and so perhaps still paid for" ;;
  firewall)
    run gcloud compute firewall-rules create "$NAME-workers" --project="$PROJECT" \
      --network="$NETWORK" --allow=tcp --source-tags="$NAME" --target-tags="$NAME" ||
      fail "no firewall rule was made"
    ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
