"""Files that grow while a run goes on: metrics and log line by line, and TensorBoard's events.

metrics.jsonl is the record of a run, so a row that cannot be written is an error. TensorBoard's
events are a second copy of it for the eye: a run that cannot write them warns once and goes on, and
never waits for them.
"""

import contextlib
import itertools
import math
import os
import platform
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from absl import logging
from etils import epath
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vit_dist.paths import expand, is_remote
from vit_dist.storage.errors import FAILURES, cause
from vit_dist.storage.files import make_folder

FLUSH_SECONDS = 30

# Numbers the event files of this process, so that two of the same second differ in name.
_numbers = itertools.count()


class GrowingFile:
    """A file on a disk. The system has each write at once, so a killed process loses nothing."""

    def __init__(self, path: epath.Path, mode: str):
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(self._opened(path, mode))

    def _opened(self, path: epath.Path, mode: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        # Unbuffered: bytes that a full disk did not take would stay in the buffer, to be written
        # again, and to fail again, at close.
        return open(path, mode, buffering=0)

    def add(self, row: str) -> None:
        """Appends a line of text; raises OSError where that fails."""
        self.write(row.encode(errors="backslashreplace"))

    def write(self, data: bytes) -> None:
        """Appends; raises OSError where that fails."""
        rest = memoryview(data)
        # An unbuffered write may take only some of the bytes.
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Nothing to do; `RecordWriter` calls it."""

    def close(self) -> None:
        """Closes the file; it cannot be written any more."""
        self._open.close()


class RemoteFile(GrowingFile):
    """A file in a bucket, which takes only whole objects: each flush sends all of it again.

    So a thread does it, and flushes at most once in FLUSH_SECONDS. A process that is killed loses
    what it wrote after the last flush; the checkpoint from which it resumes may well be older.
    """

    def __init__(self, path: epath.Path, mode: str, *, clock: Callable[[], float] = time.monotonic):
        super().__init__(path, mode)
        self._clock = clock
        self._flushed = -math.inf
        # One thread, so that writes keep their order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._sent: list[Future] = []

    def _opened(self, path: epath.Path, mode: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return path.open(mode)

    def write(self, data: bytes) -> None:
        """Appends in the background; raises the error of an earlier write, if there was one."""
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
        """Sends what is left; raises the first error of all writes."""
        # Closed by the thread as well, behind the writes that still wait there.
        closed = self._thread.submit(super().close)
        self._thread.shutdown()
        for done in (*self._sent, closed):
            done.result()


def open_growing(path: epath.Path, mode: str) -> GrowingFile:
    """Opens a file, local or in a bucket, to append ("ab") or to replace it ("wb")."""
    return RemoteFile(path, mode) if is_remote(path) else GrowingFile(path, mode)


def open_rows(path: epath.Path) -> GrowingFile:
    """Opens a text file, local or in a bucket, to append lines to."""
    return open_growing(path, "ab")


class EventFile:
    """A file of events for TensorBoard, one for each start of a run, written by a thread.

    The training never waits for it, and nothing that goes wrong in it ends a run: it is told once,
    and then nothing more is written. A process that is killed loses what it had not yet written,
    usually some milliseconds.

    TensorBoard's own EventFileWriter is not used, because where storage fails it prints a traceback
    from a thread, and then raises at every call.

    Args:
      folder: where TensorBoard looks; made if absent.
      most: how many events may wait; where the storage is slower than that, further ones are lost.
      patience: seconds that `close` waits for the thread.
    """

    def __init__(self, folder: epath.PathLike, *, most: int = 1000, patience: float = 60.0):
        # TensorBoard looks for "tfevents" in names, and reads a folder's files in order of name:
        # the time comes first, in ten digits, so that a later start is read later.
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}"
        self._path = expand(folder) / f"{name}.{os.getpid()}.{next(_numbers)}"
        self._records: RecordWriter | None = None
        self._given_up = self._full = self._incomplete = False
        self._patience = patience
        # None ends the thread.
        self._waiting: queue.Queue[Callable[[], event_pb2.Event] | None] = queue.Queue(most)
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()
        # The first event of a file names its version; readers expect it.
        self.add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, event: event_pb2.Event | Callable[[], event_pb2.Event]) -> None:
        """Lets the thread write an event, or what a function that takes time makes of it."""
        make = event if callable(event) else lambda: event
        try:
            self._waiting.put_nowait(make)
        except queue.Full:
            if not self._full:
                self._full = True
                logging.warning(
                    "%s cannot be written as fast as events come: TensorBoard lacks some; "
                    "metrics.jsonl has all scalars",
                    self._path,
                )

    def close(self) -> None:
        """Waits until all is written, and closes the file; further events are dropped."""
        try:
            self._waiting.put(None, timeout=self._patience)
        except queue.Full:
            # The thread hangs in a write; what waits is lost with the process.
            return
        self._thread.join(self._patience)

    def _run(self) -> None:
        with self._giving_up():
            make_folder(self._path.parent)
            self._records = RecordWriter(open_growing(self._path, "wb"))
        while (make := self._waiting.get()) is not None:
            # After a failure the queue is still emptied, so that nobody waits for room in it.
            if self._records is None:
                continue
            data = self._made(make)
            with self._giving_up():
                self._records.write(data)
        with self._giving_up():
            records, self._records = self._records, None
            if records is not None:
                records.close()

    def _made(self, make: Callable[[], event_pb2.Event]) -> bytes:
        """The bytes of an event; of one that cannot be made, those of an empty event."""
        # Of any kind, as in _giving_up: the storage is well, so other events go on.
        try:
            return make().SerializeToString()
        except Exception as error:
            if not self._incomplete:
                logging.warning("TensorBoard lacks something in %s: %r", self._path, error)
            self._incomplete = True
            return event_pb2.Event(wall_time=time.time()).SerializeToString()

    @contextlib.contextmanager
    def _giving_up(self):
        """Turns whatever fails into one warning, after which nothing is written."""
        try:
            yield
        # Of any kind: the eye's copy of the metrics is not worth a run.
        except Exception as error:
            records, self._records = self._records, None
            if not self._given_up:
                logging.warning(
                    "cannot write %s (%s): going on without TensorBoard; metrics.jsonl has all "
                    "scalars",
                    self._path,
                    cause(error),
                )
            self._given_up = True
            # Closing writes what is pending and fails in the same way; it has been told already.
            if records is not None:
                with contextlib.suppress(*FAILURES):
                    records.close()
