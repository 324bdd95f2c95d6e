"""Norms and histograms that the step computes, against NumPy's of the state before and after."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import (
    BATCH,
    IMAGES,
    LABELS,
    OPTIONS,
    STEPS,
    Engine,
    loss_and_gradient,
    make_net,
)
from vit_dist.config.errors import ConfigError
from vit_dist.training.watch import BINS, KINDS, Watch, WatchOptions

EVERY = 2
LOOK = WatchOptions(every=EVERY, update_norm=True)
ENGINES = {
    "one program": {"jit": "whole"},
    "two replicas, split": {"replicas": 2, "jit": "split"},
    "two replicas, sharded": {
        "replicas": 2,
        "jit": "off",
        "optimizer": {**OPTIONS["optimizer"], "shard_state": True},
    },
}


def weights(arrays):
    return {k.removeprefix("model/"): v for k, v in arrays.items() if k.startswith("model/")}


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_looks_are_those_of_numpy(options):
    engine = Engine(make_net, watch=LOOK, **{**OPTIONS, **options})
    names, batches = list(engine.state.optimizer.variables), engine.batches(IMAGES, LABELS)
    for step in range(STEPS):
        before = weights(engine.state.to_arrays())
        found = {k: v.numpy() for k, v in engine.step(batches, tf.constant(1)).items()}
        after = weights(engine.state.to_arrays())
        updates = {name: after[name] - before[name] for name in names}
        np.testing.assert_allclose(found["update_norm"], norm(updates.values()), rtol=1e-5)
        if (step + 1) % EVERY:
            assert not any(found[f"watch/{kind}/{part}"].any() for kind in KINDS
                           for part in ("norms", "counts"))  # fmt: skip
            continue
        _, _, gradient = loss_and_gradient(before, IMAGES[step], LABELS[step])
        gradient = {name: gradient[name] / BATCH for name in names}  # before clipping
        expected = {"weights": after, "gradients": gradient, "updates": updates}
        for kind, arrays in expected.items():
            for i, name in enumerate(names):
                x, (size, low, high) = arrays[name], found[f"watch/{kind}/norms"][i]
                np.testing.assert_allclose(
                    [size, low, high], [norm([x]), x.min(), x.max()], rtol=1e-3, atol=1e-6
                )
                counts = found[f"watch/{kind}/counts"][i]
                # Values at the very edge of a bin may fall to either side by rounding.
                assert counts.shape == (BINS,) and counts.sum() == x.size
                assert np.abs(counts - np.histogram(x, BINS)[0]).sum() <= 2


def test_without_it_a_step_has_nothing_more():
    engine = Engine(make_net, **OPTIONS, jit="off")
    plain = engine.step(engine.batches(IMAGES, LABELS), tf.constant(1))
    assert not [name for name in plain if "watch" in name or "update" in name]
    watch = Watch(engine.state)
    assert (watch.scalars, watch.arrays, watch.weights()) == ((), {}, [])
    assert watch.gradients([tf.ones(3)], done=lambda: tf.constant(4)) == {}


def test_norms_without_histograms():
    engine = Engine(make_net, watch=WatchOptions(every=1, histograms=False), **OPTIONS, jit="off")
    found = engine.step(engine.batches(IMAGES, LABELS), tf.constant(2))
    assert {k for k in found if k.startswith("watch/")} == {f"watch/{kind}/norms" for kind in KINDS}


def test_a_negative_number_of_steps():
    with pytest.raises(ConfigError, match=r"monitor\.watch_steps must be 0 or more"):
        WatchOptions(every=-1)
