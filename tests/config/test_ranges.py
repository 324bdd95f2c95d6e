"""Every numeric key has a range, and what lies outside of it is refused before anything starts."""

import math

import pytest

from tests.support.fuzz import LEAVES
from vit_dist.config import finalize, get_defaults
from vit_dist.config.binding import check_range
from vit_dist.config.defaults import _Key
from vit_dist.config.errors import ConfigError

NUMBERS = {name: key for name, key in LEAVES if isinstance(key, _Key) and key.range}


def test_every_number_has_a_range():
    for name, key in LEAVES:
        kind = key.type if isinstance(key, _Key) else type(key)
        assert (kind in (int, float)) == (name in NUMBERS), name
    assert len(NUMBERS) > 80


def ends(key):
    """(first good, first bad) at each end that has a limit."""
    low, high = (float(text) for text in key.range[1:-1].split(", "))
    step = 1 if key.type is int else 1e-6
    for end, outward, closed in ((low, -1, key.range[0] == "["), (high, 1, key.range[-1] == "]")):
        if math.isfinite(end):
            good = end if closed else end - outward * step
            bad = end + outward * step if closed else end
            yield key.type(good), key.type(bad)


def put(name, value):
    config = get_defaults()
    *sections, last = name.split(".")
    section = config
    for part in sections:
        section = section[part]
    unit = last.rsplit("_", 1)[0]
    with config.ignore_type():
        for other in section:  # one unit of a duration at a time
            if other.rsplit("_", 1)[0] == unit and f"{name}".endswith(("steps", "epochs")):
                section[other] = None
        section[last] = value
    return finalize(config)


@pytest.mark.parametrize("name", NUMBERS)
def test_range(name):
    key = NUMBERS[name]
    nothing = [math.nan, math.inf, -math.inf] if key.type is float else []
    for bad in [*(bad for _, bad in ends(key)), *nothing]:
        with pytest.raises(ConfigError, match=rf"config\.{name} must be .*, got "):
            put(name, bad)
    for good, _ in ends(key):
        config = put(name, good)
        for part in name.split("."):
            config = config[part]
        assert config == good
    default = key.default
    if default is not None:
        check_range(name, default, key.range)


@pytest.mark.parametrize(
    "interval, value, said",
    [
        ("[0, 1)", 1, r"must be in \[0, 1\), got 1"),
        ("(0, 1]", 0.0, r"must be in \(0, 1\], got 0.0"),
        ("[0, 9]", 10, r"must be in 0\.\.9, got 10"),
        ("[1, inf)", 0, "must be 1 or more, got 0"),
        ("(0, inf)", 0.0, "must be above 0, got 0.0"),
        ("(-inf, inf)", math.nan, "must be a finite number, got nan"),
    ],
)
def test_what_is_said(interval, value, said):
    with pytest.raises(ConfigError, match=f"key {said}"):
        check_range("key", value, interval)
    with pytest.raises(ConfigError, match="or None"):
        check_range("key", value, interval, none=True)
