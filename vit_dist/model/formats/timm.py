"""timm's VisionTransformer, and the original files of DeiT, DeiT III and DINOv2, named alike.

GELU is erf's and LayerNorm's epsilon 1e-6 unless a config.json beside the file says otherwise; with
an attention pooling (SigLIP) the file alone does not tell the GELU.
"""

import re
from collections.abc import Mapping
from typing import Any

from vit_dist.model.formats.mapping import CONV, KV, QKV, Rule, norm, pair
from vit_dist.model.formats.tensors import LazyArray

_BLOCK, _OURS = "blocks.{i}", "encoderblock_{i}"
_PROJECTIONS = ("query", "key", "value")


def _fused(theirs: str, ours: str, names: tuple[str, ...], transform: Any) -> list[Rule]:
    kernels = tuple(f"{ours}/{name}/kernel" for name in names)
    biases = tuple(f"{ours}/{name}/bias" for name in names)
    return [
        Rule(f"{theirs}.weight", kernels, transform),
        Rule(f"{theirs}.bias", biases, transform),
    ]


RULES: list[Rule] = [
    *pair("patch_embed.proj", "embedding", CONV),
    Rule("cls_token", ("cls",)),
    Rule("reg_token", ("registers",)),
    Rule("pos_embed", ("pos_embedding",)),
    *norm(f"{_BLOCK}.norm1", f"{_OURS}/norm_0"),
    *_fused(f"{_BLOCK}.attn.qkv", f"{_OURS}/attention", _PROJECTIONS, QKV),
    *pair(f"{_BLOCK}.attn.proj", f"{_OURS}/attention/out"),
    Rule(f"{_BLOCK}.ls1.gamma", (f"{_OURS}/layer_scale_0/gamma",)),
    *norm(f"{_BLOCK}.norm2", f"{_OURS}/norm_1"),
    *pair(f"{_BLOCK}.mlp.fc1", f"{_OURS}/mlp/dense_0"),
    *pair(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/dense_1"),
    Rule(f"{_BLOCK}.ls2.gamma", (f"{_OURS}/layer_scale_1/gamma",)),
    *norm("norm", "encoder_norm"),
    Rule("attn_pool.latent", ("map_head/probe",)),
    *pair("attn_pool.q", "map_head/attention/query"),
    *_fused("attn_pool.kv", "map_head/attention", ("key", "value"), KV),
    *pair("attn_pool.proj", "map_head/attention/out"),
    *norm("attn_pool.norm", "map_head/norm"),
    *pair("attn_pool.mlp.fc1", "map_head/mlp/dense_0"),
    *pair("attn_pool.mlp.fc2", "map_head/mlp/dense_1"),
    *pair("pre_logits.fc", "pre_logits"),
    *pair("head", "head"),
]
_RENAMED = (  # names of the original files, and of the norm behind the pooling
    (r"^register_tokens$", "reg_token"),
    (r"^dist_token$", "reg_token"),
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"^fc_norm\.", "norm."),
)
_STEM = "patch_embed.proj.weight"
OTHER_PARTS = re.compile(r"mask_token$")  # of DINOv2's and iBOT's pretraining
_POOLS = {"token": "tok", "avg": "gap", "map": "map", "": "none"}
_GELUS = {"gelu": "erf", "gelu_erf": "erf", "gelu_tanh": "tanh"}


def detect(names: Any) -> bool:
    """Whether these are the names of such a file."""
    return any(name == _STEM or name.endswith(f".{_STEM}") for name in names)


def canonical(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors under timm's names; what is not the ViT's keeps its name.

    Raises:
      ValueError: several ViTs in one file.
    """
    stems = [name for name in tensors if name == _STEM or name.endswith(f".{_STEM}")]
    if len(stems) > 1:
        raise ValueError(f"the file holds several ViTs ({', '.join(stems)}): save one of them")
    prefix, found = stems[0].removesuffix(_STEM), {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, new in _RENAMED:
                name = re.sub(pattern, new, name)
        if name in found:
            raise ValueError(f"the file holds two tensors for {name}: it is no VisionTransformer's")
        found[name] = tensor
    return found


def describe(original: Mapping[str, LazyArray], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file, and a config.json of timm's beside it, say beyond shapes; None if unknown.

    Args:
      original: the tensors under the file's own names.
      config: the parsed config.json, or nothing.
    """

    def has(name: str) -> bool:
        return any(n == name or n.endswith(f".{name}") for n in original)

    args = config.get("model_args", {})
    pool = _POOLS.get(config.get("global_pool", args.get("global_pool")))
    has_map, fc_norm = has("attn_pool.latent"), has("fc_norm.weight")
    if pool is None:
        pool = "map" if has_map else "tok" if has("cls_token") and not fc_norm else "gap"
    size = args.get("img_size") or config.get("pretrained_cfg", {}).get("input_size", [None])[1:]
    gelu = _GELUS.get(args.get("act_layer", "gelu" if not has_map else ""))
    preferred = ("none", "all", "cls")
    if has("register_tokens") or has("dist_token"):
        preferred = ("cls", "none", "all") if has("register_tokens") else ("all", "cls", "none")
    return {
        "gelu": gelu,
        "norm_epsilon": args.get("norm_epsilon", 1e-6),
        "norm_after_pool": fc_norm,
        "num_heads": args.get("num_heads"),
        "pool": pool,
        "image_size": size or None,
        "prefix_posemb": preferred,
    }


def refuse(network: Mapping[str, Any]) -> list[str]:
    """What of our network timm's VisionTransformer does not have."""
    reasons = []
    if network["rep_size"]:
        reasons.append("timm has no representation layer")
    if network["pool"] == "tok_gap":
        reasons.append("timm has no pooling of cls token and mean together")
    if network["norm_epsilon"] > 1e-5:  # below, the difference drowns in float32's rounding
        reasons.append("LayerNorm's epsilon is 1e-6 there")
    return reasons


def to_config(network: Mapping[str, Any], *, mean: Any, std: Any, labels: Any) -> dict[str, Any]:
    """The config.json with which timm.create_model("local-dir:FOLDER", pretrained=True) loads it.

    Args:
      network: of ViT.get_config().
      mean, std: of the images, in 0..1.
      labels: names of the classes, or nothing.
    """
    pools = {ours: theirs for theirs, ours in _POOLS.items()}
    pool = pools[network["pool"]]
    height, width = network["image_size"]
    args = {
        "img_size": [height, width],
        "patch_size": network["patch_size"],
        "in_chans": network["channels"],
        "embed_dim": network["width"],
        "depth": network["depth"],
        "num_heads": network["num_heads"],
        "mlp_ratio": network["mlp_dim"] / network["width"],
        "qkv_bias": network["qkv_bias"],
        "init_values": network["layer_scale"],
        "class_token": network["cls_token"],
        "no_embed_class": network["prefix_posemb"] == "none",
        "reg_tokens": network["registers"],
        "fc_norm": network["norm_after_pool"],
        "global_pool": pool,
        "act_layer": "gelu_tanh" if network["gelu"] == "tanh" else "gelu",
    }
    config: dict[str, Any] = {
        "architecture": "vit_base_patch16_224",
        "num_classes": network["num_classes"],
        "num_features": network["width"],
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [network["channels"], height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "num_classes": network["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if labels:
        config["label_names"] = list(labels)
    return config
