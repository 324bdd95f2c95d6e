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

# Without the kernel's help: between writing a lock and looking whether another has done so too.
SETTLE_SECONDS = 1.0
# What flock says where the file system has no locks.
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Locking(enum.Enum):
    """What the kernel says of the lock."""

    OURS = enum.auto()
    BLOCKED = enum.auto()  # a process holds it: of this machine, or one that NFS knows of
    UNSUPPORTED = enum.auto()  # here it cannot tell


class LockFile:
    """An object in a bucket that names its owner. Nothing locks it: who writes last has it."""

    def __init__(self, path: epath.Path):
        self.path = path

    def lock(self) -> Locking:
        """Asks the kernel for the lock."""
        return Locking.UNSUPPORTED

    def read(self) -> Owner | None:
        """The owner that the file names, if any."""
        try:
            return parse_owner(self.path.read_bytes())
        except FAILURES as error:
            if kind_of(error) is not Kind.MISSING:
                raise
            return None

    def claim(self, owner: Owner) -> bool:
        """Writes the owner; returns whether nobody else has done so at the same time."""
        self.renew(owner)
        return self._stays(owner)

    def _stays(self, owner: Owner) -> bool:
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
        """Seconds since the last renewal, by the storage's own clock: those of hosts differ."""
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
        """Gives up the lock; removes the file if it is still the owner's."""
        if self.is_of(owner):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the kernel's lock, if any."""


class LocalLockFile(LockFile):
    """A file that the kernel locks for as long as this process keeps it open."""

    def __init__(self, path: epath.Path):
        super().__init__(path)
        self._file: int | None = None  # a descriptor
        self._locking = Locking.UNSUPPORTED

    def lock(self) -> Locking:
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
        # Its last holder may have removed the file after this process had opened it. What is locked
        # then has no name any more, and the next process would lock another file.
        if not self._is_current():
            return False
        assert self._file is not None
        os.pwrite(self._file, owner.to_bytes(), 0)
        os.fsync(self._file)  # NFS: shows it to other machines
        return True if self._locking is Locking.OURS else self._stays(owner)

    def renew(self, owner: Owner) -> None:
        assert self._file is not None
        os.utime(self._file)  # takes no room, so a full disk does not lose the lock

    def beat(self) -> object:
        try:
            file = os.open(self.path, os.O_RDONLY)  # NFS asks the server anew at each opening
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def age(self) -> float:
        probe = temporary_name(self.path)
        probe.write_bytes(b"")
        try:
            return os.stat(probe).st_mtime - os.stat(self.path).st_mtime
        finally:
            with only_warn(f"removing {probe}"):
                probe.unlink()

    def discard(self) -> None:
        if self._is_current():
            super().discard()

    def release(self, owner: Owner) -> None:
        try:
            super().release(owner)  # before the file is closed, and with that unlocked
        finally:
            self.close()

    def _is_current(self) -> bool:
        """Whether the file that is open is the one that has the name now."""
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
    """The kind of lock file that `path` can have."""
    return LockFile(path) if is_remote(path) else LocalLockFile(path)
