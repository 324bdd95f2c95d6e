"""Both launchers with real training runs."""

import numpy as np
import pytest

from tests.support.launching import launch
from vit_dist.training.checkpoint import open_checkpoint


@pytest.mark.slow
def test_real_runs_of_both_launchers_agree(tmp_path):
    """Two devices of one process, and two processes: the same steps, to rounding."""
    weights = []
    for script, option in (("local.sh", "--cpus=2"), ("workers.sh", "--workers=2")):
        workdir = tmp_path / script
        flags = ("--config=tests/support/tiny.py", f"--workdir={workdir}", "--config.total_steps=3")
        done = launch(script, option, *flags, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "done: step 3, val accuracy" in done.stdout
        weights.append(open_checkpoint(str(workdir)).arrays)
    assert set(weights[0]) == set(weights[1])
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], atol=1e-5, err_msg=name)
