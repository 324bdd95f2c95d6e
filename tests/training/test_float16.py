"""float16: gradients that overflow are skipped, everywhere at once, and the scale follows."""

import functools

import numpy as np
import pytest

from tests.support.stepping import (
    IMAGES,
    LABELS,
    LARGE,
    NAN,
    OPTIONS,
    STEPS,
    Engine,
    assert_bits,
    make_net,
    restated,
    weights_of,
)
from vit_dist.training import update as update_lib
from vit_dist.training.state import INITIAL_LOSS_SCALE


@pytest.fixture(scope="module")
def half():
    """float16 on two replicas; the loss scale doubles after 3 good steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_lib, "GROWTH_STEPS", 3)
        engine = Engine(
            functools.partial(make_net, "mixed_float16"),
            replicas=2,
            jit="split",
            **OPTIONS,
        )
        engine.run(IMAGES[:1], LABELS[:1])  # traced here
        yield engine


def test_trains_like_float32(half):
    metrics = half.run(IMAGES, LABELS)
    history, expected = restated(half.initial)
    for got, want in zip(metrics, history, strict=True):
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.01)
        assert got["loss"] == pytest.approx(want["loss"], rel=0.01)
    final = half.state.to_arrays()
    for name in expected:
        if name.startswith(("model/", "ema/")):
            np.testing.assert_allclose(final[name], expected[name], atol=0.01, err_msg=name)


def test_scale_doubles_after_good_steps(half):
    scales = []
    for steps in range(1, STEPS + 1):
        half.run(IMAGES[:steps], LABELS[:steps], loss_scale=np.float32(64), good_steps=1)
        scales.append((half.state.loss_scale.numpy(), half.state.good_steps.numpy()))
    assert scales == [(64, 2), (128, 0), (128, 1), (128, 2), (256, 0)]


def test_overflow_on_one_replica_skips_on_all(half):
    assert half.initial["loss_scale"] == INITIAL_LOSS_SCALE
    images = IMAGES.copy()
    images[2, -1] = LARGE  # of replica 1; its gradient overflows at this scale and not at 1
    half.run(images[:2], LABELS[:2])
    expected = half.state.to_arrays()
    bad, *good = half.run(images[2:], LABELS[2:], **expected)
    final = half.state.to_arrays()
    assert not np.isfinite(bad["grad_norm"]) and np.isfinite(bad["loss"])
    assert all(np.isfinite(m["grad_norm"]) for m in good)
    assert (final["step"], final["updates"], final["first_bad_step"]) == (5, 4, -1)
    assert (final["loss_scale"], final["good_steps"]) == (INITIAL_LOSS_SCALE / 2, 2)
    half.replicas_hold_the_same()
    # The step that overflowed changed nothing: one call for it alone.
    half.run(images[2:3], LABELS[2:3], **expected)
    assert_bits(weights_of(half.state.to_arrays()), weights_of(expected))
    # The same batch is fine at a scale that fits it.
    half.run(images[2:3], LABELS[2:3], **{**expected, "loss_scale": np.float32(1)})
    assert half.state.updates.numpy() == 3


def test_is_bad_only_when_the_scale_cannot_fall(half):
    images = IMAGES.copy()
    images[:, 0] = NAN
    half.run(images, LABELS, loss_scale=np.float32(8))
    final = half.state.to_arrays()
    assert (final["first_bad_step"], final["loss_scale"], final["updates"]) == (3, 1, 0)


def test_what_counts_updates_and_what_steps(half):
    """After a skipped step: the moments' correction as if it had not been, the rate as ever."""
    images = IMAGES.copy()
    images[2, 0] = LARGE
    half.run(images[:2], LABELS[:2])
    before = half.state.to_arrays()
    metrics = half.run(images[2:], LABELS[2:], **before)
    assert [m["learning_rate"] for m in metrics] == pytest.approx(
        [0.1 / (1 + i) for i in (2, 3, 4)]
    )
    skipped = half.state.to_arrays()
    assert skipped["updates"] == 4
    # Without it, from the step behind it on, at the scale to which it led.
    scale = np.float32(INITIAL_LOSS_SCALE / 2)
    behind = {**before, "step": 3, "loss_scale": scale}
    half.run(images[3:], LABELS[3:], **behind)
    assert_bits(weights_of(half.state.to_arrays()), weights_of(skipped))
    half.run(images[3:], LABELS[3:], **{**behind, "updates": 3})  # as if it had been
    name = "model/head/kernel"
    assert np.any(half.state.to_arrays()[name] != skipped[name])
