"""A run's folder: its config, metrics, starts, and what it showed in TensorBoard."""

import dataclasses
import json
from typing import Any, TypeVar

from absl import logging
from etils import epath
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.monitoring.goodput import StartRecord, read_records
from vit_dist.monitoring.starts import STARTS_FILE
from vit_dist.monitoring.writer import METRICS_FILE, events_folder
from vit_dist.storage.files import list_folder, read_json, read_text

T = TypeVar("T")

_CONFIG = "config.json"
PLAN_FILE = "plan.json"
_NO_METRIC = ("step", "time")


@dataclasses.dataclass(frozen=True)
class History:
    """A run as its folder tells it.

    Attributes:
      name: of the folder.
      config: key -> value, "optimizer.learning_rate" and so on; {} if it was not recorded.
      curves: metric -> (steps, values), in the order of the steps.
      plan: figures that were expected at the newest start, see run/forecast.py; [] in older runs.
      starts: what each start of the run tells; empty for runs of version 0.1.
      texts: name -> Markdown, the newest of each name, as TensorBoard's text tab has them.
      images: name -> (step, PNG files), the newest of each name.
    """

    name: str
    config: dict[str, Any]
    curves: dict[str, tuple[list[int], list[float]]]
    plan: list[dict[str, Any]]
    starts: list[StartRecord]
    texts: dict[str, str]
    images: dict[str, tuple[int, list[bytes]]]

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return {name: values[-1] for name, (_, values) in self.curves.items()}


def read_history(folder: epath.Path) -> History:
    """Reads a run's folder.

    Raises:
      ConfigError: there is no run in it.
    """
    metrics = folder / METRICS_FILE
    if not metrics.exists():
        raise ConfigError(f"{folder} is no run's folder: there is no {METRICS_FILE} in it")
    config, plan, starts = folder / _CONFIG, folder / PLAN_FILE, folder / STARTS_FILE
    texts, images = _read_events(epath.Path(events_folder(folder)))
    return History(
        name=folder.name,
        config=flatten(_read_known(config, {})),
        curves=_read_curves(read_text(metrics)),
        plan=_read_known(plan, []),
        starts=read_records(read_text(starts)) if starts.exists() else [],
        texts=texts,
        images=images,
    )


def _read_known(path: epath.Path, nothing: T) -> T:
    """What a JSON file of the run holds; `nothing` if it is absent or, with a warning, damaged."""
    if not path.exists():
        return nothing
    try:
        found = read_json(path, remedy="what it holds is left out")
    except DataError as error:
        logging.warning("%s", error)
        return nothing
    return found if isinstance(found, type(nothing)) else nothing


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _read_curves(text: str) -> dict[str, tuple[list[int], list[float]]]:
    # By step, so that of two rows for one step the later one counts.
    curves: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while it wrote
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue  # damaged, and JSON all the same
        for name, value in row.items():
            # null stands for NaN and infinities: such a point is left out of the curve.
            if name not in _NO_METRIC and isinstance(value, int | float):
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {
        name: (sorted(points), [points[step] for step in sorted(points)])
        for name, points in curves.items()
    }


def _read_events(folder: epath.Path) -> tuple[dict[str, str], dict[str, tuple[int, list[bytes]]]]:
    texts: dict[str, str] = {}
    images: dict[str, tuple[int, list[bytes]]] = {}
    files = [path for path in list_folder(folder) if "tfevents" in path.name]
    # Their names hold the time at which they were begun.
    for path in sorted(files, key=lambda path: path.name):
        for event in EventFileLoader(str(path)).Load():
            _take(event, texts, images)
    return texts, images


def _take(
    event: event_pb2.Event, texts: dict[str, str], images: dict[str, tuple[int, list[bytes]]]
) -> None:
    for value in event.summary.value:
        # Scalars name no plugin (writer.py writes them as plain values): metrics.jsonl has them.
        plugin = value.metadata.plugin_data.plugin_name
        if plugin not in ("text", "images"):
            continue
        content = [bytes(x) for x in tensor_util.make_ndarray(value.tensor).ravel()]
        if plugin == "text":
            texts[value.tag] = b"".join(content).decode(errors="replace")
        else:
            # Width, height, then each image.
            images[value.tag] = (event.step, content[2:])
