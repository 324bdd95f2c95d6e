"""Events are written by a thread, which no training waits for and which ends none."""

import threading

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

from vit_dist.monitoring import files
from vit_dist.monitoring.curves import GROUPS, curve_of
from vit_dist.monitoring.files import EventFile
from vit_dist.monitoring.meter import Meter
from vit_dist.monitoring.writer import make_writer


def test_nobody_waits_for_a_slow_disk(tmp_path, caplog):
    gate, writer = threading.Event(), threading.current_thread().name
    made_by = []

    def slow():
        made_by.append(threading.current_thread().name)
        gate.wait()
        return event_pb2.Event(step=1)

    events = EventFile(tmp_path, most=4)
    for _ in range(20):
        events.add(slow)  # returns though nothing is written
    gate.set()
    events.close()
    told = [r for r in caplog.records if "as fast as events come" in r.getMessage()]
    assert len(told) == 1
    assert 1 <= len(made_by) < 20 and writer not in made_by


def test_an_event_that_cannot_be_made_is_told_once(tmp_path, caplog):
    def broken():
        raise ZeroDivisionError

    with make_writer(tmp_path) as writer:
        for step in (1, 2):
            writer.summary(step, broken)
        writer.scalars(3, {"train/loss": 1.0})
    told = [r for r in caplog.records if "TensorBoard lacks something" in r.getMessage()]
    assert len(told) == 1
    assert [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")] == [3]


def test_an_error_of_any_kind_stops_no_run(tmp_path, caplog, monkeypatch):
    def odd(path, mode):
        # No error of the storage that anybody would expect.
        if "tfevents" in path.name:
            raise KeyError("uid 1234")
        return real(path, mode)

    real = files.open_growing
    monkeypatch.setattr(files, "open_growing", odd)
    with make_writer(tmp_path) as writer:
        writer.scalars(1, {"train/loss": 1.0})
        writer.scalars(2, {"train/loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("going on without TensorBoard") == 1


def test_histograms_and_norms_are_read_back(tmp_path):
    norms = np.array([[2.0, -1.0, 1.0], [np.nan, np.nan, np.nan]], np.float32)
    counts = np.array([[1, 3], [0, 0]], np.float32)
    with make_writer(tmp_path) as writer:
        writer.watched(6, "gradients", ["head/kernel", "head/bias"], norms, counts)
        writer.watched(8, "weights", ["head/kernel"], norms[:1], None)
        # A look before the first log is kept, too: what begins a start comes before either.
        writer.scalars(10, {"train/loss": 1.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("gradients/head/kernel")
    table = tensor_util.make_ndarray(event.tensor_proto)
    np.testing.assert_array_equal(table, [[-1, 0, 1], [0, 1, 3]])
    assert events.SummaryMetadata("gradients/head/kernel").plugin_data.plugin_name == "histograms"
    assert events.Tags()["tensors"] == ["gradients/head/kernel"]
    tags = {"gradients_norm/head/kernel", "gradients_norm/head/bias", "weights_norm/head/kernel"}
    assert set(events.Tags()["scalars"]) == {*tags, "train/loss"}


def test_every_curve_of_a_training_has_a_group():
    names = ["train/loss", "train/learning_rate", "train/masked_truncated", "restarts"]
    names += ["train/input_stall", "train/epoch", "speed/mfu", "val/loss", "goodput/running"]
    curves = [curve_of(name) for name in names]
    assert {curve.split("/")[0] for curve in curves} <= set(GROUPS)
    assert curves[:5] == [
        "train/loss", "optimizer/learning_rate", "data/masked_truncated", "goodput/restarts",
        "speed/input_stall",
    ]  # fmt: skip


def test_times_of_steps():
    meter = Meter(batch_size=8, num_devices=1)
    assert meter.step_times() == {}
    for steps, seconds in ((10, 10.0), (8, 16.0), (2, 14.0)):
        meter.called(steps, seconds)
    # 10 steps of 1 s, 8 of 2 s, 2 of 7 s.
    assert meter.step_times() == {"step_seconds_median": 1.0, "step_seconds_p95": 7.0}
    meter.called(1, 1.5)
    assert meter.step_times()["step_seconds_median"] == 1.5


def test_time_in_pauses_is_told_by_kind():
    times = iter([0.0, 0.0, 1.0, 4.0, 5.0, 7.0, 8.0, 9.0])
    meter = Meter(batch_size=8, num_devices=1, clock=lambda: next(times))
    with meter.pause("saving"):
        pass
    with meter.pause("saving"):
        pass
    assert meter.seconds == {"saving": 1.0 + 1.0}
