"""Learning rates against the closed formulas of big_vision, optax and timm."""

import math

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.training.schedules import NAMES, Schedule

TOTAL, WARMUP = 1000, 100
STEPS = (0, 1, 50, WARMUP, 101, 550, 949, 999, TOTAL, 1200)


def decay(name, step, *, warmup=WARMUP, end=0.0, timescale=10_000, power=2.0):
    p = min(max((step - warmup) / (TOTAL - warmup), 0), 1)
    return {
        "cosine": end + (1 - end) * (1 + math.cos(math.pi * p)) / 2,
        "linear": end + (1 - end) * (1 - p),
        "polynomial": end + (1 - end) * (1 - p) ** power,
        "rsqrt": 1 / math.sqrt(1 + max(step - warmup, 0) / timescale),
        "step": 0.1 ** sum(step >= m for m in (300, 600, 900)),
        "constant": 1.0,
    }[name]


def values(schedule, dtype=tf.int64, steps=STEPS):
    rates = [schedule(tf.constant(step, dtype)) for step in steps]
    assert {rate.dtype for rate in rates} == {tf.float32}
    return np.array(rates)


@pytest.mark.parametrize("name", NAMES)
def test_with_warmup(name):
    schedule = Schedule(0.3, total_steps=TOTAL, name=name, warmup_steps=WARMUP)
    expected = [0.3 * decay(name, step) * min(1, step / WARMUP) for step in STEPS]
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-8)
    assert values(schedule)[0] == 0.0  # as in the reference


@pytest.mark.parametrize("name", NAMES)
def test_without_warmup(name):
    schedule = Schedule(0.3, total_steps=TOTAL, name=name)
    expected = [0.3 * decay(name, step, warmup=0) for step in STEPS]
    np.testing.assert_allclose(values(schedule, tf.int32), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_cooldown_factors_power_and_timescale(name):
    schedule = Schedule(
        2.0,
        total_steps=TOTAL,
        name=name,
        warmup_steps=WARMUP,
        cooldown_steps=100,
        start_factor=0.2,
        end_factor=0.1,
        timescale_steps=50,
        power=3.0,
    )
    expected = [
        2.0
        * decay(name, step, end=0.1, timescale=50, power=3.0)
        * min(1, 0.2 + 0.8 * step / WARMUP)
        * min(1, max(TOTAL - step, 0) / 100)
        for step in STEPS
    ]
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-8)


def test_the_schedule_of_deit():
    """timm's CosineLRScheduler as DeiT sets it (arXiv 2012.12877): by the epoch, from its start."""
    epochs, warm, peak, first, last, per_epoch = 300, 5, 1e-3, 1e-6, 1e-5, 1251

    def of_timm(step):
        epoch = step // per_epoch
        if epoch < warm:
            return first + epoch * (peak - first) / warm
        return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * epoch / epochs))

    schedule = Schedule(
        peak,
        total_steps=epochs * per_epoch,
        warmup_steps=warm * per_epoch,
        start_factor=first / peak,
        end_factor=last / peak,
        hold_steps=per_epoch,
        decay_from="start",
    )
    steps = [0, 1, 1250, 1251, 5 * 1251 - 1, 5 * 1251, 150 * 1251, 299 * 1251, 300 * 1251 - 1]
    rates = values(schedule, steps=steps)
    np.testing.assert_allclose(rates, [of_timm(s) for s in steps], rtol=1e-5)
    assert rates[0] == rates[2] == pytest.approx(1e-6)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


def test_milestones_and_drop():
    schedule = Schedule(
        1.0, total_steps=200, name="step", milestones=(25, 50.5), drop=0.5, warmup_steps=10
    )
    rates = values(schedule, steps=(5, 10, 49, 50, 100, 101, 199))
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("name", "last"), [("cosine", 0.02), ("linear", 0.02), ("polynomial", 0.02), ("constant", 0.2)]
)
def test_after_the_end(name, last):
    schedule = Schedule(0.2, total_steps=10, name=name, end_factor=0.1)
    np.testing.assert_allclose(schedule(tf.constant(10)), last, rtol=1e-6)
    np.testing.assert_allclose(schedule(tf.constant(10**6)), last, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_compile(name):
    schedule = Schedule(0.3, total_steps=TOTAL, warmup_steps=WARMUP, name=name, hold_steps=7)
    compiled = tf.function(schedule, jit_compile=True)
    for step in (50, 550):
        step = tf.constant(step, tf.int64)
        np.testing.assert_allclose(compiled(step), schedule(step), rtol=1e-6)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_the_shortest_runs(total):
    schedule = Schedule(0.3, total_steps=total, warmup_steps=max(total - 1, 0))
    assert np.isfinite(schedule(tf.constant(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "exp"}, "schedule 'exp' is unknown; allowed: cosine, linear, polynomial, rsqrt"),
        ({"decay_from": "end"}, "schedule.decay_from 'end' is unknown; allowed: warmup, start"),
        ({"total_steps": -1}, "total_steps must be 0 or more, got -1"),
        ({"warmup_steps": 100}, "100 steps of warmup and 0 of cooldown do not fit .* run of 100"),
        ({"warmup_steps": 60, "cooldown_steps": 50}, "60 steps of warmup and 50 of cooldown"),
        ({"start_factor": -0.1}, r"start_factor must be in \[0, 1\], got -0.1"),
        ({"end_factor": 1.1}, r"end_factor must be in \[0, 1\], got 1.1"),
        ({"drop": 2.0}, r"drop must be in \[0, 1\], got 2.0"),
        ({"power": 0.0}, "power must be above 0, got 0.0"),
        ({"hold_steps": 0}, "hold must be 1 step or more, got 0"),
        ({"milestones": (60, 30)}, r"milestones must be percentages .* that rise.* \(60, 30\)"),
        ({"milestones": (60, 60)}, "milestones must be percentages"),
        ({"milestones": (0.5, 100)}, "milestones must be percentages"),
        ({"milestones": ()}, r"milestones must be percentages .* got \(\)"),
        ({"milestones": "30"}, "milestones must be percentages .* got '30'"),
        ({"timescale_steps": 0}, "timescale must be 1 step or more, got 0"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"cooldown_steps": -1}, "must not be negative"),
        ({"learning_rate": -1.0}, "must not be negative"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"learning_rate": 0.1, "total_steps": 100, **options})
