"""Where a run keeps its checkpoints, and which is the newest whole one, without TensorFlow.

`checkpoint.py` writes and opens them. This is for a process that only watches over a run: it must
not spend seconds, memory or a device on importing TensorFlow.
"""

import json
import os
import re
import zlib
from pathlib import Path

FOLDER = "checkpoints"  # below the workdir
STATE, MANIFEST = "state.safetensors", "manifest.json"
STEP = re.compile(r"\d{9,}")  # the name of one checkpoint's folder: its step

_PIECE = 2**24  # bytes read at once


def newest_whole_step(workdir: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint whose bytes are those that were written; None without one.

    Args:
      workdir: of the run, on a file system.

    Raises:
      OSError: the folder, or a checkpoint in it, cannot be read at the moment.
    """
    folder = Path(os.path.expanduser(workdir)) / FOLDER
    try:
        names = [name for name in os.listdir(folder) if STEP.fullmatch(name)]
    except FileNotFoundError:
        return None
    for name in sorted(names, key=int, reverse=True):
        try:
            if _is_whole(folder / name):
                return int(name)
        except (FileNotFoundError, NotADirectoryError):
            continue  # not written to the end, or removed meanwhile
    return None


def _is_whole(path: Path) -> bool:
    """Whether the state has the size and the CRC-32 that the manifest notes."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        size, crc32 = manifest["size"], manifest["crc32"]
    except (ValueError, KeyError, TypeError):
        return False
    if os.stat(path / STATE).st_size != size:
        return False
    crc = 0
    with open(path / STATE, "rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc == crc32
