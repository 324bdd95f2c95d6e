"""A look into a model: every pooling, cls token and registers, grids that are not square."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.networks import images_for, tiny_vit
from vit_dist.inspection import look as look_lib
from vit_dist.inspection.look import look_at_images, look_at_weights
from vit_dist.inspection.similarity import cka
from vit_dist.model.posemb import sincos2d

MODELS = {
    "tok": {"pool": "tok"},
    "gap": {"pool": "gap"},
    "gap_norm_after": {"pool": "gap", "norm_after_pool": True, "cls_token": True},
    "tok_gap": {"pool": "tok_gap", "registers": 2, "prefix_posemb": "all"},
    "map": {"pool": "map", "registers": 1},
    "map_norm_after": {"pool": "map", "norm_after_pool": True, "rep_size": 6},
    "none": {"pool": "none", "cls_token": True, "posemb": "sincos2d"},
    "headless": {"pool": "tok", "num_classes": 0, "prefix_posemb": "none"},
    "blockwise": {"pool": "gap", "attention_block": 3, "softmax": "compute"},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def look_at(model, count=3):
    scaled = tf.constant(images_for(model, count))
    return look_at_images(model, np.zeros((*scaled.shape[:-1], 3), np.uint8), scaled)


@models
def test_going_block_by_block_ends_in_the_models_logits(options):
    model = tiny_vit(**options)
    images = images_for(model)
    *_, (tokens, _) = model.walk(images)
    found = model.read_out(tokens)
    found = model.head(found) if model.head else found
    np.testing.assert_allclose(found, model(images), atol=1e-6)


@models
def test_a_look_is_what_the_blocks_give(options):
    model = tiny_vit(**options)
    images, look = images_for(model), look_at(model)
    inside = model.intermediates(images)
    weights = [w.numpy() for w in inside["attention"]]
    patches = [t.numpy()[:, model.prefix :] for t in inside["tokens"]]
    far = np.array([[np.hypot(i // 2 - j // 2, i % 2 - j % 2) for j in range(8)] for i in range(8)])
    p = model.prefix
    rolled = np.stack([np.eye(p + 8)] * 3)
    for block, w in enumerate(weights):
        among = w[:, :, p:, p:] / w[:, :, p:, p:].sum(-1, keepdims=True)
        means = 4 * (among * far).sum(-1).mean((0, 2))
        np.testing.assert_allclose(look.distances[block], means, rtol=1e-4)
        rolled = (w.mean(1) + np.eye(p + 8)) / 2 @ rolled
        lengths = np.sqrt((patches[block] ** 2).sum(-1)).reshape(3, 4, 2)
        np.testing.assert_allclose(look.norms[block], lengths, rtol=1e-5)
    np.testing.assert_allclose(look.uniform, 4 * far.mean())
    np.testing.assert_allclose(
        look.similarity, cka([x.reshape(24, -1) for x in patches]), atol=1e-6
    )
    # Row r of `read` is how much the head reads of token r's output.
    read = np.zeros((3, p + 8))
    if model.pool == "map":
        pooling = model.pooling_weights(inside["tokens"][-1]).numpy()
        np.testing.assert_allclose(pooling.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(look.heads.reshape(3, -1, 8), pooling)
        read[:, p:] = pooling.mean(1)
    else:
        read[:, 0] += {"tok": 1, "tok_gap": 0.5}.get(model.pool, 0)
        read[:, p:] += {"tok": 0, "tok_gap": 0.5}.get(model.pool, 1) / 8
        heads = np.einsum("br,bhrk->bhk", read, weights[-1])[..., p:]
        np.testing.assert_allclose(look.heads.reshape(3, -1, 8), heads, atol=1e-6)
    rollout = np.einsum("br,brk->bk", read, rolled)[:, p:]
    np.testing.assert_allclose(look.rollout.reshape(3, 8), rollout, atol=1e-6)


def test_pooling_weights_are_those_of_the_pooling():
    model = tiny_vit(pool="map")
    *_, (tokens, _) = model.walk(images_for(model))
    x = model.norm(tokens)
    pooled, weights = model.map_head(x, return_weights=True)
    np.testing.assert_array_equal(pooled, model.map_head(x))
    np.testing.assert_array_equal(weights[:, :, 0], model.pooling_weights(tokens))
    with pytest.raises(ValueError, match="'gap' has no weights of its own"):
        tiny_vit().pooling_weights(tokens)


def test_images_may_be_looked_at_in_parts(monkeypatch):
    model = tiny_vit(pool="map", registers=1)
    whole = look_at(model, 5)
    monkeypatch.setattr(look_lib, "CKA_TOKENS", 17)
    sampled = look_at(model, 5)
    assert not np.allclose(sampled.similarity, whole.similarity, atol=1e-4)
    # 81 = tokens squared, times 2 heads: two images at a time.
    monkeypatch.setattr(look_lib, "_MOST_WEIGHTS", 81 * 2 * 2)
    parts = look_at(model, 5)
    for name in ("distances", "heads", "rollout", "norms"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-5)
    np.testing.assert_allclose(parts.similarity, sampled.similarity, atol=1e-5)


def test_low_precision():
    look, exact = look_at(tiny_vit(precision="bfloat16")), look_at(tiny_vit())
    np.testing.assert_allclose(look.distances, exact.distances, rtol=0.05)


@pytest.mark.parametrize("options", [*MODELS.values(), {"posemb": "sincos2d"}])
def test_positions_are_those_of_the_patches(options):
    model = tiny_vit(**options)
    look = look_at_weights(model)
    assert look.positions.shape == (4, 2, 4, 2) and look.learned == (model.posemb == "learned")
    # Entries of tokens before the patches have no place in the image.
    table = model.pos_embedding.numpy()[0, -8:] if look.learned else sincos2d((4, 2), 16)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    np.testing.assert_allclose(look.positions.reshape(8, 8), unit @ unit.T, atol=1e-6)
    assert look.filters.shape == (16, 4, 4, 3)
