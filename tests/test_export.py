"""From a run to what others load: files, a SavedModel with preprocessing inside, predictions."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from absl import logging
from PIL import Image

from tests.support import flax_vit, processes
from tests.support.documents import python_blocks
from tests.support.networks import tiny_vit
from tests.support.tiny import ANY_SIZE, make, make_folder, of_folder, without_evaluation
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import parse
from vit_dist.evaluate import evaluate
from vit_dist.export import ALL_FORMATS, export
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.predict import predict
from vit_dist.run import origins
from vit_dist.run.options import WeightsOptions
from vit_dist.run.origins import open_origin
from vit_dist.run.served import Served, load_model, open_served
from vit_dist.run.start import fill
from vit_dist.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of a run of two steps on cats and dogs, with a cls token and a moving average."""
    workdir = tmp_path_factory.mktemp("run")
    config = of_folder(folder, model__pool="tok", step__ema_decay=0.5, optimizer__learning_rate=0.1)
    train(config, str(workdir))
    return workdir


def arrays_of(model):
    return {name: v.numpy() for name, v in named_weights(model).items()}


def test_a_saved_model_takes_files_and_gives_probabilities(run, judged, folder, tmp_path):
    path = tmp_path / "saved"
    assert "savedmodel" in ALL_FORMATS
    export(str(run), "savedmodel", str(path))
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    files = sorted((folder / "val").rglob("*.jpg"))
    data = tf.constant([file.read_bytes() for file in files])
    out = serve(image_bytes=data)
    probabilities = out["probabilities"].numpy()
    assert probabilities.shape == (16, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert (path / "labels.txt").read_text() == "cats\ndogs\n"
    # The accuracy is that of evaluate, which reads and prepares in its own way.
    labels = np.array([file.parent.name == "dogs" for file in files])
    assert (probabilities.argmax(1) == labels).mean() == judged["val"]["accuracy"]
    found = list(predict(str(run), [str(folder / "val" / "cats"), str(files[-1])], top=2))
    assert [p.path for p in found] == [str(f) for f in [*files[:8], files[-1]]]
    for row, expected in zip(found, probabilities[[*range(8), 15]], strict=True):
        assert row.classes[0] == ("cats", "dogs")[expected.argmax()]
        np.testing.assert_allclose(row.probabilities, sorted(expected, reverse=True), rtol=1e-5)


def test_a_keras_file(run, tmp_path):
    export(str(run), "keras", str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    model = load_model(open_origin(str(run)))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded(images), model(images))


def test_an_onnx_file_gives_the_same_in_onnx_runtime(run, folder, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    path = tmp_path / "new" / "model.onnx"
    assert export(str(run), "onnx", str(path)) == [path]
    session = onnxruntime.InferenceSession(path)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = session.run(["probabilities", "logits"], {"images": images})
    served, names = open_served(str(run))
    expected = served.classify(tf.constant(images))
    for one, key in zip(found, ("probabilities", "logits"), strict=True):
        np.testing.assert_allclose(one, expected[key], rtol=0, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == names == ["cats", "dogs"]
    assert told["image_ops"] == f"decode|{ANY_SIZE}"
    # The program that docs/finetuning.md has for it; this run resizes in another way than PIL.
    image = str(folder / "val" / "cats" / "0.jpg")
    monkeypatch.setattr("sys.argv", ["use_onnx.py", str(path), image])
    page = Path(__file__).parents[1] / "docs" / "finetuning.md"
    exec(python_blocks(page.read_text())["use_onnx.py"], {})
    name, probability = capsys.readouterr().out.split()
    (mine,) = predict(str(run), [image], top=1)
    assert name == mine.classes[0]
    assert float(probability) == pytest.approx(mine.probabilities[0], abs=0.1)


def test_what_onnx_needs_is_said_before_a_checkpoint_is_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"a file that ends in \.onnx, not .*model"):
        export("absent", "onnx", str(tmp_path / "model"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs tf2onnx, which is not installed: pip install"):
        export("absent", "onnx", str(tmp_path / "model.onnx"))


LOADING = """
import sys
{first}
import vit_dist
assert {fast} or not {{"tensorflow", "keras"}} & set(sys.modules), "importing vit_dist is slow"
{then}
import keras
model = keras.models.load_model(sys.argv[1])
assert type(model).__module__ == "vit_dist.model.vit" and model.built
import numpy as np
np.save(sys.argv[2], model(np.ones((1, 8, 8, 3), "f")))
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("", ""),
        pytest.param("import keras", "", marks=pytest.mark.exhaustive),
        # In the middle of our own imports.
        pytest.param(
            "", "from vit_dist.model.attention import Attention", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_keras_file_is_loaded_after_import_vit_dist(run, tmp_path, first, then):
    """In a process in which nothing else of ours was imported."""
    export(str(run), "keras", str(tmp_path / "model.keras"))
    script = LOADING.format(first=first, then=then, fast=bool(first))
    root = Path(__file__).resolve().parents[1]
    arguments = [tmp_path / "model.keras", tmp_path / "logits.npy"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    model = load_model(open_origin(str(run)))
    expected = model(np.ones((1, 8, 8, 3), np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-6)


@pytest.fixture(scope="module", params=["as they are", "resized"])
def digits(request, tmp_path_factory):
    """A run on the digits, arrays of 8 x 8; its SavedModel; and whether its pipe resizes them."""
    workdir, resized = tmp_path_factory.mktemp("digits"), request.param == "resized"
    ops = {"input__train_ops": ANY_SIZE, "input__eval_ops": ANY_SIZE, "image_size": 16}
    train(without_evaluation(total_steps=1, **(ops if resized else {})), str(workdir))
    path = str(workdir / "saved")
    export(str(workdir), "savedmodel", path)
    return workdir, tf.saved_model.load(path).signatures["serving_default"], resized


def arrays_like_digits():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def test_a_saved_model_of_a_run_on_arrays_takes_arrays(digits):
    workdir, serve, resized = digits
    images = arrays_like_digits()
    origin = open_origin(str(workdir))
    model = load_model(origin)
    pixels = tf.image.resize(images, model.image_size) if resized else images
    prepared = origin.pipe.device(tf.cast(tf.round(pixels), tf.uint8))
    out = serve(images=tf.constant(images))
    np.testing.assert_allclose(out["logits"], model(prepared), atol=0.05 if resized else 1e-6)
    np.testing.assert_allclose(out["probabilities"], tf.nn.softmax(out["logits"]), atol=1e-6)
    other = np.zeros((2, 12, 9, 3), np.uint8)
    if resized:
        assert serve(images=tf.constant(other))["logits"].shape == (2, 10)
    else:
        with pytest.raises(Exception, match=r"\(\?, ?8, ?8, ?3\)|8,8,3"):
            serve(images=tf.constant(other))


@pytest.mark.parametrize("channels", [2, 5])
def test_arrays_of_other_numbers_of_channels(tmp_path, channels):
    """A SavedModel takes them; image files, which have none, are refused with the reason."""
    network = vit_config("mu/4", image_size=8, num_classes=3, channels=channels, width=16, depth=1)
    pipe = parse("value_range(-1, 1)", size=(8, 8), num_classes=3)
    served = Served(build_vit(network), pipe)
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    data = tf.io.read_file(str(tmp_path / "i.png"))
    with pytest.raises(DataError, match=f"arrays of {channels} channels, and image files have 1"):
        served.prepare(data)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"arrays of {channels} channels"):
        served.serve(data[tf.newaxis])
    images = tf.ones((2, 8, 8, channels), tf.uint8)
    tf.saved_model.save(served, str(tmp_path / "m"), signatures=served.signature())
    found = tf.saved_model.load(str(tmp_path / "m")).signatures["serving_default"](images=images)
    np.testing.assert_allclose(found["logits"], served.model(pipe.device(images)), atol=1e-6)


def test_files_are_classified_by_a_run_on_arrays(digits, tmp_path):
    """predict, as in the README's first run."""
    workdir, serve, resized = digits
    images = arrays_like_digits()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = serve(images=tf.constant(images))["probabilities"].numpy()
    found = list(predict(str(workdir), [str(tmp_path / "*.png")], top=1))
    for row, prediction in zip(expected, found, strict=True):
        assert prediction.classes == [str(row.argmax())]
        np.testing.assert_allclose(prediction.probabilities, row.max(), rtol=1e-5)
    Image.new("RGB", (20, 16)).save(tmp_path / "large.png")
    arguments = [f"--checkpoint={workdir}", f"--images={tmp_path}/*.png"]
    code, text = processes.call(
        processes.main, "vit_dist.predict", *arguments, log=tmp_path / "log"
    )
    # The image of another size is named, and the others are classified all the same.
    assert all(f"{tmp_path}/{i}.png\t" in text for i in range(len(images))), text
    assert code == (0 if resized else 1) and "Traceback" not in text
    assert (f"{tmp_path}/large.png\t" in text) is resized
    reason = "the image is 16 x 20 pixels; this run takes images of 8 x 8 as they are"
    assert (reason in text) is not resized and ("error: 1 images" in text) is not resized


def bare_file(path):
    """A file of timm's without config.json, whose heads and positions nothing tells."""
    model = tiny_vit(pool="tok", num_classes=3, image_size=(24, 8))
    write_pretrained(path, "timm", arrays_of(model), model.get_config(), mean=[0.5], std=[0.5])
    state = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(state | {"unknown_part.bias": np.ones(3, "f")}, path)
    return model


def test_what_a_file_does_not_tell_is_asked_for_by_the_command_at_hand(tmp_path):
    """Each by its own flags; predict has none for it, and names the command that has."""
    path = str(tmp_path / "a.safetensors")
    model = bare_file(Path(path))
    output = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"13 positions .*\. Say --init_image_size=\.\.\.$"):
        export(path, "timm", output)
    sized = {"init_image_size": (24, 8)}
    with pytest.raises(DataError, match=r"not tell num_heads\. Say --num_heads=\.\.\.$"):
        export(path, "timm", output, **sized)
    with pytest.raises(DataError, match=r"unknown_part.*Say --ignore='unknown_part"):
        export(path, "timm", output, **sized, num_heads=2)
    told = {**sized, "num_heads": 2, "ignore": "unknown_part"}
    with pytest.raises(DataError, match=r"how images are scaled.*Say --mean=\.\.\. --std=\.\.\.$"):
        export(path, "timm", output, **told)
    export(path, "timm", output, **told, mean=[0.5], std=[0.5])
    again = open_origin(output)
    assert again.network["image_size"] == (24, 8) and again.network["num_heads"] == 2
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(np.asarray(again.tensors[name]), array)
    lacking = rf"Say --init_image_size=\.\.\. to python -m vit_dist.export --checkpoint={path} "
    Image.new("RGB", (8, 24)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match=lacking):
        list(predict(path, [str(tmp_path)]))


RGB = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder of timm's that tells all that the flags are for."""
    folder = tmp_path_factory.mktemp("told") / "timm"
    model = tiny_vit(pool="tok", num_classes=3)
    write_pretrained(folder, "timm", arrays_of(model), model.get_config(), **RGB)
    return folder


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"num_heads": 4}, r"says num_heads 2, and --num_heads 4: leave out"),
        ({"gelu": "erf"}, "says gelu 'tanh', and --gelu 'erf': leave out"),
        ({"mean": [0.5]}, r"says mean \[0.1, 0.2, 0.3\], and --mean \[0.5\]: leave out"),
        ({"std": [0.4, 0.5, 0.7]}, r"says std \[0.4, 0.5, 0.6\], and --std \[0.4, 0.5, 0.7\]"),
        (
            {"std": [0.0]},
            r"--std is one number above 0, or one for each of 3 channels; got \[0.0\]",
        ),
        (
            {"mean": [0.5, 0.5]},
            r"--mean is one number, or one for each of 3 channels; got \[0.5, 0",
        ),
        ({"mean": [float("nan")]}, "--mean is one number, or"),
    ],
)
def test_what_a_file_tells_is_not_told_otherwise(told, tmp_path, flags, said):
    with pytest.raises(ConfigError, match=said):
        export(str(told), "timm", str(tmp_path / "out"), **flags)
    assert not (tmp_path / "out").exists()
    # What agrees is taken.
    export(str(told), "timm", str(tmp_path / "out"), num_heads=2, gelu="tanh", **RGB)
    assert open_origin(str(tmp_path / "out")).std == RGB["std"]


def test_what_a_run_tells_is_not_told_otherwise(run, tmp_path):
    output = str(tmp_path / "out")
    for flags, said in (
        ({"mean": [0.4]}, r"says mean \[0.5, 0.5, 0.5\], and --mean \[0.4\]"),
        ({"num_heads": 4}, r"says num_heads \d, and --num_heads 4"),
        ({"init_image_size": (16, 16)}, r"says init_image_size \(8, 8\), and --init_image_size"),
    ):
        with pytest.raises(ConfigError, match=said):
            export(str(run), "timm", output, **flags)
    export(str(run), "timm", output, mean=[0.5], std=[0.5], init_image_size=(8, 8))


def test_a_file_may_tell_a_mean_and_no_std(told, tmp_path):
    """It is asked for what is missing, and takes it."""
    folder = tmp_path / "timm"
    shutil.copytree(told, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]["std"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"how images are scaled.* Say --std=\.\.\.$"):
        export(str(folder), "timm", str(tmp_path / "out"))
    export(str(folder), "timm", str(tmp_path / "out"), std=[0.2])
    again = open_origin(str(tmp_path / "out"))
    assert again.mean == RGB["mean"] and again.std == [0.2, 0.2, 0.2]
    config["pretrained_cfg"]["std"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json has std=0, which cannot be"):
        open_origin(str(folder))


@pytest.fixture(scope="module")
def judged(run, folder):
    """What evaluate says of the run itself."""
    return evaluate(of_folder(folder, model__pool="tok"), str(run))


# Each format by itself: tests/model/formats.
@pytest.mark.parametrize(
    "system", ["npz", pytest.param("timm", marks=pytest.mark.exhaustive), "huggingface"]
)
def test_a_run_leaves_and_comes_back(run, judged, folder, tmp_path, system):
    """Run -> file -> init_from of another run: the same weights, evaluated alike."""
    path = tmp_path / ("weights.npz" if system == "npz" else "weights")
    export(str(run), system, str(path))
    mine, again = open_origin(str(run)), open_origin(str(path))
    for name, array in mine.tensors.items():
        np.testing.assert_array_equal(np.asarray(again.tensors[name]), array)
    config = of_folder(folder, model__pool="tok")
    assert evaluate(config, str(path)) == judged
    if system != "npz":
        assert list(again.class_names) == ["cats", "dogs"]


def test_at_another_size(run, tmp_path):
    path = tmp_path / "weights.npz"
    export(str(run), "npz", str(path), image_size=(12, 16), method="bicubic")
    assert open_origin(str(path), image_size=(12, 16)).tensors["pos_embedding"].shape[1] == 13


def test_a_size_that_the_run_cannot_cut_out_is_refused(folder, tmp_path):
    """As evaluate refuses it; the SavedModel would take no image."""
    ops = f"decode|resize_small(10)|central_crop(size)|{SCALED}"
    config = of_folder(folder, total_steps=1, input__eval_ops=ops, input__train_ops=ops)
    train(config, str(tmp_path / "run"))
    output = tmp_path / "saved"
    with pytest.raises(
        ConfigError, match=r"crop\(size\)' cannot cut .* a smaller --image_size, or"
    ):
        export(str(tmp_path / "run"), "savedmodel", str(output), image_size=12)
    assert not output.exists()
    export(str(tmp_path / "run"), "keras", str(tmp_path / "out.keras"), image_size=12)


def test_a_size_that_the_pipe_does_not_give_is_refused():
    """A pipe with a number of its own, for a model that is exported at another size."""
    pipe = parse(f"decode|resize(8)|{SCALED}", size=(16, 8), num_classes=3)
    with pytest.raises(ConfigError, match=r"takes images of \(16, 8, 3\), .* gives \(8, 8, 3\)"):
        Served(tiny_vit(num_classes=3), pipe)


@pytest.mark.parametrize("system", ["npz", "timm", "huggingface"])
def test_fixed_positions_are_those_of_the_size_that_is_written(tmp_path, system):
    """Where they are held as a table, too: the logits are those of the network that computes it."""
    model = tiny_vit(pool="tok", posemb="sincos2d", num_classes=3, norm_epsilon=1e-6)
    path, output = str(tmp_path / "a.npz"), tmp_path / ("b.npz" if system == "npz" else "b")
    write_pretrained(
        Path(path), "big_vision", arrays_of(model), model.get_config(), mean=[0.5], std=[0.5]
    )
    sized = {"init_image_size": model.image_size, "num_heads": 2, "image_size": (24, 16)}
    for format, file in ((system, output), ("keras", tmp_path / "c.keras")):
        export(path, format, str(file), **sized)
    told = {"image_size": (24, 16)} if system == "npz" else {}
    written = load_model(open_origin(str(output), **told), num_heads=2)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    expected = keras.models.load_model(tmp_path / "c.keras")(images)
    np.testing.assert_allclose(written(images), expected, atol=1e-5)


def test_fine_tuning_begins_with_a_file(tmp_path, capsys):
    """A published layout at 12 px with 5 classes, into a run at 16 px with 10."""
    tree = flax_vit.make_tree(cls=True, positions=10, rep=True)
    np.savez(tmp_path / "weights.npz", **flax_vit.published(tree))
    sizes = {
        "model__width": 12, "model__depth": 2, "model__mlp_dim": 20, "model__num_heads": 3,
    }  # fmt: skip
    config = make(
        **sizes, model__pool="tok", init_from=str(tmp_path / "weights.npz"), image_size=16,
        total_steps=1, optimizer__learning_rate=0.0, input__train_ops=f"resize(size)|{SCALED}",
        input__eval_ops=f"resize(size)|{SCALED}", data__val_split="",
    )  # fmt: skip
    train(config, str(tmp_path / "run"))
    out = capsys.readouterr().out
    summary = "loaded 37 tensors unchanged, 1 resized, 2 new (head), 2 unused (pre_logits)"
    assert f"{summary}\nresized: pos_embedding (1, 10, 12) -> (1, 17, 12) (align_corners)\n" in out
    assert "head/kernel" not in out
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{summary}\n" in log
    assert "\nnew: head/kernel (12, 10), as model.rep_size differs\n" in log
    assert "\nunused: pre_logits/kernel (12, 8)\n" in log
    kernel = open_origin(str(tmp_path / "run")).tensors["embedding/kernel"]
    np.testing.assert_array_equal(kernel, tree["embedding/kernel"])


SCALED = "value_range(-1, 1)"


def test_numerics_that_do_not_match_are_refused(tmp_path):
    path = str(tmp_path / "weights.npz")
    np.savez(path, **flax_vit.big_vision(flax_vit.make_tree()))
    sizes = {
        "model__width": 12, "model__depth": 2, "model__mlp_dim": 20, "model__num_heads": 3,
    }  # fmt: skip
    imagenet = "resize(size)|normalize('imagenet')"
    with pytest.raises(ValueError, match=r"take black as \[-1.0\] .*: scale with value_range\(-1"):
        train(
            make(**sizes, init_from=path, input__eval_ops=imagenet, image_size=12,
                 input__train_ops=imagenet), str(tmp_path / "run"),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"Set --config\.model\.width=12 .*gelu=tanh"):
        train(make(init_from=path, model__gelu="erf"), str(tmp_path / "run"))


def test_a_folder_of_hugging_face_tells_its_scaling(tmp_path, folder):
    model = load_model(_origin(), system="huggingface")
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    names = ["cats", "dogs", "birds"]
    arrays = arrays_of(model)
    write_pretrained(
        tmp_path, "huggingface", arrays, model.get_config(), **imagenet, class_names=names
    )
    found = next(iter(predict(str(tmp_path), [str(folder / "val/cats/0.jpg")], top=3)))
    assert sorted(found.classes) == sorted(names) and sum(found.probabilities) > 0.999
    ends = open_origin(str(tmp_path)).black_and_white(3)
    np.testing.assert_allclose(ends[0], -np.divide(imagenet["mean"], imagenet["std"]), rtol=1e-6)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="does not tell how images are scaled"):
        export(str(tmp_path), "savedmodel", str(tmp_path / "out"))


def test_a_folder_may_tell_one_number_for_all_channels(tmp_path):
    """Where it scales otherwise than the config, that is said."""
    model = load_model(_origin(), system="huggingface")
    half = {"mean": [0.5], "std": [0.5]}
    write_pretrained(tmp_path, "huggingface", arrays_of(model), model.get_config(), **half)
    file = tmp_path / "preprocessor_config.json"
    numbers = {"image_mean": 0.5, "image_std": 0.5}
    file.write_text(json.dumps({**json.loads(file.read_text()), **numbers}))
    pipe = parse("value_range(0, 1)", size=model.image_size, num_classes=3)
    with pytest.raises(ConfigError, match=r"scale with value_range\(-1, 1\)"):
        fill(
            model,
            origin=open_origin(str(tmp_path)),
            options=WeightsOptions("align_corners", "refuse", "", None),
            pipes={"config.input.eval_ops": pipe},
            class_names=(),
        )


@pytest.mark.parametrize(
    "system, file, changed, said",
    [
        ("timm", "config.json", {}, ""),
        ("timm", "config.json", {"crop_pct": 0.9}, "crop_pct 0.9"),
        ("timm", "config.json", {"crop_mode": None}, "crop_mode 'center'"),
        ("timm", "config.json", {"crop_mode": None, "crop_pct": None, "interpolation": None}, ""),
        ("timm", "config.json", {"interpolation": "bicubic"}, "interpolation 'bicubic'"),
        ("huggingface", "preprocessor_config.json", {}, ""),
        ("huggingface", "preprocessor_config.json", {"resample": 3}, "resample 3"),
        (
            "huggingface",
            "preprocessor_config.json",
            {"size": {"shortest_edge": 18}, "do_center_crop": True},
            "size {'shortest_edge': 18}, do_center_crop True",
        ),
    ],
)
def test_a_preparation_that_is_no_plain_resize_is_told(
    tmp_path, caplog, monkeypatch, folder, system, file, changed, said
):
    """By predict, and by export to another folder that will not ask for it."""
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    model = load_model(_origin(), system=system)
    written = tmp_path / "a"
    scale = {"mean": [0.5], "std": [0.5]}
    write_pretrained(written, system, arrays_of(model), model.get_config(), **scale)
    config = json.loads((written / file).read_text())
    (config["pretrained_cfg"] if system == "timm" else config).update(changed)
    (written / file).write_text(json.dumps(config))
    list(predict(str(written), [str(folder / "val/cats/0.jpg")]))
    assumed = "assumed: a plain resize to the model's size, where the file beside it asks for "
    assert (f"{assumed}{said}\n" in caplog.text) is bool(said)
    assert (assumed in caplog.text) is bool(said)
    caplog.clear()
    export(str(written), "timm", str(tmp_path / "b"))
    assert (f"prepares images by {said}; what is" in caplog.text) is bool(said)


@pytest.mark.parametrize(
    "ops, said",
    [
        ("decode|resize(size, antialias=True)", ""),
        ("resize(size)", "resize(size)"),
        ("value_range(-1, 1)", ""),
        ("decode|resize_small(9)|central_crop(size)", "resize_small(9)|central_crop(size)"),
    ],
)
def test_a_pipe_that_is_no_plain_resize_is_told(caplog, monkeypatch, tmp_path, ops, said):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    scaled = ops if "value_range" in ops else f"{ops}|value_range(-1, 1)"
    origin = _origin()
    pipe = parse(scaled, size=origin.network["image_size"], num_classes=3)
    told = dataclasses.replace(origin, pipe=pipe)
    monkeypatch.setattr("vit_dist.export.open_origin", lambda *_, **__: told)
    export("memory", "timm", str(tmp_path / "a"))
    assert (f"memory prepares images by {said}; what" in caplog.text) is bool(said)
    assert ("prepares images" in caplog.text) is bool(said)


def _origin():
    model = tiny_vit(pool="tok", num_classes=3)
    return origins.Origin("memory", arrays_of(model), model.get_config())


def test_weights_of_a_bucket_are_copied_and_removed_again(tmp_path, remote):
    np.savez(tmp_path / "weights.npz", **flax_vit.published(flax_vit.make_tree()))
    (remote / "weights.npz").write_bytes((tmp_path / "weights.npz").read_bytes())
    (remote / "config.json").write_text(json.dumps({}))
    origin = open_origin(f"{remote}/weights.npz")
    copies = list(origin.download.folder.iterdir())
    assert sorted(path.name for path in copies) == ["config.json", "weights.npz"]
    assert np.asarray(origin.tensors["head/bias"]).shape == (5,)
    del origin
    assert not copies[0].exists()
    with pytest.raises(ValueError, match="there is no"):
        open_origin(f"{remote}/missing.npz")
    with pytest.raises(ValueError, match=r"ftp://a/b.npz: local paths, gs:// and hf:// work"):
        open_origin("ftp://a/b.npz")


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("vit_dist.export", ["--checkpoint=a"], 2, "error: give what to export and where to"),
        (
            "vit_dist.export",
            ["--checkpoint=a", "--output=b"],
            2,
            "error: there is no checkpoint at",
        ),
        ("vit_dist.predict", ["--checkpoint=a"], 2, "error: give a model and images"),
        ("vit_dist.predict", ["--checkpoint=a", "--images=b.jpg"], 2, "error: there are no images"),
    ],
)
def test_the_commands_say_what_is_wrong(tmp_path, name, arguments, code, message):
    done, text = processes.call(processes.main, name, *arguments, log=tmp_path / "log")
    assert done == code and message in text


def test_the_commands(run, folder, tmp_path):
    image, path = folder / "val/cats/0.jpg", tmp_path / "weights.npz"
    arguments = [f"--checkpoint={run}", f"--output={path}", "--image_size=12,16"]
    done, text = processes.call(
        processes.main, "vit_dist.export", *arguments, log=tmp_path / "a.log"
    )
    assert done == 0 and f"wrote {path}" in text and path.exists()
    arguments = [f"--checkpoint={run}", f"--images={image}", "--top=2"]
    done, text = processes.call(
        processes.main, "vit_dist.predict", *arguments, log=tmp_path / "b.log"
    )
    assert done == 0 and re.search(rf"{image}\t(cats|dogs) [\d.]+%\t(cats|dogs) [\d.]+%", text)


def test_images_that_cannot_be_read(run, folder, tmp_path):
    """They are named and left out; names may hold what is a pattern, or a separator, elsewhere."""
    for name in ("bad.jpg", "worse.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff nothing")
    good = ["a good one.jpg", "cats, and [dogs].jpg"]
    for name in good:
        shutil.copy(folder / "val/cats/0.jpg", tmp_path / name)
    found = list(predict(str(run), [str(tmp_path)]))
    assert [Path(p.path).name for p in found if not p.problem] == good
    assert all(len(p.classes) == 1 for p in found if not p.problem)
    problems = [p.problem for p in found if p.problem]
    assert len(problems) == 2 and "bad.jpg' cannot be read" in problems[0]
    both = f"{tmp_path / good[0]},{folder}/val/cats/[01].jpg"
    assert len(list(predict(str(run), [str(tmp_path / good[1]), both]))) == 4
    arguments = [f"--checkpoint={run}", f"--images={tmp_path}"]
    code, text = processes.call(
        processes.main, "vit_dist.predict", *arguments, log=tmp_path / "log"
    )
    assert code == 1 and text.count("left out: image file") == 2 and "Traceback" not in text
    assert f"{tmp_path / good[1]}\t" in text and "error: 2 images could not be read" in text
    with pytest.raises(ValueError, match="there are no images at"):
        list(predict(str(run), [str(tmp_path / "*.gif")]))
