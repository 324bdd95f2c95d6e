"""Files that grow while a run goes on: metrics and log line by line, and TensorBoard's events.

A row of metrics that is lost is an error, for metrics.jsonl is the record of the run. Events are a
second copy of it for the eye, so where they cannot be written the run says so once and goes on.
"""

import contextlib
import itertools
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from absl import logging
from etils import epath
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vit_dist.paths import expand, is_remote
from vit_dist.storage.errors import FAILURES, cause, kind_of
from vit_dist.storage.files import make_folder

FLUSH_SECONDS = 30

_numbers = itertools.count()  # of event files in this process


class GrowingFile:
    """A file on a disk. What was written is there at once: a killed process loses nothing."""

    def __init__(self, path: epath.Path, mode: str):
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(self._opened(path, mode))

    def _opened(self, path: epath.Path, mode: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        # Unbuffered: what a full disk does not take would be tried again, and fail, at close.
        return open(path, mode, buffering=0)

    def add(self, row: str) -> None:
        """Appends a line of text; raises OSError where that fails."""
        self.write(row.encode(errors="backslashreplace"))

    def write(self, data: bytes) -> None:
        """Appends; raises OSError where that fails."""
        rest = memoryview(data)
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Nothing to do; `RecordWriter` calls it."""

    def close(self) -> None:
        """The file cannot be written any more."""
        self._open.close()


class RemoteFile(GrowingFile):
    """A file in a bucket, which takes only whole objects: each flush sends all of it again.

    So a thread flushes, no oftener than every FLUSH_SECONDS. A process that is killed loses what it
    wrote since, and resumes at a checkpoint that may well be older.
    """

    def __init__(self, path: epath.Path, mode: str, *, clock: Callable[[], float] = time.monotonic):
        super().__init__(path, mode)
        self._clock = clock
        self._flushed = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._sent: list[Future] = []

    def _opened(self, path: epath.Path, mode: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return path.open(mode)

    def write(self, data: bytes) -> None:
        """Appends; raises what an earlier write met."""
        self._sent.append(self._thread.submit(self._write, data))
        while self._sent and self._sent[0].done():
            self._sent.pop(0).result()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        now = self._clock()
        if now - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        """Sends what is left; raises what any of the writes met."""
        closed = self._thread.submit(super().close)
        self._thread.shutdown()
        for done in (*self._sent, closed):
            done.result()


def open_growing(path: epath.Path, mode: str) -> GrowingFile:
    """Opens a file to append ("ab") or to write anew ("wb")."""
    return RemoteFile(path, mode) if is_remote(path) else GrowingFile(path, mode)


def open_rows(path: epath.Path) -> GrowingFile:
    """Opens a text file, local or in a bucket, to append lines to."""
    return open_growing(path, "ab")


class EventFile:
    """A file of events for TensorBoard, one for each start of a run; never raises.

    TensorBoard's own EventFileWriter fails in a thread, with a traceback, and then at every call.

    Args:
      folder: where TensorBoard looks; made if absent.
    """

    def __init__(self, folder: epath.PathLike):
        # TensorBoard finds files by "tfevents", and reads those of a folder in order of name.
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}"
        self._path = expand(folder) / f"{name}.{os.getpid()}.{next(_numbers)}"
        self._records: RecordWriter | None = None
        with self._giving_up():
            make_folder(folder)
            self._records = RecordWriter(open_growing(self._path, "wb"))
        self.add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, event: event_pb2.Event) -> None:
        """Writes one event, as long as none has failed."""
        with self._giving_up():
            if self._records is not None:
                self._records.write(event.SerializeToString())

    def close(self) -> None:
        """No event can be added any more."""
        with self._giving_up():
            records, self._records = self._records, None
            if records is not None:
                records.close()

    @contextlib.contextmanager
    def _giving_up(self):
        try:
            yield
        except FAILURES as error:
            if kind_of(error) is None:
                raise
            records, self._records = self._records, None
            logging.warning(
                "cannot write %s (%s): going on without TensorBoard; metrics.jsonl has all scalars",
                self._path,
                cause(error),
            )
            if records is not None:
                with contextlib.suppress(*FAILURES):  # it is the same failure once more
                    records.close()
