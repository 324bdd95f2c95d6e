"""Metrics on disk: metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard.

TensorBoard's event files are in the run's folder itself, so that `tensorboard --logdir runs` shows
the run under the name of its folder. They are written in TensorBoard's format directly and not with
`tf.summary`, whose ops run eagerly on the default device and would make the training loop wait.
"""

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util import tensor_util

from vit_dist.monitoring.curves import curve_of
from vit_dist.monitoring.files import EventFile, GrowingFile, open_rows
from vit_dist.paths import expand
from vit_dist.storage.errors import FAILURES, explain, only_warn
from vit_dist.storage.files import exists, make_folder, read_text, write_whole

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"
# The folder in a run's folder where version 0.1 put the events.
OLD_TENSORBOARD_DIR = "tensorboard"
# Metrics whose value never changes, by the last part of their names: in rows, not in TensorBoard.
CONSTANTS = ("examples",)


def make_writer(workdir: epath.PathLike, *, first_step: int = 0, active: bool = True) -> "Writer":
    """Opens the metrics of `workdir` for a run that has done `first_step` steps.

    A run that was killed had logged beyond the checkpoint from which this one goes on. Its rows
    after `first_step` are dropped when the first new row is written, and not before, so that a
    start which fails before it has trained a step does not lose them.

    Hosts other than the chief pass `active=False` and get a writer that does nothing.

    Raises:
      StorageError: metrics.jsonl cannot be written. TensorBoard's file may fail: the run then
        goes on without it, with a warning.
    """
    if not active:
        return Writer(None, None)
    rows = _Rows(expand(workdir) / METRICS_FILE, first_step)
    return Writer(rows, EventFile(events_folder(workdir)))


def events_folder(workdir: epath.PathLike) -> epath.Path:
    """The folder for events: the run's, or the one inside it where version 0.1 began to write them.

    TensorBoard takes each folder with events for a run, so a curve goes on only in the same folder.
    """
    workdir = expand(workdir)
    old = workdir / OLD_TENSORBOARD_DIR
    has_events = old.is_dir() and any("tfevents" in path.name for path in old.iterdir())
    return old if has_events else workdir


def was_written(workdir: epath.PathLike, name: str, step: int) -> bool:
    """Whether the metrics of `workdir` hold the scalar `name` at `step`."""
    path = expand(workdir) / METRICS_FILE
    if not exists(path):
        return False
    # split("\n") and not splitlines(): only a newline ends a row.
    rows = (line for line in read_text(path).split("\n") if _is_row_until(line, step))
    return any(row["step"] == step and name in row for row in map(json.loads, rows))


class Writer:
    """Writes scalars, texts and images of a run; see `make_writer`."""

    def __init__(self, rows: "_Rows | None", events: EventFile | None):
        self._rows = rows
        self._events = events
        self._session_begun = False

    def scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one row. NaN and infinities become null in JSON, which has neither.

        Raises:
          StorageError: the row cannot be written.
        """
        if self._rows is None or self._events is None:
            return
        reserved = {"step", "time"} & set(scalars)
        if reserved:
            raise ValueError(
                f"a metric may not be called {sorted(reserved)[0]!r}: every row has one"
            )
        values = {name: float(value) for name, value in scalars.items()}
        # allow_nan=False below would refuse what a strict JSON reader cannot read either.
        row: dict[str, float | None] = {"step": int(step), "time": round(time.time(), 3)}
        row |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._begin_session()
        self._rows.add(json.dumps(row, allow_nan=False) + "\n")
        curves = {k: v for k, v in values.items() if k.split("/")[-1] not in CONSTANTS}
        self._add(step, lambda: [_scalar(curve_of(k), v) for k, v in curves.items()])

    def text(self, step: int, name: str, markdown: str) -> None:
        """Shows `markdown` in TensorBoard's text tab; metrics.jsonl has no texts."""
        metadata = text_metadata.create_summary_metadata(name, "")
        tensor = _string_tensor([markdown.encode()])
        self._add(step, lambda: [_Value(tag=name, metadata=metadata, tensor=tensor)])

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Shows uint8 images (N, H, W, C), C = 1 or 3, in TensorBoard's image tab."""
        if self._events is None:
            return
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}"
            )

        # The image plugin's format: a tensor of strings with width, height, and each image as PNG.
        # Made by the thread that writes, as PNG takes long.
        def values() -> list[summary_pb2.Summary.Value]:
            height, width = images.shape[1:3]
            content = [str(width).encode(), str(height).encode(), *map(_encode_png, images)]
            metadata = image_metadata.create_summary_metadata(name, "")
            return [_Value(tag=name, metadata=metadata, tensor=_string_tensor(content))]

        self._add(step, values)

    def watched(
        self,
        step: int,
        kind: str,
        names: Sequence[str],
        norms: np.ndarray,
        counts: np.ndarray | None,
    ) -> None:
        """Shows a norm and a histogram of each variable; see training.watch.Watch.

        Args:
          step: the step of the look.
          kind: "weights", "gradients" or "updates".
          names: of the V variables.
          norms: (V, 3): norm, smallest and largest value.
          counts: (V, bins), or None for no histograms.
        """

        def values() -> list[summary_pb2.Summary.Value]:
            found = [
                _scalar(f"{kind}_norm/{n}", row[0]) for n, row in zip(names, norms, strict=True)
            ]
            if counts is not None:
                rows = zip(names, norms, counts, strict=True)
                # Of NaN and infinities there is no histogram, but a norm that tells.
                found += [
                    _histogram(f"{kind}/{name}", low, high, row)
                    for name, (_, low, high), row in rows
                    if math.isfinite(low) and math.isfinite(high)
                ]
            return found

        self._begin_session()
        self._add(step, values)

    def summary(self, step: int, make: Callable[[], summary_pb2.Summary]) -> None:
        """Writes a summary that another part of TensorBoard defines, such as its HParams."""

        # TensorBoard's plugins make the classes of TensorFlow where that is installed, and events
        # here are of TensorBoard's own: the same bytes.
        def values() -> list[summary_pb2.Summary.Value]:
            return [_Value.FromString(value.SerializeToString()) for value in make().value]

        self._add(step, values)

    def close(self) -> None:
        """Writes out what is pending; the writer cannot be used afterwards.

        Raises:
          StorageError: rows cannot be written.
        """
        if self._rows is not None and self._events is not None:
            try:
                self._rows.close()
            finally:
                self._events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        # The error that ends the run is the one to show, not what closing meets after it.
        with only_warn("closing the metrics"):
            self.close()

    def _begin_session(self) -> None:
        """Makes TensorBoard drop what earlier starts logged behind the step where this one began.

        Before the first point of this start, for the reason that make_writer tells: the event drops
        every point of a later step that stands before it.
        """
        if self._rows is None or self._events is None or self._session_begun:
            return
        self._session_begun = True
        self._events.add(_session_start(self._rows.first_step))

    def _add(self, step: int, values: Callable[[], list[summary_pb2.Summary.Value]]) -> None:
        """Writes what `values` returns, which the thread that writes calls."""
        now = time.time()

        def make() -> event_pb2.Event:
            summary = summary_pb2.Summary(value=values())
            return event_pb2.Event(step=int(step), wall_time=now, summary=summary)

        if self._events is not None:
            self._events.add(make)


_Value = summary_pb2.Summary.Value


class _Rows:
    """metrics.jsonl; rows after `first_step` are dropped when the first new row is added.

    The file is opened for appending at once, so that a folder which cannot be written fails the
    start and not the first log, minutes later.
    """

    def __init__(self, path: epath.Path, first_step: int):
        self._path, self.first_step = path, first_step
        self.begun = False
        self._file: GrowingFile = self._try(self._open)

    def add(self, row: str) -> None:
        if not self.begun:
            self._try(self._begin)
            self.begun = True
        self._try(lambda: self._file.add(row))

    def close(self) -> None:
        self._try(self._file.close)

    def _open(self) -> GrowingFile:
        make_folder(self._path.parent)
        return open_rows(self._path)

    def _begin(self) -> None:
        # Closed while the file is replaced by one without the rows: the open file would be the old.
        self._file.close()
        _drop_rows_after(self._path, self.first_step)
        self._file = self._open()

    def _try(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except FAILURES as error:
            raise (
                explain(
                    error,
                    what=f"cannot write {self._path}",
                    place=str(self._path),
                    note="Checkpoints are untouched",
                    then="and run again to resume",
                )
                or error
            ) from error


def _drop_rows_after(path: epath.Path, step: int) -> None:
    """Rewrites the file with the rows up to `step`, and without a torn line that a kill left."""
    if not exists(path):
        return
    text = read_text(path)
    kept = "".join(line + "\n" for line in text.split("\n") if _is_row_until(line, step))
    # By way of another name: a kill in between leaves either the old rows or the new ones.
    if kept != text:
        write_whole(path, kept.encode())


def _is_row_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _session_start(first_step: int) -> event_pb2.Event:
    """An event that makes TensorBoard drop the points after `first_step` of earlier files."""
    # TensorBoard drops points from the event's own step on, so that of first_step stays.
    return event_pb2.Event(
        step=first_step + 1,
        wall_time=time.time(),
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
    )


def _scalar(tag: str, value: float) -> summary_pb2.Summary.Value:
    return _Value(tag=tag, simple_value=value)


def _histogram(tag: str, low: float, high: float, counts: np.ndarray) -> summary_pb2.Summary.Value:
    """A histogram of equally wide bins from `low` to `high`."""
    edges = np.linspace(low, high, len(counts) + 1)
    # The histogram plugin's format: (bins, 3) of left edge, right edge, count.
    rows = np.stack([edges[:-1], edges[1:], counts], axis=1)
    tensor = tensor_util.make_tensor_proto(rows)
    metadata = histogram_metadata.create_summary_metadata(tag, "")
    return _Value(tag=tag, metadata=metadata, tensor=tensor)


def _string_tensor(content: list[bytes]) -> tensor_pb2.TensorProto:
    size = tensor_shape_pb2.TensorShapeProto.Dim(size=len(content))
    shape = tensor_shape_pb2.TensorShapeProto(dim=[size])
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=content)


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Pillow has no images of (H, W, 1): grey is (H, W).
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
