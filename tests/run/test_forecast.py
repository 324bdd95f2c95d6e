"""What a run notes of its plan, from the variables and devices that it has."""

import pytest
import tensorflow as tf

from tests.support import tiny
from vit_dist.costs.memory import count_state, state_of
from vit_dist.costs.targets import parse_target
from vit_dist.model.vit import named_weights
from vit_dist.run import forecast as module
from vit_dist.run.build import make_state
from vit_dist.run.check import check
from vit_dist.run.forecast import forecast, forecast_text
from vit_dist.run.planning import Planner


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
