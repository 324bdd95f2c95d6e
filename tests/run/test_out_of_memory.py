"""Memory that runs out is told from a disk that is full, with what to lower and no traceback."""

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.config.errors import StorageError, UserError
from vit_dist.run import cli
from vit_dist.run.out_of_memory import (
    EVALUATION,
    TRAINING,
    OutOfMemoryError,
    explain_memory,
    is_out_of_memory,
)


def of_numpy():
    return np.zeros(2**50)


def of_tensorflow():
    return tf.zeros([2**42])


def of_xla():
    return tf.function(lambda: tf.reduce_sum(tf.random.normal([2**40])), jit_compile=True)()


def in_a_pipeline():
    ds = tf.data.Dataset.range(1).map(lambda i: tf.zeros([2**42]) + tf.cast(i, tf.float32))
    return next(iter(ds))


@pytest.mark.parametrize("use", [of_numpy, of_tensorflow, of_xla, in_a_pipeline])
def test_what_is_really_raised(use):
    with pytest.raises((MemoryError, tf.errors.OpError)) as error:
        use()
    explained = explain_memory(error.value, remedy=TRAINING)
    assert type(explained) is OutOfMemoryError and explained.exit_code == 1
    text = str(explained)
    assert text.startswith("out of memory (") and "\n" not in text and "{{" not in text
    for key in ("step.accumulation", "input.batch_size", "input.eval_batch_size", "input.cache"):
        assert f"config.{key}" in text


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (tf.errors.InternalError(None, None, "CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (tf.errors.ResourceExhaustedError(None, None, "Ran out of memory in hbm"), True),
        (tf.errors.ResourceExhaustedError(None, None, "/x; No space left on device"), False),
        (tf.errors.ResourceExhaustedError(None, None, "/x; Too many open files"), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (OutOfMemoryError("out of memory (explained once)"), True),
        (StorageError("the disk is full"), False),
        (tf.errors.InvalidArgumentError(None, None, "shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_is_memory_and_what_is_not(error, memory):
    assert is_out_of_memory(error) == memory
    assert (explain_memory(error, remedy=EVALUATION) is not None) == memory


def test_a_command_names_only_what_it_has():
    text = str(explain_memory(MemoryError(), remedy=EVALUATION))
    assert "config.input.eval_batch_size" in text and "accumulation" not in text


@pytest.mark.parametrize("error, at_once", [(MemoryError(), True), (UserError("wrong"), False)])
def test_the_process_ends_before_tensorflow_cleans_up(error, at_once, monkeypatch, capsys):
    """TensorFlow aborts there after some failures for want of memory, which looks like a crash."""

    def fail(_):
        raise error

    class Ended(BaseException):
        """In place of the end of this process."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended if at_once else SystemExit) as ended:
        cli._guard(fail)([])
    assert ended.value.args == (1,) and "error: " in capsys.readouterr().err
