"""Which hosts a run has, and which of them this process is, as the engine that started it says.

An engine (a launcher or scheduler) tells each process about the cluster by environment variables of
its own. ENGINES has one row for each; the first that finds its variables decides. No TensorFlow is
needed to ask.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

from vit_dist.cluster.addresses import (
    ALONE,
    address_problem,
    expand_names,
    whole_number,
    with_port,
)
from vit_dist.cluster.slurm import read_slurm
from vit_dist.cluster.tf_config import read_cluster_spec, read_tf_config
from vit_dist.config.errors import ConfigError

DEFAULT_PORT = 2222  # where an engine gives addresses without ports; the one of TensorFlow's docs


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
        if found is None:
            continue
        workers, index = found
        if not workers:
            if engine in _FINAL:
                return None
            continue  # one process as far as this engine knows: it may run below another one
        problem = address_problem(workers)
        if problem:
            raise ConfigError(f"the cluster that {engine} gives cannot be: {problem}")
        if index >= len(workers):
            raise ConfigError(
                f"{engine} says that this is host {index}, counted from 0, of {len(workers)} "
                f"({', '.join(workers)}): start one process for each of them, {ALONE}"
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


# An engine's reader returns (addresses in order, index of this process), ([], 0) for one process
# alone, or None where its variables are not set.
_Found = tuple[list[str], int] | None


def _read_own_variables(environ: Mapping[str, str]) -> _Found:
    """VIT_DIST_HOSTS and VIT_DIST_INDEX: for engines that number processes and no more.

    An Indexed Job of Kubernetes, and with it a JobSet, numbers its pods but does not tell how many
    there are, nor their names, which whoever writes the manifest knows. The names may be in
    Slurm's short form: vit-hosts-0-[0-15].vit:2222.
    """
    text = environ.get("VIT_DIST_HOSTS")
    if not text and "VIT_DIST_INDEX" in environ:
        raise ConfigError(
            f"VIT_DIST_INDEX is {environ['VIT_DIST_INDEX']!r}, but VIT_DIST_HOSTS, the addresses "
            "of all hosts, is not set: set both, or none of them"
        )
    if not text:
        return None
    own = "VIT_DIST_INDEX" in environ or "JOB_COMPLETION_INDEX" not in environ
    name = "VIT_DIST_INDEX" if own else "JOB_COMPLETION_INDEX"
    hosts = expand_names(text)
    return hosts, whole_number(environ.get(name), name)


def _read_indexed_job(environ: Mapping[str, str]) -> _Found:
    """A pod of an Indexed Job, where nobody has told how many there are."""
    index = environ.get("JOB_COMPLETION_INDEX")
    if index is None:
        return None
    raise ConfigError(
        f"this is pod {index} of an indexed job (JOB_COMPLETION_INDEX), which does not tell "
        "where the other pods are: set VIT_DIST_HOSTS=host:port,host:port,... to their stable "
        f"names (launch/jobset.yaml does), {ALONE}"
    )


def _node_list(addresses: str, rank: str, count: str) -> Callable[[Mapping[str, str]], _Found]:
    """The reader of an engine that sets three variables: addresses (one a line), rank, count."""

    def read(environ: Mapping[str, str]) -> _Found:
        if not {addresses, rank, count} & set(environ):
            return None
        nodes = environ.get(addresses, "").split()
        text = environ.get(count)
        expected = len(nodes) if text is None else whole_number(text, count)
        if expected == 1 and len(nodes) <= 1:
            return [], 0
        if expected != len(nodes) or not nodes:
            raise ConfigError(
                f"{count} is {'not set' if text is None else expected}, but {addresses} has "
                f"{len(nodes)} addresses: {' '.join(nodes)!r}"
            )
        return [with_port(n, DEFAULT_PORT) for n in nodes], whole_number(environ.get(rank), rank)

    return read


# Launchers of other frameworks, and engines, that tell how many processes there are, not where.
_SIZES = (
    "WORLD_SIZE",  # torchrun, PyTorch's operators
    "PET_NNODES",  # Kubeflow Trainer
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "JSM_NAMESPACE_SIZE",  # IBM's jsrun
    "FLUX_JOB_SIZE",  # Flux
    "LWS_GROUP_SIZE",  # Kubernetes' LeaderWorkerSet
    "AWS_BATCH_JOB_NUM_NODES",  # AWS Batch
)


def _check_alone(environ: Mapping[str, str]) -> None:
    for variable in _SIZES:
        if re.fullmatch(r"\d+", environ.get(variable, "")) and int(environ[variable]) > 1:
            raise ConfigError(
                f"{variable} says that this is one of {environ[variable]} processes, but nothing "
                "says where the others are, and each would train alone: set TF_CONFIG, or "
                f"VIT_DIST_HOSTS and VIT_DIST_INDEX, in each (docs/clusters.md), {ALONE}"
            )


ENGINES: dict[str, Callable[[Mapping[str, str]], _Found]] = {
    "TF_CONFIG": read_tf_config,
    "VIT_DIST_HOSTS": _read_own_variables,
    "Vertex AI": read_cluster_spec,
    "SkyPilot": _node_list("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "dstack": _node_list("DSTACK_NODES_IPS", "DSTACK_NODE_RANK", "DSTACK_NODES_NUM"),
    "Slurm": read_slurm,
    "Indexed Job": _read_indexed_job,
}
# What these say of the whole run is said on purpose: whatever else there is does not count.
_FINAL = ("TF_CONFIG", "VIT_DIST_HOSTS", "Vertex AI")
