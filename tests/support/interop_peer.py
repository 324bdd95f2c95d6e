"""timm and transformers on CPU PyTorch, for test_interop*.py; runs in an environment of its own.

interop_peer.py make FOLDER     small random models: weights as files, their logits in logits.npz
interop_peer.py full FOLDER     the same of S and B in full depth
interop_peer.py load FOLDER     loads what we exported there; logits in loaded.npz
interop_peer.py prepare FOLDER  an image as timm prepares it for a folder of ours; in prepared.npy
interop_peer.py surgery FOLDER  timm's and transformers' resampling of weights, in surgery.npz

Its PYTHONPATH holds benchmarks/, for _torch_alone.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import _torch_alone  # noqa: F401  before timm

# isort: split
import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

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
# In full depth: every patch size, over both widths; native size, and others.
S = {"embed_dim": 384, "num_heads": 6, "depth": 12, "num_classes": 1000}
B = {"embed_dim": 768, "num_heads": 12, "depth": 12, "num_classes": 1000}
FULL_TIMM = {
    "s8": ({**S, "img_size": 64, "patch_size": 8}, [(48, 96)]),
    "s16": ({**S, "img_size": 224, "patch_size": 16}, [(160, 256), 288]),
    "b32": ({**B, "img_size": 224, "patch_size": 32}, [(256, 192)]),
    "b14_registers": (
        {
            **{**B, "img_size": 98, "patch_size": 14},
            **{"no_embed_class": True, "reg_tokens": 4, "init_values": 0.1},
        },
        [(70, 126)],
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
_FULL = {"num_hidden_layers": 12, "num_labels": 1000}
_S = {**_FULL, "hidden_size": 384, "num_attention_heads": 6}
_B = {**_FULL, "hidden_size": 768, "num_attention_heads": 12}
FULL_HUGGINGFACE = {
    "vit_s16": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**_S, intermediate_size=1536, image_size=224, patch_size=16),
    ),
    "vit_b32": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**_B, intermediate_size=3072, image_size=224, patch_size=32),
    ),
    "dinov2_b14_registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig(
            **_B, image_size=98, patch_size=14, num_register_tokens=4
        ),
    ),
}
SIZES = {"vit": [48, (24, 40)], "dinov2": [48, (24, 40)], "dinov2_registers": [(24, 40)]}
SIZES |= {"vit_s16": [(160, 256)], "vit_b32": [(256, 192)], "dinov2_b14_registers": [(70, 126)]}


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
    _make_timm(folder, TIMM, found)
    _make_pth(folder, found)
    _make_huggingface(folder, HUGGINGFACE, found)
    np.savez(folder / "logits.npz", **found)


def full(folder: Path) -> None:
    found = {}
    _make_timm(folder, FULL_TIMM, found)
    _make_huggingface(folder, FULL_HUGGINGFACE, found)
    np.savez(folder / "logits.npz", **found)


def _make_timm(folder: Path, table: dict, found: dict) -> None:
    for name, (arguments, sizes) in table.items():
        arguments = {**SMALL, **arguments}
        model = randomize(VisionTransformer(**arguments))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        found[f"{name}@{arguments['img_size']}"] = run(model, arguments["img_size"])
        for size in sizes:
            square = arguments["img_size"]  # timm resamples from square grids alone
            other = VisionTransformer(**{**arguments, "img_size": size})
            if isinstance(square, int):
                other.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), other))
                found[f"{name}@{size}"] = run(other.eval(), size)


def _make_huggingface(folder: Path, table: dict, found: dict) -> None:
    for name, (kind, config) in table.items():
        model = randomize(kind(config))
        model.save_pretrained(folder / name)
        found[f"{name}@{config.image_size}"] = run(model, config.image_size)
        for size in SIZES.get(name, []):
            options = {"interpolate_pos_encoding": True} if name.startswith("vit") else {}
            found[f"{name}@{size}"] = run(model, size, **options)


def _make_pth(folder: Path, found: dict) -> None:
    model = VisionTransformer(**SMALL, img_size=32, patch_size=8)
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
    found, exported = {}, json.loads((folder / "exported.json").read_text())
    for path in sorted(folder.iterdir()):
        kind = path.name.partition("-")[0]
        size, arguments = exported.get(path.name, (None, None))
        if kind == "timm":
            model = timm.create_model(f"local-dir:{path}", pretrained=True)
        elif kind == "npz":
            model = VisionTransformer(**arguments, img_size=size, act_layer="gelu_tanh")
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


def prepare(folder: Path) -> None:
    """image.png as timm prepares it for the folder "timm", (height, width, 3), in prepared.npy."""
    config = json.loads((folder / "timm" / "config.json").read_text())
    settings = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    image = Image.open(folder / "image.png").convert("RGB")
    prepared = timm.data.create_transform(**settings)(image)
    np.save(folder / "prepared.npy", prepared.numpy().transpose(1, 2, 0))


def surgery(folder: Path) -> None:
    """What timm and transformers make of the arrays in given.npz; a key says what was asked."""
    found = {}
    for key, array in np.load(folder / "given.npz").items():
        what, *options = key.split()
        given = torch.from_numpy(array)
        if what == "kernel":
            size = int(options[0])
            made = resample_patch_embed(given, [size, size], "bilinear", antialias=False)
        elif what == "channels":
            made = adapt_input_conv(int(options[0]), given)
        elif what == "timm":
            method, antialias, *grids = options
            old, new = np.array(grids, int).reshape(2, 2).tolist()
            made = resample_abs_pos_embed(
                given, new, old, 2, interpolation=method, antialias=antialias == "antialias"
            )
        else:
            made = _transformers_positions(given, *map(int, options))
        found[key] = made.numpy()
    np.savez(folder / "surgery.npz", **found)


@torch.no_grad()
def _transformers_positions(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    side = round((table.shape[1] - 1) ** 0.5)
    config = transformers.ViTConfig(
        hidden_size=table.shape[2], image_size=side * 8, patch_size=8, num_attention_heads=1
    )
    embeddings = transformers.ViTModel(config).embeddings
    embeddings.position_embeddings.copy_(table)
    patches = torch.zeros(1, 1 + rows * columns, table.shape[2])
    return embeddings.interpolate_pos_encoding(patches, rows * 8, columns * 8)


if __name__ == "__main__":
    modes = {"make": make, "full": full, "load": load, "prepare": prepare, "surgery": surgery}
    modes[sys.argv[1]](Path(sys.argv[2]))
