#!/usr/bin/env bash
# What slurm.sh submits: a process on each node; preempted and saved (code 42), it is queued again.
set -u
# The others go on when one has ended: it may have saved before them.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c 'eval "exec $0"' "$1"
code=$?
if [ "$code" = 42 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
