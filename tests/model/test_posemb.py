"""Position tables at another grid: against SciPy, PIL and the formula."""

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from vit_dist.model.posemb import METHODS, resize_posemb

# old grid -> new grid: up, down, not square, one side only, to and from a single row.
GRIDS = [
    ((4, 4), (7, 7)),
    ((7, 7), (4, 4)),
    ((14, 14), (24, 24)),
    ((3, 5), (8, 4)),
    ((6, 4), (6, 9)),
    ((5, 3), (1, 1)),
    ((1, 4), (3, 4)),
]


def table_of(grid, *, prefix=0, width=6):
    shape = (1, prefix + grid[0] * grid[1], width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def resized(old, new, method):
    """The (rows, columns, D) tables before and after."""
    table = table_of(old)
    result = resize_posemb(table, old_grid=old, new_grid=new, method=method)
    assert result.shape == (1, new[0] * new[1], 6) and result.dtype == np.float32
    return table.reshape(*old, -1), result.reshape(*new, -1)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_align_corners_is_scipy_zoom(old, new):
    before, after = resized(old, new, "align_corners")
    factors = (new[0] / old[0], new[1] / old[1], 1)
    np.testing.assert_allclose(after, scipy.ndimage.zoom(before, factors, order=1), atol=2e-6)


def weights_along(old, new, *, kernel, support, antialias, clamp):
    """(new, old) weights: pixel centres at i + 0.5, the kernel widened where the image shrinks."""
    ratio = old / new
    widen = max(ratio, 1.0) if antialias else 1.0
    matrix = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * ratio - 0.5
        for j in range(int(np.floor(center - support * widen)), int(center + support * widen) + 2):
            inside = 0 <= j < old
            if inside or clamp:
                matrix[i, min(max(j, 0), old - 1)] += kernel((j - center) / widen)
    return matrix / matrix.sum(1, keepdims=True)


def triangle(x):
    return max(0.0, 1 - abs(x))


def cubic(x, a=-0.5):
    """Keys's cubic; a = -0.5 in PIL and in torch with antialias, -0.75 in torch without."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def torch_cubic(x):
    return cubic(x, a=-0.75)


HALF_PIXEL = {
    "bilinear": {"kernel": triangle, "support": 1, "antialias": False, "clamp": True},
    "bilinear_antialias": {"kernel": triangle, "support": 1, "antialias": True, "clamp": False},
    "bicubic": {"kernel": torch_cubic, "support": 2, "antialias": False, "clamp": True},
    "bicubic_antialias": {"kernel": cubic, "support": 2, "antialias": True, "clamp": False},
}


@pytest.mark.parametrize("method", HALF_PIXEL)
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_half_pixel_formula(old, new, method):
    before, after = resized(old, new, method)
    rows, columns = (weights_along(old[k], new[k], **HALF_PIXEL[method]) for k in range(2))
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, before)
    np.testing.assert_allclose(after, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "resample"),
    [
        ("bilinear_antialias", Image.Resampling.BILINEAR),
        ("bicubic_antialias", Image.Resampling.BICUBIC),
    ],
)
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_antialias_is_pil(old, new, method, resample):
    before, after = resized(old, new, method)
    for d in range(before.shape[-1]):
        image = Image.fromarray(before[..., d]).resize(new[::-1], resample)
        np.testing.assert_allclose(after[..., d], np.asarray(image), atol=1e-5)


def test_bicubic_of_three_squares_in_torch():
    # 0, 1, 4 by torch 2.13's interpolate(size=(5, 1), mode="bicubic").
    expected = [-0.096, 0.172001, 1.0, 2.908, 4.288001]
    table = np.arange(3, dtype=np.float32)[None, :, None] ** 2
    result = resize_posemb(table, old_grid=(3, 1), new_grid=(5, 1), method="bicubic")
    np.testing.assert_allclose(result[0, :, 0], expected, atol=2e-6)


def test_every_method_is_compared():
    assert set(METHODS) == {"align_corners", *HALF_PIXEL}


@pytest.mark.parametrize("new_grid", [(3, 5), (4, 2)])
@pytest.mark.parametrize("new_prefix", [0, 1])
@pytest.mark.parametrize("old_prefix", [0, 1])
def test_prefix(old_prefix, new_prefix, new_grid):
    table = table_of((3, 5), prefix=old_prefix)
    result = resize_posemb(
        table, old_grid=(3, 5), new_grid=new_grid, old_prefix=old_prefix, new_prefix=new_prefix
    )
    assert result.shape == (1, new_prefix + new_grid[0] * new_grid[1], 6)
    patches = resize_posemb(table[:, old_prefix:], old_grid=(3, 5), new_grid=new_grid)
    np.testing.assert_array_equal(result[:, new_prefix:], patches)
    if new_grid == (3, 5):
        np.testing.assert_array_equal(patches, table[:, old_prefix:])
    if new_prefix:
        cls = table[:, :1] if old_prefix else np.zeros((1, 1, 6))
        np.testing.assert_array_equal(result[:, :1], cls)


def test_the_table_given_stays_as_it_is():
    table = table_of((3, 5), prefix=1)
    before = table.copy()
    resize_posemb(table, old_grid=(3, 5), new_grid=(6, 6), old_prefix=1, new_prefix=1)
    np.testing.assert_array_equal(table, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nearest"}, "posemb method 'nearest' is unknown; allowed: align_corners, bil"),
        ({"old_prefix": 1}, r"shape \(1, 15, 6\) does not hold 1 prefix tokens .* grid of 3x5"),
        ({"old_grid": (4, 4)}, r"\(1, 15, 6\) does not hold 0 prefix tokens and a grid of 4x4"),
    ],
)
def test_tables_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        resize_posemb(table_of((3, 5)), **{"old_grid": (3, 5), "new_grid": (2, 2), **options})


def test_a_table_must_have_its_leading_axis():
    with pytest.raises(ValueError, match=r"shape \(6, 15\) does not hold"):
        resize_posemb(table_of((3, 5))[0].T, old_grid=(3, 5), new_grid=(2, 2))
