"""What people see: the contact sheet, the first batch in TensorBoard, and converting by command."""

import importlib
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import processes, tiny
from vit_dist.config.errors import DataError
from vit_dist.data.ops import basic as ops
from vit_dist.data.resized import convert_resized
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.preparation import make_preparation
from vit_dist.data.view import stages, viewable
from vit_dist.inspection.lettering import LINE_HEIGHT
from vit_dist.inspection.sheet import GAP, draw_grid
from vit_dist.run import cli
from vit_dist.run.check import check
from vit_dist.run.input import first_images
from vit_dist.show import contact_sheet, make_rows
from vit_dist.train import train

MIXING = {"mixing__mixup_alpha": 0.8, "mixing__mode": "elem"}


def test_stages_are_what_the_pipe_does():
    source = open_source("demo", split="val")
    pipe = ops.parse("random_shift(2)|resize(16)|flip_lr|normalize|onehot(10)|keep('image')")
    for i in range(4):
        place = {"index": i, "epoch": 0, "seed": tf.constant([3, i])}
        example = {**source.read(tf.constant(i, tf.int64)), **place}
        shown = stages(pipe, example)
        assert [s.shape[0] for s in shown] == [8, 8, 16, 16, 16]
        np.testing.assert_array_equal(shown[0], source.images[i])
        np.testing.assert_array_equal(shown[3], pipe.host(example)["image"])
        np.testing.assert_array_equal(shown[4], shown[3])  # scaled, and back


@pytest.mark.parametrize("op", ["value_range(0, 1)", "value_range(-1, 1)", "normalize"])
def test_viewable_undoes_the_scaling(op):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    pipe = ops.parse(f"decode|{op}")
    np.testing.assert_array_equal(viewable(pipe, pipe.device(tf.constant(pixels))), pixels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sheet_has_a_row_an_example_and_a_column_an_op(split):
    options, data = check(tiny.make(input__eval_ops=tiny.OPS, **MIXING))
    sheet = contact_sheet(options, data, split=split, step=7, count=3)
    pixels = np.asarray(sheet)
    rows = (sheet.height - LINE_HEIGHT - GAP) // (64 + LINE_HEIGHT + GAP)
    assert rows == 3
    top = 2 * LINE_HEIGHT + GAP
    first = pixels[top : top + 64]
    white = (first == 255).all(axis=(0, 2))
    columns = np.flatnonzero(~white[1:] & white[:-1]).size + (not white[0])
    assert columns == (4 if split == "train" else 2)  # stored, random_shift, value_range, mixing
    source = data.sources[split]
    index = 0 if split == "val" else None
    if index == 0:
        stored = np.repeat(np.repeat(source.images[0], 8, 0), 8, 1)
        np.testing.assert_array_equal(first[:, GAP : GAP + 64], stored)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"split": "x"}, "'x' is not configured"), ({"count": 0}, "--count"), ({"step": -1}, "-1")],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        contact_sheet(*check(tiny.make()), **options)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_first_images_of_a_run_are_those_of_the_sheet(mixed):
    parts = check(tiny.make(**(MIXING if mixed else {})))
    cells = first_images(*parts, tf.distribute.get_strategy(), first_step=3)
    _, rows = make_rows(*parts, step=3, count=16)
    assert len(cells) == len(rows) == 16
    for cell, row in zip(cells, rows, strict=True):
        np.testing.assert_array_equal(cell.image, row[-1].image)
        assert cell.caption == row[0].caption
    assert any(" + " in cell.caption for cell in cells) == mixed


def test_labels_of_the_pipe_are_shown():
    """Whether it leaves class numbers or makes rows of them."""
    ops = tiny.OPS.replace("keep", "onehot(10)|keep")
    texts = []
    for train_ops in (tiny.OPS, ops):
        parts = check(tiny.make(input__train_ops=train_ops))
        cells = first_images(*parts, tf.distribute.get_strategy(), first_step=0)
        texts.append([cell.caption for cell in cells])
    assert texts[0] == texts[1] and set(texts[0]) <= set("0123456789")


def test_a_damaged_image_is_named_so(tmp_path):
    folder = tiny.make_folder(tmp_path)
    for path in (folder / "train" / "cats").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    masked = {"input__on_bad_example": "mask", "input__max_bad_share": 1.0}
    parts = check(tiny.of_folder(folder, **masked))
    cells = first_images(*parts, tf.distribute.get_strategy(), first_step=0)
    assert sorted(cell.caption for cell in cells) == ["dogs"] * 8 + ["unreadable"] * 8


@pytest.mark.parametrize("mixed", [False, True])
def test_a_damaged_image_leaves_the_others_of_a_sheet(tmp_path, mixed, caplog):
    folder = tiny.make_folder(tmp_path)
    bad = folder / "train" / "cats" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:100])  # its header is whole
    parts = check(tiny.of_folder(folder, **(MIXING if mixed else {})))
    titles, rows = make_rows(*parts, count=16)
    captions = [row[0].caption for row in rows]
    assert captions.count("unreadable") == 1 and len(rows) == 16
    black = rows[captions.index("unreadable")]
    assert len(black) == len(titles) and not black[0].image.any()
    assert f"{str(bad)!r} (example 3 of folder:train) cannot be read: " in caplog.text
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(bad.read_bytes())
    with pytest.raises(DataError, match="none of these 16 examples"):
        make_rows(*parts, count=16)


def test_the_first_batch_is_one_sheet_in_tensorboard(tmp_path):
    config = tiny.without_evaluation(total_steps=2, monitor__batch_images=12)
    train(config, str(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run"), {"tensors": 0}).Reload()
    width, height, png = events.Tensors("train/batch")[0].tensor_proto.string_val
    sheet = tf.io.decode_png(png).numpy()
    assert sheet.shape == (int(height), int(width), 3)
    parts = check(config)
    cells = first_images(*parts, tf.distribute.get_strategy(), first_step=0, count=12)
    assert len(cells) == 12
    np.testing.assert_array_equal(sheet, np.asarray(draw_grid(cells)))
    # Images that nobody may see stay away.
    train(tiny.without_evaluation(total_steps=2, monitor__batch_images=0), str(tmp_path / "none"))
    assert "train/batch" not in EventAccumulator(str(tmp_path / "none")).Reload().Tags()["tensors"]


def command(name, *arguments):
    """Runs `python -m vit_dist.name ARGUMENTS` in a fork; it ends with the command's exit code."""
    sys.argv = [name, *arguments]
    module = importlib.import_module(f"vit_dist.{name}")
    module.define_flags()
    cli.run(module.main)


def test_the_commands(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    ops = f"decode|{tiny.ANY_SIZE}"
    flags = [f"--config={processes.TINY}", "--config.data.source=folder"]
    flags += [f"--config.data.data_dir={folder}"]
    flags += [f"--config.input.train_ops={ops}", f"--config.input.eval_ops={ops}"]
    out, sheet = tmp_path / "shards", tmp_path / "sheet.png"
    code, text = call("convert", *flags, f"--output={out}", log=tmp_path / "a")
    assert code == 0 and "train: 16 examples, 1 shards written, all verified" in text
    assert open_source("array_record", split="val", data_dir=str(out)).num_examples == 16
    code, text = call("show", *flags, f"--output={sheet}", log=tmp_path / "b")
    assert code == 0 and f"{sheet}: " in text
    with Image.open(sheet) as opened:
        assert opened.height > 8 * 64
    assert "warning" not in text
    (folder / "train" / "cats").rename(folder / "train" / "c\x07ts")
    (folder / "val" / "cats").rename(folder / "val" / "c\x07ts")
    code, text = call("show", *flags, f"--output={sheet}", log=tmp_path / "c")
    assert code == 0 and "no font of this machine has 1 of the characters" in text
    assert "such as U+0007 stand for them" in text
    for name in ("convert", "show"):
        code, text = call(name, *flags, log=tmp_path / name)
        assert code == 2 and "error: give" in text and "--output" in text


def test_a_set_resized_beforehand_by_command(tmp_path):
    folder = tiny.make_folder(tmp_path / "images")
    ops = f"decode|{tiny.ANY_SIZE}"
    flags = [f"--config={processes.TINY}"]
    flags += [f"--config.input.train_ops={ops}", f"--config.input.eval_ops={ops}"]
    given = ["--config.data.source=folder", f"--config.data.data_dir={folder}"]
    out = tmp_path / "raw"
    options = [f"--output={out}", "--short_side=10", "--format=raw"]
    code, text = call("convert", *flags, *given, *options, log=tmp_path / "a")
    how = "short side 10 (area), upright, over white, raw pixels"
    assert code == 0 and f"train: {how}: of 16 images 16 reduced, 0 turned upright" in text
    assert f"train with --config.data.source=raw --config.data.data_dir={out}" in text
    read = ["--config.data.source=raw", f"--config.data.data_dir={out}"]
    code, text = call("show", *flags, *read, f"--output={tmp_path}/a.png", log=tmp_path / "b")
    assert code == 0 and f"train was resized beforehand: {how}" in text
    code, text = call("convert", *flags, *given, *options, "--quality=9", log=tmp_path / "c")
    assert code == 2 and "error: --quality is that of JPEGs, and --format=raw" in text


@pytest.mark.exhaustive
def test_training_says_how_its_data_was_resized(tmp_path):
    source = open_source("folder", split="train", data_dir=str(tiny.make_folder(tmp_path / "in")))
    for split in ("train", "val"):
        how = make_preparation(6, format="raw")
        convert_resized(source, tmp_path / "raw", how, split=split, examples_per_shard=9)
    workdir = tmp_path / "run"
    train(tiny.of_folder(tmp_path / "raw", data__source="raw"), str(workdir))
    log = "".join(path.read_text() for path in workdir.glob("*log*"))
    assert "train was resized beforehand: short side 6 (area)" in log
    assert "resized beforehand to a short side of 6, and will be enlarged to 8x8" in log


def call(*args, log):
    return processes.call(command, *args, log=log)


def test_a_cache_changes_nothing(tmp_path):
    """Also where it holds photographs upright that lie on their side in their files."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png", exif=exif)
    ops = f"decode(exif=True)|{tiny.ANY_SIZE}"
    data = {"data__source": "folder", "data__data_dir": str(tmp_path), "input__train_ops": ops}
    splits = {"data__val_split": "", "data__test_split": "", "input__eval_ops": ops}
    sheets = []
    for cache in ("off", "raw", "decoded"):
        _, rows = make_rows(*check(tiny.make(input__cache=cache, **data, **splits)), count=2)
        sheets.append([cell.image for row in rows for cell in row])
        assert sheets[-1][0].shape == (8, 12, 3) and sheets[-1][1].shape == (12, 8, 3)
    for sheet in sheets[1:]:
        for one, other in zip(sheet, sheets[0], strict=True):
            np.testing.assert_array_equal(one, other)
