"""Images that are not read yet: crops read their window, all other ops the whole."""

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.data.ops import basic as ops
from vit_dist.data.ops.windows import Windowed

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 53, 3), np.uint8)


class Noted(Windowed):
    """An image in memory that notes how many rows were asked of it."""

    def __init__(self):
        self.rows = []

    def size(self):
        return tf.constant(PIXELS.shape)

    def window(self, begin, extent):
        self.rows.append(int(extent[0]))
        return tf.slice(tf.constant(PIXELS), begin, extent)


@pytest.mark.parametrize(
    ("text", "is_crop"),
    [
        ("decode_jpeg_and_inception_crop(16)|flip_lr", True),
        ("decode(exif=True, background=255)|inception_crop(16, method='bicubic')", True),
        ("onehot(10)|decode_jpeg_and_inception_crop((8, 16), antialias=True)", True),
        ("decode|resize(16)", False),
        ("resize_small(20)|central_crop(16)", False),
        ("decode|random_crop(16)|flip_lr", False),
    ],
)
def test_ops_read_what_they_must(text, is_crop):
    pipe = ops.parse(text)
    rest = {"label": tf.constant(1), "seed": tf.constant((3, 4))}
    image = Noted()
    have = pipe.host({"image": image, **rest})["image"]
    want = pipe.host({"image": tf.constant(PIXELS), **rest})["image"]
    np.testing.assert_array_equal(have, want)
    (rows,) = image.rows  # read once
    assert rows < 40 if is_crop else rows == 40


def test_a_pipe_without_ops_on_images_reads_it():
    image = ops.parse("onehot(10)").host(
        {"image": Noted(), "label": tf.constant(1), "seed": tf.constant((3, 4))}
    )["image"]
    np.testing.assert_array_equal(image, PIXELS)
