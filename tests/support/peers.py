"""Independent implementations of augmentations: numpy, Pillow and TensorFlow's own kernels."""

import numpy as np
import tensorflow as tf
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

F = np.float32


def photo(height, width):
    """A part of a photograph that scikit-learn ships, with its dark and light ends in it."""
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")).resize((width, height))
    return np.asarray(image)


def pil(function):
    """Lifts a function of PIL images to one of arrays."""
    return lambda image, *args, **kwargs: np.asarray(
        function(Image.fromarray(image), *args, **kwargs)
    )


def tf_blend(first, second, factor):
    """The reference's blend: float32, each step rounded, truncated in the end."""
    first, second = first.astype(F), second.astype(F)
    return np.clip(first + F(factor) * (second - first), 0, 255).astype(np.uint8)


def tf_grey(image):
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)).numpy()


def tf_autocontrast(image):
    out = []
    for channel in np.moveaxis(image, -1, 0):
        low, high = F(channel.min()), F(channel.max())
        if high > low:
            scale = F(255) / (high - low)
            stretched = channel.astype(F) * scale + -low * scale
            channel = np.clip(stretched, 0, 255).astype(np.uint8)
        out.append(channel)
    return np.stack(out, -1)


def tf_equalize(image):
    out = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            lut = (np.cumsum(counts) + step // 2) // step
            channel = np.clip(np.concatenate([[0], lut[:-1]]), 0, 255).astype(np.uint8)[channel]
        out.append(channel)
    return np.stack(out, -1)


def tf_sharpness(image, factor):
    """Nine products summed row by row in float32, as Eigen's depthwise convolution does it."""
    height, width, _ = image.shape
    pixels, total = image.astype(F), np.zeros((height - 2, width - 2, 3), F)
    for y, x in np.ndindex(3, 3):
        weight = F(5 if y == x == 1 else 1) / F(13)
        total += pixels[y : y + height - 2, x : x + width - 2] * weight
    return _sharpened(image, total, factor)


def tf_sharpness_by_convolution(image, factor):
    """TensorFlow's own kernel; oneDNN's, where a processor has one, sums in another order."""
    kernel = np.ones((3, 3, 3, 1), F)
    kernel[1, 1] = 5
    pixels = image[np.newaxis].astype(F)
    smooth = tf.nn.depthwise_conv2d(pixels, kernel / 13, (1, 1, 1, 1), "VALID")[0]
    return _sharpened(image, smooth, factor)


def _sharpened(image, smooth, factor):
    degenerate = image.copy()
    degenerate[1:-1, 1:-1] = np.clip(smooth, 0, 255).astype(np.uint8)
    return tf_blend(degenerate, image, factor)


def tf_project(image, matrix):
    """TensorFlow's kernel; what comes in from outside is 128."""
    wrapped = np.concatenate([image, np.ones_like(image[..., :1])], -1)
    out = tf.raw_ops.ImageProjectiveTransformV3(
        images=wrapped[np.newaxis],
        transforms=np.array([[*matrix, 0, 0]], F),
        output_shape=image.shape[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0].numpy()
    return np.where(out[..., 3:] == 0, np.uint8(128), out[..., :3])


def tf_rotate(image, degrees):
    """About the middle of the pixels, as TensorFlow Addons had it."""
    h, w = (F(n - 1) for n in image.shape[:2])
    cos, sin = np.cos(F(degrees) * F(np.pi / 180)), np.sin(F(degrees) * F(np.pi / 180))
    x, y = (w - (cos * w - sin * h)) / F(2), (h - (sin * w + cos * h)) / F(2)
    return tf_project(image, (cos, -sin, x, sin, cos, y))


def cutout(image, y, x, half):
    out = image.copy()
    out[max(0, y - half) : y + half, max(0, x - half) : x + half] = 128
    return out


def reference_op(image, name, m, sign, place, *, translate=100):
    """One of the 16 operations of the reference's RandAugment at magnitude m, quirks included."""
    factor = m / 10 * 1.8 + 0.1
    shear, shift = m / 10 * 0.3 * sign, m / 10 * translate * sign
    threshold = np.array([int(m / 10 * 256)]).astype(np.uint8)  # wraps
    mean = min(255, image.shape[0] * image.shape[1] // 256)
    added = np.clip(image.astype(int) + int(m / 10 * 110), 0, 255).astype(np.uint8)
    bits = 8 - int(m / 10 * 4)
    return {
        "AutoContrast": lambda: tf_autocontrast(image),
        "Equalize": lambda: tf_equalize(image),
        "Invert": lambda: 255 - image,
        "Rotate": lambda: tf_rotate(image, m / 10 * 30 * sign),
        # TensorFlow clamps a shift of uint8 by 8 to 7.
        "Posterize": lambda: (image.astype(int) >> min(bits, 7) << min(bits, 7)).astype(np.uint8),
        "Solarize": lambda: np.where(image < threshold, image, 255 - image),
        "Color": lambda: tf_blend(tf_grey(image), image, factor),
        "Contrast": lambda: tf_blend(np.full_like(image, mean), image, factor),
        "Brightness": lambda: tf_blend(np.zeros_like(image), image, factor),
        "Sharpness": lambda: tf_sharpness(image, factor),
        "ShearX": lambda: tf_project(image, (1, shear, 0, 0, 1, 0)),
        "ShearY": lambda: tf_project(image, (1, 0, 0, shear, 1, 0)),
        "TranslateX": lambda: tf_project(image, (1, 0, shift, 0, 1, 0)),
        "TranslateY": lambda: tf_project(image, (1, 0, 0, 0, 1, shift)),
        "Cutout": lambda: cutout(image, *place, int(m / 10 * 40)),
        "SolarizeAdd": lambda: np.where(image < 128, added, image),
    }[name]()


def pil_op(image, name, value, *, fill=(0, 0, 0), resample=Image.Resampling.NEAREST):
    """One operation as Pillow does it, of its own parameter: factor, bits, degrees, pixels, ..."""
    picture = Image.fromarray(image)
    affine = {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateX": (1, 0, value, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, value),
    }
    done = {
        "Identity": lambda: picture,
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Invert": lambda: ImageChops.invert(picture),
        "Posterize": lambda: picture.point(lambda v: v >> (8 - value) << (8 - value)),
        "Solarize": lambda: ImageOps.solarize(picture, value),
        "SolarizeAdd": lambda: picture.point(lambda v: min(255, v + value) if v < 128 else v),
        "Color": lambda: ImageEnhance.Color(picture).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(value),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(value),
        "Rotate": lambda: picture.rotate(value, resample, fillcolor=fill),
        "GaussianBlur": lambda: picture.filter(ImageFilter.GaussianBlur(value)),
        "Grey": lambda: picture.convert("L").convert("RGB"),
    }
    if name in affine:
        size = picture.size
        moved = picture.transform(
            size, Image.Transform.AFFINE, affine[name], resample, fillcolor=fill
        )
        return np.asarray(moved)
    return np.asarray(done[name]())
