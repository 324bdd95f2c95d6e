"""The launchers' scripts with real training runs."""

import pytest

from tests.support import tiny
from tests.support.launching import launch
from vit_dist.train import train


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The state that two devices of this process end with."""
    folder = tmp_path_factory.mktemp("expected")
    devices = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
    train(tiny.without_evaluation(total_steps=3, **devices), str(folder))
    return tiny.arrays(folder)


@pytest.mark.slow
@pytest.mark.spawns
@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("workers.sh", "--workers=2"),
        # It starts the same command; test_launch.py compares the words.
        pytest.param("local.sh", "--cpus=2", marks=pytest.mark.exhaustive),
    ],
)
def test_a_real_run_of_a_launcher(expected, tmp_path, script, option):
    """The same steps, to rounding, as in a process that no launcher has started."""
    flags = ("--config=tests/support/tiny.py", f"--workdir={tmp_path}", "--config.total_steps=3")
    done = launch(script, option, *flags, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done: step 3, val accuracy" in done.stdout
    tiny.assert_same(tiny.arrays(tmp_path), expected, atol=1e-5)
