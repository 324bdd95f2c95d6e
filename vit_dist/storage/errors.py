"""Errors of file systems, local or remote, in one vocabulary.

A full disk is an OSError from Python, a ResourceExhaustedError from TensorFlow's file functions, an
UnknownError from a tf.data pipeline, and an HTTP code from a bucket. `kind_of` tells what is wrong,
whichever library reported it; `explain` tells it to a person, with a remedy that fits the place;
`retry` tries again what may recover. Failing storage is neither the user's mistake nor damaged
data, so errors of storage are kept apart from both.
"""

import contextlib
import enum
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import tensorflow as tf
from absl import logging

from vit_dist.config.errors import ConfigError, DataError, StorageError, UserError
from vit_dist.paths import is_remote

T = TypeVar("T")

# What file functions raise. KeyError: the local stat() of etils.epath looks up the names of a
# file's user and group, and containers have files of users without a name.
FAILURES = (OSError, tf.errors.OpError, KeyError)

# Seconds between the attempts of `retry`. 15 s in all bridge a server that fails over. To wait for
# minutes would only keep accelerators idle, as the run can be started again and resumes.
WAITS = (1.0, 2.0, 4.0, 8.0)
# TensorFlow's own gs:// file system tries 10 times, for 3 minutes, before it raises at all. What
# took longer than this many seconds is not tried again.
PATIENCE = 60.0


class Kind(enum.Enum):
    """What is wrong, whichever file system or library reported it."""

    MISSING = enum.auto()  # nothing of this name
    MISNAMED = enum.auto()  # a file where a folder is needed, a name too long, no such scheme
    REFUSED = enum.auto()  # no permission, no credentials
    READ_ONLY = enum.auto()  # mounted so
    FULL = enum.auto()  # the disk, the quota, or the largest size that a file may have
    TOO_MANY_FILES = enum.auto()  # open in this process, or on this machine
    FAILING = enum.auto()  # device, network or server; it may recover
    DAMAGED = enum.auto()  # TensorFlow found a wrong checksum
    NO_MEMORY = enum.auto()
    OTHER = enum.auto()


# Numbers that are in no row are Kind.OTHER.
_BY_ERRNO = {
    errno.ENOENT: Kind.MISSING,
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ),
        Kind.MISNAMED,
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), Kind.REFUSED),
    errno.EROFS: Kind.READ_ONLY,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), Kind.FULL),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), Kind.TOO_MANY_FILES),
    **dict.fromkeys(
        (
            errno.EIO,
            errno.ENXIO,
            errno.ENODEV,
            errno.ESTALE,  # NFS: the server no longer knows the file's handle
            errno.EREMOTEIO,
            errno.ETIMEDOUT,
            errno.EAGAIN,
            errno.EINTR,
            errno.EBUSY,
            errno.ENOLCK,
            errno.ENOLINK,
            errno.ENOTCONN,  # FUSE: the process behind the mount is gone
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.ECONNABORTED,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
            errno.ENETDOWN,
            errno.ENETUNREACH,
        ),
        Kind.FAILING,
    ),
    errno.ENOMEM: Kind.NO_MEMORY,
}

# About sockets, where who opens one knows what they mean, and about what reads the output.
_OF_SOCKETS = {
    errno.EPIPE,
    errno.EADDRINUSE,
    errno.EADDRNOTAVAIL,
    errno.EAFNOSUPPORT,
    errno.EDESTADDRREQ,
}

# Codes of TensorFlow's errors, for messages that tell no number of the system's.
_BY_CODE = {
    tf.errors.NOT_FOUND: Kind.MISSING,
    tf.errors.ALREADY_EXISTS: Kind.MISNAMED,
    tf.errors.UNIMPLEMENTED: Kind.MISNAMED,  # a scheme that TensorFlow does not read
    tf.errors.PERMISSION_DENIED: Kind.REFUSED,
    tf.errors.UNAUTHENTICATED: Kind.REFUSED,
    tf.errors.UNAVAILABLE: Kind.FAILING,
    tf.errors.DEADLINE_EXCEEDED: Kind.FAILING,
    tf.errors.ABORTED: Kind.FAILING,
    tf.errors.INTERNAL: Kind.FAILING,
    tf.errors.UNKNOWN: Kind.FAILING,
    tf.errors.RESOURCE_EXHAUSTED: Kind.FAILING,  # HTTP 429: too many requests
    tf.errors.DATA_LOSS: Kind.DAMAGED,
}

# TensorFlow makes text of a failed system call: "PATH; No space left on device". The words are
# turned back into the number. gRPC, whose errors tell of a lost host, puts a colon in place of the
# semicolon, so its errors are not taken for the storage's.
_ERRNO_OF_WORDS = {os.strerror(number): number for number in errno.errorcode}
_SYSTEM_CALL = re.compile(
    r"(?P<path>[^;\n]*); (?P<words>"
    # The longest words first: of alternatives a regex takes the first that fits.
    + "|".join(re.escape(words) for words in sorted(_ERRNO_OF_WORDS, key=len, reverse=True))
    + ")"
)
# An OSError of Python as text, in the message of a pipeline that called Python.
_PYTHON = re.compile(r"\[Errno (?P<number>\d+)\] [^:\n]*(: '(?P<path>[^'\n]*)')?")
# Words by which an OpError is known to come from a bucket or an unknown scheme.
_BUCKET = re.compile(r"gs://|HTTP response code|libcurl|retry attempts failed|File system scheme")
# Names of a graph's nodes, which mean nothing to a user: {{node IteratorGetNext}}, [[...]], [Op:...
_NODE = re.compile(r"\{\{[^}]*\}\}\s*|\s*\[Op:.*|\s*\[\[.*")

# Where in Python a node of a graph was made: lines before and after the reason of a failure.
_TRACE = re.compile(
    r"^\s*(?:Graph execution error:|(?:Detected|Error) at node.*|Stack trace for op definition:.*|"
    r'File ".*", line \d+.*|<stack traces unavailable>)\s*$',
    re.M,
)


def kind_of(error: BaseException) -> Kind | None:
    """What is wrong with the storage; None if the error is about something else."""
    # Explained already; StorageError is an OSError and would be explained a second time.
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError):
        return _kind_of_os_error(error)
    # "getpwuid(): uid not found: 1000"; any other KeyError is not about files.
    if isinstance(error, KeyError):
        return Kind.OTHER if "id not found" in str(error) else None
    if not isinstance(error, tf.errors.OpError):
        return None
    number = _errno_of(error)
    if number is not None:
        return _BY_ERRNO.get(number, Kind.OTHER)
    # The same codes also come from kernels and from lost hosts, so more than the code is needed.
    if _BUCKET.search(error.message or "") or _raised_by_file_functions(error):
        return _BY_CODE.get(error.error_code, Kind.OTHER)
    return None


def _kind_of_os_error(error: OSError) -> Kind | None:
    if error.errno in _OF_SOCKETS:
        return None
    if error.errno is not None:
        return _BY_ERRNO.get(error.errno, Kind.OTHER)
    # etils.epath turns some errors of buckets into classes of OSError with a text and no number.
    for numbered, kind in (
        (FileNotFoundError, Kind.MISSING),
        ((NotADirectoryError, IsADirectoryError, FileExistsError), Kind.MISNAMED),
        (PermissionError, Kind.REFUSED),
    ):
        if isinstance(error, numbered):
            return kind
    # With a message only: raised by sockets or by libraries, not by a file system.
    return None


def _errno_of(error: tf.errors.OpError) -> int | None:
    """The system's error number, read from the message that TensorFlow made of it; None if none."""
    message = error.message or ""
    if found := _SYSTEM_CALL.search(message):
        return _ERRNO_OF_WORDS[found["words"]]
    if found := _PYTHON.search(message):
        return int(found["number"])
    return None


def _raised_by_file_functions(error: BaseException) -> bool:
    """Whether the traceback ends in tf.io.gfile, whose every error is about files."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.endswith("io/file_io.py")


def is_failing(error: BaseException) -> bool:
    """Whether the storage did not give what it holds: nothing is missing, misnamed or damaged."""
    return kind_of(error) not in (None, Kind.MISSING, Kind.MISNAMED, Kind.DAMAGED)


def may_recover(error: BaseException) -> bool:
    """Whether a later attempt may succeed. Permissions too: tickets lapse and are renewed."""
    return kind_of(error) in (Kind.FAILING, Kind.REFUSED)


def retry(what: str, function: Callable[[], T], *, refused: bool = True) -> T:
    """Calls `function`, again after each of WAITS while the storage may recover.

    Args:
      what: is being done, for the log: "reading /path".
      function: takes no argument, and can be called again.
      refused: whether to try again when permission is missing. True where access worked before, as
        tickets and tokens lapse and are renewed; false for a first access, where the path is wrong.

    Raises:
      Whatever the last attempt raised.
    """
    begun = time.monotonic()
    for number, wait in enumerate(WAITS, 1):
        try:
            return function()
        except FAILURES as error:
            hopeless = not may_recover(error) or (kind_of(error) is Kind.REFUSED and not refused)
            if hopeless or time.monotonic() - begun > PATIENCE:
                raise
            logging.warning(
                "%s failed (%s); trying again in %g s (%d of %d)",
                what,
                cause(error),
                wait,
                number,
                len(WAITS),
            )
        # Outside of `except`: a Ctrl-C in the wait would else show the storage's error, too.
        time.sleep(wait)
    return function()


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Logs a failure of the storage within the `with` instead of raising it.

    For clean-up: what fails while an earlier error is on its way must not take that error's place.
    """
    try:
        yield
    except (*FAILURES, UserError) as error:
        if kind_of(error) is None and not isinstance(error, UserError):
            raise
        logging.warning("%s failed: %s", what, cause(error))


def cause(error: BaseException) -> str:
    """What the file system said, in one line without names of graph nodes."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        return f"a file's owner has no name on this machine ({error.args[0]})"
    text = (error.message if isinstance(error, tf.errors.OpError) else str(error)) or ""
    # The system's words alone; the path is told by path_of.
    if found := _SYSTEM_CALL.search(text) or _PYTHON.search(text):
        number = found.groupdict().get("number")
        return os.strerror(int(number)) if number else found["words"]
    return " ".join(_NODE.sub("", _TRACE.sub("", text) or type(error).__name__).split())[:400]


def path_of(error: BaseException) -> str | None:
    """The path of the file that the error is about; None if the error does not tell."""
    if isinstance(error, OSError) and error.filename:
        return os.fsdecode(error.filename)
    text = _NODE.sub("", getattr(error, "message", None) or str(error))
    for pattern in (_SYSTEM_CALL, _PYTHON):
        if (found := pattern.search(text)) and found["path"]:
            return found["path"].strip()
    found = re.search(r"gs://[^\s'\"),;]+", text)
    return found[0] if found else None


def explain(
    error: BaseException, *, what: str = "", place: str = "", note: str = "", then: str = ""
) -> UserError | None:
    """The error to raise in place of a file system's, with a message for a person.

    Args:
      error: what was raised.
      what: what failed, with the path: "could not save step 5 to /path". By default only the path.
      place: path that the remedy is for, if the error tells none.
      note: said before the remedy: "Earlier checkpoints are untouched".
      then: said after the remedy: "and run again to resume".

    Returns:
      StorageError; ConfigError for a path that is not there or of the wrong kind; DataError for
      damage; None where `error` is not about storage. `raise explain(...) or error from error`.
    """
    kind = kind_of(error)
    if kind is None:
        return None
    place = path_of(error) or place or "the storage"
    remedy = _remedy(kind, place)
    text = f"{note}; {remedy}" if note else remedy[0].upper() + remedy[1:]
    message = f"{what or place}: {cause(error)}. {text}" + (f" {then}" if then else "")
    if kind in (Kind.MISSING, Kind.MISNAMED):
        return ConfigError(message)
    if kind is Kind.DAMAGED:
        return DataError(message)
    return StorageError(message)


def _remedy(kind: Kind, place: str) -> str:
    remedies = _REMEDIES_REMOTE if is_remote(place) else _REMEDIES_LOCAL
    user = os.geteuid() if hasattr(os, "geteuid") else "?"
    return remedies.get(kind, "mend the storage").format(place=place, user=user)


_REMEDIES_LOCAL = {
    Kind.MISSING: "check the path",
    Kind.MISNAMED: "check the path: another kind of thing has this name",
    Kind.REFUSED: "let user id {user} read and write there (ls -l; chown, chmod), or use another "
    "folder",
    Kind.READ_ONLY: "mount it for writing, or use another folder",
    Kind.FULL: "make room on that disk (df -h), raise the quota or ulimit -f, or use another disk",
    Kind.TOO_MANY_FILES: "raise the limit of open files (ulimit -n) or use fewer, larger files",
    Kind.FAILING: "the disk or network file system fails: mend it (dmesg names the device)",
    Kind.DAMAGED: "copy or make the file again",
    Kind.NO_MEMORY: "free memory",
}
CREDENTIALS = (
    "check the name, the network, and the credentials (gcloud auth application-default login; on a "
    "TPU VM, the roles of its service account: Storage Object Admin, and Storage Legacy Bucket "
    "Reader, to see whether there is a bucket)"
)
_REMEDIES_REMOTE = {
    Kind.MISSING: "check the name of the bucket and the path in it",
    Kind.MISNAMED: "local paths and gs:// work here; copy the files to either",
    Kind.FAILING: "the bucket does not answer for now: check the network and the service's state",
    Kind.DAMAGED: "copy or make the file again",
    **dict.fromkeys((Kind.REFUSED, Kind.READ_ONLY, Kind.FULL, Kind.OTHER), CREDENTIALS),
}


def check_bucket(path: str, key: str) -> None:
    """Checks that the bucket of a remote path exists and answers.

    TensorFlow's mkdir in a bucket that does not exist never ends, so this comes first.

    Args:
      path: a local path passes without a look.
      key: the flag or config key that gave the path, for messages.

    Raises:
      ConfigError: there is no such bucket, or this user may not see it.
      StorageError: the bucket does not answer.
    """
    bucket = re.match(r"\w+://[^/]*", str(path))
    if not bucket:
        return
    # The path first: a user may be allowed to read in a bucket whose own entry he may not see.
    try:
        found = tf.io.gfile.exists(str(path)) or tf.io.gfile.exists(bucket[0])
    except tf.errors.OpError as error:
        kind = kind_of(error)
        known = ConfigError if kind in (Kind.REFUSED, Kind.MISNAMED) else StorageError
        advice = CREDENTIALS if kind is not Kind.MISNAMED else _REMEDIES_REMOTE[kind]
        raise known(f"{key}={path} cannot be reached: {cause(error)}. {advice}") from error
    if not found:
        raise ConfigError(
            f"{key}={path}: there is no bucket {bucket[0]}; correct its name, or make it, near the "
            "machines that train: gcloud storage buckets create NAME --location=REGION"
        )
