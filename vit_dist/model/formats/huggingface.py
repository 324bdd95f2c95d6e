"""Hugging Face's plain ViTs: ViT, DeiT, DINOv2 (with and without registers), MAE, MSN, I-JEPA.

config.json beside the tensors tells what no tensor does: model_type, GELU, epsilon, heads, size;
preprocessor_config.json tells how images are scaled.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.model.formats.mapping import CONV, Rule, norm, pair
from vit_dist.model.formats.tensors import LazyArray

# The names of transformers' modules; ViT and DINOv2 share some and differ in the rest.
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
# Regex of names -> what these tensors are part of, for the report. No encoder has a use for them.
OTHER_PARTS = (
    (r"embeddings\.mask_token$", "the token of masked pretraining"),
    (r"decoder\.", "the decoder of masked pretraining"),
    (
        r"(cls|distillation)_classifier\.",
        "both heads of a distilled DeiT, whose mean would be its answer",
    ),
    (r"pooler\.", "the pooler, which the classifier does not read"),
)
# hidden_act -> gelu of ViT.
_GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# model_type -> layer_norm_eps where config.json does not say it. The defaults of other keys are the
# same for all model_types.
_EPSILONS = {
    "vit": 1e-12,
    "deit": 1e-12,
    "dinov2": 1e-6,
    "dinov2_with_registers": 1e-6,
    "vit_mae": 1e-12,
    "vit_msn": 1e-6,
    "ijepa": 1e-12,
}
# Classes of transformers whose encoder is a plain ViT.
_CLASS = re.compile(
    r"(ViT|DeiT|Dinov2|Dinov2WithRegisters|ViTMAE|ViTMSN|IJepa)(Model|Backbone|For\w+)"
)
# Regex of another model_type -> what the network has that ours has not.
_OTHER_TYPES = (
    (r"dinov3.*|eomt_dinov3|pe_.*|eva.*", "rotary positions (RoPE)"),
    (r"beit|data2vec-vision|sam.*|swin.*|vitdet", "relative positions, or keys without biases"),
    (r"siglip.*", "other names; read its weights as timm's vit_*_siglip_*, or big_vision's .npz"),
    (r".*clip.*|altclip|align.*", "a LayerNorm before the blocks (CLIP)"),
    (r"videomae|vivit|timesformer|vjepa.*", "patches of videos"),
    (r"yolos", "detection tokens and positions in its middle"),
    (r"vit[-_]hybrid|dpt|bit", "a convolutional network before the patches, or heads of its own"),
    (r"audio-spectrogram-transformer", "patches that overlap"),
)
# Names of a block's parts that only one of the two families of networks has.
_FAMILIES = {
    "ViT": re.compile(r"layernorm_(before|after)|intermediate\.dense|\d\.output\.dense"),
    "DINOv2": re.compile(r"\.norm[12]\.|\.mlp\.fc[12]\.|layer_scale[12]"),
}
# Keys of config.json -> the one value that our ViT computes, and what another would mean.
_FIXED: dict[str, tuple[Any, str]] = {
    "use_swiglu_ffn": (False, "SwiGLU in place of the MLP"),
    "position_embedding_type": ("absolute", "another kind of positions"),
    "is_decoder": (False, "attention that looks back alone"),
    "add_cross_attention": (False, "attention to another sequence"),
}
# Keys that shapes tell as well, and that must agree with the shapes: key -> key of ViT.
_SHOWN = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp_dim",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "num_register_tokens": "registers",
    "qkv_bias": "qkv_bias",
}
# Keys that change nothing in inference: dropout, initial values, training, heads, bookkeeping.
_FREE = re.compile(
    r"_.*|architectures|model_type|transformers_version|torch_dtype|dtype|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|return_dict|use_return_dict|output_(attentions|hidden_states)"
    r"|chunk_size_feed_forward|is_encoder_decoder|attn_implementation|torchscript|use_bfloat16"
    r"|(.*_)?(dropout|drop)(_path)?(_prob|_rate)?|initializer_range|encoder_stride|layerscale_value"
    r"|layer_norm_eps|hidden_act|num_attention_heads|image_size|mlp_ratio|pooler_(act|output_size)"
    r"|apply_layernorm|reshape_hidden_states|use_mask_token|stage_names|out_(features|indices)"
    r"|decoder_.*|mask_ratio|norm_pix_loss|gradient_checkpointing|label_smoothing|name_or_path"
)
# What may stand before the names of a plain ViT's tensors, where no config.json names the model.
_PREFIXES = (  # of the backbone itself, or of a module that it was wrapped in
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "model",
    "backbone",
    "encoder",
    "module",
)


def detect(names: Any) -> bool:
    """Whether these names are those of a ViT in transformers."""
    return any(name.endswith(_STEM) for name in names)


def canonical(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors without the backbone's prefix (vit., dinov2., ...).

    Raises:
      DataError: two tensors have the same name then.
    """
    prefix = next(name for name in tensors if name.endswith(_STEM)).removesuffix(_STEM)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # With and without a prefix, for instance: one would silently replace the other.
    if len(found) < len(tensors):
        raise DataError(
            "the file holds two tensors of one name: save it again with save_pretrained"
        )
    return found


def is_other_part(name: str, names: Any) -> bool:
    """Whether to leave out a tensor although our ViT has a place for it.

    Args:
      name: canonical.
      names: all that the file holds.
    """
    # transformers' classifiers read the normalised token itself, beside a pooler too.
    heads = ("classifier.weight", "cls_classifier.weight")
    return name.startswith("pooler.") and any(head in names for head in heads)


def describe(
    original: Mapping[str, LazyArray],
    config: Mapping[str, Any],
    *,
    wrapper: str,
    where: str,
    noted: bool = False,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the file and config.json say beyond shapes: see timm.describe, which takes the same.

    Raises:
      DataError: config.json is of a network that computes something else.
    """
    tensors = canonical(original)
    # A key that config.json lacks has transformers' default; without a config.json nothing has.
    kind = config.get("model_type")
    if config:
        check_config(config, where)
    elif not noted:
        _check_prefix(original)
    _check_family(tensors, kind, where)
    # save_pretrained leaves out of config.json what has the default of the class, so a key that is
    # missing has that. Without any config.json nothing is known.
    act = config.get("hidden_act", "gelu" if config else None)
    if act not in (None, *_GELUS):
        raise DataError(f"{where} says that its MLP has the activation {act!r}, not GELU")
    pooler = config.get("pooler_act", "tanh")
    if "pooler.dense.weight" in tensors and pooler != "tanh":
        raise DataError(f"{where} says that its pooler has the activation {pooler!r}, not tanh")
    by_tensors = "tok" if "embeddings.cls_token" in tensors else "gap"  # I-JEPA takes the mean
    if "encoder.layer.0.norm1.weight" in tensors and "classifier.weight" in tensors:
        by_tensors = "tok_gap"  # DINOv2's classifier
    said = {
        "gelu": _GELUS[act] if act else None,
        # "" for no config.json, of which the table knows no epsilon: it is not told then.
        "norm_epsilon": config.get("layer_norm_eps", _EPSILONS.get(kind or "")),
        "norm_after_pool": False,
        "num_heads": config.get("num_attention_heads", 12 if config else None),
        "pool": by_tensors,
        "image_size": config.get("image_size"),
        "prefix_posemb": ("all",) if "embeddings.distillation_token" in tensors else ("cls",),
    }
    # Compared with the shapes by the caller.
    shown = {ours: config[key] for key, ours in _SHOWN.items() if config.get(key) is not None}
    return said, shown, []


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises DataError if config.json is not of a network that computes what our ViT does."""
    kind = config.get("model_type")
    if kind not in _EPSILONS:
        found = (m for pattern, m in _OTHER_TYPES if re.fullmatch(pattern, str(kind)))
        meaning = next(found, "parts that nothing is known of here")
        raise DataError(
            f"{where} names the model_type {kind!r}: it has {meaning}, so it is not read. Plain "
            f"ViTs are {', '.join(_EPSILONS)}"
        )
    # A class of another model may share a model_type with ours.
    for name in config.get("architectures") or ():
        if not _CLASS.fullmatch(str(name)):
            raise DataError(f"{where} names the class {name!r}, of which nothing is known here")
    for key, value in config.items():
        if key in _FIXED:
            allowed, meaning = _FIXED[key]
            if value not in (allowed, None):
                raise DataError(f"{where} has {key}={value!r}: {meaning}")
        elif key not in _SHOWN and not _FREE.fullmatch(key):
            raise DataError(
                f"{where} has {key}={value!r}, of which it is not known what it changes: take it "
                "out if the network computes the same without it"
            )


def _check_family(names: Iterable[str], kind: str | None, where: str) -> None:
    """Raises DataError where the blocks are not named as those of one network, that of the config.

    ViT's blocks (and DeiT's, MAE's, ...) and DINOv2's have other names for the same parts.
    """
    blocks = [name for name in names if name.startswith("encoder.layer.")]
    found = {family for name in blocks for family, parts in _FAMILIES.items() if parts.search(name)}
    if len(found) > 1:
        raise DataError(
            "some of its blocks' tensors are named as ViT's, some as DINOv2's: it is another "
            "network, of which nothing is known here"
        )
    said = "DINOv2" if (kind or "").startswith("dinov2") else "ViT"
    if kind and found and said not in found:
        raise DataError(
            f"{where} names the model_type {kind!r}, while its tensors are named as those of "
            f"{found.pop()}: put the file where its own config.json is"
        )


def _check_prefix(names: Any) -> None:
    """Raises DataError if the names begin with another model's, such as dpt. or swin."""
    # What stands before the patch embedding's name, such as "dinov2." or "model.backbone.".
    prefix = next(name for name in names if name.endswith(_STEM)).removesuffix(_STEM)
    for part in prefix.split(".")[:-1]:
        if part not in _PREFIXES:
            raise DataError(
                f"its tensors are those of {part!r}, of which nothing is known here: put the "
                "config.json that came with it beside it"
            )


def family_of(network: Mapping[str, Any]) -> str:
    """The model_type that computes what our network does.

    Raises:
      DataError: none does; says why.
    """
    # LayerScale is what tells DINOv2 from ViT and DeiT in transformers.
    registers, scaled = network["registers"], network["layer_scale"] is not None
    positions, pool = network["prefix_posemb"], network["pool"]
    # All reasons are collected, so that one message says everything that has to change.
    reasons = []
    if not network["cls_token"] or (positions == "none"):
        reasons.append("they need a cls token with a position")
    if network["norm_after_pool"]:
        reasons.append("their last LayerNorm stands before the pooling")
    # Without classes it is written as a ...Model, else as ...ForImageClassification.
    headless = not network["num_classes"]
    if scaled:
        if pool != ("tok" if headless else "tok_gap") or network["rep_size"]:
            reasons.append("DINOv2's classifier reads pool 'tok_gap'")
        if registers and positions != "cls":
            reasons.append("DINOv2's registers have no positions")
        if network["mlp_dim"] % network["width"]:
            reasons.append("DINOv2's MLP is a whole number of widths wide")
        # Its Dinov2Embeddings take every other table for one of a square grid, and resample it.
        if network["image_size"][0] != network["image_size"][1]:
            reasons.append("DINOv2 takes square images")
        family = "dinov2_with_registers" if registers else "dinov2"
    else:
        if pool != "tok" or (network["rep_size"] and not headless):
            reasons.append("ViT and DeiT classify the cls token as it is")
        if registers and (registers, positions) != (1, "all"):
            reasons.append("registers without LayerScale exist nowhere there")
        family = "deit" if registers else "vit"
    if reasons:
        raise DataError(f"Hugging Face has no such ViT: {'; '.join(reasons)}. Use format timm")
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
    # A model without a classifier is the backbone itself, and has no prefix.
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
      DataError: see family_of.
    """
    family, headless = family_of(network), not network["num_classes"]
    height, width = network["image_size"]
    # transformers' own names where there are none; class_names takes them for none again.
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
    # DINOv2 says the MLP's width in widths of the model, ViT in numbers.
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
