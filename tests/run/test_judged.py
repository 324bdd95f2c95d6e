"""Pictures of evaluations: of the right examples, at the right steps, and no more than pictures."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support import tiny
from vit_dist.evaluators.verdicts import Verdicts
from vit_dist.inspection.judged import draw_worst_and_best
from vit_dist.inspection.sheet import Cell
from vit_dist.run import judged as judged_lib
from vit_dist.run.background import Background
from vit_dist.run.check import check
from vit_dist.run.judged import Judged


class Kept(dict):
    """A writer that keeps (step, name) -> picture."""

    def images(self, step, name, images):
        self[step, name] = images[0]


def make_verdicts(source, certainty):
    """Of the first examples of a source; a label is right where it is likelier than 0.5."""
    count = len(certainty)
    labels = np.array([source.load(i)[1] for i in range(count)])
    certainty = np.array(certainty, np.float32)
    right = certainty > 0.5
    predictions = np.where(right, labels, (labels + 1) % source.num_classes)
    confidence = np.where(right, certainty, 1 - certainty)
    return Verdicts(np.arange(count), labels, predictions, confidence, certainty)


def make_judged(config, **changed):
    options, data = check(config)
    writer, told = Kept(), []
    background = Background(note=told.append)
    changed = {"count": 2, "figures": False, **changed}
    return (
        Judged(options.evaluation, data, writer, background, **changed),
        background,
        data.sources["val"],
        writer,
        told,
    )


def expected_sheet(source, *, worst, best):
    """Of images that the pipe does not change; (place, said, probability)."""

    def cells(rows):
        found = []
        for place, said, probability in rows:
            image, label = source.load(place)
            names = source.class_names
            caption = f"is {names[label]}, said {names[said]} ({probability})"
            found.append(Cell(image, caption))
        return found

    return np.asarray(draw_worst_and_best(cells(worst), cells(best)))


def test_worst_and_best_with_label_prediction_and_probability():
    judged, background, source, writer, told = make_judged(tiny.make())
    verdicts = make_verdicts(source, [0.6, 0.1, 0.9, 0.8, 0.3])
    # An earlier evaluation that was not drawn in time makes way.
    judged.keep("val", 3, make_verdicts(source, [0.5, 0.5]))
    judged.keep("val", 7, verdicts)
    judged.draw()
    judged.draw()
    background.finish()
    assert list(writer) == [(7, "val/worst_and_best")] and not told
    said = verdicts.predictions
    sheet = expected_sheet(
        source,
        worst=[(1, said[1], "0.90"), (4, said[4], "0.70")],
        best=[(2, said[2], "0.90"), (3, said[3], "0.80")],
    )
    np.testing.assert_array_equal(writer[7, "val/worst_and_best"], sheet)


def test_few_examples_are_shown_once():
    verdicts = Verdicts(*np.zeros((3, 3), int), *np.array([[0, 0, 0], [0.5, np.nan, 0.2]]))
    verdicts = Verdicts(np.arange(3), *list(vars(verdicts).values())[1:])
    worst, best = verdicts.extremes(2, before=3)
    assert (worst.tolist(), best.tolist()) == ([1, 2], [0])
    worst, best = verdicts.extremes(2, before=1)
    assert (worst.tolist(), best.tolist()) == ([0], [])


def test_of_a_stream_only_its_beginning_is_read(monkeypatch):
    monkeypatch.setattr(judged_lib, "STREAMED", 3)
    judged, background, source, writer, told = make_judged(tiny.make(), count=1)
    records = tf.data.Dataset.range(source.num_examples).map(source.read)
    monkeypatch.setattr(source, "indexable", False)
    monkeypatch.setattr(source, "stream", lambda **_: records)
    monkeypatch.setattr(source, "decode_record", lambda record: record)
    verdicts = make_verdicts(source, [0.6, 0.3, 0.9, 1.0, 0.0])
    judged.keep("val", 1, verdicts)
    judged.draw()
    background.finish()
    said = verdicts.predictions
    sheet = expected_sheet(source, worst=[(1, said[1], "0.70")], best=[(2, said[2], "0.90")])
    assert not told
    np.testing.assert_array_equal(writer[1, "val/worst_and_best"], sheet)


def test_images_that_cannot_be_read_are_told_once_and_figures_stay(monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(judged_lib, "read_images", fail)
    judged, background, source, writer, told = make_judged(tiny.make(), figures=True)
    for step in (1, 2):
        judged.keep("val", step, make_verdicts(source, [0.6, 0.1]))
        judged.draw()
        background.finish()
    assert set(writer) == {(s, f"val/{k}") for s in (1, 2) for k in ("confusions", "calibration")}
    assert told == [
        "warning: worst and best images of val could not be drawn (OSError: the disk is gone); "
        "the training goes on"
    ]


def test_an_evaluation_of_the_config_reads_its_own_split():
    evals = {"other": {"kind": "classification", "split": "test"}}
    three = {"data__test_split": "test"}
    judged, background, _, writer, _ = make_judged(tiny.make(evals=evals, **three), count=1)
    _, data = check(tiny.make(**three))
    source = data.sources["test"]
    verdicts = make_verdicts(source, [0.6, 0.1])
    judged.keep("other", 5, verdicts)
    judged.draw()
    background.finish()
    said = verdicts.predictions
    sheet = expected_sheet(source, worst=[(1, said[1], "0.90")], best=[(0, said[0], "0.60")])
    np.testing.assert_array_equal(writer[5, "other/worst_and_best"], sheet)


def test_the_key_is_checked_before_devices_start():
    assert check(tiny.make())[0].evaluation.verdicts
    off = {"monitor__judged_images": 0}
    assert not check(tiny.make(**off))[0].evaluation.verdicts
    assert check(tiny.make(figures_steps=1, **off))[0].evaluation.verdicts
    with pytest.raises(ValueError, match=r"monitor\.judged_images"):
        check(tiny.make(monitor__judged_images=-1))
