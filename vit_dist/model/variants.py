"""Names and sizes of Vision Transformers, checked before anything is built; touches no device."""

import re
from typing import Any

from vit_dist.config.errors import ConfigError
from vit_dist.model.memory import POLICIES
from vit_dist.model.posemb import sincos2d

# Sizes of table 2 of arXiv 2106.04560, and So400m of arXiv 2305.13035. mu is for tests and demos.
SIZES: dict[str, dict[str, int]] = {
    "mu": {"width": 32, "depth": 1, "mlp_dim": 128, "num_heads": 2},
    "Ti": {"width": 192, "depth": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"width": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6},
    "M": {"width": 512, "depth": 12, "mlp_dim": 2048, "num_heads": 8},
    "B": {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16},
    "So400m": {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16},
    "H": {"width": 1280, "depth": 32, "mlp_dim": 5120, "num_heads": 16},
    "g": {"width": 1408, "depth": 40, "mlp_dim": 6144, "num_heads": 16},
    "G": {"width": 1664, "depth": 48, "mlp_dim": 8192, "num_heads": 16},
    "e": {"width": 1792, "depth": 56, "mlp_dim": 15360, "num_heads": 16},
}
# What the arguments of ViT that are names may be; ViT says what they mean.
POOLS = ("tok", "gap", "tok_gap", "map", "none")
CLS_POOLS = ("tok", "tok_gap")  # poolings that read a cls token
PREFIX_POSEMBS = ("cls", "all", "none")
POSEMBS = ("learned", "sincos2d")
GELUS = ("tanh", "erf")
SOFTMAXES = ("float32", "compute")
GROWTHS = ("linear", "constant")
FORMS = ("matrix", "tensor")
# Arguments of ViT that must be 1 or more.
_POSITIVE = ("patch_size", "width", "depth", "mlp_dim", "num_heads", "channels")
# Precision of activations -> Keras's dtype policy; variables are float32 under each of them.
PRECISIONS = {
    "float32": "float32",
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
}


def parse_variant(variant: str) -> dict[str, int]:
    """The sizes of a name such as "S/16": width, depth, mlp_dim, num_heads, patch_size.

    Raises:
      ConfigError: not of the form size/patch, or an unknown size.
    """
    # No leading zero: a patch of 0 is refused here.
    match = re.fullmatch(r"([A-Za-z0-9]+)/([1-9][0-9]*)", str(variant))
    if not match or match[1] not in SIZES:
        raise ConfigError(
            f"variant {variant!r} is not size/patch, such as 'S/16'; sizes: {', '.join(SIZES)}"
        )
    return {**SIZES[match[1]], "patch_size": int(match[2])}


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or as both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError, naming what is allowed, if `value` is none of it."""
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}")


def needs_cls(pool: str) -> bool:
    """Whether the pooling reads a cls token."""
    return pool in CLS_POOLS


def check_vit(
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    width: int,
    num_heads: int,
    pool: str,
    posemb: str,
    gelu: str,
    drop_path_growth: str,
    remat: str,
    attention_block: int | None,
    softmax: str,
    cls_token: bool,
    prefix_posemb: str,
    norm_epsilon: float,
    form: str = "matrix",
    **rest: Any,
) -> None:
    """Raises ConfigError for arguments no ViT can have; touches no device."""
    # Counts first: the checks below divide by them.
    sizes = {"patch_size": patch_size, "width": width, "num_heads": num_heads, **rest}
    zeros = ("num_classes", "rep_size", "registers")
    # By name, so that the message can say which argument it is.
    for names, least in ((_POSITIVE, 1), (zeros, 0)):
        for name in names:
            if sizes[name] < least:
                raise ConfigError(f"{name} must be {least} or more, got {sizes[name]}")
    height, columns = as_pair(image_size)
    # Smaller than a patch is named apart, as 0 is a multiple of everything.
    if height % patch_size or columns % patch_size or min(height, columns) < patch_size:
        raise ConfigError(
            f"images of {height}x{columns} cannot be cut into patches of {patch_size}x{patch_size}:"
            f" set image_size to a multiple of {patch_size}, or another patch in the variant"
        )
    if width % num_heads:
        raise ConfigError(f"width {width} is not divisible by num_heads {num_heads}")
    check_choice("pool", pool, POOLS)
    check_choice("posemb", posemb, POSEMBS)
    check_choice("gelu", gelu, GELUS)
    check_choice("remat", remat, POLICIES)
    check_choice("drop_path_growth", drop_path_growth, GROWTHS)
    check_choice("softmax", softmax, SOFTMAXES)
    check_choice("form", form, FORMS)
    check_choice("prefix_posemb", prefix_posemb, PREFIX_POSEMBS)
    if pool in CLS_POOLS and not cls_token:
        raise ConfigError(f"pool {pool!r} needs a cls token: leave model.cls_token at None")
    # The concatenation is as wide as two models, and a LayerNorm of one width does not fit it.
    if pool == "tok_gap" and rest["norm_after_pool"]:
        raise ConfigError("pool 'tok_gap' takes normalised tokens: leave norm_after_pool False")
    if not 0 < norm_epsilon < 1:
        raise ConfigError(f"norm_epsilon must be above 0 and below 1, got {norm_epsilon}")
    # Below 1, as what is kept is divided by 1 - rate.
    for name in ("dropout", "attention_dropout", "drop_path"):
        if not 0 <= rest[name] < 1:
            raise ConfigError(f"{name} is a probability below 1, got {rest[name]}")
    if posemb == "sincos2d":
        sincos2d((1, 1), width)  # raises for a width that it cannot have
    if attention_block is not None:
        _check_attention_block(attention_block, remat=remat, dropout=rest["attention_dropout"])


def _check_attention_block(size: int, *, remat: str, dropout: float) -> None:
    if size < 1:
        raise ConfigError(f"attention_block must be 1 or more keys, or None, got {size}")
    # Blockwise attention never has all weights in memory: nothing to recompute, nothing to drop.
    if remat == "attention":
        raise ConfigError(
            "attention_block already computes the attention again in the backward pass: set remat "
            "to none or full"
        )
    if dropout:
        raise ConfigError(
            f"attention_block cannot drop attention weights: set attention_dropout to 0, not "
            f"{dropout}, or attention_block to None"
        )


def choose_form(kind: str) -> str:
    """The form of ViT that is fastest on a kind of device: "CPU", "GPU" or "TPU"."""
    return "tensor" if kind == "TPU" else "matrix"


def vit_config(
    variant: str,
    *,
    image_size: int | tuple[int, int],
    num_classes: int,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    pool: str = "gap",
    posemb: str = "learned",
    rep_size: int = 0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
    drop_path_growth: str = "linear",
    layer_scale: float | None = None,
    gelu: str = "tanh",
    qkv_bias: bool = True,
    remat: str = "none",
    attention_block: int | None = None,
    softmax: str = "float32",
    cls_token: bool | None = None,
    registers: int = 0,
    prefix_posemb: str = "cls",
    norm_epsilon: float = 1e-6,
    norm_after_pool: bool = False,
    channels: int = 3,
) -> dict[str, Any]:
    """The arguments of ViT for a variant such as "S/16", checked; touches no device.

    `width`, `depth`, `mlp_dim` and `num_heads`, where given, replace the variant's; `rep_size` -1
    means as wide as the model; the rest is documented at ViT.

    Raises:
      ConfigError: see ViT and parse_variant.
    """
    # The variant's sizes, but for those that are given.
    given = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    # 0 is given too, and refused below; only None is not.
    sizes = parse_variant(variant) | {k: v for k, v in given.items() if v is not None}
    config: dict[str, Any] = {
        **sizes,
        "image_size": image_size,
        "rep_size": sizes["width"] if rep_size == -1 else rep_size,
        # Resolved here too, because check_vit compares it with the pool.
        "cls_token": needs_cls(pool) if cls_token is None else cls_token,
        "num_classes": num_classes,
        "pool": pool,
        "posemb": posemb,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "drop_path": drop_path,
        "drop_path_growth": drop_path_growth,
        "layer_scale": layer_scale,
        "gelu": gelu,
        "qkv_bias": qkv_bias,
        "remat": remat,
        "attention_block": attention_block,
        "softmax": softmax,
        "registers": registers,
        "prefix_posemb": prefix_posemb,
        "norm_epsilon": norm_epsilon,
        "norm_after_pool": norm_after_pool,
        "channels": channels,
    }
    # Checked at once, so that a wrong config is refused before a device starts.
    check_vit(**config)
    return config
