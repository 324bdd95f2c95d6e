"""Folders and TFRecord files of small images for tests of the data, and ways to damage them."""

import io
import struct

import numpy as np
import tensorflow as tf
from PIL import Image

from vit_dist.data.sources.records import Keys, make_example

KEYS = Keys("image/encoded", "image/class/label")
PIPE = "decode|resize(8)|flip_lr|value_range(-1, 1)|keep('image', 'label', 'index', 'epoch')"


def jpeg(value, size=(12, 10)):
    """One that shows its value: 1..7 in steps of 32 levels."""
    buffer = io.BytesIO()
    pixels = np.full((*size, 3), value % 256, np.uint8)
    pixels[0] = 255 - pixels[0]
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_folder(root, count=24, names="ab", split="train", start=0):
    """root/<split>/<class>/<i>.jpg; returns the paths in the source's order."""
    for i in range(start, start + count):
        path = root / split / names[i % len(names)] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(8 * i))
    return sorted((root / split).glob("*/*"))


def write_tfrecords(
    root, counts=(5, 7, 8), split="train", keys=KEYS, num_classes=4, compression="", labels=None
):
    """root/<split>-<i>.tfrecord; returns the paths. `labels` of all, else 0, 1, ... in turn."""
    root.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for i, count in enumerate(counts):
        paths.append(root / f"{split}-{i:02}.tfrecord")
        with tf.io.TFRecordWriter(str(paths[-1]), compression or None) as writer:
            for _ in range(count):
                label = labels[number] if labels else number % num_classes
                writer.write(make_example(jpeg(8 * number), label, keys))
                number += 1
    return paths


def record_ends(path):
    """The offset at which each record of a TFRecord file ends."""
    data, ends, offset = path.read_bytes(), [], 0
    while offset < len(data):
        offset += 16 + struct.unpack("<Q", data[offset : offset + 8])[0]
        ends.append(offset)
    return ends
