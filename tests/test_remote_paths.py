"""Paths that are not local: ram://, a file system of TensorFlow's that Python knows nothing of.

What is read through it is read through any other that TensorFlow has, such as gs://.
"""

import types

import images
import numpy as np
import pytest
import tensorflow as tf
import tiny
from etils import epath
from etils.epath import backend, gpath, register
from PIL import Image

from vit_dist import cli, show
from vit_dist.data import ops, pipeline
from vit_dist.data.cache import CachedSource
from vit_dist.data.shards import convert
from vit_dist.data.sources import open_source
from vit_dist.feed import open_sources


@pytest.fixture
def remote(monkeypatch, request):
    """A folder in memory; epath takes it as it takes gs://."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", backend.tf_backend)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
    path = epath.Path(f"ram://{abs(hash(request.node.name))}")
    path.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        open(f"{path}/x", "wb").close()  # not a local one, in any way
    return path


def copy(local, remote):
    for file in sorted(local.rglob("*")):
        if file.is_file():
            target = remote / str(file.relative_to(local))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


def batches(source, count=4):
    ds = pipeline.make_train_data(source, ops.parse(images.PIPE), batch_size=8, seed=1)
    return list(ds.take(count).as_numpy_iterator())


def assert_same(have, want):
    for a, b in zip(batches(have), batches(want), strict=True):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_folder(tmp_path, remote):
    images.write_folder(tmp_path)
    copy(tmp_path, remote)
    source = open_source("folder", split="train", data_dir=str(remote))
    local = open_source("folder", split="train", data_dir=str(tmp_path))
    assert_same(source, local)
    assert source.load(3) == local.load(3) and source.fingerprint() == local.fingerprint()
    assert_same(CachedSource(source, "raw"), local)
    bad = remote / "train" / "a" / "000.jpg"
    bad.unlink()  # the file system does not truncate
    bad.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"image file 'ram://.*000.jpg' is not an image"):
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
        assert_same(source, local)
        assert source.class_names == tuple("abcd") and source.load(9) == local.load(9)
        assert len(list(remote.glob("*.npz"))) == 1
    cut = remote / "train-01.tfrecord"
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{cut} has \d+ bytes"):
        open_source("tfrecord", split="train", num_classes=4, **options)


def test_show(tmp_path, remote, monkeypatch):
    copy(tiny.make_folder(tmp_path), remote)
    config = tiny.of_folder(remote, data__val_split="")
    monkeypatch.setattr(cli, "load_config", lambda: config)
    flags = types.SimpleNamespace(output=f"{remote}/sheet.png", split="train", step=0, count=2)
    monkeypatch.setattr(show, "FLAGS", flags)
    assert show.main() == 0
    with (remote / "sheet.png").open("rb") as file, Image.open(file) as sheet:
        assert sheet.width > 64


def test_conversion_reads_it(tmp_path, remote):
    images.write_folder(tmp_path / "folder")
    copy(tmp_path / "folder", remote)
    source = open_source("folder", split="train", data_dir=str(remote))
    convert(source, tmp_path, split="train", examples_per_shard=8)
    assert_same(open_source("array_record", split="train", data_dir=str(tmp_path)), source)


def test_libraries_that_open_files_themselves_need_local_ones(tmp_path, remote):
    images.write_folder(tmp_path)
    source = open_source("folder", split="train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="the folder for shards must be a local path, got ram://"):
        convert(source, str(remote), split="train", examples_per_shard=8)
    with pytest.raises(ValueError, match=r"config.data.data_dir.*must be a local path, got ram://"):
        open_source("array_record", split="train", data_dir=str(remote))
    config = tiny.of_folder(tmp_path, data__val_split="", input__cache="raw")
    with config.unlocked():
        config.input.cache_dir = str(remote)
    with pytest.raises(ValueError, match=r"config.input.cache_dir must be a local path, got ram:"):
        open_sources(config)
    assert not tf.io.gfile.glob(f"{remote}/*")
