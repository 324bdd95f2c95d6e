"""The config: every key is there, typed and read by someone; durations; what differs."""

import ast
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import vit_dist
from vit_dist.cluster.strategy import check_strategy, make_strategy
from vit_dist.config import defaults as config_lib
from vit_dist.config import finalize, get_defaults
from vit_dist.config.binding import bind
from vit_dist.config.defaults import DEFAULTS, changes
from vit_dist.config.durations import without_durations
from vit_dist.config.errors import ConfigError
from vit_dist.data.mixing import make_mixing
from vit_dist.data.sources.open import SOURCES, _open_mixture
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit
from vit_dist.run.check import check
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions
from vit_dist.training.schedules import Schedule
from vit_dist.training.step import StepOptions

SECTIONS = [name for name, value in DEFAULTS.items() if isinstance(value, dict)]
RUN = sorted(Path(vit_dist.__file__).parent.glob("run/*.py"))


def put(config, key, value):
    *sections, last = key.split(".")
    for name in sections:
        config = config[name]
    config[last] = value
    return config


def small(**changed):
    """A config that check() accepts, with `changed`; a dot in a key is written as __."""
    config = get_defaults()
    values = {"image_size": 8, "total_steps": 10, "model.variant": "mu/4", "input.batch_size": 16}
    values["input.train_ops"] = values["input.eval_ops"] = "value_range(-1, 1)"
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in values.items():
        put(config, key, value)
    return config


# keys


def test_none_in_the_shell_is_no_text():
    given = {"data.class_file": "None", "input.cache_dir": "None", "model.variant": "None"}
    config = get_defaults()
    for key, value in given.items():
        put(config, key, value)
    config.total_steps = 1
    found = finalize(config, given)
    assert found.data.class_file is None
    assert found.input.cache_dir == ""
    assert found.model.variant == "None"  # refused by who reads it
    assert finalize(config).data.class_file == "None"  # a config file means what it says


@pytest.mark.parametrize("key", ["image_sise", "model.widht", "schedule.warmup_hours"])
def test_defaults_are_locked(key):
    with pytest.raises((AttributeError, KeyError), match="locked"):
        put(get_defaults(), key, 1)


def test_defaults_are_fresh_each_time():
    get_defaults().model.variant = "L/16"
    assert get_defaults().model.variant == "S/16"


def parameters(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}


@pytest.mark.parametrize(
    "section,functions",
    [
        ("model", (vit_config, build_vit)),
        ("loss", (make_loss,)),
        ("optimizer", (OptimizerOptions,)),
        ("schedule", (Schedule,)),
        ("step", (StepOptions,)),
        ("strategy", (make_strategy,)),
        ("data", (*SOURCES.values(), _open_mixture)),
        ("mixing", (make_mixing,)),
    ],
)
def test_keys_are_those_of_the_functions(section, functions):
    values = without_durations(get_defaults()[section])
    extra = {"source", "train_split", "val_split", "test_split"} if section == "data" else set()
    assert set(values) - extra <= parameters(*functions)


def test_checking_twins_take_the_same_keys():
    """What is checked without a device and what is made of it later must not drift apart."""
    assert parameters(check_strategy) == parameters(make_strategy)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in ("input", "data")])
def test_a_key_that_no_function_takes_is_an_error(section, monkeypatch):
    monkeypatch.setitem(DEFAULTS, section, {**DEFAULTS[section], "unread": 1})
    with pytest.raises(ValueError, match=f"config.{section}.unread is unknown"):
        check(small())


def dotted_names(path):
    """All attribute chains such as run.config.seed, except where they are only range-checked."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "_check_choices"]
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_other_key_is_read():
    names = {name for path in RUN for name in dotted_names(path)}
    keys = [k for k, v in DEFAULTS.items() if not isinstance(v, dict)]
    keys = list(without_durations(dict.fromkeys(keys)))
    keys += [f"input.{key}" for key in DEFAULTS["input"]]
    unread = [k for k in keys if not any(f".{n}".endswith(f".config.{k}") for n in names)]
    assert unread == []


def test_defaults_need_only_a_duration():
    with pytest.raises(ValueError, match=r"config.total is not set; set one of config.total_steps"):
        check(small(total_steps=None))
    run, _ = check(small())
    assert (run.total_steps, run.log_steps, run.eval_steps, run.save_steps) == (10, 50, 1, 1)


def test_whole_sections_replaced_with_wrong_keys_are_caught():
    """A locked ConfigDict lets a section be replaced by another with any keys."""
    for section in SECTIONS:
        config = small()
        config[section] = ConfigDict({**get_defaults()[section], "unread": 1})
        with pytest.raises(ValueError, match=f"config.{section}.unread is unknown"):
            check(config)
        key = next(iter(DEFAULTS[section]))
        config = small()
        with config.unlocked(), config[section].unlocked():
            del config[section][key]
        with pytest.raises(ValueError, match=f"config.{section} lacks {key}"):
            check(config)
        with config.ignore_type():
            config[section] = 3
        with pytest.raises(ValueError, match=f"config.{section} must be a section of keys, got 3"):
            check(config)
        with config.unlocked():
            del config[section]
        with pytest.raises(ValueError, match=f"config lacks {section}: start from"):
            finalize(config)


@pytest.mark.parametrize("value", [None, 3, {"seed": 1}])
def test_what_is_no_config(value):
    with pytest.raises(ValueError, match="must return a config"):
        finalize(value)


# values


@pytest.mark.parametrize(
    "key,value,wanted",
    [
        ("seed", True, "int"),
        ("input.batch_size", True, "int"),
        ("input.num_threads", True, "int or None"),
        ("model.depth", True, "int or None"),
        ("model.qkv_bias", 1, "bool"),
        ("step.clip_norm", "x", "float or None"),
        ("model.variant", None, "str"),
        ("optimizer.learning_rate", None, "float"),
        ("data.name", 3, "str or None"),
        ("total_steps", 1.5, "int or None"),
        ("strategy.timeout_seconds", "1", "float"),
    ],
)
def test_wrong_types(key, value, wanted):
    """ml_collections itself casts some, and sees no difference between bool and int."""
    config = small()
    section = config
    for name in key.split(".")[:-1]:
        section = section[name]
    with config.unlocked(), section.unlocked(), section.ignore_type():
        section[key.split(".")[-1]] = value
    with pytest.raises(ValueError, match=f"config.{key} must be {wanted}, got {value!r}"):
        finalize(config)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("seed", -1, r"config.seed must be in 0..2147483647, got -1"),
        ("seed", 2**31, r"config.seed must be in"),
        ("keep_checkpoints", 0, "config.keep_checkpoints must be 1 or more, got 0"),
        ("input.prefetch", 0, "config.input.prefetch must be 1 or more"),
        ("input.eval_batch_size", 0, "config.input.eval_batch_size must be 1 or more"),
        ("input.num_threads", 0, "config.input.num_threads must be in 1..1024, or None"),
        ("precision", "fp8", "config.precision 'fp8' is unknown; allowed: float32, bfloat16"),
        ("posemb_method", "x", "config.posemb_method 'x' is unknown; allowed: "),
        ("model.pool", "none", "not for training"),
        ("data.train_split", "", "config.data.train_split must name a split"),
        ("total_steps", -1, "config.total_steps must be 0 or more, or None, got -1"),
        ("eval_percent", 101.0, r"config.eval_percent must be in \[0, 100\], or None, got 101.0"),
        ("log_epochs", float("inf"), "config.log_epochs must be 0 or more, or None, got inf"),
        ("schedule.warmup_percent", float("nan"), "config.schedule.warmup_percent must be"),
        ("input.train_ops", "value_range(-1, 1)|keep('image')", "must keep 'label'"),
        ("input.eval_ops", "keep('image', 'label')", "leaves images at 0..255"),
        ("input.train_ops", "resize(16)|value_range(-1, 1)", "config.image_size is"),
    ],
)
def test_values_out_of_range(key, value, message):
    config = small(**{key.replace(".", "__"): value})
    with pytest.raises(ValueError, match=message):
        check(config)


def bound(count: int, rate: float, name: str, flag: bool, maybe: int | None = None) -> None:
    """What bind is tried on."""


GOOD = {"count": 1, "rate": 0.5, "name": "x", "flag": True}


@pytest.mark.parametrize(
    "changed,message",
    [
        ({}, None),
        ({"rate": 1}, None),  # an int where a float is wanted
        ({"maybe": None}, None),
        ({"maybe": 3}, None),
        ({"count": True}, r"config.f.count must be int, got True"),
        ({"count": 1.0}, r"config.f.count must be int, got 1.0"),
        ({"count": None}, r"config.f.count must be int, got None"),
        ({"rate": True}, r"config.f.rate must be float, got True"),
        ({"rate": "0.1"}, r"config.f.rate must be float, got '0.1'"),
        ({"name": 3}, r"config.f.name must be str, got 3"),
        ({"flag": 1}, r"config.f.flag must be bool, got 1"),
        ({"maybe": True}, r"config.f.maybe must be int or None, got True"),
        ({"maybe": 1.5}, r"config.f.maybe must be int or None, got 1.5"),
        ({"naem": "x"}, r"config.f.naem is unknown; did you mean 'name'\? Keys of config.f: "),
    ],
)
def test_bind_types(changed, message):
    if message is None:
        assert bind(bound, GOOD | changed, name="f") == GOOD | changed
    else:
        with pytest.raises(ValueError, match=message):
            bind(bound, GOOD | changed, name="f")


def test_bind_wants_each_argument_once():
    with pytest.raises(ValueError, match=r"config.f lacks count, flag"):
        bind(bound, {"rate": 1.0, "name": "x"}, name="f")
    with pytest.raises(ValueError, match=r"config.f.count is unknown"):
        bind(bound, GOOD, name="f", count=3)
    rest = {key: value for key, value in GOOD.items() if key != "count"}
    assert bind(bound, rest, name="f", count=3) == GOOD | {"count": 3}


BOUND = (vit_config, build_vit, make_loss, OptimizerOptions, Schedule, StepOptions, make_strategy)


@pytest.mark.parametrize("function", BOUND)
def test_annotations_of_bound_functions_can_be_checked(function):
    """`from __future__ import annotations` would make them strings: bind could check nothing."""
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert not isinstance(parameter.annotation, str)
    with pytest.raises(TypeError, match="string annotations"):
        bind(with_strings, {"x": 1}, name="f")


def with_strings(x: "int") -> None:
    """As under `from __future__ import annotations`."""


# image size, JSON, differences


@pytest.mark.parametrize(
    "given,pair", [(224, (224, 224)), ((64, 32), (64, 32)), ([64, 32], (64, 32))]
)
def test_image_size(given, pair):
    assert config_lib.parse_image_size(given) == pair


@pytest.mark.parametrize(
    "given", [0, -8, True, 8.0, "8", "(8, 8", (8,), (8, 8, 3), (8, 0), (8, True), None, "x"]
)
def test_bad_image_size(given):
    with pytest.raises(ValueError, match=r"config.image_size must be a positive int or "):
        config_lib.parse_image_size(given)


def test_oblong_images_reach_the_model_and_the_pipe():
    ops = "resize(size)|value_range(-1, 1)|keep('image', 'label')"
    run, _ = check(small(image_size=(8, 16), input__train_ops=ops, input__eval_ops=ops))
    assert run.image_size == (8, 16)


def test_json_of_the_config_and_back():
    config = finalize(small(image_size=(8, 8)))
    back = json.loads(config_lib.to_json(config))
    assert back["image_size"] == [8, 8] and back["model"]["width"] is None
    assert changes(back, json.loads(config_lib.to_json(config))) == []


def test_a_threshold_that_smoothing_makes_useless_is_refused_before_devices_start():
    config = small()
    config.loss.update({"name": "sigmoid", "label_smoothing": 0.1, "threshold": 0.0})
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=0\.1 gives the right one of"):
        check(config)


def test_what_a_config_file_may_hold_in_options_of_a_source():
    config = small()
    config.data.options = {"root": Path("/data"), "share": np.float32(0.5), "parts": ({"a": 1},)}
    found = config_lib.as_json(finalize(config))["data"]["options"]
    assert found == {"root": "/data", "share": 0.5, "parts": [{"a": 1}]}
    config.data.options = {"made": object()}
    with pytest.raises(ConfigError, match="of type object, which config"):
        config_lib.as_json(finalize(config))


@pytest.mark.parametrize(
    "old,new,lines",
    [
        ({"a": 1, "b": {"c": None}}, {"a": 1, "b": {"c": None}}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        (
            {"b": {"c": 1, "d": "x"}},
            {"b": {"c": None, "d": "y"}},
            ["b.c: 1 -> null", 'b.d: "x" -> "y"'],
        ),
        ({"a": 1}, {"b": 1}, ["a: 1 -> null", "b: null -> 1"]),
        ({"a": {"b": 1}}, {"a": 3}, ['a: {"b": 1} -> 3']),
        ({"a": [1, 2]}, {"a": (1, 2)}, []),
        # Keys that are newer than the run: only what is no default is a change.
        ({}, {"seed": 0, "step": {"accumulation": 1}}, []),
        (
            {"step": {}},
            {"seed": 3, "step": {"accumulation": 2}},
            ["seed: 0 -> 3", "step.accumulation: 1 -> 2"],
        ),
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
    ],
)
def test_changes(old, new, lines):
    assert changes(old, new) == lines


def test_keys_of_sections_of_ones_own_are_names():
    config = get_defaults()
    config.total_steps = 1
    with config.ignore_type(), config.unlocked():
        config.data.counts = {"train": {1: 2}}
    with pytest.raises(ConfigError, match=r"config\.data\.counts\.train has the key 1: keys are"):
        finalize(config)


def test_a_section_that_contains_itself():
    config = get_defaults()
    config.total_steps = 1
    with config.ignore_type(), config.unlocked():
        config.data.counts = config.data
    with pytest.raises(ConfigError, match=r"config\.data\.counts contains itself"):
        finalize(config)
