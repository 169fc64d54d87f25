#!/usr/bin/env bash
# The training run as a managed job of SkyPilot, by launch/sky.yaml: it finds a slice, and another
# when that one is preempted.
#
#   launch/sky.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   run        TRAIN on a slice of ACCELERATOR in the region of ZONE
#   status     of all managed jobs
#   logs       of the job
#   delete     ends TRAIN; what it has not saved is lost
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
JOB=build/launch/sky.yaml

submit() {
  read_slice
  [ "$SLICES" = 1 ] || wrong "$POD_CONFIG: SLICES=$SLICES: SkyPilot runs one slice; expected 1"
  # shellcheck disable=SC2034 # all are read by the template
  {
    COMMAND=$(train_command)
    REGION=${ZONE%-*}
  }
  fill_in launch/sky.yaml "$JOB"
  run sky jobs launch --yes --detach-run --name="$NAME" "$JOB" || fail "$NAME was not submitted"
}

parse "$@"
case $VERB in
  run) read_config SHARED ZONE && submit ;;
  status) read_config NAME && run sky jobs queue ;;
  logs) read_config NAME && run sky jobs logs --name="$NAME" ;;
  delete)
    read_config NAME
    run sky jobs cancel --yes --name="$NAME" || fail "$NAME was not ended, and so perhaps still runs"
    ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
