#!/usr/bin/env bash
# The container image of msjax and jax for TPU, by launch/Dockerfile.
#
#   launch/image.sh COMMAND [--pod_config=FILE] [--dry_run]
#
#   build      builds IMAGE
#   push       builds it and pushes it, for gke.sh and xpk.sh
#
# --dry_run prints the commands and runs none. Fields in capitals are those of launch/pod.env.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build() {
  run docker build --platform=linux/amd64 --file=launch/Dockerfile --build-arg=PYTHON="$PYTHON" \
    --build-arg=JAX="$JAX" --tag="$IMAGE" . || fail "$IMAGE was not built"
}

parse "$@"
read_config IMAGE
case $VERB in
  build) build ;;
  push)
    build
    run docker push "$IMAGE" || fail "$IMAGE was built but not pushed"
    ;;
  *) wrong "$VERB: no such command; see $ME --help" ;;
esac
