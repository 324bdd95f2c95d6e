"""JPEG: which CMYK is meant, and where EXIF lies. Layout: ITU-T T.81 annex B, CIPA DC-008."""

import tensorflow as tf

from vit_dist.data.ops import binary

# Adobe's marker: version 100, no flags, the colours as they are stored.
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
START = b"\xff\xd8"  # of the image; the segments follow
MARKER, EXIF = 0xFF, 0xE1  # how segments begin; APP1
EXIF_NAME = b"Exif\0\0"
JFIF = b"\xff\xe0\x00\x10"  # how the segment begins that most files have first
AFTER_JFIF = len(START) + 2 + 0x10
# What decoding needs, behind all that says something of the image: DQT, DHT, DRI, SOF 0 to 2, SOS.
TABLES = (0xDB, 0xC4, 0xDD, 0xC0, 0xC1, 0xC2, 0xDA)


def mark_inverted(data: tf.Tensor, channels: tf.Tensor) -> tf.Tensor:
    """Returns a JPEG's bytes, () string, such that the inks of CMYK are read as Pillow reads them.

    Adobe's programs store how much paper is left rather than how much ink there is, and so do all
    others. TensorFlow inverts only files with Adobe's marker, so every CMYK file is given one here.
    A file that has a marker already keeps it: it comes later, and the later one counts.
    """

    def marked() -> tf.Tensor:
        rest = tf.strings.substr(data, len(START), tf.strings.length(data))
        return tf.strings.join([START, ADOBE, rest])

    return tf.cond(tf.equal(channels, 4), marked, lambda: data)


def may_have_exif(data: tf.Tensor) -> tf.Tensor:
    """Returns whether a JPEG has more than JFIF's segment in front of its tables, () bool.

    Most JPEGs without EXIF have not, and walking through their segments in `find_exif` would take
    a tenth of the time that decoding a small one takes.
    """
    has_jfif = binary.has(data, len(START), JFIF)
    at = tf.minimum(tf.where(has_jfif, AFTER_JFIF, len(START)), tf.strings.length(data))
    tables = [bytes((MARKER, table)) for table in TABLES]
    return tf.reduce_all(tf.not_equal(tf.strings.substr(data, at, 2), tables))


def find_exif(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where EXIF's own bytes begin in a JPEG's, and their number; or 0, 0.

    It stands in front (CIPA DC-008, 4.5.4): behind JFIF, comments, colour profiles, but not behind
    the first table.
    """
    # What is read of each segment: marker, length, and as many bytes as EXIF's name has.
    size = 4 + len(EXIF_NAME)
    exif = tf.constant((MARKER, EXIF, 0, 0, *EXIF_NAME))
    # 1 for each byte that must be equal; the two of the length may be anything.
    compared = tf.constant((1, 1, 0, 0, *[1] * len(EXIF_NAME)))
    end = tf.strings.length(data)

    def read(at: tf.Tensor) -> tf.Tensor:
        # Not beyond the end: there TensorFlow raises, while at the end it gives zeros.
        return binary.numbers(data, tf.minimum(at, end), size)

    def is_exif(head: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(tf.equal(head * compared, exif))

    def is_other(at: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
        first, second = tf.unstack(head)[:2]
        # Beyond the end of the data all is 0, which ends the search.
        more = tf.equal(first, MARKER) & tf.reduce_all(tf.not_equal(second, TABLES))
        return more & ~is_exif(head)

    def following(at: tf.Tensor, head: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        _, second, high, low = tf.unstack(head)[:4]
        # Markers may be preceded by any number of bytes 0xFF.
        at += tf.where(tf.equal(second, MARKER), 1, 2 + 256 * high + low)
        return at, read(at)

    start = tf.constant(len(START))
    at, head = tf.while_loop(is_other, following, (start, read(start)))
    found = is_exif(head)
    _, _, high, low = tf.unstack(head)[:4]
    count = tf.maximum(2 + 256 * high + low - size, 0)
    return tf.where(found, at + size, 0), tf.where(found, count, 0)
