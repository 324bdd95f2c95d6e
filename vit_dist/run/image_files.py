"""The image files that a command is given: files, patterns and folders."""

from collections.abc import Sequence
from typing import NoReturn

import tensorflow as tf

from vit_dist.config.errors import DataError
from vit_dist.data.sources.folder import EXTENSIONS
from vit_dist.paths import expand


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


def _files_of(text: str, recursive: bool) -> list[str]:
    path = str(expand(text))
    if tf.io.gfile.isdir(path):
        # Each folder's images in the order of their names, then those of the folders in it.
        folders = tf.io.gfile.walk(path) if recursive else [(path, (), tf.io.gfile.listdir(path))]
        return [
            f"{folder.rstrip('/')}/{name}"
            for folder, _, names in sorted(folders, key=lambda entry: entry[0])
            for name in sorted(names)
            if name.lower().endswith(tuple(EXTENSIONS))
        ]
    # As a name first, then as a pattern: brackets in a file's name would be a pattern, too.
    return [path] if tf.io.gfile.exists(path) else sorted(tf.io.gfile.glob(path))


def _none_at(text: str) -> NoReturn:
    raise DataError(
        f"there are no images at {text!r}: give files, a pattern in quotes such as "
        "'photos/*.jpg', or a folder with images in it"
    )


def shown(path: str) -> str:
    """A path as a terminal can print it, also where the name is not UTF-8."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
