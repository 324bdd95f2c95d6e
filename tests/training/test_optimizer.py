"""Optimisers against NumPy, one variable at a time and over a schedule."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.update_rules_in_numpy import RULES
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.optimizer import NAMES, OptimizerOptions, make_optimizer
from vit_dist.training.state import TrainState

# The big one is long enough for both Adafactors to factor it, the middle one for one of them.
SHAPES = {
    "dense/kernel": (3, 4),
    "dense/bias": (4,),
    "norm/gamma": (4,),
    "middle/kernel": (2, 32, 40),
    "big/kernel": (130, 128),
}


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


def restated(name, initial, *, decay, steps=10, **options):
    expected = {k: v.astype(np.float64) for k, v in initial.items()}
    slots = {key: {} for key in SHAPES}
    for step in range(steps):
        for key, g in gradient(step).items():
            used = decay if key.endswith("kernel") else 0.0
            arguments = (expected[key], slots[key], g.astype(np.float64), rate(step), step + 1)
            expected[key] -= RULES[name](*arguments, decay=used, **options)
    return expected, {
        f"{key}/{kind}": s for key, kinds in slots.items() for kind, s in kinds.items()
    }


UPDATES = [
    *((name, {}) for name in NAMES),
    ("adamw", {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
    ("lamb", {"epsilon": 1e-8}),
    ("sgd", {"momentum": 0.0}),
    ("lion", {"beta_1": 0.95, "beta_2": 0.98}),
    ("adafactor_vit", {"beta_1": 0.8, "beta_2": 0.5}),
]


@pytest.mark.parametrize(
    ("name", "options", "decay"),
    [
        *((*update, 0.3) for update in UPDATES),
        # Biases have no decay in the rows above.
        *(pytest.param(*update, 0.0, marks=pytest.mark.exhaustive) for update in UPDATES),
    ],
)
def test_ten_updates(name, options, decay):
    variables = make_variables()
    optimizer = make_optimizer(
        variables, OptimizerOptions(name=name, weight_decay=decay, **options)
    )
    expected, slots = restated(name, values_of(variables), decay=decay, **options)
    for step in range(10):
        apply(optimizer, step)
    for key, value in values_of(variables).items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-4, atol=2e-5, err_msg=key)
    assert set(optimizer.slots) == set(slots)
    for key, slot in slots.items():
        got = optimizer.slots[key].numpy()
        np.testing.assert_allclose(got, slot, rtol=1e-4, atol=1e-5, err_msg=key)


def test_every_optimizer_is_compared():
    assert set(NAMES) == set(RULES)


@pytest.mark.parametrize("name", NAMES)
def test_first_moments_in_bfloat16(name):
    """Half the room, the same course; the other slots stay float32; a checkpoint keeps all bits."""
    variables = make_variables()
    optimizer = make_optimizer(variables, OptimizerOptions(name=name, momentum_dtype="bfloat16"))
    halves = {key for key, slot in optimizer.slots.items() if slot.dtype == "bfloat16"}
    assert halves == {key for key in optimizer.slots if key.endswith("/momentum")}
    assert halves or name == "adafactor"
    expected, _ = restated(name, values_of(variables), decay=0.0, steps=5)
    for step in range(5):
        apply(optimizer, step)
    for key, value in values_of(variables).items():
        # bfloat16 keeps 8 bits; ten times its rounding of the way gone, where signs cannot flip.
        limit = 0.06 if name not in ("lion", "muon") else 0.6
        assert np.abs(value - expected[key]).mean() < limit * 0.1, key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_uses_the_moment_before_it_is_stored(name):
    """Else the first update of Adam would be off by the rounding of bfloat16."""
    weight = {"kernel": keras.Variable(np.zeros((1000,), "f"), name="kernel")}
    options = OptimizerOptions(name=name, momentum_dtype="bfloat16", epsilon=1e-30)
    optimizer = make_optimizer(weight, options)
    g = np.random.default_rng(0).standard_normal(1000).astype("f")
    apply(optimizer, 4, gradients={"kernel": g})
    first = -rate(4) * (1 - 0.9) / (1 - 0.9**5) / np.sqrt((1 - 0.999) / (1 - 0.999**5))
    np.testing.assert_allclose(weight["kernel"].numpy(), first * np.sign(g), rtol=1e-5)


def test_muon_of_a_matrix_uses_the_moment_before_it_is_stored():
    """From 0 the first moment is the gradient: both dtypes then give the same update."""
    g = np.random.default_rng(0).standard_normal((16, 24)).astype("f")
    found = []
    for dtype in ("float32", "bfloat16"):
        weight = {"kernel": keras.Variable(np.zeros(g.shape, "f"), name="kernel")}
        optimizer = make_optimizer(weight, OptimizerOptions(name="muon", momentum_dtype=dtype))
        apply(optimizer, 0, gradients={"kernel": g})
        found.append(weight["kernel"].numpy())
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_closed_gate_changes_no_bit(name, momentum_dtype):
    variables = make_variables()
    optimizer = make_optimizer(
        variables, OptimizerOptions(name=name, weight_decay=0.1, momentum_dtype=momentum_dtype)
    )
    apply(optimizer, 0)
    state = {**variables, **optimizer.slots}
    before = values_of(state)
    apply(optimizer, 1, gate=False)
    bad = {k: np.full_like(g, np.nan) for k, g in gradient(1).items()}
    apply(optimizer, 1, gate=False, gradients=bad)
    after = values_of(state)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    apply(optimizer, 1)
    for key, value in values_of(state).items():
        assert np.mean(before[key] != value) > 0.9, key


def vit(**options):
    config = vit_config("mu/4", image_size=8, num_classes=5, width=8, mlp_dim=16, **options)
    return build_vit(config)


@pytest.mark.parametrize(
    ("name", "kinds"), [("adamw", ("momentum", "velocity")), ("sgd", ("momentum",))]
)
def test_slots_belong_to_their_variables(name, kinds):
    variables = named_weights(vit(pool="map", rep_size=8, layer_scale=0.1))
    optimizer = make_optimizer(variables, OptimizerOptions(name=name))
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


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_every_optimizer_comes_back(name):
    states = []
    for _ in range(2):
        model = vit()
        rule = make_optimizer(
            named_weights(model),
            OptimizerOptions(name=name, momentum_dtype="bfloat16"),
            num_heads=2,
        )
        states.append(TrainState(model, rule))
    for i, variable in enumerate(states[0].optimizer.slots.values()):
        variable.assign(np.random.default_rng(i).standard_normal(variable.shape))
    arrays = states[0].to_arrays()
    states[1].from_arrays(arrays)
    again = states[1].to_arrays()
    for key, value in arrays.items():
        assert value.dtype != "bfloat16" and value.tobytes() == again[key].tobytes(), key


def test_adafactor_keeps_no_full_second_moment():
    """Rows and columns of what is long enough: 2 numbers for 32 of Adam's."""
    variables = make_variables()
    sizes = {}
    for name in ("adamw", "adafactor", "adafactor_vit"):
        slots = make_optimizer(variables, OptimizerOptions(name=name)).slots
        sizes[name] = {k: int(np.prod(s.shape)) for k, s in slots.items() if "momentum" not in k}
    assert sizes["adamw"]["big/kernel/velocity"] == 130 * 128
    for name in ("adafactor", "adafactor_vit"):
        rows = {k: n for k, n in sizes[name].items() if k.startswith("big/")}
        assert rows == {"big/kernel/row": 128, "big/kernel/column": 130}
    assert sizes["adafactor"]["middle/kernel/velocity"] == 2 * 32 * 40
    middle = {k: n for k, n in sizes["adafactor_vit"].items() if k.startswith("middle/")}
    assert middle == {"middle/kernel/row": 64, "middle/kernel/column": 80}


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1280, 16), (32, 2), (1024, 32)]
)
def test_adafactor_vit_factors_each_head_for_itself(width, heads):
    """Over D and K of big_vision's (D, H, K) and (H, K, D), where both are 32 or more.

    With Ti, S and B (K = 64) each head keeps a row and a column; mu (K = 16) keeps all, as do the
    biases (H, K) of fewer than 32 heads.
    """
    shapes = {"query/kernel": (width, width), "query/bias": (width,), "out/kernel": (width, width)}
    variables = {
        f"attention/{name}": keras.Variable(np.zeros(shape, "f"), name=name.replace("/", "_"))
        for name, shape in {**shapes, "out/bias": (width,)}.items()
    }
    slots = make_optimizer(variables, OptimizerOptions(name="adafactor_vit"), num_heads=heads).slots
    found = {k.removeprefix("attention/"): tuple(s.shape) for k, s in slots.items()}
    moments = {f"{name}/momentum": shape for name, shape in shapes.items()}
    expected = {**moments, "out/bias/momentum": (width,), "out/bias/velocity": (width,)}
    head = width // heads
    if head >= 32:
        expected |= {"query/kernel/column": (width, heads), "query/kernel/row": (heads, head)}
        expected |= {"out/kernel/column": (heads, width), "out/kernel/row": (heads, head)}
    else:
        expected |= {"query/kernel/velocity": (width, heads, head)}
        expected |= {"out/kernel/velocity": (heads, head, width)}
    if min(heads, head) >= 32:
        expected |= {"query/bias/column": (32,), "query/bias/row": (32,)}
    else:
        expected |= {"query/bias/velocity": (heads, head)}
    assert found == expected


def test_adafactor_vit_asks_for_the_heads():
    with pytest.raises(ValueError, match=r"needs num_heads, to factor .*query/kernel"):
        make_optimizer(named_weights(vit()), OptimizerOptions(name="adafactor_vit"))


@pytest.mark.parametrize(
    ("pattern", "decayed"),
    [
        ("kernel$", {"dense/kernel", "middle/kernel", "big/kernel"}),
        ("^dense/", {"dense/kernel", "dense/bias"}),
        (".", set(SHAPES)),
    ],
)
def test_decay_multipliers(pattern, decayed):
    variables = make_variables()
    optimizer = make_optimizer(
        variables,
        OptimizerOptions(name="sgd", weight_decay=0.5, decay_multipliers=((pattern, 1.0),)),
    )
    before = values_of(variables)
    zeros = {k: np.zeros_like(g) for k, g in gradient(0).items()}
    apply(optimizer, 4, gradients=zeros)
    assert optimizer.decayed == decayed
    for key, value in values_of(variables).items():
        factor = 1 - 0.5 * rate(4) if key in decayed else 1.0
        np.testing.assert_allclose(value, before[key] * factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_what_decays_in_a_vit(name):
    variables = named_weights(vit(pool="map", rep_size=8, layer_scale=0.1, qkv_bias=True))
    optimizer = make_optimizer(variables, OptimizerOptions(name=name, weight_decay=0.1))
    undecayed = {name.rsplit("/", 1)[-1] for name in set(variables) - optimizer.decayed}
    assert undecayed == {"bias", "beta", "gamma", "pos_embedding", "probe"}
    assert {"head/kernel", "embedding/kernel", "pre_logits/kernel"} < optimizer.decayed
    assert all(name.endswith("/kernel") for name in optimizer.decayed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optimizer 'adam' is unknown; allowed: adamw, sgd, lamb, lion"),
        ({"decay_scale": "lr"}, "decay_scale 'lr' is unknown; allowed: learning_rate, schedule"),
        ({"momentum_dtype": "float16"}, "momentum_dtype 'float16' is unknown; allowed: float32"),
        ({"beta_1": 1.0}, r"beta_1 must be in \[0, 1\), got 1.0"),
        ({"name": "lion", "beta_1": 0.0}, "beta_1 must be above 0 for lion"),
        ({"beta_2": -0.1}, "beta_2 must be in"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]"),
        ({"learning_rate": 0.0, "decay_scale": "schedule"}, "needs a learning_rate above 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer({}, OptimizerOptions(**options))
