"""Pictures of how a classifier was judged: its confusions, its calibration, its worst and best."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_dist.inspection.draw import BLUE, ORANGE, figure_of, set_title
from vit_dist.inspection.sheet import Cell, draw_grid, stack

# Classes that a confusion matrix shows by name: more would be too small to read.
MOST_CLASSES = 24
# Characters of a class's name on an axis.
_LONGEST = 18


def confusions(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, *, most: int = MOST_CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """Counts how often examples of one class were taken for another.

    Args:
      labels, predictions: int (N,), each in [0, num_classes).
      num_classes: C.
      most: how many classes stand alone; of more classes the ones with the most errors, as label or
        as prediction, and all others together as one more, the last.

    Returns:
      int (K,), the classes that stand alone, rising; and int (K, K) or, with others, (K + 1, K + 1)
      counts by [label, prediction].
    """
    wrong = labels != predictions
    # Never C x C numbers: with 21,000 classes these would be 3.5 GB.
    errors = np.bincount(labels[wrong], minlength=num_classes)
    errors += np.bincount(predictions[wrong], minlength=num_classes)
    # Stable: of classes with equally many errors the first are shown.
    shown = np.sort(np.argsort(-errors, kind="stable")[:most])
    size = len(shown) + (len(shown) < num_classes)
    place = np.full(num_classes, size - 1)
    place[shown] = np.arange(len(shown))
    flat = place[labels] * size + place[predictions]
    return shown, np.bincount(flat, minlength=size * size).reshape(size, size)


def draw_confusions(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], *, title: str
) -> Any:
    """A matplotlib Figure of the confusion matrix: counts, coloured by their share of the row.

    Args:
      labels, predictions: int (N,), class numbers.
      names: of the classes.
      title: what was judged.
    """
    shown, counts = confusions(labels, predictions, len(names))
    size = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    # A class without examples has no shares: NaN, which is drawn white.
    shares = counts / np.where(totals > 0, totals, np.nan)
    side = 1.5 + 0.36 * size
    figure, axes = figure_of(shares, vmin=0, vmax=1, bar="share of the label's examples", side=side)
    ticks = [_short(names[i]) for i in shown]
    if size > len(shown):
        ticks.append("all others")
    axes.set_xticks(range(size), ticks, rotation=90, fontsize=8)
    axes.set_yticks(range(size), ticks, fontsize=8)
    for i, j in np.argwhere(counts):
        # The map is dark below its middle and light above it.
        colour = "white" if shares[i, j] < 0.5 else "black"
        text = str(counts[i, j])
        axes.text(j, i, text, color=colour, fontsize=6, ha="center", va="center")
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    some = f", {len(shown)} of {len(names)} classes" if size > len(shown) else ""
    set_title(axes, f"confusions of {title}{some}")
    return figure


def draw_reliability(
    counts: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray, error: float, *, title: str
) -> Any:
    """A matplotlib Figure of accuracy by confidence, above how many examples each bin has.

    Args:
      counts, accuracy, confidence: (bins,), of bins of equal width from 0 to 1: number of examples,
        share of right ones and mean confidence, NaN in an empty bin.
      error: the expected calibration error.
      title: what was judged.
    """
    # Slow to import, and optional: see check_matplotlib of draw.py.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, len(counts) + 1)
    width = 1 / len(counts)
    above.bar(edges[:-1], accuracy, width, align="edge", color=BLUE, edgecolor="white")
    above.plot([0, 1], [0, 1], color="0.4", linestyle="--", label="as sure as right")
    above.plot(confidence, accuracy, "o", color=ORANGE, markersize=4, label="mean of a bin")
    above.set_ylim(0, 1.03)  # room for a dot at 1
    above.set_ylabel("share of right predictions")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar(edges[:-1], counts, width, align="edge", color=BLUE, edgecolor="white")
    below.set_xlim(0, 1)
    below.set_xlabel("probability of the prediction")
    below.set_ylabel("examples")
    set_title(above, f"calibration of {title}: error (ECE) {error:.3f}")
    return figure


def draw_worst_and_best(worst: Sequence[Cell], best: Sequence[Cell]) -> Image.Image:
    """A sheet of the images that a model was most wrong and most right about."""
    parts = {
        "worst: the label is least likely to the model": worst,
        "best: the label is likeliest": best,
    }
    return stack([(title, draw_grid(cells)) for title, cells in parts.items() if cells])


def describe_verdict(label: str, prediction: str, confidence: float) -> str:
    """A caption: what an image is, what the model said, and with which probability."""
    return f"is {label}, said {prediction} ({confidence:.2f})"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."
