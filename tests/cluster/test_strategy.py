"""Which strategy the machine gives, whom a host feeds, and clear words where there is none."""

import functools
import json
import os
import socket
import threading
import time
from unittest import mock

import pytest
import tensorflow as tf

from tests.support import processes
from tests.support.waiting import pause
from vit_dist.cluster import strategy as lib
from vit_dist.cluster.hosts import describe
from vit_dist.cluster.strategy import check_strategy, make_strategy, resolve


def tf_config(index, workers=("host0:2222", "host1:2222")):
    cluster = {"cluster": {"worker": list(workers)}}
    return json.dumps({**cluster, "task": {"type": "worker", "index": index}})


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("TF_CONFIG", *lib._TPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)


# which


@pytest.mark.parametrize(
    "env,tpu,gpus,cpus,expected",
    [
        ({}, "", 0, 1, "single"),
        ({}, "", 1, 1, "single"),
        ({}, "", 2, 1, "mirrored"),
        ({}, "", 0, 4, "mirrored"),
        ({"TF_CONFIG": tf_config(0)}, "", 2, 1, "multiworker"),
        ({"TF_CONFIG": ""}, "", 0, 1, "single"),
        ({"TPU_NAME": "x"}, "", 0, 1, "tpu"),
        ({"TPU_WORKER_ID": "0"}, "", 0, 1, "tpu"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TF_CONFIG": tf_config(0)}, "", 0, 1, "tpu"),
        ({}, "local", 8, 1, "tpu"),
    ],
)
def test_auto(env, tpu, gpus, cpus, expected, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["x"] * gpus)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["x"] * cpus)
    assert resolve("auto", tpu) == expected


@pytest.mark.parametrize(
    "given,expected",
    [
        (None, "--xla_cpu_prefer_vector_width=512"),
        ("--xla_dump_to=x", "--xla_cpu_prefer_vector_width=512 --xla_dump_to=x"),
        ("--xla_cpu_prefer_vector_width=128", "--xla_cpu_prefer_vector_width=128"),
    ],
)
def test_xla_uses_whole_vectors_unless_told_otherwise(given, expected, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):  # a second strategy in a process adds nothing
        make_strategy(name="single")
        assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize("name", [name for name in lib.NAMES if name != "auto"])
def test_a_name_is_taken_at_its_word(name, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(0))
    monkeypatch.setenv("TPU_NAME", "x")
    assert resolve(name) == name


def test_strategies_of_this_machine():
    """The tests' process has four logical CPUs."""
    single = make_strategy(name="single")
    assert isinstance(single, tf.distribute.OneDeviceStrategy)
    assert single.num_replicas_in_sync == 1
    for virtual_cpus, replicas in ((2, 2), (4, 4), (0, 4)):
        mirrored = make_strategy(name="mirrored", virtual_cpus=virtual_cpus)
        assert isinstance(mirrored, tf.distribute.MirroredStrategy)
        assert mirrored.num_replicas_in_sync == replicas
        assert lib.host_replicas(mirrored) == range(replicas)
        assert lib.is_chief(mirrored) and lib.num_hosts(mirrored) == 1
        assert lib.device_kind(mirrored) == "CPU"
    with pytest.raises(ValueError, match="virtual_cpus=8 must be set before TensorFlow starts"):
        make_strategy(name="mirrored", virtual_cpus=8)


def use_two_of_four_cpus():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    assert make_strategy(name="mirrored", virtual_cpus=2).num_replicas_in_sync == 2
    assert make_strategy(name="mirrored", virtual_cpus=4).num_replicas_in_sync == 4


def test_a_cpu_that_is_split_already_is_left_so(tmp_path):
    code, text = processes.call(use_two_of_four_cpus, log=tmp_path / "log")
    assert code == 0, text


def test_replicas_see_the_sum():
    strategy = make_strategy(name="mirrored", virtual_cpus=4)

    @tf.function
    def total():
        def of_replica():
            context = tf.distribute.get_replica_context()
            number = tf.cast(context.replica_id_in_sync_group, tf.float32)
            return context.all_reduce("SUM", number + 1)

        return strategy.experimental_local_results(strategy.run(of_replica))

    assert [float(x) for x in total()] == [10.0] * 4


# words


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"name": "x"}, "strategy 'x' is unknown; allowed: auto, single, mirrored"),
        ({"virtual_cpus": -1}, "virtual_cpus must be 0 or more, got -1"),
        ({"name": "single", "virtual_cpus": 2}, "strategy.name=mirrored, or virtual_cpus=0"),
        ({"name": "multiworker"}, "TF_CONFIG, which is not set; start the workers with launch/"),
        ({"name": "multiworker", "virtual_cpus": 2}, "takes a host's CPU whole"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be above 0, got 0.0"),
        ({"name": "single", "tpu": "x"}, r"strategy.tpu\* is set, but strategy.name is 'single'"),
        ({"name": "mirrored", "tpu_zone": "x"}, r"set it to tpu"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_strategy(**arguments)


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "{}",
        "[]",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": -1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": 3}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_bad_tf_config(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=r"TF_CONFIG must be JSON such as .*host1:2222"):
        check_strategy(name="auto")


def test_tf_config():
    with mock.patch.dict("os.environ", TF_CONFIG=tf_config(1)):
        assert lib.cluster_from_environment() == (["host0:2222", "host1:2222"], 1)


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_of_two(index, monkeypatch):
    """What a worker with two devices would see."""
    monkeypatch.setenv("TF_CONFIG", tf_config(index))
    worker = mock.Mock(spec=tf.distribute.MultiWorkerMirroredStrategy)
    worker.num_replicas_in_sync = 4
    worker.cluster_resolver.task_id = index
    worker.extended.worker_devices = (f"/job:worker/task:{index}/device:GPU:0",)
    assert lib.num_hosts(worker) == 2
    assert lib.host_replicas(worker) == range(2 * index, 2 * index + 2)
    assert lib.is_chief(worker) == (index == 0)
    assert lib.device_kind(worker) == "GPU"


def test_description():
    single, mirrored = make_strategy(name="single"), make_strategy(name="mirrored", virtual_cpus=4)
    assert describe(single, batch_size=32) == (
        "OneDeviceStrategy: 1 host(s), 1 replica(s) on CPU, batch 32 = 1 x 32"
    )
    assert describe(mirrored, batch_size=32, accumulation=2) == (
        "MirroredStrategy: 1 host(s), 4 replica(s) on CPU, batch 32 = 4 x 8, in 2 micro-batches "
        "each"
    )


def look_for_tpu(**arguments):
    try:
        make_strategy(name="tpu", **arguments)
    except ValueError as error:
        print("message:", error)


@pytest.mark.parametrize(
    "arguments,looked",
    [
        ({}, "TPU 'local' ("),
        ({"tpu": "grpc://127.0.0.1:1"}, "TPU 'grpc://127.0.0.1:1' (Connection refused"),
        ({"tpu": "mine", "tpu_zone": "z", "tpu_project": "p"}, "TPU 'mine' in zone z of project p"),
    ],
)
def test_an_absent_tpu_is_named(arguments, looked, tmp_path):
    look = functools.partial(look_for_tpu, **arguments)
    code, text = processes.call(look, log=tmp_path / "log")
    assert code == 0
    (message,) = [line for line in text.splitlines() if line.startswith("message:")]
    assert f"found no {looked}" in message.replace("[Errno 111] ", "")
    assert "strategy.tpu=local" in message and "strategy.name=auto" in message
    for noise in ("Traceback", "*** Begin stack trace", "core dumped"):
        assert noise not in text


# the meeting of workers


def free_addresses(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def meet_in_threads(workers, indices, timeout):
    """worker -> None, or what it complained of."""
    outcome = {}

    def one(index):
        try:
            outcome[index] = lib.meet(workers, index, timeout_seconds=timeout)
        except TimeoutError as error:
            outcome[index] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in indices]
    for thread in threads:
        thread.start()
        pause(0.01)  # in this order, most of the time
    for thread in threads:
        thread.join()
    return outcome


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_workers_meet_in_any_order_and_leave_the_port_free(order):
    workers = free_addresses(3)
    assert meet_in_threads(workers, order, timeout=60) == {0: None, 1: None, 2: None}
    socket.create_server(("", int(workers[0].rpartition(":")[2]))).close()


def test_absent_workers_are_named():
    workers = free_addresses(3)
    outcome = meet_in_threads(workers, (0, 2), timeout=1)
    assert f"worker 0 waited 1 s in vain for worker 1 ({workers[1]}): start all" in outcome[0]
    assert f"worker 2 waited 1 s in vain for worker 0 ({workers[0]})" in outcome[2]


def test_strangers_do_not_count():
    """A port scanner, or a worker with another list of workers."""
    workers = free_addresses(2)
    outcome = {}
    waiting = threading.Thread(
        target=lambda: outcome.update(meet_in_threads(workers, (0,), timeout=1.5))
    )
    waiting.start()
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"", b"1 of elsewhere:1,elsewhere:2\n"):
        address = ("localhost", int(workers[0].rpartition(":")[2]))
        deadline = time.monotonic() + 10
        while True:
            try:
                with socket.create_connection(address) as stranger:
                    stranger.sendall(line)
                break
            except OSError:
                assert time.monotonic() < deadline
    waiting.join()
    assert "in vain for worker 1" in outcome[0]


def test_one_worker_waits_for_nobody():
    lib.meet(["localhost:1"], 0, timeout_seconds=0.1)
