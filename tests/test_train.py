"""train() and evaluate() from end to end, in this process, on data of a few pixels."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import processes
import pytest
import tensorflow as tf
import tiny
from absl import logging
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_dist import config as config_lib
from vit_dist.data.order import train_indices
from vit_dist.evaluate import evaluate
from vit_dist.preemption import Preemption
from vit_dist.restore import find_start
from vit_dist.strategy import make_strategy
from vit_dist.train import train
from vit_dist.training.checkpoint import Checkpointer, open_checkpoint
from vit_dist.wiring import check, train_data

ANY_SIZE = f"resize(size)|{tiny.OPS}"


def make(**changed):
    """The tiny config with keys changed; a dot is written as __."""
    config = tiny.get_config()
    for key, value in changed.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return config_lib.finalize(config)


def without_evaluation(**changed):
    return make(data__val_split="", data__test_split="", **changed)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays(workdir):
    return open_checkpoint(str(workdir)).arrays


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run that several tests look at."""

    workdir: object
    config: object
    metrics: dict
    handlers: tuple


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """12 steps with XLA and a moving average; log at 4, evaluate at 5, save at 3 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    config = make(eval_steps=5, save_steps=3, step__ema_decay=0.5, step__jit="auto")
    metrics = train(config, str(workdir))
    handlers = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
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
    expected = [(3, "train"), (4, "train"), (5, "val"), (8, "train"), (10, "val"), (12, "train")]
    expected += [(12, "val"), (12, "test")]
    assert kinds == [(step, [kind]) for step, kind in expected]


def test_tensorboard_shows_the_same(trained):
    events = EventAccumulator(str(trained.workdir / "tensorboard")).Reload()
    names = ("loss", "learning_rate", "grad_norm", "weight_norm", "examples_per_second_per_device")
    tags = [f"train/{name}" for name in names] + ["val/accuracy", "test/accuracy"]
    for tag in tags:
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        logged = [(row["step"], row[tag]) for row in rows(trained.workdir) if tag in row]
        assert len(shown) == len(logged) > 0
        np.testing.assert_allclose(shown, logged, rtol=1e-6)


def test_the_config_is_kept(trained):
    saved = json.loads((trained.workdir / "config.json").read_text())
    assert saved == json.loads(config_lib.to_json(trained.config))
    assert saved["total_steps"] == 12 and saved["log_percent"] is None
    checkpoint = open_checkpoint(str(trained.workdir))
    assert checkpoint.notes["config"] == saved
    assert checkpoint.notes["class_names"] == list("0123456789")


def test_the_newest_checkpoints_stay(trained):
    names = sorted(path.name for path in (trained.workdir / "checkpoints").iterdir())
    assert names == ["000000009", "000000012"]
    assert arrays(trained.workdir)["step"] == 12


def test_signal_handlers_are_put_back(trained):
    assert trained.handlers == (signal.SIG_DFL, signal.default_int_handler)


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
    config = make(image_size=16, input__eval_ops=ANY_SIZE, input__train_ops=ANY_SIZE)
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


# resuming

HARD = {
    "step__ema_decay": 0.9,
    "step__accumulation": 2,
    "strategy__name": "mirrored",
    "strategy__virtual_cpus": 2,
    "schedule__name": "cosine",
    "schedule__warmup_steps": 2,
}


def test_resumed_is_bit_equal_to_uninterrupted(tmp_path, monkeypatch, caplog):
    """Dropout, moving average, accumulation, two replicas; stopped in the middle of nowhere."""
    train(without_evaluation(**HARD), str(tmp_path / "whole"))

    stopped = without_evaluation(**HARD, eval_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "requested", lambda self: saw.append(1) or len(saw) == 2)
        saw = []
        metrics = train(stopped, str(tmp_path / "parts"))
    assert metrics["step"] == 5 and metrics["preempted"] == 1.0
    assert arrays(tmp_path / "parts")["step"] == 5

    logging.get_absl_logger().propagate = True
    with caplog.at_level("WARNING"):
        metrics = train(without_evaluation(**HARD), str(tmp_path / "parts"))
    assert "going on with a changed config: eval_steps: 5 -> 100" in caplog.text
    assert metrics["step"] == 12 and "preempted" not in metrics
    assert_same(arrays(tmp_path / "parts"), arrays(tmp_path / "whole"))
    assert [row["step"] for row in rows(tmp_path / "parts")] == [4, 8, 12]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_order_does_not_depend_on_the_replicas(replicas):
    """A run that goes on with other devices reads what it would have read."""
    ops = "value_range(-1, 1)|keep('image', 'label', 'index')"
    run = check(make(input__train_ops=ops, strategy__virtual_cpus=0 if replicas == 1 else replicas))
    name = "single" if replicas == 1 else "mirrored"
    strategy = make_strategy(name=name, virtual_cpus=run.config.strategy.virtual_cpus)
    batches, seen = iter(train_data(run, strategy, first_step=77)), []
    for _ in range(3):
        parts = strategy.experimental_local_results(next(batches)["index"])
        assert [len(part) for part in parts] == [16 // replicas] * replicas
        seen += [int(i) for part in parts for i in part]
    known = {"num_examples": 1257, "batch_size": 16, "seed": 0}
    assert seen == train_indices(**known, first_step=77, num_steps=3).tolist()


@pytest.mark.parametrize(
    "changed,word",
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"input__batch_size": 32}, "input.batch_size: 16 -> 32"),
        ({"data__train_split": "val"}, 'data.train_split: "train" -> "val"'),
    ],
)
def test_another_order_of_the_data_is_refused(trained, changed, word):
    config = make(step__ema_decay=0.5, **changed)
    with pytest.raises(
        ValueError, match="step 12 of a run with another order of the data"
    ) as error:
        train(config, str(trained.workdir))
    assert word in str(error.value) and "config.resume_from" in str(error.value)


def test_where_a_run_begins(trained, tmp_path):
    """Resume > resume_from > init_from > scratch."""
    here, there, empty = str(trained.workdir), str(tmp_path / "there"), str(tmp_path / "empty")
    checkpointer = Checkpointer(there)
    checkpointer.save({"step": np.array(3)}, step=3, notes={})
    checkpointer.wait()
    both = {"resume_from": there, "init_from": here}
    for workdir, changed, expected in (
        (here, both, ("resume", 12)),
        (empty, both, ("resume_from", 3)),
        (empty, {"init_from": here}, ("init_from", 12)),
        (empty, {}, ("scratch", None)),
    ):
        start = find_start(workdir, make(**changed))
        assert (start.how, start.checkpoint and start.checkpoint.step) == expected


def test_resume_from_another_run(trained, tmp_path, capsys):
    config = without_evaluation(
        step__ema_decay=0.5, resume_from=str(trained.workdir), total_steps=14, seed=3
    )
    metrics = train(config, str(tmp_path))
    assert metrics["step"] == 14 and arrays(tmp_path)["updates"] == 14
    assert f"continuing from step 12 ({trained.workdir}/checkpoints/" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [14]


def test_a_checkpoint_that_does_not_fit(trained, tmp_path):
    wide = without_evaluation(model__width=32, resume_from=str(trained.workdir))
    with pytest.raises(ValueError, match="does not fit the config") as error:
        train(wide, str(tmp_path))
    assert "config.init_from" in str(error.value)
    wide = without_evaluation(model__width=32, init_from=str(trained.workdir))
    with pytest.raises(ValueError, match=r"set model.variant \(and width"):
        train(wide, str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images each of two classes, and one more class directory for evaluation."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(random.integers(0, 255, (20, 20, 3), np.uint8))
                image.save(folder / split / name / f"{i}.jpg")
    return folder


def of_folder(folder, **changed):
    ops = f"decode|{ANY_SIZE}"
    data = {"data__source": "folder", "data__data_dir": str(folder), "data__test_split": ""}
    return make(**data, input__train_ops=ops, input__eval_ops=ops, total_steps=2, **changed)


def damage(path):
    """The header stays, the rest is lost: what an interrupted copy leaves."""
    path.write_bytes(path.read_bytes()[:200])


def test_init_from_adapts_to_size_classes_and_pooling(trained, folder, tmp_path, capsys):
    config = of_folder(
        folder, image_size=16, model__pool="tok", init_from=str(trained.workdir),
        optimizer__learning_rate=0.0,
    )  # fmt: skip
    metrics = train(config, str(tmp_path))
    text = capsys.readouterr().out
    assert metrics["step"] == 2 and metrics["val_examples"] == 16
    assert f"weights from {trained.workdir}/checkpoints/000000012" in text
    assert "resized: pos_embedding" in text and "replaced: head/kernel" in text
    assert "replaced: cls" in text
    mine, theirs = arrays(tmp_path), arrays(trained.workdir)
    kernel = next(name for name in mine if name.startswith("model/embedding") and "kernel" in name)
    np.testing.assert_array_equal(mine[kernel], theirs[kernel.replace("model/", "ema/")])
    assert mine["model/head/kernel"].shape == (16, 2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named(folder, trained, split, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    bad = tmp_path / "images" / split / "dogs" / "5.jpg"
    damage(bad)
    config = of_folder(tmp_path / "images", init_from="")
    with pytest.raises(ValueError, match="replace it or remove it") as error:
        if split == "train":
            train(config, str(tmp_path / "run"))
        else:
            evaluate(config, str(trained.workdir), splits=["val"])
    assert str(bad) in str(error.value)


# precision, and when it fails


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains(precision, tmp_path):
    config = without_evaluation(precision=precision, total_steps=4, step__clip_norm=None)
    metrics = train(config, str(tmp_path))
    assert metrics["loss"] == pytest.approx(np.log(10), abs=0.5)
    if precision == "float16":
        assert metrics["loss_scale"] <= 2.0**15 and metrics["skipped_steps"] < 4
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
        "--config.data.test_split=",
    ]
    code, text = processes.run(*flags, log=tmp_path / "log")
    assert code == 1 and "Traceback" not in text
    (message,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "the loss or gradient of step 13 is not finite" in message
    assert "optimizer.learning_rate" in message
    assert_same(arrays(workdir), arrays(trained.workdir))


def test_gradients_are_those_of_the_global_batch(tmp_path):
    """The same run on 1, 2 and 4 devices, and in micro-batches: equal to rounding."""
    plain = {"model__dropout": 0.0, "optimizer__name": "sgd", "total_steps": 3}
    ways = (
        {"strategy__name": "single"},
        {"strategy__name": "mirrored", "strategy__virtual_cpus": 4},
        {"strategy__name": "single", "step__accumulation": 4},
    )
    results = []
    for i, way in enumerate(ways):
        train(without_evaluation(**plain, **way), str(tmp_path / str(i)))
        results.append(arrays(tmp_path / str(i)))
    for other in results[1:]:
        for name in other:
            np.testing.assert_allclose(other[name], results[0][name], atol=1e-5, err_msg=name)


def test_zero_steps_evaluate_the_start(tmp_path):
    metrics = train(make(total_steps=0, data__val_split=""), str(tmp_path))
    assert metrics["step"] == 0 and metrics["test_examples"] == 360
    assert not (tmp_path / "checkpoints").exists()
    assert tf.io.gfile.exists(str(tmp_path / "config.json"))
