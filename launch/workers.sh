#!/usr/bin/env bash
# Trains with MultiWorkerMirroredStrategy: several processes on this machine, or this host's share of several hosts.
#
#   launch/workers.sh --workers N [OPTION ...] --config FILE --workdir DIR [--config.key=value ...] [-- FLAG ...]
#   launch/workers.sh --hosts HOST,HOST,... [OPTION ...] --config FILE --workdir DIR ...
#
#   --workers N            N workers on this machine
#   --port P               ... at ports P, P+1, ...; free ones by default
#   --hosts LIST           all workers, HOST or HOST:PORT (2222); the same command on each machine starts its own
#   --index I              ... worker I of LIST, counted from 0, where a machine does not know itself by its name there
#   --gpus-per-worker K    worker i on this machine sees GPUs i*K to i*K+K-1, of the list CUDA_VISIBLE_DEVICES where that
#                          is set; 0 hides all. Default: each sees all
#   --logs DIR             where worker-I.log go (appended); WORKDIR/logs by default, runs/logs for gs://
#   --grace S              seconds from SIGTERM to SIGKILL, time to save a checkpoint; 30 by default
#   --max-restarts N       how often all start again without a newer checkpoint; 3 by default, 0: never
#   --dry-run              print the commands, which can be pasted anywhere, and run nothing
#   --help
#
# What the workers print is shown with their names in front. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C make the
# workers save and leave; a second Ctrl-C kills them. When a worker fails, the others wait for it in vain: they get
# SIGTERM, then SIGKILL after 10 s (or --grace, if less), and all start again from the newest checkpoint. In the end this
# exits with the code of the first that failed. Code 42 means stopped and saved: run it again to go on. Code 2 is a
# mistake, and nothing starts again. Should this program itself be killed, Linux kills its workers with it.
# --config*, --workdir and all that follows -- go to `python -m vit_dist.train` unchanged. Paths are relative to the
# checkout.
#
# This is `python -m vit_dist.launch`, whose --help lists more options.
# PYTHON names the interpreter; else it is .venv/bin/python, or python3 if there is none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help_if_asked "$@"
for word; do
  case "${word%%=*}" in
    --workers | --hosts) exec "$PYTHON" -m vit_dist.launch "$@" ;;
    --) break ;;
  esac
done
fail "give --workers N for this machine alone, or --hosts LIST for several (see --help)"
