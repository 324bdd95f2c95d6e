"""The hosts and GPUs of Slurm's tasks, from the variables that `srun` sets."""

import socket

import pytest

from tests.support.engines import SLURM
from vit_dist.cluster import slurm
from vit_dist.cluster.environment import find_cluster
from vit_dist.cluster.slurm import share_of_gpus
from vit_dist.config.errors import ConfigError


@pytest.fixture(autouse=True)
def names_that_resolve(monkeypatch):
    """Nobody's name server is asked."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])
    slurm._find_addresses.cache_clear()


def test_tasks_that_fill_nodes_unevenly():
    environ = {**SLURM, "SLURM_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}
    found = find_cluster(environ)
    assert found.workers == ("gpu01:18400", "gpu01:18401", "gpu01:18402", "gpu02:18400")


def test_a_step_of_part_of_a_job():
    step = {
        "SLURM_STEP_NODELIST": "gpu02",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": "1",
    }
    found = find_cluster({**SLURM, **step})
    assert found.workers == ("gpu02:18408", "gpu02:18409") and found.index == 1


@pytest.mark.parametrize("index, local", [(1, 0), (2, 1)])
def test_tasks_that_go_round_the_nodes(index, local):
    environ = {**SLURM, "SLURM_DISTRIBUTION": "cyclic:block"}
    environ |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(local)}
    found = find_cluster(environ)
    assert found.workers == ("gpu01:18400", "gpu02:18400", "gpu01:18401", "gpu02:18401")
    assert found.index == index


@pytest.fixture
def names_that_do_not_resolve(monkeypatch):
    def fail(host, port):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


SHOWN = "NodeName={} Arch=x86_64 CPUAlloc=0 NodeAddr={} NodeHostName=x Version=22.05\n"


@pytest.mark.parametrize("node", ["gpu..01", "g" * 64])
def test_nodes_whose_names_cannot_be(monkeypatch, node):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: host.encode("idna"))
    monkeypatch.setattr(slurm, "_output", lambda *command: "")
    with pytest.raises(ConfigError, match=r"the cluster that Slurm gives cannot be: .* no address"):
        find_cluster({**SLURM, "SLURM_JOB_NODELIST": f"{node},gpu02"})


def test_names_that_only_slurm_knows(monkeypatch, names_that_do_not_resolve):
    asked = []

    def output(*command):
        asked.append(command)
        return SHOWN.format("gpu01", "10.0.0.1") + "Node gpu02 not found\n"

    monkeypatch.setattr(slurm, "_output", output)
    for _ in range(2):
        assert find_cluster(SLURM).workers[::2] == ("10.0.0.1:18400", "gpu02:18400")
    assert asked == [("scontrol", "--oneliner", "show", "node", "gpu01,gpu02")]


def test_nodes_at_one_address_have_ports_of_their_own(monkeypatch, names_that_do_not_resolve):
    text = SHOWN.format("gpu01", "::1") + SHOWN.format("gpu02", "::1")
    monkeypatch.setattr(slurm, "_output", lambda *command: text)
    assert find_cluster(SLURM).workers == tuple(f"[::1]:{18400 + i}" for i in range(4))


# GPUs

GRES = {**SLURM, "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
ONE_EACH = {
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environ, visible, own",
    [
        ({}, 8, None),
        ({"SLURM_NTASKS": "1"}, 8, None),
        # --gres=gpu:8 shows all to each task of the node.
        (GRES, 8, range(4, 8)),
        ({**GRES, "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, 8, range(4)),
        ({**GRES, "SLURM_GPU_BIND": "none"}, 8, range(4, 8)),
        # Slurm that was never told of GPUs.
        (SLURM, 2, range(1, 2)),
        # The task has the node for itself.
        ({**GRES, **ONE_EACH}, 8, None),
        # --gpu-bind and --gpus-per-task have dealt them out, with and without cgroups.
        (GRES, 4, None),
        ({**GRES, "SLURM_GPUS_PER_TASK": "4"}, 8, None),
        ({**GRES, "SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=4"}, 8, None),
        ({**GRES, "SLURM_GPU_BIND": "closest"}, 8, None),
        # The command line did: CUDA_VISIBLE_DEVICES=$SLURM_LOCALID.
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}, 1, None),
        (SLURM, 0, None),
    ],
)
def test_gpus_of_a_task(environ, visible, own):
    assert share_of_gpus(visible, environ) == own


@pytest.mark.parametrize("visible", [1, 3])
def test_gpus_that_cannot_be_divided(visible):
    environ = {**SLURM, "SLURM_GPUS_ON_NODE": str(visible)}
    with pytest.raises(ConfigError, match=f"2 tasks share {visible} .* node gpu02, which cannot"):
        share_of_gpus(visible, environ)
