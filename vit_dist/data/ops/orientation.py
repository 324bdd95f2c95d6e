"""EXIF orientation of JPEGs: which way up a camera held the sensor (EXIF 2.32, tag 0x0112)."""

import tensorflow as tf

HEADER = 1 << 16  # bytes searched: EXIF comes first, and no segment is longer
_EXIF, _SCAN = 0xE1, 0xDA  # markers: APP1, and the start of the pixels
_TAG = 0x0112


def turn(image: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """Returns a decoded image (H, W, C) the way up that its file, `data` () string, says."""
    way = tf.cond(tf.io.is_jpeg(data), lambda: find(data), lambda: tf.constant(1))
    # 5 to 8 are mirrored along the diagonal first; then all that is left are mirrors.
    image = tf.cond(way >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    up_down = tf.reduce_any(tf.equal(way, (3, 4, 7, 8)))
    left_right = tf.reduce_any(tf.equal(way, (2, 3, 6, 7)))
    return tf.raw_ops.Reverse(tensor=image, dims=tf.stack([up_down, left_right, False]))


def find(data: tf.Tensor) -> tf.Tensor:
    """Returns the orientation, 1 to 8, in a JPEG's bytes, () string; 1 where it says none."""
    head = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 0, HEADER), tf.uint8), tf.int32)
    size = tf.size(head)

    def number(at, count: int, little):
        """The unsigned numbers of `count` bytes at `at`; bytes beyond the end are 0."""
        places = at[..., tf.newaxis] + tf.range(count)
        known = (places >= 0) & (places < size)
        parts = tf.where(known, tf.gather(head, tf.clip_by_value(places, 0, size - 1)), 0)
        weights = 256 ** tf.range(count)
        return tf.reduce_sum(parts * tf.where(little, weights, weights[::-1]), axis=-1)

    def is_other_segment(at):
        marker = number(at + 1, 1, False)
        exif = tf.equal(marker, _EXIF) & tf.equal(number(at + 4, 3, False), 0x457869)  # "Exi"
        ends = exif | tf.equal(marker, _SCAN) | tf.not_equal(number(at, 1, False), 0xFF)
        return (at + 4 < size) & ~ends

    at = tf.while_loop(
        is_other_segment, lambda at: (at + 2 + number(at + 2, 2, False),), (tf.constant(2),)
    )[0]
    tiff = at + 10
    little = tf.equal(number(tiff, 1, False), ord("I"))
    directory = tiff + number(tiff + 4, 4, little)
    entries = directory + 2 + 12 * tf.range(number(directory, 2, little))
    found = tf.equal(number(entries, 2, little), _TAG) & tf.equal(number(at + 1, 1, False), _EXIF)
    way = tf.reduce_max(tf.where(found, number(entries + 8, 2, little), 1))
    return tf.where((size > 0) & (way <= 8), tf.maximum(way, 1), 1)
