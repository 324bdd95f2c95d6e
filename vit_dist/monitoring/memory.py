"""How much memory this process takes, on the host and on its devices."""

import os
from collections.abc import Sequence

import tensorflow as tf

_GIB = 2**30
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Reads what memory is taken; reading takes some microseconds and waits for no device.

    Args:
      devices: names of logical devices, such as "GPU:0"; those that do not tell are left out.
    """

    def __init__(self, devices: Sequence[str]):
        self._devices = [name for name in devices if _info(name) is not None]

    def read(self) -> dict[str, float]:
        """GiB: "memory/host", and of the fullest device "memory/device", "memory/device_peak"."""
        found: dict[str, float] = {}
        resident = _resident()
        if resident is not None:
            found["memory/host"] = resident / _GIB
        infos = [info for info in map(_info, self._devices) if info is not None]
        # The fullest is the one that will run out; a curve for each of 8 would say the same.
        for key, name in (("current", "device"), ("peak", "device_peak")):
            if infos:
                found[f"memory/{name}"] = max(info[key] for info in infos) / _GIB
        return found


def _info(device: str) -> dict[str, int] | None:
    # ValueError: CPUs have no allocator that counts, and others may have none either.
    try:
        return tf.config.experimental.get_memory_info(device)
    except (ValueError, tf.errors.OpError):
        return None


def _resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not tell."""
    # The second number of statm is the resident set, in pages.
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return None
