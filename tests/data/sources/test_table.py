"""Every source gives what its spec says: in training, evaluation and previews, under any pipe."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.support import images
from tests.support.datasets import prepare_dummy
from vit_dist.data import pipeline
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.cache import CachedSource
from vit_dist.data.sources.open import open_source
from vit_dist.data.view import stages

pytestmark = pytest.mark.compiles  # ops that XLA compiles

# For images that are arrays of 8 pixels already, and for files; the last op is compiled by XLA.
ARRAY_PIPES = ("value_range", "flip_lr|value_range", "solarize(p=1.0)|value_range")
FILE_PIPES = (
    "decode|resize(8)|value_range",
    "decode_jpeg_and_inception_crop(8)|value_range",
    "decode|resize(8)|solarize(p=1.0)|value_range",
)
KEEP = "|keep('image', 'label', 'index')"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same 20 images in every form."""
    root = tmp_path_factory.mktemp("data")
    images.write_folder(root / "folder", count=20)
    folder = open_source("folder", split="train", data_dir=str(root / "folder"))
    convert(folder, root / "shards", split="train", examples_per_shard=8)
    images.write_tfrecords(root / "records", (9, 11), num_classes=2)
    images.write_tfrecords(root / "packed", (9, 11), num_classes=2, compression="GZIP")
    return root


def make(kind, root):
    part = {"source": "folder", "data_dir": f"{root}/folder"}
    records = {"files": f"{root}/records/train-*", "num_classes": 2}
    noise = {"num_examples": 20, "num_classes": 4, "height": 8, "width": 8}
    options = {
        "demo": ("demo", {}),
        "synthetic arrays": ("synthetic", {**noise, "image_format": "array"}),
        "synthetic files": ("synthetic", noise),
        "folder": ("folder", {"data_dir": f"{root}/folder"}),
        "tfrecord": ("tfrecord", records),
        "tfrecord, streamed": ("tfrecord", {**records, "stream": True}),
        "tfrecord, packed": ("tfrecord", {**records, "files": f"{root}/packed/train-*"}),
        "array_record": ("array_record", {"data_dir": f"{root}/shards"}),
        "mixture of files": ("mixture", {"parts": [{**part, "weight": w} for w in (1, 2)]}),
        "mixture of arrays": (
            "mixture",
            {"parts": [{"source": "synthetic", **noise, "image_format": "array", "weight": 1}] * 2},
        ),
    }
    if kind.startswith("tfds"):
        form = kind.split()[1]
        return open_source("tfds", split="train", **prepare_dummy(root / form, form))
    if kind.startswith("cache"):
        return CachedSource(make("folder", root), kind.split()[1])
    name, given = options[kind]
    return open_source(name, split="train", **given)


KINDS = {
    "demo": ARRAY_PIPES,
    "synthetic arrays": ARRAY_PIPES,
    "synthetic files": FILE_PIPES,
    "folder": FILE_PIPES,
    "tfrecord": FILE_PIPES,
    "tfrecord, streamed": FILE_PIPES,
    "tfrecord, packed": FILE_PIPES,
    "array_record": FILE_PIPES,
    "tfds array_record": FILE_PIPES,
    "tfds tfrecord": FILE_PIPES,
    "mixture of files": FILE_PIPES,
    "mixture of arrays": ARRAY_PIPES,
    "cache raw": FILE_PIPES,
    "cache decoded": FILE_PIPES,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pipe_gives(kind, data):
    source = make(kind, data)
    for text in KINDS[kind]:
        spec = pipeline.check_pipe(source, parse(text + KEEP))
        assert spec["image"] == tf.TensorSpec((8, 8, 3), tf.uint8)


def cases():
    """kind, pipe and use of each case: each kind once, each pipe and each use with what differs.

    Sources differ in what they hold (arrays, files) and in how they are read (by index, in order).
    """
    streamed = {"tfrecord, streamed", "tfds tfrecord"}
    chosen = {(kind, i % 2, "training") for i, kind in enumerate(KINDS)}
    chosen |= {("demo", 2, "training"), ("tfrecord", 2, "training")}
    chosen |= {(kind, 0, "evaluation") for kind in ("demo", "folder", *streamed)}
    chosen |= {(kind, 0, "preview") for kind in ("synthetic arrays", "folder", *streamed)}
    for kind in KINDS:
        for case in itertools.product([kind], range(3), ("training", "evaluation", "preview")):
            yield pytest.param(*case, marks=[] if case in chosen else pytest.mark.exhaustive)


@pytest.mark.parametrize(("kind", "number", "use"), cases())
def test_dtypes_and_shapes(kind, number, use, data):
    source = make(kind, data)
    pipe = parse(KINDS[kind][number] + KEEP)
    spec = pipeline.check_pipe(source, pipe)
    known = {"batch_size": 8, "num_threads": 1}
    if use == "evaluation":
        ds = pipeline.make_eval_data(source, pipe, **known)
    else:
        only = {"only": 4} if use == "preview" else {}
        ds = pipeline.make_train_data(source, pipe, seed=1, **only, **known)
    (batch,) = ds.take(1).as_numpy_iterator()
    for key in ("image", "label", "index"):
        count = 4 if use == "preview" else 8
        want = (count, *spec[key].shape), spec[key].dtype.as_numpy_dtype
        assert (batch[key].shape, batch[key].dtype) == want, key
        assert tuple(ds.element_spec[key].shape) == want[0]
    assert pipe.device(tf.constant(batch["image"])).dtype == tf.float32


INDEXED = [k for k in KINDS if k not in ("tfrecord, streamed", "tfrecord, packed", "tfds tfrecord")]


@pytest.mark.parametrize("kind", INDEXED)
def test_what_is_shown(kind, data):
    """A contact sheet reads one example by its number, and its image after each op."""
    source = make(kind, data)
    example = source.read(tf.constant(3, tf.int64))
    for key, spec in source.element_spec.items():
        assert spec.is_compatible_with(example[key]), (key, example[key])
    place = {"index": tf.constant(3, tf.int64), "epoch": tf.constant(0, tf.int64)}
    example = {**example, **place, "seed": tf.constant([1, 2])}
    # Each pipe with arrays and with files, and each kind with one.
    number = INDEXED.index(kind)
    for text in KINDS[kind] if kind in ("demo", "folder") else [KINDS[kind][number % 2]]:
        shown = stages(parse(text), example)
        assert all(image.dtype == np.uint8 and image.shape[-1] == 3 for image in shown)
        assert shown[-1].shape == (8, 8, 3)


@pytest.mark.parametrize("kind", INDEXED)
def test_load_agrees_with_read(kind, data):
    """One is for threads of Python, the other for graphs."""
    source = make(kind, data)
    for index in (0, 7):
        example = source.read(tf.constant(index, tf.int64))
        image, label = source.load(index)
        assert label == int(example["label"]) and 0 <= label < source.num_classes
        if source.encoded:
            assert image == example["image"].numpy()
        elif kind != "cache decoded":
            np.testing.assert_array_equal(image, example["image"])
        assert source.peek(index)[1] == label
