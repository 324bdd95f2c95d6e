"""Weights at hf://org/name, fetched by the hub's own library from a server of ours (hub.py)."""

import os
import sys

import numpy as np
import pytest

from tests.support import flax_vit, processes
from tests.support.hub import serve_hub
from tests.support.networks import arrays_of, tiny_vit
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.run.origins import open_origin

ASK = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Where downloads go, and the environment that leads to org/vit.

    It holds timm's files, an .npz, and what nobody asks for.
    """
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    model = tiny_vit(pool="tok", num_classes=3)
    write_pretrained(folder, "timm", arrays_of(model), model.get_config(), mean=ASK, std=ASK)
    np.savez(folder / "published.npz", **flax_vit.published(flax_vit.make_tree()))
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serve_hub(files, home) as environment:
        yield home, environment


def opened(environment, path):
    """Prints what the weights are, in a process in which the hub's library is not loaded yet."""
    os.environ |= environment
    try:
        print("width", open_origin(path).network["width"])
    except ValueError as error:
        print("error:", error)


def test_a_repository_and_a_file_of_it(hub, tmp_path):
    home, environment = hub
    for path, width, fetched in (
        ("hf://org/vit", 16, {"config.json", "model.safetensors"}),
        ("hf://org/vit/published.npz", 12, {"config.json", "model.safetensors", "published.npz"}),
    ):
        _, text = processes.call(opened, environment, path, log=tmp_path / "log")
        assert f"width {width}" in text
        assert {file.name for file in home.glob("hub/*/snapshots/*/*")} == fetched


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://org/nothing", "hf://org/nothing could not be fetched (RepositoryNotFoundError: 404"),
        ("hf://org/vit/other.npz", "hf://org/vit has no file other.npz"),
        ("hf://org", "hf://org is not hf://org/name"),
    ],
)
def test_what_is_not_there(hub, tmp_path, path, message):
    _, text = processes.call(opened, hub[1], path, log=tmp_path / "log")
    assert f"error: {message}" in text


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        open_origin("hf://org/name")
