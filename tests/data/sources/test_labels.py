"""A label that stands for no class is found in every kind of source, named, or masked."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from tests.support import images, tiny
from vit_dist.data import pipeline
from vit_dist.data.damage import Damage, explain_data_error
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources import array_record, labels
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.cache import CachedSource
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.source import Source
from vit_dist.evaluate import evaluate
from vit_dist.train import train

COUNT, BAD = 60, 31  # BAD is none of those that are looked at when a source is opened
PIPE = "decode|resize(8)|value_range|keep('image', 'label', 'index')"


class Numbers(tfds.core.GeneratorBasedBuilder):
    """Images with the labels that a test gives."""

    VERSION = tfds.core.Version("1.0.0")
    labels: list[int] = []  # noqa: RUF012

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, label in enumerate(self.labels):
            yield i, {"image": np.full((9, 9, 3), i, np.uint8), "label": label}


def write_shards(folder, stored):
    """What `convert` writes, which refuses such labels."""
    path = folder / "train" / "00000-of-00001.array_record"
    path.parent.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(str(path), array_record.OPTIONS)
    for i, label in enumerate(stored):
        writer.write(images.make_example(images.jpeg(i), label, array_record.KEYS))
    writer.close()
    shard = {"name": path.name, "count": len(stored), "size": path.stat().st_size, "crc32": 0}
    table = {"class_names": ["a", "b", "c"], "source": "a test", "shards": [shard]}
    (path.parent / array_record.TABLE).write_text(json.dumps(table))


def make(kind, folder, stored, **options):
    """A source of three classes whose examples have these labels, and the order they come in."""
    if kind.startswith("tfds"):
        Numbers.labels = stored
        form = kind.split()[1]
        builder = Numbers(data_dir=str(folder), file_format=form)
        builder.download_and_prepare()
        where = {"name": "numbers", "data_dir": str(folder)}
        return open_source("tfds", split="train", **where, **options)
    if kind == "array_record":
        write_shards(folder, stored)
        return open_source(kind, split="train", data_dir=str(folder), **options)
    packed = "GZIP" if "packed" in kind else ""
    images.write_tfrecords(folder, (20, len(stored) - 20), labels=stored, compression=packed)
    given = {"files": f"{folder}/train-*", "num_classes": 3, **options}
    source = {"source": "tfrecord", **given}
    if kind == "mixture":
        return open_source("mixture", split="train", parts=[{**source, "weight": 1}] * 2)
    if "streamed" in kind:
        given["stream"] = True
    source = open_source("tfrecord", split="train", **given)
    return CachedSource(source, "raw") if kind == "cached" else source


KINDS = [
    "tfrecord",
    "tfrecord streamed",
    "tfrecord packed",
    "tfds array_record",
    "tfds tfrecord",
    "array_record",
    "mixture",
    "cached",
]


def read(source, *, training=True, damage=None, pipe=PIPE, **options):
    known = {"batch_size": 20, "num_threads": 1, "damage": damage, **options}
    if training:
        ds = pipeline.make_train_data(source, parse(pipe), seed=1, **known).take(9)
    else:
        ds = pipeline.make_eval_data(source, parse(pipe), **known)
    return list(ds.as_numpy_iterator())


def stored_labels(source):
    """In the order of the examples' numbers, which TFDS chooses."""
    if source.indexable:
        return [source.peek(i)[1] for i in range(source.num_examples)]
    return [int(source.decode_record(r)["label"]) for r in source.stream(seed=None, epoch=0)]


# In training each kind of source once. An evaluation has other code where a source is streamed.
IN_TRAINING = [(kind, 7 if i % 2 and "tfds" not in kind else -1) for i, kind in enumerate(KINDS)]
IN_EVALUATION = [("tfrecord", -1), ("tfrecord streamed", 7)]
# TFDS itself stores no label above the classes; -1 it does.
CASES = [(kind, bad) for kind in KINDS for bad in (7, -1) if bad < 0 or "tfds" not in kind]


@pytest.mark.parametrize(
    ("kind", "bad", "training"),
    [
        pytest.param(*case, training, marks=[] if case in chosen else pytest.mark.exhaustive)
        for training, chosen in ((True, IN_TRAINING), (False, IN_EVALUATION))
        for case in CASES
    ],
)
def test_a_label_outside_of_the_classes(kind, bad, training, tmp_path):
    stored = [i % 3 for i in range(COUNT)]
    stored[BAD] = bad
    source = make(kind, tmp_path, stored, check_files=False)
    mixed = kind == "mixture"
    numbers = {BAD, COUNT + BAD} if mixed else {stored_labels(source).index(bad)}
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        read(source, training=training)
    text = explain_data_error(source, error.value)
    assert f"its label is {bad}" in text and "on_bad_example=mask" in text
    assert any(source.describe(number) in text for number in numbers)
    damage = Damage(source)
    batches = read(source, training=training, damage=damage)
    masked = np.concatenate([b["index"][b["mask"] == 0] for b in batches])
    # The pipeline runs ahead of its reader: what it has masked there does not count.
    counts = damage.counts(before=sum(len(batch["mask"]) for batch in batches))
    assert numbers.issuperset(masked) and len(masked) == sum(counts.values()) > 0
    assert set(damage.counts()) == {"mislabelled"}
    for batch in batches:
        assert (batch["label"][batch["mask"] == 0] == 0).all()


@pytest.mark.parametrize("kind", ["tfrecord", "tfds array_record", "tfds tfrecord", "array_record"])
def test_a_split_without_labels_is_refused_at_opening(kind, tmp_path):
    """Also where a few bad labels would be masked: here it is the split that is wrong."""
    make(kind, tmp_path / "good", [i % 3 for i in range(COUNT)])
    # Of the one file of a stream only the first example is looked at: that one may be masked, and
    # max_bad_share ends the run.
    lenient = () if kind == "tfds tfrecord" else (False,)
    for i, check_files in enumerate((True, *lenient)):
        with pytest.raises(ValueError, match=r"its label is -1, outside of the classes 0 to 2"):
            make(kind, tmp_path / str(i), [-1] * COUNT, check_files=check_files)


def test_the_first_label_is_guessed(tmp_path):
    from_one = [1 + i % 3 for i in range(COUNT)]
    with pytest.raises(ValueError, match=r"are in 1\.\.3: .*Set config.data.first_label=1$"):
        make("tfrecord", tmp_path / "one", from_one)
    assert make("tfrecord", tmp_path / "right", from_one, first_label=1).num_examples == COUNT
    with pytest.raises(ValueError, match=r"are in 0\.\.2: .*Set config.data.first_label=0$"):
        make("tfrecord", tmp_path / "zero", [i % 3 for i in range(COUNT)], first_label=1)
    with pytest.raises(ValueError, match=r"count from 1\. Store them counted from 0"):
        make("array_record", tmp_path / "shards", from_one)


def test_labels_that_count_from_one_are_found_when_they_are_read(tmp_path):
    """None of those that are looked at is of the last class."""
    stored = [1] * COUNT
    stored[BAD], stored[BAD + 2] = 3, 2
    source = make("tfrecord", tmp_path, stored)
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        read(source)
    text = explain_data_error(source, error.value)
    assert "its label is 3" in text and "Set config.data.first_label=1" in text


def test_a_label_beyond_32_bits_is_no_class(tmp_path):
    stored = [i % 3 for i in range(COUNT)]
    stored[BAD] = 2**32 + 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="its label is"):
        read(make("tfrecord", tmp_path, stored))


def test_conversion_refuses_them(tmp_path):
    stored = [i % 3 for i in range(COUNT)]
    stored[BAD] = 3
    source = make("tfrecord", tmp_path / "in", stored, check_files=False)
    with pytest.raises(ValueError, match=rf"\(example {BAD} of .*its label is 3, outside"):
        convert(source, tmp_path / "out", split="train", examples_per_shard=25)


# labels that are rows


class Shares(Source):
    """Labels that are shares of three classes."""

    name, split, encoded, num_examples = "shares", "train", False, 8
    class_names = ("a", "b", "c")

    def __init__(self, rows):
        self.rows = np.array(rows, np.float32)
        self.element_spec = {
            "image": tf.TensorSpec((8, 8, 3), tf.uint8),
            "label": tf.TensorSpec((3,), tf.float32),
        }

    def fetch(self, indices):
        image = tf.zeros((*indices.shape, 8, 8, 3), tf.uint8)
        return {"image": image, "label": tf.gather(tf.constant(self.rows), indices)}

    def load(self, index):
        return np.zeros((8, 8, 3), np.uint8), 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([0.5, 0.4, 0.0], "the shares of its label sum to 0.9 and not to 1"),
        ([1.5, -0.5, 0.0], "a share of its label is negative"),
        ([0.0, 0.0, 0.0], "the shares of its label sum to 0 and not to 1"),
        ([np.nan, 0.0, 0.0], "the shares of its label sum to nan and not to 1"),
    ],
)
def test_shares_that_are_no_distribution_end_a_run(wrong, words):
    rows = tf.constant([[0.2, 0.3, 0.5], wrong])
    index = tf.constant(5, tf.int64)
    np.testing.assert_array_equal(labels.check_shares(rows[0], index), rows[0])
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        labels.check_shares(rows[1], index)
    assert labels.find_shares(error.value.message) == (words, 5)


def test_shares_that_are_no_distribution_in_a_pipeline(monkeypatch):
    rows = [[0.2, 0.3, 0.5]] * 8
    pipe = "value_range|keep('image', 'label', 'index')"
    source = Shares([*rows[:5], [0.5, 0.4, 0.0], *rows[6:]])
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        read(source, pipe=pipe, batch_size=4)
    # By the message alone: no example is read to find it.
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", None)
        told = explain_data_error(source, error.value)
    assert f"example 5 of {source}: the shares of its label sum to 0.9 and not to 1; " in told
    assert "config.input.on_bad_example=mask" in told
    damage = Damage(source)
    batches = read(source, pipe=pipe, batch_size=4, damage=damage)
    assert {i for b in batches for i in b["index"][b["mask"] == 0]} == {5}
    assert set(damage.counts()) == {"mislabelled"}
    # A sigmoid loss takes several classes, or none.
    assert len(read(source, pipe=pipe, batch_size=4, labels_sum_to_one=False)) == 9


def test_one_hot_rows_of_another_number_of_classes(tmp_path):
    source = make("tfrecord", tmp_path, [i % 3 for i in range(COUNT)])
    for number in (1, 2, 4):
        with pytest.raises(ValueError, match=rf"shape \({number},\).*3 classes: write onehot"):
            read(source, pipe=PIPE.replace("|keep", f"|onehot({number})|keep"))
    rows = read(source, pipe=PIPE.replace("|keep", "|onehot(3)|keep"))[0]["label"]
    assert rows.shape == (20, 3) and (rows.sum(1) == 1).all()


# what is said


@pytest.mark.parametrize(
    ("label", "others", "first_label", "words"),
    [
        (3, [1, 2, 3], 0, "first_label=1"),
        (0, [1, 2], None, "Correct the label"),
        (3, [1, 2, 1], None, "Store them counted from 0"),
        (-1, [0, 1, -1], 1, "first_label=0"),
        (-1, [0, 1, 2], 0, "not known"),
        (-1, [], None, "not known"),
        (7, [0, 1, 2], 0, "config.data.num_classes"),
        (7, [0, 1, 2], None, "Correct the label"),
    ],
)
def test_advice(label, others, first_label, words):
    assert words in labels.advise(label, 3, first_label=first_label, others=others)


def test_a_message_is_understood_again():
    error = None
    try:
        labels.check(tf.constant(9), 3, tf.constant(41, tf.int64))
    except tf.errors.InvalidArgumentError as caught:
        error = caught
    assert labels.find(error.message) == (9, 41)
    served = "service a failed: its label is -3 outside of the classes 0 to 2; example 5"
    assert labels.find(served) == (-3, 5)
    assert labels.find("Invalid PNG data") is None


# whole runs


def config_of(folder, **changed):
    data = {"data__source": "tfrecord", "data__files": f"{folder}/{{split}}-*"}
    ops = f"decode|{tiny.ANY_SIZE}"
    pipes = {"input__train_ops": ops, "input__eval_ops": ops}
    given = {"data__num_classes": 3, "data__test_split": "", **changed}
    return tiny.make(**data, **pipes, **given)


def write_split(folder, split, stored):
    images.write_tfrecords(folder, (len(stored),), split, labels=stored)


def test_runs_on_bad_labels(tmp_path):
    """One bad label ends a run or is masked; a split without labels is not evaluated."""
    stored = [i % 3 for i in range(COUNT)]
    write_split(tmp_path, "val", stored)
    stored[BAD] = 3
    write_split(tmp_path, "train", stored)
    with pytest.raises(ValueError, match=rf"example {BAD} of .*its label is 3"):
        train(config_of(tmp_path, total_steps=8), str(tmp_path / "fails"))
    masked = config_of(tmp_path, total_steps=8, input__on_bad_example="mask")
    metrics = train(masked, str(tmp_path / "masks"))
    assert metrics["masked"] >= 1 and metrics["masked_mislabelled"] >= 1
    assert np.isfinite(metrics["loss"])
    write_split(tmp_path, "test", [0] + [-1] * 19)
    config = config_of(tmp_path, data__test_split="test")
    with pytest.raises(ValueError, match=r"not known, as in test splits"):
        evaluate(config, str(tmp_path / "masks"), splits=["test"])


def test_png_of_arrays_of_other_channels(tmp_path):
    """Conversion stores arrays as PNG, which holds up to four channels."""
    for channels in (1, 2, 3, 4):
        array = np.random.RandomState(0).randint(0, 256, (5, 6, channels), np.uint8)
        with Image.open(io.BytesIO(array_record.png(array))) as opened:
            np.testing.assert_array_equal(np.asarray(opened).reshape(array.shape), array)
    with pytest.raises(ValueError, match="images of 5 channels cannot be stored as PNG"):
        array_record.png(np.zeros((5, 6, 5), np.uint8))
