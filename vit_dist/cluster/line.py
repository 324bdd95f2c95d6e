"""A line between two hosts: JSON messages over TCP, one a line of text, apart from TensorFlow.

TensorFlow's own connections carry tensors only, and are of no use while one of its calls hangs.
"""

import json
import select
import socket
import time
from collections.abc import Iterable
from typing import Any

from vit_dist.config.errors import ConfigError

Message = dict[str, Any]

_MAX_BYTES = 2**24  # of one message; who sends more is none of ours
_CHUNK = 2**16


class Line:
    """One end of a line.

    `send` and `receive` wait, and are for agreements; `offer` and `next` never wait, and are for
    the thread that must not hang on a host that does.
    """

    def __init__(self, connection: socket.socket):
        # `next` and `offer` must never hang; `send` and `receive` wait in `wait_for`, which has a
        # deadline.
        connection.setblocking(False)
        self._socket = connection
        # Bytes that came and are no whole message yet; bytes that the system has not taken yet.
        self._in, self._out = b"", b""

    def fileno(self) -> int:
        """The socket's number in the system."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def send(self, message: Message, *, deadline: float) -> None:
        """Sends a message, waiting until `time.monotonic()` is `deadline` at most.

        Raises:
          TimeoutError: the other end does not take it.
          ConnectionError: the other end has hung up.
        """
        self._out += _encode(message)
        while self._out:
            self._flush()
            if self._out:
                wait_for(write=[self], deadline=deadline)

    def receive(self, *, deadline: float) -> Message:
        """The next message, waiting until `time.monotonic()` is `deadline` at most.

        Raises:
          TimeoutError: none came.
          ConnectionError: the other end has hung up.
          ConfigError: what came is no message of ours.
        """
        while (message := self.next()) is None:
            wait_for([self], deadline=deadline)
        return message

    def next(self) -> Message | None:
        """The next message if it is there; what came before the other end hung up is there still.

        Raises:
          ConnectionError: the other end has hung up.
          ConfigError: what came is no message of ours.
        """
        # TCP carries bytes and not messages: one recv() may bring half of one, or several.
        while b"\n" not in self._in:
            if not self._fill():
                return None
        text, _, self._in = self._in.partition(b"\n")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ConfigError(f"no message: {text[:100]!r}")
        return message

    def offer(self, message: Message) -> None:
        """Sends a message if the one before has gone out, else drops it.

        Raises:
          ConnectionError: the other end has hung up.
        """
        # What has gone out in part is finished first: the other end reads up to a newline.
        self._out = self._out or _encode(message)
        self._flush()

    def _fill(self) -> bool:
        """Reads what is there; whether something was."""
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        if not data:
            raise ConnectionError("hung up")
        self._in += data
        if len(self._in) > _MAX_BYTES:
            raise ConfigError("a message without end")
        return True

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        self._out = self._out[sent:]


def _encode(message: Message) -> bytes:
    # JSON escapes a newline inside of a text, so the only one ends the message.
    return json.dumps(message, default=str).encode() + b"\n"


def wait_for(read: Iterable[Line] = (), write: Iterable[Line] = (), *, deadline: float) -> None:
    """Returns when a line of `read` has news, or one of `write` takes more.

    Raises:
      TimeoutError: none does before `time.monotonic()` is `deadline`.
    """
    # Not select(): it refuses a process that has more than 1024 files open.
    poll = select.poll()
    for line in read:
        poll.register(line.fileno(), select.POLLIN)
    for line in write:
        poll.register(line.fileno(), select.POLLOUT)
    left = deadline - time.monotonic()
    # poll() also reports, unasked, a line whose other end has hung up: using it then raises.
    if left <= 0 or not poll.poll(1000 * left):
        raise TimeoutError("timed out")
