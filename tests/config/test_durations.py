"""Durations of the config: units, rounding, and who decides: shell, config file or default."""

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_dist.config import finalize, get_defaults
from vit_dist.config.durations import UNITS, duration
from vit_dist.config.errors import ConfigError
from vit_dist.run.check import check


def make(values):
    """The defaults with values put at dotted keys."""
    config = get_defaults()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


def flatten(section, prefix=""):
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


SIZES = {"batch_size": 100, "num_examples": 1050, "total_steps": 21}


@pytest.mark.parametrize(
    "unit,value,steps",
    [
        ("steps", 7, 7),
        ("steps", 0, 0),
        ("epochs", 2, 21),
        ("epochs", 0.5, 5),  # 5.25
        ("epochs", 0.55, 6),  # 5.775
        ("examples", 149, 1),
        ("examples", 151, 2),
        ("examples", 49, 1),  # of a share that rounds to 0, each step
        ("examples", 0, 0),
        ("percent", 100.0, 21),
        ("percent", 10.0, 2),  # 2.1
        ("percent", 12.0, 3),  # 2.52
        ("percent", 1.0, 1),
    ],
)
@pytest.mark.parametrize("name", ["log", "save", "eval", "figures"])
def test_duration(name, unit, value, steps):
    config = finalize(make({f"{name}_steps": None, f"{name}_{unit}": value}))
    assert duration(config, name, **SIZES) == steps


def test_a_share_of_the_schedule_may_be_no_step():
    section = finalize(make({"schedule.warmup_steps": None, "schedule.warmup_examples": 49}))
    assert duration(section.schedule, "warmup", where="config.schedule", **SIZES) == 0


def test_what_cannot_be_counted():
    """Positions of examples are int64; what is never done may be as late as one likes."""
    most = 2**62 // 100
    sizes = {"batch_size": 100, "num_examples": 1050}
    assert duration(finalize(make({"total_steps": most})), "total", **sizes) == most
    for key, value in (("total_steps", most + 1), ("total_epochs", 1e30)):
        with pytest.raises(ConfigError, match=rf"config.{key}=.* at most {most} can be counted"):
            duration(finalize(make({key: value})), "total", **sizes)
    config = finalize(make({"save_steps": 10**20}))
    assert duration(config, "save", **SIZES) == 10**20


@pytest.mark.parametrize(
    "file,shell,kept",
    [
        ({}, {}, "eval_percent"),  # the default
        ({"eval_steps": 3}, {}, "eval_steps"),
        ({"eval_epochs": 1.0}, {}, "eval_epochs"),
        ({"eval_epochs": 1.0}, {"eval_steps": 3}, "eval_steps"),
        ({"eval_epochs": 1.0}, {"eval_percent": 10.0}, "eval_percent"),  # as the default has it
        ({"eval_percent": 5.0}, {"eval_examples": 100}, "eval_examples"),
        ({}, {"schedule.warmup_percent": 5.0}, "schedule.warmup_percent"),
        ({"schedule.warmup_epochs": 1.0}, {"schedule.warmup_steps": 0}, "schedule.warmup_steps"),
    ],
)
def test_the_shell_beats_the_file_beats_the_default(file, shell, kept):
    config = finalize(make(file | shell), shell)
    name = kept.rpartition("_")[0]
    units = [f"{name}_{unit}" for unit in UNITS]
    flat = {key: value for key, value in flatten(config) if key in units}
    assert {key for key, value in flat.items() if value is not None} == {kept}


@pytest.mark.parametrize("in_shell", [False, True])
def test_two_units_in_one_place(in_shell):
    values = {"total_steps": 5, "total_epochs": 1.0}
    config = make(values)
    with pytest.raises(
        ValueError, match=r"total_steps=5, total_epochs=1.0: give the duration 'tot"
    ):
        finalize(config, values if in_shell else {})


def test_finalize_copies_freezes_and_may_be_repeated():
    config = make({"model.variant": "mu/4"})
    once = finalize(config, {})
    assert config.eval_percent == once.eval_percent == 10.0
    once_more = finalize(once)
    assert once_more.to_dict() == once.to_dict()
    for key, value in (("nothing", 1), ("seed", 1)):
        with pytest.raises(AttributeError):
            setattr(once_more, key, value)
    config.model.variant = "L/16"
    assert (once.model.variant, once_more.model.variant) == ("mu/4", "mu/4")


def test_warmup_counts_in_the_run():
    ops = "resize(size)|value_range(-1, 1)"
    values = {"total_steps": 10, "input.batch_size": 16}
    values |= {"input.train_ops": ops, "input.eval_ops": ops}
    values |= {"schedule.warmup_percent": 20.0, "schedule.cooldown_examples": 32}
    options, _ = check(make(values))
    schedule = options.schedule
    assert (schedule.warmup_steps, schedule.cooldown_steps) == (2, 2)
    assert schedule.timescale_steps == 10_000 and schedule.total_steps == 10


@pytest.mark.parametrize("key", ["step.clip_norm", "step.ema_decay", "input.num_threads"])
def test_the_shell_can_take_a_value_back(key):
    argv = ["train", "--config=configs/demo.py", f"--config.{key}=None"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    section, name = key.split(".")
    assert finalize(values.config, {key: None})[section][name] is None
