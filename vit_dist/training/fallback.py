"""`step.jit=whole` on several replicas: tried at the first step; `split` takes over where it fails.

Whether XLA can compile the sum over the replicas together with the rest depends on the release, the
kind of device and the number of hosts. Nobody is told before it is tried.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging

from vit_dist.config.errors import UserError
from vit_dist.storage.errors import cause
from vit_dist.training.state import TrainState
from vit_dist.training.update import Tensors

# Metrics that are means over the steps of a call.
MEANS = ("loss", "accuracy")

# How TensorFlow and XLA refuse a program. Not among them: memory that ran out, and lost hosts,
# which another program would not help.
_REFUSALS = (
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
    tf.errors.NotFoundError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
    # Python's own, while a step is traced.
    RuntimeError,
    TypeError,
    ValueError,
)


class Program(NamedTuple):
    """A way to compile the step.

    Attributes:
      one_step: batch -> metrics.
      loop: (batches, n) -> metrics, see step.make_train_step; `one_step` n times.
      counted: names of the metrics that are sums over the n steps.
    """

    one_step: Callable[[Any], Tensors]
    loop: Callable[[Iterator[Any], tf.Tensor], Tensors]
    counted: tuple[str, ...]


def first_that_compiles(
    whole: Program, split: Program, *, state: TrainState
) -> Callable[[Iterator[Any], tf.Tensor], Tensors]:
    """The loop of `whole`, or from the first call on that of `split`, with a warning that says why.

    The trial is the first step itself. Its batch is read beforehand: what fails in it is no fault
    of reading, and the batch is not lost if the step is taken another way (law 1).
    """
    chosen: list[Program] = []

    def train_steps(batches: Iterator[Any], n: tf.Tensor) -> Tensors:
        if chosen:
            return chosen[0].loop(batches, n)
        batch, waited = timed_next(batches)
        before = int(state.step.numpy())
        try:
            first = whole.one_step(batch)
            # Waits for the device, which may fail after the call has returned.
            first = {k: tf.constant(v.numpy()) for k, v in first.items()}
            chosen.append(whole)
        except _REFUSALS as error:
            # A step that was done is not done twice.
            if isinstance(error, UserError) or int(state.step.numpy()) != before:
                raise
            logging.warning(
                "step.jit=whole cannot be compiled here (%s): going on with split, which sums "
                "the gradients outside of XLA",
                _reason(error),
            )
            first = split.one_step(batch)
            chosen.append(split)
        first["input_wait"] = tf.cast(waited, tf.float32)
        return first if int(n) == 1 else _join(first, chosen[0], batches, n)

    return train_steps


def _join(first: Tensors, program: Program, batches: Iterator[Any], n: tf.Tensor) -> Tensors:
    """The metrics of n steps, of which the first is done."""
    rest = program.loop(batches, n - 1)
    joined, count = dict(rest), tf.cast(n, tf.float32)
    for name in (*program.counted, "input_wait"):
        joined[name] = first[name] + rest[name]
    for name in MEANS:
        joined[name] = (first[name] + rest[name] * (count - 1)) / count
    return joined


def _reason(error: Exception) -> str:
    if isinstance(error, tf.errors.OpError):
        return cause(error)
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def timed_next(batches: Iterator[Any]) -> tuple[Any, tf.Tensor]:
    """The next batch, and the seconds until it was there, float64."""
    # Without control dependencies the graph has no order between clock and iterator: TensorFlow
    # could read the clock twice before the batch, or twice after it.
    began = tf.timestamp()
    with tf.control_dependencies([began]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        return batch, tf.timestamp() - began
