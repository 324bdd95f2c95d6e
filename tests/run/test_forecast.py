"""What a run notes of its plan, from the variables and devices that it has."""

import dataclasses
import os

import pytest
import tensorflow as tf

from tests.support import tiny
from vit_dist.costs.devices import Device
from vit_dist.costs.memory import count_state, state_of
from vit_dist.costs.targets import parse_target
from vit_dist.model.memory import POLICIES
from vit_dist.model.vit import named_weights
from vit_dist.run import forecast as module
from vit_dist.run.build import make_state
from vit_dist.run.check import check
from vit_dist.run.forecast import fit_remat, forecast, forecast_text
from vit_dist.run.planning import USABLE, Planner


@pytest.fixture(scope="module")
def run():
    options, data = check(tiny.make(step__ema_decay=0.9, optimizer__momentum_dtype="bfloat16"))
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    return options, data.sources["train"].num_examples, make_state(options, strategy), strategy


def test_variables_that_are_there_count_as_those_that_are_planned(run):
    options, _, state, _ = run
    counted = count_state(options.model.network, options.optimizer, ema=True)
    assert state_of(named_weights(state.model), state.optimizer, ema=True) == counted


def test_a_processor_has_no_time(run):
    (row,) = forecast(*run)
    planned = Planner(run[0], run[1], parse_target("cpu")).need()
    assert row["metric"] == "memory/device_peak"
    assert row["expected"] == pytest.approx(planned / 2**30)


def test_a_card_has_all_figures_of_its_plan(run, monkeypatch):
    monkeypatch.setattr(module, "device_kind", lambda strategy: "GPU")
    monkeypatch.setattr(module, "device_name", lambda strategy: "NVIDIA H100 80GB HBM3")
    rows = {row["metric"]: row for row in forecast(*run)}
    time = Planner(run[0], run[1], parse_target("1xH100")).time()
    step = rows["train/seconds_per_step"]
    assert (step["limit"], step["expected"]) == (time.floor, time.expected)
    # 16 images a step, as the config says.
    assert rows["train/examples_per_second"]["limit"] == pytest.approx(16 / time.floor)
    # Without remat the operations of MFU are those of the roofline.
    assert rows["speed/mfu"]["limit"] == pytest.approx(time.compute / time.floor)
    lines = forecast_text(list(rows.values())).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == 5 for line in lines)


def card(name, gib):
    """A table of one card, which has as much memory as the tests need."""
    return Device(name, name, 100.0, 100.0, None, 100.0, gib * 2**30 / 1e9, 1000.0, 60.0)


def policies(monkeypatch, *gib, **changed):
    """What model.remat=auto takes of cards of these sizes, and what is said of it."""
    monkeypatch.setattr(module, "device_kind", lambda strategy: "GPU")
    monkeypatch.setattr(module, "device_name", lambda strategy: "made up")
    options, data = check(
        tiny.make(model__remat="auto", model__depth=8, input__batch_size=4096, **changed)
    )
    count = data.sources["train"].num_examples
    for size in gib:
        monitor = dataclasses.replace(options.monitor, devices=[card("made up", size)])
        yield fit_remat(
            dataclasses.replace(options, monitor=monitor),
            count,
            tf.distribute.OneDeviceStrategy("CPU:0"),
        )


def test_auto_takes_the_first_policy_that_has_room(monkeypatch):
    options, _ = check(tiny.make(model__depth=8, input__batch_size=4096))
    target = parse_target("1xH100")
    planner = Planner(options, 16, target)
    # Between what each policy needs and what the one before it needs.
    needs = [planner.need(dataclasses.replace(planner.choice, remat=p)) for p in POLICIES]
    assert sorted(needs, reverse=True) == needs
    sizes = [1.01 * need / USABLE / 2**30 for need in needs]
    found = list(policies(monkeypatch, *sizes, 0.5 * sizes[-1]))
    taken = [chosen.model.network["remat"] for chosen, _ in found]
    # Where none has room, the one that comes nearest.
    assert taken == [*POLICIES, "full"]
    for policy, (chosen, line) in zip(taken, found, strict=True):
        assert line.startswith(f"model.remat=auto takes {policy}: ")
        assert chosen.evaluation.model is chosen.model and not chosen.model.auto_remat
    assert ", and only" in found[-1][1] and "can be used" in found[0][1]


def test_auto_beside_blocks_of_keys(monkeypatch):
    """They compute attention's weights again in any case, so that policy is not one of theirs."""
    ((chosen, _),) = policies(monkeypatch, 1e-3, model__attention_block=4)
    assert chosen.model.network["remat"] == "full"


def test_without_auto_nothing_is_decided(run):
    options, count, _, strategy = run
    assert fit_remat(options, count, strategy) == (options, "")


def test_a_processor_has_its_machines_memory():
    options, data = check(tiny.make(model__remat="auto"))
    alone = tf.distribute.OneDeviceStrategy("CPU:0")
    chosen, line = fit_remat(options, data.sources["train"].num_examples, alone)
    assert chosen.model.network["remat"] == "none"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert f"{USABLE * total:.1f} GiB can be used" in line
