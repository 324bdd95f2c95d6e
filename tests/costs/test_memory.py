"""Memory before a run: state counted as it is made, activations as a TPU's compiler has them."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.support.networks import tiny_config
from vit_dist.costs.memory import activation_bytes, count_state, step_memory
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.optimizer import NAMES, OptimizerOptions, make_optimizer
from vit_dist.training.sharding import Remote
from vit_dist.training.state import TrainState

DOCS = Path(__file__).resolve().parents[2] / "docs"


def nbytes(variable):
    return int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size


@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_a_run_makes(name):
    network = tiny_config()
    options = OptimizerOptions(
        name=name, momentum_dtype="bfloat16", lr_multipliers=(("embedding", 0.0),)
    )
    state = count_state(network, options, ema=True)
    model, ema = build_vit(network), build_vit(network)
    optimizer = make_optimizer(named_weights(model), options, num_heads=network["num_heads"])
    made = TrainState(model, optimizer, ema).variables()
    sums = dict.fromkeys(("model", "optimizer", "ema"), 0)
    for key, variable in made.items():
        part = key.partition("/")[0]
        if part in sums:
            sums[part] += nbytes(variable)
    assert (state.weights, state.optimizer, state.average) == tuple(sums.values())
    assert state.parameters == model.count_params()
    frozen = sum(nbytes(v) for k, v in named_weights(model).items() if "embedding" in k)
    assert state.gradients == state.weights - frozen
    assert sum(state.owned.values()) == state.optimizer


def test_sharded_state_is_the_fullest_replicas(cpus):
    network, options = tiny_config(), OptimizerOptions(shard_state=True)
    state = count_state(network, options, ema=False)
    strategy = tf.distribute.MirroredStrategy(cpus[:2])
    with strategy.scope():
        model = build_vit(network)
    optimizer = make_optimizer(named_weights(model), options, strategy=strategy)
    loads = [0, 0]
    for name, slot in optimizer.slots.items():
        assert not isinstance(slot, Remote)
        loads[optimizer.shards.owners[name.rpartition("/")[0]]] += nbytes(slot)
    found = step_memory(
        network, state, batch_size=4, precision="float32", num_devices=2, shard_state=True
    )
    assert found.optimizer == max(loads) < state.optimizer


def compiled():
    """(variant, pixels, megabytes) of docs/benchmarks.md: what a TPU's compiler says."""
    text = (DOCS / "benchmarks.md").read_text()
    rows = re.findall(r"^\| (\w+/\d+)(?: at (\d+) px)? \| (\d+) MB", text, re.M)
    assert len(rows) == 4
    return [(name, int(pixels or 224), int(megabytes)) for name, pixels, megabytes in rows]


def estimate(variant, *, image_size=224, batch_size=32, kind="TPU", **model):
    sizes = {"image_size": image_size, "num_classes": 1000}
    network = vit_config(variant, **sizes, softmax="compute", **model)
    options = {"batch_size": batch_size, "precision": "bfloat16", "kind": kind}
    return activation_bytes(network, trained=None, **options) / 1e6


@pytest.mark.parametrize(("variant", "pixels", "megabytes"), compiled())
def test_activations_are_near_those_of_a_tpus_compiler(variant, pixels, megabytes):
    assert 1 <= estimate(variant, image_size=pixels) / megabytes < 1.15


def test_the_page_has_these_estimates():
    page = (DOCS / "plan.md").read_text()
    found = re.findall(
        r"^\| (\S+) at (\d+)(?:, remat (\w+))?(|, accumulation \d+)"
        r" \| (\d+) MB \| (\d+) MB \| ([\d.]+) \|$",
        page,
        re.M,
    )
    assert len(found) == 7
    for variant, pixels, remat, other, real, shown, ratio in found:
        if not other:
            value = estimate(variant, image_size=int(pixels), remat=remat or "none")
            assert round(value) == int(shown)
        assert f"{int(shown) / int(real):.2f}" == ratio


def test_activations_are_near_those_of_an_h200():
    row = r"^\| (\S+) at (\d+), batch (\d+) \| (\d+) MB \| (\d+) MB \| ([\d.]+) \|$"
    found = re.findall(row, (DOCS / "plan.md").read_text(), re.M)
    assert len(found) == 4
    for variant, pixels, images, real, shown, ratio in found:
        value = estimate(variant, image_size=int(pixels), batch_size=int(images), kind="GPU")
        assert round(value) == int(shown) and f"{value / int(real):.2f}" == ratio
        assert 1 <= value / int(real) < 1.02


def test_what_saves_memory():
    plain = estimate("Ti/16")
    assert estimate("Ti/16", remat="full") < estimate("Ti/16", remat="attention") < plain
    assert estimate("Ti/16", attention_block=64) < plain
    assert estimate("Ti/16", batch_size=16) == plain / 2
    network = vit_config("Ti/16", image_size=224, num_classes=1000)
    head = activation_bytes(network, ["head/kernel"], batch_size=32, precision="bfloat16") / 1e6
    # A frozen backbone keeps nothing of its blocks.
    assert head < 0.03 * plain


def test_micro_batches_keep_the_sum_of_gradients():
    network = tiny_config()
    state = count_state(network, OptimizerOptions(), ema=False)
    options = {"batch_size": 8, "precision": "float32"}
    one = step_memory(network, state, **options)
    four = step_memory(network, state, accumulation=4, **options)
    assert four.activations == one.activations // 4 + state.gradients
    assert four.batch == one.batch == 2 * 8 * 16 * 8 * 3
    assert one.total == (
        one.weights + one.optimizer + one.batch + max(one.activations, one.gradients)
    )
