"""Watches over the workers of a run on this machine, and starts all again when one fails.

For machines without a scheduler that would do so. A run of several workers loses all of them with
one, because each waits for the others; what was trained is in the last checkpoint, so all begin
again from there. It ends when the workers are done, when it is asked to stop, at a mistake that
only a person can mend, or when starting again leads nowhere.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vit_dist.cluster.preemption import ONE_PRESS_SECONDS, PREEMPTED, SIGNALS
from vit_dist.cluster.worker import Process, Worker
from vit_dist.config.errors import ConfigError

LONGEST_BACKOFF_SECONDS = 60.0
_FAILED_GRACE_SECONDS = 10.0  # for the others of a worker that failed: they wait for it in vain
_TERMINATED = 128 + signal.SIGTERM
_LOOK_SECONDS = 1.0  # a worker's end wakes the supervisor; it looks by itself as well
_MISTAKE = ConfigError.exit_code
_INTERRUPTED = 130  # as shells report a program that SIGINT ended


class Supervisor:
    """Runs workers to the end.

    Args:
      make_workers: called before each start; what to start on this machine.
      newest_step: the step of the newest whole checkpoint, None where there is none, or where that
        cannot be told. One that is newer than at the failure before is progress.
      grace: seconds from SIGTERM to SIGKILL, for workers to save a checkpoint.
      max_restarts: how often to start again without progress.
      backoff: seconds before the first restart; doubled at each further one without progress, up
        to LONGEST_BACKOFF_SECONDS.
    """

    def __init__(
        self,
        make_workers: Callable[[], Sequence[Worker]],
        *,
        newest_step: Callable[[], int | None],
        grace: float = 30.0,
        max_restarts: int = 3,
        backoff: float = 1.0,
    ):
        self._make_workers, self._newest_step = make_workers, newest_step
        self._grace, self._max_restarts, self._backoff = grace, max_restarts, backoff
        self._signals = _Signals(self._kill_at_once)
        self._running: list[Process] = []
        self._kill_at: float | None = None  # set once the workers have been told to stop
        self._status = 0  # exit code of this start of the workers, as far as is known
        self._why = ""  # what ended it: the first failure, in words
        self._shows = True  # until whoever reads what is shown has gone

    def run(self) -> int:
        """Returns the exit code: 0 done, 2 a mistake, 42 asked to stop, else of the failure."""
        failures, best = 0, -1
        with self._signals:
            while True:
                code = self._run_once()
                if code in (0, _MISTAKE) or self._signals.first:
                    return code
                step = self._newest_step()
                step = -1 if step is None else step
                failures = 1 if step > best else failures + 1
                best = max(best, step)
                if failures > self._max_restarts:
                    self._give_up(best)
                    return code
                seconds = min(self._backoff * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS)
                self._say(
                    f"{self._why}: starting all again in {seconds:g} s, from {_name_step(best)} "
                    f"(restart {failures} of {self._max_restarts} without a newer one)"
                )
                self._wait(seconds, until_asked=True)
                if self._signals.first:
                    return PREEMPTED  # nothing runs, so there is nothing to save

    def _give_up(self, best: int) -> None:
        text = f"{self._why}: not starting again"
        if self._max_restarts:
            text += (
                f", as {self._max_restarts} restarts brought no checkpoint newer than "
                f"{_name_step(best)}"
            )
        self._say(text)

    def _run_once(self) -> int:
        """Starts the workers and returns when all have ended: the exit code."""
        self._kill_at, self._status, self._why = None, 0, ""
        try:
            started = self._start()
            while self._running:
                if self._signals.first and self._kill_at is None:
                    self._stop(f"got {self._signals.first.name}", self._grace)
                self._wait(self._seconds_to_look())
                self._harvest()
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self._kill()
        finally:
            self._kill()  # nothing is left, unless this very code has failed
        return self._status if started else PREEMPTED

    def _start(self) -> int:
        """Starts the workers, and stops half-way if it is asked to; returns how many."""
        for worker in self._make_workers():
            if self._signals.first:
                break
            try:
                self._running.append(Process(worker, show=self._show, say=self._say))
            except OSError as error:
                self._status, self._why = 1, f"{worker.name} could not be started ({error})"
                self._stop(self._why, _FAILED_GRACE_SECONDS)
                return len(self._running) + 1
        return len(self._running)

    def _harvest(self) -> None:
        """Takes out the workers that have ended, in the order in which they did."""
        now = time.monotonic()
        for process in self._running:
            process.look(now)
        gone = [process for process in self._running if process.gone_at is not None]
        # Of those that are found at once, a 1 may be the end of one that has lost another.
        for process in sorted(gone, key=lambda p: (p.gone_at, p.code == 1)):
            if not process.is_over():
                break  # its last words come before the end of the next one is reported
            self._running.remove(process)
            self._note_end(process)

    def _note_end(self, process: Process) -> None:
        """Keeps the exit code, reports a failure, and stops the others after the first."""
        assert process.code is not None
        code = process.code if process.code >= 0 else 128 - process.code
        # Told to stop before its program could hear it, it had nothing that could be lost.
        if self._kill_at is not None and code == _TERMINATED:
            code = PREEMPTED
        if code == 0:
            return
        what = f"{process.worker.name} {_describe(process.code)}"
        first = not self._why
        self._why = self._why or what
        log = f"; see {process.worker.log}" if process.worker.log else ""
        if log or code not in (_MISTAKE, PREEMPTED):  # a process alone has just said so itself
            self._say(f"{what}{log}")
        # A mistake cannot be mended by a restart, whichever worker reported it first. A failure
        # counts for more than a stop on request: what the chief did not save is lost.
        if code == _MISTAKE or self._status in (0, PREEMPTED):
            self._status = code
        if first and code != PREEMPTED:
            for line in process.last_lines:
                self._say(f"  | {line}")
        if self._running and code == PREEMPTED:
            self._stop(f"{process.worker.name} was stopped", self._grace)
        elif self._running:
            seconds = min(self._grace, _FAILED_GRACE_SECONDS)
            self._stop(f"{process.worker.name} failed", seconds)

    def _stop(self, reason: str, seconds: float) -> None:
        """SIGTERM to all workers now, SIGKILL after `seconds`; only the first call counts."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + seconds
            self._say(f"{reason}; SIGTERM to the workers, SIGKILL after {seconds:g} s")
            for process in self._running:
                process.send(signal.SIGTERM)

    def _kill(self) -> None:
        for process in self._running:
            process.kill()

    def _kill_at_once(self) -> None:
        """At a second Ctrl-C, from within the signal's handler."""
        self._say("interrupted again; SIGKILL to the workers")
        if not self._running:  # between two starts: there is nothing to wait for
            os._exit(_INTERRUPTED)
        self._kill_at = time.monotonic()  # also for a worker that is being started just now
        self._kill()

    def _seconds_to_look(self) -> float:
        if any(process.gone_at is not None for process in self._running):
            return 0.02  # what a worker has left behind ends without a signal to us
        if self._kill_at is None:
            return _LOOK_SECONDS
        return min(max(self._kill_at - time.monotonic(), 0.1), _LOOK_SECONDS)

    def _wait(self, seconds: float, *, until_asked: bool = False) -> None:
        """Takes in what the workers print, until something happens or the time is over.

        Args:
          seconds: at most.
          until_asked: only a signal to stop ends it before.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            outputs = {p.output.fileno(): p for p in self._running if p.output is not None}
            poll = select.poll()
            for descriptor in (self._signals.fileno(), *outputs):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(1000 * left):
                if descriptor in outputs:
                    outputs[descriptor].read()
                else:
                    self._signals.clear()
            if self._signals.first or not until_asked:
                return

    def _show(self, line: bytes) -> None:
        if not self._shows:
            return
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except (OSError, ValueError):  # the terminal may be what has gone; the logs stay
            self._shows = False

    def _say(self, text: str) -> None:
        # The same holds for messages: that nobody reads them is no reason to leave the workers.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"launch: {text}\n".encode())


class _Signals:
    """Notes signals to stop, within a `with`; `fileno()` has news when one comes or a child ends.

    A signal that is ignored when this begins stays ignored, here and in the workers: SIGHUP under
    nohup, SIGINT in a job that a shell script has put into the background.

    Args:
      kill: called at a second Ctrl-C, at once, whatever the supervisor does at that moment.
    """

    def __init__(self, kill: Callable[[], None]):
        self.first: signal.Signals | None = None  # the first signal to stop, if one has come
        self._kill = kill
        self._interrupted: float | None = None  # when Ctrl-C came first
        self._pipe = -1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Signals":
        self._stack.enter_context(self._installed())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def fileno(self) -> int:
        """The end of a pipe into which Python writes one byte for each signal."""
        return self._pipe

    def clear(self) -> None:
        """Takes the news."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._pipe, 1024):
                continue

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        self._pipe, write = os.pipe()
        for descriptor in (self._pipe, write):
            os.set_blocking(descriptor, False)
        handlers: dict[int, Any] = {
            number: self._note for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        }
        # Without a handler of Python's nothing would be written into the pipe.
        handlers[signal.SIGCHLD] = lambda *_: None
        wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(wakeup_before)
            os.close(self._pipe)
            os.close(write)

    def _note(self, number: int, frame: Any) -> None:
        self.first = self.first or signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > ONE_PRESS_SECONDS:
            self._kill()


def _describe(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _name_step(step: int) -> str:
    return f"step {step}" if step >= 0 else "the beginning (there is no whole checkpoint)"
