#!/usr/bin/env bats
# launch/pod.sh against a gcloud that runs the workers' commands here.
load helper

make_pod() { # creates the slices and sets the workers up
  launch pod create && launch pod wait && launch pod setup
}

@test "create asks for one slice, with the machine image of its accelerator" {
  launch pod create
  called 'queued-resources create msjax --project=my-project --zone=us-west4-a'
  called '--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5'
  called '--node-id=msjax --spot'
}

@test "create asks for several slices on demand, for so long, in a network" {
  for field in SLICES=2 ACCELERATOR=v6e-16 SPOT=false VALID_UNTIL=6h NETWORK=net SUBNETWORK=sub \
    SERVICE_ACCOUNT=me@x; do set_field "$field"; done
  launch pod create
  called '--runtime-version=v2-alpha-tpuv6e --network=net'
  called '--node-count=2 --node-prefix=msjax --valid-until-duration=6h --subnetwork=sub --service-account=me@x'
  [ "$(calls --spot)" = 0 ]
  [ "$(calls --node-id)" = 0 ]
}

@test "each accelerator has its machine image, and RUNTIME_VERSION comes before it" {
  for pair in v6e-256:v2-alpha-tpuv6e v4-8:tpu-ubuntu2204-base v5litepod-8:v2-alpha-tpuv5-lite; do
    set_field "ACCELERATOR=${pair%:*}"
    launch pod create
    called "--accelerator-type=${pair%:*} --runtime-version=${pair#*:} "
  done
  set_field RUNTIME_VERSION=mine
  launch pod create
  called --runtime-version=mine
}

@test "create without quota says that nothing was created" {
  echo 'ERROR: Quota limit TPUV5sPreemptibleLitepodPerProject has been exceeded' >"$CLOUD/fail-create"
  run -1 launch pod create
  tells 'Quota limit'
  tells 'launch/pod.sh: nothing was created'
}

@test "wait tells each state once and ends when the slices are there" {
  echo 'WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE' >"$CLOUD/lives"
  launch pod create
  run -0 launch pod wait
  [ "$(grep -c WAITING <<<"$output")" = 1 ]
  tells 'msjax: PROVISIONING'
  tells 'msjax: ACTIVE'
}

@test "wait fails on FAILED with the reason, on SUSPENDED and without a request" {
  run -1 launch pod wait
  tells 'there is no queued resource msjax'
  echo 'PROVISIONING FAILED' >"$CLOUD/lives"
  launch pod create
  run -1 launch pod wait
  tells 'There is no more capacity'
  tells 'FAILED, as said above'
  echo SUSPENDED >"$CLOUD/states"
  run -1 launch pod wait
  tells 'preempted'
}

@test "wait fails when gcloud does" {
  echo 'ERROR: you do not have an active account' >"$CLOUD/fail-list"
  run -1 launch pod wait
  tells 'active account'
}

@test "setup mounts the bucket and installs the wheel on every worker" {
  run -0 make_pod
  for worker in $FAKE_WORKERS; do
    [ -f "$CLOUD/home/$worker/msjax-pod/msjax-0.1.0-py3-none-any.whl" ]
    [ -f "$CLOUD/home/$worker/msjax-pod/configs/quickstart.py" ]
    tells "@ $worker python 3.12.4 msjax 0.1.0 jax 0.10.2"
  done
  [ "$(calls 'uv pip install')" = 2 ]
  called 'jax[tpu]==0.10.2'
  called '--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=0 my-bucket'
}

@test "setup fails when the workers' versions differ" {
  launch pod create
  launch pod wait
  echo 'python 3.12.4 msjax 0.1.0 jax 0.9.0' >"$CLOUD/home/0-1/versions"
  run -1 launch pod setup
  tells "the workers' versions differ"
}

@test "setup fails when directories cannot be renamed in the bucket" {
  touch "$CLOUD/flat"
  run -1 make_pod
  tells 'hierarchical namespace'
}

@test "setup fails when the bucket cannot be mounted, before anything is installed" {
  echo 'mountWithStorageHandle: permission denied' >"$CLOUD/fail-gcsfuse"
  run -1 make_pod
  tells 'permission denied'
  tells 'a worker failed'
  [ "$(calls 'uv ')" = 0 ]
}

@test "setup and run fail when a slice does not answer, though gcloud ends with 0" {
  set_field SLICES=2
  export FAKE_WORKERS='0-0 0-1 1-0 1-1'
  make_pod
  echo 1 >"$CLOUD/missing"
  run -1 launch pod setup
  tells '2 of 4 workers answered'
  run -1 launch pod run
  tells 'a worker failed' # the two have lost what the setup before gave them
}

@test "setup fails when copying does" {
  launch pod create
  launch pod wait
  echo 'ERROR: (gcloud) 255' >"$CLOUD/fail-scp"
  run -1 launch pod setup
  tells 'copying to the workers failed'
}

@test "run starts the command on all workers, detached; setup and run again are refused" {
  make_pod
  run -0 launch pod run
  [ "$(grep -c '@ .* started' <<<"$output")" = 2 ]
  run -0 launch pod status
  tells 'msjax: ACTIVE'
  [ "$(grep -c '@ .* running' <<<"$output")" = 2 ]
  run -0 launch pod logs --worker=1
  tells "trains: -m msjax.train --config=configs/quickstart.py --workdir=$SHARED_DIR/runs/a --coordinator_port=8476"
  run -1 launch pod setup
  tells 'TRAIN is running'
  run -1 launch pod run
  tells 'running already'
}

@test "run on workers that are not set up fails" {
  launch pod create
  launch pod wait
  run -1 launch pod run
  tells 'a worker failed'
}

@test "stop lets every worker save, and says so" {
  make_pod
  launch pod run
  run -0 launch pod stop
  [ "$(grep -c '@ .* stopped 42' <<<"$output")" = 2 ]
  grep -q saved "$CLOUD/home/0-1/msjax-run/log"
}

@test "status without slices, and with slices that do not answer" {
  run -0 launch pod status
  tells 'msjax: NONE'
  make_pod
  echo 'ERROR: (gcloud) [0] refused' >"$CLOUD/fail-ssh"
  echo 'msjax PREEMPTED' >"$CLOUD/nodes"
  run -1 launch pod status
  tells 'msjax PREEMPTED'
  tells 'not all workers answer'
}

@test "logs of a worker that has none fail; --follow follows" {
  make_pod
  run -1 launch pod logs --slice=0 --worker=1
  tells 'no log of slice 0, worker 1'
  run -0 launch pod logs --worker=1 --follow --dry_run
  tells '--worker=1'
  tells 'tail -n 200 -F'
}

@test "delete forces; what is not deleted is said to cost" {
  make_pod
  launch pod delete
  called 'queued-resources delete msjax --project=my-project --zone=us-west4-a --force --quiet'
  echo 'ERROR: (gcloud) internal' >"$CLOUD/fail-delete"
  run -1 launch pod delete
  tells 'perhaps still paid for'
}

@test "firewall opens TCP between the workers" {
  launch pod firewall
  called 'firewall-rules create msjax-workers --project=my-project --network=default --allow=tcp'
  echo 'ERROR: already exists' >"$CLOUD/fail-create"
  run -1 launch pod firewall
  tells 'no firewall rule was made'
}

@test "babysit runs to the end, from nothing" {
  echo 0 >"$CLOUD/exits"
  run -0 launch pod babysit
  tells 'launch/pod.sh: done'
  [ "$(calls 'queued-resources create')" = 1 ]
  [ "$(calls 'queued-resources delete')" = 0 ]
}

@test "babysit makes preempted slices anew and starts the run again" {
  printf '%s\n' 'PROVISIONING ACTIVE ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED' ACTIVE >"$CLOUD/lives"
  printf '%s\n' - 0 >"$CLOUD/exits"
  run -0 launch pod babysit
  tells 'SUSPENDED'
  tells 'launch/pod.sh: done'
  [ "$(calls 'queued-resources create')" = 2 ]
  [ "$(calls 'queued-resources delete')" = 1 ]
  [ "$(calls 'on_worker.sh start')" = 2 ]
}

@test "babysit makes slices anew whose nodes are preempted while the request is still ACTIVE" {
  printf '%s\n' ACTIVE ACTIVE >"$CLOUD/lives"
  printf '%s\n' - 0 >"$CLOUD/exits"
  launch pod create
  echo 'msjax PREEMPTED' >"$CLOUD/nodes"
  echo 'ERROR: (gcloud) refused' >"$CLOUD/fail-once-ssh"
  run -0 launch pod babysit
  tells 'launch/pod.sh: done'
  [ "$(calls 'queued-resources delete')" = 1 ]
}

@test "babysit starts again what ended with code 42, without counting" {
  set_field MAX_RESTARTS=0
  echo 42 >"$CLOUD/exits"
  make_pod
  launch pod run
  echo 0 | tee "$CLOUD"/home/*/exit
  run -0 launch pod babysit
  tells 'ended 42'
  tells 'launch/pod.sh: done'
}

@test "babysit gives up after MAX_RESTARTS errors, at once on refused input" {
  set_field MAX_RESTARTS=2
  echo 1 >"$CLOUD/exits"
  run -1 launch pod babysit
  tells 'TRAIN has failed 3 times'
  [ "$(calls 'on_worker.sh start')" = 3 ]
  echo 2 | tee "$CLOUD"/home/*/exit
  launch pod run
  run -1 launch pod babysit
  tells 'TRAIN has refused its input'
}

@test "babysit ends when the run was stopped by hand, and when the request has FAILED" {
  make_pod
  launch pod run
  launch pod stop
  run -0 launch pod babysit
  tells 'stopped by hand'
  echo FAILED >"$CLOUD/states"
  run -1 launch pod babysit
  tells 'There is no more capacity'
}

@test "babysit ends when creating fails again and again" {
  echo 'ERROR: Quota limit exceeded' >"$CLOUD/fail-create"
  run -1 launch pod babysit
  tells 'ten times in a row'
  [ "$(calls 'queued-resources create')" = 10 ]
}

@test "babysit bears a failure that passes" {
  echo 0 >"$CLOUD/exits"
  echo 'ERROR: 503' >"$CLOUD/fail-once-create"
  echo 'ERROR: 255' >"$CLOUD/fail-once-scp"
  run -0 launch pod babysit
  tells 'launch/pod.sh: done'
}
