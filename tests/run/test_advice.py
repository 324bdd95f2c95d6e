"""Warnings about a folder of images and a moving average, before training."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.odd_images import encoded
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.preparation import Preparation
from vit_dist.run.advice import average_warnings, data_warnings, pixel_warnings


@dataclasses.dataclass
class Labelled:
    """As much of a source as the warnings look at."""

    labels: np.ndarray
    class_names: tuple = ("cats", "dogs", "birds")
    paths: np.ndarray | None = None


def source(*counts, **options):
    return Labelled(np.repeat(np.arange(len(counts)), counts), **options)


@pytest.mark.parametrize(
    ("counts", "val", "expected"),
    [
        ((30, 30, 30), (3, 3, 3), []),
        ((30, 30, 30), None, ["no val split: .* config.data.val_split"]),
        ((30, 30, 30), (3, 0, 3), ["val holds no image of 1 of 3 classes: dogs"]),
        ((301, 30, 30), (3, 3, 3), ["unbalanced: 301 images of 'cats', 30 of 'dogs'"]),
        ((300, 30, 30), (3, 3, 3), []),
        ((30, 30, 19), (3, 3, 3), ["1 of 3 classes have fewer than 20 .* 'birds' 19"]),
    ],
)
def test_classes(counts, val, expected):
    sources = {"train": source(*counts)} | ({"val": source(*val)} if val else {})
    found = data_warnings(sources, (32, 32))
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line)


def test_images_smaller_than_asked(tmp_path):
    for i, size in enumerate([(20, 40), (40, 20), (40, 40), (64, 64)]):  # (width, height)
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "4.jpg").write_bytes(b"broken")
    paths = np.array(sorted(map(str, tmp_path.iterdir())))
    sources = {"train": source(50, 50, 50, paths=paths), "val": source(5, 5, 5)}
    (line,) = data_warnings(sources, (32, 32))
    assert line.startswith("2 of 4 training images looked at are smaller than 32x32 (median 40x40)")
    assert data_warnings(sources, (16, 16)) == []
    (line,) = data_warnings(sources, (64, 32))
    assert line.startswith("3 of 4 ")


def test_images_resized_to_less_than_asked():
    prepared = SimpleNamespace(prepared=Preparation(32))
    assert data_warnings({"train": prepared, "val": prepared}, (32, 32)) == []
    (line,) = data_warnings({"train": prepared, "val": prepared}, (32, 48))
    assert "short side of 32, and will be enlarged to 32x48: convert them with" in line
    assert "--short_side=48 or more" in line


def test_sources_that_do_not_tell_are_left_alone():
    class Stream:
        class_names = ("a",)

    assert data_warnings({"train": Stream(), "val": Stream()}, (32, 32)) == []


PHOTO = Image.fromarray(np.full((20, 30, 3), 99, np.uint8))
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6
CLEAR, OPAQUE = PHOTO.copy(), PHOTO.copy()
CLEAR.putalpha(Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)))
OPAQUE.putalpha(255)
# Name of a kind of file -> its bytes, and which of the warnings it deserves.
KINDS = {
    "plain.jpg": (encoded(PHOTO, "jpeg"), ""),
    "turned.jpg": (encoded(PHOTO, "jpeg", exif=ON_ITS_SIDE), "EXIF"),
    "turned.png": (encoded(PHOTO, "png", exif=ON_ITS_SIDE), "EXIF"),
    "turned.webp": (encoded(PHOTO, "webp", exif=ON_ITS_SIDE), "EXIF"),
    "clear.png": (encoded(CLEAR, "png"), "transparent"),
    "clear.webp": (encoded(CLEAR, "webp"), "transparent"),
    "palette.png": (encoded(PHOTO.quantize(4), "png", transparency=0), "transparent"),
    "clear.gif": (encoded(PHOTO.quantize(4), "gif", transparency=0), "transparent"),
    "opaque.png": (encoded(OPAQUE, "png"), ""),
    "damaged.png": (b"\x89PNG\r\n\x1a\n" + b"x" * 90, ""),
    "damaged.jpg": (encoded(PHOTO, "jpeg", exif=b"Exif\0\0nonsense"), ""),
}
CAREFUL = "exif=True, background=255"


def folder_of(root, name):
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        (root / split / "a" / name).write_bytes(KINDS[name][0])
        (root / split / "a" / "plain.jpg").write_bytes(KINDS["plain.jpg"][0])
    return {s: open_source("folder", split=s, data_dir=str(root)) for s in ("train", "val")}


@pytest.mark.parametrize("name", KINDS)
def test_what_pipes_leave_out_of_images(tmp_path, name):
    sources, kind = folder_of(tmp_path, name), KINDS[name][1]
    fused, plain = "decode_jpeg_and_inception_crop(8{})|value_range", "decode{}|resize(8)"
    drops = {"train_pipe": parse(fused.format("")), "eval_pipe": parse(plain.format(""))}
    found = pixel_warnings(sources, **drops)
    assert len(found) == (2 if kind else 0), found
    for line, split, key in zip(found, ("train", "val"), ("train_ops", "eval_ops"), strict=False):
        assert line.startswith(f"1 of 2 {split} images looked at")
        assert kind in line and f"config.input.{key}" in line and name in line
    careful = {
        "train_pipe": parse(fused.format(f", {CAREFUL}")),
        "eval_pipe": parse(plain.format(f"({CAREFUL})")),
    }
    assert pixel_warnings(sources, **careful) == []


def test_arrays_have_no_pixels_to_leave_out():
    sources = {"train": open_source("demo", split="train")}
    pipe = parse("value_range")
    assert pixel_warnings(sources, train_pipe=pipe, eval_pipe=pipe) == []


@pytest.mark.parametrize(
    ("decay", "steps", "expected"),
    [
        (0.999, 112, "averages over 1,000 steps, and there are 112: 89% of .*ema_decay=0.91,"),
        (0.999, 1000, "37% of"),
        (0.9, 3, "ema_decay=0.5,"),
        (0.999, 2000, None),
        (0.99996, 75_060, None),
        (None, 10, None),
        (0.999, 0, None),
    ],
)
def test_an_average_that_lags(decay, steps, expected):
    found = average_warnings(decay, steps)
    assert len(found) == (expected is not None)
    assert not found or re.search(expected, found[0])
