"""Files and folders, local or in a bucket: asked about strictly, written to stay.

`Path.exists()` answers False for a folder that cannot be read at the moment, and etils' `stat()`
fails for a file whose user has no name. Both would make a run that has checkpoints begin at zero.
The functions here tell "not there" from "cannot be read": only the former is an answer, the latter
is raised (see `errors`).

Durable means: a loss of power at any later moment leaves it. On a local or network file system that
takes an fsync of the file and one of each folder that got a new name in it. A bucket has neither:
an object is there when it is closed.
"""

import errno
import os
import shutil
from collections.abc import Iterable

import tensorflow as tf
from etils import epath

from vit_dist.paths import expand, is_remote, temporary_name
from vit_dist.storage.errors import only_warn

# What fsync says of a folder where the file system cannot do that (FUSE, SMB), or of one that may
# be entered but not listed. Nothing is wrong then, and nothing better can be done.
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
    """Bytes of a file."""
    if is_remote(path):
        return tf.io.gfile.stat(str(path)).length
    return os.stat(expand(path)).st_size


def list_folder(path: epath.PathLike) -> list[epath.Path]:
    """What is in a folder, sorted by name; nothing where the folder does not exist."""
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
        # TensorFlow says so too where the bucket does not answer at all: it asks whether there is
        # such a folder, and takes any failure for a no. exists() tells, or raises the failure.
        if not exists(path):
            return []
    try:
        return tf.io.gfile.listdir(str(path))
    except tf.errors.NotFoundError as error:
        text = f"{path} is there and cannot be listed"
        raise tf.errors.UnavailableError(None, None, text) from error


def make_folder(path: epath.PathLike) -> None:
    """Makes a folder and those above it, where they are missing; durable."""
    path = expand(path)
    if is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    missing = []
    while not exists(path):
        missing.append(path)
        path = path.parent
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)  # another host may have been faster
        sync_folder(folder.parent)


def write_file(path: epath.PathLike, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file from its parts in turn; its bytes are durable, its name is not yet.

    Call `sync_folder` on its folder when all files there are written.
    """
    if is_remote(path):
        with epath.Path(path).open("wb") as remote:
            for part in parts:
                remote.write(bytes(part))  # GFile takes no memoryview
        return
    # Unbuffered: a buffer would be written at close, and fail a second time on a full disk.
    with open(expand(path), "wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part).cast("B")
            while len(rest):
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync_folder(path: epath.PathLike) -> None:
    """Makes the names in a folder durable: of files made, renamed or removed there."""
    if is_remote(path):
        return
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
    """Writes a file so that it is never seen half written, by way of another name; durable."""
    temporary = temporary_name(path)
    try:
        write_file(temporary, [data])
        temporary.replace(path)
    except BaseException:
        # On a full disk the half would take up the room that a later attempt needs.
        with only_warn(f"removing {temporary}"):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_tree(path: epath.PathLike) -> None:
    """Removes a folder with all in it; one that is not there is fine."""
    path = expand(path)
    try:
        if is_remote(path):
            path.rmtree()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        return
