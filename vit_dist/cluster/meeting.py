"""How the hosts of a run meet before TensorFlow starts.

TensorFlow waits for an absent host for ever, deaf to signals. So the hosts first call worker 0, the
chief, at the address at which its TensorFlow will listen later, and each keeps its line to the
chief for as long as the run lasts.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from absl import logging

from vit_dist.cluster.addresses import split_address
from vit_dist.cluster.agreement import Meeting
from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.line import Line, Message
from vit_dist.config.errors import HostLostError

_CALL = "vit_dist"  # the key by which the first message of a host is known
_CONNECT_SECONDS = 10.0  # a name may still lead to an address that nobody has any more
_PORT_SECONDS = 60.0  # a chief that has just ended may hold its port for so long


def meet(cluster: Cluster | None, *, timeout_seconds: float) -> Meeting:
    """Returns when all hosts have called, each with its lines; at once for a run of one host.

    The chief listens at its address before TensorFlow does. The others call it, and it lets all go
    on when the last has called. Then each host makes sure that it can find all others by name.

    Args:
      cluster: see environment.find_cluster.
      timeout_seconds: how long to wait, here and at each agreement.

    Raises:
      HostLostError: names the hosts that did not come, or whose names do not resolve.
    """
    if cluster is None or len(cluster.workers) == 1:
        return Meeting(cluster, {}, timeout_seconds=timeout_seconds)
    name, count = cluster.name(cluster.index), len(cluster.workers)
    logging.info("%s says that this is %s, of %d hosts", cluster.engine, name, count)
    deadline = time.monotonic() + timeout_seconds
    wait = _wait_for_chief if cluster.index else _wait_for_others
    try:
        lines = wait(cluster, deadline)
    except TimeoutError as error:
        raise HostLostError(
            f"worker {cluster.index} waited {timeout_seconds:g} s in vain for {error}: start all "
            f"with the same hosts in the same order ({cluster.engine}), or raise "
            "strategy.timeout_seconds"
        ) from None
    with contextlib.ExitStack() as failed:
        meeting = failed.enter_context(Meeting(cluster, lines, timeout_seconds=timeout_seconds))
        # By an error in here the meeting ends, which tells it to the other hosts.
        _wait_for_names(cluster, deadline)
        failed.pop_all()
    return meeting


def _wait_for_names(cluster: Cluster, deadline: float) -> None:
    """Returns once the names of all hosts resolve here.

    Those of a headless service of Kubernetes appear when their pods do, and a name server may
    remember for half a minute that one was not there. TensorFlow, which connects later, would not
    say which name it misses.

    Raises:
      HostLostError: a name does not resolve.
    """
    for index, worker in enumerate(cluster.workers):
        host, port = split_address(worker)
        while True:
            try:
                socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise HostLostError(
                        f"worker {cluster.index} cannot find {cluster.name(index)}, which has "
                        f"called: its name does not resolve here ({error.strerror}). Give "
                        f"addresses that all hosts know ({cluster.engine})"
                    ) from None
            time.sleep(0.5)


def _wait_for_others(cluster: Cluster, deadline: float) -> dict[int, Line]:
    """The chief's part. Raises TimeoutError with the names of those that did not call."""
    lines: dict[int, Line] = {}
    expected = range(1, len(cluster.workers))
    strangers: list[str] = []
    with contextlib.ExitStack() as failed, listen(cluster, deadline) as server:
        failed.callback(_close, lines)
        while missing := [i for i in expected if i not in lines]:
            left = deadline - time.monotonic()
            if left <= 0:
                names = ", ".join(cluster.name(i) for i in missing)
                other = f" (called by others: {strangers[-1]})" if strangers else ""
                raise TimeoutError(names + other)
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):  # nobody called: the loop says who is missing
                line = Line(server.accept()[0])
                hello = _hello(line)
                # A host of another run that calls here by mistake has another list of hosts.
                if hello.get(_CALL) == list(cluster.workers) and hello.get("index") in expected:
                    if hello["index"] in lines:  # the host has ended since, and was started again
                        lines[hello["index"]].close()
                    lines[hello["index"]] = line
                    continue
                if _CALL in hello:
                    strangers.append(f"worker {hello.get('index')} of {hello[_CALL]}")
                line.close()
        failed.pop_all()  # nobody is missing: the lines stay
    for line in lines.values():
        # A host that is gone again is noticed at the agreement.
        with contextlib.suppress(OSError):
            line.send({"go": True}, deadline=time.monotonic() + 5)
    return lines


def _close(lines: dict[int, Line]) -> None:
    for line in lines.values():
        line.close()


def _hello(line: Line) -> Message:
    """Who has called; empty if it does not say so at once, as a port scanner would not."""
    try:
        return line.receive(deadline=time.monotonic() + 5)
    except (OSError, ValueError):
        return {}


def _wait_for_chief(cluster: Cluster, deadline: float) -> dict[int, Line]:
    """Every other host's part. Raises TimeoutError with the chief's name if it does not answer."""
    with listen(cluster, deadline):  # is this host's own port free for TensorFlow?
        pass
    host, port = split_address(cluster.workers[0])
    hello = {_CALL: list(cluster.workers), "index": cluster.index}
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.ExitStack() as failed:
            try:
                line = Line(connect(host, port, min(left, _CONNECT_SECONDS)))
                failed.callback(line.close)
                line.send(hello, deadline=deadline)
                if "go" in line.receive(deadline=deadline):
                    failed.pop_all()
                    return {0: line}
            except (OSError, ValueError) as error:
                text = "worker 0 is not there yet: %s"
                logging.log_every_n_seconds(logging.INFO, text, 60, error)
        time.sleep(0.2)
    raise TimeoutError(cluster.name(0))


@contextlib.contextmanager
def listen(cluster: Cluster, deadline: float) -> Iterator[socket.socket]:
    """Listens at this host's own port; waits until `time.monotonic()` is `deadline` at most for it.

    Raises:
      HostLostError: another process has the port, and keeps it.
    """
    _, port = split_address(cluster.workers[cluster.index])
    give_up = min(deadline, time.monotonic() + _PORT_SECONDS)
    while True:
        try:
            server = _make_server(port)
            break
        except OSError as error:
            if time.monotonic() > give_up:
                reason = os.strerror(error.errno or 0)
                raise HostLostError(
                    f"worker {cluster.index} cannot listen at port {port} ({reason}): end the "
                    "process that does (an earlier run?), or give the hosts other ports"
                ) from None
        time.sleep(0.2)
    with server:
        yield server


def _make_server(port: int) -> socket.socket:
    # As TensorFlow's server: for IPv4 and IPv6 alike, where the machine has both.
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
    return socket.create_server(("", port), backlog=128)


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection whose own port does not stand in the way of a server that wants it later.

    The system chooses that port, and on one machine it may be another worker's.
    """
    error: OSError = ConnectionError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as failure:
            connection.close()
            error = failure
    raise error
