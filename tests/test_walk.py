"""The commands of docs/finetuning.md, from a folder of photographs to predictions, in miniature."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.support import photographs, processes
from tests.support.documents import commands_of

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: configs/, photos/ with 60 images, new/ with one of each class."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "configs").symlink_to(ROOT / "configs")
    made = photographs.make_photographs(folder / "photos", count=60)
    assert len(made) >= 2 and sum(made.values()) == 60
    (folder / "new").mkdir()
    for name in made:
        (folder / "photos" / name / "001.jpg").rename(folder / "new" / f"{name}.jpg")
    return folder


def test_the_photographs_are_what_the_docs_say(folder):
    for path in folder.glob("photos/*/*.jpg"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and min(image.size) >= photographs.SMALLEST
            assert path.stem > "003" or len(image.getcolors(2**24)) > 100


def run(words, folder):
    """What `python -m MODULE FLAGS` prints, with fewer epochs."""
    module, flags = words[2], [*words[3:], *SMALL.get(words[2], [])]
    if module == "vit_dist.train":
        flags = [re.sub(r"total_epochs=\d+", "total_epochs=4", flag) for flag in flags]
        if not any("total_epochs" in flag for flag in flags):
            flags.append("--config.total_epochs=2")
    log, errors = folder / f"{module}.{len(list(folder.iterdir()))}.out", folder / "errors"
    code, out = processes.run(*flags, module=module, cwd=folder, log=log, errors=errors)
    assert code == 0, errors.read_text()[-3000:]
    return out


@pytest.mark.exhaustive  # test_walkthrough, test_export and test_predict have its steps
def test_from_a_folder_to_predictions(folder):
    text = (ROOT / "docs" / "finetuning.md").read_text()
    section = text.split("### As it went here")[1].split("\n## ")[0]
    commands = {words[2] + words[4]: words for words in commands_of(section)}
    assert [words[2].split(".")[1] for words in commands.values()] == [
        "train", "train", "evaluate", "predict", "export",
    ]  # fmt: skip
    pretrain, finetune, evaluate, predict, export = (run(w, folder) for w in commands.values())
    names = sorted(path.name for path in (folder / "photos").iterdir())
    assert f"in {len(names)} classes" in pretrain and "starting from scratch" in pretrain
    assert "weights from runs/pretrained" in finetune and "loaded 22 tensors" in finetune
    assert "resized: pos_embedding (1, 64, 32) -> (1, 196, 32)" in finetune
    assert not re.search("^(new|unused):", finetune, re.M)
    losses = re.findall(r"^step \d+: val .* loss ([\d.]+) on", finetune, re.M)
    assert float(losses[-1]) < 1.2 and re.search(r"^done: step \d+, val accuracy", finetune, re.M)
    assert "at 288 px" in evaluate and re.search(r"val .*0\.\d+", evaluate)
    lines = predict.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"new/{name}.jpg" for name in names]
    for line in lines:
        found = re.findall(r"(\w+) ([\d.]+)%", line.split("\t", 1)[1])
        assert sorted(name for name, _ in found) == names
        assert 99 < sum(float(p) for _, p in found) < 101
    assert "wrote exported/model.safetensors, exported/config.json" in export
