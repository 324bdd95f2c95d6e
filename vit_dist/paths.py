"""Names of paths: local ones, and those in buckets, such as gs://bucket/path."""

import os
import platform

from etils import epath

from vit_dist.config.errors import ConfigError


def is_remote(path: epath.PathLike) -> bool:
    """Whether only TensorFlow's file systems read it, such as gs://bucket/path."""
    return "://" in str(path)


def expand(path: epath.PathLike, *, allowed: str = "local paths and gs://") -> epath.Path:
    """The path as all code uses it: "~" and "~user" of a local one stand for the home folder.

    Args:
      path: as a user gave it.
      allowed: what a message names as the kinds of paths that work.

    Raises:
      ConfigError: it begins with a scheme that nothing here reads.
    """
    try:
        path = epath.Path(path)
    except KeyError:
        raise ConfigError(f"{path}: {allowed} work; copy the files to one of them") from None
    return path if is_remote(path) else path.expanduser()


def local_path(path: epath.PathLike, key: str) -> epath.Path:
    """The path, whose file a library opens by itself.

    Raises:
      ConfigError: it is one that only TensorFlow reads, such as gs://bucket/path.
    """
    if is_remote(path):
        raise ConfigError(f"{key} must be a local path, got {path}: copy the files, or mount them")
    return expand(path)


def temporary_name(path: epath.Path) -> epath.Path:
    """A name beside `path` that no other process of any host uses, to write and rename."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
