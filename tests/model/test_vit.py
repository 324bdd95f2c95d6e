"""The network's numbers against a plain NumPy restatement, and in low precision."""

import inspect

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import erf, ndtr

from tests.support.networks import arrays_of, images_for, tiny_vit
from vit_dist.model.layers import Attention, PatchEmbedding
from vit_dist.model.layers import gelu as gelu_layer
from vit_dist.model.norm import layer_norm
from vit_dist.model.posemb import sincos2d
from vit_dist.model.variants import FORMS, PRECISIONS, choose_form


def gelu(x, form):
    if form == "erf":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x, w, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * w[f"{name}/gamma"] + w[f"{name}/beta"]


def dense(x, w, name):
    return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0.0)


def attend(x, context, w, name, heads):
    """One example: x (N, D), context (N', D) -> (N, D), and the weights (H, N, N')."""
    q, k, v = (
        np.split(dense(y, w, f"{name}/{part}"), heads, axis=-1)
        for part, y in (("query", x), ("key", context), ("value", context))
    )
    outputs, weights = [], []
    for h in range(heads):
        logits = q[h] @ k[h].T / np.sqrt(q[h].shape[-1])
        weights.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        outputs.append(weights[h] @ v[h])
    return dense(np.concatenate(outputs, -1), w, f"{name}/out"), np.stack(weights)


def mlp(x, w, name, form):
    return dense(gelu(dense(x, w, f"{name}/dense_0"), form), w, f"{name}/dense_1")


def reference(config, w, image):
    """(logits, each block's tokens, each block's attention weights) of one image, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    p, heads, form, width = (config[k] for k in ("patch_size", "num_heads", "gelu", "width"))
    rows, columns = image.shape[0] // p, image.shape[1] // p
    x = np.zeros((rows * columns, width))
    for i in range(rows):
        for j in range(columns):
            patch = image[i * p : (i + 1) * p, j * p : (j + 1) * p]
            kernel = w["embedding/kernel"]
            x[i * columns + j] = np.einsum("pqc,pqcd->d", patch, kernel) + w["embedding/bias"]
    if config["posemb"] == "sincos2d":
        x = x + restated_sincos2d(rows, columns, width)
    if config["pool"] == "tok":
        x = np.concatenate([w["cls"][0], x])
    if config["posemb"] == "learned":
        x = x + w["pos_embedding"][0]
    tokens, attention = [], []
    for i in range(config["depth"]):
        b = f"encoderblock_{i}"
        scales = [w.get(f"{b}/layer_scale_{j}/gamma", 1.0) for j in range(2)]
        y = norm(x, w, f"{b}/norm_0")
        y, weights = attend(y, y, w, f"{b}/attention", heads)
        x = x + scales[0] * y
        x = x + scales[1] * mlp(norm(x, w, f"{b}/norm_1"), w, f"{b}/mlp", form)
        tokens.append(x)
        attention.append(weights)
    x = norm(x, w, "encoder_norm")
    if config["pool"] == "tok":
        x = x[0]
    elif config["pool"] == "gap":
        x = x.mean(0)
    elif config["pool"] == "map":
        y, _ = attend(w["map_head/probe"][0], x, w, "map_head/attention", heads)
        x = (y + mlp(norm(y, w, "map_head/norm"), w, "map_head/mlp", form))[0]
    if config["rep_size"]:
        x = np.tanh(dense(x, w, "pre_logits"))
    return dense(x, w, "head") if config["num_classes"] else x, tokens, attention


def restated_sincos2d(rows, columns, width):
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for i in range(rows):
        for j in range(columns):
            for k in range(quarter):
                omega = 10_000 ** (-k / (quarter - 1))
                parts = (np.sin(j * omega), np.cos(j * omega), np.sin(i * omega), np.cos(i * omega))
                table[i * columns + j, k::quarter] = parts
    return table


FORWARD = [
    {"pool": "tok"},
    {"pool": "gap", "posemb": "sincos2d", "rep_size": 12, "gelu": "erf"},
    {"pool": "map", "layer_scale": 0.1, "qkv_bias": False},
    {"pool": "none", "gelu": "erf", "image_size": (4, 12)},
    {"pool": "tok", "posemb": "sincos2d", "num_classes": 0, "image_size": 8},
    {"pool": "map", "gelu": "erf", "width": 32, "num_heads": 4, "depth": 1},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", FORWARD, ids=str)
def test_forward_pass_equals_its_restatement(options, form):
    model = tiny_vit(**options, form=form)
    images = images_for(model)
    w = arrays_of(model)
    expected = np.stack([reference(model.get_config(), w, image)[0] for image in images])
    actual = model(images).numpy()
    assert actual.dtype == np.float32 and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (7, 2)])
def test_sincos2d_formula(grid):
    table = sincos2d(grid, 24)
    assert table.shape == (grid[0] * grid[1], 24) and table.dtype == np.float32
    np.testing.assert_allclose(table, restated_sincos2d(*grid, 24), atol=1e-6)


@pytest.mark.parametrize("width", [4, 10, 0])
def test_sincos2d_widths(width):
    with pytest.raises(ValueError, match=f"at least 8, got {width}"):
        sincos2d((2, 2), width)


def test_patches_are_a_convolution():
    layer = PatchEmbedding(6, (4, 2))
    images = np.random.default_rng(0).standard_normal((2, 12, 10, 3)).astype(np.float32)
    layer.build(images.shape)
    layer.bias.assign(np.arange(6))
    expected = tf.nn.conv2d(images, layer.kernel.value, (4, 2), "VALID") + layer.bias.value
    actual = layer(images)
    assert layer.kernel.shape == (4, 2, 3, 6)
    np.testing.assert_allclose(actual, tf.reshape(expected, (2, 15, 6)), atol=1e-5)


@pytest.mark.parametrize("dtype,absolute,relative", [("float32", 5e-7, 0), ("bfloat16", 0, 0.06)])
def test_exact_gelu_keeps_its_small_values(dtype, absolute, relative):
    x = tf.cast(tf.linspace(-4.0, 4.0, 201), dtype)
    exact = np.asarray(x, np.float64)
    got = np.asarray(gelu_layer(x, "erf"), np.float64)
    np.testing.assert_allclose(got, exact * ndtr(exact), rtol=relative, atol=absolute)


@pytest.mark.parametrize("shape", [(2, 8, 16, 3), (2, 16, 8, 1), (2, 16, 16, 3)])
def test_images_of_another_size_are_refused(shape):
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"takes images of \(16, 8, 3\), got"):
        model(np.zeros(shape, np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_intermediates_are_those_of_the_restatement(form):
    model = tiny_vit(pool="tok", form=form)
    images = images_for(model)
    out = model.intermediates(images)
    w = arrays_of(model)
    for index, image in enumerate(images):
        _, tokens, attention = reference(model.get_config(), w, image)
        np.testing.assert_allclose([t[index] for t in out["tokens"]], tokens, atol=2e-5)
        np.testing.assert_allclose([a[index] for a in out["attention"]], attention, atol=1e-5)
    logits = model.head(model.norm(out["tokens"][-1])[:, 0])
    np.testing.assert_allclose(logits, model(images), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_rows_sum_to_one(precision, form):
    # Over 512 tokens a sum in bfloat16 is off by a percent and more.
    layer = Attention(2, dtype=PRECISIONS[precision], form=form)
    x = np.random.default_rng(0).standard_normal((1, 512, 8)).astype(np.float32)
    _, weights = layer(x, return_weights=True)
    assert weights.dtype == tf.float32 and weights.shape == (1, 2, 512, 512)
    np.testing.assert_allclose(tf.reduce_sum(weights, -1), np.ones((1, 2, 512)), atol=1e-5)


def test_call_keeps_no_attention_weights(monkeypatch):
    asked = []
    call = Attention.call

    def spy(self, *args, **kwargs):
        asked.append(inspect.signature(call).bind(self, *args, **kwargs).arguments)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "call", spy)
    model = tiny_vit(pool="map")
    model(images_for(model))
    assert len(asked) == 3 and not any(a.get("return_weights") for a in asked)
    asked.clear()
    model.intermediates(images_for(model))
    assert [a.get("return_weights") for a in asked] == [True, True]


# Forms


@pytest.mark.parametrize("pool", ["tok", "map"])
def test_gradients_are_the_same_in_both_forms(pool):
    found = []
    for form in FORMS:
        model = tiny_vit(pool=pool, form=form, layer_scale=0.1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(images_for(model))))
        found.append(tape.gradient(loss, [v.value for v in model.weights]))
    largest = max(np.abs(g).max() for g in found[0])
    for v, one, other in zip(model.weights, *found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest, err_msg=v.path)


def test_dropped_attention_weights_are_the_same_in_both_forms():
    x = np.random.default_rng(0).standard_normal((4, 9, 8)).astype(np.float32)
    outputs = []
    for form in FORMS:
        layer = Attention(2, dropout=0.5, form=form, name="attention")
        layer.build(x.shape)
        for i, v in enumerate(layer.weights):
            v.assign(np.random.default_rng(i).standard_normal(v.shape))
        outputs.append(layer(x, training=True, seed=(1, 2)))
    np.testing.assert_allclose(*outputs, atol=2e-5)


@pytest.mark.parametrize("options", [{"attention_block": 3}, {"remat": "attention"}], ids=str)
def test_less_memory_in_tensor_form(options):
    model, plain = tiny_vit(form="tensor", **options), tiny_vit()
    mode = {"training": True, "seed": (1, 2)}
    images = images_for(model)
    np.testing.assert_allclose(model(images, **mode), plain(images, **mode), atol=1e-5)


def test_each_kind_of_device_has_its_form():
    assert [choose_form(kind) for kind in ("CPU", "GPU", "TPU")] == ["matrix", "matrix", "tensor"]


# Low precision


LOW = [
    {"pool": "tok"},
    {"pool": "map", "rep_size": 8},
    {"pool": "tok", "form": "tensor"},
    {"pool": "map", "form": "tensor", "softmax": "compute"},
    {"pool": "tok", "softmax": "compute"},
]


@pytest.mark.parametrize(
    ("options", "precision", "tolerance"),
    [
        *((options, "bfloat16", 0.05) for options in LOW),
        (LOW[0], "float16", 0.007),
        (LOW[3], "float16", 0.007),
        *(pytest.param(LOW[i], "float16", 0.007, marks=pytest.mark.exhaustive) for i in (1, 2, 4)),
    ],
    ids=str,
)
def test_low_precision_is_close(options, precision, tolerance):
    exact = {key: options[key] for key in options if key not in ("form", "softmax")}
    model, exact = tiny_vit(**options, precision=precision), tiny_vit(**exact)
    assert {v.dtype for v in model.weights} == {"float32"}
    images = images_for(model)
    logits, expected = model(images), exact(images).numpy()
    assert logits.dtype == tf.float32
    assert model.features(images).dtype == precision
    np.testing.assert_allclose(logits, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_softmax_is_float32(precision, form):
    # One key in 2049 gets e^9 times the weight of each other: 1 + 2048 e^-9 in the denominator.
    layer = Attention(1, dtype=f"mixed_{precision}", form=form)
    layer.build((None, 2049, 4))
    for name, scale in (("query", 6.0), ("key", 3.0), ("value", 0.0)):
        getattr(layer, name).kernel.assign(scale * np.eye(4))
    x = np.zeros((1, 2049, 4), np.float32)
    x[0, 0, 0] = 1.0
    _, weights = layer(x, return_weights=True)
    expected = np.exp([9.0] + [0.0] * 2048) / (np.exp(9.0) + 2048)
    np.testing.assert_allclose(weights[0, 0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_softmax_in_the_dtype_of_activations(form):
    layer = Attention(1, dtype="mixed_bfloat16", softmax="compute", form=form)
    x = np.random.default_rng(0).standard_normal((1, 9, 4)).astype(np.float32)
    y, weights = layer(x, return_weights=True)
    assert y.dtype == weights.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.reduce_sum(tf.cast(weights, tf.float32), -1), 1, atol=0.02)
    layer = Attention(1, softmax="compute", form=form)
    assert layer(x, return_weights=True)[1].dtype == tf.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_attention_to_large_values_stays_finite(precision, form):
    # The mean of 512 values of 300 is 300, though their sum is more than float16 holds.
    layer = Attention(1, dtype=f"mixed_{precision}", form=form)
    layer.build((None, 512, 4))
    for name, scale in (("query", 0.0), ("key", 0.0), ("value", 1.0), ("out", 1.0)):
        getattr(layer, name).kernel.assign(scale * np.eye(4))
    y = layer(np.full((1, 512, 4), 300.0, np.float32))
    np.testing.assert_allclose(tf.cast(y, tf.float32), np.full((1, 512, 4), 300.0), rtol=0.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_layer_norm_statistics_are_float32(precision, form):
    # Squares of 300 overflow float16; a mean of 300 in bfloat16 is a multiple of 2.
    x = 300 + 20 * np.random.default_rng(0).standard_normal((4, 64))
    x = tf.cast(x, precision)
    layer = layer_norm("norm", f"mixed_{precision}", form=form)
    exact = np.asarray(tf.cast(x, tf.float64))
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    actual = layer(x)
    assert actual.dtype == precision
    np.testing.assert_allclose(tf.cast(actual, tf.float64), expected, atol=0.012)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mean_over_tokens_is_float32(precision):
    # 300 x 300 tokens: their sum would overflow float16, and stand still at 256 in bfloat16.
    model = tiny_vit(pool="gap", precision=precision)
    pooled = model._pool(tf.cast(tf.fill((1, 1024, 4), 300.0), precision))
    assert pooled.dtype == precision
    np.testing.assert_array_equal(tf.cast(pooled, tf.float32), np.full((1, 4), 300.0))
