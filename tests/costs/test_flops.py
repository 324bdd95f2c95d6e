"""FLOPs by layer against what XLA's program multiplies."""

import math
import re

import pytest

from tests.support.flops import BATCH, program
from tests.support.networks import tiny_config
from vit_dist.costs.flops import eval_flops, layer_flops, train_flops
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights

# Every product that a network may have.
NETWORKS = {
    "gap": {},
    "tok, registers": {"pool": "tok", "registers": 2, "rep_size": 8},
    "tok_gap, sincos2d": {"pool": "tok_gap", "posemb": "sincos2d", "qkv_bias": False},
    "map": {"pool": "map", "layer_scale": 0.5},
    "none": {"pool": "none", "channels": 1},
}
FURTHER = ("gap", "tok_gap, sincos2d")  # of products that the others have, too


def multiplied(hlo):
    """Operations of the products in a program's text that its results need: 2 x result x sums."""
    lines = {}
    for name, rest in re.findall(
        r"^ +(?:ROOT )?%?([\w.-]+) = (.*)", hlo[hlo.index("\nENTRY") :], re.M
    ):
        lines[name] = rest
    # The last line is the root. TensorFlow leaves in products whose results nobody uses.
    needed, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name in lines and name not in needed:
            needed.add(name)
            waiting += re.findall(r"%([\w.-]+)", lines[name])
    sizes = {name: shape_of(rest) for name, rest in lines.items()}
    total = 0
    for name in needed:
        found = re.search(r" dot\(.*?%([\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}", lines[name])
        if found:
            summed = [sizes[found[1]][int(axis)] for axis in found[2].split(",")]
            total += 2 * math.prod(sizes[name]) * math.prod(summed)
    return total


def shape_of(text):
    return [int(n) for n in re.match(r"\(?\w+\[([\d,]*)\]", text)[1].split(",") if n]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.exhaustive if name in FURTHER else [])
        for name, options in NETWORKS.items()
    ],
)
def test_every_product_of_a_step_is_counted_once(options):
    network = tiny_config(**options)
    assert BATCH * train_flops(network) == multiplied(program(network))


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"head", marks=pytest.mark.exhaustive),
        r"encoderblock_1/|^head",
        pytest.param(r"mlp/dense_1/|head/bias", marks=pytest.mark.exhaustive),
        r"attention/value/",
    ],
)
def test_frozen_layers_cost_only_what_others_need(pattern):
    network = tiny_config()
    names = named_weights(build_vit(network))
    trained = {name for name in names if re.search(pattern, name)}
    assert train_flops(network, trained=trained) < train_flops(network)
    assert BATCH * train_flops(network, trained=trained) == multiplied(
        program(network, trained=trained)
    )


# Of timm 1.0 (multiply-adds of forward, from its own counter), 224 px and 1,000 classes, in 1e9.
# https://github.com/huggingface/pytorch-image-models/blob/main/results
GMACS = {
    ("S/16", "tok"): 4.61,
    ("B/16", "tok"): 17.58,
    ("L/16", "tok"): 61.60,
    ("Ti/16", "tok"): 1.26,
}


@pytest.mark.parametrize("case", GMACS, ids=str)
def test_multiply_adds_are_those_that_are_published(case):
    variant, pool = case
    network = vit_config(variant, image_size=224, num_classes=1000, pool=pool)
    assert eval_flops(network) / 2e9 == pytest.approx(GMACS[case], rel=0.02)


def test_recomputation_is_not_counted():
    plain, full = tiny_config(), tiny_config(remat="full")
    assert layer_flops(plain) == layer_flops(full)
