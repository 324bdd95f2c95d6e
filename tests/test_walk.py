"""The commands of docs/finetuning.md, from a folder of photographs to predictions, in miniature."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import photographs, processes
from tests.support.documents import commands_of
from tests.support.networks import randomize
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights

ROOT = Path(__file__).resolve().parents[1]
# What makes them short.
SMALL = {
    "vit_dist.train": [
        "--config.input.batch_size=16",
        "--config.input.eval_batch_size=16",
        "--config.step.jit=off",
    ],
    "vit_dist.evaluate": ["--config.input.eval_batch_size=16", "--config.step.jit=off"],
}


# The walk's network and size -> what the tests take.
SMALLER = {"model=S/14": "model=mu/14", "res=112": "res=56"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: configs/, photos/ with 60 images, and weights/ as DINOv2's."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "configs").symlink_to(ROOT / "configs")
    made = photographs.make_photographs(folder / "photos", count=60, apart=True)
    assert len(made) >= 2 and sum(made.values()) == 60
    network = {"image_size": 84, "num_classes": 0, "pool": "tok", "gelu": "erf"}
    model = randomize(build_vit(vit_config("mu/14", **network, layer_scale=1e-5)), scale=0.1)
    write_pretrained(
        folder / "weights",
        "huggingface",
        {name: variable.numpy() for name, variable in named_weights(model).items()},
        model.get_config(),
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    return folder


@pytest.fixture(scope="module")
def commands():
    """Name of a command -> its words, as docs/finetuning.md has them."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    section = text.split("### As it went here")[1].split("\n## ")[0]
    for large, small in SMALLER.items():
        assert large in section
        section = section.replace(large, small)
    return {words[2].split(".")[1]: words for words in commands_of(section)}


def test_the_photographs_are_what_the_docs_say(folder):
    names = sorted(path.name for path in (folder / "photos" / "train").iterdir())
    for split, count in (("train", 48), ("val", 12)):
        paths = [*folder.glob(f"photos/{split}/*/*.jpg")]
        assert len(paths) == count and sorted({path.parent.name for path in paths}) == names
        for path in paths:
            with Image.open(path) as image:
                assert image.format == "JPEG" and min(image.size) >= photographs.SMALLEST
                # Of the right side of the temple some windows are nothing but sky.
                assert split == "val" or path.stem > "003" or len(image.getcolors(2**24)) > 100


def test_windows_apart_share_no_pixel(tmp_path, monkeypatch):
    """Of an image that is red on the left and blue from three fifths on."""
    image = np.zeros((400, 500, 3), np.uint8)
    image[:, :300, 0] = image[:, 300:, 2] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.setattr(photographs, "sources", lambda: {"one": tmp_path / "image.png"})
    monkeypatch.setattr(photographs.ImageOps, "grayscale", lambda image: image)
    photographs.make_photographs(tmp_path / "made", count=20, apart=True)
    for split, channel, count in (("train", 0, 16), ("val", 2, 4)):
        paths = [*tmp_path.glob(f"made/{split}/one/*.jpg")]
        assert len(paths) == count
        for path in paths:
            mean = np.asarray(Image.open(path)).mean(axis=(0, 1))
            assert mean[channel] > 20 + 4 * mean[2 - channel]


def run(words, folder):
    """What `python -m MODULE FLAGS` prints."""
    module, flags = words[2], [*words[3:], *SMALL.get(words[2], [])]
    log, errors = folder / f"{module}.out", folder / f"{module}.errors"
    code, out = processes.run(*flags, module=module, cwd=folder, log=log, errors=errors)
    assert code == 0, errors.read_text()[-3000:]
    return out


@pytest.mark.exhaustive  # tests/run/test_evals.py judges weights of others on data of one's own
def test_frozen_features_first(folder, commands):
    out = run(commands["evaluate"], folder)
    assert re.search(r"probe +│ accuracy +│", out) and re.search(r"near +│ k10_accuracy", out)
    assert any((folder / "features").iterdir())


@pytest.mark.exhaustive  # test_walkthrough, test_export and test_predict have its steps
def test_from_a_folder_to_predictions(folder, commands):
    assert [*commands] == ["evaluate", "train", "report", "predict", "export"]
    train, report, predict, export = (run(commands[w], folder) for w in [*commands][1:])
    names = sorted(path.name for path in (folder / "photos" / "train").iterdir())
    assert f"in {len(names)} classes" in train and "weights from weights" in train
    assert "resized: pos_embedding (1, 37, 32) -> (1, 17, 32) (bicubic)" in train
    assert "1 resized, 2 new (head)\n" in train
    losses = re.findall(r"^step \d+: val .* loss ([\d.]+) on", train, re.M)
    assert len(losses) == 3 and float(losses[-1]) < 1.2
    assert "wrote photos.html" in report
    lines = predict.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"photos/val/{n}/001.jpg" for n in names]
    for line in lines:
        found = re.findall(r"(\w+) ([\d.]+)%", line.split("\t", 1)[1])
        assert sorted(name for name, _ in found) == names
        assert 99 < sum(float(p) for _, p in found) < 101
    assert "wrote exported/model.safetensors, exported/config.json" in export
