"""Shards that were cut or whose bits flipped: found at opening, or when they are read."""

import os
from functools import partial
from pathlib import Path

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from tests.support import images, tiny
from vit_dist.config.errors import DataError, StorageError
from vit_dist.data import pipeline
from vit_dist.data.damage import Damage, explain_data_error
from vit_dist.data.ops import basic as ops
from vit_dist.data.resized import convert_resized
from vit_dist.data.sources import array_record
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.cache import CachedSource
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.preparation import Preparation, read_table
from vit_dist.run.check import check


def batches(source, count, damage=None):
    pipe = ops.parse(images.PIPE)
    ds = pipeline.make_train_data(source, pipe, batch_size=8, seed=1, damage=damage)
    return list(ds.take(count).as_numpy_iterator())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def assert_fails_and_masks(source, index, path):
    with pytest.raises(tf.errors.OpError) as error:
        batches(source, 5)
    text = explain_data_error(source, error.value, indices=range(20))
    assert str(path) in text and f"example {index} of" in text and "replace it" in text
    damage = Damage(source)
    have = batches(source, 5, damage)  # two epochs
    bad = [int(i) for b in have for i in b["index"][b["mask"] == 0]]
    assert bad == [index, index] and set(damage.counts()) == {"corrupt"}
    return text


# What flips in the fourth record of a file, given where it begins and ends.
BITS = {
    "length": lambda begin, end: begin,
    "checksum of the length": lambda begin, end: begin + 9,
    "data": lambda begin, end: (begin + end) // 2,
    "last byte": lambda begin, end: end - 5,
    "checksum of the data": lambda begin, end: end - 1,
}


@pytest.mark.parametrize("bit", BITS)
def test_each_flipped_bit_is_found(tmp_path, bit):
    paths = images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    ends = images.record_ends(paths[1])
    flip(paths[1], BITS[bit](ends[2], ends[3]))
    with pytest.raises(tf.errors.OpError, match="corrupted record"):
        source.read(tf.constant(8, tf.int64))
    with pytest.raises(ValueError, match=r"the storage is damaged: .*corrupted record"):
        source.load(8)
    assert source.load(7)[1] == 7 % 4


# A length that is wrong concerns where the next record begins, all else only this one.
LESS = pytest.mark.exhaustive
PIPED = [x if x in ("length", "data") else pytest.param(x, marks=LESS) for x in BITS]


@pytest.mark.parametrize("bit", PIPED)
def test_a_flipped_bit_in_a_tfrecord(tmp_path, bit):
    paths = images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    ends = images.record_ends(paths[1])
    flip(paths[1], BITS[bit](ends[2], ends[3]))
    text = assert_fails_and_masks(source, 5 + 3, paths[1])
    assert "corrupted record" in text


def test_flipped_bits_do_not_enter_caches_or_shards(tmp_path):
    paths = images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    flip(paths[0], images.record_ends(paths[0])[2] + 200)
    with pytest.raises(ValueError, match=rf"{paths[0]} \(example 3 of.*corrupted record"):
        CachedSource(source, "raw").prepare()
    with pytest.raises(DataError, match=rf"{paths[0]} \(example 3 of.*corrupted record"):
        convert(source, tmp_path / "out", split="train", examples_per_shard=8)


def test_a_source_damaged_after_its_conversion_keeps_its_shards(tmp_path):
    """The shard is then the only good copy: nobody is told to remove it."""
    paths = images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    convert(source, tmp_path / "out", split="train", examples_per_shard=20)
    flip(paths[0], images.record_ends(paths[0])[2] + 200)
    with pytest.raises(DataError, match="corrupted record") as error:
        convert(source, tmp_path / "out", split="train", examples_per_shard=20)
    assert f"{paths[0]} (example 3 of" in str(error.value)
    assert "convert again" not in str(error.value)


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("compression", ["GZIP", "ZLIB"])
def test_a_flipped_bit_in_a_stream_is_named_by_conversions(tmp_path, compression, resized):
    paths = images.write_tfrecords(tmp_path, compression=compression)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    flip(paths[1], paths[1].stat().st_size // 2)
    write = partial(convert_resized, preparation=Preparation(8)) if resized else convert
    with pytest.raises(DataError, match=rf"file {paths[1]} cannot be read"):
        write(source, tmp_path / "out", split="train", examples_per_shard=20)


def test_an_example_of_a_stream_without_an_image_is_named(tmp_path):
    paths = images.write_tfrecords(tmp_path, compression="GZIP")
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    source = open_source("tfrecord", split="train", **options)
    records = list(tf.data.TFRecordDataset(str(paths[0]), "GZIP").as_numpy_iterator())
    records[2] = b""  # an example without features
    with tf.io.TFRecordWriter(str(paths[0]), "GZIP") as writer:
        for record in records:
            writer.write(record)
    with pytest.raises(DataError, match=r"example 2 of .* cannot be read: .*image/class/label"):
        convert(source, tmp_path / "out", split="train", examples_per_shard=20)


def test_a_flipped_bit_in_an_array_record(tmp_path):
    images.write_folder(tmp_path / "folder", count=20)
    folder = open_source("folder", split="train", data_dir=str(tmp_path / "folder"))
    convert(folder, tmp_path, split="train", examples_per_shard=20)
    (path,) = (tmp_path / "train").glob("*.array_record")
    image, _ = folder.load(11)
    source = open_source("array_record", split="train", data_dir=str(tmp_path))
    assert source.load(11)[0] == image
    flip(path, path.read_bytes().index(image[-40:]) + 7)  # within the image's pixels
    text = assert_fails_and_masks(
        open_source("array_record", split="train", data_dir=str(tmp_path)), 11, "array_record"
    )
    assert "storage is damaged" in text


# cut between two records, where no index tells


def test_counts_tell_a_cut_before_the_first_opening(tmp_path):
    paths = images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 4}
    content = paths[1].read_bytes()
    os.truncate(paths[1], images.record_ends(paths[1])[3])
    for stream in (False, True):
        with pytest.raises(ValueError, match=r"hold 17 examples instead of the 20 of config.data"):
            open_source("tfrecord", split="train", counts={"train": 20}, stream=stream, **options)
    assert not list(tmp_path.glob("*.npz"))  # no table of what is wrong
    paths[1].write_bytes(content)
    for _ in range(2):  # from a scan, and from the table
        assert open_source("tfrecord", split="train", counts={"train": 20}, **options)
        with pytest.raises(ValueError, match="20 examples instead of the 21"):
            open_source("tfrecord", split="train", counts={"train": 21}, **options)


def test_counts_of_a_config(tmp_path):
    images.write_tfrecords(tmp_path)
    data = {"data__files": f"{tmp_path}/{{split}}-*.tfrecord", "data__num_classes": 4}
    ops = f"decode|{tiny.ANY_SIZE}"
    data |= {"data__source": "tfrecord", "input__train_ops": ops, "input__eval_ops": ops}
    check(tiny.without_evaluation(data__counts={"train": 20}, **data))
    with pytest.raises(ValueError, match="20 examples instead of the 21"):
        check(tiny.without_evaluation(data__counts={"train": 21}, **data))


@pytest.mark.parametrize("counts", [{"val": 3}, {"train": 0}, {"train": "20"}, 20])
def test_counts_that_say_nothing(tmp_path, counts):
    images.write_tfrecords(tmp_path)
    data = {"data__files": f"{tmp_path}/{{split}}-*", "data__num_classes": 4}
    with pytest.raises(ValueError, match=r"config.data.counts must give .* such as {'train'"):
        check(tiny.without_evaluation(data__source="tfrecord", data__counts=counts, **data))


@pytest.mark.parametrize("left", [15, 0, None])
def test_tfds_shards_are_measured_at_opening(tmp_path, left):
    builder = tfds.testing.DummyMnist(data_dir=str(tmp_path), file_format="tfrecord")
    builder.download_and_prepare()
    options = {"name": "dummy_mnist", "data_dir": str(tmp_path)}
    source = open_source("tfds", split="train", **options)
    path = tfds.core.Path(source._split_info.file_instructions[0].filename)
    if left is None:
        path.unlink()
    else:
        os.truncate(path, [0, *images.record_ends(path)][left])
    found = "no" if left is None else left
    for split in ("train", "train[:25%]"):
        with pytest.raises(ValueError, match=f"{path} holds {found} records instead of 20"):
            open_source("tfds", split=split, **options)
    assert open_source("tfds", split="test", **options).num_examples == 20


def test_a_disk_that_is_full_while_shards_are_written(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self.path = Path(path)
            self.path.write_bytes(b"half")

        def write(self, record):
            raise RuntimeError(f"write() failed: No space left on device; writing {self.path}")

        def close(self):
            pass

    monkeypatch.setattr(array_record.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(StorageError, match=r"could not write .*/x: write\(\) failed: No space"):
        array_record.write_shard(epath.Path(tmp_path / "x"), iter([b"1"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_table_of_shards_that_is_torn(tmp_path, text):
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(DataError, match=r"shards.json is damaged .*: remove .*convert again"):
        read_table(epath.Path(tmp_path))
