"""Names of paths, local or in a bucket (gs://bucket/path); nothing here touches a file."""

import os
import platform

from etils import epath

from vit_dist.config.errors import ConfigError


def is_remote(path: epath.PathLike) -> bool:
    """Whether only TensorFlow's file systems can read the path, such as gs://bucket/path."""
    return "://" in str(path)


def expand(path: epath.PathLike, *, allowed: str = "local paths and gs://") -> epath.Path:
    """The path as all code uses it: "~" and "~user" of a local one stand for the home folder.

    Args:
      path: as a user gave it.
      allowed: what a message names as the kinds of paths that work.

    Raises:
      ConfigError: it begins with a scheme that nothing here reads.
    """
    # etils raises KeyError for a scheme that it has no backend for.
    try:
        path = epath.Path(path)
    except KeyError:
        raise ConfigError(f"{path}: {allowed} work; copy the files to one of them") from None
    return path if is_remote(path) else path.expanduser()


def local_path(path: epath.PathLike, key: str) -> epath.Path:
    """The expanded path of a file that another library will open, which must be local.

    Args:
      path: to check.
      key: the flag or config key that gave it, for the message.

    Raises:
      ConfigError: only TensorFlow can read it, such as gs://bucket/path.
    """
    if is_remote(path):
        raise ConfigError(f"{key} must be a local path, got {path}: copy the files, or mount them")
    return expand(path)


def temporary_name(path: epath.Path) -> epath.Path:
    """A name beside `path` that no process of any other host uses: write there, then rename."""
    # The number of a process repeats from host to host, so the host's name is part of it.
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
