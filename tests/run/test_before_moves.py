"""A checkpoint of before the modules moved into folders still goes on to the same end.

tests/fixtures/before_moves/000000003 was saved by a run of 6 steps with dropout, stochastic depth,
mixup, micro-batches and a moving average; final.safetensors is its state after the last step.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.support import tiny
from vit_dist.train import train

SAVED = Path(__file__).resolve().parents[1] / "fixtures" / "before_moves"
FINAL_SHA256 = "761075db57d267f26ec3cca1a56c7115f3701d1014fd37e3c67d716eebbf4bd5"


def config():
    return tiny.without_evaluation(
        total_steps=6,
        save_steps=3,
        keep_checkpoints=5,
        step__ema_decay=0.9,
        step__accumulation=2,
        mixing__mixup_alpha=0.2,
        model__drop_path=0.1,
        model__dropout=0.1,
    )


def digest(arrays):
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def test_the_fixture_is_what_was_saved():
    assert digest(safetensors.numpy.load_file(SAVED / "final.safetensors")) == FINAL_SHA256


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The state after the last step of the run that went on."""
    workdir = tmp_path_factory.mktemp("old")
    shutil.copytree(SAVED / "000000003", workdir / "checkpoints" / "000000003")
    assert train(config(), str(workdir))["step"] == 6
    return tiny.arrays(workdir)


def test_it_resumes_to_the_same_end(resumed):
    expected = safetensors.numpy.load_file(SAVED / "final.safetensors")
    # To the bit on the kind of processor that saved it; elsewhere each of the 3 steps may round a
    # product of at most 64 terms otherwise, and Adam divides by roots of it: 3 * 64 epsilon.
    tiny.assert_same(resumed, expected, atol=3 * 64 * np.finfo(np.float32).eps)


@pytest.mark.exhaustive  # where rounding is as it was, the test above says the same
def test_whole_and_resumed_runs_agree_to_the_bit(resumed, tmp_path):
    train(config(), str(tmp_path))
    new = tiny.arrays(tmp_path)
    if digest(new) == FINAL_SHA256:  # a processor that rounds as the one that saved it
        assert digest(resumed) == FINAL_SHA256
    tiny.assert_same(resumed, new, atol=3 * 64 * np.finfo(np.float32).eps)
