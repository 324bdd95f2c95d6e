"""Ending a run early without losing it: a signal to stop saves a checkpoint first.

Which signal announces the end of a job depends on the sender: SIGTERM (most schedulers), SIGUSR1 or
SIGUSR2 (Slurm's --signal, on demand), SIGHUP (a terminal that closes), SIGINT (Ctrl-C). All of them
mean here: save and stop.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

PREEMPTED = 42  # exit code: stopped on request; what was trained is saved, start again to go on
_INTERRUPTED = 130  # exit code after a second Ctrl-C, as shells report a program that SIGINT ended

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# A launcher and the terminal may both hand on one press of Ctrl-C; nobody presses so fast twice.
ONE_PRESS_SECONDS = 0.1
_SHOW_CURSOR = "\x1b[?25h"  # what a progress bar on a terminal hides


class Preemption:
    """Notices signals to stop within its `with`; a second Ctrl-C ends the process at once.

    At first there is nothing to save yet: a signal ends the process at once, with exit code
    PREEMPTED (Ctrl-C with a KeyboardInterrupt). From `attach` on signals are only noted, and the
    loop asks `requested()` when it can save.

    A signal that is ignored at the beginning of the `with` stays ignored: SIGHUP under nohup,
    SIGINT in a job that a shell script has put into the background.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}  # signal -> its handler before this began
        self._gather: Callable[[int], Sequence[int]] | None = None
        self._received: str | None = None  # the first reason to stop
        self._pipe: int | None = None  # where Python's C code writes signals, for a thread
        self._wakeup_before = -1

    def __enter__(self) -> "Preemption":
        # Python allows only the main thread to set handlers; a notebook may train in another one.
        if threading.current_thread() is not threading.main_thread():
            logging.warning("not in the main thread: a signal to stop will not save a checkpoint")
            return self
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:
                self._before[number] = handler
        self._install()
        if signal.SIGINT in self._before:
            self._watch_for_second_interrupt()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # None: the handler was set by C code, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            # Then the thread reads the end of the pipe, and is done.
            os.close(self._pipe)
            self._pipe = None

    def attach(self, gather: Callable[[int], Sequence[int]]) -> None:
        """From now on a signal is noted, for `requested()` to tell.

        Call it after the strategy is made: a multi-worker strategy has TensorFlow's runtime put
        its own SIGTERM handler in place, which swallows the signal.

        Args:
          gather: number of this host -> the numbers of all hosts; see hosts.all_hosts.
        """
        self._gather = gather
        self._install()

    @property
    def noticed(self) -> bool:
        """Whether this host was asked to stop."""
        return self._received is not None

    @property
    def received(self) -> str | None:
        """The first reason: a signal's name, such as "SIGTERM", or what `note` was given."""
        return self._received

    def note(self, reason: str) -> None:
        """Asks this host to stop as a signal would; for threads that learn of it otherwise.

        Args:
          reason: such as "maintenance-event TERMINATE_ON_HOST_MAINTENANCE".
        """
        if self._received is None:
            logging.warning("asked to stop: %s", reason)
        self._received = self._received or reason

    def requested(self) -> bool:
        """Whether any host was asked to stop; all hosts get the same answer at the same step."""
        if self._gather is None:
            raise RuntimeError("attach() comes before requested()")
        return any(self._gather(int(self.noticed)))

    def _install(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        # The first signal counts; a second SIGTERM must not change what the first one has begun.
        self._received = self._received or signal.Signals(number).name
        if self._gather is not None:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _say(f"stopped by {self.received} before the first step; run the same command again\n")
        raise SystemExit(PREEMPTED)

    def _watch_for_second_interrupt(self) -> None:
        """Starts a thread that ends the process at the second Ctrl-C.

        Python runs a handler only between two calls of the main thread into TensorFlow, and a call
        may take minutes. But the C part of Python's handler writes the signal's number into the
        wakeup descriptor at once, and the thread reads it.
        """
        read, self._pipe = os.pipe()
        # set_wakeup_fd demands it: a handler must not wait for room in a full pipe.
        os.set_blocking(self._pipe, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_second_interrupt, args=(read,), daemon=True).start()


def _say(text: str) -> None:
    """Prints to stderr, not through Python's file, whose lock the interrupted code may hold."""
    # The terminal may be gone, which is why SIGHUP came.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())


def _end_at_second_interrupt(pipe: int) -> None:
    first = None
    # One byte for each signal, its number; no byte when the pipe's other end has been closed.
    while received := os.read(pipe, 1):
        now = time.monotonic()
        if received[0] != signal.SIGINT:
            continue
        if first is not None and now - first > ONE_PRESS_SECONDS:
            _say((_SHOW_CURSOR if sys.stderr.isatty() else "") + "interrupted\n")
            os._exit(_INTERRUPTED)
        first = first or now
    os.close(pipe)
