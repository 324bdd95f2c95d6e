"""Patch kernels, channels and positions made for another model, value by value as timm has them."""

import numpy as np
import pytest

from tests.support.interop import NEEDS_PEERS, run_peer
from vit_dist.model.patches import change_channels, resize_kernel
from vit_dist.model.posemb import resize_posemb

pytestmark = NEEDS_PEERS
# Old and new side of a patch; growing and shrinking.
PATCHES = [(16, 32), (16, 14), (14, 16), (8, 16), (32, 16), (16, 8), (5, 12)]
CHANNELS = [1, 2, 4, 5, 6, 12]
# Our method, and torch's; old and new grid.
METHODS = {
    "bicubic_antialias": ("bicubic", "antialias"),
    "bicubic": ("bicubic", "plain"),
    "bilinear_antialias": ("bilinear", "antialias"),
    "bilinear": ("bilinear", "plain"),
}
GRIDS = [((7, 7), (12, 12)), ((14, 14), (9, 9)), ((8, 8), (5, 13)), ((6, 10), (12, 5))]
SQUARE = [grids for grids in GRIDS if grids[0][0] == grids[0][1]]  # what transformers takes


def kernel_key(old, new):
    return f"kernel {new} from {old}"


def timm_key(method, old, new):
    return " ".join(map(str, ("timm", *METHODS[method], *old, *new)))


def transformers_key(new):
    return f"transformers {new[0]} {new[1]}"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The arrays given, and what they become there; by key."""
    folder = tmp_path_factory.mktemp("surgery")
    normal = np.random.default_rng(0).standard_normal
    given = {kernel_key(old, new): normal((8, 3, old, old), "f") for old, new in PATCHES}
    given |= {f"channels {n}": normal((8, 3, 4, 4), "f") for n in CHANNELS}
    for old, new in GRIDS:
        table = normal((1, 2 + old[0] * old[1], 16), "f")
        given |= {timm_key(method, old, new): table for method in METHODS}
    for old, new in SQUARE:
        given[transformers_key(new)] = normal((1, 1 + old[0] * old[1], 16), "f")
    np.savez(folder / "given.npz", **given)
    run_peer("surgery", folder)
    with np.load(folder / "surgery.npz") as made:
        assert set(made) == set(given)
        return given, dict(made)


def assert_same(mine, theirs, tolerance):
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(("old", "new"), PATCHES)
def test_patches_of_another_size(both, old, new):
    """FlexiViT's resize: timm's resample_patch_embed, bilinear and without antialiasing."""
    given, made = (arrays[kernel_key(old, new)] for arrays in both)
    mine = resize_kernel(given.transpose(2, 3, 1, 0), new)
    assert_same(mine, made.transpose(2, 3, 1, 0), 1e-5)
    assert np.abs(mine).max() > 0.1


@pytest.mark.parametrize("channels", CHANNELS)
def test_other_channels(both, channels):
    given, made = (arrays[f"channels {channels}"] for arrays in both)
    mine = change_channels(given.transpose(2, 3, 1, 0), channels)
    assert_same(mine, made.transpose(2, 3, 1, 0), 1e-6)


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_positions_of_timm(both, method, old, new):
    """With two tokens before the patches, which stay as they are."""
    given, made = (arrays[timm_key(method, old, new)] for arrays in both)
    sizes = {"old_grid": old, "new_grid": new, "old_prefix": 2, "new_prefix": 2}
    assert_same(resize_posemb(given, method=method, **sizes), made, 2e-6)
    np.testing.assert_array_equal(made[:, :2], given[:, :2])


@pytest.mark.parametrize(("old", "new"), SQUARE)
def test_positions_of_transformers(both, old, new):
    given, made = (arrays[transformers_key(new)] for arrays in both)
    sizes = {"old_grid": old, "new_grid": new, "old_prefix": 1, "new_prefix": 1}
    assert_same(resize_posemb(given, method="bicubic", **sizes), made, 2e-6)
