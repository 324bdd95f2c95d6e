"""The reference systems' form of the pipeline, written plainly in tf.data: a peer of input.py.

Image by image, the window of the JPEG is decoded, resized, mirrored, augmented through
tf.switch_case, and scaled to float on the host. The result is batches of floats.
"""

import math

import tensorflow as tf


def make_data(files: list[str], batch_size: int, *, augmented: bool) -> tf.data.Dataset:
    def load(path):
        image = crop_and_flip(tf.io.read_file(path))
        image = randaugment(image) if augmented else image
        return tf.cast(image, tf.float32) / 127.5 - 1

    ds = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    ds = ds.map(load, tf.data.AUTOTUNE).batch(batch_size, drop_remainder=True)
    return ds.prefetch(2)


def crop_and_flip(data):
    shape = tf.image.extract_jpeg_shape(data)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.zeros((0, 0, 4), tf.float32),
        area_range=(0.05, 1.0),
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat((begin[:2], size[:2]), 0)
    image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.cast(tf.image.resize(image, (224, 224)), tf.uint8)
    return tf.image.random_flip_left_right(image)


def randaugment(image, layers=2, magnitude=10):
    # tf.switch_case builds all 16 branches into the graph and runs one of them for each image.
    for _ in range(layers):
        chosen = tf.random.uniform((), maxval=16, dtype=tf.int32)
        image = tf.switch_case(chosen, list(operations(image, magnitude / 10).values()))
        image = tf.ensure_shape(image, (224, 224, 3))
    return image


def operations(image, part):
    # Arguments as in the TPU reference models: `part` is the magnitude over 10; see docs/ops.md.
    factor, sign = part * 1.8 + 0.1, tf.where(tf.random.uniform(()) < 0.5, 1.0, -1.0)
    bits, threshold = 8 - int(part * 4), int(part * 256) % 256
    return {
        "AutoContrast": lambda: by_channel(image, autocontrast),
        "Equalize": lambda: by_channel(image, equalize),
        "Invert": lambda: 255 - image,
        "Rotate": lambda: rotate(image, sign * part * 30),
        "Posterize": lambda: tf.bitwise.left_shift(tf.bitwise.right_shift(image, bits), bits),
        "Solarize": lambda: tf.where(image < threshold, image, 255 - image),
        "Color": lambda: blend(grey(image), image, factor),
        "Contrast": lambda: contrast(image, factor),
        "Brightness": lambda: blend(tf.zeros_like(image), image, factor),
        "Sharpness": lambda: sharpness(image, factor),
        "ShearX": lambda: project(image, [1.0, sign * part * 0.3, 0.0, 0.0, 1.0, 0.0]),
        "ShearY": lambda: project(image, [1.0, 0.0, 0.0, sign * part * 0.3, 1.0, 0.0]),
        "TranslateX": lambda: project(image, [1.0, 0.0, sign * part * 100, 0.0, 1.0, 0.0]),
        "TranslateY": lambda: project(image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * part * 100]),
        "Cutout": lambda: cutout(image, int(part * 40)),
        "SolarizeAdd": lambda: solarize_add(image, int(part * 110)),
    }


def blend(first, second, factor):
    first, second = tf.cast(first, tf.float32), tf.cast(second, tf.float32)
    return tf.cast(tf.clip_by_value(first + factor * (second - first), 0, 255), tf.uint8)


def grey(image):
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def by_channel(image, function):
    return tf.stack([function(channel) for channel in tf.unstack(image, axis=-1)], -1)


def autocontrast(channel):
    # With low == high the scale is infinite; the tf.cond below then keeps the channel.
    low, high = (tf.cast(f(channel), tf.float32) for f in (tf.reduce_min, tf.reduce_max))
    scale = 255 / (high - low)
    stretched = tf.cast(channel, tf.float32) * scale - low * scale
    stretched = tf.cast(tf.clip_by_value(stretched, 0, 255), tf.uint8)
    return tf.cond(high > low, lambda: stretched, lambda: channel)


def equalize(channel):
    at = tf.cast(channel, tf.int32)
    counts = tf.histogram_fixed_width(at, [0, 255], nbins=256)
    step = (tf.reduce_sum(counts) - tf.boolean_mask(counts, counts > 0)[-1]) // 255

    def look_up():
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // step
        return tf.cast(tf.gather(tf.clip_by_value(table, 0, 255), at), tf.uint8)

    return tf.cond(step == 0, lambda: channel, look_up)


def contrast(image, factor):
    levels = tf.cast(tf.image.rgb_to_grayscale(image), tf.int32)
    counts = tf.histogram_fixed_width(levels, [0, 255], nbins=256)
    mean = tf.clip_by_value(tf.reduce_sum(tf.cast(counts, tf.float32)) / 256, 0, 255)
    return blend(tf.cast(tf.fill(tf.shape(image), mean), tf.uint8), image, factor)


def sharpness(image, factor):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13
    pixels = tf.cast(image, tf.float32)[None]
    smooth = tf.nn.depthwise_conv2d(pixels, tf.tile(kernel, (1, 1, 3, 1)), (1, 1, 1, 1), "VALID")
    smooth = tf.cast(tf.clip_by_value(smooth[0], 0, 255), tf.uint8)
    # The kernel does not reach the outermost pixels, which stay as they are.
    edge = ((1, 1), (1, 1), (0, 0))
    smooth = tf.where(tf.pad(tf.ones_like(smooth), edge) == 1, tf.pad(smooth, edge), image)
    return blend(smooth, image, factor)


def rotate(image, degrees):
    radians, last = degrees * math.pi / 180, image.shape[0] - 1.0
    cos, sin = tf.cos(radians), tf.sin(radians)
    x, y = (last - (cos * last - sin * last)) / 2, (last - (sin * last + cos * last)) / 2
    return project(image, [cos, -sin, x, sin, cos, y])


def project(image, matrix):
    # A fourth channel of ones marks pixels that come from the image: where it is 0 afterwards the
    # pixel is new, and becomes grey.
    wrapped = tf.concat([image, tf.ones_like(image[..., :1])], -1)
    out = tf.raw_ops.ImageProjectiveTransformV3(
        images=wrapped[None],
        transforms=tf.stack([*matrix, 0.0, 0.0])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
    return tf.where(out[..., 3:] == 0, tf.constant(128, tf.uint8), out[..., :3])


def cutout(image, half):
    height, width, _ = image.shape
    y = tf.range(height)[:, None] - tf.random.uniform((), maxval=height, dtype=tf.int32)
    x = tf.range(width) - tf.random.uniform((), maxval=width, dtype=tf.int32)
    inside = (y >= -half) & (y < half) & (x >= -half) & (x < half)
    return tf.where(inside[..., None], tf.constant(128, tf.uint8), image)


def solarize_add(image, addition):
    added = tf.cast(tf.clip_by_value(tf.cast(image, tf.int64) + addition, 0, 255), tf.uint8)
    return tf.where(image < 128, added, image)
