"""Scikit-learn's handwritten digits: real images that are there without a download."""

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.sources.source import Source, on_host


class DemoSource(Source):
    """Scikit-learn's digits: 1797 real handwritten digits of 8x8 pixels, there without a download.

    The 16 grey levels become uint8 in [0, 255], repeated over 3 channels. The splits are fixed: the
    examples, in the order of np.random.RandomState(0).permutation and then sorted by class, go to
    "test" (every 5th: 360), to "val" (every 10th from the second on: 180) or to "train" (1257).
    """

    name = "demo"
    encoded = False
    SPLITS = ("train", "val", "test")

    def __init__(self, split: str):
        if split not in self.SPLITS:
            raise ConfigError(f"source 'demo' has no split {split!r}; it has {list(self.SPLITS)}")
        from sklearn import datasets  # here, as only this source needs it and it loads slowly

        digits = datasets.load_digits()
        # A shuffle first, as digits that follow each other were written by the same person.
        order = np.random.RandomState(0).permutation(len(digits.target))
        order = order[np.argsort(digits.target[order], kind="stable")]
        # Sorted by class, every n-th example is a sample in which all classes have their share.
        slot = np.arange(len(order))
        part = np.where(slot % 5 == 0, "test", np.where(slot % 10 == 1, "val", "train"))
        order = np.sort(order[part == split])  # back to scikit-learn's order: classes are mixed
        # The digits have 16 levels in steps of 1; uint8 images have 255.
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
            self._tables = on_host(
                lambda: {"image": tf.constant(self.images), "label": tf.constant(self.labels)}
            )
        return {key: tf.gather(table, indices) for key, table in self._tables.items()}
