#!/usr/bin/env bash
# Trains on this machine, in one process.
#
#   launch/local.sh [--cpus N] [--dry-run] --config FILE --workdir DIR [--config.key=value ...] [-- FLAG ...]
#
#   --cpus N     N virtual devices on the CPU instead of the GPUs: how a run behaves on N devices, without them
#   --dry-run    print the command, which can be pasted anywhere, and run nothing
#   --help
#
# All GPUs are used, or those that CUDA_VISIBLE_DEVICES names; without any, the CPU. A scheduler's variables that
# describe several hosts do not count: this machine trains alone. --config*, --workdir and all that follows -- go to
# `python -m vit_dist.train` unchanged. Paths are relative to the checkout. The process becomes Python itself, so
# signals need no handing on.
# PYTHON names the interpreter; else it is .venv/bin/python, or python3 if there is none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cpus=
while (($#)); do
  case "$1" in
    -h | --help) show_help ;;
    --dry-run)
      DRY_RUN=1
      shift
      ;;
    --cpus=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --cpus)
      need_number "$@"
      cpus=$2
      shift 2
      ;;
    *)
      take_train_flag "$@"
      shift "$TAKEN"
      ;;
  esac
done

# TensorFlow itself reads these two, which a cluster may have left in the environment.
environment=(-u TF_CONFIG -u TPU_NAME)
if [[ -n $cpus ]]; then
  ((cpus > 0)) || fail "--cpus needs at least 1"
  environment+=(CUDA_VISIBLE_DEVICES=-1)
  set_by_launcher --config.strategy.name mirrored --cpus
  set_by_launcher --config.strategy.virtual_cpus "$cpus" --cpus
elif ! has_train_flag --config.strategy.name; then
  TRAIN_FLAGS+=(--config.strategy.name=local)
fi

need_train_flags
command=(env "${environment[@]}" "$PYTHON" -m vit_dist.train "${TRAIN_FLAGS[@]}")
if [[ -n $DRY_RUN ]]; then
  show_command "${command[@]}"
else
  exec "${command[@]}"
fi
