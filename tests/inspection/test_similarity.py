"""Similarity of position embeddings, and CKA."""

import numpy as np
import pytest

from vit_dist.inspection.similarity import cka, position_similarity
from vit_dist.model.posemb import sincos2d


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (6, 1)])
def test_sincos_positions_are_as_similar_as_the_formula_says(grid):
    """sin a sin b + cos a cos b = cos(a - b): a mean of cosines of the distance in each axis."""
    width = 32
    found = position_similarity(sincos2d(grid, width), grid)
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    for i, j, k, m in np.ndindex(*grid, *grid):
        both = [np.cos(frequencies * (j - m)).mean(), np.cos(frequencies * (i - k)).mean()]
        np.testing.assert_allclose(found[i, j, k, m], np.mean(both), atol=1e-6)


def test_similarity_of_vectors_made_for_it():
    table = np.array([[1, 0], [0, 2], [-3, 0], [0, 0], [1, 1], [5, 0]], np.float32)
    found = position_similarity(table, (2, 3))
    np.testing.assert_allclose(found[0, 0], [[1, 0, -1], [0, 0.5**0.5, 1]], atol=1e-7)
    assert not found[1, 0].any()
    np.testing.assert_allclose(found[1, 1, 0], [0.5**0.5, 0.5**0.5, -(0.5**0.5)], atol=1e-7)


def hsic(kernel, other):
    """Unbiased estimate of Song et al. 2012, equation 5, as it stands there."""
    n = len(kernel)
    k, m = kernel - np.diag(np.diag(kernel)), other - np.diag(np.diag(other))
    ones = np.ones(n)
    total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def test_cka_is_that_of_its_formula():
    random = np.random.default_rng(0)
    base = random.standard_normal((40, 12)) + 2
    features = [base, base[:, :5] ** 2, base + random.standard_normal((40, 12))]
    kernels = [x @ x.T for x in features]
    found = cka(features)
    for i, j in np.ndindex(3, 3):
        lengths = hsic(kernels[i], kernels[i]) * hsic(kernels[j], kernels[j])
        expected = hsic(kernels[i], kernels[j]) / np.sqrt(lengths)
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-9)


def test_rotating_scaling_and_shifting_change_nothing():
    random = np.random.default_rng(1)
    x, y = random.standard_normal((60, 16)), random.standard_normal((60, 9))
    y[:, :4] += 2 * x[:, :4]
    rotation, _ = np.linalg.qr(random.standard_normal((16, 16)))
    found = cka([x, x @ rotation * -7.5 + 100, y])
    np.testing.assert_allclose(found[0, 1], 1.0, atol=1e-9)
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
    assert 0.1 < found[0, 2] < 0.9
    # A direction that is stretched alone is another thing.
    assert cka([x, x * np.linspace(0.01, 9, 16)])[0, 1] < 0.95


def test_features_without_anything_in_common_are_not_alike():
    random = np.random.default_rng(2)
    features = [random.standard_normal((50, 200)) for _ in range(2)]
    assert abs(cka(features)[0, 1]) < 0.1
    # The biased estimate, with kernels centered as a whole, calls them alike.
    centered = [x - x.mean(0) for x in features]
    a, b = (x @ x.T for x in centered)
    assert np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) > 0.7


def test_features_that_do_not_vary():
    found = cka([np.ones((5, 3)), np.eye(5)])
    np.testing.assert_array_equal(np.isnan(found), [[True, True], [True, False]])
    with pytest.raises(ValueError, match="4 examples or more, got 3"):
        cka([np.eye(3)])
