"""The step under a real TPUStrategy, traced (not run) on a machine without a TPU."""

import collections

import pytest
import tensorflow as tf
from tensorflow.python.tpu import tpu_strategy_util

from tests.support.tpu import CORES, FakeResolver, topology
from vit_dist.cluster.hosts import describe, device_kind, remote_hosts
from vit_dist.model import vit
from vit_dist.model.variants import choose_form, vit_config
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import StepOptions, choose_jit, make_train_step


class Feed:
    def __next__(self):
        images = tf.zeros((4, 16, 16, 3), tf.uint8)
        return {"image": images, "label": tf.zeros((4,), tf.int32)}


@pytest.fixture(params=[1, 2], ids=["one host", "two hosts"])
def strategy(request, monkeypatch):
    return make_strategy(request.param, monkeypatch)


def make_strategy(hosts, monkeypatch):
    monkeypatch.setitem(tpu_strategy_util._INITIALIZED_TPU_SYSTEMS, "", topology(hosts))
    return tf.distribute.TPUStrategy(FakeResolver(hosts))


# float32 has no part that the others lack.
FURTHER = [(1, "float32"), (2, "float32"), (1, "float16"), (2, "bfloat16")]


@pytest.mark.parametrize(
    ("hosts", "precision"),
    [
        (1, "bfloat16"),
        (2, "float16"),
        *(pytest.param(*of, marks=pytest.mark.exhaustive) for of in FURTHER),
    ],
)
def test_step_compiles_into_one_tpu_program_with_one_sum_per_gradient(
    hosts, monkeypatch, precision
):
    strategy = make_strategy(hosts, monkeypatch)
    monkeypatch.setattr(vit, "initialize", lambda *args, **kwargs: None)  # needs the devices
    graph = tf.Graph()
    with graph.as_default(), strategy.scope():
        sizes = {"image_size": 16, "num_classes": 10}
        config = vit_config("mu/4", pool="tok", dropout=0.1, remat="full", **sizes)
        made = {"precision": precision, "form": choose_form(device_kind(strategy))}
        model, ema = (vit.build_vit(config, **made) for _ in range(2))
        optimizer = make_optimizer(vit.named_weights(model), OptimizerOptions(weight_decay=0.1))
        state = TrainState(model, optimizer)
        state.ema = ema
        train_steps = make_train_step(
            state,
            make_loss(),
            strategy=strategy,
            schedule=Schedule(1e-3, total_steps=10),
            preprocess=lambda images: tf.cast(images, tf.float32) / 127.5 - 1,
            batch_size=16,
            seed=0,
            options=StepOptions(accumulation=2, ema_decay=0.9),
        )
        out = train_steps(Feed(), tf.constant(3, tf.int64))
    functions = graph.as_graph_def().library.function
    ops = collections.Counter(node.op for function in functions for node in function.node_def)
    assert all(metric.shape == () for metric in out.values())
    assert ops["TPUReplicateMetadata"] == 1
    assert ops["CrossReplicaSum"] == len(optimizer.variables) + 2  # and loss and accuracy
    # The steps loop on the host, the micro-batches inside the TPU's program.
    assert ops["While"] == 2
    # What only XLA has is found to be there, inside the loop of micro-batches: the barrier before
    # the one block, and the generator for the mask of the embedding and three of the block, twice.
    assert ops["XlaOptimizationBarrier"] == 1
    assert ops["XlaRngBitGenerator"] == 1 + 2 * 3
    assert not [op for op in ops if "PyFunc" in op or "HostCompute" in op or "OutfeedEnqueue" in op]
    (replicated,) = {
        node.attr["num_replicas"].i
        for function in functions
        for node in function.node_def
        if node.op == "TPUReplicateMetadata"
    }
    assert replicated == strategy.num_replicas_in_sync


def test_tpu_strategy_is_left_to_compile_by_itself(strategy):
    assert device_kind(strategy) == "TPU"
    assert choose_jit("whole", kind="TPU", num_replicas=CORES) == "off"


def test_hosts_of_a_slice_are_those_of_other_processes(strategy):
    hosts = strategy.extended.num_hosts
    cpus = [f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in range(2)]
    assert remote_hosts(strategy) == (cpus if hosts > 1 else [])
    assert f": {hosts} host(s), {CORES * hosts} replica(s) on TPU" in describe(
        strategy, batch_size=16
    )
