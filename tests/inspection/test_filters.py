"""Principal components of the patch kernel."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vit_dist.inspection.filters import principal_components


@pytest.mark.parametrize("shape", [(4, 4, 3, 64), (4, 4, 3, 20), (3, 5, 1, 40)])
def test_components_are_those_of_scikit_learn(shape):
    kernel = np.random.default_rng(0).standard_normal(shape) * np.linspace(1, 9, shape[2])[:, None]
    kernel = (kernel + 3).astype(np.float32)
    components, shares = principal_components(kernel, count=6)
    peer = PCA(n_components=6, svd_solver="full").fit(kernel.reshape(-1, shape[-1]).T)
    assert components.shape == (6, *shape[:-1])
    np.testing.assert_allclose(shares, peer.explained_variance_ratio_, atol=1e-6)
    for mine, other in zip(components.reshape(6, -1), peer.components_, strict=True):
        assert mine[np.abs(mine).argmax()] > 0
        np.testing.assert_allclose(mine * np.sign(mine @ other), other, atol=1e-4)


def test_a_kernel_of_two_patterns_has_these_two_components():
    stripes = np.tile([1.0, -1.0], (4, 2))[..., None]
    checks = stripes * stripes[0][None, :].transpose(1, 0, 2)
    random = np.random.default_rng(1)
    kernel = stripes[..., None] * random.normal(0, 5, 32) + checks[..., None] * random.normal(
        size=32
    )
    components, shares = principal_components(kernel)
    for i, pattern in enumerate((stripes, checks)):
        alike = np.sum(components[i] * pattern) / np.linalg.norm(pattern)
        # Patterns drawn at random are a little correlated.
        assert abs(alike) > 0.98
    np.testing.assert_allclose(shares[:2].sum(), 1.0)


def test_a_kernel_that_does_not_vary_explains_nothing():
    components, shares = principal_components(np.ones((2, 2, 3, 5)))
    assert np.isfinite(components).all() and not shares.any()
