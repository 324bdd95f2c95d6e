"""What predict reads, and the forms in which it tells what it found."""

import collections
import csv
import io
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import processes, tiny
from vit_dist import predict as predict_module
from vit_dist.predict import predict
from vit_dist.run.served import open_served
from vit_dist.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on a folder of images: (the run, the folder)."""
    tmp = tmp_path_factory.mktemp("photos")
    folder = tiny.make_folder(tmp / "data")
    config = tiny.of_folder(folder, total_steps=1, data__val_split="")
    train(config, str(tmp / "run"))
    return tmp / "run", folder / "val"


def call(run, *flags, log, lines=None):
    """Exit code and output of predict; `lines` is its standard input."""
    return processes.call(_with_input, lines, [f"--checkpoint={run}", *flags], log=log)


def _with_input(lines, flags):
    import sys

    if lines is not None:
        sys.stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    processes.main("vit_dist.predict", *flags)


def test_folders_below_a_folder(photos, tmp_path):
    run, folder = photos
    (folder / "dogs" / "notes.txt").write_text("no image")
    paths = [found.path for found in predict(str(run), [str(folder)], recursive=True)]
    expected = sorted(str(path) for path in folder.glob("*/*.jpg"))
    assert paths == expected and len(paths) == 16


def test_what_is_no_image_costs_itself_alone(photos, tmp_path, caplog):
    run, folder = photos
    (tmp_path / "a.jpg").write_bytes((folder / "cats" / "0.jpg").read_bytes())
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 [1], b.jpg")
    Path(odd).write_bytes((folder / "cats" / "0.jpg").read_bytes())
    (tmp_path / "._a.jpg").write_bytes(b"what macOS notes of a.jpg")
    (tmp_path / "b.HEIC").write_bytes(b"")
    found = {p.path.rpartition("/")[2]: p for p in predict(str(run), [str(tmp_path)])}
    assert set(found) == {"a.jpg", os.path.basename(odd), "folder.jpg", "gone.jpg"}
    assert found["a.jpg"].classes == found[os.path.basename(odd)].classes != []
    assert [p.path for p in predict(str(run), [odd])] == [odd]
    for name in ("folder.jpg", "gone.jpg"):
        assert f"{name}' cannot be read (" in found[name].problem
    assert "ignored 1 files that TensorFlow does not decode: 1 HEIC" in caplog.text


def test_several_devices_find_the_same_in_the_same_order(photos, monkeypatch, cpus):
    """Batches of one image each: those of three devices overtake each other."""
    run, folder = photos
    monkeypatch.setattr("vit_dist.predict._BATCH", 1)
    asked = collections.Counter()
    predict_batch = predict_module._predict_batch

    def note(served, names, paths, top):
        asked[served.model.trainable_weights[0].value.device[-5:]] += len(paths)
        return predict_batch(served, names, paths, top)

    monkeypatch.setattr("vit_dist.predict._predict_batch", note)
    images = [str(folder)]
    one = list(predict(str(run), images, recursive=True, devices=cpus[:1]))
    several = list(predict(str(run), images, recursive=True, devices=cpus[1:]))
    assert [p.path for p in several] == [p.path for p in one]
    for a, b in zip(one, several, strict=True):
        assert a.classes == b.classes and a.probabilities == b.probabilities
    assert asked["CPU:0"] == 16 and sum(asked[cpu] for cpu in cpus[1:]) == 16
    assert all(asked[cpu] for cpu in cpus[1:])


class Clocked:
    """A Served whose network takes the seconds that it is given, one call after the other."""

    model = types.SimpleNamespace(image_size=(8, 8), channels=3)  # all that is asked of it

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.shapes = clock, iter(seconds), []

    def classify(self, images):
        self.shapes.append(tuple(images.shape))
        self.clock[0] += next(self.seconds)
        return {"probabilities": images}


def test_speed_is_told_beside_that_of_the_network_alone():
    clock = [0.0]
    one = {"/device:CPU:0": Clocked(clock, [0.1, 0.5, 0.25, 0.4])}
    told = predict_module.tell_speed(one, 1999, 20.0, clock=lambda: clock[0])
    assert told == "1999 images, 100.0 a second" and clock == [0]
    told = predict_module.tell_speed(one, 2000, 20.0, clock=lambda: clock[0])
    # The first call does not count; of the others the fastest does: 32 / 0.25.
    assert told == "2000 images, 100.0 a second of 128.0 that the network alone does here"
    assert one["/device:CPU:0"].shapes == [(32, 8, 8, 3)] * 4


def test_speed_of_several_devices_is_that_of_all(cpus):
    clock = [0.0]
    two = {cpu: Clocked(clock, [0.5] * 4) for cpu in cpus[:2]}
    told = predict_module.tell_speed(two, 3999, 40.0, clock=lambda: clock[0])
    assert told == "3999 images on 2 devices, 100.0 a second"
    told = predict_module.tell_speed(two, 4000, 40.0, clock=lambda: clock[0])
    # The clock counts both, one after the other: 2 * 32 / (0.5 + 0.5).
    assert told.endswith("100.0 a second of 64.0 that the network alone does here")


def test_the_network_alone_is_what_predicts_and_is_traced_once(photos):
    run, folder = photos
    served, _ = open_served(str(run))
    data = tf.stack([tf.io.read_file(str(path)) for path in sorted(folder.glob("dogs/?.jpg"))])
    prepared = tf.stack([served.prepare(one) for one in data])
    expected = served.serve(data)["probabilities"]
    np.testing.assert_allclose(served.classify(prepared)["probabilities"], expected, rtol=1e-6)
    assert served.classify.experimental_get_tracing_count() == 1


def test_the_same_in_each_form(photos, tmp_path):
    run, folder = photos
    bad = folder / "dogs" / "broken.jpg"
    bad.write_bytes(b"not an image")
    try:
        flags = [f"--images={folder / 'dogs'}", "--top=2"]
        expected = list(predict(str(run), [str(folder / "dogs")], top=2))
        for name in ("new/found.csv", "found.jsonl"):
            sheet = tmp_path / f"{name.rpartition('.')[2]}.png"
            more = [f"--output={tmp_path / name}", f"--sheet={sheet}"]
            code, text = call(run, *flags, *more, log=tmp_path / f"{sheet.stem}.log")
            assert code == 1 and "broken.jpg" in text and "9 images, " in text, text
            assert text.rstrip().splitlines()[-2].endswith(" a second"), text  # nine are too few
    finally:
        bad.unlink()
    with open(tmp_path / "new" / "found.csv") as file:
        rows = list(csv.DictReader(file))
    objects = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    for row, found, want in zip(rows, objects, expected, strict=True):
        assert row["path"] == found["path"] == want.path
        assert row["problem"] == found["problem"] == want.problem
        assert found["classes"] == want.classes
        if want.problem:
            assert not row["class_1"]
            continue
        assert [row["class_1"], row["class_2"]] == want.classes
        assert found["probabilities"] == pytest.approx(want.probabilities, rel=1e-5)
        assert float(row["probability_1"]) == found["probabilities"][0]
    # 8 images beside each other, as large as the smallest that a sheet shows.
    with Image.open(tmp_path / "csv.png") as sheet:
        width, height = sheet.size
    assert width > 8 * 64 and 64 < height < 128


def test_names_from_standard_input(photos, tmp_path):
    run, folder = photos
    paths = [str(folder / "cats" / f"{i}.jpg") for i in (3, 1)]
    code, text = call(run, "--images=-", log=tmp_path / "log", lines=[*paths, ""])
    assert code == 0, text
    assert [line.split("\t")[0] for line in text.splitlines() if "\t" in line] == paths


@pytest.mark.parametrize(
    "flags, lines, said",
    [
        (["--images=a.jpg", "--output=a.txt"], None, "--output a.txt must end in one of .csv, "),
        (["--images=-"], [], "standard input names no images"),
        (["--images=-"], ["absent.jpg"], "there are no images at 'absent.jpg'"),
    ],
)
def test_mistakes(tmp_path, flags, lines, said):
    code, text = call("absent", *flags, log=tmp_path / "log", lines=lines)
    assert code == 2 and said in text and "Traceback" not in text, text
