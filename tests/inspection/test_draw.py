"""The figures: what is light in them, their files, and what is said without matplotlib."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from vit_dist.inspection import draw
from vit_dist.inspection.look import ImagesLook, WeightsLook

RANDOM = np.random.default_rng(0)


def weights_look(channels=3, grid=(2, 3)):
    positions = np.clip(RANDOM.standard_normal((*grid, *grid)), -1, 1)
    filters = RANDOM.standard_normal((9, 4, 4, channels))
    return WeightsLook(filters, np.full(9, 0.1), positions, learned=True)


def images_look(count=2, grid=(2, 3), depth=3, channels=3, pool="tok"):
    rows, columns = grid
    return ImagesLook(
        images=RANDOM.integers(0, 255, (count, 8 * rows, 8 * columns, channels), np.uint8),
        pool=pool,
        distances=RANDOM.uniform(0, 9, (depth, 2)),
        uniform=9.0,
        heads=RANDOM.uniform(size=(count, 2, *grid)),
        rollout=RANDOM.uniform(size=(count, *grid)),
        norms=RANDOM.uniform(1, 5, (depth, count, *grid)),
        similarity=np.eye(depth),
    )


def titles(figure):
    (axes, *_) = figure.axes
    return axes.get_title(), [label.get_text() for label in axes.get_xticklabels()]


def shown(figure):
    """The array behind the one image of a figure."""
    return np.asarray(figure.axes[0].images[0].get_array())


@pytest.mark.parametrize(
    ("channels", "pool"),
    [
        pytest.param(
            channels, pool, marks=[] if i == j else pytest.mark.exhaustive, id=f"{channels}, {pool}"
        )
        for i, channels in enumerate([1, 3, 4])
        for j, pool in enumerate(["tok", "gap", "map"])
    ],
)
def test_all_figures_are_drawn(channels, pool):
    images = images_look(count=10, depth=20, channels=channels, pool=pool)
    figures = [*draw.draw_weights(weights_look(channels)), *draw.draw_images(images)]
    assert tuple(name for name, _ in figures) == draw.NAMES
    for _, figure in figures[2:5]:
        pixels = draw.pixels(figure)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and np.ptp(pixels) > 100


def test_a_single_image_of_one_patch_and_one_block():
    look = images_look(count=1, grid=(1, 1), depth=1)
    figures = dict(draw.draw_images(ImagesLook(**{**vars(look), "similarity": None})))
    assert tuple(figures) == draw.OF_IMAGES[:-1]
    assert "one image" in titles(figures["distances"])[0]


@pytest.mark.parametrize(
    ("pool", "who"),
    [
        ("tok", "the cls token attends"),
        ("tok_gap", "cls token and patches, half each, attend"),
        ("map", "the pooling attends"),
        ("gap", "the patches, in the mean, attend"),
        ("none", "the patches, in the mean, attend"),
    ],
)
def test_attention_is_said_to_be_that_of_what_the_head_reads(pool, who):
    figure = dict(draw.draw_images(images_look(pool=pool)))["attention"]
    assert titles(figure)[0] == f"what {who} to before the head"


def test_positions_stand_at_their_places():
    look = weights_look(grid=(2, 3))
    found = shown(dict(draw.draw_weights(look))["positions"])
    # Maps of 2 x 3 cells with a line between them.
    assert found.shape == (2 * 3 - 1, 3 * 4 - 1)
    np.testing.assert_array_equal(found[3:5, 4:7], look.positions[1, 1])
    assert np.ma.getmaskarray(np.ma.masked_invalid(found))[2].all()


def test_of_a_large_grid_every_third_patch_has_a_map():
    look = weights_look(grid=(37, 2))
    (figure,) = [figure for name, figure in draw.draw_weights(look) if name == "positions"]
    found = shown(figure)
    assert found.shape == (13 * 38 - 1, 2 * 3 - 1)
    np.testing.assert_array_equal(found[38 : 38 + 37, 3:5], look.positions[3, 1])
    ticks = figure.axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks[:3]] == ["1", "4", "7"] and len(ticks) == 13


def test_the_lightest_patch_is_where_the_map_is_largest():
    look = images_look(count=2, grid=(2, 3))
    look.rollout[1] = 0.1
    look.rollout[1, 1, 2] = 0.9
    sheet = shown(dict(draw.draw_images(look))["rollout"]).astype(int)
    height, width = 75, 112  # of a tile: 16 x 24 pixels, enlarged
    tile = sheet[height + draw._GAP :, width + draw._GAP :][:height, :width].sum(-1)
    row, column = np.unravel_index(tile.argmax(), tile.shape)
    assert row >= height // 2 and column >= 2 * width // 3
    assert tile[0, 0] == tile[height // 2 - 2, 0] < tile.max()


def test_a_map_that_is_the_same_everywhere_is_dark():
    flat = np.full((2, 2), 0.25) + np.array([[0, 1e-9], [0, 0]])
    assert len(np.unique(draw._coloured(flat, (8, 8)).reshape(-1, 3), axis=0)) == 1


def test_distances_show_each_head():
    look = images_look(depth=3)
    look.distances[1, 0] = np.nan  # a head that looks at no patch
    axes = dict(draw.draw_images(look))["distances"].axes[0]
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1].reshape(3, 2), look.distances)
    np.testing.assert_array_equal(points[:, 0].astype(int).reshape(3, 2), [[1, 1], [2, 2], [3, 3]])
    assert axes.lines[0].get_ydata()[1] == look.distances[1, 1]
    assert axes.lines[1].get_ydata()[0] == look.uniform


def test_norms_name_their_blocks_and_ranges():
    look = images_look(depth=12)
    _, labels = titles(dict(draw.draw_images(look))["norms"])
    assert [label.split("\n")[0] for label in labels[1:]] == [
        f"block {i}" for i in (1, 3, 5, 8, 10, 12)
    ]
    low, high = look.norms[-1].min(), look.norms[-1].max()
    assert labels[-1].endswith(f"{low:.3g} to {high:.3g}")


def test_colours_differ_in_lightness_alone():
    """So that no kind of colour blindness makes two of them one: luminance only ever grows."""
    ramp = draw._coloured(np.linspace(0, 1, 64)[None], (1, 64))[0].astype(float)
    assert (np.diff(ramp @ [0.299, 0.587, 0.114]) > 0).all()


@pytest.mark.parametrize(
    ("format", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_files(format, begin):
    """The same figure gives the same file."""
    look = weights_look()
    files = [draw.encode(dict(draw.draw_weights(look))["positions"], format) for _ in range(2)]
    assert files[0].startswith(begin) and files[0] == files[1]
    if format == "png":
        with Image.open(io.BytesIO(files[0])) as image:
            assert min(image.size) > 100


def test_without_matplotlib_a_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"this needs matplotlib.*pip install matplotlib"):
        draw.check_matplotlib("this")
