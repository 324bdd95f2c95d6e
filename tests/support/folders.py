"""Folders as timm and Hugging Face publish them, of a tiny ViT of ours."""

import functools
import json

import safetensors.numpy

from tests.support.networks import arrays_of, randomize
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def make(folder, system="timm", *, note=False, **options):
    """Writes a folder of timm's or Hugging Face's with a tiny ViT; note: with our own note in it.

    Returns:
      The state dict, and the config.json.
    """
    arrays, network = _network(**options)
    write_pretrained(folder, system, arrays, network, **HALF)
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    if not note:
        safetensors.numpy.save_file(state, folder / "model.safetensors")
    return state, json.loads((folder / "config.json").read_text())


@functools.cache
def _network(**options):
    """Weights by name, and the network; to build it takes some tenths of a second."""
    options = {"image_size": 8, "num_classes": 3, "pool": "tok", "gelu": "erf", **options}
    model = randomize(build_vit(vit_config("mu/4", **options)))
    return arrays_of(model), model.get_config()


def save(folder, config, state=None):
    """Writes what is given; config None removes config.json."""
    path = folder / "config.json"
    path.unlink(missing_ok=True)
    if config is not None:
        path.write_text(json.dumps(config))
    if state is not None:
        safetensors.numpy.save_file(state, folder / "model.safetensors")
