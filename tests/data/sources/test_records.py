"""TFRecord files, shards, synthetic images and mixtures: what they hold, and their order."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import images, tiny
from tests.support.images import PIPE
from vit_dist.data import pipeline
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.mixture import BLOCK, MixtureSource, _quotas
from vit_dist.data.sources.open import open_source
from vit_dist.run.check import check


@pytest.fixture
def tfrecords(tmp_path):
    """20 examples in three files."""
    paths = images.write_tfrecords(tmp_path / "records")
    return {"files": f"{tmp_path}/records/{{split}}-*.tfrecord", "num_classes": 4}, paths


def take(source, count, **options):
    pipe = ops.parse(PIPE)
    ds = pipeline.make_train_data(source, pipe, batch_size=10, seed=3, num_threads=2, **options)
    return list(ds.take(count).as_numpy_iterator())


def write(source, folder, size, **options):
    split = source.split
    return convert(source, folder, split=split, examples_per_shard=size, **options)


def all_images(source):
    return [bytes(source.load(i)[0]) for i in range(source.num_examples)]


# tfrecord


@pytest.mark.parametrize("stream", [False, True])
def test_tfrecords_are_read_in_full_each_epoch(tfrecords, stream):
    options, paths = tfrecords
    source = open_source("tfrecord", split="train", stream=stream, **options)
    assert source.num_examples == 20 and source.class_names == ("0", "1", "2", "3")
    assert source.indexable != stream and source.find_damage() is None
    batches = take(source, 4)
    index = np.concatenate([b["index"] for b in batches]).reshape(2, 20)
    assert (np.sort(index) == np.arange(20)).all() and (index[0] != index[1]).any()
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], batch["index"] % 4)
        # The pixels but for the first row say which example it is.
        np.testing.assert_allclose(batch["image"][:, 5, 4, 0], 8 * batch["index"], atol=2)
    assert str(paths[1]) in source.describe(7)


def test_tfrecords_by_index_and_streamed_agree(tfrecords):
    options, _ = tfrecords
    source = open_source("tfrecord", split="train", **options)
    streamed = open_source("tfrecord", split="train", stream=True, **options)
    records = list(streamed.stream(seed=None, epoch=0).as_numpy_iterator())
    assert [r["index"] for r in records] == list(range(20))
    for i in (0, 4, 5, 19):
        have = {k: v.numpy() for k, v in source.read(tf.constant(i, tf.int64)).items()}
        want = {k: v.numpy() for k, v in streamed.decode_record(records[i]).items()}
        assert have == want == dict(zip(("image", "label"), source.load(i), strict=True))


def test_tfrecords_keep_an_index_beside_the_files(tfrecords, monkeypatch):
    options, paths = tfrecords
    first = open_source("tfrecord", split="train", **options)
    monkeypatch.setattr("vit_dist.data.sources.record_table.scan", None)  # may not be needed again
    second = open_source("tfrecord", split="train", **options)
    assert all_images(first) == all_images(second)
    assert first.fingerprint() == second.fingerprint()
    with paths[2].open("ab") as file:
        file.write(paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"train-02.*indexed: it has been cut or replaced"):
        open_source("tfrecord", split="train", **options)


def test_tfrecords_with_other_keys_and_names(tmp_path):
    keys = images.Keys("img", "cls", first_label=1)
    images.write_tfrecords(tmp_path, keys=keys)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    options = {"files": f"{tmp_path}/train-*.tfrecord", "class_file": f"{tmp_path}/names.txt"}
    source = open_source(
        "tfrecord", split="train", image_key="img", label_key="cls", first_label=1, **options
    )
    assert source.class_names == ("ant", "bee", "cat", "dog")
    assert [source.load(i)[1] for i in range(5)] == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match=r"bytes 'image/encoded'.*it has \['cls', 'img'\]"):
        open_source("tfrecord", split="train", **options)
    with pytest.raises(ValueError, match=r"label is -1, .* Set config.data.first_label=1$"):
        open_source("tfrecord", split="train", image_key="img", label_key="cls", first_label=2,
                    **options)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": "nowhere/*"}, ["no file matches nowhere/*", "config.data.files"]),
        ({"num_classes": None}, ["num_classes or class_file"]),
        ({"num_classes": 0}, ["num_classes or class_file"]),
        ({"class_file": "NAMES"}, ["names 3 classes, and num_classes is 4"]),
    ],
)
def test_mistakes_with_tfrecords(tfrecords, tmp_path, options, words):
    (tmp_path / "names").write_text("a\nb\na\n")
    options = {k: str(tmp_path / "names") if v == "NAMES" else v for k, v in options.items()}
    with pytest.raises(ValueError) as error:
        open_source("tfrecord", split="train", **{**tfrecords[0], **options})
    for word in words:
        assert word in str(error.value)


# synthetic


@pytest.mark.parametrize("image_format", ["jpeg", "array"])
def test_synthetic_images(image_format):
    options = {"num_examples": 1000, "num_classes": 7, "height": 20, "width": 30}
    source = open_source("synthetic", split="train", image_format=image_format, **options)
    assert source.encoded == (image_format == "jpeg")
    for batch in take(source, 2):
        np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    val = open_source("synthetic", split="val", image_format=image_format, **options)
    one, other, third = (s.read(tf.constant(i, tf.int64)) for s, i in
                         ((source, 3), (source, 67), (val, 3)))  # fmt: skip
    assert np.array_equal(one["image"].numpy(), other["image"].numpy()) and other["label"] == 4
    assert not np.array_equal(one["image"].numpy(), third["image"].numpy())


def test_mistakes_with_synthetic_images():
    with pytest.raises(ValueError, match="num_classes of 1 or more, got 0"):
        open_source("synthetic", split="train", num_classes=0)
    with pytest.raises(ValueError, match="'png' is unknown"):
        open_source("synthetic", split="train", image_format="png")


# shards


def test_shards_hold_what_the_source_held(tmp_path):
    images.write_folder(tmp_path / "in")
    source = open_source("folder", split="train", data_dir=str(tmp_path / "in"))
    done = []
    assert write(source, tmp_path / "out", 10, report=done.append) == 3
    assert done == [10, 20, 24]
    shards = open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    assert shards.class_names == ("a", "b") and all_images(shards) == all_images(source)
    for have, want in zip(take(shards, 3), take(source, 3), strict=True):
        for key in want:
            np.testing.assert_array_equal(have[key], want[key])


def test_a_conversion_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    images.write_folder(tmp_path / "in")
    source = open_source("folder", split="train", data_dir=str(tmp_path / "in"))

    class Killed(BaseException):
        pass

    def stop(count):
        if count == 16:
            raise Killed

    with pytest.raises(Killed):
        write(source, tmp_path / "out", 8, report=stop)
    with pytest.raises(ValueError, match="of a conversion that ended"):
        open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    # Another kill, within a shard: its file is there under another name.
    (tmp_path / "out/train/00002-of-00003.array_record.tmp").write_bytes(b"half")
    first = (tmp_path / "out/train/00000-of-00003.array_record").stat().st_mtime_ns
    assert write(source, tmp_path / "out", 8) == 1
    assert (tmp_path / "out/train/00000-of-00003.array_record").stat().st_mtime_ns == first
    shards = open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    assert all_images(shards) == all_images(source)
    assert len(list((tmp_path / "out/train").iterdir())) == 3 + 2
    assert write(source, tmp_path / "out", 8) == 0
    with pytest.raises(ValueError, match="other data or of another size"):
        write(source, tmp_path / "out", 9)
    with pytest.raises(ValueError, match="examples_per_shard must be 1 or more"):
        write(source, tmp_path / "out", 0)


def test_a_damaged_shard_is_found(tmp_path):
    images.write_folder(tmp_path / "in")
    source = open_source("folder", split="train", data_dir=str(tmp_path / "in"))
    write(source, tmp_path / "out", 12)
    shard = tmp_path / "out/train/00001-of-00002.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{shard} has .* bytes instead of .*: it has been cut"):
        open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"remove {shard} and convert again"):
        write(source, tmp_path / "out", 12)
    shard.unlink()
    with pytest.raises(ValueError, match="has no bytes instead of"):
        open_source("array_record", split="train", data_dir=str(tmp_path / "out"))
    assert write(source, tmp_path / "out", 12) == 1
    assert shard.read_bytes() == whole


def test_arrays_become_pngs(tmp_path):
    demo = open_source("demo", split="val")
    write(demo, tmp_path, 100)
    shards = open_source("array_record", split="val", data_dir=str(tmp_path))
    image = tf.io.decode_png(shards.load(33)[0]).numpy()
    np.testing.assert_array_equal(image, demo.images[33])
    assert shards.class_names == demo.class_names


# mixture


@pytest.fixture
def parts(tmp_path):
    """24 images of classes a and b, and 9 of b and c."""
    images.write_folder(tmp_path / "one")
    images.write_folder(tmp_path / "two", count=9, names="bc", start=100)
    one, two = ({"source": "folder", "data_dir": f"{tmp_path}/{n}"} for n in ("one", "two"))
    return [{**one, "weight": 3.0}, {**two, "weight": 1}]


def test_a_mixture_keeps_its_shares_and_each_sources_epochs(parts):
    source = open_source("mixture", split="train", parts=parts)
    assert source.num_examples == 33 and source.class_names == ("a", "b", "c")
    positions = tf.range(4 * BLOCK, dtype=tf.int64)
    epoch, index = (x.numpy() for x in source.place(positions, seed=5))
    first = index < 24
    assert first.reshape(4, -1).sum(1).tolist() == [750] * 4
    assert 100 < first[: BLOCK // 4].sum() < 240  # not one after the other
    for mine, size in ((first, 24), (~first, 9)):
        counts = collections.Counter(zip(epoch[mine], index[mine], strict=True))
        assert set(counts.values()) == {1}  # no example twice in an epoch
        whole = [e for e, n in collections.Counter(epoch[mine]).items() if n == size]
        assert sorted(whole) == list(range(mine.sum() // size))
    later = source.place(positions[2345:2360], seed=5)
    np.testing.assert_array_equal(later, [epoch[2345:2360], index[2345:2360]])


def test_a_mixture_joins_classes_by_name(parts, tmp_path):
    source = open_source("mixture", split="train", parts=parts)
    names = {"one": "ab", "two": "bc"}
    for batch in take(source, 3):
        for index, label, image in zip(batch["index"], batch["label"], batch["image"], strict=True):
            path = source.describe(int(index)).split("'")[1]
            assert f"/{source.class_names[label]}/" in path
            assert source.class_names[label] in names[path.split("/train/")[0].split("/")[-1]]
            with Image.open(path) as opened:
                assert abs(np.median(image) - np.median(np.asarray(opened))) <= 2
            assert source.load(int(index))[1] == label
    whole = take(source, 3)
    again = take(source, 1, first_step=2)
    for key in whole[2]:
        np.testing.assert_array_equal(again[0][key], whole[2][key])


def test_quotas():
    assert _quotas([1, 1, 1]) == [334, 333, 333]
    assert _quotas([0.7, 0.3]) == [700, 300]
    assert sum(_quotas([0.123, 4.56, 7.8])) == BLOCK


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: None, ["needs parts"]),
        (lambda p: [{"source": "demo"}], ["weight"]),
        (lambda p: p[:1], ["two or more weights"]),
        (lambda p: [p[0], {**p[1], "weight": 0}], ["above 0", "[3.0, 0]"]),
        (lambda p: [p[0], {**p[1], "weight": 1e-9}], ["1e-09", "less than 1 in 1000"]),
        (lambda p: [p[0], {"source": "demo", "weight": 1}], ["images of one kind"]),
        (lambda p: [p[0], {**p[1], "source": "foldre"}], ["'foldre'", "'folder'"]),
        (lambda p: [p[0], {**p[1], "data_dirr": 1}], ["'data_dirr'", "'data_dir'"]),
    ],
)
def test_mistakes_with_mixtures(parts, change, words):
    with pytest.raises(ValueError) as error:
        open_source("mixture", split="train", parts=change(parts))
    for word in words:
        assert word in str(error.value)


def test_a_stream_cannot_be_mixed(tfrecords):
    stream = open_source("tfrecord", split="train", stream=True, **tfrecords[0])
    with pytest.raises(ValueError, match="reads by index"):
        MixtureSource([stream, stream], [1, 1])


def test_a_mixture_from_a_config(parts):
    ops = f"decode|{tiny.ANY_SIZE}"
    options = {"input__train_ops": ops, "input__eval_ops": ops, "data__source": "mixture"}
    options |= {"data__parts": parts, "data__val_split": "", "data__test_split": ""}
    run, data = check(tiny.make(**options))
    assert data.sources["train"].num_examples == 33 and run.model.network["num_classes"] == 3
    assert run.record["data"]["parts"] == parts
    spread = {k: v for k, v in parts[0].items() if k != "data_dir"}
    common = {"data__data_dir": parts[0]["data_dir"], "data__parts": [spread, parts[1]]}
    _, data = check(tiny.make(**options | common))
    assert data.sources["train"].num_examples == 33
