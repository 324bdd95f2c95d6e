"""launch/slurm.sbatch under a real Slurm: two nodes on this machine."""

import contextlib

import numpy as np
import pytest

from tests.support import processes, tiny
from tests.support import slurm as lib
from tests.support.waiting import wait_for

SCRIPT = lib.ROOT / "launch/slurm.sbatch"
# Two hosts with one processor each, so that several jobs fit.
OPTIONS = (f"--chdir={lib.ROOT}", "--cpus-per-task=1", "--time=60")

# In place of Python: the code with which each start ends, and whether it leaves a checkpoint.
STAND_IN = """#!/bin/sh
echo "task $SLURM_PROCID: $*"
start=${SLURM_RESTART_COUNT:-0}
[ -z "$PROGRESS" ] || mkdir -p "$WORKDIR/checkpoints/00000000$start"
[ -z "$PROGRESS" ] || touch "$WORKDIR/checkpoints/00000000$start/manifest.json"
set -- $CODES
shift "$start"
exit "$1"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if lib.missing():
        pytest.skip(f"no Slurm here: {', '.join(lib.missing())} missing (apt-get: slurm-wlm)")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(lib.Slurm(tmp_path_factory.mktemp("slurm")))
        except lib.NoSlurmError as error:  # its daemons need rights that a container may lack
            pytest.skip(f"Slurm does not start here: {error}")
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    "codes, progress, state, said",
    [
        ("2 0", "", "FAILED", ["start 1: exit code 2: another start would not help"]),
        ("1 42 1 1 0", "", "FAILED", ["exit code 1, 3 times without a new checkpoint: giving up"]),
        (
            "1 1 137 143 0",
            "1",
            "COMPLETED",
            [
                "start 3: exit code 137: back",
                "start 4: stopped on request: back",
                "start 5: done",
            ],
        ),
    ],
)
def test_what_follows_an_exit_code(slurm, tmp_path, codes, progress, state, said):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    job = slurm.submit(
        SCRIPT,
        *OPTIONS,
        f"--chdir={tmp_path}",
        PYTHON=stand_in,
        CONFIG="config.py",
        WORKDIR=tmp_path,
        CODES=codes,
        PROGRESS=progress,
    )
    assert slurm.wait_while(job, "PENDING", "RUNNING") == state, slurm.log(job)
    log = slurm.log(job)
    for text in said:
        assert text in log, log
    for task in (0, 1):
        command = f"task {task}: -m vit_dist.train --config config.py --workdir {tmp_path}\n"
        assert command in log
    assert not list(tmp_path.glob("*.failures"))


CONFIG = """
from tests.support import tiny

def get_config():
    config = tiny.get_config()
    config.total_steps, config.log_steps = {total}, 20
    config.data.val_split = config.data.test_split = ""
    config.step.ema_decay = 0.99
    config.mixing.mixup_alpha = 0.2
    config.strategy.name = "auto"
    return config
"""


def run_undisturbed(config, workdir):
    """Two hosts of one cluster, without Slurm."""
    flags = (f"--config={config}", f"--workdir={workdir}")
    with processes.hosts(*flags, log=workdir) as started:
        for host in started:
            assert host.wait() == 0, host.text()[-3000:]


@pytest.mark.slow
@pytest.mark.spawns
@pytest.mark.timeout(1800)
def test_a_job_that_is_preempted_ends_with_equal_weights(slurm, tmp_path):
    config, workdir = tmp_path / "config.py", tmp_path / "preempted"
    config.write_text(CONFIG.format(total=10**6))
    given = {"CONFIG": config, "WORKDIR": workdir, "PYTHONPATH": lib.ROOT}
    job = slurm.submit(SCRIPT, *OPTIONS, CUDA_VISIBLE_DEVICES=-1, **given)
    wait_for(lambda: "step 20/" in slurm.log(job), 600)
    slurm.call("scancel", "--signal=TERM", job)
    wait_for(lambda: "start 1: stopped on request: back into the queue" in slurm.log(job), 120)
    # The job waits for two minutes, in which it gets an end.
    step = tiny.open_checkpoint(str(workdir)).step
    config.write_text(CONFIG.format(total=step + 20))
    assert slurm.wait_while(job, "PENDING", "RUNNING") == "COMPLETED", slurm.log(job)
    log = slurm.log(job)
    assert "Slurm says that this is worker 1 (127.0.0.1:" in log
    assert "start 2: done" in log and f"resumed from step {step}" in log, log

    run_undisturbed(config, tmp_path / "undisturbed")
    expected, found = (tiny.arrays(tmp_path / name) for name in ("undisturbed", "preempted"))
    assert set(expected) == set(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
