"""What devices can do: one table, which a user's file extends.

Numbers are those of the makers, dense (NVIDIA's sheets often tell twice as much, for sparse
matrices), at the boost clock. A card that is cooled or fed worse reaches less.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_dist.config.errors import ConfigError


class Device(NamedTuple):
    """One kind of device; for a TPU, a chip.

    Attributes:
      name: for people.
      match: regex of the name that the driver or the cloud tells, whatever the case.
      bfloat16, float16: peak of matrix products in TFLOP/s; None where it has no units for them.
      tf32: peak of float32 products with 10 bits of mantissa, which TensorFlow takes where the card
        has them; None where it has none.
      float32: peak of float32 products. A TPU computes these in one pass of bfloat16.
      memory: GB, of 1e9 bytes.
      bandwidth: of that memory, GB/s.
      link: to other devices, both directions together, GB/s; PCI Express where there is no other.
      source: where the numbers are from.
    """

    name: str
    match: str
    bfloat16: float | None
    float16: float | None
    tf32: float | None
    float32: float | None
    memory: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    source: str = ""

    def peak(self, dtype: str) -> float | None:
        """Operations per second of matrix products, as TensorFlow runs them at this precision.

        Args:
          dtype: "float32", "bfloat16" or "float16".

        Returns:
          None where the table has no number.
        """
        chosen = getattr(self, dtype)
        if dtype == "float32" and self.tf32 is not None:
            chosen = self.tf32
        return None if chosen is None else chosen * 1e12


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions/"
_AMPERE = "NVIDIA A100 datasheet, " + _NVIDIA + "Data-Center/a100/pdf/"
_VOLTA = "NVIDIA V100 datasheet, the SXM2 card"
# Cards for PCI Express compute less.
_SXM = "v100(?!.*(?:pcie|fhhl))"
_H200, _B200 = "NVIDIA H200 datasheet", "NVIDIA DGX B200 datasheet"
_HOPPER = "NVIDIA H100 datasheet; sparse numbers halved"
_GEFORCE = "NVIDIA's white paper of the architecture, appendix; 16 bits with float32 sums"


def _card(name: str, gigabytes: int) -> str:
    """A regex of names of a whole card: no NVL, no MIG slice, and no other size of memory."""
    return rf"^(?!.*(?:nvl|\bmig\b|\b(?!{gigabytes} ?gb)\d+ ?gb)).*\b{name}\b"


# TFLOP/s of bfloat16, float16, TF32, float32; then GB, GB/s, GB/s. Where a maker sells other cards
# by nearly the same name (L40, RTX 4090 Laptop, H100 NVL, V100 for PCI Express), the regex leaves
# them out: no MFU is better than a wrong one.
DEVICES: tuple[Device, ...] = (
    Device("TPU v4", r"tpu.*v4", 275, None, None, 275, 34.4, 1228, 600, _TPU + "v4"),
    Device("TPU v5e", r"tpu.*v5(e|.?lite)", 197, None, None, 197, 17.2, 819, 400, _TPU + "v5e"),
    Device("TPU v5p", r"tpu.*v5p", 459, None, None, 459, 102, 2765, 1200, _TPU + "v5p"),
    Device("TPU v6e", r"tpu.*v6", 918, None, None, 918, 34.4, 1638, 800, _TPU + "v6e"),
    Device("A100 40 GB", _card("a100", 40), 312, 312, 156, 19.5, 42.9, 1555, 600, _AMPERE),
    Device("A100 80 GB", _card("a100.*80gb", 80), 312, 312, 156, 19.5, 85.9, 2039, 600, _AMPERE),
    Device("H100", _card("h100", 80), 989.4, 989.4, 494.7, 66.9, 85.9, 3350, 900, _HOPPER),
    Device("H100 PCIe", _card("h100.*pcie", 80), 756, 756, 378, 51.2, 85.9, 2039, 600, _HOPPER),
    Device("H200", _card("h200", 141), 989.4, 989.4, 494.7, 66.9, 151, 4800, 900, _H200),
    Device("B200", _card("b200", 180), 2250, 2250, 1125, 75, 193, 8000, 1800, _B200),
    Device("L4", _card("l4", 24), 121, 121, 60, 30.3, 25.8, 300, 64, "NVIDIA L4 datasheet"),
    # No bfloat16 before Ampere: TensorFlow computes it in float32 there.
    Device("T4", _card("t4", 16), None, 65, None, 8.1, 17.2, 320, 32, "NVIDIA T4 datasheet"),
    Device("V100 16 GB", _card(_SXM, 16), None, 125, None, 15.7, 17.2, 900, 300, _VOLTA),
    Device("V100 32 GB", _card(_SXM + ".*32gb", 32), None, 125, None, 15.7, 34.4, 900, 300, _VOLTA),
    Device("RTX 3090", r"rtx 3090$", 71, 71, 35.6, 35.6, 25.8, 936, 64, _GEFORCE),
    Device("RTX 4090", r"rtx 4090$", 165.2, 165.2, 82.6, 82.6, 25.8, 1008, 64, _GEFORCE),
    Device("RTX 5090", r"rtx 5090$", 209.5, 209.5, 104.8, 104.8, 34.2, 1792, 128, _GEFORCE),
)

_NUMBERS = ("bfloat16", "float16", "tf32", "float32", "memory", "bandwidth", "link")
_EXAMPLE = '{"My card": {"match": "my card", "bfloat16": 200, "float32": 50}}'


def find_device(name: str, devices: Sequence[Device] = DEVICES) -> Device | None:
    """The row of the table for a device that calls itself `name`; None if there is none."""
    found = [device for device in devices if re.search(device.match, name, re.IGNORECASE)]
    # Special rows come behind general ones, and those of a user's file, which may correct the
    # table, behind all others.
    return found[-1] if found else None


def read_devices(path: str) -> tuple[Device, ...]:
    """The table, extended and corrected by a file: JSON or TOML, name -> fields of `Device`.

    "match" is a regex and required; numbers have the units of `Device`; one that is left
    out is unknown.

    Raises:
      ConfigError: the file cannot be read, or is something else.
    """
    try:
        # Not by pathlib, which would raise for the home of a user that there is none of.
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config.monitor.device_file {path} cannot be read: {error}") from None
    try:
        rows = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    # TOMLDecodeError and JSONDecodeError are ValueErrors.
    except ValueError as error:
        kind = "TOML" if path.endswith(".toml") else "JSON"
        raise ConfigError(f"config.monitor.device_file {path} is no {kind}: {error}") from None
    if not isinstance(rows, Mapping):
        raise ConfigError(f"{path} must map names of devices to fields, such as {_EXAMPLE}")
    return (*DEVICES, *(_device(path, name, fields) for name, fields in rows.items()))


def _device(path: str, name: str, fields: Any) -> Device:
    where = f"{path}: {name!r}"
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where} must have fields, such as {_EXAMPLE}")
    unknown = sorted(set(fields) - {"match", "source", *_NUMBERS})
    if unknown:
        known = ", ".join(("match", *_NUMBERS, "source"))
        raise ConfigError(f"{where} has the unknown field {unknown[0]!r}; allowed: {known}")
    match = fields.get("match")
    if not (isinstance(match, str) and match):
        raise ConfigError(f"{where} needs 'match', a regex of the device's name, got {match!r}")
    try:
        re.compile(match)
    except re.error as error:
        raise ConfigError(
            f"{where} needs 'match', a regex of the device's name, got {match!r} ({error})"
        ) from None
    numbers: dict[str, float | None] = dict.fromkeys(_NUMBERS)
    for key in _NUMBERS:
        value = fields.get(key)
        if value is None:
            continue
        # A bool is an int to Python; NaN fails the comparison.
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{where}: {key} must be a number above 0, got {value!r}")
        numbers[key] = float(value)
    source = str(fields.get("source", path))
    return Device(name, match, **numbers, source=source)
