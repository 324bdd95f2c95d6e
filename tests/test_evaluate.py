"""evaluate judges the network of the checkpoint, by the names of its classes, or refuses."""

import json

import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from tests.support import processes
from tests.support.networks import arrays_of, randomize
from tests.support.tiny import make_folder, of_folder
from vit_dist.config.errors import ConfigError
from vit_dist.evaluate import evaluate
from vit_dist.export import export
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit
from vit_dist.train import train

TOK = {"model__pool": "tok", "model__gelu": "erf"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of two steps on cats and dogs that has learnt something: its head is not zero."""
    workdir = tmp_path_factory.mktemp("run")
    train(of_folder(folder, **TOK, optimizer__learning_rate=0.1), str(workdir))
    return str(workdir)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    with caplog.at_level("WARNING"):
        yield lambda: [record.getMessage() for record in caplog.records]


def reordered(path):
    """The folder of Hugging Face's at `path` with its classes, and their rows, the other way."""
    config = json.loads((path / "config.json").read_text())
    names = [config["id2label"][k] for k in sorted(config["id2label"])]
    config["id2label"] = {str(i): name for i, name in enumerate(reversed(names))}
    (path / "config.json").write_text(json.dumps(config))
    state = safetensors.numpy.load_file(path / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = np.ascontiguousarray(state[name][::-1])
    safetensors.numpy.save_file(state, path / "model.safetensors")


def test_classes_in_another_order_are_mapped_and_said(run, folder, tmp_path, said):
    export(run, "huggingface", str(tmp_path / "hf"))
    expected = evaluate(of_folder(folder, **TOK), run)["val"]
    assert not any("mapped" in line for line in said())
    reordered(tmp_path / "hf")
    found = evaluate(of_folder(folder, **TOK), str(tmp_path / "hf"))["val"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert any("mapped: head/kernel" in line for line in said())


@pytest.mark.parametrize(
    ("old", "new"), [("cats", "zebras"), pytest.param("dogs", "ants", marks=pytest.mark.exhaustive)]
)
def test_other_classes_are_refused(run, tmp_path, old, new):
    images = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        (images / split / old).rename(images / split / new)
    with pytest.raises(ConfigError, match=rf"cannot classify this data: .*'{new}' is not in it"):
        evaluate(of_folder(images, **TOK), run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"posemb": "sincos2d"}, "has pos_embedding, which the config's model has no place for"),
        ({"pool": "gap"}, "it would need head/kernel .*model.pool differs"),
        ({"registers": 2}, "it would need registers"),
    ],
)
def test_a_part_of_the_network_is_not_judged(run, folder, changed, message):
    model = {f"model__{key}": value for key, value in changed.items()}
    with pytest.raises(ConfigError, match=message):
        evaluate(of_folder(folder, **(TOK | model)), run)


def test_positions_that_the_file_computes_are_not_drawn_anew(folder, tmp_path):
    """big_vision's files with sincos2d hold no table; a learned one here would be random."""
    sizes = {"image_size": 8, "num_classes": 2, "width": 16, "mlp_dim": 16}
    model = randomize(build_vit(vit_config("mu/4", **sizes, pool="tok", posemb="sincos2d")))
    path, half = tmp_path / "weights.npz", {"mean": [0.5], "std": [0.5]}
    write_pretrained(path, "big_vision", arrays_of(model), model.get_config(), **half)
    with pytest.raises(ConfigError, match="it would need pos_embedding"):
        evaluate(of_folder(folder, model__pool="tok"), str(path))
    fixed = of_folder(folder, model__pool="tok", model__posemb="sincos2d")
    assert evaluate(fixed, str(path))["val"]["examples"] == 16


@pytest.mark.parametrize("key", ["architecture", "model_type"])
def test_a_folder_of_another_system_tells_no_config(tmp_path, key):
    """Its config.json is none of a run's of another version."""
    (tmp_path / "config.json").write_text(json.dumps({key: "vit", "image_size": 8}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, text = processes.call(
        processes.main, "vit_dist.evaluate", f"--checkpoint={tmp_path}", log=tmp_path / "log"
    )
    said = f"error: {tmp_path} holds weights of another system, which tell no config"
    assert code == 2 and said in text and "give --config=FILE" in text, text
