"""The hosts of a run that Slurm's `srun` has started, from the variables that it sets."""

import re
import socket
import subprocess
from collections.abc import Mapping

from vit_dist.config.errors import ConfigError

# Two jobs may share a node, and two steps of one job: the ports of a run follow from both numbers.
# From 32768 on are those that Linux gives away by itself.
_FIRST_PORT, _NUM_PORTS = 12000, 16000


def read_slurm(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
    """(addresses of all tasks, number of this one); ([], 0) for one task, None without Slurm.

    Raises:
      ConfigError: several tasks, of which this process is none, or variables that do not fit.
    """
    tasks = _first(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    if tasks is None:
        return None
    count = _number(tasks, "SLURM_NTASKS")
    if count == 1:
        return [], 0
    if "SLURM_PROCID" not in environ:  # a shell inside of an allocation
        raise ConfigError(
            f"Slurm gave this job {count} tasks, and this process is none of them: start it with "
            "srun, or set strategy.name=local to train on this machine alone"
        )
    index = _number(environ["SLURM_PROCID"], "SLURM_PROCID")
    names = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if not names:
        raise ConfigError("Slurm's SLURM_JOB_NODELIST, the names of the nodes, is not set")
    nodes = expand_nodes(names)
    by_node = _tasks_by_node(environ, count, len(nodes))
    # srun fills one node after the other: task 3 of 2 + 2 is local task 1 of the second node.
    places = [(node, local) for node, n in zip(nodes, by_node, strict=True) for local in range(n)]
    _check_place(environ, index, places)
    first = _first_port(environ)
    addresses = {node: _address(node) for node in nodes}
    return [f"{addresses[node]}:{first + local}" for node, local in places], index


def _check_place(environ: Mapping[str, str], index: int, places: list[tuple[str, int]]) -> None:
    local = environ.get("SLURM_LOCALID")
    if local is None or index >= len(places):  # the caller compares the index
        return
    if _number(local, "SLURM_LOCALID") != places[index][1]:
        raise ConfigError(
            f"task {index} is local task {local} of its node, but {places[index][1]} where one "
            "node is filled after the other: start srun with --distribution=block"
        )


def _first_port(environ: Mapping[str, str]) -> int:
    job = _number(environ.get("SLURM_JOB_ID", "0"), "SLURM_JOB_ID")
    step = environ.get("SLURM_STEP_ID", "")
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


def expand_nodes(text: str) -> list[str]:
    """The names in Slurm's short form: "a[01-02,7],b" is ["a01", "a02", "a7", "b"].

    `scontrol show hostnames` does it as well, but is often missing inside of containers.
    """
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        bracket = re.search(r"\[([^\]]*)\]", part)
        if not bracket:
            names.append(part)
            continue
        before, after = part[: bracket.start()], part[bracket.end() :]
        for piece in bracket[1].split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                # Leading zeros stay; what follows may have brackets of its own.
                names += expand_nodes(f"{before}{number:0{len(first)}}{after}")
    return names


def _address(node: str) -> str:
    """The node's name where it resolves, else the address by which Slurm itself reaches it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        shown = _output("scontrol", "show", "node", node)
        found = re.search(r"\bNodeAddr=(\S+)", shown)
        return found[1] if found else node


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"{name} must be a whole number from 0 on, got {text!r}")
    return int(text)
