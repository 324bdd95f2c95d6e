#!/usr/bin/env bash
# Trains on a Cloud TPU VM, by way of gcloud.
#
#   launch/tpu_vm.sh create  [OPTION ...] [--spot]    rent it
#   launch/tpu_vm.sh install [OPTION ...]             copy this checkout, changes included, and install .[tpu]
#   launch/tpu_vm.sh run     [OPTION ...] --config FILE --workdir gs://... [--config.key=value ...] [-- FLAG ...]
#   launch/tpu_vm.sh logs    [OPTION ...]             follow what it prints
#   launch/tpu_vm.sh ssh     [OPTION ...]             a shell on it
#   launch/tpu_vm.sh delete  [OPTION ...]             give it back
#
#   --name NAME        or TPU_NAME
#   --zone ZONE        or TPU_ZONE
#   --project PROJECT  or TPU_PROJECT; gcloud's default if neither
#   --type TYPE        or TPU_TYPE; for create: v5litepod-8, v6e-4, v4-8, ...
#   --version VERSION  or TPU_VERSION; for create: the runtime image, by default the one that belongs to TYPE
#   --spot             for create: cheaper, may be taken away at any time
#   --dry-run          print the commands, which can be pasted anywhere, and run nothing
#   --help
#
# `run` detaches: the training goes on when the connection ends. --config*, --workdir and all that follows -- go to
# `python -m vit_dist.train` unchanged. A run that was preempted goes on from its last checkpoint: create, install and
# run again with the same --workdir.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=
name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
spot=
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
      create | install | run | logs | ssh | delete)
        if [[ -z $action ]]; then action=$1 && shift; else take_train_flag "$@" && shift "$TAKEN"; fi
        ;;
      *) take_train_flag "$@" && shift "$TAKEN" ;;
    esac
  done
  [[ -n $action ]] || fail "say what to do: create, install, run, logs, ssh or delete"
  [[ -n $name ]] || fail "give --name, or set TPU_NAME"
  [[ -n $zone ]] || fail "give --zone, or set TPU_ZONE"
  [[ $action == run || ${#TRAIN_FLAGS[@]} -eq 0 ]] || fail "only run takes flags of vit_dist.train, such as ${TRAIN_FLAGS[0]}"
  [[ $action == create || -z $spot ]] || fail "--spot belongs to create"
}

show_or_run() {
  if [[ -n $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# tpu_vm VERB ARGUMENT...
tpu_vm() {
  show_or_run gcloud compute tpus tpu-vm "$@" "--zone=$zone" ${project:+"--project=$project"}
}

on_workers() {
  tpu_vm ssh "$name" --worker=all "--command=$1"
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
  # From the number 9 on a slice has several hosts. TPUStrategy reaches those of others only through Google's pod
  # images, which carry an older TensorFlow; here each host would train alone, all into one workdir.
  ((BASH_REMATCH[1] <= 8)) || fail "$type has several hosts: choose one of at most 8, such as ${type%-*}-8"
  tpu_vm create "$name" "--accelerator-type=$type" "--version=${version:-$(runtime_image)}" ${spot:+--spot}
}

install() {
  show_or_run mkdir -p "${archive%/*}"
  show_or_run tar -czf "$archive" -C "$CHECKOUT" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude=./build .
  tpu_vm scp "$archive" "$name:checkout.tgz" --worker=all
  local unpack="mkdir -p $remote_dir && tar -xzf checkout.tgz -C $remote_dir && cd $remote_dir"
  # Ubuntu's python3 comes without venv.
  local venv="{ test -x .venv/bin/pip || python3 -m venv .venv || { sudo apt-get update -q && sudo apt-get install -qy python3-venv && python3 -m venv --clear .venv; }; }"
  on_workers "$unpack && $venv && .venv/bin/python -m pip install --quiet -e '.[tpu]'"
}

run() {
  need_train_flags
  local workdir
  workdir=$(train_flag --workdir)
  [[ -z $workdir || $workdir == gs://* ]] || fail "--workdir is '$workdir', a folder on the VM's own disk, which goes with the VM: give one in a bucket, gs://BUCKET/PATH"
  set_by_launcher --config.strategy.name tpu "${0##*/}"
  set_by_launcher --config.strategy.tpu local "${0##*/}"
  local train
  train=$(quoted .venv/bin/python -u -m vit_dist.train "${TRAIN_FLAGS[@]}")
  on_workers "cd $remote_dir || exit; nohup $train >> train.log 2>&1 < /dev/null & echo started as process \$!"
}

parse "$@"
case "$action" in
  create | install | run) "$action" ;;
  logs) on_workers "tail -n 100 -F $remote_dir/train.log" ;;
  ssh) tpu_vm ssh "$name" ;;
  delete) tpu_vm delete "$name" --quiet ;;
esac
