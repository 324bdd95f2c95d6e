"""Paths: local ones, and those in buckets, such as gs://bucket/path."""

import os
import platform
import re

import tensorflow as tf
from etils import epath

from vit_dist.config.errors import ConfigError


def is_remote(path: epath.PathLike) -> bool:
    """Whether only TensorFlow's file systems read it, such as gs://bucket/path."""
    return "://" in str(path)


def expand(path: epath.PathLike) -> epath.Path:
    """The path as all code uses it: "~" and "~user" of a local one stand for the home folder.

    Raises:
      ConfigError: it begins with a scheme that nothing here reads.
    """
    try:
        path = epath.Path(path)
    except KeyError:
        raise ConfigError(f"{path}: local paths and gs:// work; copy the files to either") from None
    return path if is_remote(path) else path.expanduser()


def local_path(path: epath.PathLike, key: str) -> epath.Path:
    """Returns the path, whose file a library opens by itself.

    Raises:
      ValueError: It is one that only TensorFlow reads, such as gs://bucket/path.
    """
    if is_remote(path):
        raise ValueError(f"{key} must be a local path, got {path}: copy the files, or mount them")
    return epath.Path(path).expanduser()


def check_bucket(path: epath.PathLike, key: str) -> None:
    """Looks for the bucket of a remote path; to make a folder in one that is not there never ends.

    Raises:
      ValueError: There is none, or it cannot be read.
    """
    bucket = re.match(r"\w+://[^/]*", str(path))
    if not bucket:
        return
    try:
        found = tf.io.gfile.exists(str(path)) or tf.io.gfile.exists(bucket[0])
    except tf.errors.OpError as error:
        raise ValueError(f"{key}={path} cannot be reached: {bucket_message(error)}") from error
    if not found:
        raise ValueError(
            f"{key}={path}: there is no bucket {bucket[0]}; correct its name, or make it, near the "
            "machines that train: gcloud storage buckets create NAME --location=REGION"
        )


def bucket_message(error: tf.errors.OpError) -> str:
    """What a file system of TensorFlow's says, and what to do."""
    message = " ".join(error.message.split())
    return (
        f"{message}. Check the name, the network, and the credentials (gcloud auth "
        "application-default login; on a TPU VM, the roles of its service account: Storage Object "
        "Admin, and Storage Legacy Bucket Reader, to see whether there is a bucket)"
    )


def temporary_name(path: epath.Path) -> epath.Path:
    """Returns a name beside `path` that no other process of any host uses, to write and rename."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that it is never seen half written."""
    temporary = temporary_name(path)
    temporary.write_bytes(data)
    temporary.replace(path)
