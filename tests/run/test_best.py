"""The best checkpoint by a metric, kept beside the newest; a run that gets no better ends."""

import json
import os
import signal

import numpy as np
import pytest
import tensorflow as tf

from tests.support import tiny
from vit_dist import train as train_module
from vit_dist.config.errors import UserError
from vit_dist.evaluate import evaluate
from vit_dist.evaluators.registry import KINDS, LOGITS, Kind
from vit_dist.run.best import Best
from vit_dist.run.check import check
from vit_dist.run.loop import Loop
from vit_dist.run.options import BestOptions
from vit_dist.run.origins import open_origin
from vit_dist.run.start import find_start
from vit_dist.train import train
from vit_dist.training.checkpoint import open_checkpoint

# Of an evaluation every two steps of 12; the best is in the middle, and "min" is elsewhere.
VALUES = {2: 0.2, 4: 0.1, 6: 0.5, 8: 0.5, 10: 0.4, 12: 0.3}


def config(**changed):
    changed = {"eval_steps": 2, "save_steps": 4, "log_steps": 4, "keep_checkpoints": 1, **changed}
    return tiny.make(**changed)


@pytest.fixture
def planned(monkeypatch):
    """What `val` gives at each step, whatever the weights are; a list of the steps judged."""
    judged = []

    class Planned(train_module.Evaluation):
        def __init__(self, options, data, model, strategy):
            pass

        def __call__(self, split, *, stop):
            step = Planned.loop_step()
            judged.append(step)
            if planned_stops.pop(step, None):
                os.kill(os.getpid(), signal.SIGTERM)
            return None if stop() else {"accuracy": VALUES[step], "loss": 1.0, "examples": 3.0}

    planned_stops = {}
    inner = Loop.judge

    def judge(loop, split, step):
        Planned.loop_step = staticmethod(lambda: step)
        return inner(loop, split, step)

    monkeypatch.setattr(train_module, "Evaluation", Planned)
    monkeypatch.setattr(Loop, "judge", judge)
    return judged, planned_stops


def best_of(workdir):
    found = open_checkpoint(f"{workdir}/best")
    return found.step, found.notes["best"]["value"]


def steps_saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("mode", "step"), [pytest.param("max", 6, marks=pytest.mark.exhaustive), ("min", 4)]
)
def test_the_best_stays_beside_the_newest(tmp_path, planned, mode, step):
    train(config(keep_best=f"{mode} val/accuracy"), str(tmp_path))
    assert best_of(tmp_path) == (step, VALUES[step])
    assert steps_saved(tmp_path) == [12]
    assert len(list((tmp_path / "best" / "checkpoints").iterdir())) == 1
    # The first of equal values stays (6 and 8), and its state is that of its step.
    assert int(open_checkpoint(f"{tmp_path}/best").arrays["step"]) == step


def test_patience(tmp_path, planned):
    judged, _ = planned
    options = {"keep_best": "max val/accuracy", "patience": 3}
    metrics = train(config(**options), str(tmp_path))
    # Nothing better since step 6: 8 is 2 steps later, 10 is 4. It is judged once, and saved.
    assert metrics["step"] == 10 and judged == [2, 4, 6, 8, 10]
    assert steps_saved(tmp_path) == [10] and best_of(tmp_path) == (6, 0.5)
    again = train(config(**options), str(tmp_path))
    assert again["step"] == 10 and steps_saved(tmp_path) == [10]
    rows = [row["step"] for row in tiny.rows(tmp_path) if "train/loss" in row]
    assert max(rows) <= 10


# In the evaluation that is the best one, and in the one that ends the run.
@pytest.mark.parametrize("at", [6, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, planned, at):
    _, stops = planned
    stops[at] = True
    options = {"keep_best": "max val/accuracy", "patience": 3}
    assert train(config(**options), str(tmp_path))["preempted"]
    assert train(config(**options), str(tmp_path))["step"] == 10
    assert best_of(tmp_path) == (6, 0.5) and steps_saved(tmp_path) == [10]


@pytest.mark.exhaustive
def test_what_was_judged_and_not_saved_is_judged_again(tmp_path, planned, monkeypatch):
    def fail(self, arrays, notes, *, step):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Best, "save", fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(config(keep_best="max val/accuracy", save_steps=2), str(tmp_path))
    assert steps_saved(tmp_path) == [2]
    train(config(keep_best="min val/accuracy", save_steps=2, total_steps=4), str(tmp_path))
    assert best_of(tmp_path) == (4, 0.1)


@pytest.mark.exhaustive
def test_by_another_evaluation_and_read_by_others(tmp_path):
    near = {"near": {"kind": "knn", "every": 4, "options": {"k": (5,)}}}
    made = config(evals=near, eval_steps=0, keep_best="max near/k5_accuracy")
    metrics = train(made, str(tmp_path / "run"))
    step, value = best_of(tmp_path / "run")
    assert value >= metrics["near_k5_accuracy"]
    origin = open_origin(f"{tmp_path}/run:best")
    assert origin.checkpoint.step == step
    found = evaluate(made, f"{tmp_path}/run:best", splits=[])
    assert found["near"]["k5_accuracy"] == pytest.approx(value)
    # A run may begin at it.
    options, _ = check(config(total_steps=1, init_from=f"{tmp_path}/run:best"))
    begun, best = (
        find_start(str(tmp_path / "next"), options),
        open_checkpoint(f"{tmp_path}/run/best"),
    )
    assert begun.how == "init_from" and begun.checkpoint.step == step
    name = "model/head/kernel"
    np.testing.assert_array_equal(begun.checkpoint.arrays[name], best.arrays[name])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["keep_best"]


def test_an_unknown_metric_is_named_before_the_run_begins():
    with pytest.raises(UserError, match="'val/acuracy' is unknown; there are val/accuracy, "):
        check(config(keep_best="max val/acuracy"))


AVERAGE = {"kind": "corruption_error", "options": {"of": {"fog": ("sure",)}}}
JUDGED = {
    "near": {"kind": "knn", "options": {"k": (5, 2000)}},
    "few": {"kind": "fewshot", "options": {"shots": (1,)}},
    "probe": {"kind": "linear_probe", "options": {"l2": (0.5,)}},
    "sure": {"kind": "classification", "options": {"top": (1, 2), "per_class": True}},
    "all": AVERAGE,
}


@pytest.mark.parametrize(
    "metric, known",
    [
        ("near/acuracy", "near/k5_accuracy, near/examples"),
        ("near/k2000_accuracy", "near/k5_accuracy, near/examples"),  # of 1257 training examples
        ("few/accuracy", "few/1shot_accuracy, few/examples"),
        ("probe/l2_1_accuracy", "probe/accuracy, probe/l2, probe/l2_0.5_accuracy, probe/examples"),
        ("sure/top5_accuracy", "sure/accuracy, sure/top2_accuracy, sure/mean_class_accuracy, "),
        ("sure/accuracy/cat", "sure/accuracy, .*, sure/accuracy/0, .*, sure/accuracy/9, "),
        ("all/mce", "all/mean_error, all/error/fog, all/examples"),
    ],
)
def test_an_unknown_metric_of_another_evaluation_is_named_before_the_run_begins(metric, known):
    with pytest.raises(UserError, match=f"'{metric}' is unknown; there are .*{known}"):
        check(config(keep_best=f"max {metric}", evals=JUDGED))


def test_what_evaluations_tell_may_be_kept():
    for metric in ("near/k5_accuracy", "sure/accuracy/3", "all/error/fog", "probe/examples"):
        options, _ = check(config(keep_best=f"min {metric}", evals=JUDGED))
        assert options.best.metric == metric


def test_an_evaluation_of_ones_own_need_not_tell(monkeypatch):
    plain = Kind(lambda: lambda judged: {"size": 1.0}, LOGITS, train=False)
    monkeypatch.setitem(KINDS, "plain", plain)
    check(config(keep_best="max own/anything", evals={"own": {"kind": "plain"}}))


def test_an_unknown_metric_of_such_an_evaluation_is_named_once_it_has_judged(tmp_path):
    options = BestOptions(metric="near/acuracy", mode="max", patience=0)
    best = Best(options, str(tmp_path), tf.distribute.get_strategy())
    with pytest.raises(UserError, match="'near/acuracy' is unknown; there are near/accuracy"):
        best.is_better(2, {"accuracy": 0.5})


def test_a_better_one_before_the_best_of_a_run_that_began_again_earlier(tmp_path):
    """The run goes on from step 200, say with another rate: RUN/best is the new one alone."""
    strategy, options = tf.distribute.get_strategy(), BestOptions("val/accuracy", "max", 0)
    for step, value in ((300, 0.5), (250, 0.6)):
        best = Best(options, str(tmp_path), strategy)
        assert best.is_better(step, {"accuracy": value})
        best.save({"step": np.int64(step)}, {}, step=step)
        best.wait()
        assert best_of(tmp_path) == (step, value)
    assert Best(options, str(tmp_path), strategy).step == 250


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"keep_best": "val/accuracy"}, "must be 'max NAME/METRIC' or 'min NAME/METRIC'"),
        ({"keep_best": "max near/accuracy"}, "with a NAME of what is judged: val"),
        ({"keep_best": "max val/loss", "data__val_split": ""}, "is judged: nothing"),
        ({"patience": 3}, "config.patience waits for a better value of config.keep_best"),
        ({"keep_best": "max val/loss", "patience": 0}, "config.patience must be 1 or more"),
        (
            {"keep_best": "max val/loss", "patience": 3, "eval_steps": 0},
            "val is judged at the end of the run alone: set config.eval_steps",
        ),
        (
            {
                "keep_best": "max near/k10_accuracy",
                "patience": 3,
                "evals": {"near": {"kind": "knn"}},
            },
            "near is judged at the end of the run alone: set config.evals.near.every",
        ),
    ],
)
def test_mistakes(changed, words):
    with pytest.raises(UserError, match=words):
        check(config(**changed))
