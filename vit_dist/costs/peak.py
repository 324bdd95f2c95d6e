"""The peak that MFU is measured against: from the table of devices, on a CPU by a product.

CPUs have no row in the table: what one reaches depends on its cores, its vector units and its
clock under load, and clouds rent out shares. So a product of two matrices is timed.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_dist.costs.devices import DEVICES, Device, find_device

# A product of this size takes milliseconds, and its three matrices fit into the caches.
_SIZE = 512
_TRIES = 20
# Bytes of a copy: far more than the caches hold.
_COPY = 2**27


class Peak(NamedTuple):
    """What one device can do.

    Attributes:
      flops: operations per second; None if nobody knows.
      source: where the number is from, for people.
    """

    flops: float | None
    source: str


def known_peak(name: str, dtype: str, devices: Sequence[Device] = DEVICES) -> Peak:
    """The peak of an accelerator by the table.

    Args:
      name: as its driver or its cloud calls it.
      dtype: "float32", "bfloat16" or "float16".
      devices: the table.
    """
    device = find_device(name, devices)
    if device is None:
        return Peak(None, f"{name or 'this device'} is not in the table: no MFU")
    flops = device.peak(dtype)
    if flops is None:
        return Peak(None, f"the table has no {dtype} of {device.name}: no MFU")
    return Peak(flops, f"{device.name}, {dtype}, {flops / 1e12:g} TFLOP/s by the table")


def measure_product(
    *, size: int = _SIZE, tries: int = _TRIES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations per second of a float32 product of this host's CPU: the fastest of some tries."""
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    out = np.empty_like(x)
    seconds = []
    for _ in range(tries):
        began = clock()
        np.matmul(x, x, out=out)
        # At least 1e-9 s: a coarse clock may not have moved.
        seconds.append(max(clock() - began, 1e-9))
    return 2 * size**3 / min(seconds)


def measure_copy(
    *, size: int = _COPY, tries: int = _TRIES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes per second that this host's memory reads and writes: the fastest of some copies.

    Args:
      size: bytes of what is copied; each is read once and written once.
    """
    x, out = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    seconds = []
    for _ in range(tries):
        began = clock()
        np.copyto(out, x)
        seconds.append(max(clock() - began, 1e-9))
    return 2 * size / min(seconds)


class MeasuredPeak:
    """The peak of one of this host's CPU devices, measured by a thread while the run starts.

    It takes a fraction of a second. The fastest product counts, so that what else the host does
    meanwhile hardly matters; where it did matter, the run itself is faster later, and the peak is
    measured once more. Where the run is faster even so, as in bfloat16 on processors that have
    units for it, the peak is not known.

    Args:
      num_devices: of this host, among which its cores are shared.
    """

    def __init__(self, num_devices: int, *, measure: Callable[[], float] = measure_product):
        self._num_devices = num_devices
        self._measure = measure
        self._flops = 0.0
        self._again = False
        self._begin()

    def _begin(self) -> None:
        # A daemon: a run that ends at once does not wait for it.
        self._thread = threading.Thread(target=self._run, name="peak", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._flops = max(self._flops, self._measure() / self._num_devices)

    def wait(self) -> None:
        """Until it is measured."""
        self._thread.join()

    def peak(self, reached: float = 0.0) -> Peak:
        """The peak; unknown until it is measured, and while it is measured again.

        Args:
          reached: operations per second that the device does: more than the peak that was measured
            shows that others had the processor then.
        """
        if self._thread.is_alive():
            return Peak(None, "the peak of this CPU is still being measured")
        if reached > self._flops and not self._again:
            self._again = True
            self._begin()
            return Peak(None, "the run is faster than the peak that was measured: measured again")
        if reached > self._flops:
            return Peak(
                None, "the run is faster than NumPy's product on this CPU, by which MFU goes"
            )
        text = f"CPU, measured float32 product, {self._flops / 1e12:.3g} TFLOP/s a replica"
        return Peak(self._flops, text)
