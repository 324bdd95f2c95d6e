"""Optimisers: rules that move one variable, as Keras has them, driven by our step (law 2)."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

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

# Each with what its None's stand for: the values of its paper.
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
    """A rule, the variables that it moves, and how fast each learns and decays.

    Attributes:
      variables: those that train, by name; frozen ones are not among them and have no slots.
      rates: name -> what its learning rate is multiplied by.
      decays: name -> d in w -= rate * d * w, for those that decay.
      slots: the optimiser's state by name, such as "encoderblock_0/norm_0/gamma/momentum"; a
        Remote for those on other hosts.
      shards: which replica has which slots; None: each replica has all.
    """

    def __init__(
        self,
        rule: Any,
        variables: dict[str, keras.Variable],
        *,
        rates: dict[str, float],
        decays: dict[str, float],
        strategy: tf.distribute.Strategy | None = None,
    ):
        self.rule, self.rates, self.decays = rule, rates, decays
        self.variables = {name: v for name, v in variables.items() if rates[name]}
        self.decayed = set(decays)
        if isinstance(rule, update_rules.Lamb):  # its update includes the decay
            rule.decays = {id(variables[name]): decay for name, decay in decays.items()}
            self.decays = {}
        shapes = {name: tuple(v.shape) for name, v in self.variables.items()}
        self.shards = None if strategy is None else Shards(strategy, shapes)
        self._names = {id(v): name for name, v in self.variables.items()}
        self.slots: dict[str, keras.Variable | Remote] = {}
        self._slots_of: dict[str, list[keras.Variable]] = {name: [] for name in self.variables}
        rule.place = self._place
        rule.build(list(self.variables.values()))

    def _place(
        self, variable: keras.Variable, kind: str, like: Remote, make: Callable[[], keras.Variable]
    ) -> keras.Variable | Remote:
        """Makes a slot where it belongs; `like` says what it is like."""
        name = self._names[id(variable)]
        device = None if self.shards is None else self.shards.device(name)
        if self.shards is not None and device is None:
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
        """Moves the variables of this replica by one update.

        Args:
          gradients: one per variable, summed over replicas and clipped; float32.
          learning_rate: scalar float32.
          count: scalar int64, updates done before this one.
          gate: scalar bool; where false, variables and slots keep their values. A select after the
            update rather than a conditional around it: XLA fuses it into the update's own loop.
          replica: with `shards` the number of this one, which moves its own slots alone.

        Returns:
          None; with `shards` the new weights of the replica's own variables, packed, which `take`
          wants from all replicas. No variable of the model has moved yet then.
        """
        if self.shards is None or replica is None:
            for _, values in self._updated(self.variables, gradients, learning_rate, count, gate):
                for variable, new in values:
                    variable.value.assign(new)
            return None
        weights = {}
        own = self.shards.names(replica)
        for name, values in self._updated(own, gradients, learning_rate, count, gate):
            (_, weights[name]), *slots = values
            for slot, new in slots:
                slot.value.assign(new)
        return self.shards.pack({name: weights[name] for name in own})

    def take(self, gathered: tf.Tensor) -> None:
        """Gives this replica's variables the weights that the replicas packed, in their order."""
        if self.shards is None:
            raise ValueError("nothing is sharded: apply has moved the variables")
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
        """Each variable's name, and what it and its slots are to become."""
        self.rule.begin(count)
        for (name, variable), gradient in zip(self.variables.items(), gradients, strict=True):
            if name not in names:
                continue
            rate = learning_rate if self.rates[name] == 1 else learning_rate * self.rates[name]
            # Functional: what the rule assigns stays in the scope, and each variable is assigned
            # once, after the gate: the step has a quarter fewer operations to compile.
            owned = [variable, *self._slots_of[name]]
            before = [(v, tf.convert_to_tensor(v.value)) for v in owned]
            with keras.StatelessScope(state_mapping=before) as scope:
                self.rule.update_step(gradient, variable, rate)
                if name in self.decays:
                    decay = rate * self.rule.scalar(self.decays[name])
                    variable.assign_sub(decay * before[0][1])
            values = [(v, tf.where(gate, scope.get_current_value(v), old)) for v, old in before]
            yield name, values
        self.rule.begin(0)  # keep no tensor of a graph that is being traced


def check_optimizer(**options: Any) -> None:
    """Raises ValueError for arguments of make_optimizer out of range; touches no device."""
    bound = inspect.signature(make_optimizer).bind({}, **options)
    bound.apply_defaults()
    given = bound.arguments
    allowed = {"name": NAMES, "decay_scale": DECAY_SCALES, "momentum_dtype": MOMENTUM_DTYPES}
    for key, names in allowed.items():
        if given[key] not in names:
            what = "optimizer" if key == "name" else f"optimizer.{key}"
            raise ValueError(f"{what} {given[key]!r} is unknown; allowed: {', '.join(names)}")
    if given["name"] == "muon" and not update_rules.HAS_MUON:
        raise ValueError(
            f"optimizer 'muon' needs a newer Keras than the {keras.__version__} here: "
            "pip install --upgrade keras (3.13 or later wants Python 3.11)"
        )
    for key in ("decay_multipliers", "lr_multipliers"):
        check_rules(key, given[key])
    for key in ("beta_1", "beta_2", "momentum"):
        if given[key] is not None and not 0 <= given[key] < 1:
            raise ValueError(f"optimizer.{key} must be in [0, 1), got {given[key]}")
    for key in ("learning_rate", "weight_decay"):
        if given[key] < 0:
            raise ValueError(f"optimizer.{key} must not be negative, got {given[key]}")
    if given["epsilon"] is not None and given["epsilon"] <= 0:
        raise ValueError(f"optimizer.epsilon must be above 0, got {given['epsilon']}")
    if given["layer_decay"] is not None and not 0 < given["layer_decay"] <= 1:
        raise ValueError(
            f"optimizer.layer_decay must be in (0, 1], or None, got {given['layer_decay']}"
        )
    if given["decay_scale"] == "schedule" and not given["learning_rate"]:
        raise ValueError("optimizer.decay_scale 'schedule' needs a learning_rate above 0")


def make_optimizer(
    variables: dict[str, keras.Variable],
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    decay_scale: str = "learning_rate",
    decay_multipliers: Rules = (("kernel$", 1.0),),
    lr_multipliers: Rules = (),
    layer_decay: float | None = None,
    momentum_dtype: str = "float32",
    beta_1: float = 0.9,
    beta_2: float | None = None,
    epsilon: float | None = None,
    momentum: float | None = None,
    shard_state: bool = False,
    strategy: tf.distribute.Strategy | None = None,
    num_heads: int | None = None,
) -> Optimizer:
    """Makes an optimiser for the named variables; call it under the strategy's scope.

    Args:
      variables: name -> variable; all of the model's.
      name: one of NAMES; update_rules has the formulas and where they are from.
      learning_rate: the schedule's peak.
      weight_decay: d in w -= rate * d * w, decoupled (arXiv 1711.05101).
      decay_scale: what decay is multiplied by: "learning_rate", the variable's current one, as in
        PyTorch, or "schedule", the current over the peak, as in big_vision and the paper.
      decay_multipliers: (regex, factor) pairs; the first found in a name counts, else 0.
      lr_multipliers: the same for learning rates, else 1; 0 freezes the variable.
      layer_decay: of learning rates from the head down; see rules.rate_multipliers.
      momentum_dtype: in which first moments are stored, "float32" or "bfloat16".
      beta_1, beta_2, epsilon, momentum: of the rules that have them; None for the paper's.
      shard_state: each replica holds the slots of a part of the variables only (sharding.py); call
        it outside of the strategy's scope then, which would make every slot on every replica.
      strategy: of the replicas, for shard_state.
      num_heads: of the model's attention, for adafactor_vit, which factors each head for itself.

    Raises:
      ValueError: unknown name, a number out of range, a pattern that matches no variable,
        shard_state under a scope, without a strategy, or on TPUs, or adafactor_vit without
        num_heads for a model with attention.
    """
    given = {k: v for k, v in locals().items() if k not in ("variables", "strategy", "num_heads")}
    check_optimizer(**given)
    used = decay_multipliers if weight_decay else ()
    check_names(variables, decay_multipliers=used, lr_multipliers=lr_multipliers)
    rates = rate_multipliers(variables, lr_multipliers=lr_multipliers, layer_decay=layer_decay)
    peak = learning_rate if decay_scale == "schedule" else None
    decays = _decays(rates, weight_decay, decay_multipliers, peak)
    own = {k: v if given[k] is None else given[k] for k, v in NAMES[name].items()}
    rule = _make_rule(name, float(learning_rate), {"beta_1": beta_1, **own})
    rule.momentum_dtype = momentum_dtype
    if name == "adafactor_vit":
        rule.views = _views(variables, num_heads)
    if shard_state and (strategy is None or tf.distribute.has_strategy()):
        raise ValueError("shard_state needs the strategy, and no scope of it around make_optimizer")
    shared = strategy if shard_state else None
    return Optimizer(rule, variables, rates=rates, decays=decays, strategy=shared)


def _decays(
    rates: dict[str, float], weight_decay: float, rules: Rules, peak: float | None
) -> dict[str, float]:
    """By name what decays how fast; `peak`: the learning rate's, where decay goes by schedule."""
    decays = {}
    for name, rate in rates.items():
        factor = weight_decay * multiplier(rules, name, 0.0)
        if rate and factor:
            decays[name] = factor if peak is None else factor / (peak * rate)
    return decays


def _views(
    variables: dict[str, keras.Variable], num_heads: int | None
) -> dict[int, tuple[int, ...]]:
    """By id the shapes, heads apart, of attention's variables."""
    found = {}
    for name, variable in variables.items():
        shape = tuple(variable.shape)
        if split_heads(name, shape, 1) != shape:
            if num_heads is None:
                raise ValueError(f"adafactor_vit needs num_heads, to factor {name} by heads")
            found[id(variable)] = split_heads(name, shape, num_heads)
    return found


def _make_rule(name: str, rate: float, own: dict[str, float]) -> Any:
    beta_1 = own.pop("beta_1")
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
            adam_beta_1=beta_1,
            adam_beta_2=own["beta_2"],
            epsilon=own["epsilon"],
            momentum=own["momentum"],
            exclude_layers=["(^|/)head/"],
            name=name,
        )
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
