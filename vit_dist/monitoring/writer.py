"""Metrics on disk: metrics.jsonl, one JSON object a line, and the same for TensorBoard.

Event files lie in the run's folder itself, so that `tensorboard --logdir runs` calls the run by the
name of its folder.

They are written with TensorBoard's own library rather than `tf.summary`, because the ops of
`tf.summary` run eagerly on the default device and would make the training loop wait for it.
"""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vit_dist.paths import is_remote

METRICS_FILE = "metrics.jsonl"
OLD_TENSORBOARD_DIR = "tensorboard"  # in the run's folder, where version 0.1 put the events
FLUSH_SECONDS = 30
# Last parts of names of metrics whose value never changes. Rows have them, TensorBoard does not.
CONSTANTS = ("examples",)


def make_writer(workdir: epath.PathLike, *, first_step: int = 0, active: bool = True) -> "Writer":
    """Opens the metrics of `workdir` for a run that has `first_step` steps behind it.

    Whatever was logged after `first_step` is dropped: a run that was killed had logged ahead of the
    checkpoint from which this one goes on. Workers other than the chief pass `active=False` and
    get a writer that does nothing.
    """
    if not active:
        return Writer(None, None)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / METRICS_FILE
    _drop_rows_after(path, first_step)
    # Flushed now and then by a thread; the JSON lines are the copy that loses nothing.
    events = EventFileWriter(str(_events_folder(workdir)), flush_secs=FLUSH_SECONDS)
    events.add_event(_session_start(first_step))
    return Writer(open_rows(path), events)


def was_written(workdir: epath.PathLike, name: str, step: int) -> bool:
    """Whether the metrics of `workdir` hold the scalar `name` at `step`."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return False
    rows = (line for line in path.read_text().split("\n") if _is_row_until(line, step))
    return any(row["step"] == step and name in row for row in map(json.loads, rows))


class Writer:
    """Writes scalars, texts and images of a run; see `make_writer`."""

    def __init__(self, rows: "Rows | None", events: EventFileWriter | None):
        self._rows = rows
        self._events = events

    def scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one row. NaN and infinities become null in JSON, which has neither."""
        if self._rows is None:
            return
        reserved = {"step", "time"} & set(scalars)
        if reserved:
            raise ValueError(
                f"a metric may not be called {sorted(reserved)[0]!r}: every row has one"
            )
        values = {name: float(value) for name, value in scalars.items()}
        row: dict[str, float | None] = {"step": int(step), "time": round(time.time(), 3)}
        row |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._rows.add(json.dumps(row, allow_nan=False) + "\n")
        curves = {k: v for k, v in values.items() if k.split("/")[-1] not in CONSTANTS}
        self._add(step, [_Value(tag=k, simple_value=v) for k, v in curves.items()])

    def text(self, step: int, name: str, markdown: str) -> None:
        """Shows `markdown` in TensorBoard's text tab."""
        metadata = text_metadata.create_summary_metadata(name, "")
        tensor = _string_tensor([markdown.encode()])
        self._add(step, [_Value(tag=name, metadata=metadata, tensor=tensor)])

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Shows uint8 images [N, H, W, C], C = 1 or 3, in TensorBoard's image tab."""
        if self._events is None:
            return
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}"
            )
        height, width = images.shape[1:3]
        content = [str(width).encode(), str(height).encode(), *map(_encode_png, images)]
        metadata = image_metadata.create_summary_metadata(name, "")
        tensor = _string_tensor(content)
        self._add(step, [_Value(tag=name, metadata=metadata, tensor=tensor)])

    def close(self) -> None:
        """Writes out what is pending; the writer cannot be used afterwards."""
        if self._rows is not None and self._events is not None:
            try:
                self._rows.close()
            finally:
                self._events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _add(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        if self._events is not None:
            summary = summary_pb2.Summary(value=values)
            self._events.add_event(
                event_pb2.Event(step=int(step), wall_time=time.time(), summary=summary)
            )


_Value = summary_pb2.Summary.Value


def open_rows(path: epath.Path) -> "Rows":
    """Opens a text file, local or in a bucket, to append lines to."""
    return _RemoteRows(path) if is_remote(path) else Rows(path)


class Rows:
    """Lines of text on a disk, each there at once: a killed process loses none."""

    def __init__(self, path: epath.Path):
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(path.open("a", encoding="utf-8"))

    def add(self, row: str) -> None:
        self._file.write(row)
        self._file.flush()

    def close(self) -> None:
        self._open.close()


class _RemoteRows(Rows):
    """The rows in a bucket, which takes only whole objects: each flush sends the file anew.

    So a thread flushes, no oftener than TensorBoard's files are flushed. A process that is killed
    loses the rows since, and resumes at a checkpoint that may well be older.
    """

    def __init__(self, path: epath.Path, *, clock: Callable[[], float] = time.monotonic):
        super().__init__(path)
        self._clock = clock
        self._flushed = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._sent: list[Future] = []

    def add(self, row: str) -> None:
        """Raises what an earlier row met."""
        self._sent.append(self._thread.submit(self._add, row))
        while self._sent and self._sent[0].done():
            self._sent.pop(0).result()

    def _add(self, row: str) -> None:
        self._file.write(row)
        now = self._clock()
        if now - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        closed = self._thread.submit(super().close)
        self._thread.shutdown()
        for done in (*self._sent, closed):
            done.result()


def _events_folder(workdir: epath.Path) -> epath.Path:
    """The run's folder; for a run of an older version the folder in it with the events so far.

    TensorBoard takes each folder with events for a run, so a curve goes on only in the same one.
    """
    old = workdir / OLD_TENSORBOARD_DIR
    has_events = old.is_dir() and any("tfevents" in path.name for path in old.iterdir())
    return old if has_events else workdir


def _drop_rows_after(path: epath.Path, step: int) -> None:
    """Rewrites the file with the rows up to `step`; a torn line, left by a kill, goes too."""
    if not path.exists():
        return
    text = path.read_text()
    kept = "".join(line + "\n" for line in text.split("\n") if _is_row_until(line, step))
    if kept != text:
        # Beside the target, so that the replacement is a rename: a kill here leaves the old file.
        rewritten = path.with_name(path.name + ".tmp")
        rewritten.write_text(kept)
        rewritten.replace(path)


def _is_row_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _session_start(first_step: int) -> event_pb2.Event:
    """Makes TensorBoard forget points of this and later steps; that of `first_step` stays."""
    return event_pb2.Event(
        step=first_step + 1,
        wall_time=time.time(),
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
    )


def _string_tensor(content: list[bytes]) -> tensor_pb2.TensorProto:
    size = tensor_shape_pb2.TensorShapeProto.Dim(size=len(content))
    shape = tensor_shape_pb2.TensorShapeProto(dim=[size])
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=content)


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
