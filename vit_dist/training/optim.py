"""Optimisers: Keras's mathematics for one variable, driven by our step (law 2)."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

NAMES = ("adamw", "sgd")


class _Counted:
    """Takes the count of updates from the step; Keras's own counter needs Keras's own apply()."""

    count: tf.Tensor | int = 0

    @property
    def iterations(self) -> tf.Tensor | int:
        return self.count


class _Adam(_Counted, keras.optimizers.Adam):
    """Adam (arXiv 1412.6980); epsilon is added to sqrt(v) before bias correction, as in Keras."""


class _Sgd(_Counted, keras.optimizers.SGD):
    """SGD with momentum as optax, flax and PyTorch have it: m = mu m + g, w = w - lr m.

    Keras's keeps lr inside m, which is another algorithm once the learning rate changes.
    """

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor):
        if self.momentum:
            trace = self.momentums[self._get_variable_index(variable)]
            self.assign(trace, gradient + self.momentum * trace)
            gradient = trace.value
        self.assign_sub(variable, learning_rate * gradient)


class Optimizer:
    """A Keras optimiser, the variables it moves, and which of them decay.

    Attributes:
      slots: the optimiser's state by name, such as "encoderblock_0/norm_0/gamma/momentum".
    """

    def __init__(
        self,
        rule: Any,
        variables: dict[str, keras.Variable],
        *,
        weight_decay: float,
        decay_pattern: str,
    ):
        self.rule, self.variables = rule, variables
        self.weight_decay = weight_decay
        self.decayed = {name for name in variables if re.search(decay_pattern, name)}
        rule.build(list(variables.values()))
        names = {v.path.replace("/", "_"): name for name, v in variables.items()}
        self.slots = {}
        for slot in rule.variables:
            reference, _, kind = slot.name.rpartition("_")
            if reference in names:  # not Keras's own "iteration" and "learning_rate"
                self.slots[f"{names[reference]}/{kind}"] = slot

    def apply(
        self,
        gradients: Sequence[tf.Tensor],
        *,
        learning_rate: tf.Tensor,
        count: tf.Tensor,
        gate: tf.Tensor,
    ) -> None:
        """Moves the variables of this replica by one update.

        Args:
          gradients: one per variable, summed over replicas and clipped; float32.
          learning_rate: scalar float32.
          count: scalar int64, updates done before this one.
          gate: scalar bool; where false, variables and slots keep their values. A select after the
            update rather than a conditional around it: XLA fuses it into the update's own loop.
        """
        self.rule.count = count
        state = [*self.variables.values(), *self.slots.values()]
        before = [tf.convert_to_tensor(v.value) for v in state]
        for (name, variable), gradient in zip(self.variables.items(), gradients, strict=True):
            if self.weight_decay and name in self.decayed:
                decay = self.weight_decay * learning_rate
                variable.value.assign_sub(decay * tf.convert_to_tensor(variable.value))
            self.rule.update_step(gradient, variable, learning_rate)
        for variable, old in zip(state, before, strict=True):
            variable.value.assign(tf.where(gate, tf.convert_to_tensor(variable.value), old))
        self.rule.count = 0  # keep no tensor of a graph that is being traced


def check_optimizer(
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    decay_pattern: str = "kernel$",
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    momentum: float = 0.9,
) -> None:
    """Raises ValueError for arguments of make_optimizer out of range; touches no device."""
    if name not in NAMES:
        raise ValueError(f"optimizer {name!r} is unknown; allowed: {', '.join(NAMES)}")
    try:
        re.compile(decay_pattern)
    except re.error as error:
        raise ValueError(
            f"optimizer.decay_pattern {decay_pattern!r} is no regex: {error}"
        ) from None
    limits = {"beta_1": beta_1, "beta_2": beta_2, "momentum": momentum}
    for key, value in limits.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{key} must be in [0, 1), got {value}")
    for key, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if value < 0:
            raise ValueError(f"optimizer.{key} must not be negative, got {value}")
    if epsilon <= 0:
        raise ValueError(f"optimizer.epsilon must be above 0, got {epsilon}")


def make_optimizer(
    variables: dict[str, keras.Variable],
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    decay_pattern: str = "kernel$",
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    momentum: float = 0.9,
) -> Optimizer:
    """Makes an optimiser for the named variables; call it under the strategy's scope.

    Args:
      variables: name -> variable, those that train.
      name: "adamw" (arXiv 1711.05101) or "sgd" with momentum.
      learning_rate: the schedule's peak; given here so that the section of the config is whole.
      weight_decay: decoupled: w -= lr * weight_decay * w. big_vision's 1e-4 at lr 1e-3, which it
        does not multiply by the peak, is 0.1 here.
      decay_pattern: regex searched in the names; the variables that match decay.
      beta_1, beta_2, epsilon: Adam's.
      momentum: SGD's; 0 for plain SGD.

    Raises:
      ValueError: unknown name or a number out of range.
    """
    check_optimizer(
        name=name,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decay_pattern=decay_pattern,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        momentum=momentum,
    )
    rule: Any
    if name == "adamw":
        rule = _Adam(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, name="adam")
    else:
        rule = _Sgd(learning_rate, momentum=momentum, name="sgd")
    return Optimizer(rule, variables, weight_decay=weight_decay, decay_pattern=decay_pattern)
