"""The average of checkpoints is their mean, and reads as a run."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import processes, tiny
from tests.support.networks import arrays_of, tiny_vit
from vit_dist.config.errors import ConfigError
from vit_dist.evaluate import evaluate
from vit_dist.soup import average, choose
from vit_dist.train import train
from vit_dist.training.checkpoint import Checkpointer, open_checkpoint

MODEL = {"width": 4, "depth": 1}


def write(folder, arrays, *, step=3, model=MODEL, names=("a", "b")):
    checkpointer = Checkpointer(folder)
    notes = {"model": model, "class_names": list(names), "config": {"seed": 1}}
    checkpointer.save(arrays, step=step, notes=notes)
    checkpointer.wait()
    return str(folder)


def test_the_mean(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 2, 5)).astype(np.float32)
    one = write(tmp_path / "a", {"model/w": values[0], "optimizer/m": values[0]}, step=3)
    # A moving average counts before the weights; a checkpoint's own folder is one, too.
    write(tmp_path / "b", {"model/w": values[0], "ema/w": values[1]}, step=9)
    two = str(tmp_path / "b" / "checkpoints" / "000000009")
    write(tmp_path / "c" / "best", {"model/w": values[2]}, step=4)
    folder = average([one, two, f"{tmp_path / 'c'}:best"], str(tmp_path / "out"))
    found = open_checkpoint(str(folder))
    assert found.step == 9 and set(found.arrays) == {"model/w"}
    expected = np.mean(values, axis=0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(found.arrays["model/w"], expected)
    assert len(found.notes["average_of"]) == 3 and found.notes["class_names"] == ["a", "b"]
    assert (tmp_path / "out" / "config.json").exists()


def test_what_only_training_knows_may_differ(tmp_path):
    """Dropout and the like, the initial LayerScale, and what Keras notes; all of a real ViT's."""
    options = {
        "dropout": 0.1, "drop_path": 0.2, "drop_path_growth": "constant",
        "remat": "full", "attention_block": 2, "layer_scale": 1e-5,
    }  # fmt: skip
    one = tiny_vit(layer_scale=0.1)
    other = tiny_vit(**options, precision="bfloat16", form="tensor")
    differ = {k for k, v in one.get_config().items() if v != other.get_config()[k]}
    assert differ == {*options, "dtype", "form"}
    arrays = {f"model/{name}": value for name, value in arrays_of(one).items()}
    paths = [
        write(tmp_path / name, arrays, model=json.loads(json.dumps(model.get_config())))
        for name, model in (("a", one), ("b", other))
    ]
    found = open_checkpoint(str(average(paths, str(tmp_path / "out"))))
    np.testing.assert_array_equal(found.arrays["model/head/bias"], arrays["model/head/bias"])
    without = write(tmp_path / "c", arrays, model=tiny_vit().get_config())
    with pytest.raises(ConfigError, match="different network: layer_scale is 'trained' and None"):
        average([paths[0], without], str(tmp_path / "o"))


def test_what_cannot_be_averaged(tmp_path):
    w = np.ones((2, 2), np.float32)
    one = write(tmp_path / "a", {"model/w": w})
    for name, options, said in (
        ("net", {"model": {**MODEL, "width": 8}}, "different network: width is 4 and 8"),
        ("names", {"names": ("b", "a")}, "different data: class names is"),
    ):
        with pytest.raises(ConfigError, match=said):
            average([one, write(tmp_path / name, {"model/w": w}, **options)], str(tmp_path / "o"))
    more = write(tmp_path / "more", {"model/w": w, "model/x": w})
    with pytest.raises(ConfigError, match=r"x is None and \(2, 2\)"):
        average([one, more], str(tmp_path / "o"))
    with pytest.raises(ConfigError, match="there is no checkpoint at"):
        average([one, str(tmp_path / "absent")], str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
    with pytest.raises(ConfigError, match="holds checkpoints already"):
        average([one, one], more)


def test_it_reads_as_a_run(tmp_path):
    config = tiny.make(total_steps=2)
    metrics = train(config, str(tmp_path / "run"))
    run = str(tmp_path / "run")
    flags = [f"--checkpoints={run},{run}/", f"--output={tmp_path / 'soup'}"]
    flags.append("--greedy=min val/loss")
    code, text = processes.run(*flags, module="vit_dist.soup", log=tmp_path / "log")
    assert code == 0 and "the average of 2 checkpoints" in text, text
    assert text.count(f"val/loss {metrics['val_loss']:.6g}: ") == 3
    # Of one checkpoint twice the mean is the checkpoint: (x + x) / 2 rounds nothing.
    found = evaluate(config, str(tmp_path / "soup"), splits=["val"])
    assert found["val"]["loss"] == metrics["val_loss"]


# What a stand-in for evaluate finds in the one weight of a checkpoint: how near it is to TARGET.
TARGET = 1.0


@pytest.mark.parametrize("by, sign", [("min val/loss", 1), ("max val/accuracy", -1)])
def test_a_greedy_soup_takes_what_makes_it_no_worse(by, sign, tmp_path, monkeypatch, capsys):
    weights = {"far": 3.0, "near": 0.8, "other_side": 1.3, "same": 0.8}
    paths = [write(tmp_path / k, {"model/w": np.float64([v])}) for k, v in weights.items()]

    def judge(config, checkpoint, *, splits, evals):
        assert (splits, evals) == (["val"], [])
        error = abs(float(open_checkpoint(checkpoint).arrays["model/w"][0]) - TARGET)
        return {"val": {"loss": error, "accuracy": -error}}

    monkeypatch.setattr("vit_dist.soup.evaluate", judge)
    chosen = choose(tiny.make(), paths, by=by)
    # near 0.2; with same 0.2, no worse; with other_side |2.9 / 3 - 1| = 0.03; with far 0.475.
    assert [Path(path).name for path in chosen] == ["near", "same", "other_side"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 3 and lines[-1].endswith("far, which is left out")
    assert lines[-1].startswith(f"{by[4:]} {sign * 0.475:g}: ")


@pytest.mark.parametrize("by", ["val/accuracy", "max accuracy", "max test/accuracy", "best val/x"])
def test_a_greedy_soup_by_nothing(by):
    with pytest.raises(ConfigError, match=r"must be 'max NAME/METRIC' .* is judged: val$"):
        choose(tiny.make(), ["a", "b"], by=by)


@pytest.mark.parametrize("by", ["max val/acuracy", "min near/k5_loss"])
def test_an_unknown_metric_is_told_before_anything_is_judged(by):
    config = tiny.make(evals={"near": {"kind": "knn", "options": {"k": (5,)}}})
    said = rf"--greedy '{by[4:]}' is unknown; there are (val|near)/"
    with pytest.raises(ConfigError, match=said):
        choose(config, ["there is no such run", "nor such"], by=by)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--checkpoints=a", "--output=o"), "give two checkpoints or more"),
        (("--checkpoints=a,b",), "give a folder for the average"),
    ],
)
def test_mistakes(tmp_path, flags, said):
    code, text = processes.run(*flags, module="vit_dist.soup", log=tmp_path / "log", cwd=tmp_path)
    assert code == 2 and said in text and "Traceback" not in text
