"""Twenty steps of a ViT against the same recipe in JAX and optax, and schedules against optax's."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.interop import NEEDS_PEERS, run_peer
from tests.support.tiny import make
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run.check import check
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import NAMES, Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import StepOptions, make_train_step

pytestmark = NEEDS_PEERS

STEPS, BATCH, CLASSES = 20, 16, 5
# Long enough for both Adafactors to factor. The bias of keys has a gradient of mere rounding, which
# Adam would blow up on either side.
CONFIG = vit_config(
    "mu/4", image_size=8, num_classes=CLASSES, width=128, depth=1, mlp_dim=136, num_heads=2,
    qkv_bias=False,
)  # fmt: skip
COMMON = {
    "decay": 0.1, "clip": 0.5, "ema": 0.9, "smoothing": 0.1, "momentum_dtype": "float32",
    "optax_multiplies": False, "warmup": 4, "total": STEPS, "start": 0.1, "end": 0.05,
}  # fmt: skip
RECIPES = {
    "adamw": {"rate": 1e-3, "decay": 1.0},
    "adamw, bfloat16": {"rate": 1e-3, "momentum_dtype": "bfloat16"},
    "adamw, as optax multiplies": {
        "rate": 1e-3,
        "momentum_dtype": "bfloat16",
        "optax_multiplies": True,
    },
    "sgd": {"rate": 0.03},
    "sgd, bfloat16": {"rate": 0.03, "momentum_dtype": "bfloat16"},
    "lamb": {"rate": 4e-3},
    "lion": {"rate": 1e-4, "decay": 1.0},
    "adafactor": {"rate": 1e-2},
    "adafactor_vit": {"rate": 1e-3, "decay": 1.0},
    "adafactor_vit, bfloat16": {"rate": 1e-3, "momentum_dtype": "bfloat16"},
}
RECIPES = {k: {**COMMON, **v, "name": k.split(",")[0]} for k, v in RECIPES.items()}
# What another recipe has as well: first moments in bfloat16, or the rule itself.
FURTHER = ("adamw, bfloat16", "adamw, as optax multiplies", "sgd", "lion", "adafactor_vit")

PEAK, WARMUP, TOTAL = 0.3, 100, 1000
AT = (0, 1, WARMUP - 1, WARMUP, WARMUP + 1, 550, TOTAL - 1, TOTAL)
RISE = (0.03, PEAK, WARMUP)  # start_factor 0.1
# name -> our arguments, optax's function and arguments, and what rises before it if that does not.
SCHEDULES = {
    "cosine": (
        {"end_factor": 0.01},
        "warmup_cosine_decay_schedule",
        {"init_value": 0.03, "peak_value": PEAK, "warmup_steps": WARMUP, "decay_steps": TOTAL,
         "end_value": 0.003},
        None,
    ),
    "linear": (
        {"end_factor": 0.2},
        "linear_schedule",
        {"init_value": PEAK, "end_value": 0.06, "transition_steps": TOTAL - WARMUP},
        RISE,
    ),
    "polynomial": (
        {"end_factor": 0.2, "power": 3.0},
        "polynomial_schedule",
        {"init_value": PEAK, "end_value": 0.06, "power": 3.0, "transition_steps": TOTAL - WARMUP},
        RISE,
    ),
    "constant": ({}, "constant_schedule", {"value": PEAK}, RISE),
    "rsqrt": (  # optax has none: big_vision's formula
        {"timescale_steps": 50}, "rsqrt", {"peak": PEAK, "timescale": 50}, RISE,
    ),
    "step": (
        {"milestones": (10.1, 55), "drop": 0.5, "warmup_steps": 0},
        "piecewise_constant_schedule",
        {"init_value": PEAK, "boundaries_and_scales": {101: 0.5, 550: 0.5}},
        None,
    ),
}  # fmt: skip


# big_vision's arrays of Ti, S and B, heads apart: (D, H, K) and (H, K, D), K = 64 in all.
HEADS = {"Ti": 3, "S": 6, "B": 12}
FACTORED = {
    f"{size}/attention/{name}": shape
    for size, h in HEADS.items()
    for name, shape in {
        "query/kernel": (64 * h, h, 64), "query/bias": (h, 64), "out/kernel": (h, 64, 64 * h),
    }.items()
}  # fmt: skip


@functools.cache
def data():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (STEPS, BATCH, 8, 8, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, (STEPS, BATCH)).astype(np.int32)


def make_model():
    model = build_vit(CONFIG)
    rng = np.random.default_rng(1)
    for name, variable in named_weights(model).items():
        if name.startswith("head"):  # zeros would hide everything below in the first steps
            variable.assign(0.1 * rng.standard_normal(variable.shape))
    return model


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory):
    """peer_of(key): what optax_peer.py finds, with the recipe of that name."""

    @functools.cache
    def run(further):
        recipes = {key: r for key, r in RECIPES.items() if (key in FURTHER) == further}
        return run_optax(recipes, tmp_path_factory.mktemp("optax"))

    return lambda key: run(key in FURTHER)


@pytest.fixture(scope="module")
def peer(peer_of):
    """The same where no recipe matters."""
    return peer_of("adamw")


def run_optax(recipes, folder):
    images, labels = data()
    weights = {f"model/{k}": v.numpy() for k, v in named_weights(make_model()).items()}
    cases = {k: (f, arguments, rise, AT) for k, (_, f, arguments, rise) in SCHEDULES.items()}
    np.savez(
        folder / "in.npz", images=images, labels=labels, heads=2, patch=4,
        recipes=json.dumps(recipes), schedules=json.dumps(cases), factored=json.dumps(FACTORED),
        **weights,
    )  # fmt: skip
    run_peer(folder / "in.npz", folder / "out.npz", script="optax_peer.py")
    return dict(np.load(folder / "out.npz"))


def ours(recipe):
    """(losses, arrays at the end), with the batch in two micro-batches."""
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        model = make_model()
        rule = make_optimizer(
            named_weights(model),
            OptimizerOptions(
                name=recipe["name"],
                learning_rate=recipe["rate"],
                weight_decay=recipe["decay"],
                momentum_dtype=recipe["momentum_dtype"],
            ),
            num_heads=CONFIG["num_heads"],
        )
        state = TrainState(model, rule, make_model())
    step = make_train_step(
        state,
        make_loss(label_smoothing=recipe["smoothing"]),
        strategy=strategy,
        schedule=Schedule(
            recipe["rate"],
            total_steps=recipe["total"],
            warmup_steps=recipe["warmup"],
            start_factor=recipe["start"],
            end_factor=recipe["end"],
        ),
        preprocess=lambda x: x,
        batch_size=BATCH,
        seed=0,
        options=StepOptions(
            accumulation=2, clip_norm=recipe["clip"], ema_decay=recipe["ema"], jit="off"
        ),
    )
    images, labels = data()
    batches = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
    batches, one = iter(batches), tf.constant(1, tf.int64)
    metrics = [step(batches, one) for _ in range(STEPS)]
    assert max(float(m["grad_norm"]) for m in metrics) > 1.2 * recipe["clip"]  # it does clip
    return np.array([float(m["loss"]) for m in metrics]), state.to_arrays()


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.exhaustive] if key in FURTHER else [])
        for key in RECIPES
    ],
)
def test_twenty_steps(peer_of, key):
    """Clipping, decay mask, accumulation and moving average on: 1e-4 for losses and weights.

    First moments in bfloat16, too, where the peer multiplies in float32, as we do. Optax itself
    multiplies the stored moment by its decay in bfloat16, which rounds once more to 8 bits (2e-3
    was seen in a loss): there the distance is small against the way that the weights have gone.
    """
    peer = peer_of(key)
    losses, arrays = ours(RECIPES[key])
    rounded = RECIPES[key]["optax_multiplies"]
    limit = 3e-3 if rounded else 1e-4
    np.testing.assert_allclose(losses, peer[f"{key}/losses"], atol=limit, rtol=0)
    start = {name: v.numpy() for name, v in named_weights(make_model()).items()}
    for part in ("model", "ema"):
        expected = {name: peer[f"{key}/{part}/{name}"] for name in start}
        way = {name: np.abs(expected[name] - first) for name, first in start.items()}
        assert all(w.any() for w in way.values()) and max(w.max() for w in way.values()) > 5e-4
        for name, value in expected.items():
            error = np.abs(arrays[f"{part}/{name}"] - value)
            if rounded:
                assert error.mean() < 0.1 * way[name].mean(), name
            elif key == "lion":  # whose sign tells two roundings of a gradient near 0 apart
                assert np.mean(error > 1e-4) < 0.002, name
            else:
                assert error.max() < 1e-4, name


@pytest.mark.parametrize("size", HEADS)
def test_adafactor_vit_on_arrays_with_heads(peer, size):
    """Twenty updates of our (D, D), against those of big_vision's (D, H, K) and (H, K, D)."""
    shapes = {name: shape for name, shape in FACTORED.items() if name.startswith(f"{size}/")}
    width = 64 * HEADS[size]
    ours = {name: (width,) if len(shape) == 2 else (width, width) for name, shape in shapes.items()}
    variables = {
        name: keras.Variable(np.zeros(shape, "f"), name=name.replace("/", "_"))
        for name, shape in ours.items()
    }
    optimizer = make_optimizer(
        variables, OptimizerOptions(name="adafactor_vit"), num_heads=HEADS[size]
    )
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        every = {n: rng.standard_normal(s, np.float32) for n, s in FACTORED.items()}
        optimizer.apply(
            [tf.constant(every[name].reshape(ours[name])) for name in variables],
            learning_rate=tf.constant(1.0),
            count=tf.constant(i, tf.int64),
            gate=tf.constant(True),
        )
    for name, variable in variables.items():
        expected = peer[f"factored/{name}"].reshape(ours[name])
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(-variable.numpy(), expected, rtol=0, atol=1e-4, err_msg=name)


def in_unit(name, steps, unit):
    """So many steps as a config says them in a unit, of the demo's examples and a run of TOTAL."""
    per_step = {"steps": 1, "epochs": 16 / 1257, "examples": 16, "percent": 100 / TOTAL}[unit]
    value = steps * per_step
    return {f"{name}_{unit}": round(value) if unit in ("steps", "examples") else value}


@pytest.mark.parametrize("unit", ["steps", "epochs", "examples", "percent"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(peer, name, unit):
    """From a config: at step 0, 1, around the warmup's end, in the middle and at the end."""
    options = {"start_factor": 0.1, **SCHEDULES[name][0]}
    durations = {"warmup": options.pop("warmup_steps", WARMUP)}
    durations |= {"timescale": options.pop("timescale_steps", None)}
    changed = {
        "total_steps": None,
        **in_unit("total", TOTAL, unit if unit != "percent" else "steps"),
    }
    for duration, steps in durations.items():
        if steps:
            options |= in_unit(duration, steps, unit)
    changed |= {f"schedule__{key}": value for key, value in options.items()}
    config = make(schedule__name=name, optimizer__learning_rate=PEAK, **changed)
    options, _ = check(config)
    schedule = options.schedule
    rates = [float(schedule(tf.constant(step))) for step in AT]
    np.testing.assert_allclose(rates, peer[f"schedule/{name}"], rtol=2e-6, atol=1e-8)


def test_every_schedule_is_compared():
    assert set(SCHEDULES) == set(NAMES)
