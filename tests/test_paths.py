"""Names of paths: home folders, schemes, names that nobody else uses."""

import pytest

from vit_dist.config import recorded
from vit_dist.config.errors import ConfigError
from vit_dist.paths import expand, is_remote, local_path, temporary_name
from vit_dist.run import cli


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(expand("~/runs/x")) == "/home/me/runs/x"
    assert str(expand("~")) == "/home/me"
    assert str(local_path("~/runs/x", "--output")) == "/home/me/runs/x"
    assert str(expand("runs/~x")) == "runs/~x"
    assert str(expand("gs://bucket/~/x")) == "gs://bucket/~/x"


def test_remote_paths():
    assert is_remote("gs://bucket/x") and not is_remote("/gs/x")
    with pytest.raises(ConfigError, match="--output must be a local path, got gs://bucket/x"):
        local_path("gs://bucket/x", "--output")
    with pytest.raises(ConfigError, match="foo://x: local paths and gs:// work"):
        expand("foo://x")


def test_temporary_names():
    path = expand("/data/index.npz")
    assert temporary_name(path).parent == path.parent and temporary_name(path) != path


def test_the_home_folder_of_a_config(monkeypatch, tmp_path):
    """Shells leave a ~ behind a = as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for words in (["--config=~/c.py:arg"], ["--config", "~/c.py:arg"]):
        assert cli.with_recorded_config(["x", *words])[-1].endswith(f"{tmp_path}/c.py:arg")
    for run in ("~/run", "~/run/config.json"):
        assert recorded.find(run) == tmp_path / "run" / "config.json"
