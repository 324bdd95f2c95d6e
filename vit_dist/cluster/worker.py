"""One worker of a run on this machine: how it is started, what it prints, how it ends.

Nothing that a worker starts outlives it, and no worker outlives the process that watches over it,
however that one ends.
"""

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_LAST_LINES = 12  # of a worker's output that are repeated when it fails
_CHUNK = 2**16
_LONGEST_LINE = 2**16  # bytes; what is longer is shown in pieces
_LAST_WORDS_SECONDS = 5.0  # for what a worker has started, to pass on what the worker said last

# Runs before the worker's own program, in the worker's process: asks Linux to kill this process
# when its parent dies (1 is PR_SET_PDEATHSIG, which lasts through exec). A program of its own,
# because code of Python's that runs between fork and exec may hang; and not setpriv, which slim
# images lack. The parent may have died before it was asked: then the parent is another by now.
_BIND = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor has ended")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and exec would pass on
os.execvp(sys.argv[2], sys.argv[2:])
"""


def bound(command: Sequence[str]) -> list[str]:
    """The command line of a process that Linux kills when this process ends, however it does."""
    return [sys.executable, "-I", "-S", "-c", _BIND, str(os.getpid()), *command]


@dataclasses.dataclass(frozen=True)
class Worker:
    """What to start.

    Attributes:
      name: for messages and in front of what it prints: "worker 0".
      command: the words of its command line.
      environment: variables that differ from those of this process; None takes one away.
      log: where what it prints is appended. None: it writes to the terminal itself, so that its
        progress bar finds one; for a worker that is alone.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None]
    log: Path | None = None

    def shell_command(self) -> str:
        """A line that does the same when it is pasted into a shell, in whichever folder."""
        unset = [f"-u {name}" for name, value in self.environment.items() if value is None]
        given = [f"{name}={value}" for name, value in self.environment.items() if value is not None]
        words = ["env", *unset, shlex.join((*given, *self.command))]
        line = f"cd {shlex.quote(os.getcwd())} && "
        if self.log is None:
            return line + " ".join(words)
        folder, log = (shlex.quote(str(path)) for path in (self.log.parent, self.log))
        return line + f"mkdir -p {folder} && {' '.join(words)} >> {log} 2>&1 &"


class Process:
    """A worker that runs.

    Args:
      worker: what to start.
      show: called with each line that it prints, as "[worker 0] ...\\n".
      say: called with messages for a person.

    Raises:
      OSError: the system starts no more processes.
    """

    def __init__(
        self, worker: Worker, *, show: Callable[[bytes], None], say: Callable[[str], None]
    ):
        self.worker = worker
        self.code: int | None = None  # once it has ended: as Popen's, negative for a signal
        self.gone_at: float | None = None  # when it was found to have ended, by time.monotonic()
        self.last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._show, self._say = show, say
        self._rest = b""  # of what it printed: a line that has not ended yet
        self._log = self._open_log()
        environment = {**os.environ, **worker.environment}
        # Into a pipe Python would write only when some kilobytes have come together, and what a
        # worker said last would be lost when it is killed.
        environment["PYTHONUNBUFFERED"] = "1"
        output = None if worker.log is None else subprocess.PIPE
        self._process = subprocess.Popen(
            bound(worker.command),
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            # A group of its own: Ctrl-C in a terminal reaches the supervisor alone, which hands it
            # on once; and whatever the worker has started can be ended with it.
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.output = self._process.stdout  # None when it has been read to its end
        if self.output is not None:
            os.set_blocking(self.output.fileno(), False)

    def read(self) -> None:
        """Takes in what it has printed by now; never waits."""
        while self.output is not None:
            try:
                data = os.read(self.output.fileno(), _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._close_output()
                return
            self._write_log(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._rest) > _LONGEST_LINE:
                self._take(self._rest)
                self._rest = b""

    def look(self, now: float) -> None:
        """Notes whether it has ended: `gone_at` is then `now`, and `code` is known."""
        if self.code is None and (code := self._process.poll()) is not None:
            self.code, self.gone_at = code, now

    def is_over(self) -> bool:
        """Whether it is gone, with all that it has started, and all that they printed is taken in.

        What the worker has left behind, such as the filter of TensorFlow's notices, a process
        through which stderr runs, has some seconds to pass on the worker's last words.
        """
        if self.gone_at is None:
            return False
        self.read()
        late = time.monotonic() > self.gone_at + _LAST_WORDS_SECONDS
        # As process 1 of a container we are the parent of all orphans, and have to bury them.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self.pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL if late else 0)  # 0: is there anybody?
            if not late:
                return False
        self.read()
        self._close()
        return True

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)  # does nothing once it is gone

    def kill(self) -> None:
        """Kills it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _take(self, line: bytes) -> None:
        self._show(f"[{self.worker.name}] ".encode() + line + b"\n")
        self.last_lines.append(line.decode(errors="replace").rstrip())

    def _close_output(self) -> None:
        if self.output is not None:
            self.output.close()
            self.output = None
        if self._rest:
            self._take(self._rest)
            self._rest = b""

    def _close(self) -> None:
        self._close_output()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _open_log(self) -> BinaryIO | None:
        if self.worker.log is None:
            return None
        try:
            self.worker.log.parent.mkdir(parents=True, exist_ok=True)
            return open(self.worker.log, "ab", buffering=0)
        except OSError as error:
            self._say(f"{self.worker.name} has no log file: {error}")
            return None

    def _write_log(self, data: bytes) -> None:
        if self._log is None:
            return
        try:
            self._log.write(data)
        except OSError as error:  # a full disk must not end the run that is being logged
            self._say(f"cannot write the log of {self.worker.name} any more: {error}")
            self._log.close()
            self._log = None
