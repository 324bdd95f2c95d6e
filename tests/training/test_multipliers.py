"""Which variables decay, how fast each learns, which are frozen: patterns and layer-wise decay."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.networks import tiny_config
from tests.support.tiny import make
from vit_dist.model.vit import build_vit, named_weights, weight_shapes
from vit_dist.run.check import check
from vit_dist.training.multipliers import check_names, depth_of, multiplier, rate_multipliers
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer

NAMES = (
    *("embedding/kernel", "cls", "pos_embedding", "encoderblock_0/norm_0/gamma"),
    *("encoderblock_11/mlp/dense_0/kernel", "encoder_norm/gamma", "pre_logits/kernel"),
    *("map_head/probe", "head/kernel", "head/bias"),
)


def test_the_first_match_wins():
    rules = (("^head/bias$", 3.0), ("^head/", 2.0), ("kernel$", 0.5), ("head", 7.0))
    found = {name: multiplier(rules, name, 1.0) for name in NAMES}
    assert found["head/bias"] == 3.0 and found["head/kernel"] == 2.0
    assert found["pre_logits/kernel"] == 0.5 and found["map_head/probe"] == 7.0
    assert found["cls"] == 1.0


def test_layer_decay_counts_as_beit_does():
    """L + 2 depths for L blocks. In timm the last norm learns like the last block."""
    assert [depth_of(name, 12) for name in NAMES] == [0, 0, 0, 1, 12, 13, 13, 13, 13, 13]
    found = rate_multipliers(NAMES, lr_multipliers=(("bias$", 2.0),), layer_decay=0.5)
    expected = [0.5**13] * 3 + [0.5**12, 0.5, 1, 1, 1, 1, 2.0]
    assert list(found.values()) == expected
    assert set(rate_multipliers(NAMES, lr_multipliers=(), layer_decay=None).values()) == {1.0}


def apply(optimizer, *, rate=0.1):
    ones = [tf.ones(v.shape) for v in optimizer.variables.values()]
    optimizer.apply(
        ones,
        learning_rate=tf.constant(rate),
        count=tf.constant(0, tf.int64),
        gate=tf.constant(True),
    )


def test_what_is_frozen_has_no_state_no_update_and_no_decay():
    model = build_vit(tiny_config(pool="tok", depth=2))
    variables = named_weights(model)
    before = {name: v.numpy() for name, v in variables.items()}
    optimizer = make_optimizer(
        variables,
        OptimizerOptions(
            weight_decay=0.5, lr_multipliers=(("^head/", 1.0), ("norm_1/", 0.1), (".", 0.0))
        ),
    )
    trained = {name for name in variables if name.startswith("head/") or "norm_1/" in name}
    assert set(optimizer.variables) == trained
    assert set(optimizer.slots) == {f"{n}/{s}" for n in trained for s in ("momentum", "velocity")}
    assert optimizer.decayed == {"head/kernel"}
    apply(optimizer)
    for name, variable in variables.items():
        moved = before[name] - variable.numpy()
        if name not in trained:
            assert not moved.any(), name
            continue
        # Adam's first update is the learning rate; the head's kernel begins at zero.
        expected = 0.1 if name.startswith("head/") else 0.01
        np.testing.assert_allclose(moved, np.full_like(moved, expected), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("scale", "decay", "lost"),
    [
        ("learning_rate", 0.2, {"a": 0.05 * 0.2, "b": 0.05 * 3 * 0.2, "c": 0.05 * 0.1}),
        # By the schedule alone: half of the peak, whatever the variable's own multiplier.
        ("schedule", 0.02, {"a": 0.5 * 0.02, "b": 0.5 * 0.02, "c": 0.5 * 0.01}),
    ],
)
@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor_vit"])
def test_both_conventions_of_decay(name, scale, decay, lost):
    variables = {k: keras.Variable(np.full((2,), 4.0, "f"), name=f"{k}_w") for k in "abcd"}
    optimizer = make_optimizer(
        variables,
        OptimizerOptions(
            name=name,
            learning_rate=0.1,
            weight_decay=decay,
            decay_scale=scale,
            decay_multipliers=(("[ab]", 1.0), ("c", 0.5)),
            lr_multipliers=(("b", 3.0),),
        ),
    )
    zeros = [tf.zeros(v.shape) for v in optimizer.variables.values()]
    optimizer.apply(
        zeros,
        learning_rate=tf.constant(0.05),
        count=tf.constant(0, tf.int64),
        gate=tf.constant(True),
    )
    for key, variable in variables.items():
        expected = 4.0 * (1 - lost.get(key, 0.0))
        np.testing.assert_allclose(variable.numpy(), np.full(2, expected, "f"), rtol=1e-6)


def test_the_conversion_from_big_vision():
    """1e-4 by the schedule alone is 0.1 times the learning rate, at a peak of 1e-3."""
    decays = []
    for options in ({"weight_decay": 0.1}, {"weight_decay": 1e-4, "decay_scale": "schedule"}):
        names = {"kernel": keras.Variable(np.ones((2,), "f"), name="kernel")}
        decays.append(
            make_optimizer(names, OptimizerOptions(learning_rate=0.001, **options)).decays["kernel"]
        )
    assert decays[0] == pytest.approx(decays[1])


@pytest.mark.parametrize("options", [{"pool": "tok"}, {"pool": "map", "layer_scale": 0.1}])
def test_names_are_known_without_a_device(options):
    config = tiny_config(rep_size=8, **options)
    shapes = {name: tuple(v.shape) for name, v in named_weights(build_vit(config)).items()}
    assert weight_shapes(config) == shapes


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr_multipliers", (("haed/", 1.0),), "lr_multipliers: 'haed/' matches no variable"),
        ("decay_multipliers", (("krenel$", 1.0),), "decay_multipliers: 'krenel\\$' matches no"),
        ("lr_multipliers", ((".", 0.0),), "freezes every variable: nothing would train"),
        ("lr_multipliers", (("(", 1.0),), "lr_multipliers: '\\(' is no regex"),
        ("lr_multipliers", (("head", -1.0),), "a number of 0 or more.* got \\('head', -1.0\\)"),
        ("decay_multipliers", ("kernel$", 1.0), "must hold pairs .* got 'kernel\\$'"),
        ("decay_multipliers", "kernel$", "must hold pairs .* got 'kernel\\$'"),
        ("layer_decay", 1.5, r"layer_decay must be in \(0, 1\], or None, got 1.5"),
    ],
)
def test_mistakes(key, value, message):
    with pytest.raises(ValueError, match=message):
        check(make(**{f"optimizer__{key}": value}))


def test_names_are_checked_with_the_model_too():
    with pytest.raises(ValueError, match="matches no variable"):
        check_names(NAMES, lr_multipliers=(("x", 1.0),))
