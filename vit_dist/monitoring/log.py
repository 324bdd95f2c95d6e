"""The log of a run, log.txt in its folder: what the terminal shows, and what is too long for it.

Two kinds of messages get there. What is logged with absl (`logging.info`, `logging.warning`) also
reaches standard error. `detail` writes to the log alone: the resolved config, a table of tensors, a
line for each step that the progress bar shows.
"""

import logging as std_logging
import os
import platform
import shlex
import sys
from types import TracebackType

from etils import epath

from vit_dist.monitoring.files import GrowingFile, open_rows
from vit_dist.monitoring.lines import LineFormatter
from vit_dist.paths import expand

LOG_FILE = "log.txt"
# Characters of messages that are held in memory until the log is opened; hosts other than the chief
# never open theirs, and must not collect messages for days.
_MAX_HELD = 10_000

# It does not propagate to the root logger, so without a RunLog its messages are dropped.
_details = std_logging.getLogger("vit_dist.details")
_details.setLevel(std_logging.INFO)
_details.propagate = False
_details.addHandler(std_logging.NullHandler())


def detail(text: str, *args: object) -> None:
    """Writes to the log of the run, if there is one, and nowhere else; used like `logging.info`."""
    _details.info(text, *args)


class RunLog(std_logging.Handler):
    """Collects what is logged, and writes it to the run's folder once that is known.

    Use it as a context manager around a run. Which process writes, and where, is known only after
    the config and the data have been checked and the hosts have met. Messages until then are held,
    and are written first when the file is opened. A process that never calls `open` writes nothing.

    A log that cannot be written is a warning, once, and does not end the run: metrics and
    checkpoints must not be lost, and their writers will meet a full disk soon enough.
    """

    def __init__(self) -> None:
        super().__init__(std_logging.INFO)
        self.setFormatter(LineFormatter(times=True))
        self._held: list[str] = []
        self._room = _MAX_HELD
        self._rows: GrowingFile | None = None
        self._path: epath.Path | None = None

    def open(self, workdir: epath.PathLike) -> None:
        """Opens the log of `workdir` to append to it; earlier starts of the run are in it too."""
        self._path = expand(workdir) / LOG_FILE
        try:
            self._rows = open_rows(self._path)
        # Of any kind: storage raises many, and no error of the log may end the run.
        except Exception as error:
            self._give_up(error)
        host, process = platform.node(), os.getpid()
        detail("start: %s (process %d of %s)", shlex.join(sys.argv), process, host)
        for text in self._held:
            self._add(text)
        self._held.clear()

    def emit(self, record: std_logging.LogRecord) -> None:
        """Called by `logging`, which holds a lock of this handler."""
        # Formatted now: a record may refer to objects that change before the log is opened.
        text = self.format(record) + "\n"
        if self._path is not None:
            self._add(text)
        elif self._room > 0:
            self._held.append(text)
            self._room -= len(text)

    def __enter__(self) -> "RunLog":
        for logger in self._loggers():
            logger.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            # The terminal shows one message; whoever asks why finds the traceback here.
            _details.error("the run ends", exc_info=error)
        # A notebook may start several runs in one process: their logs must not mix.
        for logger in self._loggers():
            logger.removeHandler(self)
        self.close()

    def close(self) -> None:
        """Writes out what is pending."""
        super().close()
        rows, self._rows = self._rows, None
        if rows is not None:
            # As in open(): no error of the log may end the run.
            try:
                rows.close()
            except Exception as error:
                self._give_up(error)

    def _add(self, text: str) -> None:
        if self._rows is not None:
            # As in open(). After an error nothing more is written, so it is told once only.
            try:
                self._rows.add(text)
            except Exception as error:
                self._rows = None
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # Printed and not logged: a logged message would come back to this handler.
        print(f"warning: {self._path} is incomplete: {error}", file=sys.stderr, flush=True)

    @staticmethod
    def _loggers() -> tuple[std_logging.Logger, ...]:
        return std_logging.getLogger("absl"), _details
