"""The lines between the program on host 0 of a TPU slice and the worker on each of its hosts.

TensorFlow drives all chips of a slice from one program, through a gRPC server on each host. Over
that connection the program learns little: a call may hang when a host is gone, and a signal or a
notice of maintenance reaches the machine that it is sent to alone. So each worker, beside its
TensorFlow server, keeps a line to the program, over which it beats every second, tells that it was
asked to stop, and learns how the program ended.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from vit_dist.cluster.addresses import split_address
from vit_dist.cluster.agreement import parting
from vit_dist.cluster.line import Line, wait_for
from vit_dist.cluster.preemption import PREEMPTED
from vit_dist.cluster.watchdog import leave
from vit_dist.config.errors import ConfigError, HostLostError

# A worker's line is at this distance from the port of its TensorFlow server.
_LINE_PORT = -10
_BEAT_SECONDS = 1.0
# A worker that beats no more is gone: stopped, or its machine or network. Long, because a machine
# that is overloaded beats late.
_SILENT_SECONDS = 30.0
# After a host is lost, TensorFlow may raise an error in the program, or hang for ever.
_PATIENCE_SECONDS = 15.0
_HELLO_SECONDS = 10.0
_PROGRAM = "program"  # the key by which the program's first message is known
AGAIN = "Start all again, and they go on from the newest checkpoint"

Facts = Mapping[str, str]
_opened = False  # whether this process has, or had, a slice


class Slice:
    """The program's lines to the workers, watched by a thread within a `with`.

    Without hosts it does nothing, for a run that has no slice.

    Args:
      addresses: "host:port" of the TensorFlow server of each host.
      lines: to their workers, in the same order.
      asked: called by the thread with the reason when a worker was asked to stop.

    Attributes:
      stopped: whether the run ends because it was asked to stop; its workers then leave as it does.
    """

    def __init__(
        self, addresses: Sequence[str], lines: Sequence[Line], asked: Callable[[str], None]
    ):
        self.addresses, self._lines, self._asked = tuple(addresses), lines, asked
        self.stopped = False
        now = time.monotonic()
        self._heard = [now for _ in lines]
        self._gone: dict[int, str] = {}  # number of a host -> what happened to it
        self._gone_at: float | None = None  # when the first was found to be gone
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tpu-slice", daemon=True)

    def __enter__(self) -> "Slice":
        if self._lines:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._lines:
            self._over.set()
            self._thread.join()
        for line in self._lines:
            # A worker ends as the program did. It may be gone already.
            with contextlib.suppress(OSError):
                line.send(self._parting(error), deadline=time.monotonic() + 5)
            line.close()

    def _parting(self, error: BaseException | None) -> dict[str, Any]:
        return parting(error) if error or not self.stopped else {"left": "", "code": PREEMPTED}

    def lost(self, seconds: float = 5.0) -> str | None:
        """Which host is gone, and why: "TPU host 1 (10.0.0.3:8470): its worker is gone".

        Args:
          seconds: how long to wait for a host to be found gone.
        """
        deadline = time.monotonic() + (seconds if self._lines else 0.0)
        while not self._gone and time.monotonic() < deadline:
            time.sleep(0.1)
        found = [f"{_name(i, self.addresses)}: {why}" for i, why in sorted(self._gone.items())]
        return "; ".join(found) or None

    def _watch(self) -> None:
        while not self._over.is_set():
            open_lines = [line for i, line in enumerate(self._lines) if i not in self._gone]
            with contextlib.suppress(TimeoutError):
                wait_for(open_lines, deadline=time.monotonic() + 0.5)
            now = time.monotonic()
            for i, line in enumerate(self._lines):
                if i not in self._gone:
                    self._listen(i, line, now)
            # The first loss starts the clock. While it runs, an error of TensorFlow's may still end
            # the program in order, from the main thread; then this thread ends the process.
            self._gone_at = self._gone_at or (now if self._gone else None)
            if self._gone_at is not None and now > self._gone_at + _PATIENCE_SECONDS:
                leave(f"lost {self.lost()}. {AGAIN}")

    def _listen(self, i: int, line: Line, now: float) -> None:
        try:
            while (message := line.next()) is not None:
                self._heard[i] = now
                if message.get("asked"):
                    self._asked(f"{message['asked']} on {_name(i, self.addresses)}")
        except (OSError, ValueError) as error:
            self._gone[i] = f"its worker is gone ({error}); worker.log there says why"
        if now > self._heard[i] + _SILENT_SECONDS:
            self._gone[i] = f"silent for {now - self._heard[i]:.0f} s"


def was_opened() -> bool:
    """Whether TensorFlow of this process was connected to other hosts, and would wait for them."""
    return _opened


def open_slice(
    addresses: Sequence[str],
    *,
    facts: Facts,
    timeout_seconds: float,
    asked: Callable[[str], None],
) -> Slice:
    """The program's part: calls the worker of each host, and returns when all have answered.

    Args:
      addresses: "host:port" of the TensorFlow server of each host; none for a run without a slice.
      facts: what the workers must have in common with this process: versions.
      timeout_seconds: how long to wait for workers that are not there yet.
      asked: see Slice.

    Raises:
      HostLostError: names the hosts whose worker did not come.
      ConfigError: a worker has other facts.
    """
    global _opened
    _opened = _opened or bool(addresses)
    deadline = time.monotonic() + timeout_seconds
    lines: dict[int, Line] = {}
    with contextlib.ExitStack() as failed:
        while missing := [i for i in range(len(addresses)) if i not in lines]:
            if time.monotonic() > deadline:
                names = ", ".join(_name(i, addresses) for i in missing)
                raise HostLostError(
                    f"waited {timeout_seconds:g} s in vain for the worker of {names}: start python "
                    "-m vit_dist.tpu_worker there, as launch/tpu_vm.sh does (worker.log), or raise "
                    "strategy.timeout_seconds"
                )
            for i in missing:
                line = _call(addresses[i])
                if line is not None:
                    lines[i] = failed.enter_context(contextlib.closing(line))
            if len(lines) < len(addresses):
                time.sleep(0.2)
        for i, line in lines.items():
            name = _name(i, addresses)
            _check_facts(name, facts, _facts_of(line, name))
        failed.pop_all()  # all are there and alike: the lines stay
    return Slice(addresses, [lines[i] for i in range(len(addresses))], asked)


def _call(address: str) -> Line | None:
    """A line to the worker of a host; None if it is not there yet."""
    host, port = split_address(address)
    try:
        line = Line(socket.create_connection((host, line_port(port)), timeout=5))
        line.send({_PROGRAM: True}, deadline=time.monotonic() + 5)
        return line
    except OSError as error:
        text = "the TPU worker of %s is not there yet: %s"
        logging.log_every_n_seconds(logging.INFO, text, 60, address, error)
        return None


def _facts_of(line: Line, name: str) -> Facts:
    try:
        return dict(line.receive(deadline=time.monotonic() + _HELLO_SECONDS)["facts"])
    except (OSError, ValueError, KeyError) as error:
        raise HostLostError(f"{name} does not answer as a worker of ours: {error}") from None


def _check_facts(name: str, ours: Facts, others: Facts) -> None:
    # A program of another version may tell facts that this one does not know.
    for key in sorted({*ours, *others}):
        here, there = ours.get(key, "absent"), others.get(key, "absent")
        if here != there:
            raise ConfigError(
                f"the hosts differ: {key} is {here} on host 0 but {there} on {name}: install the "
                "same versions on all, and start all again"
            )


def _name(i: int, addresses: Sequence[str]) -> str:
    return f"TPU host {i} ({addresses[i]})"


def attend(
    server: socket.socket, *, facts: Facts, asked: Callable[[], str | None], patience: float
) -> int:
    """The worker's part: waits for the program, and returns the exit code when it has ended.

    Args:
      server: listens at `line_port`.
      facts: see open_slice.
      asked: why this worker was asked to stop; None if it was not.
      patience: seconds to wait for the program.
    """
    line = _wait_for_program(server, asked, time.monotonic() + patience)
    if line is None and not asked():
        raise HostLostError(
            f"no program has called within {patience:g} s: start python -m vit_dist.train on host "
            "0 of the slice"
        )
    if line is None:
        logging.info("%s: the program was not there yet", asked())
        return PREEMPTED
    with contextlib.closing(line):
        try:
            line.send({"facts": dict(facts)}, deadline=time.monotonic() + _HELLO_SECONDS)
            while True:
                # The beat. It is dropped, without waiting, if the one before has not gone out yet.
                line.offer({"asked": asked()})
                with contextlib.suppress(TimeoutError):
                    # Usually nothing comes: the timeout makes this loop go round once a beat.
                    message = line.receive(deadline=time.monotonic() + _BEAT_SECONDS)
                    if "left" in message:
                        logging.info("the program has ended: %s", message["left"] or "done")
                        return int(message["code"])
        except (OSError, ValueError) as error:
            raise HostLostError(f"lost the program on host 0: {error}; its own log says why") from (
                None
            )


def _wait_for_program(
    server: socket.socket, asked: Callable[[], str | None], deadline: float
) -> Line | None:
    while time.monotonic() < deadline and not asked():
        server.settimeout(_BEAT_SECONDS)
        # Whoever else calls, such as a port scanner, hangs up or sends something else.
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as failed:
            line = failed.enter_context(contextlib.closing(Line(server.accept()[0])))
            if _PROGRAM in line.receive(deadline=time.monotonic() + 5):
                failed.pop_all()
                return line
    return None


def line_port(port: int) -> int:
    """The port of a worker's line, from that of its TensorFlow server."""
    return port + _LINE_PORT
