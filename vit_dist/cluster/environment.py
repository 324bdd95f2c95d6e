"""Which hosts a run has, and which of them this process is, as the engine that started it says.

An engine (a launcher or scheduler) tells each process about the cluster by environment variables of
its own. ENGINES has one row for each; the first that finds its variables decides. No TensorFlow is
needed to ask.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence

from vit_dist.cluster.slurm import read_slurm
from vit_dist.config.errors import ConfigError

DEFAULT_PORT = 2222  # where an engine gives addresses without ports; the one of TensorFlow's docs

_EXAMPLE = (
    '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
)
_ALONE = "or set strategy.name=local to train on this machine alone"
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/,\[\]\"']+):(\d{1,5})")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The hosts of a run: processes that train together, one `tf.distribute` worker each."""

    workers: tuple[str, ...]  # "host:port" of each; the first is the chief
    index: int  # which of them this process is
    engine: str  # the row of ENGINES that knew, for messages

    def name(self, index: int) -> str:
        """How messages call a host: "worker 1 (host2:2222)"."""
        return f"worker {index} ({self.workers[index]})"


def find_cluster(environ: Mapping[str, str] | None = None) -> Cluster | None:
    """The cluster that the environment describes; None where it speaks of no other process.

    Args:
      environ: the variables; None for those of this process.

    Raises:
      ConfigError: the variables of an engine contradict each other, or say that several processes
        were started without telling where the others are.
    """
    environ = os.environ if environ is None else environ
    for engine, read in ENGINES.items():
        found = read(environ)
        if found is not None:
            workers, index = found
            if not workers:  # an engine's way to say that there is one process
                return None
            problem = _address_problem(workers)
            if problem:
                raise ConfigError(f"the cluster that {engine} gives cannot be: {problem}")
            if index >= len(workers):
                raise ConfigError(
                    f"{engine} says that this is host {index}, counted from 0, of {len(workers)} "
                    f"({', '.join(workers)}): start one process for each of them, {_ALONE}"
                )
            return Cluster(tuple(workers), index, engine)
    _check_alone(environ)
    return None


def names_other_hosts(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment speaks of other processes, be it in a way that cannot be."""
    try:
        return find_cluster(environ) is not None
    except ConfigError:
        return True


def _address_problem(workers: Sequence[str]) -> str | None:
    for worker in workers:
        found = _ADDRESS.fullmatch(worker)
        if not found or not 0 < int(found[1]) < 2**16:
            return (
                f"{worker!r} is no address, which is host:port: host1:2222, 10.0.0.1:2222 or, for "
                "IPv6, [fd00::1]:2222"
            )
    twice = sorted({worker for worker in workers if workers.count(worker) > 1})
    return f"several hosts have the address {twice[0]}" if twice else None


# An engine's reader returns (addresses in order, index of this process), ([], 0) for one process
# alone, or None where its variables are not set.
_Found = tuple[list[str], int] | None


def _from_tf_config(environ: Mapping[str, str]) -> _Found:
    """TF_CONFIG: TensorFlow's own variable; Vertex AI, Kubeflow, Ray and launch/workers.sh set it.

    A job "chief" is worker 0 and the job "worker" follows it, as TensorFlow counts them.
    """
    text = environ.get("TF_CONFIG")
    if not text:
        return None

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"TF_CONFIG must be JSON such as {_EXAMPLE}; {reason}; got {text!r}")

    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise refuse(f"this is none ({error})") from None
    jobs = parsed.get("cluster") if isinstance(parsed, dict) else None
    if not isinstance(jobs, dict):
        raise refuse('it has no "cluster"')
    if not jobs:
        return [], 0  # Vertex AI's and Kubeflow's way to say that there is one process
    task = parsed.get("task")
    kind, index = (task.get("type"), task.get("index")) if isinstance(task, dict) else (None, None)
    for job in (*jobs, kind):
        if job in ("ps", "evaluator"):
            raise refuse(
                f"a job {job!r} has nothing to do here, because the workers hold the weights and "
                "evaluate them, so start only workers, of which one may be called chief"
            )
        if job not in ("chief", "worker"):
            raise refuse(f"a job is called worker or chief, not {job!r}")
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            raise refuse(f"{job!r} is not a list of addresses")
    chiefs, others = jobs.get("chief", []), jobs.get("worker", [])
    problem = _address_problem(chiefs + others)
    if problem or len(chiefs) > 1:
        raise refuse(problem or f"there is one chief, not {len(chiefs)}")
    if not re.fullmatch(r"\d+", str(index)) or int(str(index)) >= len(jobs.get(kind, [])):
        known = len(jobs.get(kind, []))
        raise refuse(f"there are {known} of job {kind!r}, counted from 0, not a number {index!r}")
    return chiefs + others, int(str(index)) + (0 if kind == "chief" else len(chiefs))


def _from_own_variables(environ: Mapping[str, str]) -> _Found:
    """VIT_DIST_HOSTS=host:port,host:port,... and VIT_DIST_INDEX: for engines without a row here.

    An Indexed Job of Kubernetes, and with it a JobSet, numbers its pods but does not tell how many
    there are, nor their names, which whoever writes the manifest knows.
    """
    hosts = environ.get("VIT_DIST_HOSTS")
    index = environ.get("VIT_DIST_INDEX") or environ.get("JOB_COMPLETION_INDEX")
    if hosts is None and environ.get("JOB_COMPLETION_INDEX") is None:
        return None
    if not hosts:
        raise ConfigError(
            f"this is pod {index} of an indexed job (JOB_COMPLETION_INDEX), which does not tell "
            "where the other pods are: set VIT_DIST_HOSTS=host:port,host:port,... to their stable "
            f"names, {_ALONE}"
        )
    return [h.strip() for h in hosts.split(",")], _number(index, "VIT_DIST_INDEX")


def _node_list(addresses: str, rank: str, count: str) -> Callable[[Mapping[str, str]], _Found]:
    """The reader of an engine that sets three variables: addresses (one a line), rank, count."""

    def read(environ: Mapping[str, str]) -> _Found:
        if addresses not in environ and count not in environ:
            return None
        nodes = environ.get(addresses, "").split()
        expected = environ.get(count)
        if expected is not None and _number(expected, count) != len(nodes):
            raise ConfigError(
                f"{count} is {expected}, but {addresses} has {len(nodes)} addresses: "
                f"{' '.join(nodes)!r}"
            )
        if len(nodes) == 1:
            return [], 0
        return [_with_port(node, DEFAULT_PORT) for node in nodes], _number(environ.get(rank), rank)

    return read


def _check_alone(environ: Mapping[str, str]) -> None:
    """Launchers of other frameworks tell how many processes they started, not where."""
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"):
        if re.fullmatch(r"\d+", environ.get(variable, "")) and int(environ[variable]) > 1:
            raise ConfigError(
                f"{variable} says that this is one of {environ[variable]} processes, but nothing "
                "says where the others are, and each would train alone: set TF_CONFIG, or "
                f"VIT_DIST_HOSTS and VIT_DIST_INDEX, in each (docs/distributed.md), {_ALONE}"
            )


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _number(text: str | None, name: str) -> int:
    if text is None or not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"{name} must be a whole number from 0 on, got {text!r}")
    return int(text)


ENGINES: dict[str, Callable[[Mapping[str, str]], _Found]] = {
    "TF_CONFIG": _from_tf_config,
    "VIT_DIST_HOSTS": _from_own_variables,
    "SkyPilot": _node_list("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "dstack": _node_list("DSTACK_NODES_IPS", "DSTACK_NODE_RANK", "DSTACK_NODES_NUM"),
    "Slurm": read_slurm,
}
