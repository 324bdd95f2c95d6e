"""ZeRO-1: the optimizer's state cut up among the replicas gives the same weights, slots, files."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.support import processes
from tests.support.stepping import (
    IMAGES,
    LABELS,
    NAN,
    Engine,
    assert_bits,
    make_net,
    make_strategy,
    options_of,
    weights_of,
)
from tests.support.tiny import arrays, assert_same, make, without_evaluation
from vit_dist.model.vit import named_weights
from vit_dist.run.check import check
from vit_dist.train import train
from vit_dist.training.optimizer import NAMES, OptimizerOptions, make_optimizer
from vit_dist.training.sharding import Shards, assign_owners


def engine_of(name, *, replicas=2, shard=True, **changed):
    options = {**options_of(name), **changed}
    options["optimizer"] = {**options["optimizer"], "shard_state": shard}
    return Engine(make_net, replicas=replicas, **options)


def slots_of(arrays):
    return {name: value for name, value in arrays.items() if name.startswith("optimizer/")}


# Those whose slots differ in kind: two of the weight's shape and a ratio of norms; rows and
# columns; a matrix's product, and Adam's for the rest. The others share their code.
KINDS = ("lamb", "adafactor_vit", "muon")
OF_A_KIND = [pytest.param(n, marks=pytest.mark.exhaustive) for n in NAMES if n not in KINDS]


@pytest.mark.parametrize("name", [*KINDS, *OF_A_KIND])
def test_the_same_as_without(name):
    """Weights, averages and slots after five steps; each slot is on its owner's device alone."""
    results = []
    for shard in (False, True):
        engine = engine_of(name, shard=shard, accumulation=2)
        metrics = engine.run(IMAGES, LABELS)
        engine.replicas_hold_the_same()
        results.append((metrics, engine.state.to_arrays()))
    (expected_metrics, expected), (metrics, found) = results
    assert metrics == expected_metrics
    assert_bits(found, expected)
    optimizer = engine.state.optimizer
    for key, slot in optimizer.slots.items():
        owner = optimizer.shards.owners[key.rpartition("/")[0]]
        assert not isinstance(slot.value, tf.distribute.DistributedValues)
        assert slot.value.device.endswith(f"CPU:{owner}"), key
    assert set(optimizer.shards.owners.values()) == {0, 1}


@pytest.mark.parametrize("replicas", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_compiled(replicas):
    """As every replica moves its own with XLA; one replica owns all and sends nothing."""
    jit = "split" if replicas > 1 else "whole"
    found = []
    for shard in (False, True):
        engine = engine_of("adamw", replicas=replicas, shard=shard, jit=jit)
        engine.run(IMAGES, LABELS, calls=[2, 3])
        found.append(weights_of(engine.state.to_arrays()))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def engines():
    """Engines that differ in how many replicas hold the state, and whether it is cut up."""
    return {
        (replicas, shard): engine_of("adamw", replicas=replicas, shard=shard)
        for replicas, shard in ((2, True), (4, True), (1, False))
    }


def test_a_checkpoint_does_not_show_who_held_what(engines):
    """Two steps on one, the rest on another: bits on the same, to rounding on others."""
    first = engines[2, True]
    first.run(IMAGES, LABELS)
    expected = first.state.to_arrays()
    first.run(IMAGES[:2], LABELS[:2])
    saved = first.state.to_arrays()
    for key, engine in engines.items():
        engine.run(IMAGES[2:], LABELS[2:], **saved)
        found = engine.state.to_arrays()
        if engine is first:
            assert_bits(found, expected)
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{key} {name}"
            )


def test_what_is_not_finite_changes_nothing_anywhere(engines):
    engine = engines[2, True]
    engine.run(IMAGES[:2], LABELS[:2])
    expected = weights_of(engine.state.to_arrays())
    images = IMAGES.copy()
    images[2, -1, 0, 0, 0] = NAN
    engine.run(images, LABELS)
    final = engine.state.to_arrays()
    assert_bits(weights_of(final), expected)
    assert (final["first_bad_step"], final["updates"]) == (2, 2)
    engine.replicas_hold_the_same()


def test_half_the_state_on_each_of_two_replicas(engines):
    """By the bytes of what lies on a device; without, each has all."""
    sizes = {name: v.shape.num_elements() for name, v in named_weights(make_net()).items()}
    held = dict.fromkeys(("CPU:0", "CPU:1"), 0)
    for slot in engines[2, True].state.optimizer.slots.values():
        held[slot.value.device[-5:]] += slot.shape.num_elements()
    total = 2 * sum(sizes.values())  # two moments
    assert sum(held.values()) == total and max(held.values()) < 0.75 * total
    whole = engine_of("adamw", shard=False).state.optimizer.slots.values()
    copies = [local for slot in whole for local in slot.value.values]
    assert sum(local.shape.num_elements() for local in copies) == 2 * total


def test_assign_owners():
    sizes = {"a": 5, "b": 7, "c": 5, "d": 1, "e": 6}
    assert assign_owners(sizes, 2) == {"b": 0, "e": 1, "a": 1, "c": 0, "d": 1}
    assert assign_owners(dict(reversed(sizes.items())), 2) == assign_owners(sizes, 2)
    assert set(assign_owners(sizes, 1).values()) == {0}
    assert sorted(assign_owners({"a": 1, "b": 1}, 4).values()) == [0, 1]  # two replicas own nothing


def test_weights_travel_in_their_places():
    shapes = {"a": (2, 3), "b": (5,), "c": (), "d": (4, 1)}
    shards = Shards(make_strategy(2), shapes)
    values = {name: np.float32(np.random.rand(*shape)) for name, shape in shapes.items()}
    packed = [shards.pack({n: values[n] for n in shards.names(r)}) for r in range(2)]
    assert packed[0].shape == packed[1].shape == (shards.padded_length,) == (9,)
    found = shards.unpack(tf.concat(packed, 0))
    assert set(found) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)


def test_mistakes():
    with pytest.raises(ValueError, match=r"'whole' does not go with optimizer\.shard_state"):
        engine_of("sgd", jit="whole")
    variables = named_weights(make_net())
    strategy = make_strategy(2)
    with strategy.scope(), pytest.raises(ValueError, match="no scope of it around"):
        make_optimizer(variables, OptimizerOptions(shard_state=True), strategy=strategy)
    with pytest.raises(ValueError, match="needs the strategy"):
        make_optimizer(variables, OptimizerOptions(shard_state=True))
    for refused, message in (
        ({"strategy__name": "tpu"}, r"optimizer\.shard_state is not for TPUs"),
        ({**TWO, "step__jit": "whole"}, "'whole' does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            check(make(optimizer__shard_state=True, **refused))
    tpu = object.__new__(tf.distribute.TPUStrategy)
    with pytest.raises(ValueError, match=r"optimizer\.shard_state is not for TPUs"):
        make_optimizer(variables, OptimizerOptions(shard_state=True), strategy=tpu)


# by the command

# The same keys for a call of the function and for the command.
SHORT = {"model.dropout": 0.0, "total_steps": 4, "save_steps": 2, "optimizer.name": "lamb"}
TWO = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}


def run_here(folder, **changed):
    short = {key.replace(".", "__"): value for key, value in SHORT.items()}
    train(without_evaluation(**short, **changed), str(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on two devices that hold a part each."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(folder, **TWO, optimizer__shard_state=True)
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """The folder of that run as it was at half time."""
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "000000004")
    return tmp_path / "half"


def test_a_run_goes_on_to_the_bit(whole, half):
    run_here(half, **TWO, optimizer__shard_state=True)
    assert_bits(arrays(half), arrays(whole))


@pytest.mark.exhaustive
def test_a_run_goes_on_on_one_device(whole, half):
    """test_a_checkpoint_does_not_show_who_held_what does so with the step alone."""
    run_here(half)
    assert_same(arrays(half), arrays(whole), atol=1e-5)


def test_two_workers_go_on_and_save_what_both_hold(whole, half, tmp_path):
    """The chief alone writes; what it writes is what two devices of one process have."""
    flags = [f"--config={processes.TINY}", f"--workdir={half}"]
    flags += ["--config.data.val_split="]
    flags += [f"--config.{key}={value}" for key, value in SHORT.items()]
    flags += ["--config.strategy.name=multiworker", "--config.optimizer.shard_state=True"]
    with processes.hosts(*flags, log=tmp_path / "log") as started:
        for host in started:
            assert host.wait() == 0, host.text()[-3000:]
    assert "resumed from step 2" in started[0].text()
    assert_same(arrays(half), arrays(whole), atol=1e-5)
