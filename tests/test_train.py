"""train() and evaluate() from end to end, in this process, on data of a few pixels."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import processes
from tests.support.tiny import (
    ANY_SIZE,
    arrays,
    assert_same,
    make,
    make_folder,
    of_folder,
    rows,
    without_evaluation,
)
from vit_dist.cluster.agreement import Meeting
from vit_dist.config import defaults as config_lib
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.evaluate import evaluate
from vit_dist.monitoring.curves import curve_of
from vit_dist.storage.lock import LOCK_FILE, STALE_SECONDS
from vit_dist.train import train
from vit_dist.training.checkpoint import Checkpointer, open_checkpoint


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run that several tests look at."""

    workdir: object
    config: object
    metrics: dict
    handlers: tuple


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """12 steps with a moving average; log at 4, evaluate at 6, save at 3 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    config = make(data__test_split="test", eval_steps=6, save_steps=3, step__ema_decay=0.5)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    metrics = train(config, str(workdir))
    handlers = (before, [signal.getsignal(number) for number in numbers])
    return Trained(workdir, config, metrics, handlers)


# what a run leaves behind


def test_final_metrics(trained):
    metrics = trained.metrics
    assert metrics["step"] == 12 and metrics["epoch"] == pytest.approx(12 * 16 / 1257)
    assert metrics["val_examples"] == 180 and metrics["test_examples"] == 360
    assert 0 < metrics["test_accuracy"] <= metrics["test_top5_accuracy"] <= 1
    assert metrics["loss"] == pytest.approx(np.log(10), abs=0.5)
    assert "preempted" not in metrics


def test_rows_come_at_exactly_these_steps(trained):
    kinds = [(row["step"], sorted({key.split("/")[0] for key in row} - {"step", "time"})) for row
             in rows(trained.workdir)]  # fmt: skip
    # The first call ends with the first event, here a checkpoint, and is always logged.
    expected = [(3, "train"), (4, "train"), (6, "val"), (8, "train"), (12, "train")]
    expected += [(12, "val"), (12, "test")]
    # Goodput is told with what is logged of training.
    beside = {"train": ["data", "goodput", "memory", "optimizer", "restarts", "speed"]}
    assert kinds == [(step, [*beside.get(kind, []), kind]) for step, kind in expected]


def test_tensorboard_shows_the_same(trained):
    events = EventAccumulator(str(trained.workdir)).Reload()
    names = ("loss", "learning_rate", "grad_norm", "weight_norm", "input_stall")
    names += ("examples_per_second_per_device",)
    keys = [f"train/{name}" for name in names] + ["val/accuracy", "test/accuracy"]
    keys += ["data/examples_seen", "speed/tflops_per_device", "memory/host"]
    keys += ["optimizer/ema_distance", "optimizer/grad_norm_clipped", "restarts"]
    for key in keys:
        shown = [(event.step, event.value) for event in events.Scalars(curve_of(key))]
        logged = [(row["step"], row[key]) for row in rows(trained.workdir) if key in row]
        assert len(shown) == len(logged) > 0
        np.testing.assert_allclose(shown, logged, rtol=1e-6)


def test_the_config_is_kept(trained):
    saved = json.loads((trained.workdir / "config.json").read_text())
    assert saved == json.loads(config_lib.to_json(trained.config))
    assert saved["total_steps"] == 12 and saved["log_percent"] is None
    # And what was expected of it, for the report.
    assert json.loads((trained.workdir / "plan.json").read_text())[0]["expected"] > 0
    checkpoint = open_checkpoint(str(trained.workdir))
    assert checkpoint.notes["config"] == saved
    assert checkpoint.notes["class_names"] == list("0123456789")


def test_the_newest_checkpoints_stay(trained):
    names = sorted(path.name for path in (trained.workdir / "checkpoints").iterdir())
    assert names == ["000000009", "000000012"]
    assert arrays(trained.workdir)["step"] == 12


def test_signal_handlers_are_put_back(trained):
    before, after = trained.handlers
    assert after == before


def test_evaluate_agrees_with_train(trained):
    results = evaluate(trained.config, str(trained.workdir))
    for split in ("val", "test"):
        assert {f"{split}_{key}": value for key, value in results[split].items()} == {
            key: value for key, value in trained.metrics.items() if key.startswith(split)
        }


def test_the_moving_average_is_what_is_judged(trained, tmp_path):
    """Without it in the checkpoint the plain weights are evaluated, and give another loss."""
    found = open_checkpoint(str(trained.workdir))
    plain = {name: a for name, a in found.arrays.items() if not name.startswith("ema/")}
    assert len(plain) < len(found.arrays)
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(plain, step=12, notes=found.notes)
    checkpointer.wait()
    loss = evaluate(trained.config, str(tmp_path), splits=["test"])["test"]["loss"]
    assert abs(loss - trained.metrics["test_loss"]) > 1e-5


def test_evaluate_at_twice_the_resolution(trained):
    ops = {"input__eval_ops": ANY_SIZE, "input__train_ops": ANY_SIZE}
    config = make(data__test_split="test", image_size=16, **ops)
    results = evaluate(config, str(trained.workdir), splits=["test"])["test"]
    assert results["examples"] == 360 and np.isfinite(results["loss"])
    with pytest.raises(ValueError, match="split 'x' is not configured; there are"):
        evaluate(config, str(trained.workdir), splits=["x"])


def test_a_finished_run_only_evaluates_again(trained, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(trained.workdir, workdir)
    metrics = train(trained.config, str(workdir))
    assert metrics["step"] == 12
    for key in ("val_accuracy", "test_accuracy", "test_loss"):
        assert metrics[key] == trained.metrics[key]
    assert_same(arrays(workdir), arrays(trained.workdir))


# Of train: tests/data/test_damage.py, without a run around it.
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.exhaustive), "val"])
def test_a_damaged_image_is_named(split, tmp_path):
    """The header stays, the rest is lost: what an interrupted copy leaves."""
    bad = make_folder(tmp_path / "images") / split / "dogs" / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    config = of_folder(tmp_path / "images", optimizer__learning_rate=0.0)
    with pytest.raises(ValueError, match="replace it or remove it") as error:
        train(config, str(tmp_path / "run"))
    assert str(bad) in str(error.value)
    if split == "val":  # found at the end: the training itself is saved
        assert arrays(tmp_path / "run")["step"] == 2
        with pytest.raises(ValueError, match="replace it or remove it") as error:
            evaluate(config, str(tmp_path / "run"), splits=["val"])
        assert str(bad) in str(error.value)


# precision, and when it fails


@pytest.mark.compiles
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains(precision, tmp_path, capsys):
    """bfloat16 with XLA, which also compiles the evaluation."""
    half = {
        "precision": precision,
        "total_steps": 4,
        "step__clip_norm": None,
        "model__dropout": 0.1,
    }
    if precision == "bfloat16":
        config = make(**half, step__jit="auto")
    else:
        config = without_evaluation(**half)
    metrics = train(config, str(tmp_path))
    assert metrics["loss"] == pytest.approx(np.log(10), abs=0.5)
    if precision == "bfloat16":
        assert metrics["val_loss"] == pytest.approx(np.log(10), abs=0.5)
    if precision == "float16":
        assert metrics["loss_scale"] <= 2.0**15 and metrics["skipped_steps"] < 4
        assert {"train/loss_scale", "train/skipped_steps"} <= set(rows(tmp_path)[-1])
        assert "  skipped_steps " in capsys.readouterr().out
    saved = arrays(tmp_path)
    assert {a.dtype for name, a in saved.items() if name.startswith("model/")} == {np.dtype("f4")}
    assert saved["updates"] > 0


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path):
    """By the command: one message with the step, no bad state saved, the last checkpoint good."""
    workdir = tmp_path / "run"
    shutil.copytree(trained.workdir, workdir)
    flags = [f"--config={processes.TINY}", f"--workdir={workdir}", "--config.total_steps=40"]
    flags += ["--config.optimizer.learning_rate=1e30", "--config.save_steps=3"]
    flags += [
        "--config.step.ema_decay=0.5",
        "--config.data.val_split=",
    ]
    code, text = processes.run(*flags, log=tmp_path / "log")
    assert code == 1 and "Traceback" not in text
    (message,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "the loss or gradient of step 13 is not finite" in message
    assert "optimizer.learning_rate" in message
    assert_same(arrays(workdir), arrays(trained.workdir))


def test_no_state_is_saved_after_a_loss_that_is_not_finite(tmp_path):
    """Noticed before a checkpoint too, where nothing is logged."""
    config = without_evaluation(optimizer__learning_rate=1e30, save_steps=1, log_steps=100)
    with pytest.raises(FloatingPointError, match="gradient of step 1 is not finite"):
        train(config, str(tmp_path))
    saved = arrays(tmp_path)
    assert (saved["step"], saved["first_bad_step"]) == (1, -1)


@pytest.mark.exhaustive  # of the step alone: training/test_topologies.py; also run/test_elastic.py
def test_devices_and_micro_batches_change_nothing(tmp_path):
    """The same run on one device at once, and on two in two parts each: equal to rounding."""
    plain = {"model__dropout": 0.0, "optimizer__name": "sgd", "total_steps": 3}
    parted = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2, "step__accumulation": 2}
    train(without_evaluation(**plain), str(tmp_path / "whole"))
    train(without_evaluation(**plain, **parted), str(tmp_path / "parted"))
    assert_same(arrays(tmp_path / "parted"), arrays(tmp_path / "whole"), atol=1e-5)


@pytest.mark.parametrize(
    "total", [{"total_steps": 0}, {"total_steps": None, "total_epochs": 0.001}]
)
def test_nothing_to_train_is_an_error(tmp_path, total):
    with pytest.raises(ConfigError, match=r"nothing would be trained: config\.total_.* is 0 steps"):
        train(make(**total), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_looked_for_once_the_chief_has_the_lock(monkeypatch, tmp_path):
    """On all hosts: what an earlier chief still saves would be there for some of them alone."""
    seen = []

    class Met(Meeting):
        def gather(self, value, *, chief_seconds=0.0):
            assert chief_seconds == STALE_SECONDS
            seen.append(("all have met", (tmp_path / LOCK_FILE).exists()))

    def find_start(workdir, options):
        seen.append("looked")
        raise DataError("enough")

    monkeypatch.setattr("vit_dist.train.meet", lambda *_, **__: Met(None, {}, timeout_seconds=1))
    monkeypatch.setattr("vit_dist.train.find_start", find_start)
    with pytest.raises(DataError, match="enough"):
        train(make(), str(tmp_path))
    assert seen == [("all have met", True), "looked"]
