"""Factors of the decay and the learning rate of each variable, by patterns in their names."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from vit_dist.config.errors import ConfigError

Rules = Sequence[tuple[str, float]]

# What the first block reads. A variable that is neither here nor in a block comes after the blocks.
_FIRST = re.compile(r"^(embedding/|cls$|registers$|pos_embedding$)")
_BLOCK = re.compile(r"^encoderblock_(\d+)/")
_TO_HEADS = re.compile(r"(^|/)attention/(query|key|value)/(kernel|bias)$")
_FROM_HEADS = re.compile(r"(^|/)attention/out/kernel$")


def check_rules(key: str, rules: Any) -> None:
    """Raises ConfigError where `rules` is no sequence of (regex, number of 0 or more)."""
    # A single wrong value, wrapped so that the loop below refuses it and shows it.
    if not isinstance(rules, tuple | list):
        rules = (rules,)
    for rule in rules:
        # True and False are ints to Python, and no factors.
        pair = isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)
        number = pair and isinstance(rule[1], int | float) and not isinstance(rule[1], bool)
        if not number or not rule[1] >= 0:
            raise ConfigError(
                f"optimizer.{key} must hold pairs of a regex and a number of 0 or more, such as "
                f"(('kernel$', 1.0),), got {rule!r}"
            )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ConfigError(f"optimizer.{key}: {rule[0]!r} is no regex: {error}") from None


def multiplier(rules: Rules, name: str, default: float) -> float:
    """The number of the first rule whose regex is found in `name`."""
    return next((float(value) for regex, value in rules if re.search(regex, name)), default)


def depth_of(name: str, num_blocks: int) -> int:
    """A variable's depth as BEiT counts layers (arXiv 2106.08254).

    0 for patch embedding, cls token and positions, i + 1 for block i (from 0), num_blocks + 1 for
    all that comes behind the blocks.
    """
    block = _BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return 0 if _FIRST.match(name) else num_blocks + 1


def split_heads(name: str, shape: Sequence[int], num_heads: int) -> tuple[int, ...]:
    """A variable's shape with attention's heads as an axis, as flax and big_vision store it.

    With H heads of width K, where our variables have H K in one axis: (D, H, K) for the kernels of
    query, key and value, (H, K) for their biases, (H, K, D) for the kernel of out. Every other
    variable keeps its own shape.
    """
    if _TO_HEADS.search(name):
        return (*shape[:-1], num_heads, shape[-1] // num_heads)
    if _FROM_HEADS.search(name):
        return (num_heads, shape[0] // num_heads, *shape[1:])
    return tuple(shape)


def rate_multipliers(
    names: Collection[str], *, lr_multipliers: Rules, layer_decay: float | None
) -> dict[str, float]:
    """What each variable's learning rate is multiplied by; 0 freezes the variable.

    Args:
      names: the names of the variables.
      lr_multipliers: (regex, factor) pairs; the first that matches counts, without a match 1.
      layer_decay: also multiplies by layer_decay ** (num_blocks + 1 - depth_of(name)); None for no
        such factor.
    """
    # The depth comes from the names, so that it is right for any model with such names.
    blocks = [_BLOCK.match(name) for name in names]
    num_blocks = 1 + max((int(b[1]) for b in blocks if b), default=-1)
    factors = {}
    for name in names:
        # Layers between this variable and the head, which has 0 of them and the full rate.
        below = num_blocks + 1 - depth_of(name, num_blocks)
        factors[name] = multiplier(lr_multipliers, name, 1.0) * (layer_decay or 1.0) ** below
    return factors


def check_names(
    names: Collection[str], *, decay_multipliers: Rules = (), lr_multipliers: Rules = ()
) -> None:
    """Raises ConfigError for a pattern that matches none of the names, or if all are frozen."""
    for key, rules in (
        ("decay_multipliers", decay_multipliers),
        ("lr_multipliers", lr_multipliers),
    ):
        for regex, _ in rules:
            # A pattern without a match is a typo, or written for another model: it would have no
            # effect without a word (law 9).
            if not any(re.search(regex, name) for name in names):
                shown = ", ".join(sorted(names)[:3])
                raise ConfigError(
                    f"optimizer.{key}: {regex!r} matches no variable of this model; there are "
                    f"{len(names)}, such as {shown}"
                )
    if not any(multiplier(lr_multipliers, name, 1.0) for name in names):
        raise ConfigError("optimizer.lr_multipliers freezes every variable: nothing would train")
