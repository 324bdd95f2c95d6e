"""Dropout and stochastic depth: pure functions of seed, step, replica, micro-batch and layer."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.networks import images_for, tiny_vit
from tests.support.stepping import BATCH, Engine
from vit_dist.model.dropout import byte_threshold
from vit_dist.model.layers import Attention, Dropout, DropPath

SEED = (3, 7)


def draw_mask(layer, seed=SEED, shape=(64, 8, 32)):
    return layer(tf.ones(shape), training=True, seed=seed).numpy()


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_masks_depend_on_seed_and_layer_alone(kind):
    layer = kind(0.5, name="one")
    first = draw_mask(layer)
    tf.random.set_seed(5)  # no global generator has a part in it
    np.testing.assert_array_equal(first, draw_mask(layer))
    np.testing.assert_array_equal(first, draw_mask(kind(0.5, name="one")))
    for other in (
        draw_mask(layer, (3, 8)),
        draw_mask(layer, (4, 7)),
        draw_mask(kind(0.5, name="two")),
    ):
        assert np.mean((first == 0) == (other == 0)) < 0.75


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "draws"), [(Dropout, 64 * 8 * 32), (DropPath, 4096)])
def test_rates(kind, draws, rate):
    shape = (64, 8, 32) if kind is Dropout else (4096, 2, 3)
    out = draw_mask(kind(rate, name="one"), shape=shape)
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
    dropped = np.mean(out == 0)
    assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / draws)
    per_example = (out == out[:, :1, :1]).all()
    assert per_example == (kind is DropPath)


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_masks_only_when_training_and_never_without_seed(kind):
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    layer = kind(0.5, name="one")
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer(x, training=False, seed=SEED), x)
    np.testing.assert_array_equal(kind(0.0)(x, training=True), x)
    with pytest.raises(ValueError, match=r"one: training with rate 0.5 needs call\(seed=...\)"):
        layer(x, training=True)


# As a TPU draws them: compiled, from XLA's generator


def compiled(layer, shape=(64, 8, 32)):
    """seed -> the mask, and the gradient of its sum times `weights`, over `weights`."""
    weights = tf.constant(np.random.default_rng(0).uniform(1, 2, shape), layer.compute_dtype)

    @tf.function(jit_compile=True, autograph=False)
    def run(seed):
        x = tf.ones(shape, layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, seed=seed)
            total = tf.reduce_sum(y * weights)
        return y, tape.gradient(total, x) / weights

    def masks(seed=SEED):
        return [tf.cast(t, tf.float32).numpy() for t in run(tf.constant(seed, tf.int32))]

    return masks


RATES = [(0.1, "float32"), (0.5, "mixed_bfloat16"), (1e-4, "mixed_bfloat16"), (0.9999, "float32")]


@pytest.mark.parametrize(
    ("rate", "dtype"),
    [
        *RATES,
        *(
            pytest.param(rate, dtype, marks=pytest.mark.exhaustive)
            for rate in (0.1, 0.5, 0.9, 1e-4, 0.9999)
            for dtype in ("float32", "mixed_bfloat16")
            if (rate, dtype) not in RATES
        ),
    ],
)
def test_rates_in_bytes(rate, dtype):
    out, gradient = compiled(Dropout(rate, form="tensor", name="one", dtype=dtype))()
    real = min(max(round(rate * 256), 1), 255) / 256
    scale = tf.cast(1 / (1 - real), Dropout(0.1, dtype=dtype).compute_dtype).numpy()
    np.testing.assert_allclose(np.unique(out), [0, float(scale)], rtol=1e-6)
    assert abs(np.mean(out == 0) - real) < 4 * np.sqrt(real * (1 - real) / out.size)
    # The backward pass has the same mask.
    np.testing.assert_allclose(gradient, out, rtol=1e-6 if dtype == "float32" else 2**-7)


def test_masks_of_bytes_depend_on_seed_and_layer_alone():
    one, same, two = (
        compiled(Dropout(0.5, form="tensor", name=name)) for name in ("one", "one", "two")
    )
    first, _ = one()
    for again in (one, same):
        np.testing.assert_array_equal(first, again()[0])
    for draw, seed in ((one, (3, 8)), (one, (4, 7)), (two, SEED)):
        other, _ = draw(seed)
        assert 0.25 < np.mean((first == 0) == (other == 0)) < 0.75


def test_the_rate_in_bytes():
    rates = (1e-9, 0.001, 0.1, 0.5, 0.999, 1 - 1e-9)
    assert [byte_threshold(rate) for rate in rates] == [1, 1, 26, 128, 255, 255]


def test_without_xla_both_forms_draw_the_same():
    masks = [draw_mask(Dropout(0.5, form=form, name="one")) for form in ("matrix", "tensor")]
    np.testing.assert_array_equal(*masks)


def test_attention_dropout_drops_weights():
    # Uniform attention over 16 tokens that are unit vectors, identity projections: out = weights.
    layer = Attention(2, dropout=0.5, name="attention")
    layer.build((None, 16, 16))
    eye = np.eye(16, dtype=np.float32)
    for name, kernel in (("query", 0 * eye), ("key", 0 * eye), ("value", eye), ("out", eye)):
        getattr(layer, name).kernel.assign(kernel)
    x = np.tile(eye, (32, 1, 1))
    np.testing.assert_allclose(layer(x), np.full((32, 16, 16), 1 / 16), rtol=1e-6)
    out = layer(x, training=True, seed=SEED).numpy()
    np.testing.assert_allclose(np.unique(out), [0, 1 / 8])
    assert abs(np.mean(out == 0) - 0.5) < 4 * 0.5 / np.sqrt(out.size)
    np.testing.assert_array_equal(out, layer(x, training=True, seed=SEED))
    assert np.any(out != layer(x, training=True, seed=(0, 0)).numpy())


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "drop_path"])
def test_model_masks(option):
    model = tiny_vit(**{option: 0.5})
    images = images_for(model, batch=8)
    plain = model(images).numpy()
    np.testing.assert_array_equal(plain, model(images, seed=SEED))
    first, again, other = (
        model(images, training=True, seed=seed).numpy() for seed in (SEED, SEED, (3, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first != plain)
    with pytest.raises(ValueError, match="needs call"):
        model(images, training=True)


def test_where_the_masks_are(monkeypatch):
    """Dropout four times per block and once before them, stochastic depth growing with depth."""
    seen = {}
    call = Dropout.call

    def spy(self, x, training=False, seed=None):
        seen[self.path.split("/", 1)[1]] = (type(self), self.rate, self._salt)
        return call(self, x, training=training, seed=seed)

    for kind in (Dropout, DropPath):
        monkeypatch.setattr(kind, "call", spy)
    model = tiny_vit(depth=3, dropout=0.1, attention_dropout=0.2, drop_path=0.3)
    model(images_for(model), training=True, seed=SEED)
    expected = {"dropout": (Dropout, 0.1)}
    for i in range(3):
        block = f"encoderblock_{i}"
        expected[f"{block}/attention/dropout"] = (Dropout, 0.2)
        for name in ("dropout", "mlp/dropout_0", "mlp/dropout_1"):
            expected[f"{block}/{name}"] = (Dropout, 0.1)
        for name in ("drop_path_0", "drop_path_1"):
            expected[f"{block}/{name}"] = (DropPath, pytest.approx(0.15 * i))
    assert {name: (kind, rate) for name, (kind, rate, _) in seen.items()} == expected
    assert len({salt for *_, salt in seen.values()}) == len(seen)


def test_stochastic_depth_of_one_rate():
    model = tiny_vit(depth=3, drop_path=0.3, drop_path_growth="constant")
    assert [path.rate for block in model.blocks for path in block.paths] == [0.3] * 6


# In the step


class Probe(keras.Model):
    """Weights that show the mask of each example: a row for each, which begins at zero."""

    def __init__(self, form, **kwargs):
        super().__init__(**kwargs)
        self.drop = Dropout(0.5, form=form, name="drop")

    def build(self, input_shape=None):
        self.rows = self.add_weight(name="rows", shape=(BATCH, 32), initializer="zeros")
        self.drop.build((None, 32))
        self.built = True

    def call(self, x, training=False, seed=None):
        return self.drop(tf.matmul(x, self.rows), training=training, seed=seed)


def make_probe(form):
    model = Probe(form, name="probe")
    model.build()
    return model


def make_engine(jit, form, seed=0):
    return Engine(
        functools.partial(make_probe, form),
        replicas=2,
        accumulation=2,
        jit=jit,
        seed=seed,
        clip_norm=None,
        optimizer={"name": "sgd", "momentum": 0.0},
        schedule=lambda step: 1.0,
        preprocess=lambda x: x,
    )


def drawn_by(engine, steps):
    """One (BATCH, 32) mask for each step, over 2 replicas x 2 micro-batches."""
    out = []
    for step in steps:
        images = np.eye(BATCH, dtype=np.float32)[None]
        engine.run(images, np.zeros((1, BATCH), np.int32), step=np.int64(step))
        out.append(engine.state.to_arrays()["model/rows"] != 0)
    return np.array(out)


# With the forms that are drawn in other ways: by Philox, and compiled by XLA's own generator.
OTHERS = [("split", "matrix"), ("split", "tensor")]


@pytest.mark.parametrize(
    ("jit", "form"),
    [("off", "matrix"), OTHERS[1], pytest.param(*OTHERS[0], marks=pytest.mark.exhaustive)],
)
def test_masks_differ_everywhere_and_repeat(jit, form):
    engine = make_engine(jit, form)
    drawn = drawn_by(engine, [0, 1, 10**9])
    parts = drawn.reshape(3 * 4, BATCH // 4, 32)  # step, replica and micro-batch
    for i, one in enumerate(parts):
        assert abs(one.mean() - 0.5) < 4 * 0.5 / np.sqrt(one.size)
        for other in parts[:i]:
            assert 0.25 < np.mean(one == other) < 0.75
    np.testing.assert_array_equal(drawn_by(engine, [10**9, 1, 0])[::-1], drawn)


@pytest.mark.parametrize(
    ("jit", "form"),
    [("off", "matrix"), *(pytest.param(*of, marks=pytest.mark.exhaustive) for of in OTHERS)],
)
def test_masks_depend_on_the_seed(jit, form):
    first, other = (drawn_by(make_engine(jit, form, seed), [0]) for seed in (0, 1))
    assert 0.4 < np.mean(first == other) < 0.6
