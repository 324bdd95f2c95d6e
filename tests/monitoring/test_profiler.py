"""When a profile begins and ends, and what it may not break; test_tensorboard.py reads one."""

import pytest
import tensorflow as tf

from vit_dist.monitoring.profiler import Profiler


@pytest.fixture
def calls(monkeypatch):
    """What is asked of TensorFlow's profiler."""
    made = []
    monkeypatch.setattr(tf.profiler.experimental, "start", lambda folder: made.append("start"))
    monkeypatch.setattr(tf.profiler.experimental, "stop", lambda: made.append("stop"))
    return made


def go(profiler, steps, calls):
    for step in steps:
        with profiler.step(step):
            calls.append(step)
        if profiler.ends_at(step + 1):
            profiler.stop(lambda: calls.append("wait"))


def test_exactly_its_steps(calls):
    with Profiler("x", first=2, count=2) as profiler:
        assert profiler.bounds == (2, 3, 4)
        go(profiler, range(6), calls)
    assert calls == [0, 1, "start", 2, 3, "wait", "stop", 4, 5]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"first": None, "count": 2}, 0),
        ({"first": 2, "count": 2, "active": False}, 0),
        ({"first": 2, "count": 2}, 3),  # resumed in the middle
    ],
)
def test_no_profile(calls, options, first):
    with Profiler("x", **options) as profiler:
        go(profiler, range(first, 6), calls)
    assert calls == list(range(first, 6))


def test_an_error_leaves_no_profiler_on(calls):
    with pytest.raises(ZeroDivisionError), Profiler("x", first=0, count=3) as profiler:
        go(profiler, range(2), calls)
        raise ZeroDivisionError
    assert calls == ["start", 0, 1, "stop"]


def test_a_profiler_that_fails_is_told_and_ends_nothing(calls, monkeypatch, caplog):
    def broken(folder):
        raise tf.errors.UnavailableError(None, None, "no CUPTI")

    monkeypatch.setattr(tf.profiler.experimental, "start", broken)
    with Profiler("x", first=1, count=1) as profiler:
        go(profiler, range(3), calls)
    assert calls == [0, 1, 2]
    assert caplog.text.count("going on without it") == 1
