"""Optimisers against NumPy, one variable at a time and over a schedule."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.optim import NAMES, make_optimizer

SHAPES = {"dense/kernel": (3, 4), "dense/bias": (4,), "norm/gamma": (4,)}


def make_variables():
    rng = np.random.default_rng(0)
    variables = {}
    for name, shape in SHAPES.items():
        v = keras.Variable(rng.standard_normal(shape).astype("f"), name=name.replace("/", "_"))
        variables[name] = v
    return variables


def gradient(step):
    rng = np.random.default_rng(100 + step)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def rate(step):
    return 0.1 * (step + 1) / 5 if step < 5 else 0.1 * (10 - step) / 5


def values_of(variables):
    return {name: np.array(v.numpy()) for name, v in variables.items()}


def apply(optimizer, step, *, gate=True, gradients=None):
    gradients = gradients or gradient(step)
    optimizer.apply(
        [tf.constant(g) for g in gradients.values()],
        learning_rate=tf.constant(rate(step), tf.float32),
        count=tf.constant(step, tf.int64),
        gate=tf.constant(gate),
    )


def adamw(weights, slots, g, lr, t, *, decay, beta_1, beta_2, epsilon):
    """Updates in place; t counts from 1."""
    m, v = slots.setdefault("momentum", 0 * g), slots.setdefault("velocity", 0 * g)
    m += (1 - beta_1) * (g - m)
    v += (1 - beta_2) * (g * g - v)
    alpha = lr * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    weights -= lr * decay * weights
    weights -= alpha * m / (np.sqrt(v) + epsilon)


def sgd(weights, slots, g, lr, t, *, decay, momentum):
    """As torch and optax have it: the learning rate is no part of the trace."""
    weights -= lr * decay * weights
    if momentum:
        trace = slots.setdefault("momentum", 0 * g)
        trace *= momentum
        trace += g
        g = trace
    weights -= lr * g


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("adamw", {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}, adamw),
        ("adamw", {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}, adamw),
        ("sgd", {"momentum": 0.9}, sgd),
        ("sgd", {"momentum": 0.0}, sgd),
    ],
)
def test_ten_updates(name, options, rule, decay):
    variables = make_variables()
    optimizer = make_optimizer(variables, name=name, weight_decay=decay, **options)
    expected = {k: v.astype(np.float64) for k, v in values_of(variables).items()}
    slots = {name: {} for name in SHAPES}
    for step in range(10):
        apply(optimizer, step)
        for key, g in gradient(step).items():
            used = decay if key.endswith("kernel") else 0.0
            arguments = (slots[key], g.astype(np.float64), rate(step), step + 1)
            rule(expected[key], *arguments, decay=used, **options)
    actual = values_of(variables)
    for key in SHAPES:
        np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, atol=2e-6)
    named = {f"{key}/{kind}": s for key, kinds in slots.items() for kind, s in kinds.items()}
    assert set(optimizer.slots) == set(named)
    for key, slot in named.items():
        np.testing.assert_allclose(optimizer.slots[key].numpy(), slot, rtol=2e-5, atol=2e-6)


def test_every_optimizer_is_compared():
    assert set(NAMES) == {"adamw", "sgd"}


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_gate_changes_no_bit(name):
    variables = make_variables()
    optimizer = make_optimizer(variables, name=name, weight_decay=0.1)
    apply(optimizer, 0)
    state = {**variables, **optimizer.slots}
    before = values_of(state)
    apply(optimizer, 1, gate=False)
    bad = {k: np.full_like(g, np.nan) for k, g in gradient(1).items()}
    apply(optimizer, 1, gate=False, gradients=bad)
    after = values_of(state)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    apply(optimizer, 1)
    assert all(np.all(before[key] != value.numpy()) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "kinds"), [("adamw", ("momentum", "velocity")), ("sgd", ("momentum",))]
)
def test_slots_belong_to_their_variables(name, kinds):
    model = build_vit(
        vit_config("mu/4", image_size=8, num_classes=5, pool="map", rep_size=8, layer_scale=0.1)
    )
    variables = named_weights(model)
    optimizer = make_optimizer(variables, name=name)
    assert set(optimizer.slots) == {f"{v}/{kind}" for v in variables for kind in kinds}
    # Each variable gets a gradient of its own, so that a slot under another's name shows.
    gradients = [tf.fill(v.shape, float(i + 1)) for i, v in enumerate(variables.values())]
    optimizer.apply(
        gradients,
        learning_rate=tf.constant(0.1),
        count=tf.constant(0, tf.int64),
        gate=tf.constant(True),
    )
    for i, (key, variable) in enumerate(variables.items()):
        g = i + 1.0
        first = {"momentum": 0.1 * g if name == "adamw" else g, "velocity": 0.001 * g * g}
        for kind in kinds:
            slot = optimizer.slots[f"{key}/{kind}"]
            assert tuple(slot.shape) == tuple(variable.shape)
            np.testing.assert_allclose(slot.numpy(), np.full(slot.shape, first[kind]), rtol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "decayed"),
    [
        ("kernel$", {"dense/kernel"}),
        ("^dense/", {"dense/kernel", "dense/bias"}),
        (".", set(SHAPES)),
        ("nothing", set()),
    ],
)
def test_decay_pattern(pattern, decayed):
    variables = make_variables()
    optimizer = make_optimizer(variables, name="sgd", weight_decay=0.5, decay_pattern=pattern)
    before = values_of(variables)
    zeros = {k: np.zeros_like(g) for k, g in gradient(0).items()}
    apply(optimizer, 4, gradients=zeros)
    for key, value in values_of(variables).items():
        factor = 1 - 0.5 * rate(4) if key in decayed else 1.0
        np.testing.assert_allclose(value, before[key] * factor, rtol=1e-6)


def test_what_decays_in_a_vit():
    options = {"pool": "map", "rep_size": 8, "layer_scale": 0.1, "qkv_bias": True}
    model = build_vit(vit_config("mu/4", image_size=8, num_classes=5, **options))
    optimizer = make_optimizer(named_weights(model), weight_decay=0.1)
    undecayed = {name.rsplit("/", 1)[-1] for name in set(named_weights(model)) - optimizer.decayed}
    assert undecayed == {"bias", "beta", "gamma", "pos_embedding", "probe"}
    assert {"head/kernel", "embedding/kernel", "pre_logits/kernel"} < optimizer.decayed
    assert all(name.endswith("/kernel") for name in optimizer.decayed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, "optimizer 'lion' is unknown; allowed: adamw, sgd"),
        ({"decay_pattern": "("}, "decay_pattern '\\(' is no regex"),
        ({"beta_1": 1.0}, r"beta_1 must be in \[0, 1\), got 1.0"),
        ({"beta_2": -0.1}, "beta_2 must be in"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer({}, **options)
