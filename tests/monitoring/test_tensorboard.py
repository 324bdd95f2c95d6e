"""A training with everything on, read back from TensorBoard's files."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from tests.support import tiny
from vit_dist.config.errors import ConfigError
from vit_dist.costs.flops import train_flops
from vit_dist.monitoring.curves import GROUPS
from vit_dist.run.check import check
from vit_dist.train import train
from vit_dist.training.checkpoint import open_checkpoint

PROFILED = range(5, 7)
LOOKS = [3, 6, 9]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """9 steps that look at every third, and profile two."""
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    train(
        tiny.make(
            total_steps=9,
            save_steps=3,
            keep_checkpoints=9,
            monitor__watch_steps=3,
            monitor__update_norm=True,
            profile__start_step=PROFILED.start,
            profile__num_steps=len(PROFILED),
            step__ema_decay=0.5,
        ),
        str(workdir),
    )
    return workdir


@pytest.fixture(scope="module")
def events(run):
    return EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def test_every_group_has_curves(run, events):
    curves = events.Tags()["scalars"]
    groups = {curve.split("/")[0] for curve in curves}
    watched = {f"{kind}_norm" for kind in ("weights", "gradients", "updates")}
    assert groups == set(GROUPS) - {"test"} | watched
    for curve in (
        "optimizer/learning_rate",
        "optimizer/grad_norm",
        "optimizer/grad_norm_clipped",
        "optimizer/update_norm",
        "optimizer/weight_norm",
        "optimizer/ema_distance",
        "speed/examples_per_second",
        "speed/mfu",
        "speed/step_seconds_median",
        "speed/step_seconds_p95",
        "speed/seconds_in_saving",
        "speed/input_stall",
        "memory/host",
        "data/examples_seen",
        "goodput/restarts",
    ):
        assert all(np.isfinite(e.value) for e in events.Scalars(curve)), curve
    assert {e.step: e.value for e in events.Scalars("data/examples_seen")}[9] == 9 * 16


def test_values_are_what_they_are_called(run, events):
    row = [row for row in tiny.rows(run) if "train/loss" in row][-1]
    assert row["optimizer/grad_norm_clipped"] == min(row["train/grad_norm"], 1.0)
    arrays = open_checkpoint(str(run)).arrays
    distance = np.sqrt(sum(
        np.sum((arrays[k] - arrays[k.replace("model/", "ema/")]) ** 2)
        for k in arrays if k.startswith("model/")
    ))  # fmt: skip
    np.testing.assert_allclose(row["optimizer/ema_distance"], distance, rtol=1e-4)
    flops = train_flops(check(tiny.make())[0].model.network)
    rate = row["train/examples_per_second_per_device"] * flops
    np.testing.assert_allclose(row["speed/tflops_per_device"] * 1e12, rate, rtol=1e-6)
    assert 0 < row["speed/mfu"] < 1
    assert 0.05 < row["memory/host"] < 64


def test_looks_come_at_their_steps(run, events):
    name = "encoderblock_0/attention/query/kernel"
    for kind in ("weights", "gradients", "updates"):
        shown = events.Tensors(f"{kind}/{name}")
        assert [event.step for event in shown] == LOOKS
        assert [event.step for event in events.Scalars(f"{kind}_norm/{name}")] == LOOKS
        table = tensor_util.make_ndarray(shown[-1].tensor_proto)
        assert table.shape == (30, 3) and table[:, 2].sum() == 16 * 16
    weights = open_checkpoint(str(run)).arrays[f"model/{name}"]
    edges = tensor_util.make_ndarray(events.Tensors(f"weights/{name}")[-1].tensor_proto)[:, :2]
    np.testing.assert_allclose(
        [edges.min(), edges.max()], [weights.min(), weights.max()], rtol=1e-5
    )
    total = sum(events.Scalars(f"updates_norm/{n}")[-1].value ** 2 for n in names(events))
    np.testing.assert_allclose(
        np.sqrt(total), events.Scalars("optimizer/update_norm")[-1].value, rtol=1e-5
    )


def names(events):
    return [t.partition("/")[2] for t in events.Tags()["scalars"] if t.startswith("updates_norm/")]


def test_texts(run, events):
    def text(name):
        (event,) = events.Tensors(name)
        return tensor_util.make_ndarray(event.tensor_proto)[0].decode()

    assert "1 replica(s) on CPU" in text("run") and "| tensorflow | " in text("run")
    changed = text("config_changes")
    assert "| `monitor.watch_steps` | `3` | `0` |" in changed
    assert "`optimizer.learning_rate`" not in changed  # as the defaults
    model = text("model")
    assert "| encoderblock_0/mlp/dense_1 | kernel (16, 16), bias (16,) | 272 |" in model
    assert "encoderblock_0/attention/logits" in model
    assert "starting from scratch" in text("weights")
    assert json.loads(text("config").strip("`json\n"))["total_steps"] == 9


def test_the_profile_has_exactly_its_steps(run):
    (path,) = run.glob("plugins/profile/*/*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    steps = []
    for plane in space.planes:
        stats = {number: meta.name for number, meta in plane.stat_metadata.items()}
        for event in (event for line in plane.lines for event in line.events):
            if plane.event_metadata[event.metadata_id].name == "train":
                steps += [s.int64_value or s.uint64_value for s in event.stats
                          if stats[s.metadata_id] == "step_num"]  # fmt: skip
    assert steps == list(PROFILED)


def test_a_profile_beyond_the_end():
    with pytest.raises(ConfigError, match=r"asks for steps 10\.\.14, and the run has 12"):
        check(tiny.make(profile__start_step=10))


def test_a_file_of_devices_is_read_before_devices_start(tmp_path):
    path = tmp_path / "devices.json"
    path.write_text('{"Mine": {"match": "mine", "float32": 5}}')
    options, _ = check(tiny.make(monitor__device_file=str(path)))
    assert options.monitor.devices[-1].name == "Mine"
    with pytest.raises(ConfigError, match=r"config\.monitor\.device_file .* cannot be read"):
        check(tiny.make(monitor__device_file=str(tmp_path / "none.json")))
