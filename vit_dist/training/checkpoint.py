"""Checkpoints that are whole or do not count: one folder each, its manifest written last.

    <workdir>/checkpoints/000000500/state.safetensors    every array of the TrainState, by name
    <workdir>/checkpoints/000000500/manifest.json        step, size and CRC-32 of the state, config
    <workdir>/checkpoints/000000500.unfinished           only while the two above are being written

A checkpoint counts only if its manifest parses and state.safetensors has the size and the checksum
that the manifest notes. So neither a kill, a full disk nor an object store without atomic renames
can make a run start from half a state. Files and folders are on the disk (fsync) before an older
checkpoint is deleted.

Four cases are kept apart when a run looks for its newest checkpoint:

- whole: it is taken.
- proved damaged (no manifest, a short file, a wrong checksum): passed over. If every checkpoint is
  damaged the search fails: a run that has lost its state must not begin at zero in silence.
- unfinished: a save that was interrupted. Passed over, and nothing is lost: it never was a
  checkpoint.
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
import zlib
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
# A folder (MISNAMED) in the place of a file is no file either.
_ABSENT = (Kind.MISSING, Kind.MISNAMED)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found whole.

    Attributes:
      path: its folder.
      step: number of steps done.
      notes: what was saved beside the arrays: "config", "model", "data", "class_names",
        "micro_batch" (see run/elastic.py).
      arrays: name -> array; a StateFile reads an array each time it is asked for.
      digest: SHA-256 (hex) of the manifest, which holds the state's checksum: equal on two hosts
        only if they see the same checkpoint.
    """

    path: epath.Path
    step: int
    notes: dict[str, Any]
    arrays: Mapping[str, np.ndarray]
    digest: str = ""

    def weights(self) -> dict[str, LazyArray]:
        """The weights to judge or to take over, by the model's own names: the moving average's if
        the run kept one, else the model's.
        """
        assert isinstance(self.arrays, StateFile)
        return self.arrays.below(_weights_prefix(self.arrays))

    def close(self) -> None:
        """Closes the file of the arrays: while it is open it takes up room, even if pruned."""
        if isinstance(self.arrays, StateFile):
            self.arrays.close()


class Checkpointer:
    """Saves in the background into one folder and finds the newest whole checkpoint there.

    Only one process may save into a workdir at a time; see storage.lock.

    Args:
      workdir: folder of the run; checkpoints go into "checkpoints" in it.
      keep: how many of the newest whole checkpoints stay. Damaged ones do not count.
      alone: whether a checkpoint that is whole replaces all others, also those of later steps.
      permit: called before each save; raises if this process may not save any more.
      damaged: names of folders that `newest` of another Checkpointer proved damaged.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 2,
        alone: bool = False,
        permit: Callable[[], None] = lambda: None,
        damaged: Collection[str] = (),
    ):
        if keep < 1:
            raise ConfigError(f"keep_checkpoints must be 1 or more, got {keep}")
        self.folder, self.keep = expand(workdir) / FOLDER, keep
        self._permit, self._alone = permit, alone
        # One thread: training goes on while a checkpoint is written, and two never overlap.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.damaged = set(damaged)

    def save(self, arrays: Mapping[str, np.ndarray], *, step: int, notes: dict[str, Any]) -> None:
        """Starts to write a checkpoint in the background; first waits for the one before.

        Args:
          arrays: name -> array; not changed by anyone until the checkpoint is written.
          step: number of steps done, which names the folder.
          notes: goes into the manifest as JSON.

        Raises:
          StorageError: the checkpoint before could not be written (a full disk, say), or this
            process may not save any more.
        """
        # An error of the background thread surfaces here, one save later at the latest.
        self.wait()
        self._permit()
        self._pending = self._thread.submit(self._save, dict(arrays), step, notes)

    def wait(self) -> None:
        """Returns when everything is on disk; raises StorageError where that failed."""
        if self._pending is not None:
            # Forgotten before result() raises: an error is reported once, not at every later call.
            pending, self._pending = self._pending, None
            pending.result()

    def poll(self) -> None:
        """Raises StorageError if the checkpoint being written has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, every byte of it checked; None where there never was one.

        The log names damaged and unfinished checkpoints that are passed over.

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
                f"back; to start from step 0 on purpose, move {self.folder} away or give another "
                "--workdir"
            )
        return found

    def _save(self, arrays: dict[str, np.ndarray], step: int, notes: dict[str, Any]) -> None:
        path = self.folder / f"{step:09d}"
        try:
            retry(f"saving {path}", lambda: _write(path, arrays, step, notes))
        except FAILURES as error:
            with only_warn(f"removing {path}"):
                # A torn checkpoint would only take up room. Its marker goes last: as long as the
                # folder is there, the marker tells that it is no damaged checkpoint.
                files.remove_tree(path)
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
        """Removes whole checkpoints older than the newest `keep`, and damaged ones before `newest`.

        Folders of later steps stay unless a checkpoint is to be alone. A run that began again at
        an earlier checkpoint finds them; each goes when the run has passed its step.
        """
        # From the newest to the oldest: `room` counts how many whole ones may still stay.
        room = self.keep
        for path in _folders(self.folder):
            later = int(path.name) > newest
            if later and not self._alone:
                continue
            if not later and path.name not in self.damaged and _looks_whole(path):
                room -= 1
                if room >= 0:
                    continue
            # Without its manifest the folder is no checkpoint any more, however far this gets.
            (path / MANIFEST).unlink(missing_ok=True)
            files.remove_tree(path)
            files.sync_folder(self.folder)
        for path in files.list_folder(self.folder):
            # Markers of saves that were killed, perhaps before they had made their folder.
            if _UNFINISHED.fullmatch(path.name) and int(path.stem) < newest:
                path.unlink(missing_ok=True)


def _write(
    path: epath.Path, arrays: Mapping[str, np.ndarray], step: int, notes: Mapping[str, Any]
) -> None:
    """Writes one checkpoint, durably; replaces the folder of an earlier attempt."""
    # The order of what follows is what keeps a checkpoint whole at a loss of power: marker, state,
    # manifest, each on the disk before the next begins (tests/training/test_power_loss.py).
    # The marker comes first, so that an interrupted save is never taken for a damaged checkpoint.
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
    manifest["own_crc32"] = _own_sum(manifest)
    # The state's name has to be durable before a manifest vouches for it.
    files.sync_folder(path)
    files.write_file(path / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    # Then the manifest's own name, and last the folder's name in "checkpoints".
    files.sync_folder(path)
    files.sync_folder(path.parent)
    # Beside a manifest the marker means nothing, so failing to remove it does no harm.
    with only_warn(f"removing {_unfinished(path)}"):
        _unfinished(path).unlink()


def _own_sum(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest's entries, its own left out: a bit in it may be a class or the step."""
    entries = {key: value for key, value in manifest.items() if key != "own_crc32"}
    return zlib.crc32(json.dumps(entries).encode())


def _unfinished(path: epath.Path) -> epath.Path:
    """The marker: a file beside a checkpoint's folder, there while the checkpoint is written."""
    return path.with_name(f"{path.name}.unfinished")


def _folders(folder: epath.Path) -> list[epath.Path]:
    """The folders of checkpoints, the latest step first."""
    found = [path for path in files.list_folder(folder) if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _newest(
    folder: epath.Path, *, weights: bool = False
) -> tuple[Checkpoint | None, dict[epath.Path, str]]:
    """The newest whole checkpoint, if any, and (path -> what is wrong) of newer, damaged ones.

    With `weights` only the weights of a checkpoint are checked, see open_checkpoint.
    """
    damaged: dict[epath.Path, str] = {}
    for _ in range(_LISTINGS):
        damaged, vanished = {}, False
        for path in _read(folder, lambda: _folders(folder)):
            try:
                return _open(path, weights=weights), damaged
            except DataError as error:
                # A running job has removed this one, and has a newer one by now: list again.
                if not _read(path, functools.partial(files.exists, path)):
                    vanished = True
                    continue
                # Kept as text: the error itself holds its traceback's frames, and with them open
                # files.
                if _is_unfinished(path):
                    logging.warning("passing over %s: its save was interrupted", path)
                    continue
                logging.warning("passing over a damaged checkpoint: %s", str(error))
                damaged[path] = str(error)
        if not vanished:
            break
    return None, damaged


def _is_unfinished(path: epath.Path) -> bool:
    """Whether a save into this folder was interrupted: a marker, and no manifest."""

    def look() -> bool:
        return files.exists(_unfinished(path)) and not files.exists(path / MANIFEST)

    return _read(path, look)


def _looks_whole(path: epath.Path) -> bool:
    """Whether the manifest parses and the state has the size noted there.

    The checksum is not computed: _prune asks at every save, and would read gigabytes each time.
    """
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
    """What is wrong with the first three damaged checkpoints, and how many more there are."""
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
    """Opens the checkpoint in `path`, or the newest whole one of the run in `path`.

    Args:
      path: folder of a checkpoint or of a run, local or gs://.
      weights: only `Checkpoint.weights` will be used. The rest of the state, two thirds or more, is
        then neither read nor checked. (Checkpoints of version 0.1 have no checksum for each array:
        of these everything is read.)

    Raises:
      ConfigError: there is no checkpoint; the message says what was looked for.
      DataError: the checkpoint is damaged, or all checkpoints of the run are.
      StorageError: a checkpoint cannot be read at the moment.
    """
    folder = expand(path)
    if not _read(folder, lambda: files.exists(folder)):
        raise ConfigError(f"there is no checkpoint at {path}: no such folder")
    # A folder named like a step counts even without a manifest: then it is reported as damaged,
    # rather than as a run without checkpoints.
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
    """Opens one checkpoint and checks its bytes, with `weights` only the bytes of the weights.

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
    """Reads (step, notes, sums of the state, digest); raises DataError if that is no manifest."""
    manifest = path / MANIFEST
    try:
        data = manifest.read_bytes()
    except FAILURES as error:
        if kind_of(error) not in _ABSENT:
            raise
        raise DataError(f"{path} has no {MANIFEST}: it was not written to the end") from None
    try:
        # Not `.get` for what every manifest has: a manifest without it is damaged. Checkpoints of
        # version 0.1 have no "arrays".
        parsed = json.loads(data)
        sums = Sums(parsed["size"], parsed["crc32"], parsed.get("arrays", {}))
        # Earlier versions wrote no sum of the manifest itself.
        if "own_crc32" in parsed and parsed["own_crc32"] != _own_sum(parsed):
            raise ValueError("its checksum is wrong")
        return parsed["step"], parsed["notes"], sums, hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged ({error})") from None


def _read(path: epath.Path, function: Callable[[], T]) -> T:
    """Calls a function that reads, again while the storage may recover.

    Raises:
      StorageError: it could not be read in any attempt.
    """
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
