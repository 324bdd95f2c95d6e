#!/usr/bin/env bash
# Trains on a Cloud TPU: on one TPU VM, or on a slice of several, by way of gcloud.
#
#   launch/tpu_vm.sh create  [OPTION ...] [--queued] [--spot]   rent it
#   launch/tpu_vm.sh status  [OPTION ...]             is it there, or still in the queue?
#   launch/tpu_vm.sh install [OPTION ...]             copy this checkout, changes included, and install .[tpu]
#   launch/tpu_vm.sh run     [OPTION ...] --config FILE --workdir gs://... [--config.key=value ...] [-- FLAG ...]
#   launch/tpu_vm.sh logs    [OPTION ...]             follow what all hosts print
#   launch/tpu_vm.sh stop    [OPTION ...]             save and stop; run goes on
#   launch/tpu_vm.sh ssh     [OPTION ...]             a shell on host 0
#   launch/tpu_vm.sh delete  [OPTION ...]             give it back
#
#   --name NAME        or TPU_NAME
#   --zone ZONE        or TPU_ZONE
#   --project PROJECT  or TPU_PROJECT; gcloud's default if neither
#   --type TYPE        or TPU_TYPE; for create: v5litepod-8, v5litepod-16, v6e-4, v4-8, ...
#   --version VERSION  or TPU_VERSION; for create: the runtime image, by default the one that belongs to TYPE
#   --spot             for create: cheaper, may be taken away at any time
#   --queued           for create, status and delete: a queued resource, which waits until there is room
#   --dry-run          print the commands, which can be pasted anywhere, and run nothing
#   --help
#
# `run` detaches: the training goes on when the connection ends. --config*, --workdir and all that follows -- go to
# `python -m vit_dist.train` unchanged, which runs on host 0 of a slice; `python -m vit_dist.tpu_worker` runs on every
# host. After a preemption: delete, create, install and run again with the same --workdir, and the run goes on from its
# last checkpoint.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=
name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
spot=
queued=
remote_dir=vit_dist # in the home directory there
archive=$CHECKOUT/build/checkout.tgz

parse() {
  while (($#)); do
    case "$1" in
      -h | --help) show_help ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --name=* | --zone=* | --project=* | --type=* | --version=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --name) need_value "$@" && name=$2 && shift 2 ;;
      --zone) need_value "$@" && zone=$2 && shift 2 ;;
      --project) need_value "$@" && project=$2 && shift 2 ;;
      --type) need_value "$@" && type=$2 && shift 2 ;;
      --version) need_value "$@" && version=$2 && shift 2 ;;
      --spot) spot=1 && shift ;;
      --queued) queued=1 && shift ;;
      create | status | install | run | logs | stop | ssh | delete)
        if [[ -z $action ]]; then action=$1 && shift; else take_train_flag "$@" && shift "$TAKEN"; fi
        ;;
      *) take_train_flag "$@" && shift "$TAKEN" ;;
    esac
  done
  [[ -n $action ]] || fail "say what to do: create, status, install, run, logs, stop, ssh or delete"
  [[ -n $name ]] || fail "give --name, or set TPU_NAME"
  [[ -n $zone ]] || fail "give --zone, or set TPU_ZONE"
  [[ $action == run || ${#TRAIN_FLAGS[@]} -eq 0 ]] || fail "only run takes flags of vit_dist.train, such as ${TRAIN_FLAGS[0]}"
  [[ $action == create || -z $spot ]] || fail "--spot belongs to create"
  [[ $action =~ ^(create|status|delete)$ || -z $queued ]] || fail "--queued belongs to create, status and delete"
}

show_or_run() {
  if [[ -n $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# tpu GROUP VERB ARGUMENT...; GROUP is tpu-vm or queued-resources
tpu() {
  show_or_run gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

# on HOST COMMAND: HOST is a number, or all
on() {
  tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2"
}

runtime_image() {
  case "$type" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  [[ $type =~ ^v[0-9a-z]+-([0-9]+)$ ]] || fail "create needs --type (or TPU_TYPE) such as v5litepod-8, not '$type'"
  # The workers of v2 and v3 slices want tables of their chips' places, which vit_dist.tpu_worker does not have.
  if ((BASH_REMATCH[1] > 8)) && [[ $type == v[23]-* ]]; then
    fail "$type has several hosts: of v2 and v3 only ${type%-*}-8 is supported"
  fi
  local image=${version:-$(runtime_image)}
  if [[ -n $queued ]]; then
    # One name for the request and for the TPU that it becomes.
    tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$image" ${spot:+--spot}
  else
    tpu tpu-vm create "$name" "--accelerator-type=$type" "--version=$image" ${spot:+--spot}
  fi
}

status() {
  if [[ -n $queued ]]; then
    tpu queued-resources describe "$name" "--format=value(state.state)"
  else
    tpu tpu-vm describe "$name" "--format=value(state,health)"
  fi
}

delete() {
  # A queued resource is given back together with its TPU.
  if [[ -n $queued ]]; then tpu queued-resources delete "$name" --force --quiet; else tpu tpu-vm delete "$name" --quiet; fi
}

install() {
  show_or_run mkdir -p "${archive%/*}"
  show_or_run tar -czf "$archive" -C "$CHECKOUT" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude=./build .
  tpu tpu-vm scp "$archive" "$name:checkout.tgz" --worker=all
  local unpack="mkdir -p $remote_dir && tar -xzf checkout.tgz -C $remote_dir && cd $remote_dir"
  # Ubuntu's python3 comes without venv.
  local venv="{ test -x .venv/bin/pip || python3 -m venv .venv || { sudo apt-get update -q && sudo apt-get install -qy python3-venv && python3 -m venv --clear .venv; }; }"
  on all "$unpack && $venv && .venv/bin/python -m pip install --quiet -e '.[tpu]'"
}

# detached NAME WORD...: a remote command that starts a program, whose output goes to NAME.log and number to NAME.pid.
detached() {
  echo "nohup $(quoted "${@:2}") >> $1.log 2>&1 < /dev/null & echo \$! > $1.pid; echo started $1 as process \$!"
}

# alive NAME: a remote condition, whether the program of NAME.pid runs. After a reboot its number may be another's.
alive() {
  local module=vit_dist.train
  [[ $1 == train ]] || module=vit_dist.tpu_worker
  echo "grep -aqs $module \"/proc/\$(cat $1.pid 2> /dev/null)/cmdline\""
}

run() {
  need_train_flags
  local workdir
  workdir=$(train_flag --workdir)
  [[ -z $workdir || $workdir == gs://* ]] || fail "--workdir is '$workdir', a folder on the VM's own disk, which goes with the VM: give one in a bucket, gs://BUCKET/PATH"
  set_by_launcher --config.strategy.name tpu "${0##*/}"
  set_by_launcher --config.strategy.tpu local "${0##*/}"
  local python=(.venv/bin/python -u -m)
  on 0 "cd $remote_dir || exit; if $(alive train); then echo 'a training runs already: launch/${0##*/} stop' >&2; exit 2; fi"
  # A worker that waits for a program which never came has the ports.
  local old
  old="if $(alive worker); then kill \"\$(cat worker.pid)\"; while $(alive worker); do sleep 1; done; fi"
  on all "cd $remote_dir || exit; $old; $(detached worker "${python[@]}" vit_dist.tpu_worker)"
  on 0 "cd $remote_dir || exit; $(detached train "${python[@]}" vit_dist.train "${TRAIN_FLAGS[@]}")"
}

parse "$@"
case "$action" in
  create | status | install | run | delete) "$action" ;;
  # The name of its host stands before each line: what worker.log says counts on every host, train.log is host 0's.
  logs) on all "cd $remote_dir || exit; touch train.log worker.log; tail -n 100 -F train.log worker.log | sed -u \"s/^/\$(hostname): /\"" ;;
  stop) on 0 "cd $remote_dir || exit; if $(alive train); then kill -TERM \"\$(cat train.pid)\"; while $(alive train); do sleep 1; done; fi; tail -n 3 train.log" ;;
  ssh) tpu tpu-vm ssh "$name" ;;
esac
