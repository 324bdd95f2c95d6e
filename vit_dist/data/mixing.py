"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), the same on any number of replicas.

The random numbers are drawn on the host, as a pure function of (seed, step), because XLA has no
gamma distribution. They travel with the batch as one row for each example,

    lambda, weight, top, bottom, left, right        (6,) float32

and only the arithmetic runs in the compiled step. The last four are a box, in pixels: inside of it
a pixel is the partner's, outside it is weight * own + (1 - weight) * the partner's. The label is
lambda * own + (1 - lambda) * the partner's. Mixup has an empty box and a weight of lambda, CutMix a
weight of 1.

The partner of an example is the one before it, cyclically, within a group of `group_size`
neighbours of the global batch. Any fixed pairing is as good as another, since the order of the data
is a random permutation. Groups of 2 are mutual pairs, as in timm, which flips the batch and so
pairs its first example with its last.
"""

import dataclasses

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data import order

MODES = ("batch", "pair", "elem")
ROW_SPEC = tf.TensorSpec((6,), tf.float32)
IDENTITY = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # the row that leaves an example as it is


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What and how often to mix; made by `make_mixing`, which explains the fields."""

    mixup_alpha: float
    cutmix_alpha: float
    probability: float
    switch_probability: float
    mode: str
    group_size: int
    fold_lambda: bool

    def draw(
        self, step: tf.Tensor, *, seed: int, batch_size: int, size: tuple[int, int]
    ) -> tf.Tensor:
        """Returns the rows of a step's global batch, (batch_size, 6) float32; on the host.

        Args:
          step: () int, the step's number.
          seed: In [0, 2**62), the seed of the data's order. Rows depend on it and `step` alone.
          batch_size: Of the global batch, a multiple of `group_size`.
          size: (height, width) of the images in pixels.
        """
        # How many neighbours share one draw.
        repeats = {"batch": batch_size, "pair": self.group_size, "elem": 1}[self.mode]
        count = batch_size // repeats
        # Order and augmentation fold the number of an epoch into this seed, which is never -1: so
        # their random numbers and these are independent.
        key = tf.random.fold_in(tf.constant(order.seed_words(seed), tf.int32), -1)
        # One key each for: the two chances, mixup's lambda, CutMix's lambda, and row and column of
        # the boxes' middles.
        keys = tf.random.split(tf.random.fold_in(key, tf.cast(step, tf.int32)), 5)
        chance = tf.random.stateless_uniform((2, count), keys[0], dtype=tf.float64)
        # CutMix's share of all mixing, by whether mixup and CutMix are on.
        switch = {(True, True): self.switch_probability, (False, True): 1.0}
        share = switch.get((self.mixup_alpha > 0, self.cutmix_alpha > 0), 0.0)
        mixup = _mixup_rows(_beta(keys[1], self.mixup_alpha, count), self.fold_lambda)
        center = [
            tf.random.stateless_uniform((count,), k, maxval=n, dtype=tf.int32)
            for k, n in zip(tf.unstack(keys[3:]), size, strict=True)
        ]
        cutmix = cutmix_rows(_beta(keys[2], self.cutmix_alpha, count), *center, size=size)
        # All are drawn and one is chosen for each, so an example's numbers do not depend on what
        # was chosen for another.
        rows = tf.where((chance[0] < share)[:, None], cutmix, mixup)
        rows = tf.where((chance[1] < self.probability)[:, None], rows, tf.constant(IDENTITY))
        return tf.repeat(rows, repeats, axis=0)

    def spare_masked(self, rows: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Returns rows (B, 6), but IDENTITY where the partner has a `mask` (B,) of 0.

        A damaged example is black, and must not be mixed into a good one.
        """
        return tf.where(self._partner(mask)[:, None] > 0, rows, tf.constant(IDENTITY))

    def images(self, images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Returns images (B, H, W, C), float, mixed as rows (B, 6) say."""
        # Each number of the rows as (B, 1, 1), to go with all pixels of its image.
        weight, top, bottom, left, right = (x[:, None, None] for x in tf.unstack(rows, axis=1)[1:])
        # Pixels are counted in float32 whatever the images' dtype: bfloat16 holds no odd number
        # above 256.
        y = tf.range(images.shape[1], dtype=tf.float32)[None, :, None]
        x = tf.range(images.shape[2], dtype=tf.float32)[None, None, :]
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        weights = tf.cast(tf.where(inside, 0.0, weight), images.dtype)[..., None]
        return weights * images + (1 - weights) * self._partner(images)

    def labels(self, labels: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Returns labels (B, classes), float, mixed as rows (B, 6) say."""
        own = rows[:, :1]
        return own * labels + (1 - own) * self._partner(labels)

    def _partner(self, x: tf.Tensor) -> tf.Tensor:
        """Returns, at each example's place in `x` (B, ...), its partner's entry."""
        # Rolled by one within each group: example i gets the entry of i - 1, the first that of the
        # last.
        groups = tf.reshape(x, (-1, self.group_size, *x.shape[1:]))
        return tf.reshape(tf.roll(groups, 1, axis=1), x.shape)


def make_mixing(
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    mode: str = "batch",
    group_size: int = 2,
    fold_lambda: bool = False,
) -> Mixing | None:
    """Makes the mixing of a run; None if both alphas are 0.

    Args:
      mixup_alpha: lambda ~ Beta(alpha, alpha) of mixup; 0 for no mixup.
      cutmix_alpha: lambda ~ Beta(alpha, alpha) of CutMix; 0 for no CutMix.
      probability: Of mixing at all.
      switch_probability: Of CutMix rather than mixup, where both alphas are positive.
      mode: Which examples share the numbers drawn: "batch" all of a batch, "pair" those of a group,
        "elem" none, so that each example has its own.
      group_size: How many neighbours in the batch make a group, within which partners are found.
      fold_lambda: Whether mixup takes max(lambda, 1 - lambda), as big_vision does.

    Raises:
      ConfigError: A value out of its range; names it and the range.
    """
    # Written so that NaN, for which each comparison is false, is refused too.
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if not 0 <= alpha < float("inf"):
            raise ConfigError(f"mixing.{name} must be 0 (none) or more, got {alpha}")
    chances = {"probability": probability, "switch_probability": switch_probability}
    for name, chance in chances.items():
        if not 0 <= chance <= 1:
            raise ConfigError(f"mixing.{name} must be in [0, 1], got {chance}")
    if mode not in MODES:
        raise ConfigError(f"mixing.mode {mode!r} is unknown; allowed: {', '.join(MODES)}")
    if group_size < 2:
        raise ConfigError(f"mixing.group_size must be 2 or more, got {group_size}")
    if not mixup_alpha and not cutmix_alpha:
        return None
    return Mixing(
        mixup_alpha, cutmix_alpha, probability, switch_probability, mode, group_size, fold_lambda
    )


def check_groups(mixing: Mixing | None, *, batch_size: int, num_parts: int) -> None:
    """Raises ConfigError if a part of the batch (replica x micro-batch) would cut a group."""
    if mixing is not None and batch_size // num_parts % mixing.group_size:
        raise ConfigError(
            f"mixing.group_size {mixing.group_size} does not divide the {batch_size // num_parts} "
            f"examples of each of {num_parts} parts (replicas x micro-batches) of the batch, and "
            "partners must meet in one: change input.batch_size, step.accumulation or group_size"
        )


def cutmix_rows(
    share: tf.Tensor, center_y: tf.Tensor, center_x: tf.Tensor, *, size: tuple[int, int]
) -> tf.Tensor:
    """Returns (n, 6) rows of CutMix, with the arithmetic of the paper's code and of timm.

    Args:
      share: (n,) float64, lambda as drawn: 1 - area of the box / area of the image. A part of the
        box that lies outside of the image is cut off, and lambda is corrected for it.
      center_y: (n,) int32 in [0, height).
      center_x: (n,) int32 in [0, width).
      size: (height, width).
    """
    # The box has 1 - lambda of the area, and so the square root of that of each side.
    ratio = tf.sqrt(1 - share)
    ends = []
    for length, center in zip(size, (center_y, center_x), strict=True):
        # Truncated first and halved then, as in the paper's code and in timm: an odd length loses a
        # pixel.
        half = tf.cast(length * ratio, tf.int32) // 2
        ends += [tf.clip_by_value(center + side * half, 0, length) for side in (-1, 1)]
    top, bottom, left, right = ends
    # Of the box as clipped, which is what the example really gives away.
    area = tf.cast((bottom - top) * (right - left), tf.float64)
    own = 1 - area / (size[0] * size[1])
    rows = [own, tf.ones_like(own), *ends]
    return tf.stack([tf.cast(x, tf.float32) for x in rows], axis=1)


def _mixup_rows(share: tf.Tensor, fold: bool) -> tf.Tensor:
    """Returns (n, 6) rows of mixup from lambdas (n,) float64; `fold` takes the larger share."""
    own = tf.cast(tf.maximum(share, 1 - share) if fold else share, tf.float32)
    return tf.stack([own, own, *[tf.zeros_like(own)] * 4], axis=1)


def _beta(key: tf.Tensor, alpha: float, count: int) -> tf.Tensor:
    """Returns (count,) float64 from Beta(alpha, alpha): x / (x + y) of two gamma variates."""
    if not alpha:
        return tf.ones((count,), tf.float64)
    x, y = tf.unstack(
        tf.random.stateless_gamma((2, count), key, tf.constant(alpha, tf.float64), dtype=tf.float64)
    )
    # x and y both underflow to 0 only for alphas of about 0.01, whose Beta is nearly always 0 or 1.
    return tf.where(x + y > 0, x / (x + y), 1.0)
