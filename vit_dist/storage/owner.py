"""Who holds a lock: a process, named so that others can tell whether it still runs."""

import dataclasses
import errno
import json
import os
import platform
import time
import uuid

# Bytes. TensorFlow remembers the sizes of a bucket's objects for some seconds; as all owners are of
# one size, an object that another host has just overwritten is still read to its end.
_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    Attributes:
      host, pid, since: name of the machine, number of the process, time of the lock; for messages.
      boot: identifies one boot of one kernel, so the same in all containers of a machine.
      namespace: the namespace of `pid`; process numbers repeat from container to container.
      started: clock ticks from boot to the start of the process. Numbers of processes that have
        ended are used again, by processes with another start.
      token: different for each lock ever taken.
      beat: counts the renewals of the lock.
    """

    host: str
    pid: int
    since: str
    boot: str
    namespace: str
    started: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def to_bytes(self) -> bytes:
        """JSON, padded to the same length for all."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode().ljust(_LENGTH - 1) + b"\n"

    def renewed(self) -> "Owner":
        """The same owner, one beat later."""
        return dataclasses.replace(self, beat=self.beat + 1)


def parse_owner(data: bytes) -> Owner | None:
    """The owner that `to_bytes` wrote; None for any other bytes, such as those of an empty file."""
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def this_process() -> Owner:
    """This process as an owner, with a new token at each call."""
    # "" and the host's name stand in where there is no /proc, as on macOS.
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Owner(
        host=platform.node(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        boot=_line_of("/proc/sys/kernel/random/boot_id") or platform.node(),
        namespace=namespace,
        started=_start_of(os.getpid()) or "",
        token=uuid.uuid4().hex,
    )


def is_alive(owner: Owner) -> bool | None:
    """Whether the process runs; None if its number means nothing here (another machine, or another
    container).
    """
    here = this_process()
    if (owner.boot, owner.namespace) != (here.boot, here.namespace):
        return None
    if here.started:
        return _start_of(owner.pid) == owner.started
    # Without /proc only the number can be asked about. Signal 0 is not delivered: kill() just tells
    # whether there is such a process, ESRCH if not.
    try:
        os.kill(owner.pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _start_of(pid: int) -> str | None:
    """When the process began, in ticks since boot; None if it has ended."""
    text = _line_of(f"/proc/{pid}/stat")
    if text is None:
        return None
    # "PID (NAME) STATE ...": the name may hold brackets and spaces, so fields are counted from
    # behind the last bracket on.
    state, *fields = text.rpartition(")")[2].split()
    # States Z and X: the process has ended, and its parent has not asked for its exit code. The
    # start is field 22 of proc(5); STATE is field 3, so fields[0] is field 4.
    return None if state in ("Z", "X") else fields[18]


def _line_of(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None
