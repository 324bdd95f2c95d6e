"""What was done to images beforehand, by `python -m vit_dist.convert --short_side=N`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.storage.files import read_json

TABLE = "shards.json"  # of a conversion that has ended; written last

FORMATS = ("jpeg", "raw")
# Of the JPEGs that are written. On photographs of 256 pixels it takes two thirds of the bytes of 95
# and is 2 to 3 grey levels off on average, for 95's 2; docs/data_resized.md has the figures.
QUALITY = 90
# How images are reduced: as the op `resize_small` does by default, which is what evaluation pipes
# of the reference systems begin with.
METHOD = "area"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a set was resized.

    Attributes:
      short_side: Pixels of each image's shorter side; images that are not larger keep their size.
      format: "jpeg" or "raw", one of FORMATS.
      quality: Of the JPEGs, 1 to 100; None for raw pixels.
      method: How pixels were averaged.
    """

    short_side: int
    format: str = "jpeg"
    quality: int | None = QUALITY
    method: str = METHOD

    def __str__(self) -> str:
        stored = "raw pixels" if self.format == "raw" else f"JPEG of quality {self.quality}"
        return f"short side {self.short_side} ({self.method}), upright, over white, {stored}"

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON values; `preparation_of` is the way back."""
        return dataclasses.asdict(self)


def make_preparation(
    short_side: int | None, *, quality: int | None = None, format: str | None = None
) -> Preparation | None:
    """Returns what the flags of `vit_dist.convert` ask for; None where nothing is to be resized.

    Raises:
      ConfigError: A value out of range, or flags that do not go together.
    """
    if short_side is None:
        given = [name for name, x in (("quality", quality), ("format", format)) if x is not None]
        if given:
            raise ConfigError(
                f"--{given[0]} goes with --short_side=N alone, which resizes the images: without "
                "it they stay as they are, byte for byte"
            )
        return None
    if short_side < 1:
        raise ConfigError(f"--short_side must be 1 pixel or more, such as 256; got {short_side}")
    format = format or "jpeg"
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} is unknown; allowed: {', '.join(FORMATS)}")
    if format == "raw":
        if quality is not None:
            raise ConfigError(
                "--quality is that of JPEGs, and --format=raw stores pixels: leave one of them out"
            )
        return Preparation(short_side, format, None)
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"--quality must be in 1..100, got {quality}")
    return Preparation(short_side, format, QUALITY if quality is None else quality)


def preparation_of(table: Mapping[str, Any]) -> Preparation | None:
    """Returns what a set's table says of it; None for images as they were."""
    found = table.get("prepared")
    return None if found is None else Preparation(**found)


def read_table(folder: epath.Path, options: str = "") -> dict[str, Any]:
    """What a conversion noted of the shards in a folder.

    Args:
      folder: of a split.
      options: of the command that makes such a folder, for the message.

    Raises:
      DataError: there is no such conversion, or it did not end.
    """
    path = folder / TABLE
    if not path.exists():
        raise DataError(
            f"{path} does not exist: name the folder and the split of a conversion that ended "
            f"(python -m vit_dist.convert{options})"
        )
    remedy = f"remove {path}, and convert again into the same folder"
    table = read_json(path, remedy=remedy)
    if not isinstance(table, dict) or not {"shards", "class_names"} <= set(table):
        raise DataError(f"{path} is damaged (it names no shards and classes): {remedy}")
    return table
