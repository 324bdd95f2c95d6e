"""Whoever reports it, Python, TensorFlow or a bucket: what is wrong is told; the remedy fits."""

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.config.errors import ConfigError, DataError, StorageError
from vit_dist.storage import errors
from vit_dist.storage.errors import Kind, cause, check_bucket, explain, kind_of, path_of, retry


def raised_by(function):
    with pytest.raises(Exception) as error:
        function()
    return error.value


def os_error(number):
    return OSError(number, os.strerror(number), "/data/x")


def in_pipeline(raising):
    def fail(_):
        raise raising

    return tf.data.Dataset.range(1).map(lambda i: tf.numpy_function(fail, [i], tf.int64))


# What the system and TensorFlow really raise: (how to provoke it, kind, path)
REAL = {
    "Python, missing": (lambda tmp: open(tmp / "none"), Kind.MISSING, "none"),  # noqa: SIM115
    "Python, full": (lambda tmp: os.write(os.open("/dev/full", 1), b"x"), Kind.FULL, None),
    "Python, EIO": (lambda tmp: os.read(os.open("/proc/self/mem", 0), 1), Kind.FAILING, None),
    "TF, missing": (lambda tmp: tf.io.read_file(str(tmp / "none")), Kind.MISSING, "none"),
    "TF, no folder": (lambda tmp: tf.io.gfile.listdir(str(tmp / "none")), Kind.MISSING, None),
    "TF, a folder": (lambda tmp: tf.io.read_file(str(tmp)), Kind.MISNAMED, ""),
    "TF, full": (lambda tmp: tf.io.write_file("/dev/full", b"x"), Kind.FULL, "/dev/full"),
    "TF, EIO": (lambda tmp: tf.io.read_file("/proc/self/mem"), Kind.FAILING, "/proc/self/mem"),
    "TF, scheme": (lambda tmp: tf.io.gfile.exists("s3://b/x"), Kind.MISNAMED, None),
    "a pipeline, EIO": (lambda tmp: list(in_pipeline(os_error(5))), Kind.FAILING, "/data/x"),
    "a pipeline, refused": (lambda tmp: list(in_pipeline(os_error(13))), Kind.REFUSED, "/data/x"),
}


@pytest.mark.parametrize(("provoke", "kind", "path"), REAL.values(), ids=REAL)
def test_what_is_really_raised(tmp_path, provoke, kind, path):
    error = raised_by(lambda: provoke(tmp_path))
    assert kind_of(error) is kind
    if path is not None:
        assert path_of(error) == (path if path.startswith("/") else str(tmp_path / path))
    explained = explain(error)
    assert "\n" not in str(explained) and "gcloud" not in str(explained)
    assert "{{" not in str(explained) and "[Op:" not in str(explained)


@pytest.mark.parametrize(
    ("number", "kind", "recovers"),
    [
        (errno.EIO, Kind.FAILING, True),
        (errno.ESTALE, Kind.FAILING, True),
        (errno.ETIMEDOUT, Kind.FAILING, True),
        (errno.EACCES, Kind.REFUSED, True),
        (errno.EPERM, Kind.REFUSED, True),
        (errno.ENOSPC, Kind.FULL, False),
        (errno.EDQUOT, Kind.FULL, False),
        (errno.EFBIG, Kind.FULL, False),
        (errno.EROFS, Kind.READ_ONLY, False),
        (errno.EMFILE, Kind.TOO_MANY_FILES, False),
        (errno.ENOENT, Kind.MISSING, False),
        (errno.ENOTDIR, Kind.MISNAMED, False),
        (errno.ENAMETOOLONG, Kind.MISNAMED, False),
        (errno.ENOMEM, Kind.NO_MEMORY, False),
        (errno.EXDEV, Kind.OTHER, False),
    ],
)
def test_every_number(number, kind, recovers):
    """As Python raises it, and as TensorFlow puts it into a message, whatever code it takes."""
    words = os.strerror(number)
    for error in (
        os_error(number),
        tf.errors.UnknownError(None, None, f"{{{{node ReadFile}}}} /data/x; {words} [Op:ReadFile]"),
        tf.errors.UnknownError(None, None, f"OSError: [Errno {number}] {words}: '/data/x'\nTrace"),
    ):
        assert kind_of(error) is kind and errors.may_recover(error) is recovers
        assert cause(error) == words and path_of(error) == "/data/x"
        explained = explain(error)
        assert str(explained).startswith(f"/data/x: {words}. ")
        mistake = kind in (Kind.MISSING, Kind.MISNAMED)
        assert type(explained) is (ConfigError if mistake else StorageError)
        assert explained.exit_code == (2 if mistake else 1)


def test_what_reads_the_output_is_no_storage():
    """python -m vit_dist.predict ... | head"""
    assert kind_of(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))) is None


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (tf.errors.UnavailableError, Kind.FAILING, "does not answer for now"),
        (tf.errors.AbortedError, Kind.FAILING, "does not answer for now"),
        (tf.errors.PermissionDeniedError, Kind.REFUSED, "gcloud auth application-default login"),
        (tf.errors.UnauthenticatedError, Kind.REFUSED, "gcloud auth application-default login"),
        (tf.errors.NotFoundError, Kind.MISSING, "check the name of the bucket"),
        (tf.errors.DataLossError, Kind.DAMAGED, "copy or make the file again"),
    ],
)
def test_every_code_of_a_bucket(error, kind, words):
    error = error(None, None, "HTTP response code 499\n  when reading gs://bucket/x")
    assert kind_of(error) is kind and path_of(error) == "gs://bucket/x"
    explained = explain(error, what="could not read the index", then="and run again")
    assert str(explained).startswith("could not read the index: HTTP response code 499 when")
    assert words.lower() in str(explained).lower() and str(explained).endswith("and run again")
    assert isinstance(explained, DataError) == (kind is Kind.DAMAGED)


COLLECTIVE = (
    "Collective ops is aborted by: failed to connect to all addresses; last error: UNKNOWN: "
    "ipv4:127.0.0.1:2222: Failed to connect to remote host: Connection refused"
)


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError(None, None, COLLECTIVE),  # another host is lost
        tf.errors.InvalidArgumentError(None, None, "Input is empty. [[{{node DecodeJpeg}}]]"),
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[9]"),
        tf.errors.OutOfRangeError(None, None, "End of sequence"),
        ValueError("/x; No such file or directory"),
        KeyError("model/kernel"),
        TimeoutError("worker 1 waited in vain"),
        StorageError("explained already"),
        ConfigError("explained already"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_about_something_else(error):
    assert kind_of(error) is None and explain(error) is None
    assert not errors.may_recover(error)


def test_a_user_without_a_name():
    """What etils.epath raises for the files of one."""
    error = KeyError("getpwuid(): uid not found: 54321")
    assert kind_of(error) is Kind.OTHER
    assert "uid not found: 54321" in str(explain(error, place="/data"))


@pytest.mark.parametrize(
    ("number", "local", "remote"),
    [
        (errno.ENOSPC, "make room on that disk", "gcloud"),
        (errno.EACCES, "user id", "gcloud"),
        (errno.EIO, "dmesg", "does not answer"),
    ],
)
def test_the_remedy_fits_the_place(number, local, remote):
    error = OSError(number, os.strerror(number))
    assert local in str(explain(error, place="/data")).replace("Make", "make").replace("Let", "let")
    assert "gcloud" not in str(explain(error, place="/data"))
    assert remote in str(explain(error, place="gs://bucket/x"))


def test_the_note_comes_before_the_remedy():
    text = str(explain(os_error(errno.ENOSPC), what="could not save", note="It is safe"))
    assert text.startswith("could not save: No space left on device. It is safe; make room on")


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    return waited


def failing(failures):
    failures = list(failures)

    def function():
        if failures:
            raise failures.pop(0)
        return "read"

    return function


def test_retry(waits, caplog):
    assert (
        retry("reading /data/x", failing([os_error(errno.EIO), os_error(errno.EACCES)])) == "read"
    )
    assert waits == [1.0, 2.0]
    assert (
        "reading /data/x failed (Input/output error); trying again in 1 s (1 of 4)" in caplog.text
    )


def test_retry_gives_up(waits):
    error = raised_by(lambda: retry("x", failing([os_error(errno.EIO)] * 9)))
    assert error.errno == errno.EIO and waits == list(errors.WAITS)


@pytest.mark.parametrize("error", [os_error(errno.ENOSPC), os_error(errno.ENOENT), ValueError("x")])
def test_retry_does_not_repeat_what_cannot_recover(waits, error):
    assert raised_by(lambda: retry("x", failing([error]))) is error
    assert waits == []


def test_retry_does_not_repeat_what_was_tried_for_long(waits, monkeypatch):
    """TensorFlow tries for minutes itself before it raises a bucket's 503."""
    now = iter(np.arange(0, 1e4, errors.PATIENCE + 1))
    monkeypatch.setattr(errors.time, "monotonic", lambda: next(now))
    raised_by(lambda: retry("x", failing([os_error(errno.EIO)])))
    assert waits == []


def test_clean_up_only_warns(caplog):
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            with errors.only_warn("removing /data/x"):
                raise os_error(errno.EIO)
    assert "removing /data/x failed: Input/output error" in caplog.text
    with pytest.raises(TypeError), errors.only_warn("x"):
        raise TypeError  # a fault of ours


def test_local_paths_have_no_bucket(tmp_path):
    check_bucket(str(tmp_path / "none"), "--workdir")


def test_a_scheme_that_nothing_reads():
    with pytest.raises(ConfigError, match=r"--workdir=s3://b/x .*local paths and gs:// work"):
        check_bucket("s3://b/x", "--workdir")
