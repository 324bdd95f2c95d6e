"""Keeps TensorFlow's start-up notices off the terminal, and hides nothing else.

TensorFlow's C++ code writes to file descriptor 2 itself, and TF_CPP_MIN_LOG_LEVEL does not stop
what it writes before it has set up its log. So, within `hidden()`, descriptor 2 is a pipe to a
second process, notice_filter.py, which passes every line on at once, except notices.

It is a process because a thread would not do: that would lose the last lines of a crash (a failed
CHECK ends in abort()), and the program would hang once C++ code that holds Python's lock has filled
the pipe. Starting it takes about 20 ms, in which TensorFlow's import, of 5 s, goes on.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LEVEL_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
_PROGRAM = Path(__file__).with_name("notice_filter.py")
_STDERR = 2
# Seconds to wait for the last lines: the filter ends when the pipe's last writer closes it, and a
# child of this process, which has inherited the pipe, may live longer.
_PATIENCE = 5

# Descriptor of a temporary file with the notices so far; each filter appends to it.
_kept: int | None = None


@contextlib.contextmanager
def hidden(*, python_apart: bool = False) -> Iterator[None]:
    """Hides TensorFlow's notices from standard error, until the `with` ends.

    It does nothing in three cases: TF_CPP_MIN_LOG_LEVEL is 0 or 1, which asks for notices; no
    second process can be started; or this is the first process of a container. When that one ends,
    the system kills all others, so the filter could not pass on the last words of a crash.

    Args:
      python_apart: what Python itself writes goes past the filter, unchanged and without delay, so
        that progress bars find a terminal. To be used once in a process: it costs a file descriptor
        that stays open, because log handlers made within the `with` keep writing to it.
    """
    wanted = os.environ.get(LEVEL_VARIABLE) in ("0", "1")
    started = None if wanted or os.getpid() == 1 or sys.stderr is None else _start()
    if started is None:
        yield
        return
    process, pipe, real = started
    # Flushed first: what Python has buffered so far must not go into the pipe.
    before = sys.stderr
    before.flush()
    # From here on descriptor 2 is the pipe's end, for C++ code and for children too.
    os.dup2(pipe, _STDERR)
    os.close(pipe)
    if python_apart and _writes_to_stderr(before):
        sys.stderr = _stream_to(real, like=before)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        # This closes our end of the pipe: the filter ends once it has passed on all.
        os.dup2(real, _STDERR)
        if not python_apart:
            os.close(real)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)


def notices() -> str:
    """What was hidden in this process so far."""
    if _kept is None:
        return ""
    # Not by read(): the filters write at the file's position, and reading would move it.
    return os.pread(_kept, os.fstat(_kept).st_size, 0).decode(errors="replace")


def _start() -> tuple[subprocess.Popen, int, int] | None:
    """(filter, the pipe's end to write to, the real standard error); None if it cannot start."""
    global _kept
    with contextlib.ExitStack() as on_failure:
        try:
            if _kept is None:
                # The file has no name; a second descriptor keeps it when the `with` closes it.
                with tempfile.TemporaryFile(prefix="vit_dist-") as file:
                    _kept = os.dup(file.fileno())
            real = os.dup(_STDERR)
            on_failure.callback(os.close, real)
            read, write = os.pipe()
            on_failure.callback(os.close, write)
            try:
                # -I, -S: without PYTHON* variables and site-packages, whose start-up code would
                # take time or print.
                command = [sys.executable, "-I", "-S", str(_PROGRAM)]
                process = subprocess.Popen(command, stdin=read, stdout=_kept, stderr=real)
            finally:
                os.close(read)
        # Standard error is closed, the disk is full, or no second process can be started. To hide
        # notices is not worth failing for.
        except OSError:
            return None
        # All went well: the descriptors stay open.
        on_failure.pop_all()
    return process, write, real


def _stream_to(descriptor: int, *, like: TextIO) -> TextIO:
    # closefd=False: the descriptor stays open, as log handlers may hold the stream and write to it
    # at exit.
    file = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file), encoding=like.encoding, errors=like.errors, line_buffering=True
    )


def _writes_to_stderr(stream: TextIO) -> bool:
    """False where somebody collects what Python writes, such as a notebook."""
    try:
        return stream.fileno() == _STDERR
    except (AttributeError, OSError):
        return False
