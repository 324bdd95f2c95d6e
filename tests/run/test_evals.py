"""config.evals: in a training, after a stop, by evaluate; on any replicas, from cached features."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from tests.support import tiny
from vit_dist import evaluate as evaluate_module
from vit_dist import train as train_module
from vit_dist.cluster.strategy import make_strategy
from vit_dist.config.errors import ConfigError, UserError
from vit_dist.evaluate import evaluate
from vit_dist.evaluators.registry import FEATURES, KINDS, LOGITS, Kind
from vit_dist.run import evals as evals_module
from vit_dist.run.build import make_model
from vit_dist.run.check import check, check_evaluation
from vit_dist.run.evals import Evals
from vit_dist.run.origins import open_origin
from vit_dist.train import train

EVALS = {
    "sure": {"kind": "classification", "options": {"top": (1, 2, 5)}},
    "near": {"kind": "knn", "every": 4, "options": {"k": (5, 20)}},
    "few": {"kind": "fewshot", "split": "test", "options": {"shots": (1, 5), "num_seeds": 2}},
    "probe": {"kind": "linear_probe", "options": {"l2": (1e-3,), "max_iterations": 50}},
    "all": {"kind": "corruption_error", "options": {"of": {"digits": ("sure",)}}},
}


def config(evals=EVALS, **changed):
    changed = {"total_steps": 8, "save_steps": 4, "log_steps": 4, "data__test_split": "", **changed}
    return tiny.make(evals=evals, **changed)


def named(workdir, name):
    """Step -> the metrics of an evaluation in metrics.jsonl."""
    found = {}
    for row in tiny.rows(workdir):
        mine = {k.removeprefix(f"{name}/"): v for k, v in row.items() if k.startswith(f"{name}/")}
        if mine:
            assert row["step"] not in found, "written twice"
            found[row["step"]] = mine
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    metrics = train(config(), str(workdir))
    return workdir, metrics


def test_what_is_judged_when(run):
    workdir, metrics = run
    assert set(named(workdir, "near")) == {4, 8}
    for name in ("sure", "few", "probe", "all"):
        assert set(named(workdir, name)) == {8}
    assert set(named(workdir, "near")[8]) == {"k5_accuracy", "k20_accuracy", "examples"}
    assert set(named(workdir, "few")[8]) == {"1shot_accuracy", "5shot_accuracy", "examples"}
    assert metrics["near_k5_accuracy"] == named(workdir, "near")[8]["k5_accuracy"]
    assert metrics["all_mean_error"] == pytest.approx(1 - metrics["sure_accuracy"])
    # The same logits, counted on the device and on the host.
    val, sure = named(workdir, "val")[8], named(workdir, "sure")[8]
    for key in ("accuracy", "top5_accuracy", "examples"):
        assert sure[key] == val[key], key
    assert sure["loss"] == pytest.approx(val["loss"], rel=1e-5)


@pytest.mark.exhaustive  # with one of them: test_given_up_for_a_signal_and_made_up_for
def test_without_evals_a_run_is_what_it_was(run, tmp_path):
    workdir, _ = run
    train(config(evals=None), str(tmp_path))
    tiny.assert_same(tiny.arrays(tmp_path), tiny.arrays(workdir))
    assert named(tmp_path, "val") == named(workdir, "val")
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert (recorded["evals"], recorded["keep_best"]) == (None, None)
    assert not (tmp_path / "best").exists()


def test_evaluate_finds_the_same_once_more_and_from_files(run, tmp_path, monkeypatch):
    workdir, _ = run
    recorded = config()
    found = evaluate(recorded, str(workdir), splits=["val"], features_dir=str(tmp_path / "kept"))
    assert set(found) == {"val", *EVALS}
    for name in EVALS:
        assert found[name] == pytest.approx(named(workdir, name)[8], abs=1e-7), name
    # Logits of val; features of val, test and train.
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 4

    def fail(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(evals_module, "make_collector", fail)
        again = evaluate(recorded, str(workdir), splits=[], features_dir=str(tmp_path / "kept"))
    assert again == {name: found[name] for name in EVALS}
    for file in (tmp_path / "kept").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert evaluate(
        recorded, str(workdir), evals=["near"], splits=[], features_dir=str(tmp_path / "kept")
    ) == {"near": found["near"]}


@pytest.mark.exhaustive  # what each is given is equal: test_outputs_come_in_the_order_of_the_source
def test_two_devices_count_as_one_does(run):
    workdir, _ = run
    evals = {name: EVALS[name] for name in ("sure", "near")}
    # 25 for each of two devices: the last batch of 180 examples is padded.
    one = evaluate(config(evals, input__eval_batch_size=50), str(workdir), splits=["val"])
    two = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
    other = evaluate(config(evals, input__eval_batch_size=50, **two), str(workdir), splits=["val"])
    for name in evals:
        counted = [k for k in one[name] if k.endswith("accuracy") or k == "examples"]
        assert {k: other[name][k] for k in counted} == {k: one[name][k] for k in counted}
        assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_outputs_come_in_the_order_of_the_source(run, monkeypatch):
    workdir, _ = run
    seen = spy(monkeypatch, FEATURES)
    evals = {"spy": {"kind": "spy"}}
    two = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
    for devices in ({}, two):
        evaluate(config(evals, input__eval_batch_size=50, **devices), str(workdir), splits=[])
    _, data = check(config())
    expected = [data.sources["val"].load(i)[1] for i in range(data.sources["val"].num_examples)]
    for outputs in seen:
        assert outputs.labels.tolist() == expected
    np.testing.assert_allclose(seen[0].values, seen[1].values, rtol=1e-5, atol=1e-6)


def test_another_resolution_is_what_init_from_makes(run, tmp_path):
    """The numbers of the run's checkpoint, converted to that resolution and judged there."""
    workdir, _ = run
    ops = {"input__eval_ops": tiny.ANY_SIZE}
    options = {"top": (1, 2, 5), "temperature": False}
    large = {"kind": "classification", "image_size": 16, "ops": tiny.ANY_SIZE, "options": options}
    evals = {"large": large, "small": {**large, "image_size": 8}}
    converted = evaluate(
        config({"sure": {**large, "image_size": None}}, image_size=16, **ops), str(workdir)
    )
    # As evaluate does it, from the checkpoint; and with features kept for both resolutions.
    kept = {"splits": [], "features_dir": str(tmp_path)}
    found = evaluate(config(evals), str(workdir), **kept)
    assert found["large"] == converted["sure"] != found["small"]
    assert found["large"]["accuracy"] == converted["val"]["accuracy"]
    assert evaluate(config(evals), str(workdir), **kept) == found
    # As a training does it: from the model that is trained, again after its weights have changed.
    checked, data = check_evaluation(config(evals), splits=[], evals=None)
    strategy = make_strategy(**checked.strategy)
    model = make_model(checked.model, strategy)
    judge = Evals(checked, data, model, strategy)
    judge("large")
    open_origin(str(workdir)).fill(model)
    assert judge("large") == pytest.approx(found["large"], abs=1e-6)
    assert judge("small") == pytest.approx(found["small"], abs=1e-6)
    # A checkpoint of yet another resolution is resampled once, not by way of config.image_size.
    between = config({"large": large}, image_size=12, **ops)
    assert evaluate(between, str(workdir), splits=[])["large"] == found["large"]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"image_size": 18}, r"evals.near.image_size is \(18, 18\), .* a multiple of 4"),
        ({"image_size": "16"}, r"config.evals.near.image_size must be a positive int or"),
        ({"image_size": 16}, r"gives images of \(8, 8, 3\), but config.evals.near.image_size is"),
    ],
)
def test_resolutions_that_cannot_be(changed, words):
    with pytest.raises(ConfigError, match=words):
        check(config({"near": {"kind": "knn", **changed}}))


def test_a_crop_that_is_larger_than_the_image(three):
    """As where a recipe's pipe has the number of its own resolution in it."""
    ops = f"decode|resize_small(12)|central_crop(size)|{tiny.OPS}"
    near = {"kind": "knn", "ops": ops}
    check_evaluation(tiny.of_folder(three[0], evals={"near": near}), evals=None)
    near["image_size"] = 16
    with pytest.raises(ConfigError, match=r"near.ops: .* cannot cut \(16, 16\) .* has 12 pixels"):
        check_evaluation(tiny.of_folder(three[0], evals={"near": near}), evals=None)


def spy(monkeypatch, values):
    """A kind "spy" that keeps what it is given."""
    seen = []

    def make():
        return lambda judged: seen.append(judged) or {"seen": 1.0}

    monkeypatch.setitem(KINDS, "spy", Kind(make, values, train=False))
    return seen


@pytest.mark.exhaustive
def test_given_up_for_a_signal_and_made_up_for(tmp_path, run, monkeypatch):
    class Disturbed(train_module.Evals):
        """Sends a signal in the first evaluation."""

        calls = 0

        def __call__(self, name, *, stop):
            def disturbing():
                Disturbed.calls += 1
                if Disturbed.calls == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return stop()

            return super().__call__(name, stop=disturbing)

    near = {"near": EVALS["near"]}
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Evals", Disturbed)
        metrics = train(config(near), str(tmp_path / "run"))
    assert Disturbed.calls == 1  # of two splits with several batches each
    assert metrics["preempted"] and metrics["step"] == 4
    assert named(tmp_path / "run", "near") == {}
    train(config(near), str(tmp_path / "run"))
    assert named(tmp_path / "run", "near") == named(run[0], "near")
    # Nor does it matter to the training how many evaluations there are.
    assert named(tmp_path / "run", "val") == named(run[0], "val")
    tiny.assert_same(tiny.arrays(tmp_path / "run"), tiny.arrays(run[0]))


def images_of(folder, names, source=None):
    """A folder of images of these classes, or a copy of some classes of another one."""
    if source is None:
        random = np.random.default_rng(1)
        tiny.make_folder(folder)
        for split in ("train", "val"):
            for name in set(names) - {"cats", "dogs"}:
                shutil.copytree(folder / split / "cats", folder / split / name)
                for path in sorted((folder / split / name).iterdir()):
                    pixels = random.integers(0, 255, (20, 20, 3), np.uint8)
                    Image.fromarray(pixels).save(path)
    else:
        for name in names:
            shutil.copytree(source / "val" / name, folder / "val" / name)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Images of three classes, and a run on them that has learnt something."""
    folder = images_of(tmp_path_factory.mktemp("three"), ("ants", "cats", "dogs"))
    workdir = tmp_path_factory.mktemp("of_three")
    train(tiny.of_folder(folder, optimizer__learning_rate=0.1), str(workdir))
    return folder, str(workdir)


def test_a_set_with_some_of_the_classes(three, tmp_path, monkeypatch):
    folder, workdir = three
    part = images_of(tmp_path / "part", ("ants", "dogs"), folder)
    seen = spy(monkeypatch, LOGITS)
    evals = {
        "whole": {"kind": "spy"},
        "part": {"kind": "spy", "data": {"data_dir": str(part), "train_split": ""}},
    }
    found = evaluate(tiny.of_folder(folder, evals=evals), workdir, splits=["val"])
    assert found["part"]["examples"] == 16 and found["whole"]["examples"] == 24
    of_part, whole = seen  # by name
    assert whole.class_names == ("ants", "cats", "dogs") and of_part.class_names == ("ants", "dogs")
    kept = whole.labels != 1
    np.testing.assert_allclose(of_part.values, whole.values[kept][:, [0, 2]], atol=1e-6)
    assert of_part.labels.tolist() == (whole.labels[kept] // 2).tolist()


def test_classes_that_the_head_does_not_know(three, tmp_path):
    folder, _ = three
    part = images_of(tmp_path / "part", ("ants",), folder)
    (part / "val" / "ants").rename(part / "val" / "wasps")
    entry = {"kind": "classification", "data": {"data_dir": str(part), "train_split": ""}}
    with pytest.raises(UserError, match=r"config.evals.odd: .* has the class 'wasps', which is no"):
        check_evaluation(tiny.of_folder(folder, evals={"odd": entry}), evals=None)


def test_features_need_no_head(three, tmp_path):
    """Neighbours and probes judge a network on any data; logits do not."""
    _, workdir = three
    other = tiny.make_folder(tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "cats").rename(other / split / "lions")
    near = {"kind": "knn", "options": {"k": (3,)}}
    found = evaluate(tiny.of_folder(other, evals={"near": near}), workdir, splits=[])
    assert set(found) == {"near"} and found["near"]["examples"] == 16
    both = {"near": near, "sure": {"kind": "classification"}}
    with pytest.raises(ConfigError, match="cannot classify this data"):
        evaluate(tiny.of_folder(other, evals=both), workdir, splits=[])
    with pytest.raises(ConfigError, match="cannot classify this data"):
        evaluate(tiny.of_folder(other, evals={"near": near}), workdir, splits=["val"])
    # Features of another pooling are not those that were trained.
    pooled = tiny.of_folder(other, evals={"near": near}, model__pool="map")
    with pytest.raises(UserError):
        evaluate(pooled, workdir, splits=[])


def test_a_damaged_image_is_named(three, tmp_path):
    folder, workdir = three
    part = images_of(tmp_path / "part", ("ants", "dogs"), folder)
    bad = part / "val" / "dogs" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    entry = {"kind": "classification", "data": {"data_dir": str(part), "train_split": ""}}
    with pytest.raises(UserError, match=r"dogs/3\.jpg"):
        evaluate(tiny.of_folder(folder, evals={"part": entry}), workdir, splits=["val"])


def test_the_command_writes_tables(run, tmp_path, capsys, monkeypatch):
    workdir, _ = run
    monkeypatch.setattr(evaluate_module.cli, "load_config", lambda: config())
    values = {
        "checkpoint": str(workdir),
        "splits": ["val"],
        "evals": ["near"],
        "features": "",
        "json": str(tmp_path / "new" / "found.json"),
        "csv": str(tmp_path / "found.csv"),
    }
    if "checkpoint" not in flags.FLAGS:
        evaluate_module.define_flags()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        assert evaluate_module.main() == 0
    shown = capsys.readouterr().out
    assert "k20_accuracy" in shown and "top5_accuracy" in shown
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert set(found) == {"val", "near"}
    assert found["near"] == named(workdir, "near")[8]
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert {(r["name"], r["metric"]): float(r["value"]) for r in rows} == {
        (name, metric): value
        for name, metrics in found.items()
        for metric, value in metrics.items()
    }


def entry(**changed):
    return {"evals": {"near": {"kind": "knn", **changed}}}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"evals": 3}, "config.evals must be a dict, got 3"),
        ({"evals": {"near": 3}}, "config.evals.near must be a dict, got 3"),
        ({"evals": {"near": {}}}, "config.evals.near lacks kind"),
        ({"evals": {"val": {"kind": "knn"}}}, "config.evals has 'val': a name is"),
        ({"evals": {"a/b": {"kind": "knn"}}}, "config.evals has 'a/b'"),
        (entry(kind="kn"), "config.evals.near.kind 'kn' is unknown; did you mean 'knn'"),
        (entry(evry=3), "config.evals.near.evry is unknown; did you mean 'every'"),
        (entry(every=-1), "config.evals.near.every must be 0 or more, got -1"),
        (entry(every=1.5), "config.evals.near.every must be int, got 1.5"),
        (entry(options={"n": 3}), "config.evals.near.options.n is unknown"),
        (entry(options={"k": (0,)}), "config.evals.near.options: k must be a list of whole"),
        (entry(options=3), "config.evals.near.options must be a dict"),
        (entry(data={"sauce": "demo"}), "config.evals.near.data.sauce is unknown; did you mean"),
        (entry(data={"val_fraction": 2.0}), r"config.evals.near.data.val_fraction must be in"),
        (entry(data={"train_split": ""}), "config.evals.near needs training examples"),
        (entry(split="valid"), "valid"),
        (entry(ops="resize(4)|value_range(-1, 1)|keep('image', 'label')"), "near.ops gives images"),
        (
            entry(ops="onehot(10)|value_range(-1, 1)|keep('image', 'label')"),
            "config.evals.near takes labels that are class numbers",
        ),
        ({**entry(), "data__val_split": ""}, "config.evals.near.split must name a split"),
    ],
)
def test_mistakes(changed, words):
    with pytest.raises(UserError, match=words):
        check(config(**changed))


def test_names_of_the_command_line():
    with pytest.raises(ConfigError, match="no evaluation 'nera'; did you mean 'near'"):
        check_evaluation(config(), evals=["nera"])
    options, _ = check_evaluation(config(), evals=["near"])
    assert list(options.evals) == ["near"]
    options, _ = check_evaluation(config(), evals=[])
    assert not options.evals


def test_all_that_is_read_is_compared_by_hosts_and_opened_once():
    _, data = check(config())
    # few, near and probe read the same training examples, with a count of damage of their own.
    assert list(data.sources) == ["train", "val", "few:test", "few:train"]
