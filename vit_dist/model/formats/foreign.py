"""Why the tensors of a file are no plain ViT's: what the network has that ours has not.

The difference is looked for in tables, so that a message speaks of rotary positions or SwiGLU and
not of the first tensor whose shape does not fit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

_HYBRID = "a convolutional network before the patches (hybrid)"
_ROTARY = "rotary positions (RoPE: DINOv3, EVA-02 and others)"
_RELATIVE = "relative positions (BEiT, Swin, SAM)"
_SWIGLU = "SwiGLU in place of the MLP"
_BEFORE = "a LayerNorm before the blocks (CLIP)"
_PARALLEL = "attention and MLP side by side (parallel blocks)"
_TOWER = (
    "a vision tower as Hugging Face names it; the same weights are read as timm's "
    "vit_*_siglip_* or, of big_vision, from the .npz"
)
# Regex in the name of a tensor -> what the network has that ours has not. The first that is found
# counts, so special networks stand before parts that several networks share.
_BY_TENSOR = (
    (r"pre_layrnorm|embeddings\.class_embedding|\bclass_embedding$", f"{_BEFORE}, and other names"),
    (r"head\.probe|embeddings\.patch_embedding\.weight", f"SigLIP: {_TOWER}"),
    (r"detection_tokens|mid_position_embeddings", "detection tokens (YOLOS)"),
    (r"(^|[./])rope|\.freqs|periods$|storage_tokens|(^|\.)layer\.\d+\.attention\.[qkvo]_", _ROTARY),
    (r"relative_position|rel_pos", _RELATIVE),
    (r"patch_embed\.backbone|embeddings\.backbone|patch_embeddings\.backbone", _HYBRID),
    (r"conv_root|root_block|^stem\.|patch_embed\.conv|patch_embed\.proj\.\d", _HYBRID),
    (r"[qk]_norm\.|(query|key)_norm/", "normalised queries and keys (qk_norm)"),
    (r"attn\.norm\.|mlp\.norm\.", "LayerNorms inside of attention and MLP (BEiT-3, EVA-02)"),
    (r"\.attns\.\d|attn_out_proj|mlp_out_proj", _PARALLEL),
    (r"\.w12\.|weights_in\.|\.fc1_g\.|\.mlp\.w[123]\.|gate_proj", _SWIGLU),
    (r"norm_pre\.|ln_pre\.", _BEFORE),
    (r"[qv]_bias$|lambda_[12]$", "biases of queries and values, none of keys (BEiT, EVA)"),
    (r"(^|\.)head\.\d+\.", "a head of several layers, such as a BatchNorm in it (MAE's probes)"),
    (r"MlpBlock_\d+/Dense_2/", "a gated MLP"),
    (r"^layers\.\d+\.blocks|^stages\.", "stages of several widths (Swin and others)"),
)
# Tensors that every block has. Biases of query, key and value are checked apart, as a ViT may do
# without them.
_BLOCK = (
    *(f"{norm}/{part}" for norm in ("norm_0", "norm_1") for part in ("gamma", "beta")),
    *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    "attention/out/bias",
    *(f"mlp/dense_{i}/{part}" for i in (0, 1) for part in ("kernel", "bias")),
)
# Regex of a tensor of ours that the file lacks -> what that means.
_BY_MISSING = (
    (r"^embedding/bias$", f"a patch embedding without bias, as with {_BEFORE}"),
    (r"^encoder_norm/gamma$", "no LayerNorm behind the blocks"),
    (r"beta$", "norms without offsets (RMSNorm)"),
    (r"attention/(query|key|value)/bias$", "biases of some of query, key and value alone"),
    (r"bias$", "projections without biases"),
    (r"attention/", "another kind of attention"),
    (r"mlp/", "another kind of MLP"),
)


def explain_names(names: Iterable[str]) -> str | None:
    """What a network with tensors of these names has that ours has not; None if unknown."""
    names = list(names)  # it is searched once for each pattern
    for pattern, meaning in _BY_TENSOR:
        # One tensor is enough: no plain ViT has any of these names.
        if any(re.search(pattern, name) for name in names):
            return meaning
    return None


def explain_shapes(shapes: Mapping[str, Sequence[int]], *, depth: int, fixed: bool) -> str | None:
    """What is wrong with tensors under our names, whose shapes alone are looked at.

    Args:
      shapes: by our names (named_weights).
      depth: number of blocks found.
      fixed: whether the system computes positions where it has no table of them.
    """
    kernel = shapes.get("embedding/kernel", ())
    if len(kernel) != 4 or kernel[0] != kernel[1]:
        return f"a patch kernel of shape {tuple(kernel)}, not (p, p, channels, width)"
    if not depth:
        return "no transformer blocks where a ViT has them"
    # Only the first block's biases are looked at to learn whether there shall be any; then all
    # blocks must have all three.
    needed = ["embedding/bias", "encoder_norm/gamma", "encoder_norm/beta"]
    needed += [f"encoderblock_{i}/{name}" for i in range(depth) for name in _BLOCK]
    biases = [f"encoderblock_0/attention/{name}/bias" for name in ("query", "key", "value")]
    if any(name in shapes for name in biases):
        needed += biases
    # A ViT lacks none of these; which one is missing says what the network is instead.
    missing = [name for name in needed if name not in shapes]
    for pattern, meaning in _BY_MISSING:
        found = [name for name in missing if re.search(pattern, name)]
        if found:
            return f"{meaning}: it has no {found[0]}"
    for i in range(depth):
        first, second = (shapes[f"encoderblock_{i}/mlp/dense_{k}/kernel"] for k in (0, 1))
        # SwiGLU's first matrix makes two halves, of which one gates the other.
        if first[1] == 2 * second[0]:
            return f"{_SWIGLU}: its first matrix is twice as wide as the second is high"
        if first != (kernel[3], second[0]) or second[1] != kernel[3]:
            return f"blocks of other widths than its patches: {first} after {kernel}"
    table = shapes.get("pos_embedding")
    if table is not None and (len(table) != 3 or table[0] != 1 or table[2] != kernel[3]):
        return f"a table of positions of shape {tuple(table)}, not (1, tokens, {kernel[3]})"
    if table is None and not fixed:
        return f"no table of positions, so it has {_ROTARY} or computes them in another way"
    return None
