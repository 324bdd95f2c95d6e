"""What a model gave is kept by weights and key, and a damaged file is named and written again."""

import json

import numpy as np
import pytest
from absl import logging

from vit_dist.evaluators.cache import OutputCache

VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)
LABELS = np.array([0, 1, 2, 1])
INDICES = np.array([0, 1, 3, 4])
ARRAYS = (VALUES, LABELS, INDICES)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    with caplog.at_level("WARNING"):
        yield lambda: [record.getMessage() for record in caplog.records]


def filled(folder):
    cache = OutputCache(str(folder))
    assert cache.get("weights", "k1") is None
    cache.put("k1", ARRAYS, facts={"pipe": "decode"})
    return cache


def assert_whole(found):
    assert found is not None
    for one, other in zip(found, ARRAYS, strict=True):
        np.testing.assert_array_equal(one, other)


def test_kept_for_another_process(tmp_path):
    filled(tmp_path / "new" / "folder")
    again = OutputCache(str(tmp_path / "new" / "folder"))
    assert_whole(again.get("weights", "k1"))
    assert again.get("weights", "k2") is None
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        "k1.safetensors",
        "k1.json",
    }
    assert json.loads((tmp_path / "new" / "folder" / "k1.json").read_text())["pipe"] == "decode"


def test_memory_forgets_what_other_weights_gave():
    cache = OutputCache()
    cache.get("old", "k1")
    cache.put("k1", ARRAYS, facts={})
    assert_whole(cache.get("old", "k1"))
    assert cache.get("new", "k1") is None
    assert cache.get("old", "k1") is None


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the numbers": lambda data, facts: flip(data, -1),
    "a bit of the header": lambda data, facts: flip(data, 12),
    "cut": lambda data, facts: data.write_bytes(data.read_bytes()[:-4]),
    "empty": lambda data, facts: data.write_bytes(b""),
    "facts cut": lambda data, facts: facts.write_bytes(facts.read_bytes()[:7]),
    "facts of another kind": lambda data, facts: facts.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_mended(tmp_path, damage, said):
    filled(tmp_path)
    data, facts = tmp_path / "k1.safetensors", tmp_path / "k1.json"
    damage(data, facts)
    again = OutputCache(str(tmp_path))
    assert again.get("weights", "k1") is None
    assert any("is damaged" in line and str(tmp_path) in line for line in said())
    again.put("k1", ARRAYS, facts={})
    assert_whole(OutputCache(str(tmp_path)).get("weights", "k1"))


def test_half_of_it_does_not_count(tmp_path, said):
    filled(tmp_path)
    (tmp_path / "k1.json").unlink()
    assert OutputCache(str(tmp_path)).get("weights", "k1") is None
    assert not said()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("vit_dist.evaluators.cache.write_state", full)
    cache = OutputCache(str(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        cache.put("k1", ARRAYS, facts={})
    assert list(tmp_path.iterdir()) == []
