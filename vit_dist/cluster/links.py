"""How well each host of a run reaches each other one, measured before TensorFlow starts.

TensorFlow's collectives go from any host to any other, while a meeting needs lines to the chief
only. So a firewall between two hosts that are no chiefs shows here, and else in a run that hangs.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from vit_dist.cluster.addresses import split_address
from vit_dist.cluster.agreement import Meeting
from vit_dist.cluster.meeting import connect, listen
from vit_dist.config.errors import HostLostError

_LENGTH = struct.Struct("!Q")  # before each message: its number of bytes
_ROUND_TRIPS = 20
_CHUNK = 2**20
_SECONDS = 20.0  # for one host to answer


class Link(NamedTuple):
    """What one host finds about another.

    Attributes:
      host: the other host's number.
      seconds: the shortest of some round trips.
      rate: bytes per second of a long message, while all hosts send.
      wrong: why there is no link, "" where there is one.
    """

    host: int
    seconds: float = 0.0
    rate: float = 0.0
    wrong: str = ""


def measure_links(meeting: Meeting, *, timeout_seconds: float, num_bytes: int) -> list[Link]:
    """This host's links to all others; all hosts call it together.

    Args:
      meeting: of the hosts; their lines keep them in step.
      timeout_seconds: for this host's port to be free.
      num_bytes: length of the long message.

    Raises:
      HostLostError: another process has this host's port, or a host has left.
    """
    cluster = meeting.cluster
    if cluster is None or not meeting.lines:
        return []
    count, deaf = len(cluster.workers), None
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(listen(cluster, time.monotonic() + timeout_seconds))
            stack.enter_context(_answering(server))
        # The other hosts go through the same two gatherings, and must not wait in one for ever.
        except HostLostError as error:
            deaf = error
        meeting.gather("listening")
        # Each begins with its neighbour, so that not all ask one host at a time.
        others = [(meeting.index + i) % count for i in range(1, count)]
        links = [_measure(i, cluster.workers[i], num_bytes) for i in others]
        meeting.gather("measured")
    if deaf is not None:
        raise deaf
    return sorted(links)


def why_unreachable(address: str, error: OSError) -> str:
    """What an error in connecting says about an address, and what to look at."""
    if isinstance(error, socket.gaierror):
        return f"the name in {address} does not resolve here: give addresses that all hosts know"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens at {address}: the host is there, its process is not"
    if isinstance(error, TimeoutError):
        return f"no answer from {address} within {_SECONDS:g} s: a firewall, or another network"
    return f"{address}: {error.strerror or error}"


def _measure(host: int, address: str, num_bytes: int) -> Link:
    try:
        with connect(*split_address(address), _SECONDS) as connection:
            # Else the system may hold back a short message until the one before is acknowledged,
            # and the round trips would measure that.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = [_ask(connection, 1) for _ in range(_ROUND_TRIPS)]
            # The shortest trip: what the others take longer is other work of these machines.
            return Link(host, seconds=min(trips), rate=num_bytes / _ask(connection, num_bytes))
    except OSError as error:
        return Link(host, wrong=why_unreachable(address, error))


def _ask(connection: socket.socket, num_bytes: int) -> float:
    """Seconds until a message of so many bytes has been answered."""
    began = time.monotonic()
    connection.sendall(_LENGTH.pack(num_bytes))
    chunk = bytes(min(num_bytes, _CHUNK))
    for start in range(0, num_bytes, _CHUNK):
        connection.sendall(chunk[: num_bytes - start])
    if not connection.recv(1):
        raise ConnectionError("it hung up")
    return time.monotonic() - began


@contextlib.contextmanager
def _answering(server: socket.socket) -> Iterator[None]:
    """Within it every caller is answered, each by a thread of its own."""
    over = threading.Event()

    def accept() -> None:
        # An Event does not wake a thread out of accept(), so it looks at `over` in between.
        server.settimeout(0.2)
        while not over.is_set():
            with contextlib.suppress(OSError):
                connection = server.accept()[0]
                threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, name="links")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(_SECONDS)
        while len(head := b"".join(_receive(connection, _LENGTH.size))) == _LENGTH.size:
            (num_bytes,) = _LENGTH.unpack(head)
            if sum(map(len, _receive(connection, num_bytes))) < num_bytes:
                return
            connection.sendall(b"k")


def _receive(connection: socket.socket, num_bytes: int) -> Iterator[bytes]:
    """So many bytes as they come, in pieces; fewer where the other side hangs up before."""
    # No MSG_WAITALL: on a socket with a timeout it returns what is there, as such a socket does not
    # block.
    while num_bytes and (piece := connection.recv(min(num_bytes, _CHUNK))):
        yield piece
        num_bytes -= len(piece)
