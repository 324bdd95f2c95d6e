"""Warnings about a folder of images and a moving average, before training."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from vit_dist.run.advice import average_warnings, data_warnings


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


def test_sources_that_do_not_tell_are_left_alone():
    class Stream:
        class_names = ("a",)

    assert data_warnings({"train": Stream(), "val": Stream()}, (32, 32)) == []


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
