"""Looks inside a ViT: what its weights are, and what it computes of some images.

Shapes: B images, H heads, P patches in a grid of (rows, columns).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vit_dist.inspection.attention import as_head_reads, mean_distances, patch_distances, roll_out
from vit_dist.inspection.filters import principal_components
from vit_dist.inspection.similarity import cka, position_similarity
from vit_dist.model.vit import ViT

# Numbers of attention weights of one block that are in memory at a time: 256 MB in float32.
_MOST_WEIGHTS = 2**26
# Tokens that CKA compares, over all images: its cost grows with the square, its error shrinks.
CKA_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class WeightsLook:
    """What can be seen without an image.

    Attributes:
      filters: (n, p, q, C), principal components of the patch kernel.
      shares: (n,), of the filters' variance that they explain.
      positions: (rows, columns, rows, columns), cosine similarity of position embeddings.
      learned: whether positions are learned, else they are the fixed sincos2d.
    """

    filters: np.ndarray
    shares: np.ndarray
    positions: np.ndarray
    learned: bool


@dataclasses.dataclass(frozen=True)
class ImagesLook:
    """What a model computes of images, the cls token and registers left out.

    Attributes:
      images: uint8 (B, height, width, C), what the model saw, before scaling.
      pool: the model's, which decides whose attention `heads` and `rollout` show.
      distances: (depth, H), mean attention distance in pixels, over all images.
      uniform: what that distance is where all patches get equal weight.
      heads: (B, H, rows, columns), the last attention before the head: the last block's as the head
        reads it, or that of pool "map" itself.
      rollout: (B, rows, columns), attention rollout as the head reads it.
      norms: (depth, B, rows, columns), length of each token after each block.
      similarity: (depth, depth), CKA between the blocks' outputs, each patch being an example; None
        with fewer than 4 patches.
    """

    images: np.ndarray
    pool: str
    distances: np.ndarray
    uniform: float
    heads: np.ndarray
    rollout: np.ndarray
    norms: np.ndarray
    similarity: np.ndarray | None


def look_at_weights(model: ViT) -> WeightsLook:
    """Patch kernel and position embeddings of a built model."""
    kernel = np.asarray(tf.convert_to_tensor(model.embedding.kernel))
    filters, shares = principal_components(kernel)
    positions = position_similarity(model.patch_positions(), model.grid)
    return WeightsLook(filters, shares, positions, model.posemb == "learned")


def look_at_images(
    model: ViT,
    images: np.ndarray,
    scaled: tf.Tensor,
    *,
    on_block: Callable[[], None] = lambda: None,
) -> ImagesLook:
    """Runs a model in inference mode, and keeps what figures show of it.

    Args:
      model: with any pool, with or without a head.
      images: uint8 (B, height, width, C), for the figures.
      scaled: the same images as the model takes them.
      on_block: called after each block; what it raises ends the look.
    """
    count, (rows, columns) = len(images), model.grid
    chosen = _choose_tokens(count * rows * columns)
    tokens = model.prefix + rows * columns
    # A block's weights are the largest thing here, so large models see fewer images at a time.
    heads = int(model.get_config()["num_heads"])
    each = max(1, _MOST_WEIGHTS // (heads * tokens**2))
    parts = []
    for start in range(0, count, each):
        # Which of the chosen tokens are in these images, and where.
        first = start * rows * columns
        here = chosen[(chosen >= first) & (chosen < first + each * rows * columns)] - first
        parts.append(_look_at_some(model, scaled[start : start + each], here, on_block))
    distances, maps, rollout, norms, samples = zip(*parts, strict=True)
    far = patch_distances(model.grid, model.patch_size)
    return ImagesLook(
        images=images,
        pool=model.pool,
        distances=_mean_over_images(np.concatenate(distances, axis=1)),
        uniform=float(far.mean()),
        heads=np.concatenate(maps).reshape(count, -1, rows, columns),
        rollout=np.concatenate(rollout).reshape(count, rows, columns),
        norms=np.concatenate(norms, axis=1).reshape(-1, count, rows, columns),
        similarity=cka(np.concatenate(samples, axis=1)) if len(chosen) >= 4 else None,
    )


def _choose_tokens(count: int) -> np.ndarray:
    """Sorted numbers of the tokens that CKA compares; the same ones for the same count."""
    if count <= CKA_TOKENS:
        return np.arange(count)
    # At random, because evenly spaced ones would come from few columns of the grid.
    return np.sort(np.random.default_rng(0).choice(count, CKA_TOKENS, replace=False))


def _mean_over_images(distances: np.ndarray) -> np.ndarray:
    """(depth, B, H) -> (depth, H); images where a head looks at no patch are left out."""
    seen = ~np.isnan(distances)
    total = np.where(seen, distances, 0.0).sum(axis=1)
    return np.where(seen.any(axis=1), total / np.maximum(seen.sum(axis=1), 1), np.nan)


def _look_at_some(
    model: ViT, images: tf.Tensor, here: np.ndarray, on_block: Callable[[], None]
) -> tuple[np.ndarray, ...]:
    """One pass: distances (depth, b, H), maps (b, H, P), rollout (b, P), norms (depth, b, P) and
    the outputs (depth, n, D) of the tokens `here`, numbers of patches over these images.
    """
    far = patch_distances(model.grid, model.patch_size)
    distances, norms, samples = [], [], []
    rolled: np.ndarray | None = None
    for tokens, attention in model.walk(images):
        # float32 whatever the model computes in: NumPy has no bfloat16.
        weights = tf.cast(attention, tf.float32).numpy()
        patches = tf.cast(tokens[:, model.prefix :], tf.float32).numpy()
        distances.append(mean_distances(weights, far))
        rolled = roll_out(rolled, weights)
        norms.append(np.linalg.norm(patches, axis=-1))
        samples.append(patches.reshape(-1, model.width)[here])
        on_block()
    pooling = None
    if model.pool == "map":
        pooling = tf.cast(model.pooling_weights(tokens), tf.float32).numpy()
    # Pool "map" is itself the last attention that the head sees images through.
    maps = as_head_reads(weights, model.pool, model.prefix) if pooling is None else pooling
    mean = None if pooling is None else pooling.mean(axis=1)
    assert rolled is not None, "a model has blocks"
    rollout = as_head_reads(rolled, model.pool, model.prefix, mean)
    return np.stack(distances), maps, rollout, np.stack(norms), np.stack(samples)
