"""The cluster that each engine's variables describe, exactly as the engine sets them."""

import socket

import pytest

from tests.support.engines import (
    DSTACK,
    JOBSET,
    OWN,
    SKYPILOT,
    SLURM,
    SLURM_ADDRESSES,
    cluster_spec,
    tf_config,
    without,
)
from vit_dist.cluster import slurm
from vit_dist.cluster.addresses import expand_names
from vit_dist.cluster.environment import Cluster, find_cluster, names_other_hosts
from vit_dist.config.errors import ConfigError


@pytest.fixture(autouse=True)
def names_that_resolve(monkeypatch):
    """Nobody's name server is asked."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])
    slurm._find_addresses.cache_clear()


# TF_CONFIG

TWO = ["host0:2222", "host1:2222"]
CHIEF = {"chief": ["c:1"], "worker": ["a:2", "b:3"]}


@pytest.mark.parametrize(
    "cluster, kind, index, workers, number",
    [
        ({"worker": TWO}, "worker", 1, TWO, 1),
        ({"worker": TWO}, "worker", "1", TWO, 1),  # Vertex AI once gave a string
        (CHIEF, "chief", 0, ["c:1", "a:2", "b:3"], 0),
        (CHIEF, "worker", 0, ["c:1", "a:2", "b:3"], 1),
        (CHIEF, "worker", 1, ["c:1", "a:2", "b:3"], 2),
        ({"chief": ["c:1"]}, "chief", 0, ["c:1"], 0),
        ({"worker": ["[fd00::1]:1", "10.0.0.1:2"]}, "worker", 0, ["[fd00::1]:1", "10.0.0.1:2"], 0),
    ],
)
def test_tf_config(cluster, kind, index, workers, number):
    found = find_cluster(tf_config(cluster, kind, index))
    assert found == Cluster(tuple(workers), number, "TF_CONFIG")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"cluster": {}}',
        '{"cluster": {}, "task": {"type": "worker", "index": 0}, "environment": "cloud"}',
    ],
)
def test_tf_config_of_one_process(text):
    assert find_cluster({"TF_CONFIG": text}) is None


def of(jobs):
    return tf_config(jobs)["TF_CONFIG"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("not JSON", "this is none (Expecting value"),
        ("{}", 'it has no "cluster"'),
        ("[]", 'it has no "cluster"'),
        ('{"cluster": 3}', 'it has no "cluster"'),
        ('{"cluster": {"worker": ["a:1"]}}', "a job is called worker or chief, not None"),
        ('{"cluster": {"worker": ["a:1"]}, "task": 0}', "a job is called worker or chief, not N"),
        (of({"worker": 3}), "'worker' is not a list of addresses"),
        (of({"worker": [3]}), "'worker' is not a list of addresses"),
        (of({"master": ["a:1"]}), "worker or chief, not 'master'"),
        (of({"chief": ["a:1", "b:1"]}), "there is one chief, not 2"),
        (of({"chief": ["a:1"]}), "there are 0 of job 'worker'"),
        (of({"worker": ["a:1", "a:1"]}), "several hosts have the address"),
    ],
)
def test_tf_config_that_cannot_be(text, reason):
    with pytest.raises(ConfigError) as error:
        find_cluster({"TF_CONFIG": text})
    message = str(error.value)
    assert message.startswith('TF_CONFIG must be JSON such as {"cluster": {"worker": ["host1:2222"')
    assert reason in message and message.endswith(f"; got {text!r}")


@pytest.mark.parametrize("index", [1, -1, "x", None, 1.5])
def test_a_task_that_is_none_of_the_cluster(index):
    with pytest.raises(ConfigError, match="there are 1 of job 'worker', counted from 0, not a nu"):
        find_cluster(tf_config({"worker": ["a:1"]}, index=index))


@pytest.mark.parametrize("job", ["ps", "evaluator"])
@pytest.mark.parametrize("task", ["worker", None])
def test_other_jobs_are_named(job, task):
    cluster = {"worker": ["a:1"], job: ["b:1"]}
    with pytest.raises(ConfigError, match=f"a job '{job}' has nothing to do here"):
        find_cluster(tf_config(cluster, task or job))


# CLUSTER_SPEC, of Vertex AI

POOLS = {"workerpool0": ["c:1"], "workerpool1": ["a:2", "b:3"]}


@pytest.mark.parametrize(
    "cluster, kind, index, workers, number",
    [
        (POOLS, "workerpool0", 0, ["c:1", "a:2", "b:3"], 0),
        (POOLS, "workerpool1", 1, ["c:1", "a:2", "b:3"], 2),
        ({"workerpool0": ["c:1"]}, "workerpool0", 0, ["c:1"], 0),
    ],
)
def test_cluster_spec(cluster, kind, index, workers, number):
    found = find_cluster(cluster_spec(cluster, kind, index))
    assert found == Cluster(tuple(workers), number, "Vertex AI")


@pytest.mark.parametrize(
    "environ, message",
    [
        (
            cluster_spec({**POOLS, "workerpool2": ["p:1"]}),
            r"a job 'workerpool2' \(ps\) has nothing",
        ),
        (cluster_spec(POOLS, "workerpool3"), r"a job 'workerpool3' \(evaluator\) has nothing"),
        (cluster_spec(POOLS, "worker"), "there are 0 of job 'worker'"),
        (cluster_spec(POOLS, "pool"), "is called workerpool0 or workerpool1, not 'pool'"),
        (cluster_spec(POOLS, 3), "is called workerpool0 or workerpool1, not 3"),
        (cluster_spec({"workerpool0": ["a:1", "b:1"]}), "there is one chief, not 2"),
        ({"CLUSTER_SPEC": "{"}, 'CLUSTER_SPEC must be JSON such as {"cluster": {"workerpool0":'),
    ],
)
def test_cluster_spec_that_cannot_be(environ, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environ)


@pytest.mark.parametrize("address", ["a", "a:", ":1", "::1:2222", "a:0", "a:65536", "a b:1", ""])
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="is no address, which is host:port"):
        find_cluster(tf_config({"worker": [address]}))


# engines


@pytest.mark.parametrize(
    "environ, workers, index, engine",
    [
        (SKYPILOT, ["10.0.0.1:2222", "10.0.0.2:2222"], 1, "SkyPilot"),
        (DSTACK, ["[fd00::1]:2222", "[fd00::2]:2222"], 0, "dstack"),
        (OWN, ["a:1", "b:2"], 1, "VIT_DIST_HOSTS"),
        (JOBSET, ["j-w-0-0.j:1", "j-w-0-1.j:1"], 1, "VIT_DIST_HOSTS"),
        (SLURM, SLURM_ADDRESSES, 3, "Slurm"),
        # One process as far as SkyPilot knows, and below it a scheduler that knows of more.
        ({**SLURM, "SKYPILOT_NUM_NODES": "1"}, SLURM_ADDRESSES, 3, "Slurm"),
        (
            {**DSTACK, "JOB_COMPLETION_INDEX": "0"},
            ["[fd00::1]:2222", "[fd00::2]:2222"],
            0,
            "dstack",
        ),
        ({**SLURM, **tf_config({"worker": TWO})}, TWO, 0, "TF_CONFIG"),  # somebody chose it
    ],
)
def test_engines(environ, workers, index, engine):
    assert find_cluster(environ) == Cluster(tuple(workers), index, engine)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SKYPILOT, "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1"},
        {**DSTACK, "DSTACK_NODES_IPS": "", "DSTACK_NODES_NUM": "1"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {"SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},
        # A step of one task in a job of several: `srun --ntasks=1`.
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        # Whoever sets TF_CONFIG knows better than what is left of other launchers.
        {**tf_config({}), "WORLD_SIZE": "4", "JOB_COMPLETION_INDEX": "1"},
    ],
)
def test_one_process(environ):
    assert find_cluster(environ) is None


@pytest.mark.parametrize(
    "environ, message",
    [
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "3"}, "NUM_NODES is 3, but SKYPILOT_NODE_IPS has 2 ad"),
        (without(SKYPILOT, "SKYPILOT_NODE_IPS"), "SKYPILOT_NODE_IPS has 0 addresses"),
        ({"SKYPILOT_NODE_RANK": "1"}, "SKYPILOT_NUM_NODES is not set, but SKYPILOT_NODE_IPS has 0"),
        ({"DSTACK_NODES_IPS": ""}, "DSTACK_NODES_NUM is not set, but DSTACK_NODES_IPS has 0 addr"),
        (
            {**DSTACK, "DSTACK_NODE_RANK": "2"},
            r"dstack says that this is host 2, counted from 0, of 2",
        ),
        (without(SKYPILOT, "SKYPILOT_NODE_RANK"), "SKYPILOT_NODE_RANK must be a whole number"),
        ({**OWN, "VIT_DIST_INDEX": "2"}, r"this is host 2, counted from 0, of 2 \(a:1, b:2\)"),
        ({**OWN, "VIT_DIST_HOSTS": "a,b"}, "VIT_DIST_HOSTS gives cannot be: 'a' is no address"),
        ({**OWN, "VIT_DIST_HOSTS": "h[3-1]:1"}, r"'3-1' in 'h\[3-1\]:1' is no range of numbers"),
        (
            {"VIT_DIST_HOSTS": "a:1,b:2"},
            "VIT_DIST_INDEX must be a whole number from 0 on, got None",
        ),
        ({**JOBSET, "JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX must be a whole number"),
        ({"JOB_COMPLETION_INDEX": "0"}, "pod 0 of an indexed job .* set VIT_DIST_HOSTS="),
        (without(SLURM, "SLURM_PROCID"), "gave this job 4 tasks, and this process is none .* srun"),
        # A batch script that calls Python itself is "task 0", as the first task of srun is.
        ({**without(SLURM, "SLURM_STEP_ID"), "ENVIRONMENT": "BATCH"}, "4 tasks, .* with srun"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, "2 nodes, "),
        ({"SLURM_PROCID": "1"}, "this is task 1 .*, but not of how many: SLURM_NTASKS is not set"),
        ({"SLURM_NNODES": "2"}, "gave this job 2 nodes, and this process is none of its tasks"),
        ({**SLURM, "SLURM_PROCID": "4"}, "this is task 4, counted from 0, of 4"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2,1"}, "4 tasks .* on 2 nodes, but by node '2,1'"),
        ({**SLURM, "SLURM_LOCALID": "0"}, "task 3 is local task 0 .* --distribution=block"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "one of 8 processes, .* each would train alone"),
        ({"SLURM_NTASKS": "1", "PMI_SIZE": "8"}, "one of 8 processes, .* each would train alone"),
        ({"LWS_GROUP_SIZE": "2"}, "LWS_GROUP_SIZE says"),
        ({"AWS_BATCH_JOB_NUM_NODES": "2"}, "AWS_BATCH_JOB_NUM_NODES says"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE says"),
    ],
)
def test_several_processes_of_which_nobody_knows(environ, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environ)


def test_whether_there_are_others():
    assert not names_other_hosts({}) and not names_other_hosts({"TF_CONFIG": '{"cluster": {}}'})
    assert names_other_hosts(SKYPILOT) and names_other_hosts({"WORLD_SIZE": "2"})


# Slurm's short form


@pytest.mark.parametrize(
    "text, names",
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],m", ["n08", "n09", "n10", "n12", "m"]),
        ("n[0-1]:2222, m:1", ["n0:2222", "n1:2222", "m:1"]),
        ("[fd00::1]:2222,[fd00::2]:2222", ["[fd00::1]:2222", "[fd00::2]:2222"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
    ],
)
def test_node_lists(text, names):
    assert expand_names(text) == names
