#!/usr/bin/env bats
# launch/image.sh, gke.sh, xpk.sh, sky.sh and slurm.sh against commands that write down their words.
load helper

fails() { # command that fails, text, words of `launch`: they end with 1 and say so
  echo "$1 has its reasons" >"$CLOUD/fail-$1"
  run -1 launch "${@:3}"
  tells "$1 has its reasons"
  tells "$2"
  rm "$CLOUD/fail-$1"
}

@test "image builds and pushes IMAGE with the jax of the config" {
  launch image push
  called 'docker build --platform=linux/amd64 --file=launch/Dockerfile --build-arg=PYTHON=3.12 --build-arg=JAX=0.10.2 --tag=us-docker.pkg.dev/my-project/images/msjax:1 .'
  called 'docker push us-docker.pkg.dev/my-project/images/msjax:1'
}

@test "image pushes nothing when building fails" {
  fails docker 'was not built' image push
  [ "$(calls 'docker push')" = 0 ]
}

@test "gke submits the filled-in JobSet" {
  launch gke run
  called 'kubectl apply --filename=build/launch/jobset.yaml'
  grep -q "exec python -m msjax.train .* --coordinator_port=8476" build/launch/jobset.yaml
  fails kubectl 'msjax was not submitted' gke run
}

@test "gke tells, follows and deletes" {
  launch gke status
  called 'kubectl get jobset msjax'
  launch gke logs --slice=1 --worker=3 --follow
  called 'jobset-name=msjax,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3'
  called --follow
  launch gke delete
  called 'kubectl delete jobset msjax'
  fails kubectl 'no JobSet msjax' gke status
  fails kubectl 'no log of slice 0, worker 0' gke logs
  fails kubectl 'perhaps still runs' gke delete
}

@test "xpk submits the workload" {
  set_field SLICES=2
  launch xpk run
  called 'xpk workload create --cluster=my-cluster --project=my-project --zone=us-west4-a --workload=msjax --tpu-type=v5p-16 --num-slices=2'
  called '--restart-on-exit-codes=1,3-126'
  fails xpk 'msjax was not submitted' xpk run
}

@test "xpk tells, follows and deletes" {
  launch xpk status
  called 'xpk workload list --cluster=my-cluster'
  launch xpk logs
  called 'kubectl logs --tail=200'
  launch xpk delete
  called '--workload=msjax --force'
  fails xpk 'perhaps still runs' xpk delete
  set_field CLUSTER=
  run -2 launch xpk run
  tells 'CLUSTER is empty'
}

@test "sky submits a managed job, of one slice" {
  launch sky run
  called 'sky jobs launch --yes --detach-run --name=msjax build/launch/sky.yaml'
  fails sky 'msjax was not submitted' sky run
  set_field SLICES=2
  run -2 launch sky run
  tells 'SkyPilot runs one slice'
}

@test "sky tells, follows and cancels" {
  launch sky status
  called 'sky jobs queue'
  launch sky logs
  called 'sky jobs logs --name=msjax'
  launch sky delete
  called 'sky jobs cancel --yes --name=msjax'
  fails sky 'perhaps still runs' sky delete
}

@test "slurm submits one process a node, with the flags of the site" {
  set_field SLURM_NODES=4
  set_field "SLURM_FLAGS='--partition=tpu --time=24:00:00'"
  launch slurm run
  called '--nodes=4 --ntasks-per-node=1 --requeue --signal=TERM@120'
  called "--partition=tpu --time=24:00:00 launch/on_slurm.sh python -m msjax.train"
  fails sbatch 'msjax was not submitted' slurm run
}

@test "slurm tells and cancels" {
  launch slurm status
  called 'squeue --me --name=msjax'
  launch slurm delete
  called 'scancel --me --full --name=msjax'
  fails scancel 'perhaps still runs' slurm delete
}

@test "the Slurm job is queued again when it was preempted, and only then" {
  export SLURM_JOB_ID=5
  echo preempted >"$CLOUD/fail-srun"
  run -1 bash launch/on_slurm.sh 'python -m msjax.train'
  [ "$(calls scontrol)" = 0 ]
  FAIL_CODE=42 run -42 bash launch/on_slurm.sh 'python -m msjax.train'
  called 'scontrol requeue 5'
  rm "$CLOUD/fail-srun"
  run -0 bash launch/on_slurm.sh 'python -m msjax.train'
  called 'srun --kill-on-bad-exit=0 bash -c'
}
