"""Every optimizer takes the same step on any replicas x micro-batches x workers."""

import contextlib
import functools
import json
import os
import socket
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops import collective_ops

from tests.support import processes
from tests.support.stepping import (
    BATCH,
    IMAGES,
    LABELS,
    LARGE,
    Engine,
    assert_bits,
    make_net,
    make_strategy,
    options_of,
    weights_of,
)
from vit_dist.training import step
from vit_dist.training.optimizer import NAMES
from vit_dist.training.sharding import Remote
from vit_dist.training.state import INITIAL_LOSS_SCALE

STEPS = 3


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


# On two replicas with two micro-batches each, optimizers whose slots differ in kind; on the other
# topologies one, since no optimizer knows which of them summed its gradients.
KINDS = [("adamw", 2, 2), ("lamb", 2, 2), ("adafactor", 2, 2), ("muon", 2, 2)]
KINDS += [("adamw", 1, 4), ("adamw", 2, 1)]
OF_A_KIND = [
    pytest.param(name, *of, marks=pytest.mark.exhaustive)
    for name in NAMES
    for of in ((1, 4), (2, 1), (2, 2))
    if (name, *of) not in KINDS
]


@pytest.mark.parametrize(("name", "replicas", "accumulation"), KINDS + OF_A_KIND)
def test_replicas_and_micro_batches(name, replicas, accumulation):
    engine = Engine(make_net, replicas=replicas, accumulation=accumulation, **options_of(name))
    engine.run(IMAGES[:STEPS], LABELS[:STEPS])
    assert_same(weights_of(engine.state.to_arrays()), name)
    engine.replicas_hold_the_same()


# What two workers run: optimizers, some with their state cut up, and gradients in 16 bits. RUNS
# have slots of every shape; FURTHER are for `make test-all`.
IN_PARTS = ("adafactor_vit", "adamw", "lamb")
SHARDED, BFLOAT16, FLOAT16, PACKS = "sharded ", "bfloat16 gradients", "float16", "packs"
RUNS = ("adamw", "adafactor_vit", SHARDED + "adafactor_vit", BFLOAT16, FLOAT16, PACKS)
FURTHER = (
    *(name for name in NAMES if name not in RUNS),
    *(SHARDED + name for name in IN_PARTS if SHARDED + name not in RUNS),
)
PACK_BYTES = 16  # of the run PACKS: the network of these tests would be one pack otherwise
OVERFLOW = 1  # the step at which it overflows, on the second worker alone


def images_of(run):
    images = IMAGES[:STEPS].copy()
    if run == FLOAT16:
        images[OVERFLOW, -1] = LARGE
    return images


def engine_of(run, strategy):
    """The Engine of one of RUNS, in two micro-batches."""
    of_adamw = run in (BFLOAT16, FLOAT16, PACKS)
    options = options_of("adamw" if of_adamw else run.removeprefix(SHARDED))
    options["optimizer"]["shard_state"] = run.startswith(SHARDED)
    if run == BFLOAT16:
        options["all_reduce_dtype"] = "bfloat16"
    make = functools.partial(make_net, "mixed_float16") if run == FLOAT16 else make_net
    return Engine(make, strategy=strategy, accumulation=2, **options)


def packed_engine(strategy):
    """That of PACKS: "adamw" with gradients that travel in several packs."""
    with mock.patch.object(step, "_PACK_BYTES", PACK_BYTES):
        return engine_of(PACKS, strategy)


def work(index, addresses, runs, out):
    """One of two workers: takes its half of every batch of each of `runs`."""
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    from vit_dist.cluster.strategy import make_strategy

    strategy = make_strategy(name="multiworker", timeout_seconds=100.0)
    half = slice(index * BATCH // 2, (index + 1) * BATCH // 2)
    arrays = {}
    for run in runs:
        engine = packed_engine(strategy) if run == PACKS else engine_of(run, strategy)
        data = {"image": images_of(run)[:, half], "label": LABELS[:STEPS, half]}
        data = tf.data.Dataset.from_tensor_slices(data).repeat()  # endless: so shapes are static
        batches = iter(strategy.distribute_datasets_from_function(lambda _, data=data: data))
        with mock.patch.object(
            collective_ops, "all_reduce_v2", wraps=collective_ops.all_reduce_v2
        ) as sums:
            engine.step(batches, tf.constant(2))
        arrays[f"{run}:collectives"] = np.array(sums.call_count)
        # In between the state goes through arrays, as it does when a run is resumed.
        engine.state.from_arrays(engine.state.to_arrays())
        engine.step(batches, tf.constant(STEPS - 2))
        own = [s for s in engine.state.optimizer.slots.values() if not isinstance(s, Remote)]
        arrays[f"{run}:own slots"] = np.array([sum(np.prod(s.shape) for s in own), len(own)])
        arrays |= {f"{run}:{key}": value for key, value in engine.state.to_arrays().items()}
    np.savez(out, **arrays)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """workers(run): what each of two workers has at the end of one of RUNS or FURTHER, arrays.

    Two processes do all RUNS, and two more FURTHER if a test asks for one of them.
    """

    @functools.cache
    def arrays_of(runs):
        return run_workers(runs, tmp_path_factory.mktemp("workers"))

    return lambda run: [found[run] for found in arrays_of(RUNS if run in RUNS else FURTHER)]


def run_workers(runs, folder):
    """For each of two workers: run -> the arrays that it ended with."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(2)]
        addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            arguments = (index, addresses, runs, str(folder / f"{index}.npz"))
            call = processes.Call(work, *arguments, log=folder / f"log{index}")
            started.append(stack.enter_context(call))
        for worker in started:
            assert worker.wait() == 0, worker.text()[-3000:]
    found = []
    for index in range(2):
        arrays = {run: {} for run in runs}
        for key, value in np.load(folder / f"{index}.npz").items():
            run, _, name = key.partition(":")
            arrays[run][name] = value
        found.append(arrays)
    return found


def cases(names, prefix=""):
    """Parameters of a test: names of runs, exhaustive those of FURTHER."""
    return [
        pytest.param(name, marks=[pytest.mark.exhaustive] if prefix + name in FURTHER else [])
        for name in names
    ]


@pytest.mark.spawns
@pytest.mark.compiles
@pytest.mark.parametrize("name", cases(NAMES))
def test_workers(workers, name):
    for arrays in workers(name):
        assert_same(weights_of(arrays), name)


@pytest.mark.spawns
@pytest.mark.compiles
@pytest.mark.parametrize("name", cases(IN_PARTS, SHARDED))
def test_workers_that_hold_a_part_of_the_state(workers, name):
    """Each reads all slots for a checkpoint, and has a part of them."""
    for arrays in workers(SHARDED + name):
        assert_same(weights_of(arrays), name)
    first, second = ({**arrays, "own slots": np.zeros(2)} for arrays in workers(SHARDED + name))
    assert_bits(first, second)
    (size, count), *_ = (arrays["own slots"] for arrays in workers(name))
    parts = [arrays["own slots"] for arrays in workers(SHARDED + name)]
    assert parts[0][0] + parts[1][0] == size and parts[0][1] + parts[1][1] == count
    assert min(part[1] for part in parts) > 0


@pytest.mark.spawns
@pytest.mark.compiles
def test_workers_that_send_bfloat16(workers):
    """To 8 bits of each gradient; all workers to the bit."""
    first, second = workers(BFLOAT16)
    assert_bits(first, second)
    found, expected = weights_of(first), alone("adamw")
    exact = weights_of(workers("adamw")[0])
    for key, value in expected.items():
        limit = 0.01 if key.startswith(("model/", "ema/")) else 2**-6 * np.abs(value).max()
        np.testing.assert_allclose(found[key], value, rtol=0, atol=limit, err_msg=key)
    assert max(np.abs(found[key] - exact[key]).max() for key in exact) > 1e-6  # it is rounded


@pytest.mark.spawns
@pytest.mark.compiles
def test_packs_of_gradients_change_no_bit(workers):
    """Of two workers' numbers there is one sum, in however many collectives they travel."""
    for plain, packed in zip(workers("adamw"), workers(PACKS), strict=True):
        assert plain.pop("collectives") == 1 and packed.pop("collectives") > 2
        assert_bits(plain, packed)


@pytest.mark.spawns
@pytest.mark.compiles
def test_float16_that_overflows_on_one_worker(workers):
    """Both skip the step, count it, and halve the scale; the others count."""
    found, second = workers(FLOAT16)
    assert_bits(found, second)
    assert (found["step"], found["updates"], found["first_bad_step"]) == (STEPS, STEPS - 1, -1)
    assert (found["loss_scale"], found["good_steps"]) == (INITIAL_LOSS_SCALE / 2, STEPS - 2)
    # As one device does.
    one = engine_of(FLOAT16, make_strategy(1))
    one.run(images_of(FLOAT16), LABELS[:STEPS])
    for key, value in one.state.to_arrays().items():
        if key.startswith(("model/", "ema/")):
            np.testing.assert_allclose(found[key], value, atol=2e-3, err_msg=key)
            assert np.any(value != one.initial[key])
    assert one.state.updates.numpy() == STEPS - 1
