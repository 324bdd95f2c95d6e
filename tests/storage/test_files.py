"""Files and folders: what is there, what is not, and what cannot be told; local and in a bucket."""

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.config.errors import DataError
from vit_dist.storage import files
from vit_dist.storage.files import (
    exists,
    file_size,
    list_folder,
    make_folder,
    read_arrays,
    read_json,
    remove_tree,
    sync_folder,
    write_file,
    write_whole,
)

BUCKET = pytest.param("bucket", marks=[pytest.mark.spawns, pytest.mark.bucket])


@pytest.fixture(params=["local", BUCKET])
def folder(request, tmp_path):
    return tmp_path if request.param == "local" else request.getfixturevalue("remote")


def test_written_and_read(folder):
    make_folder(folder / "a" / "b")
    make_folder(folder / "a" / "b")
    path = folder / "a" / "b" / "file"
    assert not exists(path)
    write_file(path, [b"one", memoryview(b"two"), b""])
    sync_folder(folder / "a" / "b")
    assert exists(path) and file_size(path) == 6 and path.read_bytes() == b"onetwo"
    write_whole(path, b"three")
    assert path.read_bytes() == b"three"
    assert [p.name for p in list_folder(folder / "a" / "b")] == ["file"]
    assert [p.name for p in list_folder(folder / "a")] == ["b"]
    remove_tree(folder / "a")
    assert not exists(path)
    remove_tree(folder / "a")
    assert list_folder(folder / "a") == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    assert not exists(tmp_path / "file" / "below")
    for use in (make_folder, lambda path: write_file(path, [b"x"]), list_folder):
        with pytest.raises(NotADirectoryError):
            use(tmp_path / "file" / "below")


def test_the_files_of_a_user_without_a_name(tmp_path):
    (tmp_path / "file").write_bytes(b"four")
    os.chown(tmp_path / "file", 54321, 54321)
    assert exists(tmp_path / "file") and file_size(tmp_path / "file") == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_not_absent(tmp_path, monkeypatch, number):
    """Path.exists() would say False."""

    def fail(path, *args):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files.os, "stat", fail)
    monkeypatch.setattr(files.os, "listdir", fail)
    for ask in (exists, file_size, list_folder):
        with pytest.raises(OSError, match=os.strerror(number)):
            ask(tmp_path / "file")


@pytest.mark.parametrize("status", [403, 503])
@pytest.mark.parametrize("requests", [".", r"/o/\d", r"/o\?"], ids=["all", "objects", "lists"])
@pytest.mark.parametrize("name", ["folder", "folder/file", "nothing"])
def test_a_bucket_that_fails_is_not_empty(remote, bucket, status, requests, name):
    """TensorFlow's listdir() says that the folder does not exist."""
    write_file(remote / "folder" / "file", [b"x"])
    bucket.refuse(status, requests)
    for ask, path, answer in (
        (exists, remote / name, name != "nothing"),
        (lambda path: len(list_folder(path)), remote / "folder", 1),
    ):
        try:
            # Right, where it can be told from what is not refused.
            assert ask(path) == answer
        except tf.errors.OpError as error:
            assert str(status) in error.message


def test_half_a_file_is_never_seen(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"whole")

    def full(path, parts):
        write(path, [b"ha"])
        raise OSError(errno.ENOSPC, "No space left on device")

    write = files.write_file
    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_file_systems_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    def fail_with(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.os, "fsync", fsync)

    for number in (errno.EINVAL, errno.ENOTSUP):
        fail_with(number)
        sync_folder(tmp_path)
    fail_with(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder("~/a")
    write_file("~/a/file", [b"x"])
    assert exists("~/a/file") and file_size("~/a/file") == 1
    assert list_folder("~/a") == [tmp_path / "a" / "file"]
    remove_tree("~/a")
    assert not (tmp_path / "a").exists()


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_file(tmp_path / "x.csv", [b"1"])
    assert error.value.filename == str(tmp_path / "x.csv")


def test_damaged_files_of_ours(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(99))
    whole = (tmp_path / "x.npz").read_bytes()
    assert (read_arrays(tmp_path / "x.npz", remedy="")["a"] == np.arange(99)).all()
    # Each byte of what tells the kind of compression, encryption, names and sizes, and some others.
    places = [*range(60), *range(60, len(whole), 29), *range(len(whole) - 80, len(whole))]
    for at in places:
        for bit in (1, 0x80):
            flipped = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
            (tmp_path / "x.npz").write_bytes(flipped)
            try:
                # What no checksum covers is nothing that is read.
                found = read_arrays(tmp_path / "x.npz", remedy="remove it").get("a", np.arange(99))
                assert (found == np.arange(99)).all()
            except DataError as error:
                assert "x.npz is damaged" in str(error) and str(error).endswith(": remove it")
    for data in (b"", b"{", b"\xff"):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(DataError, match=r"x.json is damaged \(.*\): remove it"):
            read_json(tmp_path / "x.json", remedy="remove it")
