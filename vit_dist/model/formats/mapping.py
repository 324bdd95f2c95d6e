"""Rules between another system's tensors and ours: one table for reading and for writing.

In a rule `theirs` is the name of a tensor in the other system's file and `ours` those of the
variables of our ViT that it holds; {i} in a name stands for the number of a block. A transform only
moves numbers (transposes, reshapes, joins), so that what is written and read again has the same
bits.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.model.formats.tensors import LazyArray

Arrays = Mapping[str, np.ndarray | LazyArray]


class Transform(NamedTuple):
    """How a tensor of the other system becomes one or more of ours, and back.

    Attributes:
      split: the other system's array -> our arrays, in the order of the rule's names.
      join: our arrays, number of heads H -> the other system's array.
    """

    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], int], np.ndarray]


def _fused(count: int) -> Transform:
    """`count` matrices or biases in one, as timm's qkv: (count D, D) <-> count of (D, D).

    PyTorch keeps a Linear's matrix as (out, in), so the parts are stacked along the rows and each
    is the transpose of ours. A bias, (count D,) <-> count of (D,), is its own transpose.
    """
    return Transform(
        lambda a: [part.T for part in np.split(a, count)],
        lambda parts, heads: np.concatenate([part.T for part in parts]),
    )


# Shapes, the other system's <-> ours: D width, H heads, K = D / H, C channels, (p, q) a patch.
# Each pair is (split, join), two functions that undo each other; `heads` is H.
SAME = Transform(lambda a: [a], lambda parts, heads: parts[0])
LINEAR = Transform(lambda a: [a.T], lambda parts, heads: parts[0].T)  # (out, in) <-> (in, out)
CONV = Transform(  # (D, C, p, q) <-> (p, q, C, D)
    lambda a: [a.transpose(2, 3, 1, 0)], lambda parts, heads: parts[0].transpose(3, 2, 0, 1)
)
QKV, KV = _fused(3), _fused(2)
HEADS_OUT = Transform(  # flax: (D, H, K) <-> (D, D)
    lambda a: [a.reshape(a.shape[0], -1)],
    lambda parts, heads: parts[0].reshape(parts[0].shape[0], heads, -1),
)
HEADS_BIAS = Transform(  # flax: (H, K) <-> (D,)
    lambda a: [a.reshape(-1)], lambda parts, heads: parts[0].reshape(heads, -1)
)
HEADS_IN = Transform(  # flax: (H, K, D) <-> (D, D)
    lambda a: [a.reshape(-1, a.shape[-1])],
    lambda parts, heads: parts[0].reshape(heads, -1, parts[0].shape[-1]),
)


class Rule(NamedTuple):
    """A tensor of the other system, the variables of ours that it holds, and how."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform = SAME


def pair(theirs: str, ours: str, kernel: Transform = LINEAR, bias: Transform = SAME) -> list[Rule]:
    """The two rules of a layer with weight and bias, as PyTorch names them."""
    return [
        Rule(f"{theirs}.weight", (f"{ours}/kernel",), kernel),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), bias),
    ]


def norm(theirs: str, ours: str) -> list[Rule]:
    """The two rules of a LayerNorm, as PyTorch names them."""
    return [Rule(f"{theirs}.weight", (f"{ours}/gamma",)), Rule(f"{theirs}.bias", (f"{ours}/beta",))]


@dataclasses.dataclass
class Converted:
    """Tensors under our names, and the names in the file that no rule took."""

    tensors: dict[str, LazyArray]
    rest: list[str]


def from_theirs(tensors: Mapping[str, LazyArray], rules: Sequence[Rule]) -> Converted:
    """Applies the rules from the other system to ours; only names and shapes are looked at.

    Args:
      tensors: by the other system's names.
      rules: its table.

    Raises:
      DataError: a tensor whose shape cannot be what its name says.
    """
    found: dict[str, LazyArray] = {}
    used = set()
    for rule, block in _expand(rules, lambda name: name in tensors, "theirs"):
        theirs = rule.theirs.format(i=block)
        # Names that no rule takes are the caller's to judge.
        used.add(theirs)
        for k, name in enumerate(rule.ours):
            found[name.format(i=block)] = _lazy(theirs, tensors[theirs], rule.transform, k)
    return Converted(found, [name for name in tensors if name not in used])


def to_theirs(arrays: Arrays, rules: Sequence[Rule], *, num_heads: int) -> dict[str, np.ndarray]:
    """Applies the rules from ours to the other system's; reads all arrays.

    Args:
      arrays: by our names.
      rules: the other system's table.
      num_heads: H, which some systems have as an axis.

    Raises:
      DataError: a tensor of ours that the other system has no place for.
    """
    written: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for rule, block in _expand(rules, lambda name: name in arrays, "ours"):
        names = [name.format(i=block) for name in rule.ours]
        if used.issuperset(names):
            # One table may list several names for the same variables, as of ViT and DINOv2 in
            # transformers: the first is written.
            continue
        parts = [np.asarray(arrays[name]) for name in names]
        theirs = rule.transform.join(parts, num_heads)
        # A transpose is a view; files need its numbers in order. ascontiguousarray makes a scalar
        # an array of one number, so the shape is set again.
        written[rule.theirs.format(i=block)] = np.ascontiguousarray(theirs).reshape(theirs.shape)
        used.update(names)
    # A variable that is not written would be missing in the file without a word.
    rest = sorted(set(arrays) - used)
    if rest:
        raise DataError(f"the format has no place for {', '.join(rest[:5])}")
    return written


def _expand(rules: Sequence[Rule], has: Callable[[str], bool], side: str):
    """(rule, number of a block) for each rule whose tensors on one side are there.

    Args:
      rules: with {i} in their names, for as many blocks as there are; 0 for rules without.
      has: whether a name is there.
      side: "theirs" or "ours", whose names `has` knows.
    """
    for rule in rules:
        names = (rule.theirs,) if side == "theirs" else rule.ours
        block = 0
        # Blocks are numbered from 0 without gaps: the first that is missing ends the search.
        while all(has(name.format(i=block)) for name in names):
            yield rule, block
            block += 1
            if "{i}" not in rule.theirs:
                break


def _lazy(name: str, tensor: LazyArray, transform: Transform, index: int) -> LazyArray:
    """Part `index` of what the transform makes of a tensor, its shape now, its numbers later."""
    if not tensor.floating:
        raise DataError(
            f"{name} holds integers, as in a quantised file, whose numbers mean something only "
            "together with their scales: save it as float32, float16 or bfloat16"
        )
    try:
        # To learn the shape without reading: the transform of a view of one number that is as large
        # as the tensor and takes no memory.
        parts = transform.split(np.broadcast_to(np.float32(0), tensor.shape))
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{name} has the odd shape {tensor.shape} ({error}): another network's"
        ) from None
    return LazyArray(
        tuple(parts[index].shape),
        lambda: transform.split(np.asarray(tensor))[index],
        tensor.source or name,
    )


def stacked(tensor: LazyArray, block: int) -> LazyArray:
    """The tensor of one block, of one with a leading axis for all of them (flax's nn.scan)."""
    shape = tensor.shape[1:]
    return LazyArray(shape, lambda: np.asarray(tensor)[block], tensor.source, tensor.floating)


def depth_of(names: Any) -> int:
    """Number of blocks among names of ours."""
    prefix = "encoderblock_"
    # Without any block the largest number is -1, and the depth 0.
    blocks = [n.split("/")[0].removeprefix(prefix) for n in names if n.startswith(prefix)]
    return 1 + max(map(int, blocks), default=-1)
