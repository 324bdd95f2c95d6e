"""Attention distance, rollout and what the head reads, on attention made for it."""

import math

import numpy as np
import pytest

from vit_dist.inspection.attention import (
    as_head_reads,
    mean_distances,
    patch_distances,
    roll_out,
)


def random_weights(*shape, seed=0):
    """Rows that sum to 1."""
    weights = np.random.default_rng(seed).uniform(size=(*shape, shape[-1])) ** 4
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def distance(query, key, columns, patch):
    """Between the centres of two patches, by their numbers."""
    (i, j), (k, m) = divmod(query, columns), divmod(key, columns)
    return patch * math.hypot(i - k, j - m)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_head_that_looks_at_itself_has_distance_0(prefix):
    weights = np.tile(np.eye(12 + prefix), (2, 3, 1, 1))
    assert not mean_distances(weights, patch_distances((3, 4), 16)).any()


@pytest.mark.parametrize("grid", [(3, 3), (2, 7), (1, 5)])
def test_equal_weight_gives_the_mean_over_the_grid(grid):
    count = grid[0] * grid[1]
    pairs = [distance(q, k, grid[1], 16) for q in range(count) for k in range(count)]
    weights = np.full((1, 1, count, count), 1 / count, np.float32)
    found = mean_distances(weights, patch_distances(grid, 16))
    np.testing.assert_allclose(found, [[np.mean(pairs)]], rtol=1e-6)


@pytest.mark.parametrize("step", [1, 3])
def test_a_head_that_looks_so_many_patches_away(step):
    columns = 8
    # Each patch looks at one to its right, or to its left where the row ends.
    weights = np.zeros((1, 1, columns, columns))
    for query in range(columns):
        weights[0, 0, query, query + step if query + step < columns else query - step] = 1
    assert mean_distances(weights, patch_distances((1, columns), 14)) == 14 * step


def test_distances_by_definition():
    grid, prefix, patch = (3, 4), 2, 8
    weights = random_weights(2, 3, 14)
    found = mean_distances(weights, patch_distances(grid, patch))
    for image, head in np.ndindex(2, 3):
        means = []
        for query in range(12):
            row = weights[image, head, prefix + query, prefix:].astype(np.float64)
            far = [distance(query, key, grid[1], patch) for key in range(12)]
            means.append(np.dot(row, far) / row.sum())
        np.testing.assert_allclose(found[image, head], np.mean(means), rtol=1e-6)


def test_a_head_that_looks_at_no_patch_has_no_distance():
    weights = np.zeros((1, 2, 5, 5))
    weights[..., 0] = 1  # all at the cls token
    weights[0, 1, 2] = [0, 0, 0, 1, 0]  # but for one patch, which looks two rows down
    found = mean_distances(weights, patch_distances((4, 1), 10))
    assert np.isnan(found[0, 0]) and found[0, 1] == 10


def test_rollout_by_definition():
    blocks = [random_weights(2, 3, 6, seed=i) for i in range(4)]
    found = None
    for weights in blocks:
        found = roll_out(found, weights)
    for image in range(2):
        expected = np.eye(6)
        for weights in blocks:
            step = np.zeros((6, 6))
            for head in range(3):
                step += weights[image, head] / 3
            step = (step + np.eye(6)) / 2
            expected = (step / step.sum(1, keepdims=True)).dot(expected)
        np.testing.assert_allclose(found[image], expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_heads_that_look_at_themselves_roll_out_to_nothing_new():
    found = None
    for _ in range(5):
        found = roll_out(found, np.tile(np.eye(4), (1, 2, 1, 1)))
    np.testing.assert_allclose(found[0], np.eye(4))


def test_what_the_head_reads():
    prefix, rows = 3, random_weights(2, 7)
    patches = rows[:, prefix:, prefix:]
    pooling = np.array([[0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]])
    token, mean = rows[:, 0, prefix:], sum(patches[:, i] for i in range(4)) / 4
    expected = {"tok": token, "gap": mean, "none": mean, "tok_gap": (token + mean) / 2}
    expected["map"] = [sum(w * patches[b, q] for q, w in enumerate(pooling[b])) for b in range(2)]
    for pool, rows_read in expected.items():
        found = as_head_reads(rows, pool, prefix, pooling if pool == "map" else None)
        np.testing.assert_allclose(found, rows_read, atol=1e-6, err_msg=pool)
