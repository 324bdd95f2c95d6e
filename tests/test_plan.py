"""A plan: what a training takes of a machine, and what makes it fit."""

import json
import re
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.processes import TINY, Command, run
from vit_dist.config import finalize, get_defaults
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.costs.memory import count_state, step_memory
from vit_dist.costs.targets import parse_target
from vit_dist.model.variants import vit_config
from vit_dist.plan import as_json, plan
from vit_dist.run.planning import USABLE
from vit_dist.train import train
from vit_dist.training.checkpoint import open_checkpoint
from vit_dist.training.optimizer import OptimizerOptions

WIDE = {"model__width": 8192, "model__mlp_dim": 32768, "model__depth": 2, "model__num_heads": 64}
SIZE = {"num_examples": 1_281_167, "num_classes": 1000}


def config(variant="B/16", batch_size=4096, **changed):
    found = get_defaults()
    found.total_epochs = 90
    found.model.variant, found.input.batch_size = variant, batch_size
    found.precision = "bfloat16"
    found.data.source = "tfds"
    for key, value in changed.items():
        section, _, name = key.rpartition("__")
        (found[section] if section else found)[name] = value
    return finalize(found)


def figures(found):
    return {(row.section, row.name): row for row in found.rows}


def test_what_fits_is_said_to_fit():
    found = plan(config("S/16", batch_size=1024), "v5e-16", **SIZE, price=2.0)
    assert found.fits and found.need < found.available and not found.changes
    rows = figures(found)
    # timm's vit_small_patch16_224, without cls token and its position.
    assert rows["model", "parameters"].value == 22_050_664 - 384 - 384
    assert rows["batch", "images of a device"].value == 64
    steps = rows["time", "steps"].value
    assert steps == round(90 * 1_281_167 / 1024)
    # Money is hours times the price, and hours are steps times a step.
    hours = rows["time", "run, expected"].value
    assert rows["time", "cost, expected"].value == pytest.approx(2 * hours)
    milliseconds = rows["time", "step, expected"].value
    assert hours == pytest.approx(steps * milliseconds / 3.6e6)
    assert all(row.how in ("exact", "estimated", "given") for row in found.rows)
    json.loads(json.dumps(as_json(found), allow_nan=False))


def test_what_does_not_fit_is_refused_with_flags_that_make_it():
    base = {"model__depth": 6, "batch_size": 4096}
    found = plan(config(**base), "v5e-1", **SIZE)
    assert not found.fits and found.need > found.available
    flags = [change.flags for change in found.changes]
    assert any("step.accumulation" in text for text in flags) and len(flags) > 1
    for change in found.changes:
        assert change.need <= found.available
        changed = {}
        for word in change.flags.split():
            key, _, value = word.removeprefix("--config.").partition("=")
            value = int(value) if value.isdigit() else value
            changed[key.replace(".", "__")] = value == "True" if value == "True" else value
        again = plan(config(**base, **changed), "v5e-1", **SIZE)
        assert again.fits and again.need == change.need


def test_sharded_state_is_not_suggested_for_tpus_but_for_cards():
    # The state alone is too much: 6.5 GB of weights, 13 GB of moments, as much again of gradients.
    def ways(target):
        found = plan(config(batch_size=64, **WIDE), target, **SIZE)
        assert not found.fits
        return " ".join(change.flags for change in found.changes)

    assert "shard_state" in ways("8xRTX4090")
    assert "shard_state" not in ways("v5e-8")


def test_nothing_helps():
    found = plan(config(batch_size=8, **WIDE), "v5e-1", **SIZE)
    assert not found.fits and found.changes == []


def test_a_checkpoint_is_as_large_as_it_says(tmp_path):
    small = tiny.make(optimizer__momentum_dtype="bfloat16", step__ema_decay=0.9, total_steps=1)
    found = figures(plan(small, "cpu"))
    train(small, str(tmp_path))
    arrays = open_checkpoint(str(tmp_path)).arrays
    size = sum(arrays[name].nbytes for name in arrays if "/" in name)
    assert found["storage", "checkpoint"].value * 1e9 == pytest.approx(size)


def test_the_input_is_measured_and_scaled():
    small = tiny.make()
    found = figures(plan(small, "cpu", input_seconds=0.1, host_cores=1))
    here = found["input", "images per second here"]
    assert here.how == "measured" and here.value > 0
    needed = found["input", "images per second that a host needs"].value
    cores = found["input", "cores that a host needs"]
    of_core = found["input", "images per second of a core here"].value
    assert cores.value == pytest.approx(needed / of_core)
    assert ("--config.input.cache" in cores.note) == (cores.value > 1)


def test_the_input_is_divided_by_the_cores_that_it_had(monkeypatch):
    def cores(**changed):
        rows = figures(plan(tiny.make(**changed), "cpu", input_seconds=0.1))
        here = rows["input", "images per second here"]
        found = here.value / rows["input", "images per second of a core here"].value
        assert here.note == f"{found:.0f} cores of this machine"
        return found

    # Of a machine with more.
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 5})
    assert cores(input__num_threads=None) == pytest.approx(3)
    assert cores(input__num_threads=2) == pytest.approx(2)
    assert cores(input__num_threads=16) == pytest.approx(3)


def test_sharded_state_takes_time():
    found = {
        sharded: figures(
            plan(config("S/16", optimizer__shard_state=sharded), "2x8xH100", network=400.0, **SIZE)
        )
        for sharded in (False, True)
    }
    name = ("time", "all-gather by itself")
    gather = found[True][name].value
    assert name not in found[False]
    # Of the gradients an all-reduce sends all but a 16th part twice, an all-gather once.
    assert gather == pytest.approx(found[True]["time", "all-reduce by itself"].value / 2)
    steps = [found[sharded]["time", "step, expected"].value for sharded in (False, True)]
    assert steps[1] - steps[0] == pytest.approx(gather)


def test_a_host_keeps_batches_and_a_cache():
    base = {"batch_size": 1024, "input__cache": "decoded", "input__prefetch": 3}
    hosts = {"target": "4x4xA100", "network": 400.0}
    rows = figures(plan(config("S/16", **base), **hosts, **SIZE))
    # Four hosts; three batches ready, and two on their way.
    ready = 5 * 1024 / 4 * 224 * 224 * 3
    assert rows["host", "batches that are kept ready"].value * 1e9 == pytest.approx(ready)
    # Made-up images have 375 x 500 pixels; a tenth more, as it is estimated from a sample.
    cache = rows["host", "cache"]
    assert cache.value * 1e9 == pytest.approx(1.1 * SIZE["num_examples"] * 375 * 500 * 3, rel=1e-3)
    assert "made-up" in cache.note
    parts = [row.value for (section, name), row in rows.items() if section == "host"]
    assert rows["host", "memory, all of these"].value > cache.value + ready / 1e9
    assert all(value >= 0 for value in parts)
    # The cache is read once; without it images are read all the time.
    assert ("host", "reads from storage") not in rows
    once = rows["host", "reads from storage, once"].value
    rows = figures(plan(config("S/16", batch_size=1024), **hosts, **SIZE))
    assert ("host", "cache") not in rows
    images = rows["time", "images per second, expected"].value / 4
    size = once * 1e9 / SIZE["num_examples"]
    assert rows["host", "reads from storage"].value * 1e6 == pytest.approx(images * size)


@pytest.mark.exhaustive
def test_a_cache_in_a_folder_is_no_memory(tmp_path):
    kept = {"input__cache": "raw", "input__cache_dir": str(tmp_path / "cache")}
    rows = figures(plan(config("S/16", **kept), "v5e-8", **SIZE))
    assert rows["host", "cache, on disk"].value > 1
    assert rows["host", "memory, all of these"].value < rows["host", "cache, on disk"].value
    # Planning makes nothing.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input__cache": "raw"}, "cannot read .* from config.input.cache: that calls Python"),
        ({"input__on_bad_example": "mask"}, "does not go with config.input.on_bad_example='mask'"),
        ({"input__service": "a:1"}, "does not go with config.input.service"),
        ({"optimizer__shard_state": True}, "shard_state"),
    ],
)
def test_what_a_slice_of_hosts_refuses_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        plan(config(batch_size=64, **changed), "v5e-16", **SIZE)


def test_a_slice_of_hosts_is_told_nothing_that_it_refuses():
    note = {}
    for target in ("v5e-8", "v5e-16"):
        found = plan(config(batch_size=64), target, input_seconds=0.1, host_cores=1, **SIZE)
        note[target] = figures(found)["input", "cores that a host needs"].note
    assert all(
        "MORE THAN ITS 1: " in text and "smaller first side" in text for text in note.values()
    )
    assert "input.cache" in note["v5e-8"] and "input.service" in note["v5e-8"]
    assert "config.input" not in note["v5e-16"]


def test_a_cache_of_what_is_in_memory_is_refused():
    with pytest.raises(ConfigError, match="of no use"):
        plan(tiny.make(input__cache="raw"), "cpu")


def test_several_hosts_of_cards():
    wanted = config("S/16", batch_size=1024)
    unknown = figures(plan(wanted, "2x8xH100", **SIZE))["time", "step"]
    assert unknown.value == "unknown" and "--network" in unknown.note
    found = figures(plan(wanted, "2x8xH100", network=400.0, **SIZE))
    # Each of 16 sends 2 * 15 / 16 of the gradients by 50 GB/s.
    milliseconds = 1e3 * 15 / 8 * 4 * found["model", "parameters"].value / 50e9
    row = found["time", "all-reduce by itself"]
    assert row.value == pytest.approx(milliseconds) and "2 hosts" in row.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "v7-8"}, "v5e-8"),
        ({"target": "8xH100", "price": -1.0}, "--price"),
        ({"target": "8xH100", "num_classes": 1}, "--num_classes must be 2 or more"),
        ({"target": "8xH100", "num_examples": None}, "--num_examples must be 1 or more"),
        ({"target": "8xH100", "host_cores": 0}, "--host_cores"),
        ({"target": "8xH100", "network": 400.0}, "--network"),
        ({"target": "8xH100", "input_seconds": -1.0}, "--input_seconds"),
        ({"target": "3xH100"}, "4096"),  # does not divide the batch
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(config(), **{**SIZE, **options})


def test_data_that_is_not_here_can_be_stood_in_for(tmp_path):
    absent = config(data__name="imagenet2012", data__data_dir=str(tmp_path))
    with pytest.raises(DataError, match="--num_examples=1281167 --num_classes=1000"):
        plan(absent, "v5e-8")
    assert plan(absent, "v5e-256", **SIZE).rows


def test_the_command(tmp_path):
    words = (f"--config={TINY}", "--target=2xcpu", f"--json={tmp_path / 'plan.json'}")
    with Command(
        *words, "--input_seconds=0.1", module="vit_dist.plan", log=tmp_path / "log"
    ) as command:
        assert command.wait() == 0, command.text()
    assert "it fits" in command.text() and "measured" in command.text()
    # What was not compiled is told, and how it can be.
    assert "Nothing was compiled" in command.text() and "--compile" in command.text()
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True


@pytest.mark.exhaustive
@pytest.mark.spawns
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search"], "--search goes with --compile"),
        (["--compiler=/usr/bin/python3"], "--compiler goes with --compile"),
        (["--compile", "--compiler=/nowhere/python"], "tpu-compile"),
        (["--network=400"], "--network is what several hosts"),
    ],
)
def test_flags_that_do_not_go_together(words, message, tmp_path):
    flags = (f"--config={TINY}", "--target=cpu", "--input_seconds=0", *words)
    code, text = run(*flags, module="vit_dist.plan", log=tmp_path / "log")
    assert code == 2 and message in text, text


@pytest.mark.slow
def test_the_table_of_images_a_device():
    text = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text()
    head = re.search(r"^\| Model \|(.*)\|$", text, re.M)[1]
    targets = [parse_target(name) for name in re.findall(r"`(\S+)`", head)]
    rows = re.findall(r"^\| (\S+) at (\d+) px \|([\d |]+)\|$", text, re.M)
    assert len(targets) == 4 and len(rows) >= 6
    for variant, size, numbers in rows:
        network = vit_config(variant, image_size=int(size), num_classes=1000)
        state = count_state(network, OptimizerOptions(), ema=True)
        for target, number in zip(targets, map(int, numbers.split("|")), strict=True):
            there = USABLE * target.device.memory * 1e9
            need = [
                step_memory(
                    network, state, batch_size=n, precision="bfloat16", kind=target.kind
                ).total
                for n in (number, 2 * number)
            ]
            assert need[0] <= there < need[1], (variant, size, target.name, need)
