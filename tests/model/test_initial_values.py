"""Initial values, and configs and files from which the same layers come back."""

import inspect
import json
import re

import keras
import numpy as np
import pytest

from tests.support.networks import arrays_of, images_for, tiny_config, tiny_vit
from vit_dist.model import dropout as dropout_lib
from vit_dist.model import layers as layers_lib
from vit_dist.model import norm as norm_lib
from vit_dist.model.layers import (
    Attention,
    Dropout,
    DropPath,
    EncoderBlock,
    LayerScale,
    Linear,
    MapHead,
    Mlp,
    PatchEmbedding,
)
from vit_dist.model.norm import LayerNorm
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import ViT, build_vit, named_weights

SEED = (3, 7)


def is_constant(value):
    return lambda x: np.all(x == np.float32(value))


def is_xavier(x):
    """Uniform up to the bound of the flattened matrix."""
    bound = np.sqrt(6 / (np.prod(x.shape[:-1]) + x.shape[-1]))
    near = np.isclose(x.std(), bound / np.sqrt(3), rtol=4 * np.sqrt(0.2 / x.size))
    return near and 0.9 * bound < np.abs(x).max() <= bound


def is_lecun(x):
    """Normal, cut at two deviations, and wider by what the cut takes away."""
    stddev = np.sqrt(1 / np.prod(x.shape[:-1]))
    cut = 2 * stddev / 0.8796256610342398
    return np.isclose(x.std(), stddev, rtol=0.1) and 0.9 * cut < np.abs(x).max() <= cut


def is_normal(stddev):
    return lambda x: np.isclose(x.std(), stddev, rtol=0.2) and np.abs(x).max() > 2 * stddev


INITIAL = {
    r"cls|.*/beta|head/kernel": is_constant(0),
    r"head/bias": is_constant(-6.9),
    r".*norm(_\d)?/gamma": is_constant(1),
    r".*/layer_scale_\d/gamma": is_constant(1e-4),
    r"(embedding|pre_logits)/kernel": is_lecun,
    r"pos_embedding": is_normal(0.125),
    r".*/mlp/dense_\d/bias": is_normal(1e-6),
    r".*/attention/(query|key|value|out)/kernel|.*/mlp/dense_\d/kernel|map_head/probe": is_xavier,
    r"(embedding|pre_logits|.*/attention/\w+)/bias": is_constant(0),
}
INITIAL_CONFIG = {
    "image_size": 16, "num_classes": 5, "width": 64, "rep_size": 48, "layer_scale": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("pool", ["tok", "map"])
def test_initial_values(pool):
    config = vit_config("mu/4", pool=pool, **INITIAL_CONFIG)
    model = build_vit(config, head_bias=-6.9, posemb_stddev=0.125)
    used = set()
    for name, variable in named_weights(model).items():
        (pattern,) = [p for p in INITIAL if re.fullmatch(p, name)]
        used.add(pattern)
        assert INITIAL[pattern](variable.numpy()), name
    assert pool == "map" or used == set(INITIAL)


def test_initial_values_depend_on_seed_and_name_alone():
    config = tiny_config(pool="tok", rep_size=8)
    first = arrays_of(build_vit(config, seed=1))
    keras.utils.set_random_seed(99)  # no global generator has a part in it
    again = arrays_of(build_vit(config, seed=1))
    other = arrays_of(build_vit(config, seed=2))
    deeper = arrays_of(build_vit({**config, "depth": 3, "layer_scale": 0.5}, seed=1))
    drawn = 0
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(value, deeper[name])
        if value.std() > 0:
            assert not np.any(value == other[name]), name
            drawn += 1
    assert drawn == 1 + 1 + 1 + 2 * 8  # patches, positions, representation, blocks
    same_shape = [v for n, v in first.items() if re.search(r"(query|key|value|out)/kernel", n)]
    assert len({v.tobytes() for v in same_shape}) == 8


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision 'float64' is unknown; allowed: float32"):
        build_vit(tiny_config(), precision="float64")


# Configs

LAYERS = [
    Dropout(0.3, form="tensor", name="a"),
    DropPath(0.2, name="b"),
    LayerScale(0.5, name="c"),
    PatchEmbedding(8, (4, 2), form="tensor", name="d"),
    Attention(
        4,
        qkv_bias=False,
        dropout=0.1,
        softmax="compute",
        recompute=True,
        block_size=3,
        form="tensor",
        name="e",
    ),
    Mlp(12, gelu="erf", dropout=0.4, form="tensor", name="f"),
    EncoderBlock(
        num_heads=2,
        hidden=12,
        gelu="erf",
        qkv_bias=False,
        dropout=0.1,
        attention_dropout=0.2,
        drop_path=0.3,
        layer_scale=0.4,
        recompute_attention=True,
        recompute_mlp=True,
        attention_block=3,
        softmax="compute",
        norm_epsilon=1e-5,
        form="tensor",
        name="g",
        dtype="mixed_bfloat16",
    ),
    MapHead(num_heads=2, hidden=12, gelu="erf", norm_epsilon=1e-5, form="tensor", name="h"),
    Linear(6, form="tensor", name="i"),
    LayerNorm(form="tensor", name="j"),
]
ODD_VIT = {
    "pool": "map",
    "posemb": "sincos2d",
    "rep_size": 8,
    "dropout": 0.1,
    "attention_dropout": 0.2,
    "drop_path": 0.3,
    "layer_scale": 0.4,
    "gelu": "erf",
    "qkv_bias": False,
    "drop_path_growth": "constant",
    "remat": "full",
    "softmax": "compute",
    "cls_token": True,
    "registers": 2,
    "prefix_posemb": "all",
    "norm_epsilon": 1e-5,
    "norm_after_pool": True,
    "channels": 1,
}
# What does not go together.
VITS = [
    ViT(**tiny_config(**ODD_VIT), form="tensor"),
    ViT(**tiny_config(**{**ODD_VIT, "attention_dropout": 0.0, "attention_block": 3})),
]


@pytest.mark.parametrize("layer", [*LAYERS, *VITS], ids=repr)
def test_config_round_trip(layer):
    config = layer.get_config()
    parameters = inspect.signature(type(layer)).parameters.values()
    for p in parameters:
        if p.kind is not p.VAR_KEYWORD:
            values = [c.get_config()[p.name] for c in (layer, *VITS) if type(c) is type(layer)]
            assert set(values) != {p.default}, f"{p.name} is not in the config, or untested"
    again = type(layer).from_config(json.loads(json.dumps(config))).get_config()
    assert json.dumps(again) == json.dumps(config)


def test_every_layer_has_its_round_trip():
    classes = {
        c
        for module in (layers_lib, dropout_lib, norm_lib)
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, keras.Layer) and not c.__name__.startswith("_")
        if c.__init__.__module__.startswith("vit_dist.")  # Keras sees to what it made
    }
    assert classes == {type(layer) for layer in LAYERS}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keras_file_round_trip(tmp_path, precision):
    model = tiny_vit(pool="tok", rep_size=8, layer_scale=0.1, dropout=0.5, precision=precision)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    images = images_for(model)
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(loaded(images), model(images))
    # The masks are the same ones too.
    masked = [m(images, training=True, seed=SEED).numpy() for m in (model, loaded)]
    np.testing.assert_array_equal(*masked)
