"""The step under a real TPUStrategy, traced (not run) on a machine without a TPU."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.client import session
from tensorflow.python.distribute.cluster_resolver import cluster_resolver
from tensorflow.python.tpu import topology as topology_lib
from tensorflow.python.tpu import tpu_strategy_util, tpu_system_metadata

from vit_dist.cluster.hosts import device_kind
from vit_dist.model import vit
from vit_dist.model.variants import choose_form, vit_config
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import StepOptions, choose_jit, make_train_step

CORES = 2


class FakeResolver(cluster_resolver.ClusterResolver):
    """Claims a host with two TPU cores, and says no more than tracing asks for."""

    task_type, task_id, environment = "worker", 0, ""

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def master(self, *args, **kwargs):
        return ""

    def num_accelerators(self, *args, **kwargs):
        return {"TPU": CORES}

    def get_job_name(self):
        return "localhost"

    def get_tpu_system_metadata(self):
        host = "/job:localhost/replica:0/task:0/device:"
        devices = [(f"{host}TPU:{i}", "TPU") for i in range(CORES)] + [(f"{host}CPU:0", "CPU")]
        return tpu_system_metadata.TPUSystemMetadata(
            num_cores=CORES,
            num_hosts=1,
            num_of_cores_per_host=CORES,
            topology=_topology(),
            devices=[session._DeviceAttributes(name, kind, 0, 0) for name, kind in devices],
        )


def _topology():
    coordinates = np.array([[[i, 0, 0, 0] for i in range(CORES)]], np.int32)
    return topology_lib.Topology(mesh_shape=[CORES, 1, 1, 1], device_coordinates=coordinates)


class Feed:
    def __next__(self):
        images = tf.zeros((4, 16, 16, 3), tf.uint8)
        return {"image": images, "label": tf.zeros((4,), tf.int32)}


@pytest.fixture
def strategy(monkeypatch):
    monkeypatch.setitem(tpu_strategy_util._INITIALIZED_TPU_SYSTEMS, "", _topology())
    return tf.distribute.TPUStrategy(FakeResolver())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_step_compiles_into_one_tpu_program_with_one_sum_per_gradient(
    strategy, monkeypatch, precision
):
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


def test_tpu_strategy_is_left_to_compile_by_itself(strategy):
    assert device_kind(strategy) == "TPU"
    assert choose_jit("whole", kind="TPU", num_replicas=CORES) == "off"
