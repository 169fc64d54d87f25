#!/usr/bin/env bash
# The training run as a workload of xpk on Google Kubernetes Engine.
#
#   launch/xpk.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   run        TRAIN in IMAGE (launch/image.sh push) on SLICES slices of ACCELERATOR in CLUSTER
#   status     of the workload
#   logs       of one worker: [--slice=0] [--worker=0] [--follow]
#   delete     ends TRAIN, which saves a checkpoint if GRACE_SECONDS suffice
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# SHARED_DIR is mounted by XPK_STORAGE, which `xpk storage attach` makes (docs/pods.md).
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

workload() { # verb, more words
  run xpk workload "$1" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

parse "$@"
read_config CLUSTER PROJECT ZONE IMAGE XPK_STORAGE
read_slice
case $VERB in
  run)
    # All codes but 2, a refused input, start it again; 42 and 127 to 255 do so by default.
    workload create --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
      --docker-image="$IMAGE" --storage="$XPK_STORAGE" --command="$(train_command)" \
      --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1,3-126 \
      --termination-grace-period-seconds="$GRACE_SECONDS" || fail "$NAME was not submitted"
    ;;
  status) workload list --filter-by-job="$NAME" || fail "xpk can't tell; its words are above" ;;
  logs) pod_log ;;
  delete)
    workload delete --workload="$NAME" --force ||
      fail "$NAME was not deleted, and so perhaps still runs"
    ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
