"""The command figures: of runs and of files of other systems, and what it says of mistakes."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from tests.support import processes, tiny
from vit_dist import figures as figures_lib
from vit_dist.export import export
from vit_dist.figures import figures
from vit_dist.inspection.draw import NAMES, OF_WEIGHTS
from vit_dist.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(tiny.of_folder(folder, data__val_split="", model__pool="map"), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def run_with_cls(folder, tmp_path_factory):
    """For systems whose models have a cls token."""
    workdir = tmp_path_factory.mktemp("run_with_cls")
    train(tiny.of_folder(folder, data__val_split="", model__pool="tok"), str(workdir))
    return workdir


def names(drawn, format="png"):
    assert all(path.suffix == f".{format}" and path.stat().length for path in drawn.files)
    return tuple(path.stem for path in drawn.files)


@pytest.mark.parametrize(
    "system", ["run", pytest.param("timm", marks=pytest.mark.exhaustive), "huggingface"]
)
def test_any_checkpoint(system, run, run_with_cls, folder, tmp_path, monkeypatch, capsys):
    """The model sees each image as it was trained to, whichever file its weights are in."""
    checkpoint = str(run)
    if system != "run":
        checkpoint = str(tmp_path / system)
        export(str(run_with_cls), system, checkpoint)
    seen = []
    look = figures_lib.look_at_images

    def spy(model, images, scaled):
        seen.append((images, scaled.numpy()))
        return look(model, images, scaled)

    monkeypatch.setattr(figures_lib, "look_at_images", spy)
    images = [str(folder / "val" / "cats" / "*.jpg"), str(folder / "val" / "dogs")]
    drawn = figures(checkpoint, str(tmp_path / "out"), images=images, count=5)
    assert names(drawn) == NAMES and not drawn.problems and len(drawn.images) == 5
    assert "looking at the first 5 of 16 images" in capsys.readouterr().out
    ((pixels, scaled),) = seen
    assert pixels.shape == (5, 8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(scaled, pixels / 127.5 - 1, atol=1e-5)
    with Image.open(drawn.images[0]) as first:
        assert abs(np.asarray(first).mean() - pixels[0].mean()) < 5


@pytest.mark.parametrize("format", ["svg", pytest.param("pdf", marks=pytest.mark.exhaustive)])
def test_weights_alone(format, run, tmp_path):
    drawn = figures(str(run), str(tmp_path / "new" / "folder"), format=format)
    assert names(drawn, format) == OF_WEIGHTS


def test_images_that_cannot_be_read(run, folder, tmp_path):
    good, bad = folder / "val" / "cats" / "0.jpg", tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    # What a folder lists and cannot be opened: another folder, a link to nothing.
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    drawn = figures(str(run), str(tmp_path / "out"), images=[str(tmp_path), str(good)])
    assert names(drawn) == NAMES
    for name, problem in zip(("bad", "folder", "gone"), drawn.problems, strict=True):
        assert f"{name}.jpg' cannot be read (" in problem
    with pytest.raises(ValueError, match=r"none of the images can be read; image file .*bad\.jpg"):
        figures(str(run), str(tmp_path / "out"), images=[str(bad)])


MISTAKES = {
    "no checkpoint": ({"checkpoint": "nowhere"}, "nowhere"),
    "no images": ({"images": ["nothing/*.jpg"]}, "there are no images at 'nothing/"),
    "a form": ({"format": "bmp"}, "format 'bmp' is unknown; allowed: png, svg, pdf"),
    "a file": ({"output": "figure.png"}, "--output 'figure.png' is to be a folder"),
}


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(changed, message, run, tmp_path):
    given = {"checkpoint": str(run), "output": str(tmp_path / "out"), **changed}
    with pytest.raises(ValueError, match=message):
        figures(given.pop("checkpoint"), given.pop("output"), **given)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vit_dist\.figures needs matplotlib"):
        figures(str(run), str(tmp_path))


def test_the_command(run, folder, tmp_path):
    words = ["vit_dist.figures", f"--checkpoint={run}"]
    code, text = processes.call(processes.main, *words, log=tmp_path / "a")
    assert code == 2 and "error: give a model and a folder: --checkpoint" in text
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    words += [f"--output={tmp_path / 'out'}", f"--images={folder / 'val' / 'cats'}"]
    words += [f"--images={tmp_path / 'bad.jpg'}"]
    code, text = processes.call(processes.main, *words, log=tmp_path / "b")
    assert code == 1 and "left out: image file" in text and "error: 1 images could" in text
    assert all(f"{tmp_path}/out/{name}.png" in text for name in NAMES)
