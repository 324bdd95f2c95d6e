"""Opens a source of labelled images by name, e.g. `open_source("demo", split="train")`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.data import base
from vit_dist.data.base import Source
from vit_dist.data.folder import FolderSource
from vit_dist.data.mixture import MixtureSource
from vit_dist.data.shards import ArrayRecordSource
from vit_dist.data.synthetic import SyntheticSource
from vit_dist.data.tfds_source import TfdsSource
from vit_dist.data.tfrecord import TfrecordSource


class DemoSource(Source):
    """Scikit-learn's digits: 1797 real handwritten digits of 8x8 pixels, there without a download.

    The 16 grey levels become uint8 in [0, 255], repeated over 3 channels. The splits are fixed: the
    examples, in the order of np.random.RandomState(0).permutation and then sorted by class, go to
    "test" (every 5th: 360), to "val" (every 10th, one further: 180) and else to "train" (1257).
    """

    name = "demo"
    encoded = False
    SPLITS = ("train", "val", "test")

    def __init__(self, split: str):
        if split not in self.SPLITS:
            raise ValueError(f"source 'demo' has no split {split!r}; it has {list(self.SPLITS)}")
        from sklearn import datasets  # here, as only this source needs it and it loads slowly

        digits = datasets.load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))
        order = order[np.argsort(digits.target[order], kind="stable")]
        slot = np.arange(len(order))
        part = np.where(slot % 5 == 0, "test", np.where(slot % 10 == 1, "val", "train"))
        order = np.sort(order[part == split])  # back to scikit-learn's order: classes are mixed
        grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey[..., None], 3, axis=-1)
        self.labels = digits.target[order].astype(np.int32)
        self.split = split
        self.num_examples = len(order)
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.element_spec = {
            "image": tf.TensorSpec((8, 8, 3), tf.uint8),
            "label": tf.TensorSpec((), tf.int32),
        }
        self._tables: dict[str, tf.Tensor] | None = None

    def load(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if self._tables is None:
            self._tables = base.on_host(
                lambda: {"image": tf.constant(self.images), "label": tf.constant(self.labels)}
            )
        return {key: tf.gather(table, indices) for key, table in self._tables.items()}


SOURCES: dict[str, Callable[..., Source]] = {
    "demo": DemoSource,
    "folder": FolderSource,
    "tfds": TfdsSource,
    "tfrecord": TfrecordSource,
    "array_record": ArrayRecordSource,
    "synthetic": SyntheticSource,
    "mixture": MixtureSource,
}


def open_source(source: str, *, split: str, **options) -> Source:
    """Opens a split of a data set. Touches no device and runs no TensorFlow op.

    Args:
      source: One of SOURCES.
      split: Which part, e.g. "train"; a tfds source takes TFDS's syntax, e.g. "train[:99%]".
      **options: The arguments of that source's class (e.g. `data_dir`); those that are None
        count as not given.

    Raises:
      ValueError: `source`, an option or the split is unknown, or the data is not fit for use.
      FileNotFoundError: A folder does not exist.
    """
    if source not in SOURCES:
        raise ValueError(
            f"unknown source {source!r}{_nearest(source, SOURCES)}; known: {sorted(SOURCES)}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if source == "mixture":
        return _open_mixture(split, **given)
    signature = inspect.signature(SOURCES[source])
    allowed = [name for name in signature.parameters if name != "split"]
    for option in given:
        if option not in allowed:
            raise ValueError(
                f"source {source!r} takes no option {option!r}{_nearest(option, allowed)}; "
                f"it takes {allowed}"
            )
    try:
        signature.bind(split=split, **given)
    except TypeError as error:
        raise ValueError(f"source {source!r}: {error}; it takes {allowed}") from None
    return SOURCES[source](split=split, **given)


def _open_mixture(split: str, parts: Any = None, **options) -> Source:
    """Opens the sources that `parts` describes; other options hold for each that takes them."""
    if not isinstance(parts, (list, tuple)) or not all(
        isinstance(part, Mapping) and {"source", "weight"} <= set(part) for part in parts
    ):
        raise ValueError(
            "source 'mixture' needs parts: a list of dicts, each with source, weight, its options "
            f"and, where it differs, split; got {parts!r}"
        )
    opened = []
    for part in parts:
        own = {k: v for k, v in part.items() if k not in ("source", "weight", "split")}
        kind = SOURCES.get(part["source"])
        known = inspect.signature(kind).parameters if kind else {}
        common = {k: v for k, v in options.items() if k in known}
        opened.append(
            open_source(part["source"], split=part.get("split", split), **{**common, **own})
        )
    return MixtureSource(opened, [part["weight"] for part in parts])


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
