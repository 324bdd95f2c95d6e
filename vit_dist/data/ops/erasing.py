"""Random erasing (arXiv 1708.04896) of images that stay uint8."""

import math
import statistics

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import augment
from vit_dist.data.ops.basic import statistics_of
from vit_dist.data.ops.pipe import op

MODES = ("pixel", "const")
ATTEMPTS = 10  # places tried; as in timm, the image stays as it is if none fits
MIN_ASPECT = 0.3


@op(compiled=True)
def random_erasing(p=0.25, mode="pixel", area_min=2.0, area_max=100 / 3, mean="imagenet", std=None):
    """Fills a random rectangle, with probability `p`: by noise ("pixel") or the mean ("const").

    timm fills images that are normalised already, by N(0, 1) or 0. Images here are still uint8, and
    are filled by values that normalisation will turn into N(0, 1) or 0: mean + std * noise, clipped
    to 0..255 and of 256 equally likely values, or the mean. Give `mean` and `std` of the pipe's
    normalisation.
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ConfigError(f"p={p!r} must be a number in 0..1")
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} must be one of {MODES}")
    if not 0 < area_min <= area_max <= 100:
        raise ConfigError(f"area_min={area_min}, area_max={area_max}: need 0 < min <= max <= 100")
    table = levels(mode, mean, std)

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        words = augment.draw(seed, (1 + 4 * ATTEMPTS,))  # whether, and four for each attempt
        box, fits = _rectangle(
            tf.reshape(words[1:], (ATTEMPTS, 4)), image.shape, area_min, area_max
        )
        erased = fits & (augment.uniform(words[0]) < p)
        return tf.cond(
            erased,
            # Noise is drawn only here: most images are not erased.
            lambda: _fill(image, box, tf.random.fold_in(seed, 1), table),
            lambda: image,
        )

    return apply


def levels(mode: str, mean, std) -> np.ndarray:
    """Returns (3, 256) uint8: the value that a random byte stands for, in each channel.

    Byte i is the quantile (i + 0.5) / 256 of the normal distribution, so that drawing bytes
    uniformly draws from it.
    """
    mean, std = statistics_of(mean, std)
    means, stds = (np.broadcast_to(np.asarray(v, np.float64), (3,))[:, None] for v in (mean, std))
    normal = statistics.NormalDist()
    noise = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    # The mode "const" multiplies the noise by 0.
    values = means + stds * noise * (mode == "pixel")
    return np.clip(np.round(values * 255), 0, 255).astype(np.uint8)


def _rectangle(words: tf.Tensor, shape, area_min: float, area_max: float):
    """Returns top, left, height, width (4,) int32, and whether any attempt fits, () bool.

    Args:
      words: (attempts, 4) uint32, random: area, aspect ratio, top, left.
      shape: Of the image.
      area_min: In percent of the image; so is `area_max`.
      area_max: See `area_min`.
    """
    rows, columns, _ = shape
    parts = augment.uniform(words)
    # In percent.
    share = area_min + parts[:, 0] * (area_max - area_min)
    area = share * (rows * columns / 100)
    # Height / width from 0.3 to 1 / 0.3, uniform in its logarithm.
    ratio = tf.exp((2 * parts[:, 1] - 1) * -math.log(MIN_ASPECT))
    height = tf.cast(tf.round(tf.sqrt(area * ratio)), tf.int32)
    width = tf.cast(tf.round(tf.sqrt(area / ratio)), tf.int32)
    fits = (height < rows) & (width < columns)
    # The first attempt that fits: of equal numbers XLA's argmax takes the first. Where none does it
    # is attempt 0, which is not used.
    first = tf.argmax(tf.cast(fits, tf.int32), output_type=tf.int32)
    height, width = tf.gather(height, first), tf.gather(width, first)
    # How many corners there are: 1 more than the margin, and at least 1 where no attempt fits, as
    # the remainder of a division by 0 is not defined.
    margins = tf.maximum(tf.stack([rows - height, columns - width]), 0) + 1
    corner = tf.gather(words, first)[2:] % tf.cast(margins, tf.uint32)
    return tf.stack([*tf.unstack(tf.cast(corner, tf.int32)), height, width]), tf.reduce_any(fits)


def _fill(image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor, table: np.ndarray) -> tf.Tensor:
    rows, columns, _ = image.shape
    top, left, height, width = tf.unstack(box)
    # Distances from the rectangle's corner: (rows, 1) and (columns,).
    y, x = tf.range(rows)[:, tf.newaxis] - top, tf.range(columns) - left
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    count = rows * columns * 3
    # Four random bytes in each word, rounded up.
    words = tf.bitcast(augment.draw(seed, (-(-count // 4),)), tf.uint8)
    at = tf.cast(tf.reshape(words, (-1,))[:count], tf.int32)
    # The three channels' tables stand one behind the other.
    at = tf.reshape(at, image.shape) + tf.constant([0, 256, 512])
    noise = tf.reshape(tf.gather(table.ravel(), tf.reshape(at, (-1,))), image.shape)
    return tf.where(inside[..., tf.newaxis], noise, image)
