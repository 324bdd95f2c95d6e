"""A source of made-up images, for measuring the pipeline or a step without a data set."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image

from vit_dist.config.errors import ConfigError
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum

FORMATS = ("jpeg", "array")
NUM_IMAGES = 64  # distinct ones; more would only fill memory


class SyntheticSource(base.Source):
    """Smooth coloured noise: 64 images over and over, whose labels say nothing about them.

    Args:
      split: Any name; it seeds the images.
      num_examples: How many to claim; 1,281,167 as in ImageNet by default.
      num_classes: Labels are example number % num_classes.
      height: Of the images, in pixels; 375 x 500 is usual in ImageNet.
      width: Of the images, in pixels.
      image_format: "jpeg", to be decoded as real images are (about 40 kB each), or "array".

    Raises:
      ConfigError: A number that is not positive, or an unknown format.
    """

    name = "synthetic"

    def __init__(
        self,
        split: str,
        num_examples: int = 1_281_167,
        num_classes: int = 1000,
        height: int = 375,
        width: int = 500,
        image_format: str = "jpeg",
    ):
        numbers = {"num_examples": num_examples, "num_classes": num_classes}
        for key, value in {**numbers, "height": height, "width": width}.items():
            if value < 1:
                raise ConfigError(f"source 'synthetic' needs a {key} of 1 or more, got {value}")
        if image_format not in FORMATS:
            raise ConfigError(f"image_format {image_format!r} is unknown; allowed: {FORMATS}")
        self.split, self.num_examples = split, num_examples
        self.class_names = tuple(str(i) for i in range(num_classes))
        self.encoded = image_format == "jpeg"
        # The seed is the split's name: splits differ, and each is the same at every start.
        random = np.random.default_rng(checksum([split]))
        # Example i shows image i % count.
        count = min(NUM_IMAGES, num_examples)
        arrays = [_noise(random, height, width) for _ in range(count)]
        jpegs = [encode(Image.fromarray(x), "JPEG") for x in arrays] if self.encoded else []
        self._images: list[bytes | np.ndarray] = [*(jpegs or arrays)]
        spec = tf.TensorSpec((height, width, 3), tf.uint8)
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string) if self.encoded else spec,
            "label": tf.TensorSpec((), tf.int32),
        }
        self._table: tf.Tensor | None = None

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if self._table is None:
            # Of arrays, TensorFlow would make int32 without the type.
            dtype = self.element_spec["image"].dtype
            self._table = base.on_host(lambda: tf.constant(self._images, dtype))
        # The label follows from the example's number and not from the image: there is nothing to
        # learn.
        images = tf.gather(self._table, indices % len(self._images))
        return {"image": images, "label": tf.cast(indices % self.num_classes, tf.int32)}

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self._images[index % len(self._images)], index % self.num_classes


def _noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coarse noise made smooth, and a little fine noise: it compresses about as photographs do."""
    # Twelve by sixteen values, enlarged.
    coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = random.normal(0, 8, (height, width, 3))
    return np.clip(np.asarray(smooth) + fine, 0, 255).astype(np.uint8)


def encode(image: Image.Image, image_format: str) -> bytes:
    """Returns the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **({"quality": 90} if image_format == "JPEG" else {}))
    return buffer.getvalue()
