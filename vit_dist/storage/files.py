"""Files and folders, local or in a bucket: "not there" told from "cannot be read", durable writes.

`Path.exists()` answers False for a folder that cannot be read at the moment, and etils' `stat()`
fails for a file whose user has no name. Either would make a run that has checkpoints begin at zero.
So the functions here answer "not there" only when that is certain, and raise where a path cannot be
read (see `errors`).

Durable means that a loss of power at any later moment does not lose what was written. On a local or
network file system that takes an fsync of the file, and an fsync of each folder in which a name is
new. A bucket knows no fsync: an object is durable when it is closed.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from vit_dist.config.errors import DataError
from vit_dist.paths import expand, is_remote, temporary_name
from vit_dist.storage.errors import only_warn

# Errors of fsync on a folder that are no failure: the file system cannot do it (FUSE, SMB), or the
# folder may be entered but not listed. Nothing better can be done then.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def exists(path: epath.PathLike) -> bool:
    """Whether there is a file or folder; raises OSError or OpError where that cannot be told."""
    if is_remote(path):
        return tf.io.gfile.exists(str(path))
    try:
        os.stat(expand(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def file_size(path: epath.PathLike) -> int:
    """The size of a file in bytes; raises OSError or OpError if it is not there."""
    if is_remote(path):
        return tf.io.gfile.stat(str(path)).length
    return os.stat(expand(path)).st_size


def read_text(path: epath.PathLike) -> str:
    """The text of a file of lines; bytes that are no text become the sign U+FFFD.

    They stand in a line that a fault of the disk has damaged: only that line is lost.
    """
    return expand(path).read_bytes().decode(errors="replace")


def read_json(path: epath.PathLike, *, remedy: str) -> Any:
    """What a JSON file that we wrote holds.

    Raises:
      DataError: it is torn or damaged; says what to do by `remedy`, such as "remove it".
    """
    try:
        return json.loads(expand(path).read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {remedy}") from None


def read_arrays(path: epath.PathLike, *, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that we wrote, by name.

    Raises:
      DataError: it is torn or damaged; says what to do by `remedy`, such as "remove it".
    """
    data = io.BytesIO(expand(path).read_bytes())
    try:
        with np.load(data) as stored:
            return {name: stored[name] for name in stored.files}
    # What numpy and zipfile make of damage; RuntimeError where a bit says "encrypted".
    except (ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        # numpy takes whatever it does not know for a pickle, and tells how to open one.
        text = "no .npz file" if "pickle" in str(error) else error
        raise DataError(f"{path} is damaged ({text}): {remedy}") from error


def list_folder(path: epath.PathLike) -> list[epath.Path]:
    """The paths in a folder, sorted by name; none if the folder does not exist."""
    path = expand(path)
    try:
        names = _list_remote(path) if is_remote(path) else os.listdir(path)
    except FileNotFoundError:
        return []
    # A bucket's listing ends the names of folders with a slash, and may hold the folder itself.
    return [path / name for name in sorted({n.rstrip("/") for n in names} - {""})]


def _list_remote(path: epath.Path) -> list[str]:
    try:
        return tf.io.gfile.listdir(str(path))
    except tf.errors.NotFoundError:
        # TensorFlow also raises NotFound where the bucket does not answer at all: it asks whether
        # the folder exists and takes any failure for a no. exists() tells, or raises the failure.
        if not exists(path):
            return []
    # The folder exists, so the first answer was a failure of the bucket: ask once more.
    try:
        return tf.io.gfile.listdir(str(path))
    except tf.errors.NotFoundError as error:
        text = f"{path} is there and cannot be listed"
        raise tf.errors.UnavailableError(None, None, text) from error


def make_folder(path: epath.PathLike) -> None:
    """Makes a folder and the missing folders above it, durably."""
    path = expand(path)
    if is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    # From the innermost outwards, to know which folders get a new name and need an fsync.
    missing = []
    while not exists(path):
        missing.append(path)
        path = path.parent
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    for folder in reversed(missing):
        # exist_ok: another host may make the same folder at this moment.
        os.makedirs(folder, exist_ok=True)
        sync_folder(folder.parent)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """An OSError in it that names no file is given this path: a write that fails tells none."""
    try:
        yield
    except OSError as error:
        # Without a number, the text would become "[Errno None] None: path".
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def write_file(path: epath.PathLike, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file from its parts in turn. Its bytes are durable then, its name is not yet.

    Call `sync_folder` on the file's folder when all files there are written.
    """
    if is_remote(path):
        with epath.Path(path).open("wb") as remote:
            for part in parts:
                remote.write(bytes(part))  # GFile takes no memoryview
        return
    # Unbuffered: a buffer would be written at close, and fail a second time on a full disk.
    with naming(path), open(expand(path), "wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part).cast("B")
            # An unbuffered write may take only a part of the bytes: Linux takes 2 GB at most.
            while len(rest):
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync_folder(path: epath.PathLike) -> None:
    """Makes the names in a folder durable: of files made, renamed or removed there."""
    if is_remote(path):
        return
    # A folder is opened to be read; one that may only be written and entered cannot be synced.
    try:
        descriptor = os.open(expand(path), os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file durably and so that it is never seen half written: under another name first."""
    temporary = temporary_name(path)
    try:
        write_file(temporary, [data])
        temporary.replace(path)
    except BaseException:
        # Also on Ctrl-C. On a full disk half a file takes up the room that a later attempt needs.
        with only_warn(f"removing {temporary}"):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_output(path: epath.PathLike, data: bytes) -> epath.Path:
    """Writes a file that a user has named, whole, and makes its folder; returns its path."""
    file = expand(path)
    make_folder(file.parent)
    write_whole(file, data)
    return file


def remove_tree(path: epath.PathLike) -> None:
    """Removes a folder with all that is in it; does nothing if there is no such folder."""
    path = expand(path)
    try:
        if is_remote(path):
            path.rmtree()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        return
