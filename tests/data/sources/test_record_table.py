"""Tables of TFRecord files, and files that are compressed."""

import gzip
import logging as std_logging
import os
import shutil
import zlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from etils import epath

from tests.support import images
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data import pipeline
from vit_dist.data.damage import explain_data_error
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources import record_table
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.open import open_source

KINDS = ("GZIP", "ZLIB")


def open_records(root, pattern="train-*.tfrecord", **options):
    files = f"{root}/{pattern}"
    return open_source("tfrecord", split="train", files=files, num_classes=4, **options)


def batches(source, count=4):
    pipe = parse(images.PIPE)
    ds = pipeline.make_train_data(source, pipe, batch_size=10, seed=3, num_threads=1)
    return list(ds.take(count).as_numpy_iterator())


# the table beside the files


@pytest.mark.parametrize("pattern", ["*", "train*", "{split}-0*"])
def test_a_pattern_that_matches_the_table(tmp_path, pattern):
    """It lies beside the files, as do hidden files and what a killed process left of a table."""
    images.write_tfrecords(tmp_path)
    (tmp_path / "train.vit_dist_index.npz.host-1.tmp").write_bytes(b"half")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    first = open_records(tmp_path, pattern)
    second = open_records(tmp_path, pattern)
    assert first.num_examples == second.num_examples == 20
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("name", ["a[1].tfrecord", "b*.tfrecord", "c {x}, y.tfrecord", "d\udce9"])
def test_a_file_that_is_called_as_a_pattern_is(tmp_path, name):
    (path,) = images.write_tfrecords(tmp_path / "data [x]", (5,))
    path.rename(path.with_name(name))
    source = open_records(tmp_path / "data [x]", name)
    assert source.num_examples == 5 and source.load(3)[1] == 3
    assert int(source.read(tf.constant(3, tf.int64))["label"]) == 3


def test_wildcards_stand_in_the_last_part(tmp_path):
    images.write_tfrecords(tmp_path / "a")
    with pytest.raises(ConfigError, match="wildcards may stand in the last part"):
        open_records(tmp_path, "*/train-*")


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch, caplog):
    logging.get_absl_logger().propagate = True
    images.write_tfrecords(tmp_path)

    def refused(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(record_table, "write_whole", refused)
    with caplog.at_level(std_logging.WARNING):
        assert open_records(tmp_path).num_examples == 20
    assert "cannot keep the index" in caplog.text and "next start scans again" in caplog.text
    assert not list(tmp_path.glob("*.npz"))


def test_a_bucket_that_may_only_be_read(tmp_path, remote, bucket):
    images.write_tfrecords(tmp_path)
    for path in tmp_path.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    bucket.refuse(403, r"POST .*upload")
    assert open_records(remote).num_examples == 20


def test_a_table_that_is_damaged_is_named(tmp_path):
    images.write_tfrecords(tmp_path)
    open_records(tmp_path)
    (table,) = tmp_path.glob("*.npz")
    whole = table.read_bytes()
    # Empty, cut in two places, and with a bit of the numbers flipped.
    for data in (b"", whole[:30], whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        table.write_bytes(data)
        with pytest.raises(DataError, match=rf"{table} is damaged .*: remove it"):
            open_records(tmp_path)


def test_a_file_that_is_no_tfrecord(tmp_path):
    images.write_tfrecords(tmp_path)
    (tmp_path / "train-99.txt").write_text("what these files are\n" * 9)
    with pytest.raises(DataError, match=r"train-99.txt ends within .*or give a pattern"):
        open_records(tmp_path, "train-*")


# class files


@pytest.mark.parametrize(
    ("text", "num_classes", "names"),
    [
        ("ant\nbee\ncat\ndog\n\n\n", None, ("ant", "bee", "cat", "dog")),
        ("ant\r\nbee \r\n\r\ncat\r\ndog", None, ("ant", "bee", "cat", "dog")),
        ("\ufeffant\nbee\ncat\ndog", 4, ("ant", "bee", "cat", "dog")),
        ("ant\n\ncat\ndog", 4, ("ant", "class 1", "cat", "dog")),
        ("ant\n\nbee\ncat\ndog", 4, ("ant", "bee", "cat", "dog")),
        ("crane\nbee\ncrane\ndog", None, ("crane (0)", "bee", "crane (2)", "dog")),
    ],
)
def test_class_files(tmp_path, text, num_classes, names):
    images.write_tfrecords(tmp_path)
    (tmp_path / "names").write_text(text)
    source = open_source(
        "tfrecord",
        split="train",
        files=f"{tmp_path}/train-*.tfrecord",
        class_file=f"{tmp_path}/names",
        num_classes=num_classes,
    )
    assert source.class_names == names


@pytest.mark.parametrize(
    ("data", "num_classes", "words"),
    [
        (b"a\nb\n", 4, "names 2 classes, and num_classes is 4"),
        (b"", None, "names 0 classes: it holds no text"),
        (b"caf\xe9\nb\n", None, "is not UTF-8: .*; save it as UTF-8"),
    ],
)
def test_class_files_that_cannot_be(tmp_path, data, num_classes, words):
    images.write_tfrecords(tmp_path)
    (tmp_path / "names").write_bytes(data)
    options = {"class_file": f"{tmp_path}/names", "num_classes": num_classes}
    with pytest.raises(ValueError, match=words):
        open_source("tfrecord", split="train", files=f"{tmp_path}/train-*.tfrecord", **options)


# compressed files


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_are_streamed_in_the_order_of_plain_ones(tmp_path, kind):
    images.write_tfrecords(tmp_path / "plain")
    images.write_tfrecords(tmp_path / "packed", compression=kind)
    plain = open_records(tmp_path / "plain", stream=True)
    for _ in range(2):  # from a scan, and from the table
        packed = open_records(tmp_path / "packed")
        assert not packed.indexable and packed.num_examples == 20
    for have, want in zip(batches(packed), batches(plain), strict=True):
        for key in want:
            np.testing.assert_array_equal(have[key], want[key], err_msg=key)
    assert packed.find_damage() is None and packed.peek(0) == plain.peek(0)
    assert "unpacked byte 0" in packed.describe(0)
    with pytest.raises(ConfigError, match=rf"compressed \({kind}\).*leave config.data.stream out"):
        open_records(tmp_path / "packed", stream=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.3, 0.98])
def test_a_compressed_file_that_was_cut(tmp_path, kind, size):
    paths = images.write_tfrecords(tmp_path, compression=kind)
    os.truncate(paths[1], int(paths[1].stat().st_size * size))
    with pytest.raises(
        DataError, match=rf"{paths[1]} \({kind}\) cannot be unpacked behind its rec"
    ):
        open_records(tmp_path)


def test_a_compressed_file_that_is_cut_while_it_is_used(tmp_path):
    paths = images.write_tfrecords(tmp_path, compression="GZIP")
    source = open_records(tmp_path)
    os.truncate(paths[1], paths[1].stat().st_size // 2)
    with pytest.raises(tf.errors.OpError) as error:
        batches(source)
    text = explain_data_error(source, error.value)
    assert str(paths[1]) in text and "copy it again" in text


def test_what_counts_as_compressed(tmp_path):
    """A record's length may begin as GZIP does."""
    path = epath.Path(tmp_path / "x")
    for data in (b"", b"\x1f\x8b\x08\0" + b"\0" * 30, b"\x78\x9c" + b"\0" * 30, b"plain" * 9):
        path.write_bytes(data)
        assert record_table.compression_of(path) == ""
    for pack, kind in ((gzip.compress, "GZIP"), (zlib.compress, "ZLIB")):
        path.write_bytes(pack(b"x" * 100))
        assert record_table.compression_of(path) == kind


def test_gzip_files_that_were_joined(tmp_path):
    parts = images.write_tfrecords(tmp_path / "parts", (3, 4), compression="GZIP")
    (tmp_path / "whole").mkdir()
    with open(tmp_path / "whole" / "train-0.tfrecord", "wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    source = open_records(tmp_path / "whole")
    assert source.num_examples == 7
    records = [source.decode_record(r) for r in source.stream(seed=None, epoch=0)]
    assert [int(r["label"]) for r in records] == [i % 4 for i in range(7)]


def test_streams_are_converted(tmp_path):
    """Compressed, or in a bucket: what cannot be read by index becomes so."""
    images.write_tfrecords(tmp_path / "plain")
    images.write_tfrecords(tmp_path / "packed", compression="GZIP")
    plain, packed = open_records(tmp_path / "plain"), open_records(tmp_path / "packed")
    assert convert(packed, tmp_path / "out", split="train", examples_per_shard=6) == 4
    shards = open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    assert [shards.load(i) for i in range(20)] == [plain.load(i) for i in range(20)]
    (tmp_path / "out/train/00002-of-00004.array_record").unlink()
    assert convert(packed, tmp_path / "out", split="train", examples_per_shard=6) == 1
    assert [shards.load(i) for i in range(20)] == [plain.load(i) for i in range(20)]


def test_wrong_features_of_a_compressed_file(tmp_path):
    images.write_tfrecords(tmp_path, compression="GZIP")
    with pytest.raises(DataError, match=r"no bytes 'img'.*it has \['image/class/label'"):
        open_records(tmp_path, image_key="img")


def test_an_old_table_is_still_read(tmp_path):
    """Those of before compressed files were read do not say how the files are stored."""
    images.write_tfrecords(tmp_path)
    first = open_records(tmp_path)
    (table,) = tmp_path.glob("*.npz")
    with np.load(table) as stored:
        columns = {name: stored[name] for name in stored.files if name != "compression"}
    np.savez(tmp_path / "old", **columns)
    shutil.move(tmp_path / "old.npz", table)
    assert open_records(tmp_path).load(7) == first.load(7)
