"""Ops that resize, crop, pad, mirror and scale, and ops on other entries than the image.

Images are uint8 (H, W, C) until the accelerator. A `size` is an int (a square) or (height, width),
in pixels. See `pipe` for what an op is.
"""

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops.pipe import Pipe, op, output_spec, parse, switch

# Callers of these ops need `pipe` too, and may import its names from here.
__all__ = ["Pipe", "op", "output_spec", "parse", "switch"]

# Per-channel mean and standard deviation of ImageNet's training images in [0, 1], as used by
# torchvision, timm and DeiT.
STATISTICS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
METHODS = ("bilinear", "bicubic", "nearest", "area", "lanczos3", "lanczos5")
OVERSHOOTING = ("bicubic", "lanczos3", "lanczos5")  # kernels with negative weights


@op
def resize(size, method="bilinear", antialias=False):
    """Resizes to `size`, whatever the aspect ratio; `method` is one of tf.image.ResizeMethod."""
    size, method = parse_size(size), parse_method(method)
    return on_image(lambda image, seed: resize_image(decoded(image), size, method, antialias))


@op
def resize_small(smaller_size, method="area", antialias=False):
    """Resizes so that the smaller side has `smaller_size` pixels, keeping the aspect ratio."""
    check_positive(smaller_size=smaller_size)
    method = parse_method(method)

    def resize(image, seed):
        shape = tf.cast(tf.shape(decoded(image))[:2], tf.float32)
        factor = smaller_size / tf.reduce_min(shape)
        resized = resize_image(
            image, tf.cast(tf.round(shape * factor), tf.int32), method, antialias
        )
        # Where the size is known while tracing, so is the result's: a crop behind this op can be
        # checked before any data is read.
        static = image.shape[:2]
        if static.is_fully_defined():
            smaller = min(static)
            # Python rounds halves to even, as tf.round does.
            resized.set_shape((*(round(n * smaller_size / smaller) for n in static), None))
        return resized

    return on_image(resize)


@op
def central_crop(size):
    """Cuts the middle `size`; of an odd margin, the smaller half is above and on the left."""
    height, width = parse_size(size)

    def crop(image, seed):
        _check_crop(image, height, width)
        margin = tf.shape(image)[:2] - (height, width)
        top, left = tf.unstack(margin // 2)
        return tf.image.crop_to_bounding_box(image, top, left, height, width)

    return on_image(crop)


@op
def random_crop(size):
    """Cuts a window of `size` from a uniformly drawn place."""
    size = parse_size(size)

    def crop(image, seed):
        _check_crop(image, *size)
        # _check_crop knows only static sizes; others are compared when an image is there.
        if not image.shape[:2].is_fully_defined():
            large = tf.reduce_all(tf.shape(image)[:2] >= size)
            message = f"random_crop cannot cut {size} from an image of"
            with tf.control_dependencies([tf.debugging.Assert(large, [message, tf.shape(image)])]):
                image = tf.identity(image)
        # The window's corner is a tensor, so TensorFlow does not know the slice's shape.
        return tf.ensure_shape(_random_window(image, size, seed), (*size, image.shape[-1]))

    return on_image(crop)


@op
def pad(pixels, value=0, mode="constant"):
    """Adds `pixels` on each side: of `value` (mode "constant"), or "reflect"ed or "edge" pixels."""
    _check_pad(pixels, value, mode)
    return on_image(lambda image, seed: _pad(decoded(image), pixels, value, mode))


@op
def random_shift(pixels, value=0, mode="constant"):
    """Translates by up to `pixels` each way: pads as `pad` does and crops back at random."""
    _check_pad(pixels, value, mode)

    def shift(image, seed):
        padded = _pad(decoded(image), pixels, value, mode)
        # A window as large as the image, anywhere in the padded image: up to `pixels` off.
        shifted = _random_window(padded, tf.shape(image)[:2], seed)
        return tf.ensure_shape(shifted, image.shape)

    return on_image(shift)


@op
def flip_lr():
    """Mirrors left and right with probability 1/2."""

    def flip(image, seed):
        mirrored = tf.random.stateless_uniform((), seed) < 0.5
        # Takes whether to reverse as a tensor: for small images a tf.cond would cost more.
        return tf.raw_ops.Reverse(tensor=decoded(image), dims=tf.stack([False, mirrored, False]))

    return on_image(flip)


@op(on_device=True)
def value_range(vmin=-1.0, vmax=1.0):
    """Maps 0..255 to `vmin`..`vmax`."""
    if not vmin < vmax:
        raise ConfigError(f"vmin={vmin} must be less than vmax={vmax}")
    return lambda images: tf.cast(images, tf.float32) / 255.0 * (vmax - vmin) + vmin


def statistics_of(mean, std):
    """Returns mean and std as given, or the pair of STATISTICS that `mean` names.

    Raises:
      ConfigError: An unknown name, a name with a std, or a mean without one.
    """
    if isinstance(mean, str):
        if mean not in STATISTICS or std is not None:
            raise ConfigError(f"give mean and std, or one of the names {sorted(STATISTICS)}")
        mean, std = STATISTICS[mean]
    # Numbers for the mean were given, and nothing else.
    if std is None:
        raise ConfigError("std is missing")
    return mean, std


@op(on_device=True)
def normalize(mean="imagenet", std=None):
    """(x / 255 - mean) / std per channel; both in [0, 1], or `mean` names one of STATISTICS."""
    mean, std = statistics_of(mean, std)
    if any(value <= 0 for value in (std if isinstance(std, tuple) else (std,))):
        raise ConfigError(f"std={std} must be positive")

    def scale(images):
        # Made while tracing: when a pipe is parsed, a constant would start a device.
        constants = (tf.constant(values, tf.float32) for values in (mean, std))
        mean_, std_ = constants
        return (tf.cast(images, tf.float32) / 255.0 - mean_) / std_

    return scale


@op(image=False)
def onehot(num_classes):
    """Turns "label", an int, into a float32 one-hot vector of `num_classes`."""
    check_positive(num_classes=num_classes)
    return lambda example: {
        **example,
        "label": tf.one_hot(example["label"], num_classes, dtype=tf.float32),
    }


@op(image=False)
def keep(*keys):
    """Keeps only these entries: of image, label, index, epoch, seed and what the source adds."""
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ConfigError(f"keys must be names of entries, such as 'image', not {keys}")

    return lambda example: {key: example[key] for key in keys}


def on_image(function):
    """Lifts (image, seed) -> image to example -> example."""
    return lambda example: {**example, "image": function(example["image"], example["seed"])}


def decoded(image: tf.Tensor) -> tf.Tensor:
    """Returns the image as it is; ValueError if it is still the bytes of a file."""
    if image.dtype == tf.string:
        raise ConfigError("the image is still encoded; put decode before this op")
    return image


def resize_image(image: tf.Tensor, size, method: str, antialias: bool) -> tf.Tensor:
    """Returns an image (H, W, C) uint8 resized to `size`, (height, width), as uint8.

    What is interpolated is rounded. The reference systems truncate, which darkens by half a level.
    """
    resized = tf.image.resize(image, size, method=method, antialias=antialias)
    if resized.dtype == tf.uint8:  # the method "nearest" computes no new values
        return resized
    resized = tf.round(resized)
    # Only where values can leave 0..255: clipping takes as long as half of a bilinear resize.
    if method in OVERSHOOTING:
        resized = tf.clip_by_value(resized, 0, 255)
    return tf.cast(resized, tf.uint8)


def _random_window(image: tf.Tensor, size, seed: tf.Tensor) -> tf.Tensor:
    """Returns a window of `size` (height, width) from a uniformly drawn place."""
    margin = tf.shape(image)[:2] - size
    # A remainder of 31 random bits: the bias towards small numbers is below margin / 2**31.
    draw = tf.random.stateless_uniform((2,), seed, maxval=tf.int32.max, dtype=tf.int32)
    top, left = tf.unstack(draw % (margin + 1))
    return image[top : top + size[0], left : left + size[1]]


def _pad(image: tf.Tensor, pixels: int, value: int, mode: str) -> tf.Tensor:
    if mode == "edge":
        for axis in (0, 1):
            size = tf.shape(image)[axis]
            # Rows (or columns) before the first repeat the first, and those behind the last repeat
            # the last. tf.pad has no such mode.
            at = tf.clip_by_value(tf.range(-pixels, size + pixels), 0, size - 1)
            static = image.shape.as_list()
            static[axis] = None if static[axis] is None else static[axis] + 2 * pixels
            image = tf.ensure_shape(tf.gather(image, at, axis=axis), static)
        return image
    paddings = ((pixels, pixels), (pixels, pixels), (0, 0))
    return tf.pad(image, paddings, mode.upper(), constant_values=tf.cast(value, image.dtype))


def parse_size(size) -> tuple[int, int]:
    """Returns an op's `size`, an int or (height, width), as (height, width); else ValueError."""
    # True and False are ints too; check_positive refuses them.
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ConfigError(f"size={size!r} must be an int or (height, width)")
    check_positive(height=pair[0], width=pair[1])
    return pair


def parse_method(method: str) -> str:
    """Returns an op's `method`; ValueError if it is none of METHODS."""
    if method not in METHODS:
        raise ConfigError(f"method={method!r} must be one of {METHODS}")
    return method


def check_positive(**values) -> None:
    """Raises ConfigError, with its name, for an argument that is no int of 1 or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be an int of 1 or more")


def _check_pad(pixels: int, value: int, mode: str) -> None:
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
        raise ConfigError(f"pixels={pixels!r} must be an int of 0 or more")
    if not 0 <= value <= 255:
        raise ConfigError(f"value={value!r} must be in 0..255")
    if mode not in ("constant", "reflect", "edge"):
        raise ConfigError(f"mode={mode!r} must be 'constant', 'reflect' or 'edge'")


def _check_crop(image: tf.Tensor, height: int, width: int) -> None:
    for have, want in zip(decoded(image).shape[:2], (height, width), strict=True):
        if have is not None and have < want:
            raise ConfigError(f"cannot cut {height}x{width} from an image of {image.shape[:2]}")
