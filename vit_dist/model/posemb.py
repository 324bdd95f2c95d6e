"""Position embeddings: the fixed 2-D sine-cosine table, and resampling a learned one."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError


def sincos2d(grid: tuple[int, int], width: int, *, temperature: float = 10_000.0) -> np.ndarray:
    """The fixed table of MoCo v3 (arXiv 2104.02057) as big_vision computes it.

    Args:
      grid: (rows, columns) of patches.
      width: model width, divisible by 4.
      temperature: the longest wavelength.

    Returns:
      float32 (rows * columns, width): [sin x, cos x, sin y, cos y].

    Raises:
      ConfigError: width not divisible by 4, or below 8 (the frequencies divide by width / 4 - 1).
    """
    if width % 4 or width < 8:
        raise ConfigError(
            f"posemb 'sincos2d' needs a width divisible by 4 and at least 8, got {width}"
        )
    y, x = np.mgrid[: grid[0], : grid[1]]  # row and column of each patch
    # width / 4 frequencies, from 1 down to 1 / temperature in geometric steps.
    omega = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def _align_corners(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    # The first and last entries keep their places, as in vision_transformer, which calls
    # scipy.ndimage.zoom(order=1). tf.image.resize cannot do that: it aligns the centres of pixels.
    resized = tf.raw_ops.ResizeBilinear(images=table[None], size=grid, align_corners=True)
    return resized[0].numpy()


def _half_pixel(
    method: str, antialias: bool
) -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
    return lambda table, grid: tf.image.resize(table, grid, method, antialias=antialias).numpy()


def _torch_bicubic(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    # Not tf.image.resize's cubic, which has a = -0.5 and renormalises at edges: values of N(0, 1)
    # would be off by up to 0.4. The resize is separable: one matrix of weights for each axis.
    rows, columns = (_cubic_weights(old, new) for old, new in zip(table.shape, grid, strict=False))
    return np.einsum("ri,cj,ijd->rcd", rows, columns, table).astype(np.float32)


def _cubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """(new, old) weights of torch's interpolate(mode="bicubic", align_corners=False)."""
    # Where each new pixel's centre falls in the old grid, and the four old pixels around it.
    center = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    neighbours = np.floor(center) + np.arange(-1, 3)
    x = np.abs(center - neighbours)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.zeros((new, old))
    edges = np.clip(neighbours, 0, old - 1).astype(int)
    # Neighbours outside are clipped to the edge pixel, which then is hit more than once: add.at
    # sums its weights, where plain indexing would keep the last one.
    np.add.at(weights, (np.arange(new)[:, None], edges), np.where(x <= 1, near, far))
    return weights


METHODS: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "align_corners": _align_corners,  # vision_transformer, big_vision
    "bilinear": _half_pixel("bilinear", False),
    "bilinear_antialias": _half_pixel("bilinear", True),
    "bicubic": _torch_bicubic,  # DeiT
    "bicubic_antialias": _half_pixel("bicubic", True),  # timm
}


def resize_posemb(
    table: np.ndarray,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    old_prefix: int = 0,
    new_prefix: int = 0,
    method: str = "align_corners",
) -> np.ndarray:
    """Resamples a learned position table to another grid of patches.

    Args:
      table: float (1, old_prefix + rows * columns, D).
      old_grid: (rows, columns) of `table`.
      new_grid: (rows, columns) wanted.
      old_prefix: 1 if the first entry belongs to a cls token, else 0.
      new_prefix: 1 if the result's first entry shall belong to a cls token, else 0. An entry that
        `table` lacks becomes zeros; one that is not wanted is dropped.
      method: a key of METHODS. "align_corners" is the reference's.

    Returns:
      float32 (1, new_prefix + rows * columns, D).

    Raises:
      ConfigError: unknown method.
      ConfigError: a table whose length is not old_prefix + rows * columns.
    """
    if method not in METHODS:
        raise ConfigError(f"posemb method '{method}' is unknown; allowed: {', '.join(METHODS)}")
    table = np.asarray(table, np.float32)
    rows, columns = old_grid
    if table.ndim != 3 or table.shape[1] != old_prefix + rows * columns:
        raise ConfigError(
            f"a position table of shape {table.shape} does not hold {old_prefix} prefix tokens "
            f"and a grid of {rows}x{columns}"
        )
    prefix, patches = table[:, :old_prefix], table[0, old_prefix:]
    if tuple(old_grid) != tuple(new_grid):
        patches = METHODS[method](patches.reshape(rows, columns, -1), (new_grid[0], new_grid[1]))
    if new_prefix and not old_prefix:
        prefix = np.zeros((1, new_prefix, table.shape[2]), np.float32)
    patches = patches.reshape(1, new_grid[0] * new_grid[1], -1)
    return np.concatenate([prefix[:, :new_prefix], patches], axis=1)
