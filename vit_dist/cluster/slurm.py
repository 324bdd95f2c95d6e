"""The hosts of a run that Slurm's `srun` has started, from the variables that it sets."""

import functools
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vit_dist.cluster.addresses import ALONE, expand_names, whole_number, with_port
from vit_dist.config.errors import ConfigError

# Two jobs may share a node, and two steps of one job: the ports of a run follow from both numbers.
# From 32768 on are those that Linux gives away by itself.
_FIRST_PORT, _NUM_PORTS = 12000, 16000


class _Place(NamedTuple):
    """Where a task runs."""

    node: str
    local: int  # its number among the tasks of its node


def read_slurm(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
    """(addresses of all tasks, number of this one); ([], 0) for one task, None without Slurm.

    Raises:
      ConfigError: several tasks, of which this process is none, or variables that do not fit.
    """
    count = _num_tasks(environ)
    if count is None:
        return None
    if count == 1:
        return [], 0
    index, places = _find_places(environ, count)
    addresses = _find_addresses(tuple(sorted({place.node for place in places})))
    port, workers = _first_port(environ), []
    taken = dict.fromkeys(addresses.values(), 0)
    # One after the other at each address, not at each node: the nodes of a cluster for tests may
    # be processes of one machine.
    for place in places:
        address = addresses[place.node]
        workers.append(with_port(address, port + taken[address]))
        taken[address] += 1
    return workers, index


def share_of_gpus(visible: int, environ: Mapping[str, str]) -> range | None:
    """Which of the GPUs that TensorFlow sees are this task's, if several tasks share its node.

    `srun --gpus-per-task` and `--gpu-bind` deal them out. Without, as with `--gres=gpu:8`, each
    task sees all, and NCCL hangs if two tasks use one.

    Args:
      visible: how many this process sees.

    Returns:
      Their numbers, from 0 to `visible` - 1; None for all, because Slurm or somebody else has
      dealt them out, or because this task is the only one on its node.

    Raises:
      ConfigError: they cannot be divided by the number of tasks.
    """
    count = _num_tasks(environ)
    if not visible or count is None or count == 1:
        return None
    index, places = _find_places(environ, count)
    node, local = places[index]
    tasks = sum(place.node == node for place in places)
    if tasks == 1 or _has_dealt_gpus(visible, environ):
        return None
    if visible % tasks:
        raise ConfigError(
            f"{tasks} tasks share {visible} GPU(s) on node {node}, which cannot be divided evenly: "
            "give srun another --ntasks-per-node, or have it deal them out by --gpus-per-task"
        )
    each = visible // tasks
    return range(local * each, (local + 1) * each)


def _has_dealt_gpus(visible: int, environ: Mapping[str, str]) -> bool:
    """Whether what this task sees is its own already."""
    if environ.get("SLURM_GPUS_PER_TASK") or "gpu" in environ.get("SLURM_TRES_PER_TASK", ""):
        return True
    binding = _first(environ, "SLURM_GPU_BIND", "SLURM_TRES_BIND")
    if binding and "none" not in binding:
        return True
    on_node = environ.get("SLURM_GPUS_ON_NODE")
    if on_node:
        return visible < whole_number(on_node, "SLURM_GPUS_ON_NODE")
    # Slurm knows of no GPUs here. Then whoever set this variable did so for each task.
    return bool(environ.get("CUDA_VISIBLE_DEVICES"))


def _num_tasks(environ: Mapping[str, str]) -> int | None:
    """How many tasks Slurm has started or is to start; None where it has nothing to do with this.

    Raises:
      ConfigError: several, and this process is none of them.
    """
    tasks = _first(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    # A job of several nodes with no word of tasks: `srun` would start one on each.
    text = tasks or _first(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    # A shell inside an allocation has a job but no tasks: one process by itself. A task with a
    # number above 0 has others beside it, and must not train alone.
    if text is None and environ.get("SLURM_PROCID", "0") == "0":
        return None
    if text is None:
        raise ConfigError(
            f"Slurm says that this is task {environ['SLURM_PROCID']} (SLURM_PROCID), but not of "
            "how many: SLURM_NTASKS is not set"
        )
    count = whole_number(text, "SLURM_NTASKS" if tasks else "SLURM_JOB_NUM_NODES")
    # The script of a batch job is told that it is task 0, as the first of srun's tasks is; only
    # the latter hears of a step.
    in_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if count > 1 and ("SLURM_PROCID" not in environ or in_script):
        what = "tasks" if tasks else "nodes"
        raise ConfigError(
            f"Slurm gave this job {count} {what}, and this process is none of its tasks: start it "
            f"with srun, {ALONE}"
        )
    return count


def _find_places(environ: Mapping[str, str], count: int) -> tuple[int, list[_Place]]:
    """The number of this task, and the places of all."""
    index = whole_number(environ.get("SLURM_PROCID"), "SLURM_PROCID")
    names = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if not names:
        raise ConfigError("Slurm's SLURM_JOB_NODELIST, the names of the nodes, is not set")
    nodes = expand_names(names)
    by_node = _tasks_by_node(environ, count, len(nodes))
    # The part before a colon says how tasks go to nodes, what is behind it how they go to cores.
    cyclic = environ.get("SLURM_DISTRIBUTION", "").split(":")[0] == "cyclic"
    places = [_Place(node, i) for node, n in zip(nodes, by_node, strict=True) for i in range(n)]
    if cyclic:  # task 0 of each node, then task 1 of each, ...: the nodes stay in their order
        places.sort(key=lambda place: place.local)
    if index >= len(places):
        raise ConfigError(
            f"Slurm says that this is task {index}, counted from 0, of {len(places)} (SLURM_PROCID,"
            " SLURM_NTASKS): start it with srun"
        )
    _check_place(environ, index, places)
    return index, places


def _check_place(environ: Mapping[str, str], index: int, places: Sequence[_Place]) -> None:
    local = environ.get("SLURM_LOCALID")
    if local is not None and whole_number(local, "SLURM_LOCALID") != places[index].local:
        raise ConfigError(
            f"task {index} is local task {local} of its node, but {places[index].local} where one "
            "node is filled after the other: start srun with --distribution=block"
        )


def _first_port(environ: Mapping[str, str]) -> int:
    # The number only keeps jobs apart that share a node; without it all tasks still find one port.
    job = whole_number(environ.get("SLURM_JOB_ID", "0"), "SLURM_JOB_ID")
    step = environ.get("SLURM_STEP_ID", "")
    # A batch script outside of srun has the word "batch" or nothing for its step.
    # 64 tasks of one node, and 8 apart for each step of the job.
    return _FIRST_PORT + (job * 64 + (int(step) * 8 if step.isdigit() else 0)) % _NUM_PORTS


def _tasks_by_node(environ: Mapping[str, str], count: int, num_nodes: int) -> list[int]:
    """How many tasks each node has; Slurm's short form "2(x3),1" is [2, 2, 2, 1]."""
    text = _first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if text is None:
        text = f"{count // num_nodes}(x{num_nodes})"
    found: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(number)] * int(times or 1)
    if len(found) != num_nodes or sum(found) != count:
        raise ConfigError(
            f"Slurm says {count} tasks (SLURM_NTASKS) on {num_nodes} nodes, but by node "
            f"{text!r} (SLURM_TASKS_PER_NODE): give srun both --nodes and --ntasks-per-node"
        )
    return found


@functools.cache  # one answer for the life of the process: the hosts compare their lists
def _find_addresses(nodes: tuple[str, ...]) -> dict[str, str]:
    """By node: its name where that resolves, else the address by which Slurm itself reaches it."""
    addresses = {node: node for node in nodes}
    unknown = [node for node in nodes if not _resolves(node)]
    if unknown:
        shown = _output("scontrol", "--oneliner", "show", "node", ",".join(unknown))
        for node, address in re.findall(r"\bNodeName=(\S+).*?\bNodeAddr=(\S+)", shown):
            addresses[node] = address
    return addresses


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):  # the latter for what cannot be a name: address_problem says it
        return False
    return True


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)
