#!/usr/bin/env bats
# What all scripts of launch/ do: help, dry runs, the config file.
load helper

every_command() { # prints `SCRIPT COMMAND` for all that the heads of the scripts list
  local script
  for script in pod image gke xpk sky slurm; do
    "launch/$script.sh" --help | sed -n "s/^  \([a-z]*\)  .*/$script \1/p"
  done
}

@test "--help tells what each script and each command does" {
  for script in pod image gke xpk sky slurm; do
    run -0 "launch/$script.sh" --help
    tells "launch/$script.sh COMMAND [--pod_config=FILE] [--dry_run]"
    [[ $output != *shellcheck* && $output != *parse* ]]
  done
  [ "$(every_command | wc -l)" -ge 27 ]
}

@test "--dry_run of every command prints commands that a shell takes, and calls nothing" {
  while read -r script command; do
    run -0 launch "$script" "$command" --dry_run
    [ -n "$output" ]
    bash -n <<<"$output"
  done < <(every_command)
  [ ! -s "$CALLS" ]
  [ ! -e build ]
}

calls_of() { # a command: what it calls on new slices
  rm -rf "${CLOUD:?}"/{home,life} "$SHARED_DIR/.mounted" build
  launch pod create
  : >"$CALLS"
  "$@" >out 2>&1 || return
  sed 's/[0-9]\{10\}/TIME/g' "$CALLS" # the token of `setup`
}

@test "what --dry_run prints does what the command does" {
  set_field "SLURM_FLAGS=\"--comment=it's --time=9\""
  for pair in 'pod create' 'pod setup' 'pod delete' 'image push' 'gke run' 'xpk run' 'sky run' \
    'slurm run'; do
    read -r script command <<<"$pair"
    launch "$script" "$command" --dry_run >dry
    calls_of launch "$script" "$command" >called
    calls_of bash dry >pasted
    diff called pasted
  done
}

@test "a wrong option, a missing or second or wrong command" {
  run -2 launch pod
  tells 'launch/pod.sh: no command; see launch/pod.sh --help'
  run -2 launch pod create delete
  tells 'delete: one command at a time'
  run -2 launch pod --dry-run create
  tells '--dry-run: no such option'
  run -2 launch pod logs --worker=one
  tells '--worker=one: expected a whole number'
  for script in pod image gke xpk sky slurm; do
    run -2 launch "$script" creat
    tells 'creat: no such command'
  done
  [ ! -s "$CALLS" ]
}

@test "a config file that is not there, has a wrong field, or lacks one" {
  run -2 launch/pod.sh create --pod_config=nowhere.env
  tells '--pod_config=nowhere.env: not found'
  set_field ACCELERATOR_TYPE=v6e-8
  run -2 launch pod create
  tells 'pod.env: ACCELERATOR_TYPE: no such field; expected one of NAME SHARED'
  sed -i /ACCELERATOR_TYPE/d pod.env
  set_field PROJECT=
  run -2 launch pod create
  tells 'PROJECT is empty; fill it in'
  run -2 launch/pod.sh create
  tells 'launch/pod.env: PROJECT is empty'
}

refuses() { # NAME=value, text: what pod.sh says of it
  cp pod.env kept
  set_field "$1"
  run -2 launch pod create
  tells "$2"
  mv kept pod.env
}

@test "wrong values are refused before anything is called" {
  refuses ACCELERATOR=v5e-16 'Google calls it v5litepod-16'
  refuses ACCELERATOR=v5litepod-12 '12 chips; expected 1 4 8 16 32 64 128 256'
  refuses ACCELERATOR=h100-8 'expected v5litepod-N, v6e-N, v5p-N or v4-N'
  refuses ACCELERATOR=v6e 'expected a whole number'
  refuses SLICES=two 'SLICES=two: expected a whole number'
  refuses SPOT=yes 'SPOT=yes: expected true or false'
  refuses SLICES=0 'SLICES=0: expected 1 or more'
  refuses ZONE=us-west4 'ZONE=us-west4: expected one as us-west4-a'
  refuses VALID_UNTIL=6hours 'expected a number of s, m, h or d, as 6h'
  refuses JAX=latest 'JAX=latest: expected a version, as 0.10.2'
  refuses SHARED_DIR=mnt/shared 'expected a path from /'
  refuses 'TRAIN=python -m msjax.train' "-m: command not found; expected assignments, NAME='value'"
  refuses NAME=My_Run 'NAME=My_Run: expected small letters'
  refuses SHARED=my-bucket 'SHARED=my-bucket: expected gs://BUCKET or SERVER:/EXPORT'
  refuses SHARED=gs://bucket/folder 'expected a whole bucket'
  refuses "TRAIN='python -m msjax.train --workdir=gs://bucket/run'" 'TRAIN: --workdir is a URL'
  refuses "TRAIN='python -m msjax.train --workdir=/home/me/run'" 'all workers write there'
  [ ! -s "$CALLS" ]
}

@test "a tool that is missing is named" {
  # shellcheck disable=SC2123
  run -1 env PATH="$BATS_TEST_TMPDIR/none:/usr/bin:/bin" "$BASH" launch/xpk.sh status --pod_config=pod.env
  tells 'xpk is not installed here'
}

@test "NFS is mounted as well as a bucket" {
  set_field SHARED=10.0.0.2:/volume
  run -0 launch pod setup --dry_run
  tells 'on_worker.sh setup 10.0.0.2:/volume'
}
