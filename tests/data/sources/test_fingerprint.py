"""A run goes on where its data has moved, and not where it has become other data."""

import os
import shutil

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.support import images, tiny
from tests.support.datasets import prepare_dummy
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data import pipeline
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources import fingerprint
from vit_dist.data.sources.open import open_source
from vit_dist.train import train


def run(root, steps, data, **changed):
    """Trains to `steps` in root/run on the data of a config."""
    ops = f"decode|{tiny.ANY_SIZE}"
    options = {"input__train_ops": ops, "input__eval_ops": ops, "data__val_split": ""}
    options |= {"data__test_split": "", "total_steps": steps, "model__dropout": 0.0, **changed}
    data = {f"data__{key}": value for key, value in data.items()}
    return train(tiny.make(**options, **data), str(root / "run"))


def of_folder(path):
    return {"source": "folder", "data_dir": str(path)}


def test_the_same_folder_elsewhere(tmp_path, monkeypatch):
    """A slash more, another path, a relative one."""
    tiny.make_folder(tmp_path / "job1" / "flowers")
    run(tmp_path, 2, of_folder(tmp_path / "job1/flowers"))
    run(tmp_path, 3, of_folder(f"{tmp_path}/job1/flowers/"))
    (tmp_path / "job2").mkdir()
    (tmp_path / "job1/flowers").rename(tmp_path / "job2/flowers")
    run(tmp_path, 4, of_folder(tmp_path / "job2/flowers"))
    monkeypatch.chdir(tmp_path / "job2")
    assert run(tmp_path, 5, of_folder("flowers"))["step"] == 5


def test_other_images_under_the_same_names(tmp_path):
    tiny.make_folder(tmp_path / "one")
    tiny.make_folder(tmp_path / "two")
    for i, path in enumerate((tmp_path / "two").rglob("*.jpg")):
        path.write_bytes(images.jpeg(7 * i + 1))
    run(tmp_path, 2, of_folder(tmp_path / "one"))
    with pytest.raises(DataError, match="contents of 16 of 16 examples looked at have changed"):
        run(tmp_path, 3, of_folder(tmp_path / "two"))


def test_an_image_that_was_repaired(tmp_path, caplog):
    folder = tiny.make_folder(tmp_path / "images")
    bad = folder / "train" / "dogs" / "5.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    masked = {"input__on_bad_example": "mask", "input__max_bad_share": 0.5}
    run(tmp_path, 2, of_folder(folder), **masked)
    bad.write_bytes(good)
    assert run(tmp_path, 3, of_folder(folder), **masked)["step"] == 3
    assert "the contents of 1 of 16 examples looked at have changed" in caplog.text


def test_repeats_change_the_order(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    run(tmp_path, 2, of_folder(folder))
    with pytest.raises(ConfigError, match=r"input\.repeats: 1 -> 2"):
        run(tmp_path, 3, of_folder(folder), input__repeats=2)


def test_parts_of_a_mixture_may_move(tmp_path):
    tiny.make_folder(tmp_path / "one")
    tiny.make_folder(tmp_path / "two")

    def mixture(second, weight=1):
        parts = [{**of_folder(tmp_path / "one"), "weight": 1}]
        parts.append({**of_folder(tmp_path / second), "weight": weight})
        return {"source": "mixture", "parts": parts}

    run(tmp_path, 2, mixture("two"))
    (tmp_path / "two").rename(tmp_path / "three")
    run(tmp_path, 3, mixture("three"))
    with pytest.raises(DataError, match="parts: "):
        run(tmp_path, 4, mixture("three", weight=3))


def test_tfrecords_may_move(tmp_path):
    images.write_tfrecords(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    data = {"source": "tfrecord", "num_classes": 4}
    run(tmp_path, 2, {**data, "files": f"{tmp_path}/one/train-*"})
    run(tmp_path, 3, {**data, "files": f"{tmp_path}/two/{{split}}-*.tfrecord"})
    with pytest.raises(DataError, match=r"read by index, and .* can only be streamed"):
        images.write_tfrecords(tmp_path / "packed", compression="GZIP")
        run(tmp_path, 4, {**data, "files": f"{tmp_path}/packed/train-*"})


# order


class Sixty(tfds.testing.DummyMnist):
    """60 distinct images, prepared alike in either format."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(60):
            yield i, {"image": tf.fill((28, 28, 1), tf.cast(i, tf.uint8)).numpy(), "label": i % 10}


def prepare(folder, file_format):
    Sixty(data_dir=str(folder), file_format=file_format).download_and_prepare()
    return {"source": "tfds", "name": "sixty", "data_dir": str(folder)}


def order_of(source, seed=1):
    pipe = parse("decode|resize(4)|keep('image', 'label', 'index')")
    ds = pipeline.make_train_data(source, pipe, batch_size=20, seed=seed).take(3)
    return [int(i) for batch in ds for i in batch["index"]]


def test_a_set_prepared_in_another_format_goes_on_in_the_same_order(tmp_path):
    """By index: the files of the other format are read so too, though they would be streamed."""
    index, stream = (prepare(tmp_path / f, f) for f in ("array_record", "tfrecord"))
    whole = run(tmp_path / "whole", 4, index, eval_steps=0)
    run(tmp_path, 2, index)
    metrics = run(tmp_path, 4, stream)
    assert metrics["loss"] == whole["loss"]
    tiny.assert_same(tiny.arrays(tmp_path / "run"), tiny.arrays(tmp_path / "whole/run"))


def test_a_stream_cannot_go_on_by_index(tmp_path):
    index, stream = (prepare(tmp_path / f, f) for f in ("array_record", "tfrecord"))
    run(tmp_path, 2, stream)
    with pytest.raises(DataError, match=r"the run streamed the files, and .* reads by index"):
        run(tmp_path, 3, index)
    assert run(tmp_path, 3, stream)["step"] == 3


def test_orders_that_a_source_can_take(tmp_path):
    data = prepare_dummy(tmp_path, "tfrecord")
    source, other = (open_source("tfds", split="train[10%:]", **data) for _ in range(2))
    streamed = order_of(source)
    assert source.order.startswith("stream ")
    source.follow("index")
    assert source.order == "index" and order_of(source) != streamed
    assert sorted(order_of(source)[:18]) == list(range(18))
    for i in (0, 7, 17):  # by its offset, in Python and in a graph, and streamed
        example = source.read(tf.constant(i, tf.int64))
        assert source.load(i) == (example["image"].numpy(), int(example["label"]))
    for i, record in enumerate(other.stream(seed=None, epoch=0)):
        assert other.decode_record(record)["image"].numpy() == source.load(i)[0]
    source.follow(other.order)
    assert order_of(source) == streamed
    with pytest.raises(DataError, match="streamed files of other lengths"):
        source.follow("stream 00000000")


# the comparison itself


def test_what_a_fingerprint_knows(tmp_path):
    images.write_folder(tmp_path)
    found = open_source("folder", split="train", data_dir=str(tmp_path)).fingerprint()
    assert found["num_examples"] == 24 and found["order"] == "index" and "sizes" in found
    assert [index for index, _ in found["sample"]] == fingerprint.sampled(24)
    assert len(fingerprint.sampled(10**6)) == fingerprint.NUM_SAMPLED
    path = tmp_path / "train" / "b" / "003.jpg"  # not in the sample
    os.truncate(path, path.stat().st_size - 1)
    again = open_source("folder", split="train", data_dir=str(tmp_path)).fingerprint()
    assert fingerprint.compare(found, again) == ([], ["some files have other sizes"])


@pytest.mark.parametrize(
    ("then", "now", "other", "noticed"),
    [
        ({}, {"order": "index"}, [], []),
        ({"names": 1}, {"names": 1, "sizes": 3}, [], []),
        ({"names": 1}, {"names": 2}, ["names: 1 -> 2"], []),
        ({"num_examples": 5}, {"num_examples": 6}, ["num_examples: 5 -> 6"], []),
        ({"sizes": 1}, {"sizes": 2}, [], ["some files have other sizes"]),
        ({"sample": [[0, 1], [5, 2]]}, {"sample": [[0, 1], [9, 7]]}, [], []),
        ({"sample": [[0, 1], [5, 2]]}, {"sample": [[0, 1], [5, 3]]}, [], ["of 1 of 2 examples"]),
        ({"sample": [[0, 1], [5, 2]]}, {"sample": [[0, 4], [5, 3]]}, ["of 2 of 2 examples"], []),
    ],
)
def test_comparison(then, now, other, noticed):
    for lines, words in zip(fingerprint.compare(then, now), (other, noticed), strict=True):
        assert len(lines) == len(words)
        assert all(word in line for word, line in zip(words, lines, strict=True))
