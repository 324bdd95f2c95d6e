"""How one variable is updated: rules in the form of Keras's update_step, on summed gradients.

First moments may be stored in bfloat16. `_Rule.average` updates in float32 and returns the float32
value, not the rounded one that it stores, as optax does. The Optimizer applies weight decay, except
for LAMB, whose trust ratio includes it.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vit_dist.training.sharding import Remote


class _Rule:
    """What Optimizer sets on every rule: number of updates, dtype of first moments, slot factory.

    A mixin before one of Keras's optimizers, of which only build() and update_step() are used. Its
    apply() is not, so Keras's own counter of updates never moves: `iterations` gives ours instead.
    """

    count: tf.Tensor | int = 0
    momentum_dtype = "float32"
    make_slot: Callable[..., Any]  # (variable, kind, Remote of its shape, make) -> a slot
    _corrections: dict[float, tf.Tensor]
    _scalars: dict[float, tf.Tensor]

    @property
    def iterations(self) -> tf.Tensor | int:
        return self.count

    def begin(self, count: tf.Tensor | int) -> None:
        """Begins an update; `count` updates were done before it."""
        self.count = count
        # Tensors of one graph: kept for one update only.
        self._corrections, self._scalars = {}, {}

    def scalar(self, value: float | tf.Tensor) -> tf.Tensor:
        """`value` as a constant that all variables of an update share.

        One constant for each variable would be a tenth of the step's operations, each of which
        takes time to trace and to compile.
        """
        if isinstance(value, tf.Tensor):
            return value
        if value not in self._scalars:
            self._scalars[value] = tf.constant(value, tf.float32)
        return self._scalars[value]

    def average(
        self, slot: keras.Variable, value: tf.Tensor, decay: float | tf.Tensor
    ) -> tf.Tensor:
        """Updates an exponential moving average; returns its new value in float32, not rounded."""
        new = self.scalar(decay) * _read(slot) + self.scalar(1 - decay) * value
        slot.assign(tf.cast(new, slot.dtype))
        return new

    def correction(self, decay: float) -> tf.Tensor:
        """1 - decay ** t, of Adam's moments; computed once for all variables of an update."""
        if decay not in self._corrections:
            self._corrections[decay] = 1 - decay ** tf.cast(self.count + 1, tf.float32)
        return self._corrections[decay]

    # Optimizer.apply runs a rule inside a keras.StatelessScope, which records assignments instead
    # of doing them. On TensorFlow Keras's versions of the next four methods take the tf.Variable
    # behind a keras.Variable, and so bypass that scope.

    def _var_key(self, variable: keras.Variable) -> int:
        return id(variable)

    def assign(self, variable: keras.Variable, value: tf.Tensor) -> None:
        variable.assign(value)

    def assign_add(self, variable: keras.Variable, value: tf.Tensor) -> None:
        variable.assign_add(value)

    def assign_sub(self, variable: keras.Variable, value: tf.Tensor) -> None:
        variable.assign_sub(value)

    # Keras's rules make each of their slots by this method, in build().
    def add_variable_from_reference(
        self, reference_variable: keras.Variable, name: str = "", initializer: Any = "zeros"
    ) -> Any:
        return self.add_slot(reference_variable, reference_variable.shape, name, initializer)

    def add_slot(
        self, variable: keras.Variable, shape: Any, kind: str, initializer: Any = "zeros"
    ) -> Any:
        """Makes a slot, named as Keras names its slots: the variable's path, then the kind."""
        # Only first moments may be short: a second moment changes by less than the rounding of
        # bfloat16 in each update, and would stand still.
        dtype = self.momentum_dtype if kind == "momentum" else variable.dtype
        name = f"{variable.path.replace('/', '_')}_{kind}"

        def make() -> keras.Variable:
            return self.add_variable(shape, initializer, dtype, name=name)  # type: ignore[attr-defined]

        return self.make_slot(variable, kind, Remote(tuple(shape), dtype), make)


def _read(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable.value), tf.float32)


class Adam(_Rule, keras.optimizers.Adam):
    """Adam (arXiv 1412.6980, algorithm 1), as PyTorch and optax: m^ / (sqrt(v^) + epsilon).

    Keras adds epsilon to sqrt(v) before bias correction: in the first step, where v^ is
    v / (1 - beta_2), that epsilon weighs 1 / sqrt(0.001) = 32 times as much for beta_2 = 0.999.
    """

    def direction(self, gradient: tf.Tensor, variable: keras.Variable) -> tf.Tensor:
        """Updates both moments; returns m^ / (sqrt(v^) + epsilon)."""
        index = self._get_variable_index(variable)
        m = self.average(self._momentums[index], gradient, self.beta_1)
        v = self.average(self._velocities[index], tf.square(gradient), self.beta_2)
        m_hat, v_hat = m / self.correction(self.beta_1), v / self.correction(self.beta_2)
        return m_hat / (tf.sqrt(v_hat) + self.scalar(self.epsilon))

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        self.assign_sub(variable, learning_rate * self.direction(gradient, variable))


class Lamb(Adam):
    """LAMB (arXiv 1904.00962), as in Apex and timm: u = Adam's update + decay w, w -= lr |w|/|u| u.

    The trust ratio |w| / |u| is 1 where either norm is 0, and for variables that do not decay.

    Attributes:
      decays: id(variable) -> coefficient, for the variables that decay; set by the Optimizer.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.decays: dict[int, float | tf.Tensor] = {}

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        update = self.direction(gradient, variable)
        if id(variable) in self.decays:
            weight = _read(variable)
            update += self.decays[id(variable)] * weight
            size, length = tf.norm(weight), tf.norm(update)
            # A variable of zeros has |w| = 0: with a trust ratio of 0 it could never move.
            either = (size > 0) & (length > 0)
            update *= tf.where(either, tf.math.divide_no_nan(size, length), 1.0)
        self.assign_sub(variable, learning_rate * update)


class Sgd(_Rule, keras.optimizers.SGD):
    """SGD with momentum as optax, flax and PyTorch have it: m = mu m + g, w = w - lr m.

    Keras's own SGD keeps lr inside m: another algorithm as soon as the learning rate changes.
    """

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        if self.momentum:
            # The weight moves by the float32 trace; only what is stored may be rounded.
            trace = self.momentums[self._get_variable_index(variable)]
            gradient = gradient + self.momentum * _read(trace)
            trace.assign(tf.cast(gradient, trace.dtype))
        self.assign_sub(variable, learning_rate * gradient)


class Lion(_Rule, keras.optimizers.Lion):
    """Lion (arXiv 2302.06675): w -= lr sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""


class Adafactor(_Rule, keras.optimizers.Optimizer):
    """Adafactor (arXiv 1804.04235), and the variant of "Scaling ViT" (arXiv 2106.04560).

    Keras's Adafactor keeps the second moment in full beside its factors, so it saves no memory.

    Args:
      learning_rate: Keras wants one; update_step is given the current one by the Optimizer.
      momentum: of an average over updates, not bias-corrected; 0 for none.
      beta_2_cap: b2 = min(beta_2_cap, 1 - t ** -0.8) at update t, from 1.
      factor_from: a tensor is factored over its two longest axes if both have so many entries.
      clip_threshold: bounds the root mean square of a tensor's update; None for no bound.
      parameter_scale: multiplies the update by the root mean square of the weights, at least 1e-3.
      epsilon: added to the squared gradient.

    Attributes:
      views: id(variable) -> the shape in which it is factored, for variables that are not factored
        in their own shape; set by make_optimizer.
    """

    def __init__(
        self,
        learning_rate: float,
        *,
        momentum: float,
        beta_2_cap: float,
        factor_from: int,
        clip_threshold: float | None,
        parameter_scale: bool,
        epsilon: float,
        name: str,
    ):
        super().__init__(learning_rate, name=name)
        self.momentum, self.beta_2_cap, self.factor_from = momentum, beta_2_cap, factor_from
        self.clip_threshold, self.parameter_scale = clip_threshold, parameter_scale
        self.epsilon = epsilon
        self.views: dict[int, tuple[int, ...]] = {}
        self._slots: list[dict[str, keras.Variable]] = []

    def axes(self, shape: Any) -> tuple[int, int] | None:
        """(second longest, longest) axis, or None where the second moment is kept in full."""
        if len(shape) < 2:
            return None
        # np.argsort breaks ties as optax does. In a square matrix that decides which axis counts as
        # rows, and so how the slots are named.
        second, longest = np.argsort(shape)[-2:]
        return (int(second), int(longest)) if shape[second] >= self.factor_from else None

    def _view(self, variable: keras.Variable) -> tuple[int, ...]:
        return self.views.get(id(variable), tuple(variable.shape))

    def build(self, var_list: list[keras.Variable]) -> None:
        super().build(var_list)
        for variable in var_list:
            shape = list(self._view(variable))
            axes = self.axes(shape)
            kinds = {"velocity": shape}
            # "row" is the mean over the longest axis, "column" over the second longest: each has
            # the variable's shape without the axis over which it is the mean.
            if axes is not None:
                kinds = {
                    kind: shape[:axis] + shape[axis + 1 :]
                    for kind, axis in zip(("column", "row"), axes, strict=True)
                }
            if self.momentum:
                kinds["momentum"] = list(variable.shape)
            self._slots.append({k: self.add_slot(variable, s, k) for k, s in kinds.items()})

    def _normalized(
        self, gradient: tf.Tensor, slots: dict[str, keras.Variable], axes: tuple[int, int] | None
    ) -> tf.Tensor:
        """The gradient over the square root of its second moment."""
        # No bias correction is needed: at t = 1 beta is 0, and the average is its first value.
        t = tf.cast(self.count + 1, tf.float32)
        beta = tf.minimum(self.beta_2_cap, 1 - t**-0.8)
        squared = tf.square(gradient) + self.epsilon
        if axes is None:
            return gradient * tf.math.rsqrt(self.average(slots["velocity"], squared, beta))
        # The second moment is approximated by the outer product of its row and column means
        # (arXiv 1804.04235, algorithm 4): O(rows + columns) of memory.
        second, longest = axes
        row = self.average(slots["row"], tf.reduce_mean(squared, longest), beta)
        column = self.average(slots["column"], tf.reduce_mean(squared, second), beta)
        # `row` has lost the longest axis, so axes behind that one have moved down by 1.
        reduced = second - (second > longest)
        row = row / tf.reduce_mean(row, reduced, keepdims=True)
        row, column = tf.expand_dims(row, longest), tf.expand_dims(column, second)
        return gradient * tf.math.rsqrt(row) * tf.math.rsqrt(column)

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        slots = self._slots[self._get_variable_index(variable)]
        view = self._view(variable)
        update = self._normalized(tf.reshape(gradient, view), slots, self.axes(view))
        update = tf.reshape(update, gradient.shape)
        if self.clip_threshold is not None:
            update /= tf.maximum(1.0, _rms(update) / self.clip_threshold)
        if self.parameter_scale:
            update *= tf.maximum(_rms(_read(variable)), 1e-3)
        if self.momentum:
            update = self.average(slots["momentum"], update, self.momentum)
        self.assign_sub(variable, learning_rate * update)


def _rms(x: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_mean(tf.square(x)))


class Muon(_Rule, keras.optimizers.Muon):
    """Muon (Jordan et al. 2024) scaled as in arXiv 2502.16982; AdamW for all but matrices.

    Of Keras's are which variables are matrices, Newton and Schulz's iterations, and the scale. The
    moments are ours: Keras computes with what is stored of them, which may be rounded, and adds
    Adam's epsilon before the correction of v.
    """

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        index = self._get_variable_index(variable)
        m, v = self.momentums[index], self.adam_velocities[index]
        if v is None:
            trace = gradient + self.scalar(self.momentum) * _read(m)
            m.assign(tf.cast(trace, m.dtype))
            matrix = gradient + self.scalar(self.momentum) * trace  # Nesterov's
            update = self.lr_adjust(self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        else:
            first = self.average(m, gradient, self.adam_beta_1)
            second = self.average(v, tf.square(gradient), self.adam_beta_2)
            second /= self.correction(self.adam_beta_2)
            update = first / self.correction(self.adam_beta_1)
            update /= tf.sqrt(second) + self.scalar(self.epsilon)
        self.assign_sub(variable, learning_rate * update)
