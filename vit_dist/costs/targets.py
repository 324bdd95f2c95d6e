"""Machines by the names that people and clouds give them: v5e-8, 8xA100-80GB, cpu."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from vit_dist.config.errors import ConfigError
from vit_dist.costs.devices import DEVICES, Device, find_device
from vit_dist.costs.peak import measure_copy, measure_product

# Google counts TensorCores in the names of these, two for each chip; chips in those of v5e and v6e.
_TWO_CORES = ("v4", "v5p")
# Chips of one host: of v5e and v6e up to eight are one machine, larger slices have hosts of four.
_CHIPS_OF_HOST, _CHIPS_OF_ONE_HOST = 4, 8
_GB = 1e9
# [HOSTS x] [COUNT x] CARD [:COUNT], the last as SkyPilot writes it.
_CARDS = re.compile(
    r"(?:(\d+) ?x ?(?=\d+ ?x))?(?:(\d+) ?x ?)?(.*?)(?::(\d+))?", re.IGNORECASE | re.DOTALL
)
# What may stand before a card's name, and behind it.
_WORDS = re.compile(
    r"^(?:(?:nvidia|tesla|geforce)[ -])+|(?:[ -](?:\d+ ?gb|pcie|sxm\d?|hbm\de?))+$", re.IGNORECASE
)
EXAMPLES = "v5e-8, v4-32, v6e-16, 8xA100-80GB, 8xH100, 2x8xH100, 1xRTX4090, cpu, 2xcpu"


class Target(NamedTuple):
    """Devices that a training would run on.

    Attributes:
      name: as it was given.
      kind: "TPU", "GPU" or "CPU".
      device: one of them; a CPU's was measured on this machine.
      num_devices: how many.
      hosts: machines that they are in.
      network: what a host of several can send to others, GB/s in each direction; None for TPUs,
        whose links join all chips of a slice, for one host, and where nobody tells.
    """

    name: str
    kind: str
    device: Device
    num_devices: int
    hosts: int
    network: float | None = None

    @property
    def is_slice(self) -> bool:
        """Whether it is a TPU slice of several hosts, whose TensorFlow runs no Python."""
        return self.kind == "TPU" and self.hosts > 1

    @property
    def link(self) -> float | None:
        """GB/s in each direction between neighbours of a ring of all devices; None if unknown.

        A ring is as fast as its slowest link. Its neighbours on two hosts have the hosts' network
        between them.
        """
        # The table's links are both directions together.
        inside = self.device.link and self.device.link / 2
        if self.hosts == 1 or self.kind == "TPU":
            return inside
        return self.network and min(self.network, inside or self.network)


def parse_target(
    text: str, devices: Sequence[Device] = DEVICES, *, network: float | None = None
) -> Target:
    """The machine of a name such as "v5e-8".

    Args:
      text: a TPU slice as Google names it (v5e-8, v5litepod-8), or NxCARD (8xH100; one without a
        number) or CARD:N, or HOSTSxNxCARD (2x8xH100), or cpu: the processor of this machine, shared
        by N replicas in Nxcpu.
      devices: the table.
      network: of each of several hosts of cards, Gbit/s in each direction.

    Raises:
      ConfigError: an unknown device, a number that cannot be, or a network where there is none.
    """
    found = _parse(text, devices)
    if network is None:
        return found
    if not 0 < network < math.inf:
        raise ConfigError(f"--network must be above 0 Gbit/s, got {network}")
    if found.kind != "GPU" or found.hosts == 1:
        raise ConfigError(
            f"--network is what several hosts of cards have between them, such as 2x8xH100; "
            f"--target={text!r} has none: leave it out"
        )
    return found._replace(network=network / 8)


def _parse(text: str, devices: Sequence[Device]) -> Target:
    slice_ = re.fullmatch(r"(?:tpu[- ]?)?(v\d+[a-z]*)-(\d+)", text, re.IGNORECASE)
    if slice_:
        return _slice(text, slice_[1].lower(), int(slice_[2]), devices)
    several, before, name, behind = _CARDS.fullmatch(text).groups()  # type: ignore[union-attr]
    if before and behind:
        raise ConfigError(
            f"--target={text!r} counts twice: give 8xH100 or H100:8, and 2x8xH100 for two machines"
        )
    hosts, count = int(several or 1), int(before or behind or 1)
    if not count or not hosts:
        raise ConfigError(f"--target={text!r} has no device; give such as {EXAMPLES}")
    if name.lower() == "cpu" and several is None:
        return Target(text, "CPU", _this_cpu(count), count, hosts=1)
    # Cards are written with and without the space of the table: RTX4090.
    name = re.sub(r"(?i)\brtx[- ]?(?=\d)", "RTX ", name)
    device = find_device(name, devices) if name else None
    if device is None or device.name.startswith("TPU") or not _is_named(device, name):
        raise ConfigError(_unknown(text, devices))
    return Target(text, "GPU", device, hosts * count, hosts)


def _is_named(device: Device, name: str) -> bool:
    """Whether `name` is a card's, with nothing else around it, such as a count in another form.

    `find_device` searches, as drivers put words around a card's name.
    """
    bare = _WORDS.sub("", name)
    if bare.lower().replace("-", " ") == _WORDS.sub("", device.name).lower().replace("-", " "):
        return True
    # A row of a file of one's own; the regexes of the table's rows are made for drivers' names.
    known = device in DEVICES
    return not known and any(re.fullmatch(device.match, x, re.IGNORECASE) for x in (name, bare))


def _slice(text: str, generation: str, number: int, devices: Sequence[Device]) -> Target:
    generation = {"v5litepod": "v5e"}.get(generation, generation)
    device = find_device(f"TPU {generation}", devices)
    if device is None:
        raise ConfigError(_unknown(text, devices))
    if generation in _TWO_CORES:
        if number < 8 or number % 8:
            raise ConfigError(
                f"--target={text!r}: {generation} counts TensorCores, two for each of a host's "
                f"four chips: {generation}-8, {generation}-16, {generation}-24, ..."
            )
        chips = number // 2
        return Target(text, "TPU", device, chips, hosts=chips // _CHIPS_OF_HOST)
    if number not in (1, 4, 8) and (number < 8 or number % _CHIPS_OF_HOST):
        raise ConfigError(
            f"--target={text!r}: {generation} has slices of 1, 4, 8, 16, 32, ... chips"
        )
    hosts = 1 if number <= _CHIPS_OF_ONE_HOST else number // _CHIPS_OF_HOST
    return Target(text, "TPU", device, number, hosts)


def _unknown(text: str, devices: Sequence[Device]) -> str:
    known = ", ".join(device.name for device in devices)
    return (
        f"--target={text!r} is unknown; give such as {EXAMPLES}. Known devices: {known}; "
        "--config.monitor.device_file=FILE adds others"
    )


def _this_cpu(replicas: int) -> Device:
    """This machine's processor as the table would have it, for one of some replicas; measured."""
    flops = measure_product() / 1e12 / replicas
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GB / replicas
    bandwidth = measure_copy() / _GB / replicas
    # bfloat16 is computed in float32 where the processor has no units for it; a measurement of
    # those is not made.
    source = "measured on this machine: a product of matrices, a copy of memory"
    return Device(
        "this CPU", "cpu", flops, flops, None, flops, memory, bandwidth, bandwidth, source
    )
