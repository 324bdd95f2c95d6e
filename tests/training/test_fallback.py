"""`whole` on several replicas is tried; where it fails, `split` takes over and no batch is lost."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import IMAGES, LABELS, OPTIONS, STEPS, Engine, make_net
from vit_dist.config.errors import ConfigError
from vit_dist.training import fallback
from vit_dist.training.fallback import Program, first_that_compiles

ALL = [STEPS]


@pytest.fixture(scope="module")
def split():
    engine = Engine(make_net, replicas=2, jit="split", **OPTIONS)
    return engine.run(IMAGES, LABELS, calls=ALL), engine.state.to_arrays()


@pytest.mark.parametrize("calls", [ALL, pytest.param([1] * STEPS, marks=pytest.mark.exhaustive)])
def test_what_cannot_be_compiled_is_split(split, caplog, calls):
    """TensorFlow's own refusal: on CPUs it makes one program, on one device, of all replicas."""
    expected, arrays = split
    engine = Engine(make_net, replicas=2, jit="whole", **OPTIONS)
    got = engine.run(IMAGES, LABELS, calls=calls)
    assert "step.jit=whole cannot be compiled here (" in caplog.text
    assert "(Trying to access resource" in caplog.text
    for name, value in engine.state.to_arrays().items():
        np.testing.assert_array_equal(value, arrays[name], name)
    if calls == ALL:
        assert got == [pytest.approx(row, rel=1e-6) for row in expected]


class Counter:
    """A state of which only the step is looked at."""

    def __init__(self):
        self.step = tf.Variable(0, dtype=tf.int64)


def program(state, *, error=None, before=False):
    """A program whose step fails, `before` or after it has counted."""

    def one_step(batch):
        if error and before:
            raise error
        state.step.assign_add(1)
        if error:
            raise error
        value = tf.cast(batch, tf.float32)
        return {k: value for k in ("loss", "accuracy", "masked", "grad_norm")}

    def loop(batches, n):
        rows = [one_step(next(batches)) for _ in range(int(n))]
        sums = {k: sum(row[k] for row in rows) for k in rows[0]}
        means = {k: sums[k] / len(rows) for k in fallback.MEANS}
        return {**sums, **means, "grad_norm": rows[-1]["grad_norm"], "input_wait": tf.constant(0.5)}

    return Program(one_step, loop, counted=("masked",))


REFUSED = tf.errors.InvalidArgumentError(None, None, "Detected unsupported operations")


@pytest.mark.parametrize("error", [None, REFUSED])
def test_metrics_of_the_first_call_are_joined(error):
    state = Counter()
    train_steps = first_that_compiles(
        program(state, error=error, before=True), program(state), state=state
    )
    batches = iter(tf.data.Dataset.range(1, 9))
    got = train_steps(batches, tf.constant(4, tf.int64))
    assert {k: float(got[k]) for k in ("loss", "accuracy", "masked", "grad_norm")} == {
        "loss": 2.5,
        "accuracy": 2.5,
        "masked": 10.0,
        "grad_norm": 4.0,
    }
    assert float(got["input_wait"]) >= 0.5
    assert float(train_steps(batches, tf.constant(2, tf.int64))["loss"]) == 5.5
    assert int(state.step.numpy()) == 6


@pytest.mark.parametrize(
    "error, before",
    [
        (REFUSED, False),  # the step was done: not twice
        (ConfigError("not for several replicas"), True),
        (tf.errors.ResourceExhaustedError(None, None, "OOM"), True),
        (tf.errors.UnavailableError(None, None, "a host is gone"), True),
    ],
)
def test_what_another_program_would_not_help(error, before):
    state = Counter()
    train_steps = first_that_compiles(
        program(state, error=error, before=before), program(state), state=state
    )
    with pytest.raises(type(error)):
        train_steps(iter(tf.data.Dataset.range(1, 9)), tf.constant(1, tf.int64))
    assert int(state.step.numpy()) == (not before)


def test_an_unreadable_batch_is_no_refusal():
    state = Counter()
    train_steps = first_that_compiles(program(state), program(state), state=state)
    unreadable = tf.data.Dataset.range(1, 9).map(
        lambda x: tf.debugging.check_numerics(1 / (x - 1), "")
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        train_steps(iter(unreadable), tf.constant(1, tf.int64))
    assert int(state.step.numpy()) == 0
