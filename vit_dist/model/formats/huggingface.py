"""Hugging Face's ViT, DeiT and DINOv2 (with and without registers): model.safetensors, config.json.

config.json tells GELU, epsilon, heads and size; preprocessor_config.json mean and std.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_dist.model.formats.mapping import CONV, Rule, norm, pair
from vit_dist.model.formats.tensors import LazyArray

_BLOCK, _OURS = "encoder.layer.{i}", "encoderblock_{i}"
_SHARED: list[Rule] = [
    *pair("embeddings.patch_embeddings.projection", "embedding", CONV),
    Rule("embeddings.cls_token", ("cls",)),
    Rule("embeddings.position_embeddings", ("pos_embedding",)),
    *pair(f"{_BLOCK}.attention.attention.query", f"{_OURS}/attention/query"),
    *pair(f"{_BLOCK}.attention.attention.key", f"{_OURS}/attention/key"),
    *pair(f"{_BLOCK}.attention.attention.value", f"{_OURS}/attention/value"),
    *pair(f"{_BLOCK}.attention.output.dense", f"{_OURS}/attention/out"),
    *norm("layernorm", "encoder_norm"),
    *pair("classifier", "head"),
]
_VIT: list[Rule] = [
    Rule("embeddings.distillation_token", ("registers",)),
    *norm(f"{_BLOCK}.layernorm_before", f"{_OURS}/norm_0"),
    *norm(f"{_BLOCK}.layernorm_after", f"{_OURS}/norm_1"),
    *pair(f"{_BLOCK}.intermediate.dense", f"{_OURS}/mlp/dense_0"),
    *pair(f"{_BLOCK}.output.dense", f"{_OURS}/mlp/dense_1"),
    *pair("pooler.dense", "pre_logits"),
]
_DINOV2: list[Rule] = [
    Rule("embeddings.register_tokens", ("registers",)),
    *norm(f"{_BLOCK}.norm1", f"{_OURS}/norm_0"),
    *norm(f"{_BLOCK}.norm2", f"{_OURS}/norm_1"),
    *pair(f"{_BLOCK}.mlp.fc1", f"{_OURS}/mlp/dense_0"),
    *pair(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/dense_1"),
    Rule(f"{_BLOCK}.layer_scale1.lambda1", (f"{_OURS}/layer_scale_0/gamma",)),
    Rule(f"{_BLOCK}.layer_scale2.lambda1", (f"{_OURS}/layer_scale_1/gamma",)),
]
RULES = [*_SHARED, *_VIT, *_DINOV2]
_STEM = "embeddings.patch_embeddings.projection.weight"
OTHER_PARTS = re.compile(r"embeddings\.mask_token$")  # of masked pretraining
_GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def detect(names: Any) -> bool:
    """Whether these are the names of such a file."""
    return any(name.endswith(_STEM) for name in names)


def canonical(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors without the backbone's prefix (vit., dinov2., ...)."""
    prefix = next(name for name in tensors if name.endswith(_STEM)).removesuffix(_STEM)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError(
            "the file holds two tensors of one name: save it anew with save_pretrained"
        )
    return found


def describe(tensors: Mapping[str, LazyArray], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the canonical names and config.json say beyond shapes; None if unknown.

    Raises:
      ValueError: an activation other than GELU.
    """
    act = config.get("hidden_act")
    if act not in (None, *_GELUS):
        raise ValueError(f"its MLP has the activation {act!r}; only GELU is supported")
    is_dinov2 = "encoder.layer.0.norm1.weight" in tensors
    has_dist = "embeddings.distillation_token" in tensors
    return {
        "gelu": _GELUS[act] if act else None,
        "norm_epsilon": config.get("layer_norm_eps"),
        "norm_after_pool": False,
        "num_heads": config.get("num_attention_heads"),
        "pool": "tok_gap" if is_dinov2 and "classifier.weight" in tensors else "tok",
        "image_size": config.get("image_size"),
        "prefix_posemb": ("all",) if has_dist else ("cls",),
    }


def family_of(network: Mapping[str, Any]) -> str:
    """The model_type that computes what our network does.

    Raises:
      ValueError: none does; says why.
    """
    registers, scaled = network["registers"], network["layer_scale"] is not None
    positions, pool = network["prefix_posemb"], network["pool"]
    reasons = []
    if not network["cls_token"] or (positions == "none"):
        reasons.append("they need a cls token with a position")
    if network["norm_after_pool"]:
        reasons.append("their last LayerNorm stands before the pooling")
    headless = not network["num_classes"]
    if scaled:
        if pool != ("tok" if headless else "tok_gap") or network["rep_size"]:
            reasons.append("DINOv2's classifier reads pool 'tok_gap'")
        if registers and positions != "cls":
            reasons.append("DINOv2's registers have no positions")
        if network["mlp_dim"] % network["width"]:
            reasons.append("DINOv2's MLP is a whole number of widths wide")
        family = "dinov2_with_registers" if registers else "dinov2"
    else:
        if pool != "tok" or (network["rep_size"] and not headless):
            reasons.append("ViT and DeiT classify the cls token as it is")
        if registers and (registers, positions) != (1, "all"):
            reasons.append("registers without LayerScale exist nowhere there")
        family = "deit" if registers else "vit"
    if reasons:
        raise ValueError(f"Hugging Face has no such ViT: {'; '.join(reasons)}. Use format timm")
    return family


_CLASSES = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}


def rules_for(family: str) -> list[Rule]:
    """The rules to write a family with."""
    return [*_SHARED, *(_DINOV2 if family.startswith("dinov2") else _VIT)]


def with_backbone(
    written: Mapping[str, np.ndarray], family: str, *, headless: bool
) -> dict[str, np.ndarray]:
    """Canonical names to a file's: all but the classifier under the backbone's prefix."""
    if headless:
        return dict(written)
    return {
        name if name.startswith("classifier.") else f"{family}.{name}": array
        for name, array in written.items()
    }


def to_config(network: Mapping[str, Any], *, labels: Any) -> dict[str, Any]:
    """config.json of our network.

    Args:
      network: of ViT.get_config().
      labels: names of the classes, or nothing.

    Raises:
      ValueError: see family_of.
    """
    family, headless = family_of(network), not network["num_classes"]
    height, width = network["image_size"]
    labels = list(labels) or [f"LABEL_{i}" for i in range(network["num_classes"])]
    config = {
        "model_type": family,
        "architectures": [_CLASSES[family] + ("Model" if headless else "ForImageClassification")],
        "hidden_size": network["width"],
        "num_hidden_layers": network["depth"],
        "num_attention_heads": network["num_heads"],
        "hidden_act": "gelu" if network["gelu"] == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": network["norm_epsilon"],
        "qkv_bias": network["qkv_bias"],
        "image_size": height if height == width else [height, width],
        "patch_size": network["patch_size"],
        "num_channels": network["channels"],
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    if family.startswith("dinov2"):
        config |= {"mlp_ratio": network["mlp_dim"] // network["width"], "use_swiglu_ffn": False}
        config |= {"num_register_tokens": network["registers"]} if network["registers"] else {}
        config |= {"layerscale_value": network["layer_scale"]}
    else:
        config |= {"intermediate_size": network["mlp_dim"]}
        config |= {"pooler_output_size": network["rep_size"]} if network["rep_size"] else {}
    return config


def to_preprocessor(network: Mapping[str, Any], *, mean: Any, std: Any) -> dict[str, Any]:
    """preprocessor_config.json: resize to the model's size, scale by mean and std (in 0..1)."""
    height, width = network["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
