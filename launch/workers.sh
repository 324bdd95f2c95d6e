#!/usr/bin/env bash
# Trains with MultiWorkerMirroredStrategy: several processes on this machine, or this host's share of several hosts.
#
#   launch/workers.sh --workers N [OPTION ...] --config FILE --workdir DIR [--config.key=value ...] [-- FLAG ...]
#   launch/workers.sh --hosts HOST:PORT,HOST:PORT,... --index I [OPTION ...] --config FILE --workdir DIR ...
#
#   --workers N            N workers on this machine
#   --port P               ... at ports P, P+1, ...; free ones by default
#   --hosts LIST --index I worker I of LIST, counted from 0; start one on each host, with the same LIST
#   --gpus-per-worker K    worker i of --workers sees GPUs i*K to i*K+K-1; 0 hides all. Default: each sees all
#   --logs DIR             where worker-I.log go (appended); WORKDIR/logs by default, runs/logs for gs://
#   --grace S              seconds from SIGTERM to SIGKILL, time to save a checkpoint; 30 by default
#   --dry-run              print the commands, which can be pasted anywhere, and run nothing
#   --help
#
# The first worker started here is also shown live. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C make the workers save
# and leave; a second Ctrl-C kills them. When a worker fails, the others wait for it in vain: they get SIGTERM, then
# SIGKILL after 10 s (or --grace, if less), and this script exits with the code of the first that failed. Code 42 means
# stopped and saved: run it again to go on. Should this script itself be killed, Linux kills its workers with it.
# --config*, --workdir and all that follows -- go to `python -m vit_dist.train` unchanged. Paths are relative to the
# checkout.
# PYTHON names the interpreter; else it is .venv/bin/python, or python3 if there is none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

workers='' port='' hosts='' index='' gpus='' logs='' grace=30
addresses=() # of all workers of the cluster
local_indices=()
declare -A pids=() # worker index -> process
status=0
kill_at=     # in SECONDS; set once the workers have been told to stop
interrupted= # by a first Ctrl-C
asked=       # by a signal
live_pid=

parse() {
  while (($#)); do
    case "$1" in
      -h | --help) show_help ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --workers=* | --port=* | --hosts=* | --index=* | --gpus-per-worker=* | --logs=* | --grace=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
      --workers) need_number "$@" && workers=$2 && shift 2 ;;
      --port) need_number "$@" && port=$2 && shift 2 ;;
      --hosts) need_value "$@" && hosts=$2 && shift 2 ;;
      --index) need_number "$@" && index=$2 && shift 2 ;;
      --gpus-per-worker) need_number "$@" && gpus=$2 && shift 2 ;;
      --logs) need_value "$@" && logs=$2 && shift 2 ;;
      --grace) need_number "$@" && grace=$2 && shift 2 ;;
      *) take_train_flag "$@" && shift "$TAKEN" ;;
    esac
  done
}

free_ports() {
  "$PYTHON" - "$1" <<'END'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets: s.bind(("localhost", 0))
print(*(s.getsockname()[1] for s in sockets))
END
}

make_cluster() {
  [[ -n $workers || -n $hosts ]] || fail "give --workers N, or --hosts LIST and --index I"
  [[ -z $workers || -z $hosts ]] || fail "--workers is for one machine, --hosts for several: give one of them"
  local i ports=()
  if [[ -n $workers ]]; then
    ((workers > 0)) || fail "--workers needs at least 1"
    [[ -z $index ]] || fail "--index belongs to --hosts"
    if [[ -n $port ]]; then
      for ((i = 0; i < workers; i++)); do ports+=("$((port + i))"); done
    else
      read -ra ports <<<"$(free_ports "$workers")"
    fi
    for ((i = 0; i < workers; i++)); do
      addresses+=("localhost:${ports[i]}")
      local_indices+=("$i")
    done
  else
    [[ -z $port && -z $gpus ]] || fail "--port and --gpus-per-worker belong to --workers"
    IFS=, read -ra addresses <<<"$hosts"
    for i in "${addresses[@]}"; do
      [[ $i =~ ^[^\",[:space:]]+:[0-9]+$ ]] || fail "--hosts needs HOST:PORT,HOST:PORT,..., not '$i'"
    done
    [[ -n $index ]] || fail "--hosts needs --index, this host's place in the list, counted from 0"
    ((index < ${#addresses[@]})) || fail "--index $index is out of range: --hosts has ${#addresses[@]} entries, counted from 0"
    local_indices=("$index")
  fi
}

choose_logs() {
  [[ -z $logs ]] || return 0
  local workdir
  workdir=$(train_flag --workdir)
  logs=$workdir/logs
  [[ -n $workdir && $workdir != *://* ]] || logs=runs/logs
}

# worker_command I: sets COMMAND. `env` becomes Python (exec), so that the process to signal is Python itself.
worker_command() {
  local list
  list=$(printf ', "%s"' "${addresses[@]}")
  local tf_config="{\"cluster\": {\"worker\": [${list:2}]}, \"task\": {\"type\": \"worker\", \"index\": $1}}"
  COMMAND=(env "TF_CONFIG=$tf_config")
  if [[ $gpus == 0 ]]; then
    COMMAND+=(CUDA_VISIBLE_DEVICES=-1)
  elif [[ -n $gpus ]]; then
    COMMAND+=("CUDA_VISIBLE_DEVICES=$(seq -s, "$(($1 * gpus))" "$(($1 * gpus + gpus - 1))")")
  fi
  COMMAND+=("$PYTHON" -m vit_dist.train "${TRAIN_FLAGS[@]}")
}

# What comes before a worker's command so that Linux kills the worker when this script dies; the script might have died
# before the request was made, hence the comparison. Elsewhere, or without setpriv, there is no such thing.
bind_to_this_script() {
  BOUND=()
  if setpriv --pdeathsig KILL true 2>/dev/null; then
    # shellcheck disable=SC2016  # for the inner shell to expand
    BOUND=(setpriv --pdeathsig KILL bash -c '[[ $PPID == "$0" ]] && exec "$@"' "$$")
  fi
}

start_worker() {
  local log="$logs/worker-$1.log" live
  worker_command "$1"
  if [[ -z $live_pid ]]; then
    # `tee` outlives a signal to the whole process group: what the worker says while it stops is shown too.
    exec {live}> >(trap '' INT TERM HUP USR1 USR2 && exec tee -a -- "$log")
    live_pid=$!
    ${BOUND[@]+"${BOUND[@]}"} "${COMMAND[@]}" </dev/null >&"$live" 2>&1 {live}>&- &
    pids[$1]=$!
    exec {live}>&-
  else
    ${BOUND[@]+"${BOUND[@]}"} "${COMMAND[@]}" </dev/null >>"$log" 2>&1 &
    pids[$1]=$!
  fi
}

# The terminal may be what has gone: that is no reason to leave the workers alone.
say() {
  echo "${0##*/}: $*" >&2 || true
}

signal_workers() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# stop REASON SECONDS: SIGTERM now; SIGKILL after SECONDS, should a worker not hear or not end.
stop() {
  [[ -z $kill_at ]] || return 0
  say "$1; SIGTERM to the workers, SIGKILL after $2 s"
  kill_at=$((SECONDS + $2))
  signal_workers TERM
}

# shellcheck disable=SC2329  # a trap calls it
on_signal() {
  asked=1
  stop "got SIG$1" "$grace"
}

# shellcheck disable=SC2329  # a trap calls it
on_interrupt() {
  if [[ -n $interrupted ]]; then
    say "interrupted again; SIGKILL to the workers"
    signal_workers KILL
  fi
  interrupted=1
  asked=1
  stop interrupted "$grace"
}

# harvest I: notes how a worker that is gone ended.
harvest() {
  local code=0
  wait "${pids[$1]}" || code=$?
  unset "pids[$1]"
  # A worker that SIGTERM (143) ended before it could hear it had done nothing that could be lost.
  if [[ -n $asked ]] && ((code == 143)); then code=42; fi
  ((code)) || return 0
  # A failure counts for more than a stop on request: what the chief did not save is lost.
  if ((status == 0 || status == 42)); then status=$code; fi
  say "worker $1 exited with code $code; see $logs/worker-$1.log"
  ((${#pids[@]})) || return 0
  # 42: it was asked to stop and the run is saved; the chief may still be at it.
  if ((code == 42)); then stop "worker $1 was stopped" "$grace"; else stop "worker $1 failed" "$((grace < 10 ? grace : 10))"; fi
}

supervise() {
  local i
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[$i]}" 2>/dev/null || harvest "$i"
    done
    if [[ -n $kill_at ]] && ((SECONDS >= kill_at)); then signal_workers KILL; fi
    # In the background, because a trap runs only after a command in the foreground has ended.
    sleep 0.2 &
    wait $! || true
  done
}

main() {
  parse "$@"
  make_cluster
  choose_logs
  set_by_launcher --config.strategy.name multiworker "${0##*/}"
  local i
  if [[ -n $DRY_RUN ]]; then
    for i in "${local_indices[@]}"; do
      worker_command "$i"
      echo "$(show_command mkdir -p "$logs") && $(quoted "${COMMAND[@]}") >> $(quoted "$logs/worker-$i.log") 2>&1 &"
    done
    exit 0
  fi
  local name
  for name in TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name as it is now
    trap "on_signal $name" "$name"
  done
  trap on_interrupt INT
  trap '' PIPE # whoever reads what this script says may end first
  mkdir -p "$logs"
  bind_to_this_script
  for i in "${local_indices[@]}"; do
    [[ -n $kill_at ]] || start_worker "$i"
  done
  supervise
  [[ -n $live_pid ]] || exit 42 # asked to stop before the first worker was started
  wait "$live_pid" || true      # for the last lines of the worker shown live
  exit "$status"
}

main "$@"
