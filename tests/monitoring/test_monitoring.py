"""Metrics survive kills and resumes, rates leave out pauses, progress suits its console."""

import io
import json
import logging as std_logging
import re
import sys

import numpy as np
import pytest
from absl import logging
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.util import tensor_util

from vit_dist.monitoring.log import RunLog
from vit_dist.monitoring.meter import Meter
from vit_dist.monitoring.progress import Progress, format_duration, format_number
from vit_dist.monitoring.writer import make_writer


def read_rows(workdir):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_events(workdir):
    return EventAccumulator(str(workdir)).Reload()


def log_steps(workdir, steps, *, first_step=0, value=1.0):
    with make_writer(workdir, first_step=first_step) as writer:
        for step in steps:
            writer.scalars(step, {"loss": value})


# writer


def test_scalars_reach_both_files(tmp_path):
    with make_writer(tmp_path / "new" / "run") as writer:
        writer.scalars(10, {"loss": np.float32(1.5), "accuracy": 1})
    (row,) = read_rows(tmp_path / "new" / "run")
    assert row.pop("time") > 1e9
    assert row == {"step": 10, "loss": 1.5, "accuracy": 1.0}
    events = read_events(tmp_path / "new" / "run")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.5)]


def test_rows_are_on_disk_before_close(tmp_path):
    writer = make_writer(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    writer.close()


def test_tensorboard_calls_a_run_by_the_name_of_its_folder(tmp_path):
    for name in ("first", "second"):
        log_steps(tmp_path / "runs" / name, [10])
        (tmp_path / "runs" / name / "checkpoints").mkdir()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert sorted(multiplexer.Runs()) == ["first", "second"]


def test_a_run_of_an_older_version_keeps_its_curve(tmp_path):
    """Its events are in a folder of the run's; later points are dropped there too."""
    log_steps(tmp_path / "run", [10, 20, 30], value=1.0)
    old = tmp_path / "run" / "tensorboard"
    old.mkdir()
    for path in (tmp_path / "run").glob("events*"):
        path.rename(old / path.name)
    log_steps(tmp_path / "run", [30, 40], first_step=20, value=2.0)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert list(multiplexer.Runs()) == ["run/tensorboard"]
    points = [(e.step, e.value) for e in read_events(old).Scalars("loss")]
    assert points == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_a_folder_without_events_is_no_older_run(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    log_steps(tmp_path, [10])
    assert len(list(tmp_path.glob("events*"))) == 1


def test_constants_are_rows_and_no_curves(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.scalars(1, {"val/examples": 180, "val/loss": 1.0, "train/examples_per_second": 5.0})
    assert read_rows(tmp_path)[0]["val/examples"] == 180
    assert read_events(tmp_path).Tags()["scalars"] == ["val/loss", "speed/examples_per_second"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scalars_are_null(tmp_path, value):
    with make_writer(tmp_path) as writer:
        writer.scalars(1, {"loss": value})
    assert read_rows(tmp_path)[0]["loss"] is None
    (event,) = read_events(tmp_path).Scalars("loss")
    np.testing.assert_equal(event.value, value)  # TensorBoard has the value itself


def test_reserved_metric_name(tmp_path):
    with make_writer(tmp_path) as writer, pytest.raises(ValueError, match="be called 'time'"):
        writer.scalars(1, {"time": 3.0})


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, [10, 20, 30, 40], value=1.0)
    log_steps(tmp_path, [30, 40], first_step=20, value=2.0)
    expected = [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == expected
    assert [(e.step, e.value) for e in read_events(tmp_path).Scalars("loss")] == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_start_from_scratch_drops_a_run_that_never_saved(tmp_path):
    log_steps(tmp_path, [10, 20], value=1.0)
    log_steps(tmp_path, [10], value=2.0)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(10, 2.0)]
    assert [(e.step, e.value) for e in read_events(tmp_path).Scalars("loss")] == [(10, 2.0)]


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 20, "ti', '{"step"', "{"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    log_steps(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)
    log_steps(tmp_path, [30], first_step=20)
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 20, 30]


def test_untouched_rows_keep_their_bytes(tmp_path):
    log_steps(tmp_path, [10, 20])
    before = (tmp_path / "metrics.jsonl").read_text()
    log_steps(tmp_path, [], first_step=20)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_text_and_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    with make_writer(tmp_path) as writer:
        writer.text(0, "config", "**bold**")
        writer.images(5, "input", images)
        writer.images(5, "grey", images[..., :1])
    events = read_events(tmp_path)
    (text,) = events.Tensors("config")
    assert tensor_util.make_ndarray(text.tensor_proto)[0] == b"**bold**"
    assert events.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (event,) = events.Tensors("input")
    assert events.SummaryMetadata("input").plugin_data.plugin_name == "images"
    width, height, *pngs = tensor_util.make_ndarray(event.tensor_proto)
    assert (int(width), int(height), len(pngs)) == (6, 4, 2)
    for png, image in zip(pngs, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), image)


@pytest.mark.parametrize("shape,dtype", [((4, 6, 3), "uint8"), ((1, 4, 6, 3), "float32")])
def test_bad_images(tmp_path, shape, dtype):
    with make_writer(tmp_path) as writer, pytest.raises(ValueError, match=r"must be uint8 \[N"):
        writer.images(0, "x", np.zeros(shape, dtype))


def test_inactive_writer_does_nothing(tmp_path):
    with make_writer(tmp_path / "run", active=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.text(1, "config", "x")
        writer.images(1, "input", np.zeros((1, 2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()


# meter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_rates_leave_out_pauses(clock):
    meter = Meter(batch_size=64, num_devices=4, clock=clock)
    clock.now += 5  # building the model
    meter.start(20)
    clock.now += 2
    with meter.pause():
        clock.now += 100
    clock.now += 3
    meter.waited += 1.0
    rates = meter.read(30)
    assert rates == {
        "examples_per_second": 128.0,
        "examples_per_second_per_device": 32.0,
        "seconds_per_step": 0.5,
        "input_stall": 0.2,
    }
    clock.now += 1
    assert meter.read(31)["seconds_per_step"] == 1.0  # the pause belonged to the last interval


def test_a_pause_ends_even_if_its_body_fails(clock):
    meter = Meter(batch_size=1, num_devices=1, clock=clock)
    with pytest.raises(KeyError), meter.pause():
        clock.now += 7
        raise KeyError
    clock.now += 1
    assert meter.read(1)["seconds_per_step"] == 1.0


def test_eta_forgets_compilation_and_smooths(clock):
    meter = Meter(batch_size=1, num_devices=1, smoothing=0.7, clock=clock)
    meter.start(0)
    assert meter.eta(0, 100) is None
    clock.now += 60
    meter.read(10)
    assert meter.eta(10, 100) == pytest.approx(6 * 90)
    clock.now += 10
    meter.read(20)
    assert meter.eta(20, 100) == pytest.approx(1 * 80)
    clock.now += 20
    meter.read(30)
    assert meter.eta(30, 100) == pytest.approx(1.3 * 70)
    assert meter.eta(110, 100) == 0


# progress


def test_plain_lines_in_a_log():
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with Progress(1000, title="vit [demo]", console=console) as progress:
        progress.update(120, {"loss": 1.23456, "examples_per_second": 12345.6}, eta=42.4)
        progress.note("saved step 120")
        progress.update(1000, {})
    assert console.file.getvalue().splitlines() == [
        "vit [demo]",
        "step 120/1000  12%  loss 1.235  img/s 12,346  eta 0:42",
        "saved step 120",
        "step 1000/1000  100%",
    ]


METRICS = {
    "loss": 1.23456,
    "accuracy": 0.51171875,
    "learning_rate": 0.00123456,
    "grad_norm": 0.345678,
    "examples_per_second": 12345.6,
    "loss_scale": 32768.0,
}


def screens(console):
    """What a terminal shows in turn: each time the bar is drawn, its lines."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return text.replace("\r", "\n").split("\n")


@pytest.mark.parametrize("width", [80, 120])
def test_bar_on_a_terminal(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Progress(
        100_000, first_step=100, title="vit [demo]", waits="it compiles", console=console
    ) as progress:
        progress.update(12_000, METRICS, eta=372_300)
        progress.note("saved step 120")
    lines = screens(console)
    assert max(map(len, lines)) <= width
    bars = [line for line in lines if line.startswith("vit [demo] ")]
    assert re.fullmatch(r"vit \[demo\] [━╸╺ ]{20,} +100/100000 +0%\s*", bars[0])
    assert re.fullmatch(r"vit \[demo\] [━╸╺ ]{20,} +12000/100000 +12% +eta 103:25:00\s*", bars[-1])
    assert lines[lines.index(bars[0]) + 1].rstrip() == "it compiles"
    below = lines[lines.index(bars[-1]) + 1].rstrip()
    shown = "loss 1.235  accuracy 0.5117  lr 0.001235  grad_norm 0.3457  img/s 12,346"
    assert below == shown + ("  loss_scale 32,768" if width == 120 else "")
    assert "saved step 120" in map(str.rstrip, lines)


def test_a_narrow_terminal_breaks_metrics_at_spaces():
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    with Progress(10, title="vit", console=console) as progress:
        progress.update(5, METRICS, eta=42)
    lines = [line.rstrip() for line in screens(console)]
    assert max(map(len, lines)) <= 40
    below = lines[max(i for i, line in enumerate(lines) if line.startswith("vit ")) + 1 :]
    shown = "loss 1.235 accuracy 0.5117 lr 0.001235 grad_norm 0.3457 img/s 12,346 loss_scale 32,768"
    assert " ".join(" ".join(below).split()) == shown


def test_a_warning_stands_above_the_bar(monkeypatch):
    """And does not run into it: absl writes to the stream that standard error was at its import."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = logging.get_absl_handler()
    before = handler.python_handler.stream
    with Progress(10, title="vit", console=console) as progress:
        progress.update(5, {"loss": 1.0})
        handler.handle(std_logging.makeLogRecord({"msg": "masked: 3.jpg", "levelno": 30}))
        progress.update(6, {"loss": 2.0})
    assert handler.python_handler.stream is before
    lines = [line.rstrip() for line in screens(console)]
    (warning,) = (i for i, line in enumerate(lines) if "masked: 3.jpg" in line)
    assert not lines[warning].startswith("vit") and lines[warning].endswith("masked: 3.jpg")
    assert any(line.startswith("vit") and " 6/10 " in line for line in lines[warning:])


def test_a_log_file_for_errors_keeps_them(monkeypatch):
    """python -m vit_dist.train 2> errors: the bar's terminal does not take them."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with Progress(10, title="vit", console=console):
        print("an error", file=sys.stderr)
    assert errors.getvalue() == "an error\n" and "an error" not in console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_go_to_the_log(terminal, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with RunLog() as log:
        log.open(tmp_path)
        with Progress(1000, title="train", console=console) as progress:
            progress.update(120, {"loss": 1.23456, "learning_rate": 0.1}, eta=42.4)
            progress.note("step 120: saved")
    text = (tmp_path / "log.txt").read_text()
    assert "step 120/1000  12%  loss 1.235  lr 0.1  eta 0:42\n" in text
    assert text.endswith(" step 120: saved\n")


@pytest.mark.parametrize(
    "value,text",
    [(0, "0"), (1.23456, "1.235"), (3e-5, "3e-05"), (1234.5, "1,234"), (float("nan"), "nan")],
)
def test_format_number(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize("seconds,text", [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00")])
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
