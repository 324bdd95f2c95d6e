"""Optimizers: rules that update one variable, as Keras has them, driven by our step (law 2)."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.training import update_rules
from vit_dist.training.multipliers import (
    Rules,
    check_names,
    check_rules,
    multiplier,
    rate_multipliers,
    split_heads,
)
from vit_dist.training.sharding import Remote, Shards

# Name of a rule -> the options that it has and what a None there stands for, the value of the
# rule's paper. A key that is missing here is an option that the rule does not have.
NAMES: dict[str, dict[str, float]] = {
    "adamw": {"beta_2": 0.999, "epsilon": 1e-8},
    "sgd": {"momentum": 0.9},
    "lamb": {"beta_2": 0.999, "epsilon": 1e-6},
    "lion": {"beta_2": 0.99},
    "adafactor": {"epsilon": 1e-30},
    "adafactor_vit": {"beta_2": 0.999, "epsilon": 1e-30},
    "muon": {"beta_2": 0.999, "epsilon": 1e-7, "momentum": 0.95},
}
DECAY_SCALES = ("learning_rate", "schedule")
MOMENTUM_DTYPES = ("float32", "bfloat16")


class Optimizer:
    """A rule, the variables that it updates, and how fast each learns and decays.

    Attributes:
      variables: name -> variable, for the variables that train; frozen ones have no slots.
      rates: name -> what the variable's learning rate is multiplied by; 0 for frozen ones.
      decays: name -> d in w -= rate * d * w, for the variables that decay.
      slots: the optimizer's state by name, such as "encoderblock_0/norm_0/gamma/momentum"; a
        Remote stands for a slot on another host, or one that is only counted.
      shards: which replica has which slots; None: each replica has all slots.
    """

    def __init__(
        self,
        rule: Any,
        variables: dict[str, keras.Variable],
        *,
        rates: dict[str, float],
        decays: dict[str, float],
        strategy: tf.distribute.Strategy | None = None,
        shapes_only: bool = False,
    ):
        self.rule, self.rates, self.decays = rule, rates, decays
        self.variables = {name: v for name, v in variables.items() if rates[name]}
        self.decayed = set(decays)
        # LAMB's trust ratio is computed from the update with its decay, so the rule applies the
        # decay itself, and `apply` must not do it a second time.
        if isinstance(rule, update_rules.Lamb):
            rule.decays = {id(variables[name]): decay for name, decay in decays.items()}
            self.decays = {}
        shapes = {name: tuple(v.shape) for name, v in self.variables.items()}
        self.shards = None if strategy is None else Shards(strategy, shapes)
        self._names = {id(v): name for name, v in self.variables.items()}
        self._shapes_only = shapes_only
        self.slots: dict[str, keras.Variable | Remote] = {}
        self._slots_of: dict[str, list[keras.Variable]] = {name: [] for name in self.variables}
        # Keras's build() makes one slot after the other, and _Rule passes each through make_slot:
        # there it gets a name for the checkpoint and, with shards, the device of its owner.
        rule.make_slot = self._make_slot
        rule.build(list(self.variables.values()))

    def _make_slot(
        self, variable: keras.Variable, kind: str, like: Remote, make: Callable[[], keras.Variable]
    ) -> keras.Variable | Remote:
        """Makes a slot on its owner's device; where none is made it keeps `like` instead.

        Args:
          variable: the variable that the slot belongs to.
          kind: such as "momentum"; the last part of the slot's name.
          like: shape and dtype of the slot.
          make: makes the slot on the current device.
        """
        name = self._names[id(variable)]
        device = None if self.shards is None else self.shards.device(name)
        if self._shapes_only or (self.shards is not None and device is None):
            self.slots[f"{name}/{kind}"] = like
            return like
        with tf.device(device) if device else contextlib.nullcontext():
            slot = make()
        self.slots[f"{name}/{kind}"] = slot
        self._slots_of[name].append(slot)
        return slot

    def apply(
        self,
        gradients: Sequence[tf.Tensor],
        *,
        learning_rate: tf.Tensor,
        count: tf.Tensor,
        gate: tf.Tensor,
        replica: int | None = None,
    ) -> tf.Tensor | None:
        """Updates the variables of this replica once.

        Args:
          gradients: one per variable, summed over replicas and clipped; float32.
          learning_rate: scalar float32.
          count: scalar int64, updates done before this one.
          gate: scalar bool; if false, variables and slots keep their values.
          replica: needed with `shards`: the number of this replica, which updates the variables
            that it owns and their slots.

        Returns:
          None; with `shards` the new weights of the variables that the replica owns, packed. The
          model itself changes when `take` is given the packs of all replicas.
        """
        if self.shards is None or replica is None:
            for _, values in self._updated(self.variables, gradients, learning_rate, count, gate):
                for variable, new in values:
                    variable.value.assign(new)
            return None
        # The slots change now; the weights only when all replicas' packs are there, so that no
        # replica computes with weights that others do not have yet.
        weights = {}
        own = self.shards.names(replica)
        for name, values in self._updated(own, gradients, learning_rate, count, gate):
            (_, weights[name]), *slots = values
            for slot, new in slots:
                slot.value.assign(new)
        return self.shards.pack({name: weights[name] for name in own})

    def take(self, gathered: tf.Tensor) -> None:
        """Writes the packs of all replicas, concatenated, into the variables of this replica."""
        if self.shards is None:
            raise ValueError("nothing is sharded: apply has updated the variables")
        for name, value in self.shards.unpack(gathered).items():
            self.variables[name].value.assign(value)

    def _updated(
        self,
        names: Any,
        gradients: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        count: tf.Tensor,
        gate: tf.Tensor,
    ) -> Iterator[tuple[str, list[tuple[keras.Variable, tf.Tensor]]]]:
        """Yields for each variable of `names` its name and (variable or slot, new value) pairs."""
        self.rule.begin(count)
        for (name, variable), gradient in zip(self.variables.items(), gradients, strict=True):
            if name not in names:
                continue
            rate = learning_rate if self.rates[name] == 1 else learning_rate * self.rates[name]
            # Keras's StatelessScope records what the rule assigns instead of assigning it. So each
            # variable is assigned once, behind the gate, rather than by the rule and again by the
            # gate: a quarter fewer operations to compile.
            owned = [variable, *self._slots_of[name]]
            # The values before the update: the rule starts from them, and a closed gate returns to
            # them.
            before = [(v, tf.convert_to_tensor(v.value)) for v in owned]
            with keras.StatelessScope(state_mapping=before) as scope:
                self.rule.update_step(gradient, variable, rate)
                # Decoupled decay (arXiv 1711.05101): it shrinks the weight from before the update.
                if name in self.decays:
                    decay = rate * self.rule.scalar(self.decays[name])
                    variable.assign_sub(decay * before[0][1])
            # A select after the update rather than a branch around it: XLA fuses a select into the
            # update's own loop.
            values = [(v, tf.where(gate, scope.get_current_value(v), old)) for v, old in before]
            yield name, values
        # The rule still holds tensors of the graph that is being traced here; another trace, or an
        # eager call, could not use them.
        self.rule.begin(0)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Rule and numbers of an optimizer; make_optimizer makes one for the variables of a model.

    Attributes:
      name: one of NAMES; update_rules.py has the formulas and their sources.
      learning_rate: the schedule's peak.
      weight_decay: d in w -= rate * d * w, decoupled (arXiv 1711.05101).
      decay_scale: `rate` in that formula: "learning_rate", the variable's current learning rate, as
        in PyTorch, or "schedule", schedule(step) / peak, as in big_vision and the paper.
      decay_multipliers: (regex, factor) pairs for weight_decay. The first regex found in a
        variable's name counts; a variable whose name none matches does not decay.
      lr_multipliers: (regex, factor) pairs for learning rates. A variable whose name none matches
        has factor 1; factor 0 freezes a variable.
      layer_decay: factor per block, from the head down; see multipliers.rate_multipliers.
      momentum_dtype: dtype in which first moments are stored, "float32" or "bfloat16".
      beta_1, beta_2, epsilon, momentum: numbers of the rules that have them; None stands for the
        value of the rule's paper, see NAMES.
      shard_state: ZeRO-1: each replica holds the slots of a part of the variables (sharding.py).

    Raises:
      ConfigError: unknown name, or a number out of range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_scale: str = "learning_rate"
    decay_multipliers: Rules = (("kernel$", 1.0),)
    lr_multipliers: Rules = ()
    layer_decay: float | None = None
    momentum_dtype: str = "float32"
    beta_1: float = 0.9
    beta_2: float | None = None
    epsilon: float | None = None
    momentum: float | None = None
    shard_state: bool = False

    def __post_init__(self) -> None:
        choices = {"name": NAMES, "decay_scale": DECAY_SCALES, "momentum_dtype": MOMENTUM_DTYPES}
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                what = "optimizer" if key == "name" else f"optimizer.{key}"
                raise ConfigError(f"{what} {value!r} is unknown; allowed: {', '.join(allowed)}")
        check_rules("decay_multipliers", self.decay_multipliers)
        check_rules("lr_multipliers", self.lr_multipliers)
        for key in ("beta_1", "beta_2", "momentum"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"optimizer.{key} must be in [0, 1), got {value}")
        if self.name == "lion" and self.beta_1 == 0:
            raise ConfigError("optimizer.beta_1 must be above 0 for lion, got 0")
        for key in ("learning_rate", "weight_decay"):
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                wrong = "must not be negative" if value < 0 else "must be a finite number"
                raise ConfigError(f"optimizer.{key} {wrong}, got {value}")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ConfigError(f"optimizer.epsilon must be above 0, got {self.epsilon}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"optimizer.layer_decay must be in (0, 1], or None, got {self.layer_decay}"
            )
        # _decays divides by the peak.
        if self.decay_scale == "schedule" and not self.learning_rate:
            raise ConfigError("optimizer.decay_scale 'schedule' needs a learning_rate above 0")


def make_optimizer(
    variables: dict[str, keras.Variable],
    options: OptimizerOptions | None = None,
    *,
    strategy: tf.distribute.Strategy | None = None,
    num_heads: int | None = None,
    shapes_only: bool = False,
) -> Optimizer:
    """Makes an optimizer for the named variables; call it under the strategy's scope.

    Args:
      variables: name -> variable; all of the model's.
      options: None for AdamW with the defaults of OptimizerOptions.
      strategy: needed with options.shard_state, for the replicas' devices. Call make_optimizer
        outside of the strategy's scope then: the scope would make every slot on every replica.
      num_heads: of the model's attention; adafactor_vit factors each head separately.
      shapes_only: makes no slots, only their names, shapes and dtypes, to count them.

    Raises:
      ConfigError: a pattern that matches no variable, shard_state under a scope, without a
        strategy, or on TPUs, or adafactor_vit without num_heads for a model with attention.
    """
    options = options or OptimizerOptions()
    # Without weight decay its patterns have no effect, so it is no mistake if they match nothing,
    # as the patterns of a recipe for another model.
    used = options.decay_multipliers if options.weight_decay else ()
    check_names(variables, decay_multipliers=used, lr_multipliers=options.lr_multipliers)
    rates = rate_multipliers(
        variables, lr_multipliers=options.lr_multipliers, layer_decay=options.layer_decay
    )
    peak = options.learning_rate if options.decay_scale == "schedule" else None
    decays = _decays(rates, options.weight_decay, options.decay_multipliers, peak)
    rule = _make_rule(options)
    # Both attributes are read when Optimizer builds the rule, which makes the slots.
    rule.momentum_dtype = options.momentum_dtype
    if options.name == "adafactor_vit":
        rule.views = _views(variables, num_heads)
    if options.shard_state and (strategy is None or tf.distribute.has_strategy()):
        raise ConfigError(
            "shard_state needs the strategy, and no scope of it around make_optimizer"
        )
    shared = strategy if options.shard_state else None
    return Optimizer(
        rule, variables, rates=rates, decays=decays, strategy=shared, shapes_only=shapes_only
    )


def _decays(
    rates: dict[str, float], weight_decay: float, rules: Rules, peak: float | None
) -> dict[str, float]:
    """Returns name -> decay coefficient; `peak` is given where decay_scale is "schedule"."""
    decays = {}
    for name, rate in rates.items():
        factor = weight_decay * multiplier(rules, name, 0.0)
        # Optimizer multiplies a decay by the variable's rate = schedule(step) * its multiplier. By
        # decay_scale "schedule" w loses d * schedule(step) / peak, whatever the multiplier: so the
        # peak and the multiplier are divided out here.
        if rate and factor:
            decays[name] = factor if peak is None else factor / (peak * rate)
    return decays


def _views(
    variables: dict[str, keras.Variable], num_heads: int | None
) -> dict[int, tuple[int, ...]]:
    """Returns id(variable) -> its shape with an axis for heads, for attention's variables."""
    found = {}
    for name, variable in variables.items():
        shape = tuple(variable.shape)
        # One head: the shape changes if and only if the variable has heads at all.
        if split_heads(name, shape, 1) != shape:
            if num_heads is None:
                raise ConfigError(f"adafactor_vit needs num_heads, to factor {name} by heads")
            found[id(variable)] = split_heads(name, shape, num_heads)
    return found


def _make_rule(options: OptimizerOptions) -> Any:
    """The update rule with its numbers; None in the options stands for the paper's number."""
    name, rate, beta_1 = options.name, float(options.learning_rate), options.beta_1
    own = {}
    for key, papers in NAMES[name].items():
        given = getattr(options, key)
        own[key] = papers if given is None else given
    if name in ("adamw", "lamb"):
        rule = update_rules.Adam if name == "adamw" else update_rules.Lamb
        return rule(rate, beta_1=beta_1, name=name, **own)
    if name == "sgd":
        return update_rules.Sgd(rate, name=name, **own)
    if name == "lion":
        return update_rules.Lion(rate, beta_1=beta_1, name=name, **own)
    if name == "muon":
        return update_rules.Muon(
            rate,
            # The names that start with "adam" are for the variables that Muon leaves to AdamW.
            adam_beta_1=beta_1,
            adam_beta_2=own["beta_2"],
            epsilon=own["epsilon"],
            momentum=own["momentum"],
            # Its authors train input and output layers with AdamW. Keras leaves out embeddings by
            # itself; the head it cannot know.
            exclude_layers=["(^|/)head/"],
            name=name,
        )
    # The paper and optax factor from 128 entries on and bound the update; big_vision factors from
    # 32 on and caps beta_2, and has neither the bound nor the scaling by the weights.
    plain = name == "adafactor"
    return update_rules.Adafactor(
        rate,
        momentum=0.0 if plain else beta_1,
        beta_2_cap=1.0 if plain else own["beta_2"],
        factor_from=128 if plain else 32,
        clip_threshold=1.0 if plain else None,
        parameter_scale=plain,
        epsilon=own["epsilon"],
        name=name,
    )
