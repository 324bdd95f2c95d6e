"""Sheets: where images and captions stand, and what a caption says."""

import numpy as np
import pytest

from vit_dist.inspection.lettering import LINE_HEIGHT, text_width
from vit_dist.inspection.sheet import (
    GAP,
    LARGEST,
    LONGEST,
    SMALLEST,
    Cell,
    describe_label,
    draw_grid,
    draw_sheet,
)


def filled(value, height=SMALLEST, width=SMALLEST):
    return np.full((height, width, 3), value, np.uint8)


def test_cells_stand_in_rows_and_columns():
    sheet = np.asarray(draw_grid([Cell(filled(40 + i), "x") for i in range(7)], columns=3))
    pitch = (SMALLEST + GAP + LINE_HEIGHT, SMALLEST + GAP)
    assert sheet.shape == (GAP + 3 * pitch[0], GAP + 3 * pitch[1], 3)
    for i in range(7):
        top = GAP + i // 3 * pitch[0] + LINE_HEIGHT
        left = GAP + i % 3 * pitch[1]
        assert (sheet[top : top + SMALLEST, left : left + SMALLEST] == 40 + i).all()
        caption = sheet[top - LINE_HEIGHT : top, left : left + SMALLEST]
        assert (caption < 128).any()
    assert (
        sheet[-SMALLEST:, GAP + pitch[1] :] == 255
    ).all()  # two places of the last row are empty


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels(channels):
    levels = (200, 50, 90, 0, 7)[:channels]
    cell = Cell(np.full((SMALLEST, SMALLEST, channels), levels, np.uint8))
    pixel = np.asarray(draw_grid([cell]))[-GAP - 9, -GAP - 9]
    assert pixel.tolist() == list(levels[:3] if channels > 2 else levels[:1] * 3)


def test_titles_stand_above_their_columns():
    rows = [[Cell(filled(9), "a"), Cell(filled(9))]]
    plain, titled = (np.asarray(draw_sheet(rows, titles=t)) for t in ((), ("one", "two")))
    assert titled.shape[0] == plain.shape[0] + LINE_HEIGHT
    head = titled[:LINE_HEIGHT]
    assert (head[:, : GAP + SMALLEST] < 128).any() and (head[:, 2 * GAP + SMALLEST :] < 128).any()
    np.testing.assert_array_equal(titled[LINE_HEIGHT + GAP :], plain[GAP:])


def test_a_column_is_as_wide_as_what_is_in_it():
    text = "a caption that is wider than its image"
    sheet = draw_sheet([[Cell(filled(0), text), Cell(filled(0))]])
    assert sheet.width == 3 * GAP + int(text_width(text)) + 1 + SMALLEST
    assert draw_sheet([[Cell(filled(0), "long " * 200)]]).width <= LONGEST + 2 * GAP + 1


@pytest.mark.parametrize(
    ("size", "shown"), [((8, 8), (64, 64)), ((5, 10), (35, 70)), ((448, 224), (224, 112))]
)
def test_sizes(size, shown):
    sheet = draw_sheet([[Cell(filled(7, *size))]])
    height, width = (np.asarray(sheet) == 7).all(-1).nonzero()
    assert (np.ptp(height) + 1, np.ptp(width) + 1) == shown and max(shown) <= LARGEST


def test_small_pixels_stay_sharp():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    sheet = np.asarray(draw_sheet([[Cell(pixels)]]))[..., 0]
    enlarged = sheet[GAP + LINE_HEIGHT :][:64, GAP : GAP + 64]
    np.testing.assert_array_equal(enlarged, np.repeat(np.repeat(pixels, 8, 0), 8, 1))


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (1, "dog"),
        (np.int64(0), "cat"),
        (3, "label 3, of 3 classes"),
        (-1, "label -1, of 3 classes"),
        ([0, 0, 1], "emu"),
        ([0.0, 0.0, 0.0], "cat"),
        ([0.7, 0.3, 0.0], "0.70 cat + 0.30 dog"),
        ([0.2, 0.5, 0.3], "0.50 dog + 0.30 emu + 0.20 cat"),
        ([0.02, 0.96, 0.02], "dog"),
        ([1, 0, 1], "1.00 cat + 1.00 emu"),
    ],
)
def test_labels(label, text):
    assert describe_label(label, ("cat", "dog", "emu")) == text
