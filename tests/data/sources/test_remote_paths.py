"""Buckets: gs://, through TensorFlow's own file system, to a server of ours (bucket.py)."""

import types

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from PIL import Image

from tests.support import images, tiny
from tests.support.bucket import copy
from tests.support.datasets import prepare_dummy
from vit_dist import show
from vit_dist.data import pipeline
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.cache import CachedSource
from vit_dist.data.sources.fingerprint import compare
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.records import stream_records
from vit_dist.run import cli
from vit_dist.run.sources import open_sources


def batches(source, pipe, count=4):
    ds = pipeline.make_train_data(source, ops.parse(pipe), batch_size=8, seed=1)
    return list(ds.take(count).as_numpy_iterator())


def assert_same(*sources):
    """All give the same batches."""
    want, *others = (batches(source, images.PIPE) for source in sources)
    for have in others:
        for a, b in zip(have, want, strict=True):
            for key in b:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_folder(tmp_path, remote):
    images.write_folder(tmp_path)
    copy(tmp_path, remote)
    source = open_source("folder", split="train", data_dir=str(remote))
    local = open_source("folder", split="train", data_dir=str(tmp_path))
    assert_same(source, local, CachedSource(source, "raw"))
    assert source.load(3) == local.load(3)
    # A bucket is not asked for each file's size: that would be one request a file.
    assert "sizes" not in source.fingerprint()
    assert compare(source.fingerprint(), local.fingerprint()) == ([], [])
    bad = remote / "train" / "a" / "000.jpg"
    bad.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"image file 'gs://.*000.jpg' is not an image"):
        open_source("folder", split="train", data_dir=str(remote))


@pytest.mark.parametrize("stream", [False, True])
def test_tfrecord(tmp_path, remote, stream):
    images.write_tfrecords(tmp_path)
    copy(tmp_path, remote)
    (remote / "names").write_text("a\nb\nc\nd\n")
    options = {"stream": stream, "files": "{}/train-*.tfrecord"}
    local = open_source(
        "tfrecord", split="train", num_classes=4, **{**options, "files": f"{tmp_path}/train-*"}
    )
    options["files"] = options["files"].format(remote)
    for _ in range(2):  # from a scan, and from the table
        source = open_source("tfrecord", split="train", class_file=str(remote / "names"), **options)
        assert source.class_names == tuple("abcd") and source.load(9) == local.load(9)
        assert len(list(remote.glob("*.npz"))) == 1
    assert_same(source, local)
    cut = remote / "train-01.tfrecord"
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{cut} has \d+ bytes"):
        open_source("tfrecord", split="train", num_classes=4, **options)


def test_records_in_a_bucket_are_streamed_unless_told_otherwise(tmp_path, remote, caplog):
    """By index TensorFlow would fetch 64 MB for each."""
    logging.get_absl_logger().propagate = True
    images.write_tfrecords(tmp_path)
    copy(tmp_path, remote)
    for where, stream, indexable in (
        (tmp_path, None, True),
        (remote, None, False),
        (remote, False, True),
    ):
        with caplog.at_level("WARNING"):
            files = f"{where}/train-*.tfrecord"
            source = open_source(
                "tfrecord", split="train", files=files, num_classes=4, stream=stream
            )
        assert source.indexable == indexable
        assert ("set GCS_READAHEAD_BUFFER_SIZE_BYTES=262144" in caplog.text) == (stream is False)


def test_a_stream_from_a_bucket_has_the_order_of_one_from_disk(tmp_path, remote):
    """Though it reads files at once, and they end at different records."""
    counts = [3, 1, 7, 2, 5, 1, 1, 6, 4, 2, 3, 1, 2, 8, 1, 1, 3, 2, 1, 4]
    files = [f"{i:02}" for i in range(len(counts))]
    for file, count in zip(files, counts, strict=True):
        with tf.io.TFRecordWriter(str(tmp_path / file)) as writer:
            for _ in range(count):
                writer.write(b"record")
    copy(tmp_path, remote)

    def order(folder, seed):
        names = [f"{folder}/{file}" for file in files]
        options = {"seed": tf.constant([seed, 0]), "epoch": 1}
        stream = stream_records(names, [0] * len(files), counts, **options)
        return [int(x["index"]) for x in stream]

    assert order(remote, 3) == order(tmp_path, 3) != order(tmp_path, 4)
    assert sorted(order(remote, 4)) == list(range(sum(counts)))


def test_show(tmp_path, remote, monkeypatch):
    copy(tiny.make_folder(tmp_path), remote)
    config = tiny.of_folder(remote, data__val_split="")
    monkeypatch.setattr(cli, "load_config", lambda: config)
    flags = types.SimpleNamespace(output=f"{remote}/sheet.png", split="train", step=0, count=2)
    monkeypatch.setattr(show, "FLAGS", flags)
    assert show.main() == 0
    with (remote / "sheet.png").open("rb") as file, Image.open(file) as sheet:
        assert sheet.width > 64


def test_indexed_shards(tmp_path, remote):
    """Converted from a bucket; a copy in a bucket is read by index, too."""
    images.write_folder(tmp_path / "folder")
    copy(tmp_path / "folder", remote / "folder")
    source = open_source("folder", split="train", data_dir=str(remote / "folder"))
    convert(source, tmp_path, split="train", examples_per_shard=8)
    local = open_source("array_record", split="train", data_dir=str(tmp_path))
    copy(tmp_path / "train", remote / "shards" / "train")
    shards = open_source("array_record", split="train", data_dir=str(remote / "shards"))
    assert_same(source, local, shards)
    assert shards.load(9) == source.load(9)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds(tmp_path, remote, file_format):
    local = prepare_dummy(tmp_path, file_format)
    copy(tmp_path, remote)
    source = open_source("tfds", split="train[10%:]", **{**local, "data_dir": str(remote)})
    assert source.indexable == (file_format == "array_record")
    assert_same(source, open_source("tfds", split="train[10%:]", **local))


def test_libraries_that_open_files_themselves_need_local_ones(tmp_path, remote):
    images.write_folder(tmp_path)
    source = open_source("folder", split="train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="the folder for shards must be a local path, got gs://"):
        convert(source, str(remote), split="train", examples_per_shard=8)
    cache = {"input__cache": "raw", "input__cache_dir": str(remote)}
    config = tiny.of_folder(tmp_path, data__val_split="", **cache)
    with pytest.raises(ValueError, match=r"config.input.cache_dir must be a local path, got gs:"):
        open_sources(config)
    assert not tf.io.gfile.glob(f"{remote}/*")
