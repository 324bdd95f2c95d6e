"""Exact sizes of every variant, and models that cannot be."""

import math

import pytest
import tensorflow as tf

from vit_dist.model.variants import SIZES, parse_variant, vit_config
from vit_dist.model.vit import ViT

# 224 x 224 pixels (mu: 8), cls token, 1000 classes. Ti to L, g and G are what timm counts in its
# vit_{tiny,small,base,large,giant,gigantic}_patch*_224, H in vit_huge_patch14_224 with a head for
# 1000 classes; M, So400m, e and mu what its VisionTransformer counts when given these sizes.
NUM_PARAMS = {
    "mu/4": 47_528,
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "M/16": 38_837_736,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "So400m/14": 413_597_656,
    "H/14": 632_045_800,
    "g/14": 1_012_611_432,
    "G/14": 1_844_440_680,
    "e/14": 3_807_214_312,
}


def count_params(config):
    """Counted at depth 1 and 2, in a graph that is never run: e/14 would take 15 GB."""
    counts = []
    for depth in (1, 2):
        with tf.Graph().as_default():
            model = ViT(**{**config, "depth": depth})
            model.build()
            counts.append(sum(math.prod(v.shape) for v in model.weights))
    first, second = counts
    return first + (config["depth"] - 1) * (second - first)


@pytest.mark.parametrize(("variant", "expected"), NUM_PARAMS.items())
def test_number_of_parameters(variant, expected):
    size = 8 if variant == "mu/4" else 224
    assert count_params(vit_config(variant, image_size=size, num_classes=1000, pool="tok")) == (
        expected
    )


def test_every_size_is_counted():
    assert {variant.split("/")[0] for variant in NUM_PARAMS} == set(SIZES)


# What an option adds to Ti/16 with a cls token (width 192, 196 patches, 1000 classes).
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"pool": "gap"}, -2 * 192),  # neither the token nor its position
        ({"pool": "none"}, -2 * 192),
        # The probe, q k v and out, LN, two dense layers.
        ({"pool": "map"}, -192 + 4 * 193 * 192 + 2 * 192 + 193 * 768 + 769 * 192),
        ({"posemb": "sincos2d"}, -197 * 192),
        ({"rep_size": -1}, 192 * 192 + 192),
        ({"rep_size": 64}, 192 * 64 + 64 - 1000 * (192 - 64)),
        ({"layer_scale": 1e-4}, 12 * 2 * 192),
        ({"qkv_bias": False}, -12 * 3 * 192),
        ({"num_classes": 0}, -193 * 1000),
    ],
)
def test_number_of_parameters_by_option(options, more):
    options = {"num_classes": 1000, "pool": "tok", **options}
    config = vit_config("Ti/16", image_size=224, **options)
    assert count_params(config) == NUM_PARAMS["Ti/16"] + more


def test_number_of_parameters_of_the_imagenet21k_checkpoint():
    config = vit_config("B/16", image_size=224, num_classes=21843, pool="tok", rep_size=-1)
    assert count_params(config) == 103_186_515


def test_sizes_can_be_replaced():
    sizes = {"width": 24, "depth": 3, "mlp_dim": 40, "num_heads": 4}
    config = vit_config("S/8", image_size=(16, 24), num_classes=2, rep_size=-1, **sizes)
    assert {**config, **sizes, "patch_size": 8, "rep_size": 24, "image_size": (16, 24)} == config


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("S", {}, "variant 'S' is not size/patch"),
        ("XL/16", {}, "sizes: mu, Ti, S"),
        ("s/16", {}, "variant 's/16'"),
        ("S/0", {}, "variant 'S/0'"),
        ("S/16", {"image_size": 40}, "images of 40x40 cannot .* 16x16.*multiple of 16"),
        ("S/16", {"image_size": (32, 40)}, "images of 32x40"),
        ("S/16", {"image_size": 0}, "images of 0x0"),
        ("S/16", {"num_heads": 5}, "width 384 is not divisible by num_heads 5"),
        ("S/16", {"pool": "cls"}, "pool 'cls' is unknown; allowed: tok, gap, tok_gap, map, none"),
        ("S/16", {"posemb": "rope"}, "posemb 'rope' is unknown"),
        ("S/16", {"gelu": "exact"}, "gelu 'exact' is unknown; allowed: tanh, erf"),
        ("S/16", {"dropout": 1.0}, "dropout is a probability below 1, got 1.0"),
        ("S/16", {"attention_dropout": -0.1}, "attention_dropout is a probability"),
        ("S/16", {"drop_path": 2}, "drop_path is a probability below 1, got 2"),
        ("S/16", {"posemb": "sincos2d", "width": 18}, "divisible by 4 and at least 8, got 18"),
        ("S/16", {"depth": 0}, "depth must be 1 or more, got 0"),
        ("S/16", {"mlp_dim": -4}, "mlp_dim must be 1 or more, got -4"),
        ("S/16", {"num_heads": 0}, "num_heads must be 1 or more, got 0"),
        ("S/16", {"width": 0}, "width must be 1 or more, got 0"),
        ("S/16", {"num_classes": -1}, "num_classes must be 0 or more, got -1"),
        ("S/16", {"rep_size": -2}, "rep_size must be 0 or more, got -2"),
    ],
)
def test_impossible_models(variant, options, message):
    with pytest.raises(ValueError, match=message):
        vit_config(variant, **{"image_size": 32, "num_classes": 5, **options})


def test_variants_parse():
    assert parse_variant("S/16") == {**SIZES["S"], "patch_size": 16}
