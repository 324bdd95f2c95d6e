"""The cache gives what the source gives, is filled once, and is refused where it cannot fit."""

import errno
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import images, tiny
from tests.support.datasets import prepare_dummy
from tests.support.images import PIPE
from tests.support.peers import photo
from vit_dist.config.errors import ConfigError
from vit_dist.data import pipeline
from vit_dist.data.damage import Damage, explain_data_error
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources import cache
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.cache import CachedSource, needed_bytes
from vit_dist.data.sources.folder import FolderSource
from vit_dist.data.sources.open import open_source
from vit_dist.run.check import check
from vit_dist.storage import errors


@pytest.fixture
def folder(tmp_path):
    paths = images.write_folder(tmp_path / "images")
    return open_source("folder", split="train", data_dir=str(tmp_path / "images")), paths


def batches(source, **options):
    known = {"batch_size": 8, "seed": 1, "num_threads": 2, **options}
    ds = pipeline.make_train_data(source, ops.parse(PIPE), **known)
    return list(ds.take(4).as_numpy_iterator())


def exhaustive(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("form", "on_disk"),
    [("raw", True), ("decoded", False), exhaustive("raw", False), exhaustive("decoded", True)],
)
def test_batches_are_those_of_the_source(folder, form, on_disk, tmp_path):
    source, paths = folder
    want = batches(source)
    cached = CachedSource(source, form, folder=str(tmp_path / "cache") if on_disk else None)
    cached.prepare()
    for path in paths:
        changed = path.stat().st_mtime_ns
        path.write_bytes(b"")  # they are read no more
        os.utime(path, ns=(changed, changed))
    have = batches(cached)
    if on_disk:  # a later run, with no room for another
        again = CachedSource(source, form, folder=str(tmp_path / "cache"))
        have += batches(again)
        want += want
    for a, b in zip(have, want, strict=True):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_disk_that_earlier_caches_fill_is_told_as_that(folder, tmp_path, monkeypatch):
    source, _ = folder
    (tmp_path / "0123456789abcdef.cache").write_bytes(bytes(10**7))
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ConfigError, match=r"1 caches there take 0\.01 GB: remove those of data"):
        CachedSource(source, "raw", folder=str(tmp_path))


@pytest.mark.parametrize("form", cache.FORMS)
def test_the_need_is_known_before(folder, form, monkeypatch):
    source, paths = folder
    sizes = {"raw": sum(p.stat().st_size for p in paths), "decoded": 24 * 12 * 10 * 3}
    need = needed_bytes(source, form)
    assert need == sizes[form] + 24 * cache.TABLE_BYTES
    monkeypatch.setattr(cache, "available_memory", lambda: need)
    CachedSource(source, form)
    monkeypatch.setattr(cache, "available_memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"needs about .* GB for 24 examples, and .* are free"):
        CachedSource(source, form)


def test_a_full_disk_is_known_before(folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="are free on the disk of"):
        CachedSource(folder[0], "raw", folder=str(tmp_path))


def test_a_cache_that_was_not_finished_is_filled_again(folder, tmp_path):
    source, _ = folder
    first = CachedSource(source, "raw", folder=str(tmp_path))
    first.prepare()
    (table,) = tmp_path.glob("*.npz")
    table.unlink()
    (data,) = tmp_path.glob("*.cache")
    data.write_bytes(b"half")
    CachedSource(source, "raw", folder=str(tmp_path)).prepare()
    assert data.stat().st_size > 100 and table.exists()


@pytest.mark.parametrize("form", ["raw", exhaustive("decoded")])
def test_storage_that_fails_for_a_moment_is_not_kept(folder, form, tmp_path, monkeypatch):
    """It is no damage: the run ends, and the next one finds no trace of it."""
    monkeypatch.setattr(errors, "WAITS", (0.0,))
    source, _ = folder
    load = FolderSource.load

    def failing(self, index):
        if index == 5:
            raise OSError(errno.EIO, "Input/output error", "an image")
        return load(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "load", failing)
        with pytest.raises(OSError, match="Input/output error"):
            CachedSource(source, form, folder=str(tmp_path / "c"), keep_damaged=True).prepare()
    assert not list((tmp_path / "c").iterdir())
    cached = CachedSource(source, form, folder=str(tmp_path / "c"), keep_damaged=True)
    damage = Damage(cached)
    assert all((b["mask"] == 1).all() for b in batches(cached, damage=damage))
    assert damage.counts() == {}


@pytest.mark.parametrize("form", [exhaustive("raw"), "decoded"])
def test_a_flipped_bit_in_a_cache_is_named_and_not_masked(folder, form, tmp_path):
    source, _ = folder
    for masked in (False, True):
        cached = CachedSource(source, form, folder=str(tmp_path / "cache"))
        cached.prepare()
        (path,) = (tmp_path / "cache").glob("*.cache")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        again = CachedSource(source, form, folder=str(tmp_path / "cache"))
        with pytest.raises(tf.errors.UnknownError) as error:
            batches(again, damage=Damage(again) if masked else None)
        text = explain_data_error(again, error.value)
        assert f"the cache {path} is damaged at example" in text and "remove that file" in text
        path.unlink()


@pytest.mark.parametrize("broken", ["data", "table", "no data"])
def test_a_cache_that_is_not_whole_is_filled_again(folder, broken, tmp_path, caplog):
    source, _ = folder
    CachedSource(source, "raw", folder=str(tmp_path / "cache")).prepare()
    (data,) = (tmp_path / "cache").glob("*.cache")
    (table,) = (tmp_path / "cache").glob("*.npz")
    whole = data.read_bytes()
    if broken == "no data":
        data.unlink()
    else:
        os.truncate(data if broken == "data" else table, 100)
    cached = CachedSource(source, "raw", folder=str(tmp_path / "cache"))
    cached.prepare()
    assert data.read_bytes() == whole and "is damaged" in caplog.text
    assert bytes(cached.read(tf.constant(9, tf.int64))["image"].numpy()) == source.load(9)[0]


def test_a_cache_is_of_the_data_as_it_is_now(folder, tmp_path):
    """An image that was mended, or the same data elsewhere."""
    source, paths = folder
    where = str(tmp_path / "cache")
    CachedSource(source, "raw", folder=where).prepare()
    paths[3].write_bytes(images.jpeg(99) + b"more")  # none of those that a fingerprint looks into
    again = open_source("folder", split="train", data_dir=str(tmp_path / "images"))
    cached = CachedSource(again, "raw", folder=where)
    assert cached.read(tf.constant(3, tf.int64))["image"].numpy() == paths[3].read_bytes()
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 2
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = open_source("folder", split="train", data_dir=str(tmp_path / "moved"))
    CachedSource(moved, "raw", folder=where).prepare()
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 2


def test_a_cache_knows_a_file_that_was_mended_to_the_same_size(folder, tmp_path):
    _, paths = folder
    # None of those that a fingerprint looks into.
    where, good = str(tmp_path / "cache"), paths[2].read_bytes()
    paths[2].write_bytes(b"x" * len(good))
    os.utime(paths[2], ns=(1, 1))
    options = {"split": "train", "data_dir": str(tmp_path / "images"), "check_files": False}
    source = open_source("folder", **options)
    CachedSource(source, "raw", folder=where).prepare()
    paths[2].write_bytes(good)
    again = open_source("folder", **options)
    assert again.fingerprint() == source.fingerprint()
    cached = CachedSource(again, "raw", folder=where)
    assert cached.read(tf.constant(2, tf.int64))["image"].numpy() == good


def test_the_name_of_a_cache_tells_times_of_files_and_places(tmp_path):
    images.write_folder(tmp_path / "folder")
    images.write_tfrecords(tmp_path / "tfrecord")
    opened = {"folder": {"data_dir": f"{tmp_path}/folder"}}
    opened["tfrecord"] = {"files": f"{tmp_path}/tfrecord/train-*.tfrecord", "num_classes": 4}
    opened["tfds"] = prepare_dummy(tmp_path / "tfds", "array_record")
    opened["array_record"] = {"data_dir": f"{tmp_path}/shards"}
    convert(
        open_source("folder", split="train", **opened["folder"]),
        tmp_path / "shards",
        split="train",
        examples_per_shard=12,
    )
    opened["mixture"] = {"parts": [{"source": "folder", "weight": 1, **opened["folder"]}] * 2}

    def name(kind):
        return cache._key_of(open_source(kind, split="train", **opened[kind]), "raw", {})

    for number, kind in enumerate(opened):
        before = name(kind)
        assert name(kind) == before
        files = list(open_source(kind, split="train", **opened[kind]).locations())
        assert files, kind
        os.utime(files[-1], ns=(number, number))
        assert name(kind) != before, kind
    before = name("tfds")
    shutil.copytree(tmp_path / "tfds", tmp_path / "copy")  # with the times
    opened["tfds"] = {**opened["tfds"], "data_dir": f"{tmp_path}/copy"}
    assert name("tfds") != before


@pytest.mark.parametrize("form", cache.FORMS)
def test_damage_is_named_or_masked(folder, form):
    source, paths = folder
    paths[7].unlink()
    paths[8].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot be read: .*; replace it or remove it") as error:
        CachedSource(source, form).prepare()
    assert str(paths[7]) in str(error.value)
    cached = CachedSource(source, form, keep_damaged=True)
    damage = Damage(cached)
    masked = {int(i) for b in batches(cached, damage=damage) for i in b["index"][b["mask"] == 0]}
    assert masked == {7, 8}


def test_there_must_be_something_to_cache(tmp_path):
    with pytest.raises(ValueError, match="has arrays already"):
        check(tiny.make(input__cache="raw"))
    images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/train-*", "num_classes": 4, "stream": True}
    stream = open_source("tfrecord", split="train", **options)
    with pytest.raises(ValueError, match="is streamed"):
        CachedSource(stream, "raw")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cache", "yes", ["config.input.cache 'yes'", "off, raw, decoded"]),
        ("on_bad_example", "skip", ["config.input.on_bad_example 'skip'", "fail, mask"]),
        ("max_bad_share", 1.5, ["config.input.max_bad_share", "[0, 1]", "1.5"]),
        ("repeats", 0, ["config.input.repeats must be 1 or more, got 0"]),
    ],
)
def test_mistakes(key, value, words):
    with pytest.raises(ValueError) as error:
        check(tiny.make(**{f"input__{key}": value}))
    for word in words:
        assert word in str(error.value)


def test_a_config_with_a_cache_is_checked_and_read(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    _, data = check(tiny.of_folder(folder, input__cache="decoded", data__val_split=""))
    assert isinstance(data.sources["train"], CachedSource)
    assert data.sources["train"].read(tf.constant(3, tf.int64))["image"].shape == (20, 20, 3)


@pytest.mark.parametrize(
    "ops_of_training",
    [
        "decode(exif=True, background=255)|resize(16)",
        exhaustive("decode|resize(16)"),
        exhaustive("decode(exif=True, min_side=8)|resize(16)"),
        "decode_jpeg_and_inception_crop(16, area_min=50, exif=True, background=7)",
    ],
)
def test_a_cache_decodes_as_the_pipe_does(tmp_path, ops_of_training):
    """Upright or not, over the pipe's background or none: the batches are those without a cache."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(photo(20, 36))
    clear = image.copy()
    clear.putalpha(Image.fromarray(photo(20, 36)[..., 0]))
    for i in range(8):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        # The window of a JPEG is decoded a little otherwise than the whole of it.
        kinds = ("png", "webp") if "crop" in ops_of_training else ("png", "webp", "jpg")
        kind = kinds[i % len(kinds)]
        (image if kind == "jpg" else clear).save(folder / f"{i}.{kind}", exif=exif, lossless=True)
    made = {}
    for form in ("off", *cache.FORMS):
        keys = {"input__train_ops": f"{ops_of_training}|value_range(-1, 1)", "image_size": 16}
        config = tiny.of_folder(tmp_path, input__cache=form, data__val_split="", **keys)
        options, data = check(config)
        ds = pipeline.make_train_data(
            data.sources["train"], options.input.pipe, batch_size=8, seed=1, num_threads=1
        )
        (made[form],) = ds.take(1).as_numpy_iterator()
    for form in cache.FORMS:
        np.testing.assert_array_equal(made[form]["image"], made["off"]["image"])
