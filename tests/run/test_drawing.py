"""Figures in TensorBoard while training: there at several steps, and no more than pictures."""

import importlib.util
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import shown, tiny
from vit_dist.inspection.draw import NAMES, OF_WEIGHTS, draw_weights, pixels
from vit_dist.inspection.judged import draw_worst_and_best
from vit_dist.inspection.look import look_at_weights
from vit_dist.inspection.sheet import Cell
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run import background as background_lib
from vit_dist.run import drawing as drawing_lib
from vit_dist.run.background import Background
from vit_dist.run.check import check
from vit_dist.run.drawing import Drawing
from vit_dist.run.input import images_to_inspect
from vit_dist.train import train

# 8 steps, an average of the weights, and registers.
CONFIG = {"total_steps": 8, "log_steps": 4, "step__ema_decay": 0.5, "model__registers": 1}


def drawn(workdir):
    """Name -> step -> pixels, of the figures of the model's inside."""
    found = shown.pictures(workdir)
    return {k.removeprefix("figures/"): v for k, v in found.items() if k.startswith("figures/")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of one training, without figures and with them."""
    found = {}
    for steps in (0, 4):
        found[steps] = tmp_path_factory.mktemp(f"every_{steps}")
        config = tiny.make(figures_steps=steps, **CONFIG)
        train(config, str(found[steps]))
    return found


def test_all_figures_are_there_at_several_steps(runs):
    figures = drawn(runs[4])
    assert set(figures) == set(NAMES)
    for steps in figures.values():
        # The drawing at step 4 is still being made when step 8 comes, which waits for it.
        assert set(steps) == {4, 8}
    assert (figures["positions"][4] != figures["positions"][8]).any()
    assert not drawn(runs[0])


def test_what_is_drawn_is_the_average_of_the_weights(runs):
    arrays = tiny.arrays(runs[4])
    options, _ = check(tiny.make(**CONFIG))
    model = build_vit(dict(options.model.network))
    for name, variable in named_weights(model).items():
        variable.assign(arrays[f"ema/{name}"])
    for name, figure in draw_weights(look_at_weights(model)):
        np.testing.assert_array_equal(pixels(figure), drawn(runs[4])[name][8])


def test_the_last_evaluation_is_shown(runs):
    options, data = check(tiny.make(**CONFIG))
    model, source = build_vit(dict(options.model.network)), data.sources["val"]
    arrays = tiny.arrays(runs[4])
    for name, variable in named_weights(model).items():
        variable.assign(arrays[f"ema/{name}"])
    images = np.stack([source.load(i)[0] for i in range(source.num_examples)])
    labels = np.array([source.load(i)[1] for i in range(source.num_examples)])
    p = tf.nn.softmax(model(options.evaluation.pipe.device(tf.constant(images)))).numpy()

    def cells(order):
        said = p.argmax(1)
        captions = {i: f"is {labels[i]}, said {said[i]} ({p[i].max():.2f})" for i in order}
        return [Cell(images[i], captions[i]) for i in order]

    order = np.argsort(p[np.arange(len(p)), labels])
    sheet = draw_worst_and_best(cells(order[:16]), cells(order[:-17:-1]))
    for steps, workdir in runs.items():
        found = shown.pictures(workdir)
        np.testing.assert_array_equal(found["val/worst_and_best"][8], sheet)
        # matplotlib is needed only where figures are asked for.
        assert ("val/confusions" in found) == ("val/calibration" in found) == (steps > 0)


def test_figures_do_not_change_the_training(runs):
    arrays = [tiny.arrays(workdir) for workdir in runs.values()]
    assert set(arrays[0]) == set(arrays[1])
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name], err_msg=name)
    curves = [[row.get("train/loss") for row in tiny.rows(workdir)] for workdir in runs.values()]
    assert curves[0] == curves[1]


@pytest.mark.compiles
@pytest.mark.exhaustive  # without a training around it: test_one_drawing_at_a_time
def test_a_drawing_that_fails_stops_nothing_and_says_so_once(tmp_path, monkeypatch, capfd):
    def fail(look):
        raise MemoryError("there is no room for a picture")
        yield

    monkeypatch.setattr(drawing_lib, "draw_images", fail)
    metrics = train(tiny.without_evaluation(figures_steps=2, **CONFIG), str(tmp_path))
    assert metrics["step"] == 8
    log = (tmp_path / "log.txt").read_text()
    said = "figures could not be drawn (MemoryError: there is no room for a picture)"
    assert log.count(said) == 1
    # What needs no images is there.
    assert set(drawn(tmp_path)) == set(OF_WEIGHTS)


class Waiting:
    """A writer that holds the drawing until it is let go."""

    def __init__(self):
        self.go, self.steps = threading.Event(), []

    def images(self, step, name, images):
        assert self.go.wait(60)
        self.steps.append(step)


def make_drawing(writer, images, told):
    options, _ = check(tiny.without_evaluation())
    pipe = options.evaluation.pipe
    background = Background(note=told.append)
    drawing = Drawing(options.model.network, pipe, images, writer, background)
    return drawing, background, build_vit(dict(options.model.network))


def test_one_drawing_at_a_time():
    def no_images():
        raise ValueError("no images")

    writer, told = Waiting(), []
    drawing, background, model = make_drawing(writer, no_images, told)
    for step in (1, 2, 3):
        drawing.begin(step, model)
    background.finish(stop=lambda: True)  # a signal ends the wait
    assert not writer.steps
    writer.go.set()
    background.finish()
    assert set(writer.steps) == {1} and len(told) == 1
    drawing.begin(4, model)
    background.finish()
    assert set(writer.steps) == {1, 4}
    assert told == [
        "warning: figures could not be drawn (ValueError: no images); the training goes on"
    ]


def test_a_run_that_ends_gives_the_drawing_up():
    writer, told = Waiting(), []
    reading, go = threading.Event(), threading.Event()

    def images():
        reading.set()
        assert go.wait(60)
        return np.zeros((1, 8, 8, 3), np.uint8)

    drawing, background, model = make_drawing(writer, images, told)
    writer.go.set()
    drawing.begin(1, model)
    assert reading.wait(60)
    closing = threading.Thread(target=background.close)
    closing.start()
    assert background._given_up.wait(60)
    go.set()
    closing.join(60)
    # Of the images nothing was drawn any more, and that is no failure.
    assert not closing.is_alive() and len(writer.steps) == len(OF_WEIGHTS)
    background.finish()
    assert not told


def test_pictures_that_take_for_ever_are_given_up_and_told(monkeypatch):
    monkeypatch.setattr(background_lib, "PATIENCE", 0.0)
    go, told = threading.Event(), []
    background = Background(note=told.append)
    background.start("figures", lambda: go.wait(60) and background.go_on())
    background.finish()
    go.set()
    background.close()
    assert told == ["warning: pictures are given up: not drawn in 0 seconds"]


def test_images_are_spread_over_the_split_and_prepared_as_for_evaluation():
    options, data = check(
        tiny.make(image_size=16, input__train_ops=tiny.ANY_SIZE, input__eval_ops=tiny.ANY_SIZE)
    )
    images = images_to_inspect(options.evaluation, data, count=4)
    assert images.shape == (4, 16, 16, 3)
    source = data.sources["val"]
    for image, index in zip(images, (0, 59, 119, 179), strict=True):
        expected = tf.image.resize(source.images[index], (16, 16)).numpy()
        assert np.abs(image - expected).max() <= 1


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    folder = tiny.make_folder(tmp_path)
    files = sorted((folder / "val").rglob("*.jpg"))
    for path in files[1:]:
        path.write_bytes(path.read_bytes()[:100])
    options, data = check(tiny.of_folder(folder))
    (image,) = images_to_inspect(options.evaluation, data)
    with Image.open(files[0]) as opened:
        assert np.abs(image.mean() - np.asarray(opened).mean()) < 3
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match="no image of folder:val can be read"):
        images_to_inspect(options.evaluation, data)


def test_without_val_the_images_are_those_of_train():
    options, data = check(tiny.without_evaluation())
    images = images_to_inspect(options.evaluation, data, count=1)
    np.testing.assert_array_equal(images[0], data.sources["train"].images[0])


def test_the_key_is_checked_before_devices_start(monkeypatch):
    with pytest.raises(ValueError, match="figures_percent"):
        check(tiny.make(figures_percent=101.0, figures_steps=None))
    assert check(tiny.make())[0].figures_steps == 0
    # A share of a short run is at least a step: 0 would be never.
    assert check(tiny.make(figures_percent=1.0, figures_steps=None))[0].figures_steps == 1
    find = importlib.util.find_spec
    hidden = {"matplotlib": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: hidden.get(name, name) and find(name)
    )
    with pytest.raises(ValueError, match=r"config\.figures_steps=5 needs matplotlib"):
        check(tiny.make(figures_steps=5))
    assert check(tiny.make())[0].figures_steps == 0
