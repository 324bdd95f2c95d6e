"""The file behind a lock: on a disk, where the kernel can lock it, or an object in a bucket."""

import enum
import errno
import fcntl
import os
import time

from etils import epath

from vit_dist.paths import is_remote, temporary_name
from vit_dist.storage.errors import FAILURES, Kind, kind_of, only_warn
from vit_dist.storage.owner import Owner, parse_owner

# Without the kernel's help: how long to wait between writing an owner and looking whether another
# process has written itself over it.
SETTLE_SECONDS = 1.0
# Errors of flock on file systems that have no locks.
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Locking(enum.Enum):
    """What the kernel says of the lock."""

    OURS = enum.auto()  # this process has it now
    BLOCKED = enum.auto()  # another process has it, of this machine or one that NFS knows of
    UNSUPPORTED = enum.auto()  # this file system has no locks


class LockFile:
    """An object in a bucket that names its owner. Nothing locks it: the last writer is the owner.

    LocalLockFile overrides what a local file can do better.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def lock(self) -> Locking:
        """Asks the kernel for the lock."""
        return Locking.UNSUPPORTED

    def read(self) -> Owner | None:
        """The owner that the file names; None if there is no file, or one without an owner."""
        try:
            return parse_owner(self.path.read_bytes())
        except FAILURES as error:
            if kind_of(error) is not Kind.MISSING:
                raise
            return None

    def claim(self, owner: Owner) -> bool:
        """Writes the owner; returns whether no other process has written itself at that time."""
        self.renew(owner)
        return self._stays(owner)

    def _stays(self, owner: Owner) -> bool:
        # Of several processes that write at the same time, all but the last find another name.
        time.sleep(SETTLE_SECONDS)
        return self.is_of(owner)

    def is_of(self, owner: Owner) -> bool:
        """Whether the file still names this owner."""
        now = self.read()
        return now is not None and now.token == owner.token

    def renew(self, owner: Owner) -> None:
        """Shows others that the owner is alive."""
        self.path.write_bytes(owner.to_bytes())

    def beat(self) -> object:
        """Something that changes when the owner renews the lock or gives it up."""
        return self.read()

    def age(self) -> float:
        """Seconds since the last renewal, by the storage's own clock."""
        # The clocks of two hosts differ, so the storage is asked twice: for the time of a new file
        # and for that of the lock.
        probe = temporary_name(self.path)
        probe.write_bytes(b"")
        try:
            return probe.stat().mtime - self.path.stat().mtime
        finally:
            with only_warn(f"removing {probe}"):
                probe.unlink()

    def discard(self) -> None:
        """Removes the file of an owner that is gone, so that the next `lock` makes a new one."""
        self.path.unlink(missing_ok=True)

    def release(self, owner: Owner) -> None:
        """Gives up the lock; removes the file if it still names this owner."""
        if self.is_of(owner):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the kernel's lock, if any."""


class LocalLockFile(LockFile):
    """A file that the kernel locks for as long as this process keeps it open."""

    def __init__(self, path: epath.Path):
        super().__init__(path)
        self._file: int | None = None  # a descriptor; the kernel's lock lasts as long as it is open
        self._locking = Locking.UNSUPPORTED

    def lock(self) -> Locking:
        # Opened without truncating: what is in the file still names the other owner.
        self.close()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locking = Locking.OURS
        except BlockingIOError:
            self._locking = Locking.BLOCKED
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            self._locking = Locking.UNSUPPORTED
        return self._locking

    def claim(self, owner: Owner) -> bool:
        # The last holder may have removed the file after this process had opened it. The file that
        # is locked then has no name any more, and the next process would lock another one.
        if not self._is_current():
            return False
        assert self._file is not None
        os.pwrite(self._file, owner.to_bytes(), 0)
        # NFS shows the bytes to other machines only now.
        os.fsync(self._file)
        # With the kernel's lock nobody else can be here; without it, wait and look.
        return True if self._locking is Locking.OURS else self._stays(owner)

    def renew(self, owner: Owner) -> None:
        assert self._file is not None
        # Only the time of the file: a write could fail on a full disk, and lose the lock.
        os.utime(self._file)

    def beat(self) -> object:
        # Opened for each look: NFS may answer from its cache unless a file has just been opened.
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def age(self) -> float:
        # As in LockFile, but with os.stat: etils' stat() fails for a user without a name.
        probe = temporary_name(self.path)
        probe.write_bytes(b"")
        try:
            return os.stat(probe).st_mtime - os.stat(self.path).st_mtime
        finally:
            with only_warn(f"removing {probe}"):
                probe.unlink()

    def discard(self) -> None:
        # Another process may have discarded it already, and the name is a new file's.
        if self._is_current():
            super().discard()

    def release(self, owner: Owner) -> None:
        # Removed before it is unlocked: in the other order a process that locks the file in between
        # would lose it again.
        try:
            super().release(owner)
        finally:
            self.close()

    def _is_current(self) -> bool:
        """Whether the name still belongs to the file that is open, by device and inode."""
        assert self._file is not None
        try:
            named, opened = os.stat(self.path), os.fstat(self._file)
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def lock_file(path: epath.Path) -> LockFile:
    """The lock file for a path: with the kernel's lock if local, an object if in a bucket."""
    return LockFile(path) if is_remote(path) else LocalLockFile(path)
