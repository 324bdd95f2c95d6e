"""Sheets of images with captions."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vit_dist.inspection.lettering import LINE_HEIGHT, draw_text, shortened, text_width

GAP = 6  # pixels between images and around them
# Pixels of an image's longer side; smaller images are enlarged, larger ones reduced.
SMALLEST, LARGEST = 64, 224
LONGEST = 400  # pixels of a caption; longer ones are cut
# A class is named in a caption from this share of the label on: smoothed labels have a little of
# every class.
LEAST_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image of a sheet.

    Attributes:
      image: uint8 (H, W, 3), or (H, W) grey.
      caption: one line, above the image.
    """

    image: np.ndarray
    caption: str = ""


def draw_sheet(rows: Sequence[Sequence[Cell]], *, titles: Sequence[str] = ()) -> Image.Image:
    """Draws rows of images, each below its caption.

    Args:
      rows: from top to bottom, all of one length; only the last may be shorter.
      titles: stand above the columns; as many as the first row has cells, or none.

    Returns:
      An RGB image, as large as it has to be.
    """
    captions = [[shortened(cell.caption, LONGEST) for cell in row] for row in rows]
    images = [[_thumbnail(cell.image) for cell in row] for row in rows]
    # A column is as wide as its widest title, caption or image.
    widths = [0] * len(rows[0])
    for i, title in enumerate(titles):
        widths[i] = _ceil(text_width(title))
    for texts, row in zip(captions, images, strict=True):
        for i, (text, image) in enumerate(zip(texts, row, strict=True)):
            widths[i] = max(widths[i], image.width, _ceil(text_width(text)))
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    # A row is a caption, as much room as its tallest image takes, and a gap.
    heights = [LINE_HEIGHT + max(image.height for image in row) + GAP for row in images]
    top = LINE_HEIGHT + GAP if titles else GAP
    size = (lefts[-1] + widths[-1] + GAP, top + sum(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles, strict=False):
        draw_text(draw, (left, 0), title)
    for texts, row, height in zip(captions, images, heights, strict=True):
        for left, text, image in zip(lefts, texts, row, strict=False):
            draw_text(draw, (left, top), text)
            sheet.paste(image, (left, top + LINE_HEIGHT))
        top += height
    return sheet


def draw_grid(cells: Sequence[Cell], *, columns: int = 4) -> Image.Image:
    """Draws images in rows of `columns`, each below its caption."""
    return draw_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def stack(parts: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Puts sheets one below the other, each below its title."""
    heading = GAP + LINE_HEIGHT
    widths = [max(image.width, _ceil(text_width(title)) + 2 * GAP) for title, image in parts]
    height = sum(heading + image.height for _, image in parts)
    whole = Image.new("RGB", (max(widths), height), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for title, image in parts:
        draw_text(draw, (GAP, top + GAP), title)
        whole.paste(image, (0, top + heading))
        top += heading + image.height
    return whole


def describe_label(label: np.ndarray, names: Sequence[str]) -> str:
    """A caption for a label: "cat", or "0.70 cat + 0.30 dog" if it has shares of several classes.

    Args:
      label: a class number, or (C,) the share of each class.
      names: the names of the C classes.
    """
    label = np.asarray(label)
    # A wrong number is shown as it is: a sheet is where people look for wrong labels.
    if not label.ndim:
        number = int(label)
        known = 0 <= number < len(names)
        return names[number] if known else f"label {number}, of {len(names)} classes"
    # The largest shares first, at most three: a caption is short.
    largest = np.argsort(-label, kind="stable")[:3]
    named = [i for i in largest if label[i] >= LEAST_SHARE]
    if len(named) < 2:
        return names[int(largest[0])]
    return " + ".join(f"{label[i]:.2f} {names[i]}" for i in named)


def _ceil(length: float) -> int:
    return int(length) + 1


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    """The image enlarged by a whole number to at least SMALLEST, or reduced to LARGEST.

    Of one or two channels the first is shown as grey, of more than three the first three as colour:
    Pillow would take the second or fourth one for transparency.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
    image = Image.fromarray(pixels)
    # thumbnail() only ever reduces, in place.
    image.thumbnail((LARGEST, LARGEST))
    # Rounded up; a whole number and NEAREST, so that each pixel of a small image is a square.
    factor = -(-SMALLEST // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
