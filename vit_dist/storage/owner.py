"""Who holds a lock: a process, named so that others can tell whether it still runs."""

import dataclasses
import errno
import json
import os
import platform
import time
import uuid

# TensorFlow remembers the sizes of a bucket's objects for some seconds. With one size for all, an
# object that another host has overwritten meanwhile is still read to its end.
_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    Attributes:
      host, pid, since: for people.
      boot: names one boot of one kernel, so that two containers of a machine are known as such.
      namespace: of the process number, which repeats from container to container.
      started: clock ticks from boot to the start of the process; a process that got the number of
        one that has ended differs in this.
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
    """The owner that `to_bytes` wrote; None for anything else, such as a file left empty."""
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def this_process() -> Owner:
    """This process as an owner, with another token at each call."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
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
    """Whether the process runs; None where its number means nothing to this process."""
    here = this_process()
    if (owner.boot, owner.namespace) != (here.boot, here.namespace):
        return None
    if here.started:
        return _start_of(owner.pid) == owner.started
    try:  # no /proc: by the number alone
        os.kill(owner.pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _start_of(pid: int) -> str | None:
    """When the process began, in ticks since boot; None if it has ended."""
    text = _line_of(f"/proc/{pid}/stat")
    if text is None:
        return None
    # The program's name comes before the state, in brackets, and may hold brackets and spaces.
    state, *fields = text.rpartition(")")[2].split()
    # Z and X: it has ended, and its parent has not asked how. Field 22 of proc(5) is the start.
    return None if state in ("Z", "X") else fields[18]


def _line_of(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None
