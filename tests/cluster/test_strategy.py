"""Which strategy the machine gives, whom a host feeds, and clear words where there is none."""

import functools
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import tensorflow as tf

from tests.support import processes
from tests.support.engines import SLURM
from vit_dist.cluster import hosts
from vit_dist.cluster import strategy as lib
from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.gpus import Card, Found
from vit_dist.cluster.hosts import describe
from vit_dist.cluster.strategy import check_strategy, choose_cluster, make_strategy, resolve
from vit_dist.config.errors import ConfigError


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
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "", 0, 1, "tpu"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TF_CONFIG": tf_config(0)}, "", 0, 1, "tpu"),
        ({}, "local", 8, 1, "tpu"),
        # A cluster of one host, such as Vertex AI gives: its devices alone.
        ({"TF_CONFIG": tf_config(0, ["a:1"])}, "", 2, 1, "mirrored"),
        ({"TF_CONFIG": '{"cluster": {}}'}, "", 1, 1, "single"),
        ({"VIT_DIST_HOSTS": "a:1,b:1", "VIT_DIST_INDEX": "0"}, "", 0, 1, "multiworker"),
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


def test_local_means_this_machine(monkeypatch):
    """Whatever a scheduler's variables say."""
    monkeypatch.setenv("TF_CONFIG", tf_config(0))
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert resolve("local") == "mirrored"  # the tests' four CPUs
    assert choose_cluster("local") is None
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["x"])
    assert resolve("local") == "single"


def test_auto_never_trains_alone_where_there_are_several_tasks(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each would train alone"):
        check_strategy()
    check_strategy(name="local")


def test_hosts_of_a_tpu_slice_do_not_train_alone(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(ConfigError, match="TPU_WORKER_ID must be a whole number"):
        check_strategy()
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    with pytest.raises(ConfigError, match="the program runs on host 0 alone"):
        check_strategy()
    monkeypatch.delenv("TPU_WORKER_ID")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    check_strategy()


def test_the_cluster_of_multiworker(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(0, ["a:1"]))
    assert choose_cluster("multiworker") == Cluster(("a:1",), 0, "TF_CONFIG")
    assert choose_cluster("auto") is None


@pytest.mark.parametrize("engine, kept", [("Slurm", ["g2", "g3"]), ("TF_CONFIG", None)])
def test_tasks_of_a_node_share_its_gpus_where_slurm_shows_all_to_each(engine, kept, monkeypatch):
    for name, value in {**SLURM, "SLURM_GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["g0", "g1", "g2", "g3"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: chosen.append(gpus))
    lib._take_own_gpus(Cluster(("a:1", "a:2"), 1, engine))
    assert chosen == ([kept] if kept else [])


NAMES = [name for name in lib.NAMES if name not in ("auto", "local")]


@pytest.mark.parametrize("name", NAMES)
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
        assert hosts.host_replicas(mirrored) == range(replicas)
        assert hosts.is_chief(mirrored) and hosts.num_hosts(mirrored) == 1
        assert hosts.device_kind(mirrored) == "CPU"
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


def test_fewer_devices_than_wanted():
    assert make_strategy(name="mirrored", min_devices=4).num_replicas_in_sync == 4
    with pytest.raises(ConfigError) as error:
        make_strategy(name="mirrored", virtual_cpus=2, min_devices=3)
    said = "strategy.min_devices is 3, but this run would have 2 replica(s) on CPU"
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "found, seen, warned",
    [
        (Found(wheels=True), 0, True),
        (Found(device_files=1), 0, True),
        (Found(), 0, False),  # nobody wants one
        (Found(wheels=True, hidden=True), 0, False),
        (Found(wheels=True), 1, False),  # virtual CPUs, on purpose
    ],
)
def test_a_gpu_that_is_not_seen_is_said(found, seen, warned, monkeypatch):
    strategy = make_strategy(name="single")
    monkeypatch.setattr(lib.gpus, "look", lambda: found)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["x"] * seen)
    warnings = lib.device_warnings(strategy)
    assert len(warnings) == warned
    assert all("TensorFlow sees no GPU" in warning for warning in warnings)


def test_xla_gets_flags_for_gpus(monkeypatch):
    found = Found(device_files=2, cuda_root=Path("/cuda"))
    monkeypatch.setattr(lib.gpus, "look", lambda: found)
    for given, several in (("", True), ("--xla_gpu_enable_latency_hiding_scheduler=false", True)):
        monkeypatch.setenv("XLA_FLAGS", given)
        make_strategy(name="single")
        flags = os.environ["XLA_FLAGS"].split()
        assert "--xla_gpu_cuda_data_dir=/cuda" in flags
        assert ("--xla_gpu_enable_latency_hiding_scheduler=true" in flags) == (given == "")
        assert ("--xla_gpu_nccl_termination_timeout_seconds=600" in flags) == several
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(lib.gpus, "look", lambda: found._replace(hidden=True))
    make_strategy(name="single")
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_prefer_vector_width=512"


def test_what_will_stop_a_gpu_is_said_before_a_model_is_made(monkeypatch, caplog):
    card = Card(0, "GPU-0", "RTX 5090", (12, 0), "570.10", 32000, 0)
    monkeypatch.setattr(lib.gpus, "look", lambda: Found(device_files=1, cards=(card,)))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["x"])
    make_strategy(name="single")
    assert "RTX 5090 has compute capability 12.0" in caplog.text
    assert "libdevice" in caplog.text


@pytest.mark.parametrize("cards, expected", [([], "AUTO"), (["g0"], "NCCL")])
def test_hosts_with_gpus_take_nccl(cards, expected, monkeypatch):
    """TensorFlow's own choice would be its ring over gRPC."""
    made = []
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: cards)
    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", lambda **given: made.append(given)
    )
    lib._multi_worker_strategy(Cluster(("a:1", "b:1"), 0, "TF_CONFIG"), 120.0)
    (given,) = made
    assert given["communication_options"].implementation.value == expected
    assert given["cluster_resolver"].num_accelerators()["GPU"] == len(cards)


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
        ({"timeout_seconds": float("inf")}, "timeout_seconds must be above 0, got inf"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds must be above 0, got nan"),
        ({"min_devices": -1}, "min_devices must be 0 or more, got -1"),
        ({"name": "single", "tpu": "x"}, r"strategy.tpu\* is set, but strategy.name is 'single'"),
        ({"name": "mirrored", "tpu_zone": "x"}, r"set it to tpu"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_strategy(**arguments)


def test_bits_are_promised_only_where_the_flag_is_known(monkeypatch):
    check_strategy(deterministic=True)
    monkeypatch.setattr(tf, "__version__", "2.22.0")
    check_strategy(deterministic=True)  # without a GPU there is no flag to set
    monkeypatch.setattr(lib.gpus, "count_device_files", lambda: 1)
    check_strategy()
    with pytest.raises(ConfigError, match=r"for TensorFlow 2.20 and 2.21; this is 2.22.0"):
        check_strategy(deterministic=True)


def test_a_cluster_that_cannot_be(monkeypatch):
    """Whatever environment.find_cluster refuses dies before a device starts."""
    monkeypatch.setenv("TF_CONFIG", "{}")
    for name in ("auto", "multiworker"):
        with pytest.raises(ConfigError, match=r"TF_CONFIG must be JSON such as .*host1:2222"):
            check_strategy(name=name)
    for name in ("local", "single", "mirrored"):
        check_strategy(name=name)


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_of_two(index):
    """What a worker with two devices would see."""
    worker = mock.Mock(spec=tf.distribute.MultiWorkerMirroredStrategy)
    worker.num_replicas_in_sync = 4
    worker.cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": ["a:1", "b:2"]}), task_type="worker", task_id=index
    )
    worker.extended.worker_devices = (f"/job:worker/task:{index}/device:GPU:0",)
    assert hosts.num_hosts(worker) == 2
    assert hosts.host_replicas(worker) == range(2 * index, 2 * index + 2)
    assert hosts.is_chief(worker) == (index == 0)
    assert hosts.device_kind(worker) == "GPU"


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
