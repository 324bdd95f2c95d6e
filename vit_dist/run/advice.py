"""Warnings before a run starts: what its data and its durations are likely to do to it.

None of it is a mistake: a mistake would end the run. Whatever is warned of here lets a run go
through, and end with a poor accuracy, or with one that tells little.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

_SAMPLE = 200  # images whose size is looked at: a second on a disk, and enough for a median
_UNBALANCED = 10.0  # the largest class over the smallest
_FEW = 20  # images of a class
_STALE = 0.2  # share of the initial weights in the moving average at the end of the run


def data_warnings(sources: dict[str, Any], image_size: tuple[int, int]) -> list[str]:
    """What deserves a look before training; reads labels and the headers of some images.

    Args:
      sources: split -> Source; only sources with labels and paths, such as folders, are looked at.
      image_size: (height, width) that the model takes.

    Returns:
      One line for each: no validation split, classes that it lacks, classes of very different
      sizes or with few images, images smaller than image_size.
    """
    found = []
    train = sources["train"]
    if "val" not in sources:
        found.append(
            "no val split: nothing will tell when to stop, or which run was best. Set "
            "config.data.val_split, and for a folder without val/ config.data.val_fraction"
        )
    # Labels that are known without reading images: folders have them, streams do not.
    for name, source in sources.items():
        labels = getattr(source, "labels", None)
        if labels is not None and len(labels):
            found += _class_warnings(name, np.asarray(labels), train.class_names)
    paths = getattr(train, "paths", None)
    if paths is not None and len(paths):
        found += _size_warnings([str(path) for path in paths], image_size)
    return found


def average_warnings(decay: float | None, num_steps: int) -> list[str]:
    """One line if the moving average, which is what gets evaluated, hardly follows so short a run.

    Args:
      decay: of the moving average; None for no average.
      num_steps: steps of the run.
    """
    if not decay or num_steps < 1 or decay**num_steps < _STALE:
        return []
    # After n steps the average holds decay^n of what it began with, and it averages over about
    # 1 / (1 - decay) steps. The decay that is proposed averages over the last tenth of the run.
    better = max(1 - 10 / num_steps, 0.5)
    return [
        f"config.step.ema_decay {decay} averages over {1 / (1 - decay):,.0f} steps, and there are "
        f"{num_steps:,}: {decay**num_steps:.0%} of what is evaluated at the end will be the "
        f"initial weights. Set --config.step.ema_decay={better:.2g}, or None to evaluate the "
        "weights themselves"
    ]


def _class_warnings(split: str, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    # counts[i]: the number of images of class i, 0 included.
    counts = np.bincount(labels, minlength=len(names))
    empty = [names[int(i)] for i in np.flatnonzero(counts == 0)]
    if split != "train":
        if not empty:
            return []
        shown = ", ".join(empty[:5])
        return [f"{split} holds no image of {len(empty)} of {len(names)} classes: {shown}"]
    found = []
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] > _UNBALANCED * counts[least]:
        found.append(
            f"classes are unbalanced: {counts[most]} images of {names[most]!r}, {counts[least]} of "
            f"{names[least]!r}. Accuracy will tell little of the rare ones"
        )
    if counts[least] < _FEW:
        few = int((counts < _FEW).sum())
        found.append(
            f"{few} of {len(names)} classes have fewer than {_FEW} training images, "
            f"{names[least]!r} {counts[least]}: fine-tune a pretrained model, with few epochs"
        )
    return found


def _size_warnings(paths: Sequence[str], image_size: tuple[int, int]) -> list[str]:
    # Every step-th image: the paths are sorted by class, and the first _SAMPLE would be of few.
    step = max(len(paths) // _SAMPLE, 1)
    sizes = [size for path in paths[::step] if (size := _size(path)) is not None]
    small = [s for s in sizes if s[0] < image_size[0] or s[1] < image_size[1]]
    if not small:
        return []
    height, width = (int(n) for n in np.median(np.array(sizes), axis=0))
    return [
        f"{len(small)} of {len(sizes)} training images looked at are smaller than "
        f"{image_size[0]}x{image_size[1]} (median {height}x{width}) and will be enlarged: a lower "
        "config.image_size costs less and may be as good"
    ]


def _size(path: str) -> tuple[int, int] | None:
    """(height, width) from an image file's header."""
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except (OSError, ValueError) as error:  # the pipeline will name it when it matters
        logging.info("%s: size unknown (%s)", path, error)
        return None
