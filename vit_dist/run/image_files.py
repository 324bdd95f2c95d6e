"""The image files that a command is given: files, patterns and folders."""

import glob
import os
from collections.abc import Sequence
from typing import NoReturn

import tensorflow as tf
from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.data.sources.image_files import OTHERS, count_kinds, is_image, kind_of_name
from vit_dist.paths import expand, is_remote
from vit_dist.storage.errors import Kind, cause, kind_of


def expand_images(images: Sequence[str], *, recursive: bool = False) -> list[str]:
    """The image files that files, patterns and folders name, each file once.

    A text that names nothing is tried as several with commas between them.

    Args:
      images: files, patterns or folders, local or gs://.
      recursive: whether a folder stands for the images in the folders below it, too.

    Raises:
      DataError: a text that names no file.
    """
    paths: list[str] = []
    for text in images:
        # First as a whole: the name of a file may hold a comma.
        found = _files_of(text, recursive)
        for part in text.split(",") if not found else ():
            found += _files_of(part, recursive) or _none_at(part)
        paths += found
    # Each once, in order: callers keep images by their paths.
    return list(dict.fromkeys(paths))


class _Remote:
    """Files in a bucket, by TensorFlow."""

    isdir, exists, listdir = tf.io.gfile.isdir, tf.io.gfile.exists, tf.io.gfile.listdir
    walk, glob = tf.io.gfile.walk, tf.io.gfile.glob


class _Local:
    """Files on a disk, by Python: TensorFlow fails at a name that is not UTF-8."""

    isdir, exists, listdir = os.path.isdir, os.path.exists, os.listdir
    walk, glob = os.walk, glob.glob


def _files_of(text: str, recursive: bool) -> list[str]:
    path = str(expand(text))
    system = _Remote if is_remote(path) else _Local
    if system.isdir(path):
        # Each folder's images in the order of their names, then those of the folders in it.
        folders = system.walk(path) if recursive else [(path, (), system.listdir(path))]
        # Hidden files are no images, whatever they are called: macOS keeps a "._x.jpg" for "x.jpg".
        shown_names = [
            (f"{folder.rstrip('/')}/{name}", name)
            for folder, _, names in sorted(folders, key=lambda entry: entry[0])
            for name in sorted(names)
            if not name.startswith(".")
        ]
        _tell_ignored(path, [name for _, name in shown_names if not is_image(name)])
        return [file for file, name in shown_names if is_image(name)]
    # As a name first, then as a pattern: brackets in a file's name would be a pattern, too.
    return [path] if system.exists(path) else sorted(system.glob(path))


def _tell_ignored(folder: str, names: Sequence[str]) -> None:
    """Warns of photos in a folder whose kind is not read, such as HEIC."""
    photos = [name for name in names if kind_of_name(name) in OTHERS]
    if photos:
        logging.warning(
            "%s: ignored %d files that TensorFlow does not decode: %s (e.g. %r). Convert them to "
            "JPEG or PNG",
            shown(folder),
            len(photos),
            count_kinds(photos),
            shown(photos[0]),
        )


def _none_at(text: str) -> NoReturn:
    raise DataError(
        f"there are no images at {text!r}: give files, a pattern in quotes such as "
        "'photos/*.jpg', or a folder with images in it"
    )


def read(path: str) -> tf.Tensor:
    """The bytes of a file, () string, whatever its name; raises OpError where it cannot be read."""
    return tf.io.read_file(os.fsencode(path))


def try_read(path: str) -> tuple[tf.Tensor | None, str]:
    """The bytes of a file, () string, and ""; or None, and why this file cannot be read.

    Storage that fails altogether is not a file's problem, and is raised.
    """
    try:
        return read(path), ""
    except tf.errors.OpError as error:
        # Gone since it was listed, of another user, or a folder.
        if kind_of(error) not in (Kind.MISSING, Kind.REFUSED, Kind.MISNAMED):
            raise
        return None, unreadable(path, cause(error))


def unreadable(path: str, reason: str) -> str:
    """The problem of an image file, for a person."""
    return f"image file {shown(path)!r} cannot be read ({reason})"


def shown(path: str) -> str:
    """A path as a terminal can print it, also where the name is not UTF-8."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
