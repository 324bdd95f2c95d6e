"""Learning rates against the closed formulas of big_vision."""

import math

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.training.schedules import NAMES, make_schedule

TOTAL, WARMUP = 1000, 100
STEPS = (0, 1, 50, WARMUP, 101, 550, 949, 999, TOTAL, 1200)


def decay(name, step, *, warmup=WARMUP, end=0.0, timescale=10_000):
    p = min(max((step - warmup) / (TOTAL - warmup), 0), 1)
    return {
        "cosine": end + (1 - end) * (1 + math.cos(math.pi * p)) / 2,
        "linear": end + (1 - end) * (1 - p),
        "rsqrt": 1 / math.sqrt(1 + max(step - warmup, 0) / timescale),
        "constant": 1.0,
    }[name]


def values(schedule, dtype=tf.int64):
    rates = [schedule(tf.constant(step, dtype)) for step in STEPS]
    assert {rate.dtype for rate in rates} == {tf.float32}
    return np.array(rates)


@pytest.mark.parametrize("name", NAMES)
def test_with_warmup(name):
    schedule = make_schedule(0.3, total_steps=TOTAL, name=name, warmup_steps=WARMUP)
    expected = [0.3 * decay(name, step) * min(1, step / WARMUP) for step in STEPS]
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-8)
    assert values(schedule)[0] == 0.0  # as in the reference


@pytest.mark.parametrize("name", NAMES)
def test_without_warmup(name):
    schedule = make_schedule(0.3, total_steps=TOTAL, name=name)
    expected = [0.3 * decay(name, step, warmup=0) for step in STEPS]
    np.testing.assert_allclose(values(schedule, tf.int32), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_cooldown_end_factor_and_timescale(name):
    schedule = make_schedule(
        2.0,
        total_steps=TOTAL,
        name=name,
        warmup_steps=WARMUP,
        cooldown_steps=100,
        end_factor=0.1,
        timescale_steps=50,
    )
    expected = [
        2.0
        * decay(name, step, end=0.1, timescale=50)
        * min(1, step / WARMUP)
        * min(1, max(TOTAL - step, 0) / 100)
        for step in STEPS
    ]
    np.testing.assert_allclose(values(schedule), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.02), ("linear", 0.02), ("constant", 0.2)])
def test_after_the_end(name, last):
    schedule = make_schedule(0.2, total_steps=10, name=name, end_factor=0.1)
    np.testing.assert_allclose(schedule(tf.constant(10)), last, rtol=1e-6)
    np.testing.assert_allclose(schedule(tf.constant(10**6)), last, rtol=1e-6)


def test_schedules_compile():
    schedule = make_schedule(0.3, total_steps=TOTAL, warmup_steps=WARMUP)
    compiled = tf.function(schedule, jit_compile=True)
    np.testing.assert_allclose(compiled(tf.constant(550)), schedule(tf.constant(550)), rtol=1e-6)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_the_shortest_runs(total):
    schedule = make_schedule(0.3, total_steps=total, warmup_steps=max(total - 1, 0))
    assert np.isfinite(schedule(tf.constant(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "step"}, "schedule 'step' is unknown; allowed: cosine, linear, rsqrt, constant"),
        ({"total_steps": -1}, "total_steps must be 0 or more, got -1"),
        ({"warmup_steps": 100}, "100 steps of warmup and 0 of cooldown do not fit .* run of 100"),
        ({"warmup_steps": 60, "cooldown_steps": 50}, "60 steps of warmup and 50 of cooldown"),
        ({"end_factor": 1.1}, r"end_factor must be in \[0, 1\], got 1.1"),
        ({"end_factor": -0.1}, "got -0.1"),
        ({"timescale_steps": 0}, "must not be negative"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"cooldown_steps": -1}, "must not be negative"),
        ({"learning_rate": -1.0}, "must not be negative"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**{"learning_rate": 0.1, "total_steps": 100, **options})
