"""Folders as users have them: other names of splits, odd names, files that are no images."""

import errno
import logging as std_logging
import os

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from etils import epath
from PIL import Image

from tests.support import images, tiny
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data import pipeline
from vit_dist.data.ops.pipe import parse
from vit_dist.data.sources import folder as folder_lib
from vit_dist.data.sources import image_files
from vit_dist.data.sources.open import open_source
from vit_dist.run.check import check
from vit_dist.run.sources import open_sources
from vit_dist.storage.errors import explain


def write(root, *names, each=2):
    """root/<name>/<i>.jpg"""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            (root / name / f"{i}.jpg").write_bytes(images.jpeg(30 * i + 5))
    return root


def names_of(root, split="train", **options):
    return open_source("folder", split=split, data_dir=str(root), **options).class_names


# layouts


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_may_be_called_as_a_split_is(tmp_path, name):
    write(tmp_path, "airplane", "bus", name, each=10)
    for split, count in (("train", 27), ("val", 3)):
        source = open_source("folder", split=split, data_dir=str(tmp_path))
        assert source.class_names == tuple(sorted(("airplane", "bus", name)))
        assert source.num_examples == count


def test_splits_may_have_other_names(tmp_path):
    write(tmp_path, "Training/b", "Training/a", "Test/a")
    config = tiny.of_folder(tmp_path, data__train_split="Training", data__val_split="Test")
    sources = open_sources(config)
    assert [s.class_names for s in sources.values()] == [("a", "b")] * 2
    assert sources["val"].labels.tolist() == [0, 0]


def test_a_split_that_stands_alone_brings_its_own_classes(tmp_path):
    write(tmp_path, "val/a", "val/b")
    assert names_of(tmp_path, "val") == ("a", "b")
    with pytest.raises(ConfigError, match=r"has no split 'train'; it has \['val'\]: set config"):
        names_of(tmp_path, "train")
    config = tiny.of_folder(tmp_path)
    assert list(open_sources(config, training=False)) == ["val"]


def test_a_stray_image_beside_the_classes_changes_nothing(tmp_path):
    write(tmp_path, "train/a", "train/b")
    (tmp_path / "train" / "overview.jpg").write_bytes(images.jpeg(3))
    assert names_of(tmp_path) == ("a", "b")


def test_a_flat_folder_has_three_splits(tmp_path):
    write(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match=r"no split 'Training'.*no directory .*/Training"):
        names_of(tmp_path, "Training", train_split="Training")


def test_a_part_of_a_mixture_may_name_its_split(tmp_path):
    write(tmp_path / "one", "train/a", "train/b")
    write(tmp_path / "two", "photos/b", "photos/c")
    parts = [
        {"source": "folder", "data_dir": f"{tmp_path}/one", "weight": 1},
        {"source": "folder", "data_dir": f"{tmp_path}/two", "weight": 1, "split": "photos"},
    ]
    source = open_source("mixture", split="train", parts=parts, train_split="train")
    assert source.class_names == ("a", "b", "c")
    # One name is of the training split: for another one it would give the same examples.
    with pytest.raises(ConfigError, match=r"two.*no split for 'val'.*'photos'.*val_split=\"\""):
        open_source("mixture", split="val", parts=parts, train_split="train")


def test_a_part_of_a_mixture_may_name_each_split(tmp_path):
    write(tmp_path / "one", "train/a", "train/b", "val/a")
    write(tmp_path / "two", "photos/b", "photos/c", "held_out/c")
    names = {"train": "photos", "val": "held_out"}
    parts = [
        {"source": "folder", "data_dir": f"{tmp_path}/one", "weight": 1},
        {"source": "folder", "data_dir": f"{tmp_path}/two", "weight": 1, "split": names},
    ]
    ops = f"decode|{tiny.ANY_SIZE}"
    options = {"input__train_ops": ops, "input__eval_ops": ops, "data__source": "mixture"}
    options |= {"data__parts": parts, "data__val_split": "val", "data__test_split": ""}
    run, data = check(tiny.make(**options))
    assert run.record["data"]["parts"] == parts
    read = {
        name: [source.describe(i) for i in range(source.num_examples)]
        for name, source in data.sources.items()
    }
    assert {name: len(found) for name, found in read.items()} == {"train": 8, "val": 4}
    assert "/two/held_out/c/" in read["val"][3] and "/two/photos/" in read["train"][7]
    with pytest.raises(ConfigError, match=r"two.*no split for 'test'"):
        open_source("mixture", split="test", parts=parts, train_split="train")


# names


# Latin-1 where UTF-8 is expected, and whatever a shell or a glob would understand otherwise.
ODD = ["caf\udce9", "a b", "a,b", "[x]", "{x}", "*", "a?", "~x", "50% #1", "日本", "it's", 'a"b']
ODD += ["x\ny"]
PIPED = ("caf\udce9", "*")  # what is read one by one is read by the same ops in a pipeline


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_folders_classes_and_files(tmp_path, name):
    root = tmp_path / name
    for label in ("plain", name):
        path = root / "train" / label / f"{name}.jpg"
        os.makedirs(path.parent)
        path.write_bytes(images.jpeg(100))
    source = open_source("folder", split="train", data_dir=str(root))
    assert source.num_examples == 2
    for read in source.class_names:  # to print, and to store as UTF-8, one a line
        assert read.encode().decode() == read and len(read.splitlines()) == 1
    if "\udce9" in name:
        assert "caf\\xe9" in source.class_names
    for i in range(2):
        assert source.read(tf.constant(i, tf.int64))["image"].numpy() == source.load(i)[0]
    assert open_source("folder", split="train", data_dir=f"{root}/").fingerprint() == (
        source.fingerprint()
    )
    if name in PIPED:
        pipe = parse("decode|resize(4)|value_range")
        ds = pipeline.make_train_data(source, pipe, batch_size=2, seed=0)
        (batch,) = ds.take(1).as_numpy_iterator()
        assert sorted(batch["label"]) == [0, 1]


# files that are no images


def test_all_bad_files_are_named_at_once(tmp_path):
    write(tmp_path, "train/a", "train/b", each=4)
    bad = [tmp_path / "train" / "a" / "1.jpg", tmp_path / "train" / "b" / "3.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_text("<html>404</html>")
    with pytest.raises(DataError) as error:
        names_of(tmp_path)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("2 of 8 files looked at are no images; replace them or remove them")
    assert "config.input.on_bad_example=mask" in first
    assert [str(path) in line for path, line in zip(bad, lines, strict=True)] == [True, True]
    assert "is empty" in lines[0] and "begins with b'<html>40'" in lines[1]


def test_many_bad_files_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lib, "MAX_NAMED", 3)
    write(tmp_path, "train/a", each=9)
    for path in (tmp_path / "train" / "a").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"^9 of 9 files(?s:.*)\n  and 6 more$"):
        names_of(tmp_path)


def test_storage_that_fails_is_not_the_images_fault(tmp_path, monkeypatch):
    write(tmp_path, "train/a", each=2)
    opened = type(epath.Path(tmp_path)).open

    def fail(path, *args, **options):
        if path.name == "1.jpg":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", fail)
    with pytest.raises(OSError, match="Stale file handle") as error:
        names_of(tmp_path)
    assert explain(error.value).exit_code == 1


def test_names_that_only_look_alike(tmp_path):
    write(tmp_path, "train/caf\u00e9", "train/b", "val/cafe\u0301", "val/b")
    with pytest.raises(DataError, match=r"'cafe\\u0301' and 'caf\\xe9' look alike"):
        open_source("folder", split="val", data_dir=str(tmp_path))


def test_a_class_that_is_there_twice(tmp_path, caplog):
    logging.get_absl_logger().propagate = True
    write(tmp_path, "train/cafe\u0301", "train/caf\u00e9", "train/b")
    assert len(open_source("folder", split="train", data_dir=str(tmp_path)).class_names) == 3
    assert "may hold a class twice; " in caplog.text and "look alike" in caplog.text


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0", "is a HEIC file"),
        (b"\0\0\0\x1cftypavif\0\0", "is an AVIF file"),
        (b"II*\0\x08\0\0\0", "is a TIFF file"),
        (b"MM\0*\0\0\0\x08", "is a TIFF file"),
        (b"\0\0\0\x0cJXL \r\n", "is a JPEG XL file"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is not an image: it begins with b'RIFF"),
        (b"version https://git-lfs", "is a Git LFS pointer file"),
    ],
)
def test_other_kinds_under_a_known_extension(tmp_path, header, words):
    write(tmp_path, "train/a")
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(header)
    with pytest.raises(DataError, match=r"0\.jpg") as error:
        names_of(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "gif", "webp"])
def test_headers_of_images_that_are_decoded(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(path)
    assert image_files.header_problem(path.read_bytes()[: image_files.HEADER_BYTES]) is None


def test_tiff_of_pillow_is_told(tmp_path):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(path)
    assert "TIFF" in image_files.header_problem(path.read_bytes()[: image_files.HEADER_BYTES])


def test_ignored_files_are_named_by_kind(tmp_path, caplog):
    logging.get_absl_logger().propagate = True
    write(tmp_path, "train/a", "train/b")
    for name in ("a/1.heic", "a/2.HEIC", "b/3.tif", "b/4.avif", "b/notes", "b/.hidden"):
        (tmp_path / "train" / name).write_bytes(b"x")
    with caplog.at_level(std_logging.WARNING):
        names_of(tmp_path)
    assert "ignored 5 files" in caplog.text
    for words in ("2 HEIC", "1 TIFF", "1 AVIF", "1 no extension", "Convert them to JPEG or PNG"):
        assert words in caplog.text
    for path in (tmp_path / "train" / "a").glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no image \(2 HEIC, e.g. '1.heic'\)"):
        names_of(tmp_path)
