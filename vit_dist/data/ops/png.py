"""PNG with its alpha, and where a chunk lies. Layout: PNG specification (W3C), sections 5 and 11.

TensorFlow decodes colour well, and alpha where there is some; told to add what is missing, it makes
pixels of less than 8 bits nearly transparent.
"""

import tensorflow as tf

from vit_dist.data.ops import binary

FIRST = 8  # where the first chunk begins: after the signature
COLOR_TYPE = 25  # its place in the header
WITH_ALPHA = (4, 6)  # types of colour: grey and alpha, RGB and alpha


def decode(data: tf.Tensor) -> tf.Tensor:
    """Returns the pixels, (H, W, 4) uint8, of a PNG's bytes; alpha is 255 where there is none."""
    data = binary.within(data, tf.constant(COLOR_TYPE))
    color_type = binary.numbers(data, COLOR_TYPE, 1)
    # A palette's alpha, or one colour that is transparent. It comes before the pixels.
    _, listed = find(data, b"tRNS", before=b"IDAT")
    has_alpha = tf.reduce_any(tf.equal(color_type, WITH_ALPHA)) | (listed > 0)

    def without() -> tf.Tensor:
        pixels = tf.io.decode_png(data, channels=3)
        opaque = tf.constant(255, tf.uint8)
        return tf.pad(pixels, ((0, 0), (0, 0), (0, 1)), constant_values=opaque)

    return tf.cond(has_alpha, lambda: tf.io.decode_png(data, channels=4), without)


def find(data: tf.Tensor, name: bytes, *, before: bytes = b"IEND") -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where the bytes of the first chunk of that name begin, and their number; or 0, 0.

    Args:
      data: () string.
      name: Of the chunk.
      before: Of the chunk that ends the search; the data's end does too.
    """

    # A chunk is its length (4 bytes, the highest first), its name, its bytes and a checksum.
    def length(at: tf.Tensor) -> tf.Tensor:
        raw = tf.strings.substr(data, tf.minimum(at, end), 4)
        count = tf.io.decode_raw(raw, tf.int32, little_endian=False, fixed_length=4)[0]
        # A damaged length may be negative, which would lead back, or lead beyond 31 bits.
        return tf.clip_by_value(count, 0, end)

    def is_other(at: tf.Tensor) -> tf.Tensor:
        found = tf.strings.substr(data, tf.minimum(at + 4, end), 4)
        return tf.reduce_all(tf.not_equal(found, [name, before, b""]))

    end = tf.strings.length(data)
    # 12 bytes of each chunk are length, name and checksum.
    at = tf.while_loop(is_other, lambda at: (at + 12 + length(at),), (tf.constant(FIRST),))[0]
    found = tf.equal(tf.strings.substr(data, tf.minimum(at + 4, end), 4), name)
    at = tf.where(found, at, 0)
    return at + 8, tf.where(found, length(at), 0)
