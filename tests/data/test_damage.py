"""Every kind of damage, and exactly what comes of it under each policy."""

import collections
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.support import images, processes, tiny
from tests.support.images import PIPE
from vit_dist.config.errors import DataError, StorageError
from vit_dist.data import pipeline
from vit_dist.data.damage import Damage, check_share, explain_data_error
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.open import open_source
from vit_dist.evaluate import evaluate
from vit_dist.storage.errors import explain
from vit_dist.train import train

PIPES = {
    "decode": PIPE,
    "crop": PIPE.replace("decode|resize(8)", "decode_jpeg_and_inception_crop(8)"),
}
# What is done to one file of a folder -> the reason that is counted.
FILES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "undecodable"),
    "garbage": (lambda path: path.write_bytes(b"GIF89a" + bytes(range(250))), "undecodable"),
    "text": (lambda path: path.write_text("<html>404</html>"), "undecodable"),
    "empty": (lambda path: path.write_bytes(b""), "undecodable"),
    "missing": (lambda path: path.unlink(), "missing"),
}


def exhaustive(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def open_folder(root, **options):
    return open_source("folder", split="train", data_dir=str(root), **options)


def batches(source, count=3, *, pipe=PIPE, damage=None, **options):
    known = {"batch_size": 8, "seed": 1, "num_threads": 2, **options}
    ds = pipeline.make_train_data(source, ops.parse(pipe), damage=damage, **known)
    return list(ds.take(count).as_numpy_iterator())


@pytest.fixture
def folder(tmp_path):
    """24 images, and their paths in the source's order."""
    return tmp_path, images.write_folder(tmp_path)


@pytest.mark.parametrize("pipe", PIPES)
def test_bad_files_are_masked_in_their_places(folder, pipe, caplog):
    root, paths = folder
    want = batches(open_folder(root), pipe=PIPES[pipe])
    source = open_folder(root, check_files=False)
    numbers = dict(zip(FILES, (13, 3, 20, 8, 17), strict=True))  # some in one chunk, some alone
    for kind, (change, _) in FILES.items():
        change(paths[numbers[kind]])
    damage = Damage(source)
    have = batches(source, pipe=PIPES[pipe], damage=damage)
    for a, b in zip(have, want, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_array_equal(a["epoch"], b["epoch"])
        np.testing.assert_array_equal(a["mask"], ~np.isin(a["index"], list(numbers.values())))
        good = a["mask"] == 1
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key][good], b[key][good])
            assert (a[key][~good] == 0).all()
    # Batches are made ahead, and what is masked in those does not count yet.
    reasons = collections.Counter(reason for _, reason in FILES.values())
    assert damage.counts(before=24) == reasons and set(damage.counts()) == set(reasons)
    assert sum((b["mask"] == 0).sum() for b in have) == len(FILES)
    said = {"missing": "No such file", "truncated": "Invalid"}
    for kind, number in numbers.items():
        named = f"image file {str(paths[number])!r} (example {number} of"
        (line,) = {x for x in caplog.messages if x.startswith("masked: ") and named in x}
        assert said.get(kind, "mage") in line and f" is {FILES[kind][1]} " in line


# How each is masked is proved above.
FAILING = [k if k in ("garbage", "missing") else exhaustive(k) for k in FILES]


@pytest.mark.parametrize("kind", FAILING)
def test_a_bad_file_fails_with_its_name(folder, kind):
    root, paths = folder
    source = open_folder(root, check_files=False)
    FILES[kind][0](paths[13])
    with pytest.raises(tf.errors.OpError) as error:
        batches(source)
    text = explain_data_error(source, error.value, pipe=ops.parse(PIPE), indices=[13])
    assert str(paths[13]) in text and "example 13 of" in text and "replace it" in text


@pytest.mark.parametrize("replicas,hosts,threads", [exhaustive(2, 1, 1), (2, 2, 4)])
def test_masking_does_not_depend_on_the_machine(folder, replicas, hosts, threads):
    root, paths = folder
    source = open_folder(root, check_files=False)
    paths[3].unlink()
    paths[20].write_bytes(b"")
    parts = []
    for host in range(hosts):
        local = range(host * replicas // hosts, (host + 1) * replicas // hosts)
        parts.append(
            batches(source, 3 * len(local), damage=Damage(source), num_replicas=replicas,
                    local_replicas=local, num_threads=threads)
        )  # fmt: skip
    steps = [[p[i * len(p) // 3 + j] for p in parts for j in range(len(p) // 3)] for i in range(3)]
    index = [np.concatenate([x["index"] for x in step]) for step in steps]
    mask = [np.concatenate([x["mask"] for x in step]) for step in steps]
    known = {"batch_size": 8, "seed": 1, "first_step": 0, "num_steps": 3}
    np.testing.assert_array_equal(np.concatenate(index), pipeline.train_indices(source, **known))
    np.testing.assert_array_equal(mask, ~np.isin(index, (3, 20)))


def test_evaluation_leaves_out_what_is_masked(folder):
    root, paths = folder
    paths[5].write_bytes(b"")
    source = open_folder(root, check_files=False)
    ds = pipeline.make_eval_data(source, ops.parse(PIPE), batch_size=9, damage=Damage(source))
    got = list(ds.as_numpy_iterator())
    seen = np.concatenate([b["index"][b["mask"] == 1] for b in got])
    assert seen.tolist() == [i for i in range(24) if i != 5]


def _mask_with_one_thread(root):
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    source = open_folder(root)
    for threads in (1, None):
        assert len(batches(source, damage=Damage(source), num_threads=threads)) == 3


def test_one_thread_is_enough(tmp_path):
    """No deadlock where TensorFlow has one thread for everything."""
    images.write_folder(tmp_path)
    code, text = processes.call(_mask_with_one_thread, tmp_path, log=tmp_path / "log")
    assert code == 0, text[-2000:]


def test_other_errors_are_not_masked(folder, monkeypatch):
    """A disk that fails is no bad example."""
    source = open_folder(folder[0])

    def unavailable(label):
        raise OSError("the disk is gone")

    def fail(record):
        image = tf.numpy_function(unavailable, [record["label"]], tf.string)
        return {**record, "image": tf.ensure_shape(image, ())}

    monkeypatch.setattr(source, "decode_record", fail)
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        batches(source, damage=Damage(source))


# TFRecord files

# How a file of 7 records is cut: (bytes that are left, given where each record ends).
CUTS = {
    "in a header": lambda ends: ends[3] + 5,
    "in the data": lambda ends: ends[4] - 30,
    "before the last checksum": lambda ends: ends[-1] - 4,
    "between two records": lambda ends: ends[3],
    "to nothing": lambda ends: 0,
}


@pytest.fixture
def tfrecords(tmp_path):
    paths = images.write_tfrecords(tmp_path)
    return {"files": f"{tmp_path}/{{split}}-*.tfrecord", "num_classes": 4}, paths[1]


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_file_is_found_at_opening(tfrecords, cut):
    """A cut at the end of a record shows only against the index, all others always."""
    options, path = tfrecords
    ends = images.record_ends(path)
    open_source("tfrecord", split="train", **options)
    os.truncate(path, CUTS[cut](ends))
    with pytest.raises(ValueError, match=rf"{path} has {CUTS[cut](ends)} bytes.*been cut"):
        open_source("tfrecord", split="train", **options)
    (index,) = path.parent.glob("*.npz")
    index.unlink()
    if cut in ("between two records", "to nothing"):
        assert open_source("tfrecord", split="train", **options).num_examples < 20
    else:
        with pytest.raises(ValueError, match=rf"{path} ends within its record"):
            open_source("tfrecord", split="train", **options)


# Each cut once, and both ways of reading where what is left looks whole.
CUT_WHILE_USED = [
    ("before the last checksum", False),
    ("to nothing", False),
    ("between two records", False),
    ("between two records", True),
    ("in the data", True),
]


@pytest.mark.parametrize(
    ("cut", "stream"),
    [
        case if case in CUT_WHILE_USED else exhaustive(*case)
        for case in itertools.product(CUTS, (False, True))
    ],
)
def test_a_file_cut_while_it_is_used(tfrecords, cut, stream):
    options, path = tfrecords
    source = open_source("tfrecord", split="train", stream=stream, **options)
    os.truncate(path, CUTS[cut](images.record_ends(path)))
    with pytest.raises(tf.errors.OpError) as error:
        batches(source, 5)
    text = explain_data_error(source, error.value, indices=range(20))
    assert str(path) in text
    if stream:  # the stream itself has ended: its policy is always to fail
        with pytest.raises(tf.errors.OpError):
            batches(source, 5, damage=Damage(source))
        return
    lost = {"between two records": 3, "in a header": 3, "in the data": 3, "to nothing": 7}
    damage = Damage(source)
    have = batches(source, 5, damage=damage)  # two epochs
    bad = {int(i) for b in have for i in b["index"][b["mask"] == 0]}
    assert bad == set(range(12 - lost.get(cut, 1), 12)) and set(damage.counts()) == {"corrupt"}


def test_a_missing_file_of_records(tfrecords):
    options, path = tfrecords
    source = open_source("tfrecord", split="train", **options)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} has no bytes, and had \d+ when it was indexed"):
        open_source("tfrecord", split="train", **options)
    damage = Damage(source)
    have = batches(source, 5, damage=damage)
    bad = {int(i) for b in have for i in b["index"][b["mask"] == 0]}
    assert bad == set(range(5, 12)) and set(damage.counts()) == {"missing"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_image_in_a_record(tmp_path, stream):
    with tf.io.TFRecordWriter(str(tmp_path / "train-0.tfrecord")) as writer:
        for i in range(10):
            image = b"" if i == 4 else images.jpeg(i)
            writer.write(images.make_example(image, 0, images.KEYS))
    options = {"files": f"{tmp_path}/train-*", "num_classes": 1, "stream": stream}
    source = open_source("tfrecord", split="train", **options)
    damage = Damage(source)
    have = batches(source, 5, damage=damage)
    assert [i for b in have for i in b["index"][b["mask"] == 0]] == [4] * 4
    assert damage.counts(before=40) == {"undecodable": 4}
    with pytest.raises(tf.errors.OpError) as error:
        batches(source, 5)
    text = explain_data_error(source, error.value)
    assert "(example 4 of tfrecord:" in text and "replace it or remove it" in text


# a whole run


def test_a_masked_example_counts_as_nothing(tmp_path):
    """The gradient is the sum over the others, divided by the full batch size: law 2.

    A small set may have a bad image: the default share is less than one of 16.
    """
    folder = tiny.make_folder(tmp_path / "images")
    for split in ("train", "val"):
        (folder / split / "dogs" / "5.jpg").write_bytes(b"")
    known = {"input__on_bad_example": "mask", "optimizer__name": "sgd", "model__dropout": 0.0}
    config = tiny.of_folder(folder, log_steps=1, **known)
    metrics = train(config, str(tmp_path / "masked"))
    # Though batches are made ahead, and shown first.
    assert metrics["masked"] == metrics["masked_undecodable"] == 2
    assert metrics["val_examples"] == 15
    row, _ = (row for row in tiny.rows(tmp_path / "masked") if "train/loss" in row)
    assert row["train/masked"] == 1 and row["train/masked_undecodable"] == 1
    # A head of zeros: each example's loss is log 2.
    assert row["train/loss"] == pytest.approx(np.log(2) * 15 / 16, rel=1e-6)
    # An evaluation without most of its examples is an error.
    for path in (folder / "val" / "dogs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="8 damaged examples were masked, more than"):
        evaluate(config, str(tmp_path / "masked"))
    devices = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
    accumulated = tiny.of_folder(
        folder, data__val_split="", step__accumulation=2, **devices, **known
    )
    assert train(accumulated, str(tmp_path / "parts"))["masked"] == 2
    tiny.assert_same(tiny.arrays(tmp_path / "parts"), tiny.arrays(tmp_path / "masked"), atol=1e-6)


def test_storage_that_fails_in_an_evaluation_is_no_damage(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    for i in range(8, 16):  # beyond what a source looks at when it is opened
        shutil.copy(folder / "val" / "dogs" / "0.jpg", folder / "val" / "dogs" / f"{i}.jpg")
    known = {"data__options": {"check_files": False}, "total_steps": 1}
    train(tiny.of_folder(folder, data__val_split="", **known), str(tmp_path / "run"))
    source = open_source("folder", split="val", data_dir=str(folder), check_files=False)
    unseen = min(set(range(24)) - set(source.looked_at()))
    image = Path(str(source.paths[unseen]))
    image.unlink()
    image.symlink_to("/proc/self/mem")  # reading it gives the kernel's own EIO
    config = tiny.of_folder(folder, **known)
    with pytest.raises(tf.errors.UnknownError) as error:
        evaluate(config, str(tmp_path / "run"))
    told = explain(error.value)
    assert isinstance(told, StorageError) and f"{image}: Input/output error" in str(told)
    with pytest.raises(StorageError, match=r"Input/output error.*run again to resume"):
        train(config, str(tmp_path / "other"))
    # Nor is it while what is damaged is looked for.
    invalid = tf.errors.InvalidArgumentError(None, None, "no image")
    assert explain_data_error(source, invalid) is None


def test_too_many_bad_examples_end_the_run(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    for i in range(3):
        (folder / "train" / "cats" / f"{i}.jpg").write_bytes(b"")
    masking = {"input__on_bad_example": "mask", "input__max_bad_share": 0.15}
    config = tiny.of_folder(folder, total_steps=4, data__val_split="", log_steps=1, **masking)
    with pytest.raises(ValueError, match=r"damaged examples were masked.*max_bad_share"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("masked", "seen", "limit", "repeats", "fails"),
    [
        (2, 10, 0.01, 1, False),
        (3, 10, 0.01, 1, True),
        (3, 1000, 0.01, 1, False),
        (11, 1000, 0.01, 1, True),
        # A small set: two bad images are allowed, in each epoch begun. They may come early in it.
        (2, 10, 0.001, 1, False),
        (3, 10, 0.001, 1, True),
        (4, 210, 0.001, 1, False),
        (5, 210, 0.001, 1, True),
        (1, 10, 0.0, 1, True),
        # Copies of one image are one.
        (6, 10, 0.001, 3, False),
        (7, 10, 0.001, 3, True),
        (6, 590, 0.001, 3, False),
        (7, 590, 0.001, 3, True),
    ],
)
def test_the_limit_is_of_an_epoch_or_more(masked, seen, limit, repeats, fails):
    known = {"seen": seen, "num_examples": 200, "limit": limit, "repeats": repeats}
    if fails:
        with pytest.raises(ValueError, match=f"{masked} damaged"):
            check_share(masked, **known)
    else:
        check_share(masked, **known)


@pytest.mark.parametrize(
    ("first", "seen", "repeats", "epochs"),
    [(150, 200, 1, 2), (150, 50, 1, 1), (200, 200, 1, 1), (350, 251, 1, 3), (450, 600, 3, 2)],
)
def test_the_limit_of_a_run_that_was_resumed(first, seen, repeats, epochs):
    known = {"seen": seen, "first": first, "num_examples": 200, "limit": 0.05, "repeats": repeats}
    check_share(10 * repeats * epochs, **known)
    with pytest.raises(DataError, match="damaged"):
        check_share(10 * repeats * epochs + 1, **known)


def test_a_resume_within_an_epoch_allows_what_the_run_does(tmp_path):
    """Two bad images, in the last of four batches of epoch 0 and early in epoch 1."""
    folder = tiny.make_folder(tmp_path / "images")
    masking = {"input__on_bad_example": "mask", "input__batch_size": 4, "log_steps": 7}
    known = {"data__val_split": "", **masking}
    config = tiny.of_folder(folder, total_steps=7, **known)
    source = open_folder(folder)
    order = pipeline.train_indices(
        source, batch_size=4, seed=config.seed, first_step=0, num_steps=7
    ).tolist()
    for index in [i for i in order[12:16] if i in order[16:28]][:2]:
        with open(source.paths[index], "wb"):
            pass
    train(tiny.of_folder(folder, total_steps=3, **known), str(tmp_path / "run"))
    assert train(config, str(tmp_path / "run"))["masked"] == 4


def test_too_many_labels_that_count_from_another_number(tmp_path):
    images.write_tfrecords(tmp_path, labels=[1, 2, 3] * 6 + [1, 2])
    options = {"files": f"{tmp_path}/train-*.tfrecord", "num_classes": 3, "check_files": False}
    source = open_source("tfrecord", split="train", **options)
    damage = Damage(source, max_share=0.01)
    batches(source, 1, damage=damage, batch_size=20)
    with pytest.raises(DataError, match=r"6 damaged.*Set config.data.first_label=1$"):
        damage.check_share(6, seen=20)


def test_all_damaged_examples_are_named_at_once(folder):
    root, paths = folder
    source = open_folder(root)
    for i in (2, 9, 21):
        paths[i].write_bytes(paths[i].read_bytes()[:200])
    with pytest.raises(tf.errors.OpError) as error:
        batches(source)
    text = explain_data_error(source, error.value, pipe=ops.parse(PIPE), indices=[9])
    first, *lines = text.splitlines()
    assert first.startswith("3 examples are damaged; replace it or remove it, each of these:")
    for path, line in zip((paths[9], paths[2], paths[21]), lines, strict=True):
        assert str(path) in line and "cannot be read: Invalid JPEG" in line


def test_reasons_are_counted_once(folder):
    """Whoever reads the same positions again: a preview, the next evaluation."""
    root, paths = folder
    paths[5].write_bytes(b"")
    source = open_folder(root, check_files=False)
    damage = Damage(source)
    ds = pipeline.make_eval_data(source, ops.parse(PIPE), batch_size=9, damage=damage)
    for _ in range(3):
        assert sum((b["mask"] == 0).sum() for b in ds.as_numpy_iterator()) == 4  # three of padding
        assert damage.counts() == {"undecodable": 1}
    damage = Damage(source)
    batches(source, 1, damage=damage, only=24, batch_size=24)
    batches(source, 1, damage=damage, batch_size=24)
    assert damage.counts(before=24) == {"undecodable": 1}


def test_a_resume_notices_other_images(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    train(tiny.of_folder(folder, data__val_split=""), str(tmp_path / "run"))
    again = tiny.of_folder(folder, data__val_split="", total_steps=3)
    one = folder / "train" / "cats" / "3.jpg"
    content = one.read_bytes()
    changes = {
        "gained": lambda: one.with_name("30.jpg").write_bytes(content),
        "renamed": lambda: one.with_name("30.jpg").rename(one.with_name("x.jpg")),
        "lost": lambda: (one.unlink(), one.with_name("x.jpg").unlink()),
    }
    words = {"gained": "num_examples: 16 -> 17", "renamed": "names: ", "lost": "16 -> 15"}
    for name, change in changes.items():
        change()
        with pytest.raises(ValueError, match="has changed since step 2 was saved") as error:
            train(again, str(tmp_path / "run"))
        assert words[name] in str(error.value)
    again = tiny.of_folder(
        folder, data__val_split="", total_steps=3, resume_from=str(tmp_path / "run")
    )
    assert train(again, str(tmp_path / "other"))["step"] == 3
