"""What a trained ViT sees in images.

    python -m vit_dist.predict --checkpoint runs/NAME --images 'photos/*.jpg' [--top 3]
    find photos -newer last | python -m vit_dist.predict --checkpoint runs/NAME --images=- \\
        --output=new.csv --sheet=new.png

--checkpoint takes what config.init_from takes. A run has recorded how images are prepared and what
its classes are called; weights of another system need a config.json beside them that tells it.
Images that cannot be read are named and left out; the exit code is 1 then. Each GPU that TensorFlow
sees has a copy of the model and takes the next images (CUDA_VISIBLE_DEVICES leaves some out). The
last line tells how many images a second that were; of many images also what the network alone does
with images that are in memory: what is missing to it went into reading and decoding.
"""

import collections
import csv
import io
import json
import queue
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.damage import message_of
from vit_dist.inspection.sheet import Cell, draw_grid
from vit_dist.run import image_files
from vit_dist.run.image_files import expand_images, shown
from vit_dist.run.served import Served, hint_without_flags, open_served
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_output

# Images that a device classifies at once; their files are in memory together.
_BATCH = 32
_AHEAD = 2  # batches for each device that are read before their results are asked for
# The network alone is measured by the fastest of so many rounds, a batch for each device, and one
# before them that does not count. It is from so many images for each device: 2,000 to 128.
_ROUNDS, _MEASURED_FROM = 3, 2000
# Images that a sheet shows, the first ones.
_SHEET, _COLUMNS = 100, 10
_FORMATS = (".csv", ".jsonl")


class Prediction(NamedTuple):
    """The most likely classes of an image, best first; or `problem`, why it could not be read."""

    path: str
    classes: list[str]
    probabilities: list[float]
    problem: str = ""


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_multi_string(
        "images",
        [],
        "files, patterns such as 'photos/*.jpg', folders, or - for names of files from standard "
        "input, one a line; may be given repeatedly",
    )
    flags.DEFINE_boolean("recursive", False, "take the images in folders below a folder, too")
    flags.DEFINE_integer("top", 1, "how many classes to name", lower_bound=1)
    flags.DEFINE_string("output", None, "file for the result, .csv or .jsonl; printed by default")
    flags.DEFINE_string("sheet", None, f"PNG of the first {_SHEET} images with their classes")


def main() -> int:
    """The command; returns its exit code: 1 if an image could not be read."""
    given = flags.FLAGS
    if not given.checkpoint or not given.images:
        raise ConfigError("give a model and images: --checkpoint runs/NAME --images 'photos/*.jpg'")
    output, sheet = given.output, given.sheet
    if output and not output.endswith(_FORMATS):
        raise ConfigError(f"--output {output} must end in one of {', '.join(_FORMATS)}")
    for flag, path in (("--output", output), ("--sheet", sheet)):
        if path:
            check_bucket(path, flag)
    images = [name for text in given.images for name in (_from_stdin() if text == "-" else [text])]
    if not images:
        raise DataError("standard input names no images")
    rows: list[Prediction] = []
    count, bad = 0, 0
    paths = expand_images(images, recursive=given.recursive)
    copies, names = _open_copies(given.checkpoint, find_devices())
    began = time.monotonic()
    for prediction in _predict(copies, names, paths, given.top):
        count += 1
        if prediction.problem:
            bad += 1
            print(f"left out: {prediction.problem}", file=sys.stderr, flush=True)
        elif not output:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            named = [f"{name} {p:.1%}" for name, p in pairs]
            print(shown(prediction.path), *named, sep="\t", flush=True)
        if output or (sheet and len(rows) < _SHEET):
            rows.append(prediction)
    seconds = time.monotonic() - began
    if output:
        is_csv = output.endswith(".csv")
        write_output(output, _as_csv(rows, given.top) if is_csv else _as_json_lines(rows))
    if sheet:
        write_output(
            sheet,
            _draw(next(iter(copies.values())), [row for row in rows if not row.problem][:_SHEET]),
        )
    print(tell_speed(copies, count, seconds), file=sys.stderr)
    if bad:
        print(f"error: {bad} images could not be read, see above", file=sys.stderr)
    return cli.FAILURE if bad else 0


def _from_stdin() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _as_csv(rows: Sequence[Prediction], top: int) -> bytes:
    """A line for each image: path, problem, then class and probability of each rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = [f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability")]
    writer.writerow(["path", "problem", *ranks])
    for row in rows:
        pairs = zip(row.classes, row.probabilities, strict=True)
        cells = [shown(row.path), row.problem, *(x for pair in pairs for x in pair)]
        writer.writerow(cells + [""] * (2 + len(ranks) - len(cells)))
    return text.getvalue().encode()


def _as_json_lines(rows: Sequence[Prediction]) -> bytes:
    """An object for each image with the fields of Prediction."""
    lines = [json.dumps({**row._asdict(), "path": shown(row.path)}) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _draw(served: Served, rows: Sequence[Prediction]) -> bytes:
    """A sheet of images as the model sees them, with their likeliest classes, as a PNG file."""
    cells = []
    for row in rows:
        pixels = served.prepare(image_files.read(row.path)).numpy()
        # Of one channel: grey. Of other numbers of channels only the first three have colours.
        pixels = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
        cells.append(Cell(pixels, f"{row.classes[0]} {row.probabilities[0]:.0%}"))
    if not cells:
        raise DataError("there is no image to show on --sheet: none could be read")
    buffer = io.BytesIO()
    draw_grid(cells, columns=_COLUMNS).save(buffer, "PNG")
    return buffer.getvalue()


def find_devices() -> list[str]:
    """The names of the GPUs that TensorFlow sees; of the CPU where there are none."""
    gpus = tf.config.list_logical_devices("GPU")
    return [device.name for device in gpus] or ["/device:CPU:0"]


def predict(
    checkpoint: str,
    images: Sequence[str],
    *,
    top: int = 1,
    recursive: bool = False,
    devices: Sequence[str] | None = None,
) -> Iterator[Prediction]:
    """Classifies image files; the Prediction of a file that cannot be read says why.

    Args:
      checkpoint: see origins.open_origin.
      images: files, patterns or folders, local or gs://.
      top: how many classes to name for each.
      recursive: whether a folder stands for the images in the folders below it, too.
      devices: names of devices, each of which gets a copy of the model; None for `find_devices()`.

    Yields:
      One Prediction an image, in the order given (patterns and folders sorted).

    Raises:
      DataError: no such images.
      ConfigError: a checkpoint without a head.
    """
    paths = expand_images(images, recursive=recursive)
    copies, names = _open_copies(checkpoint, devices or find_devices())
    yield from _predict(copies, names, paths, top)


def _open_copies(checkpoint: str, devices: Sequence[str]) -> tuple[dict[str, Served], list[str]]:
    """Device -> a copy of the model on it, traced; and the names of the classes."""
    copies: dict[str, Served] = {}
    names: list[str] = []
    for device in devices:
        with tf.device(device):
            copies[device], names = open_served(checkpoint, hint=hint_without_flags(checkpoint))
            copies[device].serve.get_concrete_function()
    return copies, names


def tell_speed(
    copies: Mapping[str, Served],
    count: int,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """`4200 images on 2 devices, 412.0 a second of 530.0 that the network alone does here`.

    Args:
      copies: device -> the model on it.
      count: of the images that were predicted.
      seconds: that they took. Of few images this is all that is told: the network is not run again.
      clock: gives seconds.
    """
    on = f" on {len(copies)} devices" if len(copies) > 1 else ""
    told = f"{count} images{on}, {count / seconds:.1f} a second"
    if count < _MEASURED_FROM * len(copies):
        return told
    return f"{told} of {_peak(copies, clock):.1f} that the network alone does here"


def _peak(copies: Mapping[str, Served], clock: Callable[[], float]) -> float:
    """Images that the devices classify in a second, all at once, where these are in memory."""

    def classify(device: str) -> None:
        with tf.device(device):
            copies[device].classify(batches[device])["probabilities"].numpy()  # waits for it

    batches = {}
    for device, served in copies.items():
        with tf.device(device):
            model = served.model
            batches[device] = tf.zeros((_BATCH, *model.image_size, model.channels), tf.uint8)
    times = []
    with ThreadPoolExecutor(len(copies)) as pool:
        for _ in range(1 + _ROUNDS):
            began = clock()
            list(pool.map(classify, copies))
            times.append(clock() - began)
    return len(copies) * _BATCH / min(times[1:])


def _predict(
    copies: dict[str, Served], names: Sequence[str], paths: Sequence[str], top: int
) -> Iterator[Prediction]:
    """Hands batches to whichever device is free; yields what they find in the order of `paths`."""
    free: queue.Queue[str] = queue.Queue()
    for device in copies:
        free.put(device)

    def classify(batch: Sequence[str]) -> list[Prediction]:
        device = free.get()  # there are as many threads as devices: one is free
        try:
            with tf.device(device):
                return list(_predict_batch(copies[device], names, batch, top))
        finally:
            free.put(device)

    waiting: collections.deque[Future[list[Prediction]]] = collections.deque()
    pool = ThreadPoolExecutor(len(copies))
    try:
        for start in range(0, len(paths), _BATCH):
            waiting.append(pool.submit(classify, paths[start : start + _BATCH]))
            if len(waiting) > _AHEAD * len(copies):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _predict_batch(
    served: Served, names: Sequence[str], paths: Sequence[str], top: int
) -> Iterator[Prediction]:
    data, problems = _read(paths)
    # All at once, which is fast; only if that fails one by one.
    try:
        all_good = list(data.values())
        rows = served.serve(tf.stack(all_good))["probabilities"].numpy() if all_good else ()
    except tf.errors.InvalidArgumentError:
        # TensorFlow does not say which image failed, so each is prepared alone.
        found = {path: _problem(served, path, one) for path, one in data.items()}
        problems |= {path: text for path, text in found.items() if text}
        good = [one for path, one in data.items() if path not in problems]
        rows = served.serve(tf.stack(good))["probabilities"].numpy() if good else ()
    # `rows` has the readable images only, in the order of `paths`.
    each = iter(rows)
    for path in paths:
        if path in problems:
            yield Prediction(path, [], [], problems[path])
            continue
        row = next(each)
        # Stable: of equal probabilities the class with the smaller number comes first.
        best = np.argsort(-row, kind="stable")[:top]
        yield Prediction(path, [names[i] for i in best], [float(row[i]) for i in best])


def _read(paths: Sequence[str]) -> tuple[dict[str, tf.Tensor], dict[str, str]]:
    """Path -> bytes of a file, () string; and path -> why a file cannot be read, of the others."""
    data: dict[str, tf.Tensor] = {}
    problems: dict[str, str] = {}
    for path in paths:
        one, problem = image_files.try_read(path)
        if one is None:
            problems[path] = problem
        else:
            data[path] = one
    return data, problems


def _problem(served: Served, path: str, data: tf.Tensor) -> str:
    """Why an image cannot be classified; "" if it can."""
    try:
        served.prepare(data)
    except (tf.errors.InvalidArgumentError, DataError) as error:
        return image_files.unreadable(path, message_of(error))
    return ""


def script() -> None:
    """The program vit-dist-predict: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
