"""Rematerialisation and blockwise attention: the same numbers, computed anew and not kept."""

import functools
import re

import numpy as np
import pytest
import tensorflow as tf

from tests.support.networks import images_for, tiny_vit
from vit_dist.model.layers import Attention
from vit_dist.model.memory import POLICIES, blockwise_attention, rematerialized
from vit_dist.model.vit import named_weights
from vit_dist.model.xla import barrier, in_xla

SEED = (3, 7)


def step_of(model):
    """images -> loss, and the gradients of all weights and of the images."""
    weights = [v.value for v in named_weights(model).values()]

    def step(images, seed):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([*weights, images])
            loss = tf.reduce_sum(tf.sin(model(images, training=True, seed=seed)))
        return loss, tape.gradient(loss, [*weights, images])

    return step


def gradients(model, *, jit):
    images = tf.constant(images_for(model))
    seed = tf.constant(SEED, tf.int32)
    _, grads = tf.function(step_of(model), jit_compile=jit, autograph=False)(images, seed)
    return {
        name: g.numpy() for name, g in zip((*named_weights(model), "images"), grads, strict=True)
    }


# Masks of the one block, too: by default the first block drops no paths.
OPTIONS = {
    "depth": 1,
    "dropout": 0.2,
    "drop_path": 0.3,
    "drop_path_growth": "constant",
    "layer_scale": 0.5,
    "pool": "tok",
    "rep_size": 8,
}


# All policies draw the masks of what they compute again, and `full` computes all of it again.
TRIED = ["full", "attention_mlp", pytest.param("attention", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("policy", TRIED)
def test_the_same_gradients_in_half_precision(policy):
    """Masks included: a layer that is computed again draws what it drew.

    tests/training/test_gradients.py compares them in float32, with XLA and without.
    """
    # Sums of bfloat16 in another order.
    compare_with_none(policy, limit=0.04, jit=False, precision="bfloat16")


@pytest.mark.exhaustive  # below, masks are drawn again; a seed's are the same (test_dropout.py)
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_the_same_gradients_in_the_form_for_tpus(policy):
    # Attention's own masks are drawn again, too.
    compare_with_none(policy, limit=1e-6, jit=True, form="tensor", attention_dropout=0.2)


def compare_with_none(policy, *, limit, jit, **made):
    expected, found = (
        gradients(tiny_vit(remat=name, **made, **OPTIONS), jit=jit) for name in ("none", policy)
    )
    total = norm(expected.values())
    errors = {name: g - expected[name] for name, g in found.items()}
    assert norm(errors.values()) <= limit * total
    for name, error in errors.items():
        # The key's bias has no gradient but rounding: it moves all logits of a row alike.
        assert norm([expected[name]]) > 1e-3 or name.endswith("key/bias"), name
        assert norm([error]) <= 10 * limit * max(norm([expected[name]]), 0.1), name


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(a.astype(np.float64))) for a in arrays))


@functools.cache
def program(policy, stage, **options):
    """XLA's program of the step: "hlo" as every kind of device gets it, or "optimized_hlo"."""
    return _lowered(policy, **options)(stage=stage)


@functools.cache
def _lowered(policy, **options):
    model = tiny_vit(remat=policy, **options)
    images, seed = tf.constant(images_for(model)), tf.constant(SEED, tf.int32)
    step = tf.function(step_of(model), jit_compile=True, autograph=False)
    return step.experimental_get_compiler_ir(images, seed)


def instructions(policy):
    """How often each kind of instruction is in the step that XLA compiled."""
    hlo = program(policy, "optimized_hlo", depth=1)
    return {kind: len(re.findall(rf" {kind}\(", hlo)) for kind in ("dot", "tanh", "exponential")}


def test_xla_computes_again_what_it_was_told_to():
    """It merges equal expressions, which would keep everything after all."""
    plain, attention, attention_mlp, full = map(instructions, POLICIES)
    assert attention["dot"] == plain["dot"] + 2  # logits, and what is divided by the sum
    assert attention["tanh"] == plain["tanh"] and attention["exponential"] > plain["exponential"]
    # One product more, the MLP's first, and GELU's tanh.
    assert attention_mlp["dot"] == attention["dot"] + 1
    assert attention_mlp["tanh"] == full["tanh"]
    # q, k, v, logits, P V, out and the MLP's first; its second is not needed again.
    assert full["dot"] == plain["dot"] + 7
    assert full["tanh"] > plain["tanh"] and full["exponential"] > plain["exponential"]


def test_a_barrier_stands_before_what_is_computed_again():
    """GPUs and TPUs need it: there XLA sees that the zero of the other form is one."""
    barriers = [program(policy, "hlo").count(" opt-barrier(") for policy in POLICIES]
    assert barriers == [0, 2, 4, 2]  # for each block one, or one for each of its two branches


def test_masks_are_not_kept_where_a_tpu_computes_again():
    """The block's layers draw in the forward pass, and again when that is repeated."""
    draws = [
        # Philox makes the layers' seeds, the default generator their masks.
        program(policy, "hlo", form="tensor", depth=1, dropout=0.1).count("algorithm=rng_default")
        for policy in ("none", "full")
    ]
    # One layer behind the embedding, and three in the block.
    assert draws == [1 + 3, 1 + 2 * 3]


def test_the_barrier_has_gradients_of_any_order():
    assert not in_xla()

    @tf.function(jit_compile=True, autograph=False)
    def run(x):
        assert in_xla()
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y, z = barrier(x, 2.0 * x)
                total = y * y * z
            first = inner.gradient(total, x)
        return first, outer.gradient(first, x)

    assert [float(g) for g in run(tf.constant(3.0))] == [6 * 9, 12 * 3]  # of 2 x^3


def test_what_is_recomputed_waits_for_the_gradient_from_above():
    order = []

    def note(x, name):
        return tf.numpy_function(lambda v: (order.append(name), v)[1], [x], tf.float32)

    @tf.custom_gradient
    def above(x):
        return x, lambda upstream: tf.reshape(note(upstream, "gradient"), x.shape)

    def inner(x):
        return tf.reshape(note(x, "inner"), (3,)) * x

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = above(rematerialized(inner)(x))
        return tape.gradient(y, x)

    run(tf.ones(3))
    assert order == ["inner", "gradient", "inner"]


# Blockwise attention


def plain(query, key, value):
    return tf.matmul(tf.nn.softmax(tf.matmul(query, key, transpose_b=True)), value)


def both(function, *inputs):
    """The output, and the gradients of all inputs."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
        loss = tf.reduce_sum(tf.sin(3 * y))
    return [y, *tape.gradient(loss, inputs)]


@pytest.mark.parametrize(
    ("keys", "block", "jit"),
    [
        *((keys, block, False) for keys, block in ((12, 4), (12, 5), (7, 64), (9, 1))),
        (12, 5, True),
        *(
            pytest.param(keys, block, True, marks=pytest.mark.exhaustive)
            for keys, block in ((12, 4), (7, 64), (9, 1))
        ),
    ],
)
def test_blockwise_equals_plain(keys, block, jit):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, 3, n, 4)).astype("f") * s for n, s in ((6, 5), (keys, 1), (keys, 1))
    )

    def blockwise(*qkv):
        return blockwise_attention(*qkv, block_size=block)

    run = tf.function(lambda *qkv: both(blockwise, *qkv), jit_compile=jit, autograph=False)
    for got, expected in zip(run(query, key, value), both(plain, query, key, value), strict=True):
        largest = np.abs(expected).max()  # of terms that cancel, the rounding remains
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * largest)


def test_blockwise_with_large_logits():
    """The running maximum keeps exp from overflowing, whichever block holds the largest."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 1, 4, 4)).astype("f") * 100
    key, value = (rng.standard_normal((1, 1, 8, 4)).astype("f") for _ in range(2))
    got = blockwise_attention(*map(tf.constant, (query, key, value)), block_size=3)
    np.testing.assert_allclose(got, plain(query, key, value), rtol=1e-5, atol=1e-5)
    assert np.abs(query @ key.transpose(0, 1, 3, 2)).max() > 100


@functools.cache
def blockwise_gradients(block, precision="float32"):
    model = tiny_vit(attention_block=block, precision=precision, pool="map", depth=1)
    return gradients(model, jit=False)


def test_a_vit_with_blockwise_attention():
    plain, blockwise = blockwise_gradients(None), blockwise_gradients(3)
    for name, expected in plain.items():
        error = norm([blockwise[name] - expected])
        assert error <= 1e-5 * max(norm([expected]), 1), name


HALVES = [("bfloat16", 2**-8, 3), ("float16", 2**-11, 3)]


@pytest.mark.parametrize(
    ("precision", "epsilon", "block"),
    [*HALVES, *(pytest.param(*h[:2], None, marks=pytest.mark.exhaustive) for h in HALVES)],
)
def test_a_vit_with_blockwise_attention_in_half_precision(precision, epsilon, block):
    """As near to the gradients of float32 as rounding allows; how near depends on the processor.

    Plain attention (`block` None) is as near.
    """
    expected, found = blockwise_gradients(None), blockwise_gradients(block, precision)
    errors = {name: found[name] - expected[name] for name in expected}
    assert norm(errors.values()) <= 16 * epsilon * norm(expected.values())
    for name, error in errors.items():
        assert norm([error]) <= 64 * epsilon * max(norm([expected[name]]), 1), name


def test_nothing_as_large_as_the_logits():
    """Of 64 x 64 logits no tensor is left, forwards or backwards, with 16 keys at a time."""
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 64, 8)).astype("f"))

    def largest(**options):
        layer = Attention(2, name="attention", **options)
        layer.build((None, 64, 8))

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(tf.sin(layer(x, training=True)))
            return tape.gradient(y, x)

        step = tf.function(step, jit_compile=True, autograph=False)
        hlo = step.experimental_get_compiler_ir(x)(stage="optimized_hlo")
        shapes = re.findall(r"f32\[([\d,]+)\]", hlo)
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    assert largest() >= 2 * 2 * 64 * 64
    assert largest(block_size=16) <= 2 * 2 * 64 * 16


def test_layers_round_trip():
    layer = Attention(2, name="attention", recompute=True, block_size=4)
    assert Attention.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "all"}, "remat 'all' is unknown; allowed: none, attention, attention_mlp, full"),
        ({"attention_block": 0}, "attention_block must be 1 or more keys, or None, got 0"),
        (
            {"attention_block": 4, "remat": "attention"},
            "already computes the attention again .*: set remat to none",
        ),
        ({"attention_block": 4, "attention_dropout": 0.1}, "set attention_dropout to 0, not 0.1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_vit(**options)
