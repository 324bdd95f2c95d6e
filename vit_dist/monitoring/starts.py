"""starts.jsonl in a run's folder: what each start of the run was, and what it spent its time on.

Each line is the whole record of one start (`goodput.StartRecord`) as of a moment: when it began, at
each log, save and evaluation, and at its end. Of a start the last line counts. So a process that is
killed at any moment has left all but what happened since its last line, and the next start knows by
the missing reason that it was killed. Each start replaces the lines of earlier starts by the last
one of each, so that the file stays short.

The file serves people. If it cannot be written that is a warning, and the run goes on.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from vit_dist.monitoring import goodput
from vit_dist.monitoring.files import GrowingFile, open_rows
from vit_dist.monitoring.goodput import Spending, StartRecord
from vit_dist.paths import expand
from vit_dist.storage.errors import FAILURES, cause, kind_of
from vit_dist.storage.files import exists, read_text, write_whole

STARTS_FILE = "starts.jsonl"


def load_starts(workdir: epath.PathLike) -> list[StartRecord]:
    """The records of a run's starts, in order; [] if it has none."""
    return goodput.read_records(_read(expand(workdir) / STARTS_FILE))


def _read(path: epath.Path) -> str:
    return read_text(path) if exists(path) else ""


class Starts:
    """The starts of a run, this one last; use what `open` returns as a context manager.

    Made when the start begins. `spending` may be used from then on, and the file is written once it
    is known that the workdir is this run's. A host that never opens it writes nothing.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ):
        self._clock, self._clock_began, self._began = clock, clock(), now()
        self.spending = Spending(clock)
        self._earlier: list[StartRecord] = []
        self._known: dict[str, Any] = {}
        self._reason: str | None = None
        self._rows: GrowingFile | None = None
        self._path: epath.Path | None = None

    @contextlib.contextmanager
    def open(self, workdir: epath.PathLike, *, active: bool = True) -> Iterator["Starts"]:
        """Records this start in `workdir` until the end of the `with`; not if `active` is false."""
        if active:
            self._path = expand(workdir) / STARTS_FILE
            with self._giving_up():
                self._begin(self._path)
        try:
            yield self
        except BaseException as error:
            self._reason = reason_of(error)
            raise
        else:
            self._reason = self._reason or goodput.DONE
        finally:
            self._write()
            # Taken away first: should closing fail, _giving_up must not close it a second time.
            rows, self._rows = self._rows, None
            with self._giving_up():
                if rows is not None:
                    rows.close()

    def runs_on(self, *, hosts: int, replicas: int) -> None:
        """Notes the devices of this start."""
        self._known |= {"hosts": hosts, "replicas": replicas}

    def note(self, step: int) -> None:
        """Writes down that `step` steps have been done; the first call tells where it began."""
        # Of equal keys the last one counts: a first_step that is known already stays.
        self._known = {"first_step": step, **self._known, "last_step": step}
        self._write()

    def stopped(self, signal_name: str | None) -> None:
        """Notes that the run ends on request; None where another host got the signal."""
        self._reason = f"stopped: {signal_name or 'another host was asked to'}"

    def records(self) -> list[StartRecord]:
        """All starts, this one as of now."""
        return [*self._earlier, self._record()]

    def scalars(self) -> dict[str, float]:
        """What TensorBoard shows: "goodput/since_first_start", "goodput/running", "restarts"."""
        found = goodput.measure(self.records())
        return {
            "goodput/since_first_start": found.share,
            "goodput/running": found.share_running,
            "restarts": float(found.restarts),
        }

    def _record(self) -> StartRecord:
        return StartRecord(
            start=self._earlier[-1].start + 1 if self._earlier else 0,
            began=self._began,
            # By the monotonic clock: the other one may be set while the run goes on.
            until=self._began + self._clock() - self._clock_began,
            reason=self._reason,
            seconds=self.spending.seconds(),
            **self._known,
        )

    def _begin(self, path: epath.Path) -> None:
        text = _read(path)
        self._earlier = goodput.read_records(text)
        kept = "".join(record.to_line() for record in self._earlier)
        # Also without the torn line that a kill may have left, behind which none can be appended.
        if kept != text:
            write_whole(path, kept.encode())
        self._rows = open_rows(path)
        self._write()

    def _write(self) -> None:
        with self._giving_up():
            if self._rows is not None:
                self._rows.add(self._record().to_line())

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Turns a failure of the storage into one warning, after which nothing is written."""
        try:
            yield
        except FAILURES as error:
            # No failure of the storage but a fault of ours, which is not to be hidden.
            if kind_of(error) is None:
                raise
            rows, self._rows = self._rows, None
            text = "cannot keep %s (%s): going on without a record of this start"
            logging.warning(text, self._path, cause(error))
            # Closing writes what is pending and fails in the same way; it has been told already.
            if rows is not None:
                with contextlib.suppress(*FAILURES):
                    rows.close()


def reason_of(error: BaseException) -> str:
    """Why a start ended, in a word."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped: {signal.SIGINT.name}"
    return "stopped" if isinstance(error, SystemExit) else type(error).__name__
