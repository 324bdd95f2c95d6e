"""The .npz files of vision_transformer and big_vision.

The files differ in prefix (none, params/, opt/target/, params/img/), in how the layers of a block
are numbered, in where the positions are, and in whether blocks are stacked (flax's nn.scan).
`canonical` brings all to big_vision's names, which the table maps. GELU is tanh's, flax's default;
LayerNorm's epsilon is 1e-6; images are scaled to [-1, 1].
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.model.formats.mapping import HEADS_BIAS, HEADS_IN, HEADS_OUT, Rule, Transform, stacked
from vit_dist.model.formats.tensors import LazyArray


def _dense(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/{name}", (f"{ours}/{name}",)) for name in ("kernel", "bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}/scale", (f"{ours}/gamma",)),
        Rule(f"{theirs}/bias", (f"{ours}/beta",)),
    ]


def _attention(theirs: str, ours: str) -> list[Rule]:
    # Kernels into the heads and out of them have three axes in flax, with the heads as one.
    kernels: dict[str, Transform] = dict.fromkeys(("query", "key", "value"), HEADS_OUT)
    rules = []
    for name, transform in kernels.items():
        rules.append(Rule(f"{theirs}/{name}/kernel", (f"{ours}/{name}/kernel",), transform))
        rules.append(Rule(f"{theirs}/{name}/bias", (f"{ours}/{name}/bias",), HEADS_BIAS))
    rules.append(Rule(f"{theirs}/out/kernel", (f"{ours}/out/kernel",), HEADS_IN))
    rules.append(Rule(f"{theirs}/out/bias", (f"{ours}/out/bias",)))
    return rules


_BLOCK, _OURS = "Transformer/encoderblock_{i}", "encoderblock_{i}"
RULES: list[Rule] = [
    *_dense("embedding", "embedding"),
    Rule("cls", ("cls",)),
    Rule("pos_embedding", ("pos_embedding",)),
    *_norm(f"{_BLOCK}/LayerNorm_0", f"{_OURS}/norm_0"),
    *_attention(f"{_BLOCK}/MultiHeadDotProductAttention_0", f"{_OURS}/attention"),
    *_norm(f"{_BLOCK}/LayerNorm_1", f"{_OURS}/norm_1"),
    *_dense(f"{_BLOCK}/MlpBlock_0/Dense_0", f"{_OURS}/mlp/dense_0"),
    *_dense(f"{_BLOCK}/MlpBlock_0/Dense_1", f"{_OURS}/mlp/dense_1"),
    *_norm("Transformer/encoder_norm", "encoder_norm"),
    Rule("MAPHead_0/probe", ("map_head/probe",)),
    *_attention("MAPHead_0/MultiHeadDotProductAttention_0", "map_head/attention"),
    *_norm("MAPHead_0/LayerNorm_0", "map_head/norm"),
    *_dense("MAPHead_0/MlpBlock_0/Dense_0", "map_head/mlp/dense_0"),
    *_dense("MAPHead_0/MlpBlock_0/Dense_1", "map_head/mlp/dense_1"),
    *_dense("pre_logits", "pre_logits"),
    *_dense("head", "head"),
]
_PREFIXES = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/", "")
_POSITIONS = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding")
# Before flax's Linen API, the layers of a block were numbered in one sequence; since then each kind
# of layer counts from 0. Name in an old file -> name in a later one.
_OLD_NUMBERS = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
# Attention pooling in files that have its layers at the top level, without MAPHead_0 before them.
_INLINED_MAP = re.compile(r"(probe$|MlpBlock_0/|MultiHeadDotProductAttention_0/|LayerNorm_0/)")
# Regex of names -> what these parts are: of a training state, or of a model with two towers.
OTHER_PARTS = (
    (r"(params/|opt/target/)?txt(/|$)", "the text tower"),
    (r"(params/|opt/target/)?[tb](/|$)", "temperature and bias of the loss on pairs"),
    (r"(opt|states?|step)(/|$)", "the state of the optimizer"),
)


_COMPUTED = "positions computed as big_vision's sincos2d, as the file has no table of them"


def detect(names: Any) -> bool:
    """Whether these names are those of a ViT in vision_transformer or big_vision."""
    return any(f"{prefix}embedding/kernel" in names for prefix in _PREFIXES)


def canonical(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors under big_vision's names, blocks apart; what is not the ViT's keeps its name.

    Raises:
      DataError: two tensors have the same name then.
    """
    # The prefix under which the patch embedding lies is that of the image tower.
    prefix = next(p for p in _PREFIXES if f"{p}embedding/kernel" in tensors)
    found: dict[str, LazyArray] = {}
    for original, tensor in tensors.items():
        name = original
        if name.startswith(prefix):
            name = _canonical_name(name.removeprefix(prefix))
        parts = {name: tensor}
        # One tensor holds this layer of all blocks: its leading axis counts them. A scalar is no
        # layer of blocks: under its own name it is reported as unknown.
        if name.startswith("Transformer/encoderblock/") and tensor.shape[:1] not in ((), (0,)):
            numbered = [name.replace("block/", f"block_{i}/", 1) for i in range(tensor.shape[0])]
            parts = {part: stacked(tensor, i) for i, part in enumerate(numbered)}
        for part, values in parts.items():
            # The position embedding of an old and of a new file, for instance: one would silently
            # replace the other.
            if part in found:
                raise DataError(
                    f"the file holds two tensors for {part}, one of them {original}: it is no ViT's"
                )
            found[part] = values
    return found


def _canonical_name(name: str) -> str:
    if name in _POSITIONS:
        return "pos_embedding"
    if _INLINED_MAP.match(name):
        return f"MAPHead_0/{name}"
    return "/".join(_OLD_NUMBERS.get(part, part) for part in name.split("/"))


def is_other_part(name: str, names: Any) -> bool:
    """Whether to leave out a tensor although our ViT has a place for it: never in these files."""
    return False


def describe(
    tensors: Mapping[str, LazyArray], original: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """Keys of ViT that such a file tells beyond its shapes, None if unknown; what is assumed.

    Args:
      tensors: under canonical names.
      original: the file's own names.
    """
    # flax keeps the heads as an axis: the kernel is (D, H, K).
    query = tensors.get("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel")
    has_map = "MAPHead_0/probe" in tensors
    # A file of big_vision's, all under params/, may have no table: it computes positions then.
    # vision_transformer's networks have one, and what lacks it is another network.
    lacking = "pos_embedding" not in tensors
    computed = lacking and any(name.startswith("params/") for name in original)
    said = {
        "gelu": "tanh",
        "norm_epsilon": 1e-6,
        "norm_after_pool": False,
        "num_heads": query.shape[1] if query is not None and len(query.shape) == 3 else None,
        "posemb": "sincos2d" if computed else None if lacking else "learned",
        "pool": "map" if has_map else "tok" if "cls" in tensors else "gap",
    }
    return said, [_COMPUTED] if computed else []


def refuse(network: Mapping[str, Any], style: str) -> list[str]:
    """What of our network cannot be written: the systems that read these files do not have it.

    Args:
      network: of ViT.get_config().
      style: "npz" for vision_transformer, or "big_vision".
    """
    reasons = []
    if network["gelu"] != "tanh":
        reasons.append("GELU is tanh's there")
    if abs(network["norm_epsilon"] - 1e-6) > 1e-7:
        reasons.append("LayerNorm's epsilon is 1e-6 there")
    if not network["qkv_bias"] or network["norm_after_pool"]:
        reasons.append("queries have biases and the last LayerNorm stands before the pooling there")
    if network["layer_scale"] is not None or network["registers"]:
        reasons.append("there is neither LayerScale nor registers there")
    # Where the pooling reads no cls token, these systems have none.
    if network["cls_token"] != (network["pool"] == "tok") or network["pool"] == "tok_gap":
        reasons.append("a cls token goes with pool 'tok' alone there")
    if network["pool"] == "map" and style == "npz":
        reasons.append("only big_vision has attention pooling")
    return reasons


def layout(written: Mapping[str, np.ndarray], style: str) -> dict[str, np.ndarray]:
    """Canonical names to a file's: "npz" (vision_transformer, as published) or "big_vision"."""
    if style == "big_vision":
        return {f"params/{name}": array for name, array in written.items()}
    # Published .npz files have the old numbers, and the positions under posembed_input.
    new_numbers = {new: old for old, new in _OLD_NUMBERS.items()}
    found = {}
    for name, array in written.items():
        parts = name.split("/")
        if name.startswith("Transformer/encoderblock_"):
            parts = [new_numbers.get(part, part) for part in parts]
        found[_POSITIONS[0] if name == "pos_embedding" else "/".join(parts)] = array
    return found
