"""What each check of the doctor finds where something is broken on purpose."""

import dataclasses
import fcntl
import socket
import termios
import threading

import numpy as np
import pytest
import tensorflow as tf

from tests.support import tiny
from tests.support.clusters import free_addresses, in_threads
from tests.support.waiting import wait_for
from vit_dist.cluster import gpus, links
from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.gpus import Card, Found
from vit_dist.cluster.meeting import meet
from vit_dist.cluster.strategy import make_strategy
from vit_dist.run import health, machine
from vit_dist.run.check import check
from vit_dist.run.health import Examination, WrongError


@pytest.fixture(scope="module")
def strategy():
    return make_strategy(name="mirrored", virtual_cpus=2)


def wrong(function, *args, **kwargs):
    """The line of a check that fails."""
    lines = []
    examination = Examination(seconds=300, show=lines.append)
    assert not examination.check("this", lambda: function(*args, **kwargs))
    assert lines[0].startswith("this        WRONG       ") and examination.wrong == ["this"]
    return lines[0][24:]


# The examination itself


def test_checks_that_need_what_is_wrong_are_left_out():
    examination = Examination(seconds=300, show=lambda line: None)
    assert examination.check("a", lambda: "fine")
    assert not examination.check("b", lambda: 1 / 0)
    assert not examination.check("c", lambda: "fine", needs=("a", "b"))
    assert examination.wrong == ["b", "c"]
    assert [line.split() for line in examination.lines] == [
        ["a", "ok", "fine"],
        ["b", "WRONG", "ZeroDivisionError", "(division", "by", "zero)"],
        ["c", "not", "checked", "it", "needs", "b"],
    ]


def test_a_check_that_hangs_ends_the_process(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(health.os, "_exit", lambda code: ended.set())
    examination = Examination(seconds=0.1, show=lambda line: None)
    examination.check("a", lambda: str(ended.wait(60)))
    assert ended.is_set()
    assert "a           WRONG       no end after 0.1 s" in examination.lines[0]


def test_an_error_of_cuda_is_explained():
    def fail():
        raise tf.errors.InternalError(None, None, "libdevice not found at ./libdevice.10.bc")

    assert wrong(fail).startswith("XLA does not find CUDA's libdevice: pip install")


def examine(workers, index, find):
    lines = []
    examination = Examination(seconds=60, show=lines.append)
    with meet(Cluster(tuple(workers), index, "TF_CONFIG"), timeout_seconds=60) as meeting:
        examination.meeting = meeting
        examination.check("a", lambda: find(meeting))
        examination.check("b", lambda: "fine")
    return lines


def test_a_wrong_of_one_host_is_told_on_all():
    workers = free_addresses(3)

    def find(meeting):
        if meeting.index == 2:
            raise WrongError("too hot")
        return "fine"

    found = in_threads(lambda i: examine(workers, i, find), range(3))
    expected = [
        f"a           WRONG       worker 2 ({workers[2]}): too hot",
        "b           ok          fine",
    ]
    assert found == dict.fromkeys(range(3), expected)


def test_a_host_that_leaves_is_named():
    workers = free_addresses(2)

    def one(index):
        if index == 0:
            return examine(workers, 0, lambda meeting: "fine")
        with meet(Cluster(tuple(workers), 1, "TF_CONFIG"), timeout_seconds=60):
            raise WrongError("the disk is full")

    lines = in_threads(one, range(2))[0]
    assert f"worker 1 ({workers[1]}) ended: the disk is full" in lines[0]
    assert lines[1] == "b           not checked it needs all hosts"


# Links


def test_links_between_all_hosts():
    workers = free_addresses(3)

    def find(meeting):
        return links.measure_links(meeting, timeout_seconds=60, num_bytes=2**20)

    def one(index):
        with meet(Cluster(tuple(workers), index, "TF_CONFIG"), timeout_seconds=60) as meeting:
            return find(meeting)

    for index, found in in_threads(one, range(3)).items():
        assert [link.host for link in found] == [i for i in range(3) if i != index]
        assert all(not link.wrong and link.seconds > 0 and link.rate > 0 for link in found)


@pytest.mark.parametrize("cut", [0, 5, 8, 9, 14])
def test_a_message_in_two_pieces_is_answered(cut):
    """A header or what follows it; the second piece comes once the first has been taken."""
    ours, theirs = socket.socketpair()
    message = links._LENGTH.pack(7) + bytes(7)
    answering = threading.Thread(target=links._answer, args=(theirs,))
    with ours:
        ours.settimeout(60)
        answering.start()
        ours.sendall(message[:cut])
        # SIOCOUTQ: what the other side has not read yet.
        wait_for(lambda: not fcntl.ioctl(ours, termios.TIOCOUTQ, bytes(4)).strip(b"\0"))
        ours.sendall(message[cut:])
        assert ours.recv(1) == b"k"
    answering.join(60)
    assert not answering.is_alive()


def test_a_host_that_cannot_be_reached(monkeypatch):
    """A firewall between hosts 1 and 2: the meeting needs lines to host 0 alone."""
    workers = free_addresses(3)
    closed = int(workers[2].rpartition(":")[2])
    connect = links.connect

    def one(index):
        def find(meeting):
            return machine.links(meeting, timeout_seconds=60, num_bytes=1000)

        return examine(workers, index, find)

    def blocked(host, port, timeout):
        if port == closed:
            raise TimeoutError
        return connect(host, port, timeout)

    monkeypatch.setattr(links, "connect", blocked)
    for lines in in_threads(one, range(3)).values():
        assert f"to worker 2 ({workers[2]}): no answer from {workers[2]} within" in lines[1]
        assert "firewall" in lines[1] and len(lines) == 3


@pytest.mark.parametrize(
    "address, words",
    [("name.invalid:1", "does not resolve here"), ("localhost:1", "its process is not")],
)
def test_why_nobody_answers(address, words):
    assert words in links._measure(1, address, 1).wrong


# Machines


def test_hosts_that_differ(monkeypatch):
    workers = free_addresses(2)
    facts = [{"devices": {"kind": kind, "number": 1}} for kind in ("GPU", "CPU")]
    monkeypatch.setattr(
        machine, "machine_facts", lambda: facts[int(threading.current_thread().name)]
    )

    def one(index):
        threading.current_thread().name = str(index)
        return examine(workers, index, machine.alike)

    for lines in in_threads(one, range(2)).values():
        assert f'devices.kind is "GPU" on worker 0 ({workers[0]}) but "CPU" on worker 1' in lines[0]
        assert "NCCL hangs unless all have GPUs" in lines[0]


def test_versions(monkeypatch):
    assert f"TensorFlow {tf.__version__}" in machine.versions()
    monkeypatch.setattr(tf, "__version__", "2.30.0")
    assert "TensorFlow is 2.30.0, and vit_dist" in wrong(machine.versions)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.0")
    assert "tensorflow and tensorflow-tpu are both installed" in wrong(machine.versions)


def test_cards():
    card = Card(0, "GPU-0", "H100", (9, 0), "550.54", 81920, 4)
    found = Found(2, (card, card._replace(number=1)), cuda_root="/cuda")
    assert machine.cards(found).startswith("2 x H100 80 GiB, driver 550.54")
    assert machine.cards(Found()) == "none"
    taken = found._replace(cards=(card._replace(used=40000),))
    assert "40000 of 81920 MiB of card 0 (H100) are taken by other" in wrong(machine.cards, taken)
    assert "libdevice" in wrong(machine.cards, found._replace(cuda_root=None))


def test_a_gpu_that_is_not_seen(strategy, monkeypatch):
    assert machine.devices(strategy) == "MirroredStrategy: 1 host(s), 2 replica(s) on CPU"
    monkeypatch.setattr(gpus, "look", lambda: Found(device_files=1, smi_error="no nvidia-smi"))
    assert "TensorFlow sees no GPU: no nvidia-smi" in wrong(machine.devices, strategy)


def test_a_wrong_sum(strategy, monkeypatch):
    assert "2 replicas agree" in machine.collectives(strategy, num_bytes=4000)
    real = tf.distribute.ReplicaContext.all_reduce

    def first_entry_twice(self, op, value):
        total = real(self, op, value)
        return tf.concat([total[:3], total[3:4] + 1, total[4:]], 0)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", first_entry_twice)
    said = wrong(machine.collectives, strategy, num_bytes=4000)
    assert "replica 0 has a wrong sum over 2 replicas: entry 3 is 10 in place of 9 (1 of" in said


@pytest.mark.compiles
def test_xla_that_is_missing_or_wrong(strategy, monkeypatch):
    assert machine.compiles(strategy).startswith("XLA compiles for CPU")

    def missing(function):
        raise tf.errors.InvalidArgumentError(None, None, "XLA_CPU_JIT is not registered")

    monkeypatch.setattr(machine, "compiled", missing)
    assert "XLA_CPU_JIT is not registered" in wrong(machine.compiles, strategy)
    monkeypatch.setattr(machine, "compiled", lambda f: lambda x: f(x) + 1e-3)
    assert "XLA's result is off by 0.001" in wrong(machine.compiles, strategy)


@pytest.fixture(scope="module")
def checked():
    return check(tiny.make())


# With XLA, and with nothing broken, tests/test_doctor.py does it.
@pytest.mark.parametrize(
    "broken",
    ["mean", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("weights", ""))],
)
def test_a_step_with_other_numbers(broken, strategy, checked, monkeypatch):
    options, data = checked
    real = machine.make_step

    def make_step(options, data, state, strategy):
        if strategy.num_replicas_in_sync == 2 and broken == "mean":
            # As if the loss were divided by each replica's share.
            share = dataclasses.replace(options.input, batch_size=options.input.batch_size // 2)
            options = dataclasses.replace(options, input=share)
        if strategy.num_replicas_in_sync == 2 and broken == "weights":
            # Each entry by another factor: LayerNorm would undo one that all have in common.
            for weight in state.model.weights:
                weight.assign(weight * np.linspace(0.5, 1.5, weight.shape[-1], dtype=np.float32))
        return real(options, data, state, strategy)

    monkeypatch.setattr(machine, "make_step", make_step)
    monkeypatch.setattr(machine, "_STEPS", 2)
    if not broken:
        assert "2 steps agree" in machine.step_numbers(options, data, strategy)
    else:
        said = wrong(machine.step_numbers, options, data, strategy)
        assert "of step 0 is" in said and "on the CPU" in said


def test_the_made_up_batch_is_the_same_on_any_number_of_replicas(strategy, checked):
    options, _ = checked

    def images(strategy):
        batch = next(machine._batches(options, strategy))["image"]
        return np.concatenate([x.numpy() for x in strategy.experimental_local_results(batch)])

    alone = tf.distribute.OneDeviceStrategy("CPU:0")
    np.testing.assert_array_equal(images(strategy), images(alone))


def test_the_report_tells_the_processor(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    lines = machine.machine()
    assert lines[0].startswith("processor") and "NCCL_DEBUG=INFO" in lines
