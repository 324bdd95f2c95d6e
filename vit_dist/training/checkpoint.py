"""Checkpoints that are whole or not there: one folder each, its manifest written last.

    <workdir>/checkpoints/000000500/state.safetensors    every array of the TrainState, by name
    <workdir>/checkpoints/000000500/manifest.json        step, size and CRC-32 of the state, config

A checkpoint counts only if its manifest parses and the state has that size and checksum; the newest
that does wins. So neither a kill, a full disk nor an object store without atomic renames can make a
run start from half a state, or silently from zero.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

STATE, MANIFEST = "state.safetensors", "manifest.json"
_FOLDER = re.compile(r"\d{9,}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found whole: where it lies, its step, what was noted beside it, its arrays."""

    path: epath.Path
    step: int
    notes: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Checkpointer:
    """Saves in the background into one folder and finds the newest whole checkpoint there.

    Args:
      workdir: of the run; checkpoints go into its folder "checkpoints".
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: str, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be 1 or more, got {keep}")
        self.folder, self.keep = epath.Path(workdir) / "checkpoints", keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, arrays: Mapping[str, np.ndarray], *, step: int, notes: dict[str, Any]) -> None:
        """Starts to write a checkpoint; waits for the one before.

        Raises:
          OSError: the one before could not be written (a full disk, say).
        """
        self.wait()
        self._pending = self._thread.submit(self._write, dict(arrays), step, notes)

    def wait(self) -> None:
        """Returns when everything is on disk; raises OSError where that failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def poll(self) -> None:
        """Raises OSError if the checkpoint being written has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _write(self, arrays: dict[str, np.ndarray], step: int, notes: dict[str, Any]) -> None:
        path = self.folder / f"{step:09d}"
        try:
            if path.exists():
                path.rmtree()
            path.mkdir(parents=True)
            data = safetensors.numpy.save(
                {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}
            )
            (path / STATE).write_bytes(data)
            manifest = {"step": step, "size": len(data), "crc32": zlib.crc32(data), "notes": notes}
            (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
        except OSError as error:
            if path.exists():
                path.rmtree()  # a torn checkpoint would only take up the room
            raise OSError(
                error.errno,
                f"could not save step {step} to {path}: {error.strerror or error}. Earlier "
                "checkpoints are untouched; make room or mend the storage and run again to resume",
            ) from error
        for old in self._folders()[self.keep :]:
            if int(old.name) < step:
                old.rmtree()

    def _folders(self) -> list[epath.Path]:
        if not self.folder.exists():
            return []
        found = [p for p in self.folder.iterdir() if _FOLDER.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.name), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None; damaged ones are named in the log, and skipped."""
        self.wait()
        for path in self._folders():
            try:
                return _open(path)
            except (ValueError, OSError) as error:
                logging.warning("passing over a damaged checkpoint: %s", error)
        return None


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether it is a run's folder with checkpoints, or one checkpoint's, whole or not."""
    inside = (folder / MANIFEST).exists() or (folder / "checkpoints").exists()
    return inside or _FOLDER.fullmatch(folder.name) is not None


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at `path`: one checkpoint's folder, or a run's, of which the newest whole one.

    Raises:
      ValueError: there is none, or it is damaged; the message says what was looked for.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise ValueError(f"there is no checkpoint at {path}: no such folder")
    if (folder / MANIFEST).exists() or _FOLDER.fullmatch(folder.name):
        return _open(folder)
    newest = Checkpointer(path).newest()
    if newest is None:
        raise ValueError(
            f"there is no whole checkpoint at {path}: expected a run's folder with "
            f"checkpoints/<step>/{MANIFEST} in it, or one checkpoint's folder"
        )
    return newest


def _open(path: epath.Path) -> Checkpoint:
    manifest = path / MANIFEST
    if not manifest.exists():
        raise ValueError(f"{path} has no {MANIFEST}: it was not written to the end")
    try:
        parsed = json.loads(manifest.read_text())
        step, size, crc32 = parsed["step"], parsed["size"], parsed["crc32"]
        notes = parsed["notes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged ({error})") from None
    state = path / STATE
    if not state.exists() or state.stat().length != size:
        raise ValueError(f"{state} is missing or not {size} bytes long")
    data = state.read_bytes()
    if zlib.crc32(data) != crc32:
        raise ValueError(f"{state} is damaged: its checksum differs")
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{state} is damaged ({error})") from None
    return Checkpoint(path=path, step=step, notes=notes, arrays=arrays)
