"""ImageNet's further test sets: sets of labels, some of the classes, corruptions.

With TFDS's own builders, so with the features and class names that the real sets have.
"""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from tests.support import tiny
from tests.support.datasets import prepare_made_up
from vit_dist.cluster.strategy import make_strategy
from vit_dist.config import recipe
from vit_dist.config.errors import ConfigError, DataError, UserError
from vit_dist.config.recipe import ALEXNET_ERRORS, IMAGENET_SETS, imagenet_c, imagenet_sets
from vit_dist.data.sources.open import open_source
from vit_dist.run.build import make_model
from vit_dist.run.check import check, check_evaluation
from vit_dist.run.evals import Evals
from vit_dist.run.sources import open_sources

OPS = f"decode|{tiny.ANY_SIZE}"
SETS = [[3], [3, 7, 7], [], [999, 0], [12], [], [5, 6], [1], [2], [400, 401, 402, 403]]


def image(number, size=8):
    return np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)


def made_up(name, data_dir):
    """One of these sets with ten images; those of some classes are of 3, 7 and 12 alone."""
    labels = [[3, 7, 12][i % 3] for i in range(10)]
    if name == "imagenet2012_real":
        examples = [
            {"image": image(i), "original_label": 0, "real_label": labels, "file_name": f"{i}"}
            for i, labels in enumerate(SETS)
        ]
        return prepare_made_up(name, data_dir, "validation", examples)
    corrupted = name.startswith("imagenet2012_corrupted")
    examples = [
        {"image": image(i, 224 if corrupted else 8), "label": label, "file_name": f"{i}.jpg"}
        for i, label in enumerate(labels)
    ]
    return prepare_made_up(name, data_dir, "validation" if corrupted else "test", examples)


def config(evals, **changed):
    return tiny.make(input__eval_ops=OPS, evals=evals, **changed)


def evals_of(config, **kept):
    """Evals with a network whose head is not zeros, and the network."""
    options, data = check_evaluation(config, splits=[], evals=None)
    strategy = make_strategy(**options.strategy)
    model = make_model(options.model, strategy)
    kernel = np.random.default_rng(0).normal(size=model.head.kernel.shape)
    model.head.kernel.assign(kernel.astype(np.float32))
    return Evals(options, data, model, strategy, **kept), model


def predictions(model, builder, split, among=None):
    """What the network says of each example of a set, and the examples, as TFDS reads them."""
    examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
    images = np.stack([e["image"] for e in examples]).astype(np.float32) / 127.5 - 1
    logits = model(images).numpy()
    if among is not None:
        logits = np.where(np.isin(np.arange(1000), among), logits, -np.inf)
    return logits.argmax(-1), examples


DEVICES = [{}, {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}]


def test_sets_of_labels_of_tfds(tmp_path):
    builder = made_up("imagenet2012_real", tmp_path)
    entries = imagenet_sets("imagenet_real", data_dir=str(tmp_path))
    for devices in DEVICES:
        # 4 for each device: the last batch is padded.
        evals, model = evals_of(config(entries, input__eval_batch_size=8, **devices))
        # The class that is said most often counts as right in three sets.
        found = evals("imagenet_real")
        predicted, examples = predictions(model, builder, "validation")
        real_labels = [list(e["real_label"]) for e in examples]
        assert sorted(map(sorted, real_labels)) == sorted(map(sorted, SETS))
        is_correct = [p in real_labels[i] for i, p in enumerate(predicted) if real_labels[i]]
        assert found["examples"] == len(is_correct) == 8
        assert found["accuracy"] == np.mean(is_correct)
        # As nothing is hit by chance among 1000 classes: say of all what is right for three.
        model.head.bias.assign(1e3 * np.isin(np.arange(1000), [3, 12]))
        assert evals("imagenet_real")["accuracy"] > 0


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "imagenet_v2", "imagenet_sketch"])
def test_classes_of_tfds(tmp_path, name):
    """All of these have the 1000 classes of ImageNet; -A and -R are judged among their own."""
    builder = made_up(IMAGENET_SETS[name]["data"]["name"], tmp_path)
    found_config = config(imagenet_sets(name, data_dir=str(tmp_path)))
    evals, model = evals_of(found_config)
    assert builder.info.features["label"].num_classes == model.num_classes == 1000
    found = evals(name)
    among = [3, 7, 12] if name in ("imagenet_a", "imagenet_r") else None
    predicted, examples = predictions(model, builder, "test", among)
    assert found["accuracy"] == np.mean([e["label"] for e in examples] == predicted)
    assert (found["accuracy"] > 0) == (among is not None)
    assert found["mean_class_accuracy"] >= found["accuracy"] / 2


def photographs(folder, classes=("cat", "dog", "emu")):
    """Validation images named as ImageNet's, class by class."""
    for i in range(12):
        path = folder / "val" / classes[i % 3] / f"ILSVRC2012_val_{i + 1:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(i)).save(path)
    return folder


def real_of(folder, sets, **changed):
    (folder / "real.json").write_text(json.dumps(sets))
    data = {"source": "folder", "data_dir": str(folder), "label_file": str(folder / "real.json")}
    return {"real": {"kind": "real", "data": {**data, "train_split": "", **changed}}}


LISTED = [[0], [1, 2], [], [2], [0, 1, 2], [1], [], [0], [0, 1], [2], [1], [2, 0]]


def test_sets_of_labels_by_a_file(tmp_path):
    folder = photographs(tmp_path)
    named = {f"ILSVRC2012_val_{i + 1:08d}.png": row for i, row in enumerate(LISTED)}
    files = sorted((folder / "val").glob("*/*.png"), key=lambda path: path.name)
    images = np.stack([np.asarray(Image.open(f)) for f in files]).astype(np.float32) / 127.5 - 1
    for sets in (LISTED, named):
        evals, model = evals_of(config(real_of(folder, sets)))
        predicted = model(images).numpy().argmax(-1)
        is_correct = [p in LISTED[i] for i, p in enumerate(predicted) if LISTED[i]]
        found = evals("real")
        assert (found["accuracy"], found["examples"]) == (np.mean(is_correct), 10)
        assert 0 < found["accuracy"] < 1
        # Once more, and from a file.
        for _ in range(2):
            kept, _ = evals_of(config(real_of(folder, sets)), folder=str(tmp_path / "kept"))
            assert kept("real") == found
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 1
    # Features kept for other labels are not these.
    _, data = check_evaluation(config(real_of(folder, LISTED)), splits=[], evals=None)
    _, other = check_evaluation(config(real_of(folder, LISTED[::-1])), splits=[], evals=None)
    (one,), (two,) = data.sources.values(), other.sources.values()
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    "sets, words",
    [
        ([[0]], "a list of 1 sets of labels, for the files ILSVRC2012_val_00000001 to .*0001, and"),
        ([[0]] * 11 + [[3]], "00000012.png the label 3, and there are 3 classes, 0 to 2"),
        ([[0]] * 11 + [["1"]], "the label '1', and there are 3 classes"),
        ({"a.png": [0]}, "has no labels for ILSVRC2012_val_00000001.png"),
        ([0] * 12, "must hold a list of lists of class numbers"),
    ],
)
def test_files_of_labels_that_do_not_fit(tmp_path, sets, words):
    with pytest.raises(UserError, match=words):
        check_evaluation(config(real_of(photographs(tmp_path), sets)), splits=[], evals=None)


def test_files_of_one_name_in_several_folders(tmp_path):
    """Each has labels of its own, by its folder; a bare name would give all of them the same."""
    files = ["cat/1.png", "dog/1.png", "dog/2.png", "emu/1.png"]
    for place, file in enumerate(files):
        path = tmp_path / "val" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(place)).save(path)
    sets = {"cat/1.png": [0], "dog/1.png": [0, 1], "2.png": [2], "emu/1.png": []}

    def opened(sets):
        (tmp_path / "real.json").write_text(json.dumps(sets))
        known = {"data_dir": str(tmp_path), "label_file": f"{tmp_path}/real.json"}
        source = open_source("folder", split="val", **known)
        return [source.read(tf.constant(i))["label"].numpy().tolist() for i in range(4)]

    assert opened(sets) == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(DataError, match=r"for 1.png, and 3 folders .* as dog/1.png"):
        opened({"cat/1.png": [0], "1.png": [1], "2.png": [2]})


def test_labels_and_kinds_that_do_not_fit(tmp_path):
    entries = real_of(photographs(tmp_path), LISTED)
    with pytest.raises(
        ConfigError, match=r"'classification' takes one label .* take the kind 'real"
    ):
        entry = {**entries["real"], "kind": "classification"}
        check_evaluation(config({"real": entry}), splits=[], evals=None)
    with pytest.raises(ConfigError, match=r"'real' takes a set .* take the kind 'classification'"):
        check_evaluation(config({"real": {"kind": "real"}}), splits=[], evals=None)
    with pytest.raises(ConfigError, match="a set of labels for each example, and 'val' takes one"):
        keys = entries["real"]["data"]
        changed = {f"data__{k}": v for k, v in keys.items() if k != "train_split"}
        open_sources(config(None, **changed), training=False, splits=["val"])


@pytest.fixture
def corrupted(tmp_path, monkeypatch):
    """ImageNet-C with two corruptions of two severities, and what config.evals takes for it."""
    monkeypatch.setattr(recipe, "SEVERITIES", (1, 2))
    names = ("fog", "snow")
    for place, (corruption, severity) in enumerate(itertools.product(names, (1, 2))):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / corruption / str(severity) / name
            path.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(image(place * 8 + label * 4 + i)).save(path / f"{i}.png")
    return tmp_path, imagenet_c(OPS, folder=str(tmp_path), corruptions=names)


def error_of(folder, model):
    """The share of images of a folder that are taken for another class, by hand."""
    files = sorted(folder.glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(f)) for f in files]).astype(np.float32) / 127.5 - 1
    labels = [("cat", "dog").index(f.parent.name) for f in files]
    return np.mean(model(images).numpy().argmax(-1) != labels)


def test_imagenet_c_in_folders(corrupted, monkeypatch):
    """mCE as the paper defines it: sums over severities, divided by AlexNet's, then the mean."""
    folder, entries = corrupted
    evals, model = evals_of(config(entries))
    collected = []
    inner = Evals._collect
    monkeypatch.setattr(Evals, "_collect", lambda *a: collected.append(a[3]) or inner(*a))
    options, _ = check_evaluation(config(entries), splits=[], evals=["imagenet_c"])
    assert list(options.evals) == ["c_fog_1", "c_fog_2", "c_snow_1", "c_snow_2", "imagenet_c"]
    found = {name: evals(name) for name in options.evals}["imagenet_c"]
    errors = {c: [error_of(folder / c / s, model) for s in "12"] for c in ("fog", "snow")}
    assert len({*errors["fog"], *errors["snow"]}) > 1
    ce = [sum(of) / (2 * ALEXNET_ERRORS[name]) for name, of in errors.items()]
    assert found["mce"] == pytest.approx(np.mean(ce))
    assert found["mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert found["error/fog"] == pytest.approx(np.mean(errors["fog"]))
    assert found["examples"] == 32 and evals.verdicts is None
    # What had been judged is not judged again; logits that one evaluation wants are not kept.
    assert len(collected) == 4
    assert not any(cache._memory for cache in evals._caches.values())
    # With other weights it judges by itself, and is given up with what it judges.
    model.head.bias.assign([-9.0, 9.0])
    assert evals("imagenet_c", stop=lambda: True) is None
    assert evals("imagenet_c")["mean_error"] == 0.5


def test_imagenet_c_of_tfds(tmp_path):
    entries = imagenet_c(OPS, data_dir=str(tmp_path))
    assert len(entries) == 76
    known = tfds.builder_cls("imagenet2012_corrupted").BUILDER_CONFIGS
    names = {f"imagenet2012_corrupted/{c.name}" for c in known}
    assert all(e["data"]["name"] in names for e in entries.values() if "data" in e)
    builder = made_up("imagenet2012_corrupted/fog_2", tmp_path)
    evals, _ = evals_of(config({"c_fog_2": entries["c_fog_2"]}))
    assert builder.info.splits["validation"].num_examples == evals("c_fog_2")["examples"] == 10


AVERAGE = {"kind": "corruption_error", "options": {"of": {"fog": ("near",)}}}
NEAR = {"kind": "knn"}


@pytest.mark.parametrize(
    "evals, words",
    [
        ({"all": AVERAGE}, "evals.all.options.of names 'near', which is none of config.evals"),
        ({"all": AVERAGE, "near": NEAR}, "names 'near', which finds no accuracy but k10_accuracy"),
        (
            {"all": {**AVERAGE, "split": "val"}, "near": {"kind": "classification"}},
            "evals.all.split has no effect",
        ),
        (
            {"all": {**AVERAGE, "options": {"of": {"fog": ("all",)}}}},
            "names 'all', which finds no accuracy but averages others itself",
        ),
        ({"near": {**NEAR, "classes": "present"}}, "leaves out logits, and the kind 'knn' judges"),
        ({"sure": {"kind": "classification", "classes": "some"}}, "must be 'all' or 'present'"),
    ],
)
def test_mistakes(evals, words):
    with pytest.raises(ConfigError, match=words):
        check(tiny.make(evals=evals))


def test_unknown_names():
    with pytest.raises(ConfigError, match="no 'imagenet_s'; did you mean 'imagenet_"):
        imagenet_sets("imagenet_s")
    with pytest.raises(ConfigError, match="ImageNet-C has no 'frogs'"):
        imagenet_c(OPS, corruptions=("frogs",))
