"""What all hosts of a run must have in common: config, data, code and the checkpoint to begin with.

Each host reads its own facts, and `cluster.agreement.Meeting.agree` compares them. Hosts that
differ would train without an error, on other examples or from other weights, and the result would
be worth nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import vit_dist
from vit_dist.config.imports import sources_digest
from vit_dist.run.options import Data, EvaluationOptions, RunOptions
from vit_dist.run.origins import Origin
from vit_dist.run.start import Start

# Keys by which hosts may differ: where each finds the data, and with how many threads it reads. The
# fingerprints in "data" tell whether the examples are the same.
_OWN_OF_A_HOST = {
    "data": {"data_dir", "files", "class_file"},
    "input": {"num_threads", "prefetch", "cache_dir"},
}
# Tensors of up to so many entries are read to tell two files of weights apart. Biases and scales
# differ between any two trainings, and reading gigabytes on every host would take minutes.
_SMALL = 10_000


def host_facts(options: RunOptions, data: Data, start: Start) -> dict[str, Any]:
    """What this host would train with, for `Meeting.agree`; takes a second with many files."""
    # Sections of a message: agree() names the first key in which hosts differ.
    return {
        "config": _config_facts(options.record),
        "data": {split: source.fingerprint() for split, source in data.sources.items()},
        "checkpoint": {"how": start.how, **_checkpoint_facts(start)},
        **machine_facts(options.evaluation.imports),
    }


def evaluation_facts(options: EvaluationOptions, data: Data, origin: Origin) -> dict[str, Any]:
    """What this host has to judge weights with, for `Meeting.agree`."""
    return {
        "data": {split: source.fingerprint() for split, source in data.sources.items()},
        "checkpoint": {"weights": _weights_digest(origin)},
        **machine_facts(options.imports),
    }


def machine_facts(imports: Sequence[str] = ()) -> dict[str, Any]:
    """The versions and the devices of this host, whatever it is to do with them."""
    return {"code": code_facts(imports), "devices": _device_facts()}


def _config_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    facts = dict(record)
    for section, keys in _OWN_OF_A_HOST.items():
        facts[section] = {k: v for k, v in record[section].items() if k not in keys}
    return facts


def code_facts(imports: Sequence[str] = ()) -> dict[str, str]:
    """The versions of this process: of our sources, and of the libraries that compute.

    Args:
      imports: the user's own modules, whose ops and sources also decide what comes out.
    """
    own = {"imports": sources_digest(imports)[:12]} if imports else {}
    return {
        **own,
        "vit_dist": vit_dist.__version__,
        # Not the version alone: one host may run an edited checkout.
        "sources": sources_digest([vit_dist.__name__])[:12],
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }


def _checkpoint_facts(start: Start) -> dict[str, Any]:
    if start.checkpoint is not None:
        return {"step": start.checkpoint.step, "manifest": start.checkpoint.digest[:12]}
    return {} if start.origin is None else {"weights": _weights_digest(start.origin)}


def _weights_digest(origin: Origin) -> str:
    """A digest of all names and shapes, and of the values of small tensors (biases, scales)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(origin.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if np.prod(tensor.shape) <= _SMALL:
            digest.update(np.asarray(tensor).tobytes())
    return digest.hexdigest()[:12]


def _device_facts() -> Mapping[str, Any]:
    """Kind and number of devices: collectives hang where one host has GPUs and another has none."""
    gpus = tf.config.get_visible_devices("GPU")
    return {"kind": "GPU" if gpus else "CPU", "number": max(len(gpus), 1)}
