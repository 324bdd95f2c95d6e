"""Every optimiser takes the same step on any replicas x micro-batches x workers."""

import contextlib
import functools
import json
import os
import socket
import threading

import numpy as np
import processes
import pytest
import tensorflow as tf
from stepping import BATCH, IMAGES, LABELS, OPTIONS, Engine, make_net, weights_of

from vit_dist.training.optim import NAMES

STEPS = 3


def options_of(name, momentum_dtype="float32"):
    # An epsilon that a difference in rounding cannot pass for a gradient.
    chosen = {"name": name, "weight_decay": 0.2, "momentum_dtype": momentum_dtype}
    if name in ("adamw", "lamb", "muon"):
        chosen["epsilon"] = 1e-3
    return {**OPTIONS, "optimizer": chosen, "jit": "off"}


@functools.cache
def alone(name):
    """The weights, averages and slots after STEPS steps on one device."""
    engine = Engine(make_net, **options_of(name))
    engine.run(IMAGES[:STEPS], LABELS[:STEPS])
    arrays = weights_of(engine.state.to_arrays())
    assert all(np.any(value != engine.initial[key]) for key, value in arrays.items())
    return arrays


def assert_same(arrays, name):
    expected = alone(name)
    assert set(arrays) == set(expected)
    for key, value in expected.items():
        # The sign of Lion, and Adafactor's division by a tiny root, can magnify a rounding.
        np.testing.assert_allclose(arrays[key], value, rtol=1e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 4), (2, 2)])
def test_replicas_and_micro_batches(name, replicas, accumulation):
    engine = Engine(make_net, replicas=replicas, accumulation=accumulation, **options_of(name))
    engine.run(IMAGES[:STEPS], LABELS[:STEPS])
    assert_same(weights_of(engine.state.to_arrays()), name)
    engine.replicas_hold_the_same()


def work(index, addresses, out):
    """One of two workers: takes its half of every batch, with every optimiser."""
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    from vit_dist.strategy import make_strategy

    strategy = make_strategy(name="multiworker", timeout_seconds=100.0)
    half = slice(index * BATCH // 2, (index + 1) * BATCH // 2)
    arrays = {}
    for name in NAMES:
        engine = Engine(make_net, strategy=strategy, accumulation=2, **options_of(name))
        data = {"image": IMAGES[:STEPS, half], "label": LABELS[:STEPS, half]}
        data = tf.data.Dataset.from_tensor_slices(data).repeat()  # endless: so shapes are static
        batches = strategy.distribute_datasets_from_function(lambda _, data=data: data)
        engine.step(iter(batches), tf.constant(STEPS))
        found = weights_of(engine.state.to_arrays())
        arrays |= {f"{name}:{key}": value for key, value in found.items()}
    np.savez(out, **arrays)


def test_workers(tmp_path):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(2)]
        addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    ended = {}

    def run(index):
        arguments = (index, addresses, str(tmp_path / f"{index}.npz"))
        ended[index] = processes.call(work, *arguments, log=tmp_path / f"log{index}")

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        code, text = ended[index]
        assert code == 0, text[-3000:]
        arrays = dict(np.load(tmp_path / f"{index}.npz"))
        for name in NAMES:
            prefix = f"{name}:"
            mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            assert_same(mine, name)
