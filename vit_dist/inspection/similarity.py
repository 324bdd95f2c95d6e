"""How alike vectors are: position embeddings by their angle, blocks by CKA."""

from collections.abc import Sequence

import numpy as np


def position_similarity(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarity of each patch's position embedding to those of all patches.

    Args:
      table: (rows * columns, D), of the patches alone; see ViT.patch_positions.
      grid: (rows, columns).

    Returns:
      float64 (rows, columns, rows, columns) in [-1, 1]; entry [i, j] is the map of the patch in row
      i and column j. An embedding of zeros is similar to none, itself included.
    """
    vectors = table.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Where the length is 0, so is the vector: any divisor but 0 keeps it.
    vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    # Rounding may take the product of two equal vectors of length 1 beyond 1.
    return np.clip(vectors @ vectors.T, -1.0, 1.0).reshape(*grid, *grid)


def cka(features: Sequence[np.ndarray]) -> np.ndarray:
    """Linear centered kernel alignment between sets of features of the same examples.

    CKA (Kornblith et al., arXiv 1905.00414) is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) for the
    matrices K and L of inner products between examples. It does not change where features are
    rotated, shifted or scaled. HSIC is the unbiased estimate of Song et al. (JMLR 13, 2012), as
    Nguyen et al. (arXiv 2010.15327) take it: with fewer examples than features the plain one finds
    all features alike.

    Args:
      features: (n, D) each, the same n examples in the same order; n >= 4, D may differ.

    Returns:
      float64 (len(features), len(features)), 1 on the diagonal. Estimates for features that have
      nothing in common scatter about 0, so they may be negative. NaN where features do not vary.
    """
    # An inner product of two matrices is one of their entries laid out as vectors, so all pairs of
    # features cost one product of matrices.
    kernels = np.stack([_centered_kernel(x).ravel() for x in features])
    products = kernels @ kernels.T
    lengths = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(lengths, lengths)


def _centered_kernel(features: np.ndarray) -> np.ndarray:
    """(n, D) -> (n, n): inner products between examples, centered so that the diagonal is left out.

    The inner product of two such matrices is n (n - 3) times the unbiased HSIC (Székely and Rizzo,
    Annals of Statistics 42, 2014, "U-centering").
    """
    n = len(features)
    if n < 4:
        raise ValueError(f"CKA needs 4 examples or more, got {n}")
    # A shift changes nothing in the end, but without one large means would take digits away.
    x = features.astype(np.float64)
    x = x - x.mean(axis=0)
    kernel = x @ x.T
    np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(axis=0)
    kernel -= (rows[:, None] + rows[None, :]) / (n - 2)
    kernel += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(kernel, 0.0)
    return kernel
