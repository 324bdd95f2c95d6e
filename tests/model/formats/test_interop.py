"""Logits of timm's and transformers' ViTs, from their files; and of ours, in timm and transformers.

`make test-interop` makes the environment with PyTorch (.venv-interop) and runs this; without it the
tests are skipped.
"""

import ast
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support.interop import NEEDS_PEERS, run_peer
from tests.support.networks import randomize
from vit_dist.export import export
from vit_dist.model.formats.writing import prefix_posemb_for, write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run.origins import open_origin
from vit_dist.run.served import load_model, open_served

pytestmark = NEEDS_PEERS
TOLERANCE = 1e-4  # of the largest logit, float32
# What a bare file of timm's does not tell.
HEADS = {"s_width": 6, "b_width": 12, "s8": 6, "s16": 6, "b32": 12, "b14_registers": 12}
BEHIND = {"tok_p32_wide": (64, 128)}  # trained on images that are not square


def logits_of_peer(mode, folder):
    run_peer(mode, folder)
    with np.load(folder / "logits.npz") as logits:
        return dict(logits)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with files of random models, and their logits by "name@size"."""
    folder = tmp_path_factory.mktemp("made")
    return folder, logits_of_peer("make", folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The same of S and B in full depth; 1.2 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("full")
    yield folder, logits_of_peer("full", folder)
    shutil.rmtree(folder)


def assert_close(mine, theirs, name=""):
    assert mine.shape == theirs.shape
    error = np.abs(mine - theirs).max() / np.abs(theirs).max()
    assert error <= TOLERANCE, (name, error)


def images_of(size):
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(height * 1000 + width)
    return rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def logits_of(path, size, *, name="", method="bicubic_antialias"):
    origin = open_origin(str(path), image_size=BEHIND.get(name))
    told = {"num_heads": HEADS.get(name, 3), "gelu": "erf"}
    return load_model(origin, image_size=size, method=method, **told)(images_of(size)).numpy()


def cases(logits, names):
    for key, expected in logits.items():
        name, size = key.split("@")
        if name in names:
            yield name, ast.literal_eval(size), expected


def test_logits_of_timm(made):
    """Patches of 8, 14, 16 and 32, LayerScale, registers, every pooling; other resolutions."""
    folder, logits = made
    names = {path.stem for path in folder.glob("*.safetensors")} - {"bfloat16"}
    seen = 0
    for name, size, expected in cases(logits, names):
        assert_close(
            logits_of(folder / f"{name}.safetensors", size, name=name), expected, f"{name}@{size}"
        )
        seen += 1
    assert len(names) == 13 and seen > len(names)


def test_logits_of_transformers(made):
    folder, logits = made
    names = {path.parent.name for path in folder.glob("*/config.json")}
    for name, size, expected in cases(logits, names):
        method = "bicubic_antialias" if name == "dinov2_registers" else "bicubic"
        assert_close(logits_of(folder / name, size, method=method), expected, f"{name}@{size}")
    assert len(names) == 7


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["s8", "s16", "b32", "b14_registers"])
def test_full_depth_of_timm(full, name):
    """12 blocks of S and B, as saved and at other resolutions, one of them not square."""
    folder, logits = full
    found = list(cases(logits, {name}))
    assert len(found) > 1 and any(isinstance(size, tuple) for _, size, _ in found)
    for _, size, expected in found:
        mine = logits_of(folder / f"{name}.safetensors", size, name=name)
        assert_close(mine, expected, f"{name}@{size}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["vit_s16", "vit_b32", "dinov2_b14_registers"])
def test_full_depth_of_transformers(full, name):
    folder, logits = full
    found = list(cases(logits, {name}))
    assert len(found) > 1 and any(isinstance(size, tuple) for _, size, _ in found)
    for _, size, expected in found:
        method = "bicubic" if name.startswith("vit") else "bicubic_antialias"
        assert_close(logits_of(folder / name, size, method=method), expected, f"{name}@{size}")


@pytest.mark.parametrize("name", ["state", "wrapped", "ema", "half", "strided", "unsafe"])
def test_files_of_torch_save(made, name):
    folder, logits = made
    mine = logits_of(folder / f"{name}.pth", 32)
    if name == "half":
        assert np.abs(mine - logits["pth@32"]).max() < 0.02 * np.abs(mine).max()
    else:
        assert_close(mine, logits["pth@32"])


def test_bfloat16(made):
    folder, logits = made
    assert_close(logits_of(folder / "bfloat16.safetensors", 32), logits["bfloat16@32"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("legacy", "is a pickle, which could run any code.*weights_only=True"),
    ],
)
def test_what_could_run_code_is_refused(made, name, message):
    with pytest.raises(ValueError, match=message):
        open_origin(str(made[0] / f"{name}.pth"))


def test_a_model_taken_through_every_system_comes_back(made, tmp_path):
    """timm -> our .safetensors for timm -> again: the same bits."""
    folder, _ = made
    for name in ("deit3_p8", "dinov2_p14", "registers_with_positions", "gap_with_cls", "map"):
        first, second = folder / f"{name}.safetensors", tmp_path / f"{name}.safetensors"
        origin = open_origin(str(first))
        model = load_model(origin, num_heads=3, gelu="erf", system="timm")
        arrays = {n: v.numpy() for n, v in named_weights(model).items()}
        write_pretrained(second, "timm", arrays, model.get_config(), mean=[0.5], std=[0.5])
        again = open_origin(str(second))
        assert again.network["num_heads"] == 3 and again.network["gelu"] == "erf"
        assert set(again.tensors) == set(origin.tensors)
        for key, tensor in origin.tensors.items():
            np.testing.assert_array_equal(np.asarray(again.tensors[key]), np.asarray(tensor))


# What ours has -> the systems that have it too.
OURS = {
    "plain": ({"pool": "tok"}, ("timm", "huggingface", "npz")),
    "erf": ({"pool": "tok", "gelu": "erf", "norm_epsilon": 1e-12}, ("huggingface",)),
    "sincos": ({"pool": "tok", "posemb": "sincos2d"}, ("timm", "huggingface", "npz")),
    "rectangle": ({"pool": "tok", "image_size": (32, 16)}, ("timm", "huggingface")),
    "deit": ({"pool": "tok", "registers": 1, "prefix_posemb": "all"}, ("timm", "huggingface")),
    "dinov2": (
        {"pool": "tok_gap", "layer_scale": 0.1, "registers": 2, "gelu": "erf"},
        ("huggingface",),
    ),
    "dinov2_bare": (
        {"pool": "tok", "layer_scale": 0.1, "num_classes": 0},
        ("timm", "huggingface"),
    ),
    "features": ({"pool": "tok", "num_classes": 0, "rep_size": 48}, ("huggingface",)),
    "gap": ({"norm_after_pool": True, "qkv_bias": False}, ("timm",)),
    "map": ({"pool": "map", "registers": 2}, ("timm",)),
    "S16": (
        {"variant": "S/16", "pool": "tok", "image_size": (96, 64)},
        ("timm", "huggingface", "npz"),
    ),
}
SMALL = {"variant": "mu/8", "width": 48, "depth": 2, "num_heads": 3, "mlp_dim": 192}


def test_ours_in_timm_and_transformers(tmp_path):
    expected, exported = {}, {}
    for name, (options, systems) in OURS.items():
        options = {"image_size": 32, "num_classes": 7, **options}
        options = options if "variant" in options else {**SMALL, **options}
        config = vit_config(options.pop("variant"), **options)
        model = randomize(build_vit(config), scale=0.1)
        plain = {"embed_dim": model.width, "depth": model.depth, "num_heads": config["num_heads"]}
        plain |= {"patch_size": model.patch_size, "num_classes": model.num_classes}
        logits = model(images_of(model.image_size)).numpy()
        for system in systems:
            path = tmp_path / (f"{system}-{name}" + (".npz" if system == "npz" else ""))
            source = open_ours(model)
            ready = load_model(source, system=system)
            arrays = {n: v.numpy() for n, v in named_weights(ready).items()}
            half = {"mean": [0.5] * 3, "std": [0.5] * 3}
            write_pretrained(path, system, arrays, ready.get_config(), **half)
            expected[path.name] = logits
            exported[path.name] = list(model.image_size), plain
            assert ready.get_config()["prefix_posemb"] == prefix_posemb_for(system, config)
    (tmp_path / "exported.json").write_text(json.dumps(exported))
    run_peer("load", tmp_path)
    with np.load(tmp_path / "loaded.npz") as loaded:
        assert set(loaded) == set(expected)
        for name, logits in expected.items():
            assert_close(loaded[name], logits, name)


def test_timm_prepares_images_as_its_folder_says(tmp_path):
    """An oblong image is resized and not cut, as eval_pipe does it, to a grey level of rounding."""
    model = build_vit(vit_config(**SMALL, image_size=32, num_classes=7, pool="tok"))
    arrays = {n: v.numpy() for n, v in named_weights(model).items()}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    write_pretrained(tmp_path / "timm", "timm", arrays, model.get_config(), **half)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 60)).save(tmp_path / "image.png")
    run_peer("prepare", tmp_path)
    served, _ = open_served(str(tmp_path / "timm"))
    mine = served.prepare(tf.io.read_file(str(tmp_path / "image.png")))[None]
    theirs = np.load(tmp_path / "prepared.npy")
    np.testing.assert_allclose(served.pipe.device(mine)[0], theirs, atol=1.01 / 127.5)


def open_ours(model):
    """A model in memory as the origin that its checkpoint would be."""
    from vit_dist.run.origins import Origin

    arrays = {name: v.numpy() for name, v in named_weights(model).items()}
    return Origin(path="memory", tensors=arrays, network=model.get_config())


def test_the_command_writes_what_another_system_wrote(made, tmp_path):
    """From Hugging Face's folder to timm's."""
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    files = export(str(made[0] / "vit"), "timm", str(tmp_path / "out"), **imagenet)
    assert [file.name for file in files] == ["model.safetensors", "config.json"]
