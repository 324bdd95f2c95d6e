"""Draws what look.py finds, with matplotlib.

matplotlib is an optional dependency and slow to import, so it is imported when a figure is drawn.
All colours can be told apart by colour-blind readers: the map cividis (Nuñez et al., PLOS ONE 13,
2018), and lines in colours of Okabe and Ito.
"""

import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_dist.config.errors import ConfigError
from vit_dist.inspection.look import ImagesLook, WeightsLook

FORMATS = ("png", "svg", "pdf")
# What can be drawn of weights alone, and what needs images, in the order of drawing.
OF_WEIGHTS = ("filters", "positions")
OF_IMAGES = ("distances", "attention", "rollout", "norms", "similarity")
NAMES = (*OF_WEIGHTS, *OF_IMAGES)
# Sheets of images show so many, the first; curves and CKA are of all.
ROWS = 8

# What matplotlib tells of its fonts is of no interest in the middle of a training's lines.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

_MAP = "cividis"
BLUE, ORANGE = "#0072B2", "#D55E00"
_DPI = 110
_TILE = 112  # pixels of the longer side of an image in a figure
_GAP = 4  # pixels between images
# How strongly a map covers the image under it.
_COVER = 0.6
# Blocks whose token norms are shown; of deeper models evenly spaced ones, the last among them.
_BLOCKS = 6


def check_matplotlib(wanted_by: str) -> None:
    """Raises ConfigError where matplotlib is not installed; `wanted_by` begins the message."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"{wanted_by} needs matplotlib, which is not installed: pip install matplotlib, or "
            "install vit_dist with its extra 'figures'"
        )


def draw_weights(look: WeightsLook) -> Iterator[tuple[str, Any]]:
    """Draws OF_WEIGHTS: yields names and matplotlib Figures."""
    yield "filters", _filters(look)
    yield "positions", _positions(look)


def draw_images(look: ImagesLook) -> Iterator[tuple[str, Any]]:
    """Draws OF_IMAGES: yields names and matplotlib Figures."""
    yield "distances", _distances(look)
    yield "attention", _attention(look)
    yield "rollout", _rollout(look)
    yield "norms", _norms(look)
    if look.similarity is not None:
        yield "similarity", _similarity(look.similarity)


def encode(figure: Any, format: str) -> bytes:
    """A figure as the bytes of a file in one of FORMATS; the same figure gives the same bytes."""
    import matplotlib

    # By default files hold the time, and names in an SVG are drawn at random.
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vit_dist"}):
        figure.savefig(buffer, format=format, dpi=_DPI, metadata=dates[format])
    return buffer.getvalue()


def pixels(figure: Any) -> np.ndarray:
    """A figure as uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Neither pyplot nor rc_context, which are global: this runs in a thread beside a training.
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _filters(look: WeightsLook) -> Any:
    count, height, width, channels = look.filters.shape
    # Grey is 0, and each component has its own scale. Channels that are no colours are averaged.
    colours = look.filters
    if channels != 3:
        colours = np.repeat(colours.mean(axis=-1, keepdims=True), 3, axis=-1)
    peaks = np.abs(colours).max(axis=(1, 2, 3), keepdims=True)
    colours = 0.5 + 0.5 * colours / np.where(peaks > 0, peaks, 1.0)
    # At least 32 pixels a filter, by whole numbers, so that each of its pixels stays a square.
    factor = max(1, -(-32 // max(height, width)))
    tiles = [_enlarge(_bytes(c), factor) for c in colours]
    rows = [tiles[i : i + 7] for i in range(0, count, 7)]
    figure, axes = figure_of(_mosaic(rows))
    set_title(axes, f"first {count} principal components of the patch kernel")
    axes.set_xlabel(f"{look.shares.sum():.0%} of the filters' variance; the largest first")
    return figure


def _positions(look: WeightsLook) -> Any:
    rows, columns = look.positions.shape[:2]
    down, across = range(0, rows, _step(rows)), range(0, columns, _step(columns))
    # A map for each patch at the patch's place, with a line of NaN, drawn white, between maps.
    sheet = np.full((len(down), rows + 1, len(across), columns + 1), np.nan)
    shown = look.positions[:: down.step, :: across.step]
    sheet[:, :rows, :, :columns] = shown.transpose(0, 2, 1, 3)
    sheet = sheet.reshape(len(down) * (rows + 1), len(across) * (columns + 1))[:-1, :-1]
    figure, axes = figure_of(sheet, vmin=-1, vmax=1, bar="cosine similarity")
    axes.set_xticks(*_ticks(across, columns))
    axes.set_yticks(*_ticks(down, rows))
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    kind = "learned" if look.learned else "fixed sine-cosine"
    set_title(axes, f"similarity of position embeddings ({kind})")
    return figure


def _step(count: int) -> int:
    """From one map to the next: of more than 16 rows of patches not all have one."""
    return -(-count // 16)


def _ticks(patches: range, size: int) -> tuple[list[float], list[str]]:
    """Centres and numbers, from 1, of the maps of `patches`: `size` cells each, and a gap."""
    return [i * (size + 1) + (size - 1) / 2 for i in range(len(patches))], [
        str(patch + 1) for patch in patches
    ]


def _distances(look: ImagesLook) -> Any:
    figure, axes = empty_figure(6.0, 4.0)
    depth, heads = look.distances.shape
    blocks = np.arange(1, depth + 1)
    places = np.repeat(blocks, heads)
    axes.scatter(places, look.distances.ravel(), s=18, color=BLUE, label="a head", zorder=3)
    # A head that looks at no patch has no distance.
    mean = np.ma.masked_invalid(look.distances).mean(axis=1)
    axes.plot(blocks, mean, color=ORANGE, label="mean over heads")
    axes.axhline(look.uniform, color="0.4", linestyle="--", label="equal weight everywhere")
    # A tenth more than the highest, which may also be the dashed line.
    axes.set_ylim(0, 1.1 * max(float(np.nanmax(look.distances, initial=0.0)), look.uniform, 1e-6))
    axes.set_xlim(0.5, depth + 0.5)
    axes.set_xticks(blocks[:: -(-depth // 16)])
    axes.set_xlabel("block")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.legend(frameon=False, fontsize=8)
    set_title(axes, f"mean attention distance over {_images(len(look.images))}")
    return figure


def _attention(look: ImagesLook) -> Any:
    rows = []
    for image, heads in zip(look.images[:ROWS], look.heads[:ROWS], strict=True):
        mean = heads.mean(axis=0)
        maps = [_coloured(h, _tile_size(image)) for h in heads]
        rows.append([_thumbnail(image), _over(image, mean), *maps])
    titles = ["image", "mean of\nheads", *(f"head {i + 1}" for i in range(look.heads.shape[1]))]
    readers = {
        "tok": "the cls token attends",
        "tok_gap": "cls token and patches, half each, attend",
        "map": "the pooling attends",
    }
    who = readers.get(look.pool, "the patches, in the mean, attend")
    return _sheet(rows, titles, f"what {who} to before the head")


def _rollout(look: ImagesLook) -> Any:
    rows = [
        [_thumbnail(image), _coloured(rolled, _tile_size(image)), _over(image, rolled)]
        for image, rolled in zip(look.images[:ROWS], look.rollout[:ROWS], strict=True)
    ]
    return _sheet(rows, ["image", "rollout", "over it"], "attention rollout, all blocks")


def _norms(look: ImagesLook) -> Any:
    depth = len(look.norms)
    shown = np.unique(np.linspace(depth - 1, 0, min(depth, _BLOCKS)).round().astype(int))
    rows = []
    for i, image in enumerate(look.images[:ROWS]):
        size = _tile_size(image)
        # One scale for all images of a block, so that an outlier stands out among images, too.
        maps = [_coloured(look.norms[b, i], size, within=look.norms[b]) for b in shown]
        rows.append([_thumbnail(image), *maps])
    titles = ["image"]
    for block in shown:
        low, high = look.norms[block].min(), look.norms[block].max()
        titles.append(f"block {block + 1}\n{low:.3g} to {high:.3g}")
    return _sheet(rows, titles, "length of tokens after a block, dark to light")


def _similarity(similarity: np.ndarray) -> Any:
    figure, axes = figure_of(similarity, vmin=0, vmax=1, bar="CKA", side=4.5)
    depth = len(similarity)
    shown = np.arange(0, depth, -(-depth // 16))
    axes.set_xticks(shown, shown + 1)
    axes.set_yticks(shown, shown + 1)
    axes.set_xlabel("block")
    axes.set_ylabel("block")
    axes.invert_yaxis()
    set_title(axes, "similarity of what blocks give (linear CKA)")
    return figure


# Parts of figures


def empty_figure(width: float, height: float) -> tuple[Any, Any]:
    """A Figure of so many inches, and its one Axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def figure_of(
    array: np.ndarray, *, bar: str = "", side: float = 6.0, **limits: Any
) -> tuple[Any, Any]:
    """A figure of one array: (H, W, 3) colours, or (H, W) numbers with a bar that explains them."""
    height, width = array.shape[:2]
    scale = side / max(height, width)
    # Room for titles and the bar, and no side so short that they would not fit.
    figure, axes = empty_figure(max(width * scale, 3.0) + 1.2, max(height * scale, 2.0) + 0.9)
    # "nearest": each cell is a measured number, nothing is between two of them.
    shown = axes.imshow(array, cmap=_MAP, interpolation="nearest", **limits)
    if bar:
        figure.colorbar(shown, ax=axes, label=bar)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], title: str) -> Any:
    """A figure of rows of uint8 images of one size, a title above each column."""
    sheet = _mosaic(rows)
    # As many inches as show each pixel of the sheet as it is.
    side = max(sheet.shape[:2]) / _DPI
    figure, axes = figure_of(sheet, side=max(side, 3.0))
    width = rows[0][0].shape[1]
    axes.xaxis.tick_top()
    axes.set_xticks([i * (width + _GAP) + width / 2 for i in range(len(titles))], titles)
    axes.tick_params(axis="x", length=0, labelsize=7)
    set_title(axes, title)
    return figure


def set_title(axes: Any, text: str) -> None:
    """Gives Axes the title that all figures have."""
    axes.set_title(text, fontsize=10)


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def _mosaic(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Puts uint8 images of one size into one, on white; the last row may be shorter."""
    height, width = rows[0][0].shape[:2]
    down, right = height + _GAP, width + _GAP
    sheet = np.full((len(rows) * down - _GAP, len(rows[0]) * right - _GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet[i * down : i * down + height, j * right : j * right + width] = tile
    return sheet


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)


def _tile_size(image: np.ndarray) -> tuple[int, int]:
    """(height, width) in pixels of an image in a sheet."""
    height, width = image.shape[:2]
    scale = _TILE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """An image of any number of channels as uint8 (h, w, 3) of its tile's size."""
    if image.shape[-1] != 3:
        image = np.repeat(image.mean(axis=-1, keepdims=True).round().astype(np.uint8), 3, axis=-1)
    height, width = _tile_size(image)
    # Small images keep their pixels as squares; large ones are averaged.
    small = image.shape[0] <= height
    how = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _bytes(colours: np.ndarray) -> np.ndarray:
    """Colours in 0..1 -> uint8."""
    return np.round(np.clip(colours, 0, 1) * 255).astype(np.uint8)


def _coloured(
    values: np.ndarray,
    size: tuple[int, int],
    *,
    within: np.ndarray | None = None,
    smooth: bool = False,
) -> np.ndarray:
    """A map (rows, columns) in colours, uint8 (*size, 3), dark for the least.

    Args:
      values: the map.
      size: (height, width) in pixels.
      within: what the scale reaches over; None for `values`.
      smooth: whether patches run into each other.
    """
    import matplotlib

    scale = values if within is None else within
    low, high = float(np.min(scale)), float(np.max(scale))
    # A map that is everywhere the same, but for rounding, is dark everywhere: stretched, rounding
    # errors would look like something.
    flat = not high - low > 1e-6 * max(abs(high), abs(low))
    shares = np.zeros_like(values) if flat else (values - low) / (high - low)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    resized = Image.fromarray(shares.astype(np.float32)).resize(size[::-1], how)
    return _bytes(matplotlib.colormaps[_MAP](np.asarray(resized))[..., :3])


def _over(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map laid over its image, which is grey under it."""
    grey = _thumbnail(image).mean(axis=-1, keepdims=True)
    colours = _coloured(values, _tile_size(image), smooth=True)
    return np.round(_COVER * colours + (1 - _COVER) * grey).astype(np.uint8)
