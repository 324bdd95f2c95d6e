"""Sources: what they hold, how they split, and that each mistake is named at opening."""

import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn import datasets
from tensorflow_datasets import testing as tfds_testing

from tests.support.datasets import prepare_dummy
from vit_dist.config.errors import ConfigError
from vit_dist.data.sources import open as sources
from vit_dist.data.sources import tfds as tfds_lib
from vit_dist.data.sources.open import open_source


def write_image(path, *, value=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def flat(tmp_path):
    """data_dir/<class>/*: two classes, 20 and 10 images."""
    for name, count in (("cat", 20), ("ant", 10)):
        for i in range(count):
            write_image(tmp_path / name / f"{i}.png", value=i)
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    return tmp_path


@pytest.fixture
def split(tmp_path):
    """data_dir/<split>/<class>/*."""
    for part, names in (("train", "cba"), ("val", "ca")):
        for name in names:
            write_image(tmp_path / part / name / f"{part}.jpg")
    return tmp_path


def test_demo_is_the_digits_in_three_disjoint_stratified_splits():
    parts = {name: open_source("demo", split=name) for name in ("train", "val", "test")}
    assert {k: p.num_examples for k, p in parts.items()} == {"train": 1257, "val": 180, "test": 360}
    images = np.concatenate([p.images for p in parts.values()])
    expected = np.round(datasets.load_digits().images * 255 / 16).astype(np.uint8)
    for have, want in zip(
        images.reshape(1797, -1, 3).transpose(2, 0, 1), [expected] * 3, strict=True
    ):
        assert sorted(map(bytes, have)) == sorted(map(bytes, want))
    for part in parts.values():
        share = np.bincount(part.labels) / part.num_examples
        np.testing.assert_allclose(share, 0.1, atol=0.01)
        assert part.class_names == tuple("0123456789") and part.num_classes == 10


def test_demo_reads_by_index_eagerly_and_in_a_map():
    source = open_source("demo", split="val")
    example = source.read(tf.constant(7, tf.int64))
    np.testing.assert_array_equal(example["image"], source.images[7])
    ds = tf.data.Dataset.range(180).map(source.read)
    np.testing.assert_array_equal([x["label"] for x in ds], source.labels)
    assert ds.element_spec == source.element_spec


def test_folder_splits_by_name_alone(flat):
    opened = {
        part: open_source(
            "folder", split=part, data_dir=str(flat), val_fraction=0.2, test_fraction=0.1
        )
        for part in ("train", "val", "test")
    }
    assert {k: s.num_examples for k, s in opened.items()} == {"train": 21, "val": 6, "test": 3}
    paths = [set(s.paths) for s in opened.values()]
    assert len(set.union(*paths)) == 30
    assert opened["val"].class_names == ("ant", "cat")
    assert np.bincount(opened["val"].labels).tolist() == [2, 4]
    again = open_source("folder", split="val", data_dir=str(flat), val_fraction=0.2)
    assert list(again.paths) == list(opened["val"].paths)


def test_folder_with_split_directories(split):
    source = open_source("folder", split="val", data_dir=str(split))
    assert source.class_names == ("a", "b", "c") and source.labels.tolist() == [0, 2]
    example = source.read(tf.constant(1, tf.int64))
    assert example["path"].numpy().decode() == str(split / "val" / "c" / "val.jpg")
    assert example["image"].numpy() == (split / "val" / "c" / "val.jpg").read_bytes()
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        k: (v.shape, v.dtype) for k, v in source.element_spec.items()
    }


def test_folder_reads_every_extension_it_names(tmp_path):
    from vit_dist.data.sources import folder

    for i, extension in enumerate(folder.EXTENSIONS):
        write_image(tmp_path / "train" / "a" / f"x{i}.{extension.upper()}", value=100)
    source = open_source("folder", split="train", data_dir=str(tmp_path))
    assert source.num_examples == len(folder.EXTENSIONS)
    for i in range(source.num_examples):
        data = source.read(tf.constant(i, tf.int64))["image"]
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        assert image.shape == (6, 5, 3) and abs(int(image[0, 0, 0]) - 100) < 8


def put(data):
    def damage(root):
        (root / "train" / "a" / "train.jpg").write_bytes(data)

    return damage


def extra_class(root):
    write_image(root / "val" / "z" / "1.png")


def empty_class(root):
    (root / "train" / "empty").mkdir()


def text_only(root):
    (root / "train" / "text").mkdir()
    (root / "train" / "text" / "notes.txt").write_text("hello")


FOLDER_MISTAKES = [
    (put(b""), "train", ["train.jpg", "is empty"]),
    (put(b"<html>404</html>"), "train", ["train.jpg", "not an image", "<html>"]),
    (extra_class, "val", ["'z'", "lacks"]),
    (empty_class, "train", ["empty", "no image"]),
    (text_only, "train", ["text", "notes.txt", "jpg", "png"]),
    (lambda root: None, "test", ["'test'", "'train', 'val'"]),
]


@pytest.mark.parametrize("damage,part,words", FOLDER_MISTAKES)
def test_folder_mistakes(split, damage, part, words):
    damage(split)
    with pytest.raises(ValueError) as error:
        open_source("folder", split=part, data_dir=str(split))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"split": "dev"}, ["'dev'", "'val'"]),
        ({"split": "test"}, ["'test'", "test_fraction of 0.0", "raise"]),
        ({"split": "val", "val_fraction": 1.5}, ["1.5", "[0, 1)"]),
        ({"split": "val", "val_fraction": 0.5, "test_fraction": 0.5}, ["sum"]),
    ],
)
def test_folder_mistakes_in_fractions(flat, options, words):
    with pytest.raises(ValueError) as error:
        open_source("folder", data_dir=str(flat), **options)
    for word in words:
        assert word in str(error.value)


def test_folder_missing_or_without_classes(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        open_source("folder", split="train", data_dir=str(tmp_path / "nowhere"))
    write_image(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="no class directories"):
        open_source("folder", split="train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "source,options,words",
    [
        ("foldr", {}, ["'foldr'", "'folder'", "demo", "tfds"]),
        ("demo", {"data_dir": "x"}, ["data_dir", "'demo'", "[]"]),
        ("folder", {"data_dirs": "x"}, ["data_dirs", "did you mean 'data_dir'", "val_fraction"]),
        ("folder", {"data_dir": None}, ["data_dir", "'folder'"]),
        ("demo", {"split": "training"}, ["'training'", "train", "val", "test"]),
        ("tfds", {"name": "fashion_mnits"}, ["fashion_mnits", "fashion_mnist"]),
        ("tfds", {"name": "mnist", "file_format": "zip"}, ["zip", "array_record"]),
        ("tfds", {"name": "coco/2017"}, ["coco/2017", "image", "label", "objects"]),
    ],
)
def test_mistakes_in_options(tmp_path, source, options, words):
    if source == "tfds":
        options = {"data_dir": str(tmp_path), **options}
    with pytest.raises(ValueError) as error:
        open_source(source, **{"split": "train", **options})
    for word in words:
        assert word in str(error.value)


def test_options_that_are_none_are_not_given():
    assert open_source("demo", split="val", data_dir=None, name=None).num_examples == 180


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def dummy(request, tmp_path_factory):
    """TFDS's own 20 grey images of 28x28 in one of the formats, found on disk: it has no code."""
    return prepare_dummy(tmp_path_factory.mktemp(request.param), request.param)


def test_tfds_prepares_and_reads_raw_bytes(dummy):
    source = open_source("tfds", split="train", **dummy)
    assert (source.num_examples, source.num_classes) == (20, 10)
    assert source.indexable == ("array_record" in dummy["data_dir"])
    if source.indexable:
        records = [source.read(tf.constant(i, tf.int64)) for i in range(20)]
    else:
        stream = source.stream(seed=None, epoch=0)
        assert [int(x["index"]) for x in stream] == list(range(20))
        records = [source.decode_record(x) for x in stream]
    assert Image.open(io.BytesIO(records[3]["image"].numpy())).size == (28, 28)
    assert sorted(int(x["label"]) for x in records) == sorted([*range(10), *range(10)])
    assert open_source("tfds", split="train[:25%]", **dummy).num_examples == 5


def test_tfds_unknown_split(dummy):
    with pytest.raises(ValueError, match=r"'validation'.*'test', 'train'"):
        open_source("tfds", split="validation", **dummy)


def test_tfds_stream_order_is_a_function_of_seed_and_epoch(dummy):
    source = open_source("tfds", split="train[10%:]", **dummy)
    if source.indexable:
        pytest.skip("read by index, not streamed")

    def order(seed, epoch):
        tf.random.set_seed(len(calls))  # must not matter
        calls.append(1)
        return [int(x["index"]) for x in source.stream(seed=tf.constant([seed, 0]), epoch=epoch)]

    calls = []
    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 1)) == list(range(18))
    assert len({tuple(order(*pair)) for pair in ((1, 0), (1, 1), (2, 0))}) == 3


def test_tfds_names_a_shard_that_was_cut(tmp_path):
    source = open_source("tfds", split="train", **prepare_dummy(tmp_path, "tfrecord"))
    (shard,) = source._split_info.file_instructions
    assert source.find_damage() is None
    records = list(tf.data.TFRecordDataset(shard.filename).take(15).as_numpy_iterator())
    with tf.io.TFRecordWriter(shard.filename) as writer:
        for record in records:
            writer.write(record)
    with pytest.raises(tf.errors.FailedPreconditionError):
        list(source.stream(seed=None, epoch=0))
    assert "15 records instead of 20" in source.find_damage()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_tfds_prepared_by_another_host(tmp_path, monkeypatch, when):
    """It is done before this one begins, which returns at once; or before this one's renaming."""
    made = []

    def make(*args):
        builder = tfds_testing.DummyMnist(data_dir=str(tmp_path), file_format="array_record")
        made.append(builder)
        own = builder._download_and_prepare

        def slowly(**options):
            prepare_dummy(tmp_path, "array_record")
            own(**options)

        if len(made) == 1 and when == "before":
            prepare_dummy(tmp_path, "array_record")
        elif len(made) == 1:
            monkeypatch.setattr(builder, "_download_and_prepare", slowly)
        return builder

    monkeypatch.setattr(tfds_lib, "_make_builder", make)
    source = open_source("tfds", split="train", name="dummy_mnist", data_dir=str(tmp_path))
    assert len(made) == 2 and source.num_examples == 20
    assert sorted(source.load(i)[1] for i in range(20)) == sorted([*range(10), *range(10)])


# The list of checksums of the second names no files, only addresses.
@pytest.mark.parametrize(
    ("name", "file"),
    [("mnist", "train-images-idx3-ubyte.gz"), ("imagenet2012", "ILSVRC2012_img_train.tar")],
)
def test_tfds_without_network_says_what_to_do(name, file, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", offline)
    with pytest.raises(ValueError) as error:
        open_source("tfds", split="train", name=name, data_dir=str(tmp_path))
    for word in (f"could not prepare {name}", "data_dir", "manual", file):
        assert word in str(error.value)


def test_opening_and_checking_touch_no_device(flat):
    code = f"""
        import tensorflow as tf
        from vit_dist.data.ops.pipe import output_spec, parse
        from vit_dist.data.sources.open import open_source
        for name, options in (("demo", {{}}), ("folder", {{"data_dir": {str(flat)!r}}})):
            source = open_source(name, split="train", **options)
            pipe = parse("decode_jpeg_and_inception_crop(8)|random_crop(6)|flip_lr|"
                             "random_shift(1)|value_range|onehot(10)")
            assert output_spec(source, pipe)["image"].shape == (6, 6, 3)
        (cpu,) = tf.config.list_physical_devices("CPU")
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, halves)
        assert len(tf.config.list_logical_devices("CPU")) == 2
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_the_table_of_sources_is_complete():
    kinds = ("demo", "folder", "tfds", "tfrecord", "array_record", "raw", "synthetic", "mixture")
    assert tuple(sources.SOURCES) == kinds
    for name, source in sources.SOURCES.items():
        assert source.name == name
