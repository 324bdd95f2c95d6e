"""Checkpoints that are whole or do not count: one folder each, its manifest written last.

    <workdir>/checkpoints/000000500/state.safetensors    every array of the TrainState, by name
    <workdir>/checkpoints/000000500/manifest.json        step, size and CRC-32 of the state, config
    <workdir>/checkpoints/000000500.unfinished           only while the two above are being written

A checkpoint counts only if its manifest parses and the state has that size and checksum. So neither
a kill, a full disk nor an object store without atomic renames can make a run start from half a
state. Files and folders are on the disk (fsync) before an older checkpoint is deleted.

Four cases are kept apart when a run looks for its newest checkpoint:

- whole: it is taken.
- proved damaged (no manifest, a short file, a wrong checksum): passed over. If every checkpoint is
  damaged the search fails: a run that has lost its state must not begin at zero in silence.
- unfinished: a save that was interrupted. Passed over, and no loss: it never was a checkpoint.
- unreadable at the moment (I/O error, no permission, a bucket's 503): tried again for some seconds,
  then an error. An older checkpoint, or none, would be a wrong answer.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from absl import logging
from etils import epath

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.model.formats.tensors import LazyArray
from vit_dist.paths import expand
from vit_dist.storage import files
from vit_dist.storage.errors import FAILURES, Kind, explain, kind_of, only_warn, path_of, retry
from vit_dist.training.layout import FOLDER, MANIFEST, STATE, STEP
from vit_dist.training.state_file import StateFile, Sums, write_state

T = TypeVar("T")

_UNFINISHED = re.compile(STEP.pattern + r"\.unfinished")
_LISTINGS = 3  # how often a folder is listed in which a running job removes checkpoints meanwhile
_UNTOUCHED = "Earlier checkpoints are untouched"
_ABSENT = (Kind.MISSING, Kind.MISNAMED)  # a folder in the place of a file is no file either


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found whole.

    Attributes:
      path: its folder.
      step: number of steps done.
      notes: what was saved beside the arrays: "config", "model", "data", "class_names".
      arrays: by name; those of a file are read each time they are asked for.
      digest: SHA-256 of the manifest, which holds the state's checksum: equal on two hosts only if
        they see the same checkpoint.
    """

    path: epath.Path
    step: int
    notes: dict[str, Any]
    arrays: Mapping[str, np.ndarray]
    digest: str = ""

    def weights(self) -> dict[str, LazyArray]:
        """The weights to use, the moving average's where there is one, by the model's own names."""
        assert isinstance(self.arrays, StateFile)
        return self.arrays.below(_weights_prefix(self.arrays))

    def close(self) -> None:
        """Closes the file of the arrays: one that is pruned takes up room as long as it is open."""
        if isinstance(self.arrays, StateFile):
            self.arrays.close()


class Checkpointer:
    """Saves in the background into one folder and finds the newest whole checkpoint there.

    Only one process may save into a workdir at a time; see storage.lock.

    Args:
      workdir: of the run; checkpoints go into its folder "checkpoints".
      keep: how many of the newest whole ones stay. Damaged ones do not count.
      permit: called before each save; raises if this process may not save any more.
      damaged: names of folders that were proved damaged when the run looked for its beginning.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 2,
        permit: Callable[[], None] = lambda: None,
        damaged: Collection[str] = (),
    ):
        if keep < 1:
            raise ConfigError(f"keep_checkpoints must be 1 or more, got {keep}")
        self.folder, self.keep = expand(workdir) / FOLDER, keep
        self._permit = permit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.damaged = set(damaged)

    def save(self, arrays: Mapping[str, np.ndarray], *, step: int, notes: dict[str, Any]) -> None:
        """Starts to write a checkpoint; waits for the one before.

        Raises:
          StorageError: the one before could not be written (a full disk, say).
        """
        self.wait()
        self._permit()
        self._pending = self._thread.submit(self._save, dict(arrays), step, notes)

    def wait(self) -> None:
        """Returns when everything is on disk; raises StorageError where that failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def poll(self) -> None:
        """Raises StorageError if the checkpoint being written has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, every byte of it checked; None where there never was one.

        Damaged and unfinished ones are named in the log.

        Raises:
          DataError: there are checkpoints, and all are damaged.
          StorageError: one cannot be read at the moment.
        """
        self.wait()
        found, damaged = _newest(self.folder)
        self.damaged = {path.name for path in damaged}
        if found is None and damaged:
            raise DataError(
                f"{self.folder} holds checkpoints, and none of them is whole: {_reasons(damaged)}. "
                "The run does not begin at step 0 by itself. To go on, put a whole checkpoint "
                f"back; to begin anew on purpose, move {self.folder} away or give another --workdir"
            )
        return found

    def _save(self, arrays: dict[str, np.ndarray], step: int, notes: dict[str, Any]) -> None:
        path = self.folder / f"{step:09d}"
        try:
            retry(f"saving {path}", lambda: _write(path, arrays, step, notes))
        except FAILURES as error:
            with only_warn(f"removing {path}"):
                files.remove_tree(path)  # a torn checkpoint would only take up the room
                _unfinished(path).unlink(missing_ok=True)
            raise (
                explain(
                    error,
                    what=f"could not save step {step} to {path}",
                    place=str(path),
                    note=_UNTOUCHED,
                    then="and run again to resume",
                )
                or error
            ) from error
        self.damaged.discard(path.name)
        # The new checkpoint is safe; what goes wrong from here on must not end the run.
        with only_warn(f"removing old checkpoints from {self.folder}"):
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Removes what is older than the newest `keep` whole checkpoints, and older damaged ones.

        Later steps stay: a torn one of a run that was abandoned goes when it is overtaken.
        """
        room = self.keep
        for path in _folders(self.folder):
            if int(path.name) > newest:
                continue
            if path.name not in self.damaged and _looks_whole(path):
                room -= 1
                if room >= 0:
                    continue
            # Without its manifest the folder is no checkpoint any more, however far this gets.
            (path / MANIFEST).unlink(missing_ok=True)
            files.remove_tree(path)
            files.sync_folder(self.folder)
        for path in files.list_folder(self.folder):
            # Of saves that were killed, perhaps before they had made their folder.
            if _UNFINISHED.fullmatch(path.name) and int(path.stem) < newest:
                path.unlink(missing_ok=True)


def _write(
    path: epath.Path, arrays: Mapping[str, np.ndarray], step: int, notes: Mapping[str, Any]
) -> None:
    """Writes one checkpoint, durably; replaces what an earlier attempt left in its folder."""
    # Before the folder: should this save be interrupted, what it leaves is no damaged checkpoint.
    files.make_folder(path.parent)
    note = f"process {os.getpid()} on {platform.node()} began to save here, {time.ctime()}\n"
    files.write_file(_unfinished(path), [note.encode()])
    files.sync_folder(path.parent)
    files.remove_tree(path)
    files.make_folder(path)
    sums = write_state(path / STATE, arrays)
    manifest = {
        "step": step,
        "size": sums.size,
        "crc32": sums.crc32,
        "arrays": dict(sums.arrays),
        "notes": notes,
    }
    files.sync_folder(path)
    files.write_file(path / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    files.sync_folder(path)
    files.sync_folder(path.parent)
    with only_warn(f"removing {_unfinished(path)}"):
        _unfinished(path).unlink()  # beside a manifest it means nothing


def _unfinished(path: epath.Path) -> epath.Path:
    """The file that stands beside a checkpoint's folder while it is being written."""
    return path.with_name(f"{path.name}.unfinished")


def _folders(folder: epath.Path) -> list[epath.Path]:
    """The folders of checkpoints, the latest step first."""
    found = [path for path in files.list_folder(folder) if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _newest(
    folder: epath.Path, *, weights: bool = False
) -> tuple[Checkpoint | None, dict[epath.Path, str]]:
    """The newest whole checkpoint, if any, and what is wrong with those that were passed over."""
    damaged: dict[epath.Path, str] = {}
    for _ in range(_LISTINGS):
        damaged, vanished = {}, False
        for path in _read(folder, lambda: _folders(folder)):
            try:
                return _open(path, weights=weights), damaged
            except DataError as error:
                if not _read(path, functools.partial(files.exists, path)):
                    vanished = True  # removed by a running job, which has a newer one by now
                    continue
                # As text: the error itself refers to frames, and those to files that are open.
                logging.warning("passing over a damaged checkpoint: %s", str(error))
                if not _is_unfinished(path):
                    damaged[path] = str(error)
        if not vanished:
            break
    return None, damaged


def _is_unfinished(path: epath.Path) -> bool:
    def look() -> bool:
        return files.exists(_unfinished(path)) and not files.exists(path / MANIFEST)

    return _read(path, look)


def _looks_whole(path: epath.Path) -> bool:
    """Whether the manifest parses and the state has its size; the checksum is not computed."""
    try:
        _, _, sums, _ = _read_manifest(path)
        return files.file_size(path / STATE) == sums.size
    except DataError:
        return False
    except FAILURES as error:
        if kind_of(error) not in _ABSENT:
            raise
        return False


def _reasons(damaged: Mapping[epath.Path, str]) -> str:
    more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return "; ".join(list(damaged.values())[:3]) + more


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether it is a run's folder with checkpoints, or one checkpoint's, whole or not."""
    if STEP.fullmatch(folder.name):
        return True
    return any(
        _read(path, functools.partial(files.exists, path))
        for path in (folder / MANIFEST, folder / FOLDER)
    )


def open_checkpoint(path: str, *, weights: bool = False) -> Checkpoint:
    """The checkpoint at `path`: one checkpoint's folder, or a run's, of which the newest whole one.

    Args:
      path: local or gs://.
      weights: only `Checkpoint.weights` will be used. The rest of the state, some two thirds, is
        then neither read nor checked (of checkpoints since version 0.2; before, all was).

    Raises:
      ConfigError: there is none; the message says what was looked for.
      DataError: it is damaged, or all those of the run are.
      StorageError: it cannot be read at the moment.
    """
    folder = expand(path)
    if not _read(folder, lambda: files.exists(folder)):
        raise ConfigError(f"there is no checkpoint at {path}: no such folder")
    alone = _read(folder, lambda: files.exists(folder / MANIFEST))
    if alone or STEP.fullmatch(folder.name):
        return _open(folder, weights=weights)
    found, damaged = _newest(folder / FOLDER, weights=weights)
    if found is not None:
        return found
    text = f"there is no whole checkpoint at {path}"
    if damaged:
        raise DataError(f"{text}: {_reasons(damaged)}")
    raise ConfigError(
        f"{text}: expected a run's folder with checkpoints/<step>/{MANIFEST} in it, or one "
        "checkpoint's folder"
    )


def _open(path: epath.Path, *, weights: bool = False) -> Checkpoint:
    """Opens and checks one checkpoint.

    Raises:
      DataError: it is proved damaged.
      StorageError: it cannot be read at the moment.
    """

    def attempt() -> Checkpoint:
        step, notes, sums, digest = _read_manifest(path)
        try:
            arrays = StateFile(path / STATE, sums)
            used = arrays.below(_weights_prefix(arrays)).values() if weights else None
            arrays.check(None if used is None else [array.source for array in used])
        except FAILURES as error:
            if kind_of(error) not in _ABSENT:
                raise
            raise DataError(f"{path / STATE} is missing") from None
        return Checkpoint(path=path, step=step, notes=notes, arrays=arrays, digest=digest)

    return _read(path, attempt)


def _weights_prefix(arrays: StateFile) -> str:
    return "ema/" if any(name.startswith("ema/") for name in arrays) else "model/"


def _read_manifest(path: epath.Path) -> tuple[int, dict[str, Any], Sums, str]:
    """Step, notes, sums of the state, and the digest; raises DataError where it is no manifest."""
    manifest = path / MANIFEST
    try:
        data = manifest.read_bytes()
    except FAILURES as error:
        if kind_of(error) not in _ABSENT:
            raise
        raise DataError(f"{path} has no {MANIFEST}: it was not written to the end") from None
    try:
        parsed = json.loads(data)
        sums = Sums(parsed["size"], parsed["crc32"], parsed.get("arrays", {}))
        return parsed["step"], parsed["notes"], sums, hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged ({error})") from None


def _read(path: epath.Path, function: Callable[[], T]) -> T:
    """Calls a function that reads; what it cannot read after some attempts is a StorageError."""
    try:
        return retry(f"reading {path}", function)
    except FAILURES as error:
        raise (
            explain(
                error,
                what=f"cannot read {path_of(error) or path}",
                place=str(path),
                note="It may well be whole, so nothing older is taken in its place",
                then="and run again",
            )
            or error
        ) from error
