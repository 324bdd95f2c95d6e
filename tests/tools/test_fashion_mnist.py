"""Fashion-MNIST from Debian's package, prepared for TFDS without a network."""

import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tools import fashion_mnist
from vit_dist.data import pipeline
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.open import open_source

PACKAGE = pathlib.Path("/usr/share/datasets/fashion-mnist")
needs_package = pytest.mark.skipif(
    not PACKAGE.exists(), reason="Debian's package dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    """The prepared set's directory and what the command prints."""
    data_dir = tmp_path_factory.mktemp("array_record")
    lines = fashion_mnist.prepare(
        str(data_dir), source_dir=str(PACKAGE), file_format="array_record"
    )
    return str(data_dir), lines


@pytest.fixture(scope="module")
def tfrecord(array_record, tmp_path_factory):
    """The same records in TFRecords; preparing them anew takes as long again."""
    data_dir = tmp_path_factory.mktemp("tfrecord")
    (old,) = pathlib.Path(array_record[0]).glob("fashion_mnist/*")
    new = data_dir / "fashion_mnist" / old.name
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("*.array_record-*"))
    info = new / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for split in ("train", "test"):
        source = open_source("tfds", split=split, name="fashion_mnist", data_dir=array_record[0])
        shard = new / f"fashion_mnist-{split}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(shard)) as writer:
            for start in range(0, source.num_examples, 5000):
                records = source.fetch(tf.range(start, start + 5000, dtype=tf.int64))
                for record in records["record"].numpy():
                    writer.write(record)
    return str(data_dir)


@needs_package
@pytest.mark.slow
def test_prepares_without_network(array_record):
    data_dir, lines = array_record
    assert [line.split(":", 2)[2].strip() for line in lines] == [
        "train: 60000 examples, 10 classes",
        "test: 10000 examples, 10 classes",
    ]
    source = open_source("tfds", split="train", name="fashion_mnist", data_dir=data_dir)
    assert (source.num_examples, len(source.class_names)) == (60000, 10)
    assert source.class_names[9] == "Ankle boot" and source.indexable


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_batches_resume_and_are_grey_28x28(array_record, tfrecord, file_format):
    data_dir = {"array_record": array_record[0], "tfrecord": tfrecord}[file_format]
    source = open_source("tfds", split="train", name="fashion_mnist", data_dir=data_dir)
    assert (source.num_examples, len(source.class_names)) == (60000, 10)
    assert source.indexable == (file_format == "array_record")
    with pytest.raises(ValueError, match="file_format"):
        other = {"array_record": "tfrecord", "tfrecord": "array_record"}[file_format]
        options = {"name": "fashion_mnist", "data_dir": data_dir, "file_format": other}
        open_source("tfds", split="train", **options)
    pipe = ops.parse("decode|resize(28)|keep('image', 'label', 'index')")
    options = {"batch_size": 100, "seed": 0, "num_threads": 2}
    ds = pipeline.make_train_data(source, pipe, **options)
    want = list(ds.take(3).as_numpy_iterator())[2]
    ds = pipeline.make_train_data(source, pipe, first_step=2, **options)
    have = next(ds.as_numpy_iterator())
    for key in want:
        np.testing.assert_array_equal(have[key], want[key])
    assert have["image"].shape == (100, 28, 28, 3) and have["image"].std() > 50
    assert np.bincount(have["label"], minlength=10).min() > 0
    assert tf.reduce_all(have["image"][..., 0] == have["image"][..., 2])


@needs_package
def test_restores_the_original_bytes(tmp_path):
    fashion_mnist.restore(str(PACKAGE), manual_dir=str(tmp_path))  # compares the checksums itself
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.gz" for n in fashion_mnist.FILES}


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        fashion_mnist.restore(str(tmp_path), manual_dir=str(tmp_path / "out"))
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    packed.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="not a gzip file"):
        fashion_mnist.restore(str(tmp_path), manual_dir=str(tmp_path / "out"))
    packed.write_bytes(b"\x1f\x8b\x08\x00" + bytes(20))
    with pytest.raises(ValueError, match="expected 3aede38d"):
        fashion_mnist.restore(str(tmp_path), manual_dir=str(tmp_path / "out"))
