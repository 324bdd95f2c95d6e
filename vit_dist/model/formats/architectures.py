"""What the name of a network in timm says of it and no tensor does.

The tensors of vit_base_patch16_224 and vit_base_patch16_rpn_224 have the same names and shapes, but
the second network normalises behind attention and MLP. So the name, from the config.json beside the
weights or from a training script's options, is read word by word. A network is taken only if every
word is known to change nothing, or changes something that our ViT has too (as of timm 1.0.20).
"""

import re
from collections.abc import Sequence
from typing import Any

from vit_dist.config.errors import DataError

_ROTARY = "rotary positions (RoPE)"
_RELATIVE = "relative positions"
_HYBRID = "a convolutional network before the patches (hybrid)"
_PARALLEL = "attention and MLP side by side (parallel blocks)"
# Regex of a word between underscores -> what it means that our ViT does not compute.
_FOREIGN_WORDS = (
    (r"rope|mixed|ape|dinov3|eva02|pe|qkvb|core|lang|spatial|axial", _ROTARY),
    (r"beit|beitv2|relpos|srelpos|samvit|swin\w*", _RELATIVE),
    (r"beit3", "LayerNorms inside of attention and MLP"),
    (r"r\d*|s\d+|p\d+|resnet\w+|mci|resnetv2|hybrid", _HYBRID),
    (r"clip|quickgelu", "a LayerNorm before the blocks, and epsilon 1e-5 (CLIP)"),
    (r"rpn", "LayerNorms behind attention and MLP (post-norm)"),
    (r"xp|pwee|18x2|dpwee", _PARALLEL),
    (r"aimv2", "RMSNorm and SwiGLU"),
    (r"intern300m", "no LayerNorm behind the blocks"),
    (r"eva", "biases of queries and values, none of keys"),
)
# Regex of the first word of names that do not begin as a ViT's -> what they mean.
_FAMILIES = (
    (r"cait", "class attention in blocks of their own (CaiT)"),
    (r"xcit", "attention over channels, not over tokens (XCiT)"),
    (r"mixer|resmlp|gmlp|(se)?res(net|next)\w*|convnext\w*|efficientnet\w*", "no attention"),
)
_PLAIN_FAMILIES = ("vit", "deit", "flexivit", "mae", "dino", "ibot")
# The sizes of timm's names: width, heads. The heads count only where the width is this one:
# names are kept when a network is made with other sizes.
_SIZES = {
    "wee": (256, 4),
    "xsmall": (256, 4),
    "tiny": (192, 3),
    "little": (320, 5),
    "small": (384, 6),
    "medium": (512, 8),
    "mediumd": (512, 8),
    "betwixt": (640, 10),
    "base": (768, 12),
    "so150m2": (832, 13),
    "so150m": (896, 14),
    "large": (1024, 16),
    "so400m": (1152, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "giantopt": (1536, 16),
    "gigantic": (1664, 16),
}
# Words whose meaning shows in the tensors (patch, registers, LayerScale, depth), or that name data,
# image size or a way to train.
_PLAIN_WORDS = re.compile(
    r"vit|deit3?|flexivit|mae|dino|ibot|patch\d+|\d+|reg\d+|gap|map|siglip|dinov2|plus|distilled"
    r"|36x1|miil|in21k|in1k|sam|augreg2?|ls|teacher|student"
)
# timm's SigLIP models that have tanh's GELU; all others have erf's.
_TANH = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip(_gap)?_512"
)


def explain_architecture(name: str) -> str | None:
    """What the network of this name computes that our ViT does not; None if it is the same."""
    name = _plain(name)
    if re.fullmatch(r"eva_large_patch14_\d+", name):  # the one EVA that is a plain ViT
        return None
    words = name.split("_")
    # Each of these words alone is plain: it is DINOv2's giant that has another MLP.
    if {"giant", "dinov2"} <= set(words):
        return "SwiGLU in place of the MLP"
    known: Sequence[tuple[str, str]] = _FOREIGN_WORDS
    judged = words
    if not words[0].startswith(_PLAIN_FAMILIES):
        # Further words mean something else there: the s24 of cait_s24 is no convolution's.
        known, judged = (*_FAMILIES, *_FOREIGN_WORDS), words[:1]
    for word in judged:
        for pattern, meaning in known:
            if re.fullmatch(pattern, word):
                return meaning
    # A word of which nothing is known may stand for other arithmetic, so the network is refused.
    unknown = [w for w in words if w not in _SIZES and not _PLAIN_WORDS.fullmatch(w)]
    if unknown or judged != words:
        return f"parts that nothing is known of here ({(unknown or words)[0]!r})"
    return None


def check_architecture(name: str, where: str) -> None:
    """Raises DataError, with what differs, unless the network of this name is a plain ViT."""
    meaning = explain_architecture(name)
    if meaning:
        raise DataError(
            f"{where} names the architecture {name!r}: it has {meaning}, so the same tensors give "
            "other numbers there than in a plain ViT. If it does compute what another of timm's "
            "plain ViTs does, put that one's name into a config.json beside the file, such as "
            '{"architecture": "vit_base_patch16_224"}'
        )


def known_of(name: str, width: int) -> dict[str, Any]:
    """num_heads, gelu and pool of a plain ViT of timm's, None if unknown.

    Args:
      name: explain_architecture has nothing against it.
      width: of the network in the file.
    """
    words = _plain(name).split("_")
    size = next((word for word in words if word in _SIZES), "")
    expected, heads = _SIZES.get(size, (0, 0))
    # Two names whose sizes are not those of the word.
    if size == "base" and "plus" in words:
        expected, heads = 896, 14
    if _plain(name) == "vit_base_patch16_gap_224":
        heads = 16
    pool = "gap" if "gap" in words or words[0] == "eva" else None
    if "map" in words or ("siglip" in words and not pool):
        pool = "map"
    return {
        "num_heads": heads if width == expected else None,
        "gelu": "tanh" if _TANH.match(_plain(name)) else "erf",
        "pool": pool,
    }


def _plain(name: str) -> str:
    """Without the part before a slash (an owner, hf-hub:) and the tag of weights after a dot."""
    return name.lower().rsplit("/", 1)[-1].split(".")[0]
