"""timm's VisionTransformer, and the original files of DeiT, DeiT III, DINO, DINOv2 and MAE.

All name their tensors alike. What no tensor tells (GELU, where norms stand, pooling) is asked of
the config.json beside the file, or of the options that a training script kept in it. Without
either, the file is taken for timm's plain ViT, and the load report says so.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vit_dist.config.errors import DataError
from vit_dist.model.formats.architectures import check_architecture, known_of
from vit_dist.model.formats.foreign import explain_names
from vit_dist.model.formats.mapping import CONV, KV, QKV, Rule, norm, pair
from vit_dist.model.formats.tensors import LazyArray
from vit_dist.model.variants import as_pair

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
# Regex of a name -> timm's name: of the original files, and of the norm behind the pooling, which
# like the norm before it is our encoder_norm (norm_after_pool tells them apart). Applied in order.
_RENAMED = (
    (r"^register_tokens$", "reg_token"),
    (r"^dist_token$", "reg_token"),
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's blocks.CHUNK.BLOCK, for its FSDP
    (r"^fc_norm\.", "norm."),
)
_STEM = "patch_embed.proj.weight"
# Regex of names -> what these tensors are part of, for the report. No encoder has a use for them.
OTHER_PARTS = (
    (r"(.*\.)?mask_token$", "the token of masked pretraining"),
    (r"decoder_(embed|pos_embed|blocks|norm|pred)\b", "the decoder of masked pretraining (MAE)"),
    (r"(.*\.)?student\.", "the student of self-distillation"),
    (
        r"(.*\.)?(dino_head|ibot_head|head\.(mlp|last_layer)\d?)\.",
        "the heads of self-distillation (DINO, iBOT)",
    ),
    (r"(head|head_dist)\.\w+$", "both heads of a distilled DeiT, whose mean would be its answer"),
    (r"(.*\.)?n_averaged$", "how many steps were averaged"),
)
_PLAIN = (
    "timm's plain ViT (norms before attention and MLP, epsilon 1e-6, no rotary positions), as no "
    "config.json beside the file names the architecture"
)
_OVER_PATCHES = "attention pooling over the patches alone, not over the tokens before them"
_POOLS = {"token": "tok", "avg": "gap", "map": "map", "": "none"}
_GELUS = {"gelu": "erf", "gelu_erf": "erf", "gelu_tanh": "tanh"}
# The arguments of timm's VisionTransformer (model_args), by what they mean for reading weights.
# First the arguments of which our ViT computes one value only: that value, and what another would
# mean.
_FIXED: dict[str, tuple[Any, str]] = {
    "pre_norm": (False, "a LayerNorm before the blocks (CLIP)"),
    "final_norm": (True, "no LayerNorm behind the blocks"),
    "pool_include_prefix": (False, "a pooling of all tokens, not of the patches alone"),
    "qk_norm": (False, "normalised queries and keys"),
    "scale_attn_norm": (False, "a LayerNorm inside of the attention"),
    "scale_mlp_norm": (False, "a LayerNorm inside of the MLP"),
    "proj_bias": (True, "projections without biases"),
    "pos_embed": ("learn", "no learned positions"),
    "embed_norm_layer": (None, "a norm behind the patches"),
    "norm_layer": ("layernorm", "another norm than LayerNorm with epsilon 1e-6"),
    "head_hidden_size": (None, "a further layer before the head"),
}
# Arguments that shapes tell as well, and that must agree with the shapes: argument -> key of ViT.
_SHOWN = {
    "patch_size": "patch_size",
    "in_chans": "channels",
    "embed_dim": "width",
    "depth": "depth",
    "qkv_bias": "qkv_bias",
    "class_token": "cls_token",
    "reg_tokens": "registers",
    "fc_norm": "norm_after_pool",
}
# Arguments that `describe` reads itself.
_READ = ("img_size", "num_heads", "act_layer", "global_pool", "no_embed_class", "norm_epsilon")
# Arguments that change nothing in inference, or nothing at a size that patches divide.
_FREE = re.compile(
    r"(.*_)?drop(_path|out)?(_rate)?|weight_init|fix_init|num_classes|mlp_ratio|init_values"
    r"|dynamic_img_(size|pad)|strict_img_size|pretrained|checkpoint_path|scriptable|exportable"
)


def detect(names: Any) -> bool:
    """Whether these names are those of a ViT in timm's layout."""
    return any(name == _STEM or name.endswith(f".{_STEM}") for name in names)


def canonical(tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors under timm's names; what is not the ViT's keeps its name.

    Raises:
      DataError: several ViTs in one file, none of them a teacher.
    """
    stems = [name for name in tensors if name == _STEM or name.endswith(f".{_STEM}")]
    if len(stems) > 1:
        # Self-distillation: its authors publish the teacher.
        stems = [name for name in stems if "teacher" in name.split(".")] or stems
    if len(stems) > 1:
        raise DataError(f"the file holds several ViTs ({', '.join(stems)}): save one of them")
    prefix, found = stems[0].removesuffix(_STEM), {}
    for name, tensor in tensors.items():
        # Without the prefix of the ViT; tensors outside of it keep their names.
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, new in _RENAMED:
                name = re.sub(pattern, new, name)
        if name in found:
            raise DataError(f"the file holds two tensors for {name}: it is no VisionTransformer's")
        found[name] = tensor
    return found


def is_other_part(name: str, names: Any) -> bool:
    """Whether to leave out a tensor although our ViT has a place for it.

    Args:
      name: canonical.
      names: all that the file holds.
    """
    # A distilled DeiT has two heads, of cls and distillation token; ours has one, and neither of
    # the two is the network's answer.
    return name.startswith("head.") and "head_dist.weight" in names


def describe(
    original: Mapping[str, LazyArray],
    config: Mapping[str, Any],
    *,
    wrapper: str,
    where: str,
    noted: bool = False,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the file, and timm's config.json, say beyond shapes.

    Args:
      original: the tensors under the file's own names.
      config: the parsed config.json, or what stands for it; {} for neither.
      wrapper: see TensorFile.
      where: what messages call the config.
      noted: whether the file carries our own note of its network.

    Returns:
      keys of ViT -> values, None if unknown; keys of ViT -> what the config says of what shapes
      tell too; and lines for the report: what nothing tells and is assumed.

    Raises:
      DataError: it is not timm's plain ViT, or may be another network.
    """

    def has(name: str) -> bool:
        return any(n == name or n.endswith(f".{name}") for n in original)

    name, args = config.get("architecture"), config.get("model_args") or {}
    _check_arguments(config, args, where)
    # The patch kernel, (D, C, p, p).
    stem = next(t.shape for n, t in original.items() if n.endswith(_STEM))
    known: dict[str, Any] = {}
    if name:
        check_architecture(str(name), where)
        known = known_of(str(name), stem[0])
    else:
        if not noted:
            _check_nameless(original, has, wrapper)
        # SigLIP's networks have no cls token; their GELU may be tanh's.
        certain = (has("cls_token") or has("fc_norm.weight")) and not has("attn_pool.latent")
        known = {"gelu": "erf" if certain else None}
    act = args.get("act_layer")
    if act is not None and act not in _GELUS:
        raise DataError(f"{where} says that its MLP has the activation {act!r}, not GELU")
    size = _image_size(config, args, stem[-1], where)
    said = {
        "gelu": _GELUS[act] if act else known.get("gelu"),
        # timm's own default; a null in the file is none, and is reported as not told.
        "norm_epsilon": args.get("norm_epsilon", 1e-6),
        "norm_after_pool": has("fc_norm.weight"),
        "num_heads": args.get("num_heads") or known.get("num_heads"),
        "pool": _pooling((args, config.get("pretrained_cfg") or {}, config), known, has, where),
        "image_size": size,
        "prefix_posemb": _prefix_posembs(args, has),
    }
    given = {argument: value for argument, value in args.items() if value is not None}
    shown = {key: given[argument] for argument, key in _SHOWN.items() if argument in given}
    # timm's LayerScale: None or 0 for none. Any value stands for "there is one".
    if "init_values" in given:
        shown["layer_scale"] = 1e-5 if given["init_values"] else None
    # Tokens before the patches.
    prefix = has("cls_token") or has("reg_token")
    over_patches = [_OVER_PATCHES] if has("attn_pool.latent") and prefix else []
    return said, shown, [] if name else [_PLAIN, *over_patches]


def _image_size(config: Mapping[str, Any], args: Mapping[str, Any], patch: int, where: str) -> Any:
    """In pixels, of the images that it was made for; None if the config does not tell.

    Raises:
      DataError: the network pads images, where ours leaves out what is no whole patch.
    """
    shape = (config.get("pretrained_cfg") or {}).get("input_size")  # channels, height, width
    size: Any = args.get("img_size") or (shape[1:] if isinstance(shape, list) else None)
    if args.get("dynamic_img_pad") and size and any(n % patch for n in as_pair(size)):
        raise DataError(
            f"{where} has dynamic_img_pad=True: images of {as_pair(size)} are padded to whole "
            f"patches of {patch} pixels, where a plain ViT leaves the rest out"
        )
    return size or None


def _pooling(
    sayings: Sequence[Mapping[str, Any]],
    known: Mapping[str, Any],
    has: Callable[[str], bool],
    where: str,
) -> str:
    """The `pool` of our ViT: what the config says, else the architecture's name, else tensors.

    Args:
      sayings: the parts of the config that may say it; they must agree.
      known: see architectures.known_of.
      has: whether the file has a tensor of a name.
      where: see describe.

    Raises:
      DataError: one that our ViT does not have, or that contradicts the tensors.
    """
    has_map = has("attn_pool.latent")
    # Usually one; timm's own configs repeat it in several places.
    pools = sorted({s["global_pool"] for s in sayings if s.get("global_pool") is not None})
    for pool in pools:
        if pool not in _POOLS:
            raise DataError(f"{where} says that it pools by {pool!r}, not by {', '.join(_POOLS)}")
        if has_map and pool != "map":
            raise DataError(
                f"{where} says that it pools by {pool!r}, its tensors by attention (map)"
            )
    if len(pools) > 1:
        raise DataError(
            f"{where} says global_pool {' and '.join(map(repr, pools))}: correct it to the "
            "one that the network was trained with"
        )
    if pools:
        return _POOLS[pools[0]]
    # timm makes fc_norm where it pools by the mean, also beside a cls token.
    by_tensors = "tok" if has("cls_token") and not has("fc_norm.weight") else "gap"
    return "map" if has_map else known.get("pool") or by_tensors


def _check_arguments(config: Mapping[str, Any], args: Mapping[str, Any], where: str) -> None:
    """Raises DataError for arguments with which timm's network computes something else."""
    # timm reads model_args alone; what stands beside them may be meant as one of them.
    beside = {k: v for k, v in config.items() if k in _FIXED}
    for key in ("act_layer", "num_heads", "norm_epsilon"):
        if config.get(key) not in (None, args.get(key)):
            raise DataError(
                f"{where} has {key}={config[key]!r} beside model_args, where timm does not read "
                "it: move it into model_args, or take it out"
            )
    # An argument of which nothing is known may change what is computed, so it is refused.
    for key, value in (beside | dict(args)).items():
        if key in _FIXED:
            allowed, meaning = _FIXED[key]
            if value not in (allowed, None):
                raise DataError(f"{where} has {key}={value!r}: {meaning}")
        elif key not in (*_SHOWN, *_READ) and not _FREE.fullmatch(key):
            raise DataError(
                f"{where} has {key}={value!r} among the network's arguments, of which it is not "
                "known what it changes: take it out if the network computes the same without it"
            )


def _check_nameless(names: Iterable[str], has: Callable[[str], bool], wrapper: str) -> None:
    """Raises DataError where the names are as much another network's as a plain ViT's."""
    if explain_names(names):
        return  # it has a tensor that is refused later, for what it is
    # Of timm's plain networks some have no biases of queries, some have LayerScale or no cls token;
    # none of those without biases has LayerScale, or lacks the cls token.
    biased = any(re.search(r"attn\.qkv\.bias$", name) for name in names)
    normed_behind = has("blocks.0.ls1.gamma") or not has("cls_token")
    if has("pos_embed") and normed_behind and not biased:
        raise DataError(
            "it has LayerScale or no cls token, and no biases of queries, keys and values, as "
            "timm's networks that normalise behind attention and MLP (vit_*_rpn_*), which no "
            "tensor shows. Put the "
            'config.json that came with it beside it; {"architecture": "vit_base_patch16_224"} if '
            "it is a plain ViT"
        )
    # DeiT III's own files call LayerScale gamma_1 and are wrapped in {"model": ...}. timm calls it
    # ls1.gamma, and gamma_1 in its networks with rotary positions.
    if has("blocks.0.gamma_1") and has("pos_embed") and wrapper != "model":
        raise DataError(
            "its LayerScale is called gamma_1, as in DeiT III's own files and in timm's networks "
            "with rotary positions (vit_*_rope_ape_*), which these tensors do not tell apart. If "
            'it is DeiT III\'s, put {"architecture": "deit3_small_patch16_224"} into a config.json '
            "beside it"
        )


def _prefix_posembs(args: Mapping[str, Any], has: Callable[[str], bool]) -> tuple[str, ...]:
    """Which tokens before the patches may have positions, most likely first."""
    if args.get("no_embed_class") is not None and not has("dist_token"):
        return ("none",) if args["no_embed_class"] else ("all", "cls")
    if has("register_tokens"):
        return ("cls", "none", "all")
    return ("all", "cls", "none") if has("dist_token") else ("none", "all", "cls")


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


def _mlp_ratio(mlp_dim: int, width: int) -> float:
    """The ratio of which timm's int(width * ratio) makes mlp_dim."""
    ratio = mlp_dim / width
    # 7680 / 1664 times 1664 is 7679.999...: the next float above gives the whole number.
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def to_config(network: Mapping[str, Any], *, mean: Any, std: Any, labels: Any) -> dict[str, Any]:
    """The config.json with which timm.create_model("local-dir:FOLDER", pretrained=True) loads it.

    Args:
      network: of ViT.get_config().
      mean, std: of the images, in 0..1.
      labels: names of the classes, or nothing.
    """
    # _POOLS the other way round.
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
        "mlp_ratio": _mlp_ratio(network["mlp_dim"], network["width"]),
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
        # Any name of a plain ViT: model_args replace all its sizes.
        "architecture": "vit_base_patch16_224",
        "num_classes": network["num_classes"],
        "num_features": network["width"],
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [network["channels"], height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            # Together a plain resize; timm's own crop_mode would cut out the middle.
            "crop_pct": 1.0,
            "crop_mode": "squash",
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
