"""Addresses and numbers in the variables of engines: what they look like, and their short forms."""

import re
from collections.abc import Sequence

from vit_dist.config.errors import ConfigError

# How messages end that refuse an environment: what to do where no other host is meant.
ALONE = "or set strategy.name=local to train on this machine alone"

_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/,\[\]\"']+):(\d{1,5})")
_RANGE = re.compile(r"\[([\d,-]+)\]")  # never an IPv6 address, which has colons


def address_problem(workers: Sequence[str]) -> str | None:
    """Why these cannot be the addresses of the hosts of a run; None if they can."""
    for worker in workers:
        found = _ADDRESS.fullmatch(worker)
        if not found or not 0 < int(found[1]) < 2**16:
            return (
                f"{worker!r} is no address, which is host:port: host1:2222, 10.0.0.1:2222 or, for "
                "IPv6, [fd00::1]:2222"
            )
        try:
            # As Python does before it asks for a name, with a UnicodeError of its own.
            split_address(worker)[0].encode("idna")
        except UnicodeError:
            return (
                f"{worker!r} is no address: between the dots of a name are 1 to 63 characters, "
                "letters, digits and hyphens"
            )
    twice = sorted({worker for worker in workers if workers.count(worker) > 1})
    return f"several hosts have the address {twice[0]}" if twice else None


def with_port(host: str, port: int) -> str:
    """ "host:port", with the brackets that an IPv6 address needs before a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port", without the brackets of IPv6."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def expand_names(text: str) -> list[str]:
    """The names in Slurm's short form: "a[01-02,7],b" is ["a01", "a02", "a7", "b"].

    `scontrol show hostnames` does it as well, but is often missing inside of containers.

    Raises:
      ConfigError: a range that runs backwards, or that has no numbers.
    """
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        bracket = _RANGE.search(part)
        if not bracket:
            names.append(part.strip())
            continue
        before, after = part[: bracket.start()], part[bracket.end() :]
        for piece in bracket[1].split(","):
            numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
            if not numbers or int(numbers[2] or numbers[1]) < int(numbers[1]):
                raise ConfigError(f"{piece!r} in {text!r} is no range of numbers, such as 0-3")
            first, last = numbers[1], numbers[2] or numbers[1]
            for number in range(int(first), int(last) + 1):
                # Leading zeros stay; what follows may have brackets of its own.
                names += expand_names(f"{before}{number:0{len(first)}}{after}")
    return names


def whole_number(text: str | None, name: str) -> int:
    """The value of a variable that holds a number.

    Raises:
      ConfigError: it is not set, or holds something else; names the variable.
    """
    if text is None or not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"{name} must be a whole number from 0 on, got {text!r}")
    return int(text)
