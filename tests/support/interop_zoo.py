"""Networks of timm and transformers that look like a ViT, small and random: test_interop_zoo.py.

interop_zoo.py FOLDER [NAME ...]   folders with weights and config.json; logits in logits.npz, what
                                   they are in made.json. All that timm has, or those of these names

Runs in the environment that has PyTorch; its PYTHONPATH holds benchmarks/, for _torch_alone.
"""

import json
import re
import sys
from pathlib import Path

import _torch_alone  # noqa: F401  before timm

# isort: split
import numpy as np
import timm
import torch
import transformers
from interop_peer import images_of, randomize, run
from safetensors.torch import save_file

# Modules of timm whose networks have patches and blocks named as a ViT's.
MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# The arguments of transformers' configs; a model takes those that it has.
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
DECODER = {f"decoder_{k}": 32 for k in ("hidden_size", "intermediate_size")}
DECODER |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
# Class of transformers -> further arguments of its config.
TRANSFORMERS = {
    "ViTForImageClassification": {},
    "ViTModel": {},
    "ViTForMaskedImageModeling": {"encoder_stride": 8},
    "DeiTForImageClassification": {},
    "DeiTForImageClassificationWithTeacher": {},
    "DeiTForMaskedImageModeling": {"encoder_stride": 8},
    "Dinov2ForImageClassification": {"mlp_ratio": 2},
    "Dinov2Backbone": {"mlp_ratio": 2},
    "Dinov2WithRegistersForImageClassification": {"mlp_ratio": 2},
    "ViTMAEForPreTraining": {**DECODER, "mask_ratio": 0.0},
    "ViTMAEModel": {"mask_ratio": 0.0},
    "ViTMSNForImageClassification": {},
    "IJepaForImageClassification": {},
    "IJepaModel": {},
    "DINOv3ViTModel": {},
    "BeitForImageClassification": {},
    "Data2VecVisionForImageClassification": {},
    "YolosForObjectDetection": {"image_size": [32, 32], "num_detection_tokens": 5},
    "SiglipVisionModel": {},
    "Siglip2VisionModel": {},
    "CLIPVisionModel": {},
    "VitDetModel": {},
    "ASTForAudioClassification": {"num_mel_bins": 32, "max_length": 32},
    "DPTForDepthEstimation": {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8, 8, 8]},
    "SwinForImageClassification": {},
    "VivitForVideoClassification": {},
    "VideoMAEForVideoClassification": {},
    "SamVisionModel": {},
    "Aimv2VisionModel": {},
}
# The same with other settings that leave no tensor.
VARIED = {
    "ViT, tanh": ("ViTForImageClassification", {"hidden_act": "gelu_new"}),
    "ViT, relu": ("ViTForImageClassification", {"hidden_act": "relu"}),
    "ViT, quick_gelu": ("ViTForImageClassification", {"hidden_act": "quick_gelu"}),
    "ViT, epsilon": ("ViTForImageClassification", {"layer_norm_eps": 1e-2}),
    "ViT, no biases": ("ViTForImageClassification", {"qkv_bias": False}),
    "ViT, pooler": ("ViTModel", {"pooler_act": "relu"}),
    "ViT, six heads": ("ViTForImageClassification", {"num_attention_heads": 6}),
    "DINOv2, SwiGLU": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
}


def main(folder: Path, names: list[str]) -> None:
    """Makes all of them; one that cannot be made so small is noted with its error."""
    found, made = {}, {}
    every = sorted(name for module in MODULES for name in timm.list_models(module=module))
    assert set(names) <= set(every), set(names) - set(every)
    for name in names or every:
        _make_timm(folder / name, name, found, made)
    for name in TRANSFORMERS:
        _make_transformers(folder / name, name, {}, found, made)
    for name, (kind, options) in VARIED.items():
        _make_transformers(folder / name, kind, options, found, made)
    np.savez(folder / "logits.npz", **found)
    (folder / "made.json").write_text(json.dumps(made))


def _make_timm(folder: Path, name: str, found: dict, made: dict) -> None:
    arguments = dict(SMALL)
    if re.search(r"_r\d*_s\d+|resnet|_mci_", name):
        # The patches of a hybrid are what its convolutions leave of images of its own size.
        arguments = {k: SMALL[k] for k in ("embed_dim", "num_heads")} | {"depth": 1}
    if name.startswith("samvit"):
        arguments = {**SMALL, "img_size": 64, "global_attn_indexes": ()}
    try:
        model = timm.create_model(name, num_classes=7, **arguments)
    except Exception as error:  # timm's own, such as arguments that two of its classes disagree on
        made[name] = {"error": str(error)}
        return
    randomize(model)
    size = getattr(model.patch_embed, "img_size", None) or (32, 32)
    model.eval()
    logits = run(model, tuple(size))
    blocks = getattr(model, "blocks", None)
    made[name] = {
        "class": type(model).__name__,
        "block": type(blocks[0]).__name__,
        "act": next((type(m).__name__ for n, m in blocks.named_modules() if n.endswith("act")), ""),
    }
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    config = {"architecture": name, "num_classes": 7, "model_args": arguments}
    if isinstance(model.global_pool, str) and model.global_pool:
        config["global_pool"] = model.global_pool
    (folder / "config.json").write_text(json.dumps(config))
    found[name] = logits if "Distilled" not in type(model).__name__ else _features(model, size)


@torch.no_grad()
def _features(model, size):
    """Of a model whose two heads we leave out: the cls token, normalised."""
    images = torch.from_numpy(images_of(tuple(size))).permute(0, 3, 1, 2)
    return model.forward_features(images)[:, 0].numpy()


def _make_transformers(folder: Path, kind: str, options: dict, found: dict, made: dict) -> None:
    try:
        model_class = getattr(transformers, kind)
        config = model_class.config_class(**{**SIZES, **TRANSFORMERS[kind], **options})
        model = randomize(model_class(config))
    except Exception as error:  # transformers' own: sizes that do not fit this network
        made[folder.name] = {"error": str(error)}
        return
    model.save_pretrained(folder)
    made[folder.name] = {"class": kind}
    outputs = _outputs(model, kind)
    if outputs is not None:
        found[folder.name] = outputs


@torch.no_grad()
def _outputs(model, kind):
    """Logits, or the features of an encoder whose heads we leave out; None if neither is ours."""
    images = torch.from_numpy(images_of(32)).permute(0, 3, 1, 2)
    if kind in ("DeiTForImageClassificationWithTeacher", "DeiTForMaskedImageModeling"):
        return model.deit(images).last_hidden_state[:, 0].numpy()
    if kind in ("ViTForMaskedImageModeling", "ViTMAEForPreTraining"):
        return model.vit(images).last_hidden_state[:, 0].numpy()
    if kind == "ViTMAEModel":
        return model(images).last_hidden_state[:, 0].numpy()
    if kind == "IJepaModel":
        return model(images).last_hidden_state.mean(1).numpy()
    if kind == "Dinov2Backbone":
        return None
    try:
        return run(model, 32)
    except Exception:  # takes videos, sounds, several sizes: nothing that we would read
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
