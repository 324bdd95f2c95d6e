"""Which hosts of a list are this machine, and free ports on it."""

import contextlib
import ipaddress
import socket
from collections.abc import Sequence

from vit_dist.cluster.addresses import address_problem, split_address, with_port
from vit_dist.cluster.environment import DEFAULT_PORT
from vit_dist.config.errors import ConfigError


def parse_hosts(text: str) -> list[str]:
    """The addresses of a list such as "a,b:5000,[fd00::1]:2222": host:port each.

    A host without a port gets DEFAULT_PORT.

    Raises:
      ConfigError: an entry is no address, or stands there twice.
    """
    addresses = [_complete(host.strip()) for host in text.split(",")]
    problem = address_problem(addresses)
    if problem:
        raise ConfigError(f"--hosts {text}: {problem}")
    return addresses


def _complete(host: str) -> str:
    with contextlib.suppress(ValueError):  # an IPv6 address without brackets has colons, no port
        return with_port(str(ipaddress.IPv6Address(host)), DEFAULT_PORT)
    has_port = host.rpartition(":")[2].isdigit()
    return host if has_port or not host else f"{host}:{DEFAULT_PORT}"


def own_indices(addresses: Sequence[str]) -> list[int]:
    """The places in the list that are this machine, by its own name or one of its addresses."""
    names = {socket.gethostname().lower(), socket.getfqdn().lower()}
    found = []
    for i, address in enumerate(addresses):
        host, _ = split_address(address)
        if host.lower() in names or _is_own(host):
            found.append(i)
    return found


def _is_own(host: str) -> bool:
    """Whether a program on this machine can listen at that host's address."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:  # no such name, or none yet
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # Linux refuses an address that is not one of its own
            return True
    return False


def free_addresses(count: int) -> list[str]:
    """Addresses of this machine's loopback, with ports at which nobody listens now."""
    with contextlib.ExitStack() as stack:
        # All at once, so that none is given away twice.
        sockets = [
            stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)
        ]
        return [f"localhost:{s.getsockname()[1]}" for s in sockets]
