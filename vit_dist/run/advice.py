"""Warnings before a run starts: what its data and its durations are likely to do to it.

None of it is a mistake: a mistake would end the run. Whatever is warned of here lets a run go
through, and end with a poor accuracy, or with one that tells little.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from vit_dist.data.ops.decoding import decoding_of
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.sources.source import Source
from vit_dist.storage.errors import FAILURES

_ORIENTATION = 0x0112  # tag of EXIF; 1 is upright, 2 to 8 are turned or mirrored
_THREADS = 16  # for reading images, which waits rather than computes
_DECODED = 16  # images that are decoded: a large PNG takes half a second
# What looking at an image raises where that fails; damaged EXIF is a SyntaxError. It is only
# logged: the pipeline names such an image when it matters.
_UNREADABLE = (*FAILURES, ValueError, SyntaxError)
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
      sizes or with few images, images smaller than image_size, or that were resized beforehand to
      less than it.
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
    # By the larger side of what the model takes: a square of 224 is cut from 256 x 341.
    prepared = getattr(train, "prepared", None)
    if prepared is not None and prepared.short_side < max(image_size):
        found.append(
            f"training images were resized beforehand to a short side of "
            f"{prepared.short_side}, and will be enlarged to {image_size[0]}x{image_size[1]}"
            f": convert them with --short_side={max(image_size)} or more, or lower "
            "config.image_size"
        )
    paths = getattr(train, "paths", None)
    if paths is not None and len(paths):
        found += _size_warnings([str(path) for path in paths], image_size)
    return found


def pixel_warnings(
    sources: Mapping[str, Source], *, train_pipe: Pipe, eval_pipe: Pipe
) -> list[str]:
    """What the pipes leave out of images: reads some images of train, and of val or else test.

    Returns:
      A line for each pipe and kind: an EXIF orientation that is not read, so that a photo lies on
      its side, and transparency that is dropped. Both are what the reference systems do.
    """
    found = []
    judged = "val" if "val" in sources else "test"
    for split, key, pipe in (("train", "train_ops", train_pipe), (judged, "eval_ops", eval_pipe)):
        if split in sources:
            found += _pixel_warnings(split, sources[split], f"config.input.{key}", pipe)
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
        "initial weights. Set --config.step.ema_warmup=True, or "
        f"--config.step.ema_decay={better:.2g}, or None to evaluate the weights themselves"
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
    except _UNREADABLE as error:
        logging.info("%s: size unknown (%s)", path, error)
        return None


def _pixel_warnings(split: str, source: Source, key: str, pipe: Pipe) -> list[str]:
    # {} where no op decodes: then images are arrays, which have neither EXIF nor alpha.
    decoding = decoding_of(pipe)
    ignores_exif = decoding.get("exif", True) is False
    drops_alpha = decoding.get("background", 0) is None
    if not (ignores_exif or drops_alpha):
        return []
    with warnings.catch_warnings(), futures.ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of odd EXIF and of large images
        looks = pool.map(lambda index: _look(source, index), _sample(source))
        seen = [look for look in looks if look is not None]
    turned = [source.describe(index) for index, is_turned, _ in seen if is_turned]
    layered = [index for index, _, has_alpha in seen if has_alpha]
    found, begin = [], f"of {len(seen)} {split} images looked at"
    if turned and ignores_exif:
        found.append(
            f"{len(turned)} {begin} (such as {turned[0]}) are upright only by their EXIF "
            f"orientation, which {key} does not read: write exif=True into the op that decodes, "
            "such as decode(exif=True)"
        )
    if drops_alpha and any(_is_clear(source, index) for index in layered[:_DECODED]):
        found.append(
            f"{len(layered)} {begin} (such as {source.describe(layered[0])}) can be transparent, "
            f"and {key} takes the colour that is stored there, whatever it is: write "
            "background=255 into the op that decodes, such as decode(background=255), to lay them "
            "over white"
        )
    return found


def _sample(source: Source) -> Sequence[int]:
    """Returns the numbers of examples to look at."""
    if getattr(source, "paths", None) is None:
        return source.looked_at()  # few: by number they may be slow to read
    return range(0, source.num_examples, max(source.num_examples // _SAMPLE, 1))


def _look(source: Source, index: int) -> tuple[int, bool, bool] | None:
    """Returns the example's number, whether EXIF turns it, and whether it has an alpha channel.

    Reads the header alone. None for an image that is an array, or cannot be read.
    """
    try:
        data, _ = source.peek(index)
        if not isinstance(data, bytes):
            return None
        with Image.open(io.BytesIO(data)) as image:
            # Not `image.getexif()`, which decodes a whole PNG and reads XMP, as no op here does.
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            turned = exif.get(_ORIENTATION, 1) in range(2, 9)
            return index, turned, image.has_transparency_data
    except _UNREADABLE as error:
        logging.info("%s: not looked at (%s)", source.describe(index), error)
        return None


def _is_clear(source: Source, index: int) -> bool:
    """Whether an image is transparent anywhere; the alpha of most screenshots is opaque."""
    try:
        with Image.open(io.BytesIO(source.peek(index)[0])) as image:
            least, _ = image.convert("RGBA").getchannel("A").getextrema()
            return least != 255
    except _UNREADABLE:
        return False
