#!/usr/bin/env bash
# The training run as a JobSet on Google Kubernetes Engine, by launch/jobset.yaml.
#
#   launch/gke.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   run        TRAIN in IMAGE (launch/image.sh push) on SLICES slices of ACCELERATOR
#   status     of the JobSet and its pods
#   logs       of one worker: [--slice=0] [--worker=0] [--follow]
#   delete     ends TRAIN, which saves a checkpoint if GRACE_SECONDS suffice
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# kubectl takes cluster and namespace from its context.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
JOBSET=build/launch/jobset.yaml

submit() {
  read_slice
  # shellcheck disable=SC2034 # all are read by the template
  {
    CHIPS_PER_HOST=$((CHIPS < 4 ? CHIPS : 4))
    PODS=$((CHIPS / CHIPS_PER_HOST))
    COMMAND=$(train_command)
    SPOT_SELECTOR=$([ "$SPOT" = true ] && echo 'cloud.google.com/gke-spot: "true"' || echo '# on demand')
    VOLUME=$(volume)
  }
  fill_in launch/jobset.yaml "$JOBSET"
  run kubectl apply --filename="$JOBSET" || fail "$NAME was not submitted"
}

volume() { # the source of the volume SHARED, as inline YAML
  local options
  case $SHARED in
    gs://*)
      # As in on_worker.sh: nothing cached, directories renamed whole or not at all.
      options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
      options+=,file-system:rename-dir-limit:0
      echo "csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes:" \
        "{bucketName: ${SHARED#gs://}, mountOptions: \"$options\"}}"
      ;;
    *) echo "nfs: {server: ${SHARED%%:*}, path: ${SHARED#*:}}" ;;
  esac
}

parse "$@"
case $VERB in
  run) read_config IMAGE SHARED && submit ;;
  status)
    read_config NAME
    run kubectl get jobset "$NAME" || fail "no JobSet $NAME; see kubectl config current-context"
    run kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
    ;;
  logs) read_config NAME && pod_log ;;
  delete)
    read_config NAME
    run kubectl delete jobset "$NAME" || fail "$NAME was not deleted, and so perhaps still runs"
    ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
