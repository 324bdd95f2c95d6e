"""Records of many ArrayRecord shards by number, with few of the files open at a time.

The library keeps each shard open that was ever read. A process may open 1024 files on many systems,
and the library ends it with a segmentation fault where that is not enough.
"""

import bisect
import collections
import errno
import functools
import itertools
import os
import re
import resource
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import NamedTuple

from array_record.python import array_record_module

from vit_dist.config.errors import DataError

# Threads that read, which wait rather than compute; each holds one file open.
MAX_PARALLEL = 32
MAX_OPEN = 512  # files; beyond that opening costs little next to reading
# No reading ahead, and 32 kB at a time: records are read one by one, at random.
OPTIONS, BUFFER_BYTES = "readahead_buffer_size:0", 32768
# What the library says of a system call that failed, e.g. "open() failed: No such file or
# directory; opening /data/0.array_record"; all else that it says is of what the file holds.
_FAILED_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


class Shard(NamedTuple):
    """A part of a file: `take` records, from number `skip` on."""

    filename: str
    skip: int
    take: int


class ShardReader:
    """The records of several shards, numbered through; may be used by many threads at once."""

    def __init__(self, shards: Sequence[Shard]):
        # _ends[i] is the number of the record behind the last one of shard i; an empty shard would
        # repeat its neighbour's.
        self._shards = [shard for shard in shards if shard.take]
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self._owner = next(_OWNERS)
        # Files close when the reader is gone. finalize must not refer to `self`, which would keep
        # it.
        weakref.finalize(self, _OPEN.forget, self._owner)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the records of these numbers, in their order.

        Raises:
          FileNotFoundError: A shard is not there.
          DataError: A shard is damaged.
          OSError: It cannot be read now, e.g. as too many files are open.
        """
        # Shard -> places in `numbers`: each shard is asked once for all that is wanted of it.
        by_shard: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_shard.setdefault(bisect.bisect_right(self._ends, number), []).append(place)
        found: list[bytes] = [b""] * len(numbers)

        def read_shard(which: int) -> None:
            shard, places = self._shards[which], by_shard[which]
            first = self._ends[which] - shard.take  # the number of the shard's first record
            positions = [numbers[place] - first + shard.skip for place in places]
            with _OPEN.borrow(self._owner, shard.filename) as opened:
                for place, record in zip(places, opened.read(positions), strict=True):
                    found[place] = record

        # Outside of batches most reads are of one record, for which no thread is needed.
        if len(by_shard) == 1:
            read_shard(*by_shard)
        else:
            list(_pool().map(read_shard, by_shard))  # the list raises what one of them raised
        return found


class OpenShard:
    """One shard, whole; closed by the end of a `with`.

    Raises:
      FileNotFoundError, DataError, OSError: As `ShardReader.read`, opening and reading.
    """

    def __init__(self, filename: str):
        self._filename = filename
        self._reader = array_record_module.ArrayRecordReader(
            os.fsencode(filename), options=OPTIONS, file_reader_buffer_size=BUFFER_BYTES
        )
        # The library opens a file that is not there without complaint, and fails at the first read.
        if not self._reader.ok():
            self.read([0])  # raises why: there is no other way to learn it
            raise DataError(f"{filename} cannot be opened as an ArrayRecord file")

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, positions: Sequence[int]) -> list[bytes]:
        """Returns the records at these positions."""
        try:
            return self._reader.read(positions)
        except RuntimeError as error:
            raise _explained(str(error), self._filename) from error
        # The library's message quotes the name of the file, and that need not be UTF-8.
        except UnicodeDecodeError as error:
            text = bytes(error.object).decode(errors="replace")
            raise _explained(text, self._filename) from error

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def __enter__(self) -> "OpenShard":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _File:
    """A shard that is open, or about to be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while it is opened, which may wait for a network
        self.shard: OpenShard | None = None
        self.users = 0


class _OpenFiles:
    """All shards that are open in this process; for more, the longest unused are closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[tuple[int, str], _File] = collections.OrderedDict()
        self._gone: collections.deque[int] = collections.deque()  # owners with files still open

    @contextmanager
    def borrow(self, owner: int, filename: str) -> Iterator[OpenShard]:
        """Gives an open file, which stays open until all who borrowed it are done.

        Owners (readers) do not share open files: where a file was replaced, the one that an earlier
        reader opened still gives the old contents.
        """
        key = (owner, filename)
        with self._lock:
            self._close_gone()
            file = self._files.setdefault(key, _File())
            self._files.move_to_end(key)
            file.users += 1
            # Those not in use now, longest unused first: move_to_end keeps the order of last use.
            idle = [k for k, other in self._files.items() if not other.users]
            # Fewer than are too many, if the others are in use: then more stay open for a while.
            self._close(idle[: max(len(self._files) - max_open(), 0)])
        try:
            # Outside of the common lock, so that other files can be borrowed while this one is
            # opened. A second borrower of it waits here.
            with file.lock:
                if file.shard is None:
                    file.shard = OpenShard(filename)
            yield file.shard
        finally:
            with self._lock:
                file.users -= 1
                if file.shard is None and not file.users:
                    del self._files[key]  # it could not be opened

    def forget(self, owner: int) -> None:
        """Closes all files of an owner that is gone, now or when a file is borrowed next."""
        self._gone.append(owner)
        # The garbage collector calls this, in any thread and at any line: also in one that holds
        # the lock, and would wait for itself.
        if self._lock.acquire(blocking=False):
            try:
                self._close_gone()
            finally:
                self._lock.release()

    def _close_gone(self) -> None:
        while self._gone:
            owner = self._gone.popleft()
            self._close([key for key in self._files if key[0] == owner])

    def _close(self, keys: list[tuple[int, str]]) -> None:
        for key in keys:
            shard = self._files.pop(key).shard
            if shard is not None:
                shard.close()


_OPEN = _OpenFiles()
_OWNERS = itertools.count()


def _explained(message: str, filename: str) -> Exception:
    """Returns what the library meant: that the file is damaged, or that the system failed."""
    # The library raises RuntimeError whatever happens; only the text tells the cause.
    call = _FAILED_CALL.search(message)
    number = _NUMBERS.get(call[1].strip()) if call else None
    if number is None:
        return DataError(f"{filename}: {message}")
    text = os.strerror(number)
    if number in (errno.EMFILE, errno.ENFILE):
        text += f" (this process may open {_soft_limit()}; raise it with ulimit -n)"
    return OSError(number, text, filename)  # becomes FileNotFoundError and the like by its number


def max_open() -> int:
    """Returns how many shards may be open: a quarter of the files that this process may open.

    The others are for TensorFlow, gRPC, and whatever else opens files.
    """
    return max(min(_soft_limit() // 4, MAX_OPEN), 2)


def _soft_limit() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN * 4 if limit == resource.RLIM_INFINITY else limit


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(min(MAX_PARALLEL, max_open()), "shards")
