"""Norms and histograms of weights, gradients and updates, computed inside the compiled step.

The model is Levanter's `watch`: every so many steps the device itself reduces each variable to a
few numbers, so that nothing as large as a gradient ever travels to the host. With everything off a
Watch adds nothing: the step is the same program as without it.

Shapes: V trained variables, in the optimizer's order.
"""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.training.state import TrainState

Tensors = dict[str, tf.Tensor]
# A function, because even an addition that nobody uses would be in the program.
Count = Callable[[], tf.Tensor]

BINS = 30  # as many as TensorBoard shows
KINDS = ("weights", "gradients", "updates")
# Begins the names of metrics that are no scalars.
PREFIX = "watch/"


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """What a step computes to be looked at.

    Attributes:
      every: steps from one look to the next, at each of which the norm of every trained variable,
        its gradient (before clipping) and its update is taken; 0 for never.
      histograms: whether a look also counts the values in BINS bins.
      update_norm: whether each step computes the global norm of its update.

    Raises:
      ConfigError: a negative number of steps.
    """

    every: int = 0
    histograms: bool = True
    update_norm: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"monitor.watch_steps must be 0 or more, got {self.every}")


class Watch:
    """What the functions of a step call to be watched.

    Its metrics are "update_norm", a scalar, and for each kind of KINDS "watch/KIND/norms", (V, 3)
    float32 of norm, smallest and largest value, and "watch/KIND/counts", (V, BINS) float32: how
    many values are in each of equally wide bins from the smallest to the largest. Between looks
    these arrays are zeros.
    """

    def __init__(self, state: TrainState, options: WatchOptions | None = None):
        self._options = options or WatchOptions()
        self._variables = list(state.optimizer.variables.values())

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the metrics that are scalars."""
        return ("update_norm",) if self._options.update_norm else ()

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the metrics that are arrays."""
        if not self._options.every:
            return {}
        found: dict[str, tuple[int, ...]] = {}
        for kind in KINDS:
            found |= self._shapes(kind)
        return found

    def weights(self) -> list[tf.Tensor]:
        """The trained weights as they are now, where a later `updates` needs them."""
        if not (self._options.every or self._options.update_norm):
            return []
        return [tf.convert_to_tensor(v.value) for v in self._variables]

    def gradients(self, gradients: Sequence[tf.Tensor], *, done: Count) -> Tensors:
        """Metrics of the gradients; `done` gives the number of steps with this one, int64."""
        return self._look("gradients", lambda: gradients, done)

    def updates(self, before: Sequence[tf.Tensor], *, done: Count) -> Tensors:
        """Metrics of the new weights, and of what they differ from `before` by."""
        if not before:
            return {}
        after = self.weights()
        found: Tensors = {}
        if self._options.update_norm:
            squares = [tf.reduce_sum(tf.square(b - a)) for a, b in zip(before, after, strict=True)]
            found["update_norm"] = tf.sqrt(tf.add_n(squares))
        found |= self._look("weights", lambda: after, done)
        found |= self._look(
            "updates", lambda: [b - a for a, b in zip(before, after, strict=True)], done
        )
        return found

    def _shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        count = len(self._variables)
        found: dict[str, tuple[int, ...]] = {f"{PREFIX}{kind}/norms": (count, 3)}
        if self._options.histograms:
            found[f"{PREFIX}{kind}/counts"] = (count, BINS)
        return found

    def _look(self, kind: str, values: Callable[[], Sequence[tf.Tensor]], done: Count) -> Tensors:
        """The metrics of one kind, zeros at steps without a look."""
        if not self._options.every:
            return {}
        shapes = self._shapes(kind)

        def look() -> list[tf.Tensor]:
            found = [_reduced(x, histogram=self._options.histograms) for x in values()]
            # One array for all variables: a training has hundreds, and each tensor that leaves the
            # device costs a transfer.
            return [tf.stack(column) for column in zip(*found, strict=True)]

        # A branch on the device, which XLA has too: other steps pay for the comparison alone.
        results = tf.cond(
            tf.equal(done() % self._options.every, 0),
            look,
            lambda: [tf.zeros(shape) for shape in shapes.values()],
        )
        # tf.cond unpacks a list of one tensor.
        results = results if isinstance(results, list | tuple) else [results]
        return dict(zip(shapes, results, strict=True))


def _reduced(x: tf.Tensor, *, histogram: bool) -> list[tf.Tensor]:
    """(3,) norm, smallest and largest value; and with `histogram` the counts, (BINS,); float32."""
    x = tf.reshape(tf.cast(x, tf.float32), (-1,))
    low, high = tf.reduce_min(x), tf.reduce_max(x)
    norms = tf.stack([tf.sqrt(tf.reduce_sum(tf.square(x))), low, high])
    if not histogram:
        return [norms]
    # How many values are below each inner edge, and then the differences. XLA makes one pass over x
    # of it on every kind of device; scattering each value into its bin is serial on a TPU.
    edges = low + (high - low) * tf.range(1, BINS, dtype=tf.float32) / BINS
    # int32: float32 cannot count beyond 2^24, and a kernel of a large model has more entries.
    below = tf.reduce_sum(tf.cast(x[tf.newaxis] < edges[:, tf.newaxis], tf.int32), axis=1)
    bounds = tf.concat([[0], below, [x.shape[0]]], axis=0)
    return [norms, tf.cast(bounds[1:] - bounds[:-1], tf.float32)]
