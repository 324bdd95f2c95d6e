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
# `python -m vit_dist.train` unchanged. Paths are relative to the checkout.
#
# This is `python -m vit_dist.launch`, whose --help lists more options: it hands signals on, and starts the run again
# when it fails.
# PYTHON names the interpreter; else it is .venv/bin/python, or python3 if there is none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help_if_asked "$@"
exec "$PYTHON" -m vit_dist.launch "$@"
