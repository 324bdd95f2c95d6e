"""The hosts of a run in JSON: TF_CONFIG, and CLUSTER_SPEC in which Vertex AI says the same."""

import json
import re
from collections.abc import Mapping
from typing import Any

from vit_dist.cluster.addresses import address_problem
from vit_dist.config.errors import ConfigError

_EXAMPLES = {
    "TF_CONFIG": (
        '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
        '"task": {"type": "worker", "index": 0}}'
    ),
    "CLUSTER_SPEC": (
        '{"cluster": {"workerpool0": ["host1:2222"], "workerpool1": ["host2:2222"]}, '
        '"task": {"type": "workerpool0", "index": 0}}'
    ),
}
# What the positions of workerPoolSpecs mean to Vertex AI. TF_CONFIG has the names on the right.
_POOLS = {
    "workerpool0": "chief",
    "workerpool1": "worker",
    "workerpool2": "ps",
    "workerpool3": "evaluator",
}
_TRAINING = ("chief", "worker")  # the jobs that train


def read_tf_config(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
    """TensorFlow's own variable; Vertex AI, Kubeflow, Ray and our launchers set it.

    Returns:
      (addresses of all hosts, number of this one); ([], 0) for one process; None if it is not set.

    Raises:
      ConfigError: it cannot be; says why, and what was found.
    """
    return _read("TF_CONFIG", environ, {})


def read_cluster_spec(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
    """Vertex AI's variable, which it sets for every framework; see read_tf_config."""
    return _read("CLUSTER_SPEC", environ, _POOLS)


def _read(
    variable: str, environ: Mapping[str, str], names: Mapping[str, str]
) -> tuple[list[str], int] | None:
    """`names` tells the job for what the variable calls it, where it has another name for it."""
    text = environ.get(variable)
    if not text:
        return None

    def refuse(reason: str) -> ConfigError:
        example = _EXAMPLES[variable]
        return ConfigError(f"{variable} must be JSON such as {example}; {reason}; got {text!r}")

    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise refuse(f"this is none ({error})") from None
    cluster = parsed.get("cluster") if isinstance(parsed, dict) else None
    if not isinstance(cluster, dict):
        raise refuse('it has no "cluster"')
    if not cluster:
        return [], 0  # Vertex AI's and Kubeflow's way to say that there is one process
    task = parsed.get("task")
    own: dict[str, Any] = task if isinstance(task, dict) else {}
    kind, index = own.get("type"), own.get("index")
    problem = _job_problem([*cluster, kind], names)
    if problem is None:
        problem = _addresses_problem(cluster)
    if problem is not None:
        raise refuse(problem)
    # A job "chief" is worker 0 and the job "worker" follows it, as TensorFlow counts them.
    jobs = {names.get(job, job): addresses for job, addresses in cluster.items()}
    chiefs, others = jobs.get("chief", []), jobs.get("worker", [])
    problem = address_problem(chiefs + others)
    if problem or len(chiefs) > 1:
        raise refuse(problem or f"there is one chief, not {len(chiefs)}")
    known = len(cluster.get(kind, []))
    if not re.fullmatch(r"\d+", str(index)) or int(str(index)) >= known:
        raise refuse(f"there are {known} of job {kind!r}, counted from 0, not a number {index!r}")
    is_chief = names.get(str(kind), kind) == "chief"
    return chiefs + others, int(str(index)) + (0 if is_chief else len(chiefs))


def _job_problem(jobs: list[Any], names: Mapping[str, str]) -> str | None:
    """What is wrong with the names of the jobs, this process's own among them."""
    for job in jobs:
        meaning = names.get(job, job) if isinstance(job, str) else job
        if meaning in ("ps", "evaluator"):
            called = repr(job) if job == meaning else f"{job!r} ({meaning})"
            return (
                f"a job {called} has nothing to do here, because the workers hold the weights and "
                "evaluate them, so start only workers, of which one may be called chief"
            )
        if meaning not in _TRAINING:
            own = " or ".join(name for name, m in names.items() if m in _TRAINING)
            return f"a job is called {own or 'worker or chief'}, not {job!r}"
    return None


def _addresses_problem(cluster: Mapping[str, Any]) -> str | None:
    for job, addresses in cluster.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            return f"{job!r} is not a list of addresses"
    return None
