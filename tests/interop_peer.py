"""timm and transformers on CPU PyTorch, for test_interop.py; runs in an environment of its own.

interop_peer.py make FOLDER    random models: weights as files, logits on images, in logits.npz
interop_peer.py load FOLDER    loads what we exported there; logits in loaded.npz
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

# torchvision's compiled ops do not load beside a CPU build of torch from another source; timm and
# transformers need none of them here, so their registrations may do nothing.
_register_fake = torch.library.register_fake


def _lenient(op, *args, **kwargs):
    if isinstance(op, str) and op.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(op, *args, **kwargs)


torch.library.register_fake = _lenient
import timm  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models.vision_transformer import checkpoint_filter_fn  # noqa: E402

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
# name: (arguments of timm's VisionTransformer, other image sizes)
TIMM = {
    "tok_p16": ({"img_size": 64, "patch_size": 16}, [96, (64, 128)]),
    "tok_p32_wide": ({"img_size": (64, 128), "patch_size": 32}, [(96, 64)]),
    "deit3_p8": (
        {"img_size": 32, "patch_size": 8, "no_embed_class": True, "init_values": 0.1},
        [(48, 24)],
    ),
    "dinov2_p14": (
        {
            "img_size": 56,
            "patch_size": 14,
            "no_embed_class": True,
            "reg_tokens": 4,
            "init_values": 0.1,
        },
        [70, (28, 84)],
    ),
    "registers_with_positions": ({"img_size": 32, "patch_size": 8, "reg_tokens": 3}, [48]),
    "gap": ({"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg"}, [48]),
    "gap_with_cls": ({"img_size": 32, "patch_size": 8, "global_pool": "avg"}, [(24, 48)]),
    "gap_norm_before": (
        {
            "img_size": 32,
            "patch_size": 8,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        [],
    ),
    "map": ({"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "map"}, [48]),
    "no_qkv_bias": ({"img_size": 32, "patch_size": 8, "qkv_bias": False}, []),
    "s_width": (
        {"img_size": 96, "patch_size": 16, "embed_dim": 384, "num_heads": 6, "depth": 1},
        [],
    ),
    "b_width": (
        {"img_size": 96, "patch_size": 32, "embed_dim": 768, "num_heads": 12, "depth": 1},
        [],
    ),
    "ti_p16": (
        {
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 192,
            "num_heads": 3,
            "depth": 12,
            "num_classes": 1000,
        },
        [],
    ),
}
_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
_MLP = {"intermediate_size": 96}
HUGGINGFACE = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**_HF, **_MLP)),
    "vit_tanh": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**_HF, **_MLP, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3),
    ),
    "vit_pooler": (transformers.ViTModel, transformers.ViTConfig(**_HF, **_MLP)),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig(**_HF, **_MLP)),
    "dinov2": (
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config(**_HF, mlp_ratio=2),
    ),
    "dinov2_bare": (transformers.Dinov2Model, transformers.Dinov2Config(**_HF, mlp_ratio=2)),
    "dinov2_registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig(**_HF, mlp_ratio=2, num_register_tokens=4),
    ),
}
SIZES = {"vit": [48, (24, 40)], "dinov2": [48, (24, 40)], "dinov2_registers": [(24, 40)]}


def images_of(size):
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(height * 1000 + width)
    return rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            one_for_each = parameter.ndim == 1 and not name.endswith("bias")  # norms, LayerScale
            scale = 0.1 if parameter.ndim == 1 else 0.5 if "embed" in name else 0.08
            parameter.copy_(scale * draw + float(one_for_each))
    return model.eval()


@torch.no_grad()
def run(model, size, **options):
    out = model(torch.from_numpy(images_of(size)).permute(0, 3, 1, 2), **options)
    if isinstance(out, torch.Tensor):
        return out.numpy()
    for name in ("logits", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).numpy()
    return out.last_hidden_state[:, 0].numpy()


def make(folder: Path) -> None:
    found = {}
    for name, (arguments, sizes) in TIMM.items():
        arguments = {**SMALL, **arguments}
        model = randomize(timm.models.vision_transformer.VisionTransformer(**arguments))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        found[f"{name}@{arguments['img_size']}"] = run(model, arguments["img_size"])
        for size in sizes:
            square = arguments["img_size"]  # timm resamples from square grids alone
            other = timm.models.vision_transformer.VisionTransformer(
                **{**arguments, "img_size": size}
            )
            if isinstance(square, int):
                other.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), other))
                found[f"{name}@{size}"] = run(other.eval(), size)
    _make_pth(folder, found)
    for name, (kind, config) in HUGGINGFACE.items():
        model = randomize(kind(config))
        model.save_pretrained(folder / name)
        found[f"{name}@32"] = run(model, 32)
        for size in SIZES.get(name, []):
            options = {"interpolate_pos_encoding": True} if name == "vit" else {}
            found[f"{name}@{size}"] = run(model, size, **options)
    np.savez(folder / "logits.npz", **found)


def _make_pth(folder: Path, found: dict) -> None:
    model = timm.models.vision_transformer.VisionTransformer(**SMALL, img_size=32, patch_size=8)
    state = randomize(model).state_dict()
    found["pth@32"] = run(model, 32)
    torch.save(state, folder / "state.pth")
    torch.save({"model": state, "epoch": 3}, folder / "wrapped.pth")
    doubled = {k: 2 * v for k, v in state.items()}
    torch.save({"state_dict": doubled, "state_dict_ema": state}, folder / "ema.pth")
    torch.save({f"module.{k}": v.half() for k, v in state.items()}, folder / "half.pth")
    views = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}
    torch.save({k: torch.nn.Parameter(v) for k, v in views.items()}, folder / "strided.pth")
    torch.save({"model": state, "args": Namespace(lr=1)}, folder / "unsafe.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    bfloat16 = {k: v.bfloat16() for k, v in state.items()}
    save_file(bfloat16, folder / "bfloat16.safetensors")
    model.load_state_dict({k: v.float() for k, v in bfloat16.items()})
    found["bfloat16@32"] = run(model, 32)


def load(folder: Path) -> None:
    found = {}
    for path in sorted(folder.iterdir()):
        kind = path.name.partition("-")[0]
        size = json.loads((folder / "sizes.json").read_text()).get(path.name)
        if kind == "timm":
            model = timm.create_model(f"local-dir:{path}", pretrained=True)
        elif kind == "npz":
            arguments = {**SMALL, "img_size": size, "patch_size": 8, "act_layer": "gelu_tanh"}
            model = timm.models.vision_transformer.VisionTransformer(**arguments)
            model.load_pretrained(str(path))
        elif kind == "huggingface":
            name = json.loads((path / "config.json").read_text())["architectures"][0]
            model, report = getattr(transformers, name).from_pretrained(
                path, output_loading_info=True
            )
            missing = [k for k in report["missing_keys"] if "mask_token" not in k]
            assert not missing and not report["unexpected_keys"], report
        else:
            continue
        found[path.name] = run(model.eval(), tuple(size))
    np.savez(folder / "loaded.npz", **found)


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
