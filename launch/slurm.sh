#!/usr/bin/env bash
# The training run as a batch job of Slurm: one process a node, for one shared file system.
#
#   launch/slurm.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   run        TRAIN on SLURM_NODES nodes, by the python of the shell that submits
#   status     of the job
#   logs       of all nodes: [--follow]
#   delete     ends TRAIN; what it has not saved is lost
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# The log is SHARED_DIR/NAME.log.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

submit() { # Slurm tells SIGTERM 120 s before the time is up; TRAIN saves and is queued again
  local flags=(--job-name="$NAME" --nodes="$SLURM_NODES" --ntasks-per-node=1 --requeue
    --signal=TERM@120 --open-mode=append --output="$SHARED_DIR/$NAME.log")
  # shellcheck disable=SC2206 # several words
  flags+=($SLURM_FLAGS)
  run sbatch "${flags[@]}" launch/on_slurm.sh "$TRAIN" || fail "$NAME was not submitted"
}

parse "$@"
read_config SHARED_DIR
case $VERB in
  run) submit ;;
  status) run squeue --me --name="$NAME" ;;
  logs) run tail -n 200 ${FOLLOW:+-F} "$SHARED_DIR/$NAME.log" ;;
  delete) run scancel --me --full --name="$NAME" || fail "$NAME was not ended, and so perhaps still runs" ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
