"""Principal components of the patch kernel, as in figure 7 of the ViT paper (arXiv 2010.11929)."""

import numpy as np

# As many as the paper shows.
SHOWN = 28


def principal_components(
    kernel: np.ndarray, *, count: int = SHOWN
) -> tuple[np.ndarray, np.ndarray]:
    """The directions in pixel space in which the filters of a patch embedding differ most.

    The D filters are D points of p * q * C numbers each; these are their principal components.

    Args:
      kernel: (p, q, C, D), as PatchEmbedding keeps it.
      count: how many components; fewer where there are no more.

    Returns:
      float64 (n, p, q, C), each of length 1, the largest first; and (n,) the share of the filters'
      variance that each explains. Signs are arbitrary: the largest number of each is positive.
    """
    shape, width = kernel.shape[:-1], kernel.shape[-1]
    filters = kernel.reshape(-1, width).T.astype(np.float64)  # (D, p * q * C)
    # Without their mean filter; else the first component would be little more than that mean.
    filters = filters - filters.mean(axis=0)
    _, lengths, components = np.linalg.svd(filters, full_matrices=False)
    components = components[:count]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
    total = np.sum(lengths**2)
    # A kernel of zeros has no variance to explain.
    shares = lengths[:count] ** 2 / total if total else np.zeros(len(components))
    return components.reshape(-1, *shape), shares
