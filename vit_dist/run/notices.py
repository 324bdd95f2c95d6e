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
_PATIENCE = 5  # seconds to wait for the last lines; a child of ours may keep the pipe open longer

_kept: int | None = None  # descriptor of a file with the notices so far; the filters append to it


@contextlib.contextmanager
def hidden(*, python_apart: bool = False) -> Iterator[None]:
    """Hides TensorFlow's notices from whoever reads standard error, until the `with` ends.

    It does nothing where TF_CPP_MIN_LOG_LEVEL is 0 or 1, as set by whoever wants to see them; where
    no second process can be started; and in the first process of a container, at whose end the
    system kills all others, so that the filter could not pass on the last words of a crash.

    Args:
      python_apart: what Python itself writes goes past the filter, unchanged and without delay, so
        that progress bars find a terminal as ever. For the rest of a process: it costs a file
        descriptor, which stays open for the log handlers made in between.
    """
    wanted = os.environ.get(LEVEL_VARIABLE) in ("0", "1")
    started = None if wanted or os.getpid() == 1 or sys.stderr is None else _start()
    if started is None:
        yield
        return
    process, pipe, real = started
    before = sys.stderr
    before.flush()
    os.dup2(pipe, _STDERR)
    os.close(pipe)
    if python_apart and _writes_to_stderr(before):
        sys.stderr = _stream_to(real, like=before)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        os.dup2(real, _STDERR)  # closes our end of the pipe: the filter ends once all has passed
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
    """(filter, the pipe's end to write to, the real standard error); None if it cannot be."""
    global _kept
    with contextlib.ExitStack() as on_failure:
        try:
            if _kept is None:
                with tempfile.TemporaryFile(prefix="vit_dist-") as file:
                    _kept = os.dup(file.fileno())
            real = os.dup(_STDERR)
            on_failure.callback(os.close, real)
            read, write = os.pipe()
            on_failure.callback(os.close, write)
            try:
                # Isolated and without site: nothing of the environment's is imported.
                command = [sys.executable, "-I", "-S", str(_PROGRAM)]
                process = subprocess.Popen(command, stdin=read, stdout=_kept, stderr=real)
            finally:
                os.close(read)
        except OSError:  # standard error is closed, or there is no room or no second process
            return None
        on_failure.pop_all()
    return process, write, real


def _stream_to(descriptor: int, *, like: TextIO) -> TextIO:
    # It stays open: handlers of logs may hold it, and write at exit.
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
