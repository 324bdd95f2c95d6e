"""A run goes on where its data has moved, and not where it has become other data."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
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
from vit_dist.run import start
from vit_dist.run.check import check
from vit_dist.train import train


def config_of(data, **changed):
    ops = f"decode|{tiny.ANY_SIZE}"
    options = {"input__train_ops": ops, "input__eval_ops": ops, "data__val_split": ""}
    options |= {"data__test_split": "", "total_steps": 2, **changed}
    return tiny.make(**options, **{f"data__{key}": value for key, value in data.items()})


def saved(data, **changed):
    """A checkpoint of step 2 of a run on this data, as far as a resume looks at it."""
    options, opened = check(config_of(data, **changed))
    notes = {"config": options.record, "data": opened.sources["train"].fingerprint()}
    return SimpleNamespace(step=2, notes=json.loads(json.dumps(notes)))


def resume(checkpoint, data, **changed):
    """Checks a run that is to go on from there; returns its training source."""
    options, opened = check(config_of(data, **changed))
    start._check_order(checkpoint, options.record)
    start.check_data(start.Start("resume", checkpoint), opened)
    return opened.sources["train"]


def of_folder(path):
    return {"source": "folder", "data_dir": str(path)}


def test_the_same_folder_elsewhere(tmp_path, monkeypatch):
    """A slash more, another path, a relative one, the home."""
    tiny.make_folder(tmp_path / "job1" / "flowers")
    checkpoint = saved(of_folder(tmp_path / "job1/flowers"))
    resume(checkpoint, of_folder(f"{tmp_path}/job1/flowers/"))
    (tmp_path / "job2").mkdir()
    (tmp_path / "job1/flowers").rename(tmp_path / "job2/flowers")
    resume(checkpoint, of_folder(tmp_path / "job2/flowers"))
    monkeypatch.chdir(tmp_path / "job2")
    resume(checkpoint, of_folder("flowers"))
    monkeypatch.setenv("HOME", str(tmp_path / "job2"))
    resume(checkpoint, of_folder("~/flowers"))


def test_a_whole_run_goes_on_elsewhere(tmp_path):
    tiny.make_folder(tmp_path / "one")
    train(config_of(of_folder(tmp_path / "one")), str(tmp_path / "run"))
    (tmp_path / "one").rename(tmp_path / "two")
    again = config_of(of_folder(tmp_path / "two"), total_steps=3)
    assert train(again, str(tmp_path / "run"))["step"] == 3


def test_other_images_under_the_same_names(tmp_path):
    tiny.make_folder(tmp_path / "one")
    tiny.make_folder(tmp_path / "two")
    for i, path in enumerate((tmp_path / "two").rglob("*.jpg")):
        path.write_bytes(images.jpeg(7 * i + 1))
    checkpoint = saved(of_folder(tmp_path / "one"))
    with pytest.raises(DataError, match="contents of 16 of 16 examples looked at have changed"):
        resume(checkpoint, of_folder(tmp_path / "two"))


def test_an_image_that_was_repaired(tmp_path, caplog):
    folder = tiny.make_folder(tmp_path / "images")
    bad = folder / "train" / "dogs" / "5.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    checkpoint = saved(of_folder(folder))
    bad.write_bytes(good)
    resume(checkpoint, of_folder(folder))
    assert "the contents of 1 of 16 examples looked at have changed" in caplog.text


def test_classes_of_other_names(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    checkpoint = saved(of_folder(folder))
    for split in ("train", "val"):
        (folder / split / "cats").rename(folder / split / "zebras")
    with pytest.raises(DataError, match="classes: "):
        resume(checkpoint, of_folder(folder))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input__repeats": 2}, r"input\.repeats: 1 -> 2"),
        ({"input__batch_size": 8}, r"input\.batch_size: 16 -> 8"),
        ({"seed": 3}, "seed: 0 -> 3"),
    ],
)
def test_what_changes_the_order(tmp_path, changed, words):
    folder = tiny.make_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match=words):
        resume(saved(of_folder(folder)), of_folder(folder), **changed)


def test_an_older_checkpoint_compares_paths(tmp_path):
    """Its fingerprint tells neither order nor contents."""
    folder = tiny.make_folder(tmp_path / "images")
    checkpoint = saved(of_folder(folder))
    for key in ("order", "sample", "sizes"):
        del checkpoint.notes["data"][key]
    resume(checkpoint, of_folder(folder))
    with pytest.raises(ConfigError, match=r"data\.data_dir"):
        resume(checkpoint, of_folder(f"{folder}/"))


def test_parts_of_a_mixture_may_move(tmp_path):
    tiny.make_folder(tmp_path / "one")
    tiny.make_folder(tmp_path / "two")

    def mixture(second, weight=1):
        parts = [{**of_folder(tmp_path / "one"), "weight": 1}]
        parts.append({**of_folder(tmp_path / second), "weight": weight})
        return {"source": "mixture", "parts": parts}

    checkpoint = saved(mixture("two"))
    (tmp_path / "two").rename(tmp_path / "three")
    resume(checkpoint, mixture("three"))
    with pytest.raises(DataError, match="parts: "):
        resume(checkpoint, mixture("three", weight=3))


def test_tfrecords_may_move(tmp_path):
    images.write_tfrecords(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    images.write_tfrecords(tmp_path / "packed", compression="GZIP")
    data = {"source": "tfrecord", "num_classes": 4}
    checkpoint = saved({**data, "files": f"{tmp_path}/one/train-*"})
    moved = {**data, "files": f"{tmp_path}/two/{{split}}-*.tfrecord"}
    resume(checkpoint, moved)
    assert resume(checkpoint, {**moved, "stream": True}).indexable  # as the run reads them
    with pytest.raises(DataError, match=r"was read by index|read by index, and .* can only be str"):
        resume(checkpoint, {**data, "files": f"{tmp_path}/packed/train-*"})


# order


class Sixty(tfds.testing.DummyMnist):
    """60 distinct images, prepared alike in either format."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(60):
            yield i, {"image": np.full((28, 28, 1), i, np.uint8), "label": i % 10}


def prepare(folder, file_format):
    Sixty(data_dir=str(folder), file_format=file_format).download_and_prepare()
    return {"source": "tfds", "name": "sixty", "data_dir": str(folder)}


def batches(source, seed=1):
    pipe = parse("decode|resize(4)|keep('image', 'label', 'index')")
    ds = pipeline.make_train_data(source, pipe, batch_size=20, seed=seed, num_threads=1)
    return list(ds.take(3).as_numpy_iterator())


def order_of(source):
    return [int(i) for batch in batches(source) for i in batch["index"]]


def test_a_set_prepared_in_another_format_goes_on_in_the_same_order(tmp_path):
    """By index: the files of the other format are read so too, though they would be streamed."""
    index, stream = (prepare(tmp_path / f, f) for f in ("array_record", "tfrecord"))
    source = resume(saved(index), stream)
    _, whole = check(config_of(index))
    for have, want in zip(batches(source), batches(whole.sources["train"]), strict=True):
        for key in want:
            np.testing.assert_array_equal(have[key], want[key], err_msg=key)
    checkpoint = saved(stream)
    assert resume(checkpoint, stream).order.startswith("stream ")
    with pytest.raises(DataError, match=r"the run streamed the files, and .* reads by index"):
        resume(checkpoint, index)


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
    path = sorted((tmp_path / "train").glob("*/*"))[2]
    assert 2 not in fingerprint.sampled(24)
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
