"""What attention looks at: mean distance, rollout, and the view of what the head reads.

Shapes: B batch, H heads, N tokens, P patches; N = prefix + P, the prefix being the cls token and
registers. Attention weights are (B, H, N, N), [..., query, key], and rows sum to 1.
"""

import numpy as np


def patch_distances(grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """The distance in pixels between the centres of each two patches: float64 (P, P)."""
    places = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2) * float(patch_size)
    return np.linalg.norm(places[:, None] - places[None, :], axis=-1)


def mean_distances(weights: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """How far each head looks: the weighted mean distance from a patch to what it attends to.

    As in figure 7 of the ViT paper (arXiv 2010.11929): the distance between the query's patch and
    all others is averaged by attention weight, then over all queries. The cls token and registers
    have no place in the image, so they are no queries, and the weights of the patches are scaled
    to sum to 1.

    Args:
      weights: (B, H, N, N).
      distances: (P, P); see patch_distances.

    Returns:
      float64 (B, H), in the unit of `distances`. NaN where no patch attends to any patch.
    """
    prefix = weights.shape[-1] - len(distances)
    among = weights[..., prefix:, prefix:].astype(np.float64)
    total = among.sum(axis=-1)
    away = np.einsum("bhqk,qk->bhq", among, distances)
    # A patch that attends to the cls token or registers alone says nothing of distances: it is left
    # out of the mean.
    looks = total > 0
    means = np.where(looks, away / np.where(looks, total, 1.0), 0.0).sum(axis=-1)
    count = looks.sum(axis=-1)
    return np.where(count > 0, means / np.maximum(count, 1), np.nan)


def roll_out(before: np.ndarray | None, weights: np.ndarray) -> np.ndarray:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928), one block further.

    R_0 = I and R_l = (A_l + I) / 2 * R_(l-1), with A_l the mean over the heads of block l; the
    identity stands for the residual connection. Rows are scaled to sum to 1.

    Args:
      before: (B, N, N), R of the block before; None at the first block.
      weights: (B, H, N, N) of this block.

    Returns:
      (B, N, N): the share that each token (last axis) has in each output of this block.
    """
    step = weights.mean(axis=1) + np.eye(weights.shape[-1], dtype=weights.dtype)
    step = step / step.sum(axis=-1, keepdims=True)
    return step if before is None else step @ before


def as_head_reads(
    rows: np.ndarray, pool: str, prefix: int, pooling: np.ndarray | None = None
) -> np.ndarray:
    """Of what each token looks at, what the model's head gets to see.

    Args:
      rows: (..., N, N): a row for each token, such as attention weights or a rollout.
      pool: of ViT. "tok" reads the row of the cls token, "gap" and "none" the mean over the rows of
        the patches, "tok_gap" the mean of both, "map" the mean weighted by `pooling`.
      prefix: number of tokens before the patches.
      pooling: (..., P), sums to 1: the weights of pool "map".

    Returns:
      (..., P): the part of the patches. What the cls token and registers take of a row is not in
      it, so it may sum to less than 1.
    """
    patches = rows[..., prefix:, prefix:]
    if pool == "map" and pooling is not None:
        return np.einsum("...q,...qk->...k", pooling, patches)
    mean = patches.mean(axis=-2)
    token = rows[..., 0, prefix:]
    return {"tok": token, "tok_gap": (token + mean) / 2}.get(pool, mean)
