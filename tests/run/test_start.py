"""Where a run begins: resumed to the bit, continued, with another's weights, or from scratch."""

import types

import numpy as np
import pytest
from absl import logging

from tests.support.tiny import (
    arrays,
    assert_same,
    make,
    make_folder,
    of_folder,
    rows,
    without_evaluation,
)
from vit_dist.cluster.preemption import Preemption
from vit_dist.cluster.strategy import make_strategy
from vit_dist.config.errors import ConfigError
from vit_dist.data.pipeline import train_indices
from vit_dist.run.build import make_state
from vit_dist.run.check import check
from vit_dist.run.input import train_data
from vit_dist.run.options import Data
from vit_dist.run.start import Start, check_data, find_start, restore_or_init
from vit_dist.train import train
from vit_dist.training.checkpoint import Checkpoint, Checkpointer, open_checkpoint
from vit_dist.training.state import INITIAL_LOSS_SCALE

HARD = {
    "model__dropout": 0.1,
    "step__ema_decay": 0.9,
    "step__accumulation": 2,
    "strategy__name": "mirrored",
    "strategy__virtual_cpus": 2,
    "schedule__name": "cosine",
    "schedule__warmup_steps": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 12 steps: dropout, moving average, accumulation, two replicas."""
    workdir = tmp_path_factory.mktemp("trained")
    train(without_evaluation(**HARD), str(workdir))
    return workdir


def test_resumed_is_bit_equal_to_uninterrupted(trained, tmp_path, monkeypatch, caplog):
    """Stopped in the middle of nowhere."""
    stopped = without_evaluation(**HARD, eval_steps=5)
    with monkeypatch.context() as patch:
        # Calls have 1, 2, 1 and 1 steps.
        patch.setattr(Preemption, "noticed", property(lambda _: saw.append(1) or len(saw) == 4))
        saw = []
        metrics = train(stopped, str(tmp_path / "parts"))
    assert metrics["step"] == 5 and metrics["preempted"] == 1.0
    assert arrays(tmp_path / "parts")["step"] == 5

    logging.get_absl_logger().propagate = True
    with caplog.at_level("WARNING"):
        metrics = train(without_evaluation(**HARD), str(tmp_path / "parts"))
    assert "going on with a changed config: eval_steps: 5 -> 100" in caplog.text
    assert metrics["step"] == 12 and "preempted" not in metrics
    assert_same(arrays(tmp_path / "parts"), arrays(trained))
    assert [row["step"] for row in rows(tmp_path / "parts")] == [4, 8, 12]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_order_does_not_depend_on_the_replicas(replicas):
    """A run that goes on with other devices reads what it would have read."""
    ops = "value_range(-1, 1)|keep('image', 'label', 'index')"
    options, data = check(make(input__train_ops=ops))
    devices = {1: {"name": "single"}}.get(replicas, {"name": "mirrored", "virtual_cpus": replicas})
    strategy = make_strategy(**devices)
    batches, seen = iter(train_data(options, data, strategy, first_step=77)), []
    for _ in range(3):
        parts = strategy.experimental_local_results(next(batches)["index"])
        assert [len(part) for part in parts] == [16 // replicas] * replicas
        seen += [int(i) for part in parts for i in part]
    known = {"batch_size": 16, "seed": 0}
    assert (
        seen == train_indices(data.sources["train"], **known, first_step=77, num_steps=3).tolist()
    )


@pytest.mark.parametrize(
    "changed,word",
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"input__batch_size": 32}, "input.batch_size: 16 -> 32"),
        ({"data__train_split": "val"}, 'data.train_split: "train" -> "val"'),
    ],
)
def test_another_order_of_the_data_is_refused(trained, changed, word):
    config = make(**HARD, **changed)
    with pytest.raises(
        ValueError, match="step 12 of a run with another order of the data"
    ) as error:
        train(config, str(trained))
    assert word in str(error.value) and "config.resume_from" in str(error.value)


def test_where_a_run_begins(trained, tmp_path):
    """Resume > resume_from > init_from > scratch."""
    here, there, empty = str(trained), str(tmp_path / "there"), str(tmp_path / "empty")
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
        options, _ = check(make(**changed))
        start = find_start(workdir, options)
        assert (start.how, start.checkpoint and start.checkpoint.step) == expected


def test_nothing_is_left_to_train_after_resume_from(trained, tmp_path):
    config = without_evaluation(resume_from=str(trained), total_steps=12)
    with pytest.raises(ConfigError, match="is a checkpoint of step 12, and the run has 12 steps"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_from_another_run(trained, tmp_path, capsys):
    config = without_evaluation(
        step__ema_decay=0.9, resume_from=str(trained), total_steps=14, seed=3
    )
    metrics = train(config, str(tmp_path))
    assert metrics["step"] == 14 and arrays(tmp_path)["updates"] == 14
    assert f"continuing from step 12 ({trained}/checkpoints/" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [14]


@pytest.mark.parametrize(
    ("before", "after", "scale"),
    [
        ("float32", "float16", INITIAL_LOSS_SCALE),
        ("float16", "float32", 1.0),
        ("float16", "bfloat16", 1.0),
        ("float16", "float16", 64.0),
    ],
)
def test_loss_scaling_begins_anew_with_another_precision(tmp_path, before, after, scale):
    """float32's 1 would let float16 underflow; float16's is undone by no other precision."""
    strategy = make_strategy(name="single")
    options, _ = check(without_evaluation(precision=before))
    state = make_state(options, strategy)
    if before == "float16":
        state.loss_scale.assign(64.0)
        state.good_steps.assign(7)
    arrays = state.to_arrays()
    notes = {"config": options.record}
    found = Checkpoint(path=tmp_path, step=0, notes=notes, arrays=arrays)
    options, data = check(without_evaluation(precision=after))
    state = make_state(options, strategy)
    restore_or_init(state, options, data, Start("resume", found))
    assert state.loss_scale.numpy() == scale
    assert state.good_steps.numpy() == (7 if scale == 64 else 0)


def test_a_checkpoint_that_does_not_fit(trained, tmp_path):
    wide = without_evaluation(model__width=32, resume_from=str(trained), total_steps=14)
    with pytest.raises(ValueError, match="does not fit the config") as error:
        train(wide, str(tmp_path))
    assert "config.init_from" in str(error.value)
    wide = without_evaluation(model__width=32, init_from=str(trained))
    with pytest.raises(ValueError, match=r"Set --config\.model\.width=16"):
        train(wide, str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """Two steps from the weights of `trained`, at 16 px, with two classes and a cls token."""
    workdir = tmp_path_factory.mktemp("adapted")
    folder = make_folder(tmp_path_factory.mktemp("images"))
    weights = {"init_from": str(trained), "optimizer__learning_rate": 0.0}
    config = of_folder(folder, image_size=16, model__pool="tok", **weights)
    return workdir, train(config, str(workdir))


def test_resume_from_takes_no_head_of_other_classes(adapted, tmp_path):
    """Its outputs would come to mean other classes; init_from maps them, or makes a new head."""
    folder = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        (folder / split / "cats").rename(folder / split / "eels")
    config = of_folder(
        folder, image_size=16, model__pool="tok", resume_from=str(adapted[0]), total_steps=3
    )
    with pytest.raises(ValueError, match=r"\('eels' is not in it\).*config.init_from"):
        train(config, str(tmp_path / "run"))


def test_resume_from_takes_no_head_of_classes_in_another_order(adapted):
    found = open_checkpoint(str(adapted[0]))
    start = Start("resume_from", found)
    assert found.notes["class_names"] == ["cats", "dogs"]
    source = types.SimpleNamespace(class_names=("dogs", "cats"), num_classes=2)
    with pytest.raises(ValueError, match=r"in another order: take config\.init_from"):
        check_data(start, Data({"train": source}, {}))


def test_init_from_adapts_to_size_classes_and_pooling(trained, adapted):
    workdir, metrics = adapted
    assert metrics["step"] == 2 and metrics["val_examples"] == 16
    mine, theirs = arrays(workdir), arrays(trained)
    kernel = next(name for name in mine if name.startswith("model/embedding") and "kernel" in name)
    np.testing.assert_array_equal(mine[kernel], theirs[kernel.replace("model/", "ema/")])
    assert theirs["model/head/kernel"].shape == (16, 10)
    assert mine["model/head/kernel"].shape == (16, 2)
    assert theirs["model/pos_embedding"].shape == (1, 4, 16)
    assert mine["model/pos_embedding"].shape == (1, 17, 16)
