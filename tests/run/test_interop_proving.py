"""Plans proved by real compilers, in the environments that have JAX, and libtpu."""

import os

import pytest

from tests.support import tiny
from tests.support.interop import NEEDS_PEERS, PYTHON
from vit_dist.costs.compiled import DEFAULT_PYTHON, TOPOLOGIES, Compiler
from vit_dist.plan import plan

pytestmark = [pytest.mark.slow, pytest.mark.spawns]
needs_libtpu = pytest.mark.skipif(
    not os.path.exists(DEFAULT_PYTHON), reason=f"no compiler for TPUs at {DEFAULT_PYTHON}"
)
TARGETS = ("v4-8", "v5e-1", "v5p-8", "v6e-8")


def proved(python, target, folder, **changed):
    compiler = Compiler(str(python), cache=str(folder))
    found = plan(tiny.make(precision="bfloat16", **changed), target, compiler=compiler)
    return found, {row.name: row for row in found.rows if row.how == "compiled"}


@NEEDS_PEERS
def test_a_processor(tmp_path, capsys):
    found, rows = proved(PYTHON, "cpu", tmp_path, step__ema_decay=0.9)
    assert found.fits and found.compiled
    exact = {row.name: row.value for row in found.rows if row.section == "memory of a device"}
    arguments = exact["weights"] + exact["optimizer"] + exact["average"] + exact["batch"] / 2
    # The program is given all variables and one batch, and next to nothing else.
    assert rows["step, arguments"].value == pytest.approx(arguments, rel=0.02)
    assert rows["step, temp"].value > 0 and rows["step, operations"].value > 0
    # Weights alone, and images: what an evaluation takes.
    assert 0.2 < rows["evaluation, memory"].value / rows["step, memory"].value < 5
    assert len(list(tmp_path.iterdir())) == 2
    assert "compiled for" in capsys.readouterr().out
    _, again = proved(PYTHON, "cpu", tmp_path, step__ema_decay=0.9)
    # The time is by this machine's speed, which is measured each time.
    del rows["step, time"], again["step, time"]
    assert again == rows and "compiled before" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
def test_each_generation(target, tmp_path):
    found, rows = proved(DEFAULT_PYTHON, target, tmp_path)
    assert found.fits and rows["step, code"].value > 0
    assert rows["step, memory"].value > rows["step, temp"].value > 0


@needs_libtpu
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_step_without_room_is_answered_with_one_that_has(tmp_path):
    # Estimated below what a v5e has by the factor from which on a step counts as hopeless.
    found, rows = proved(
        DEFAULT_PYTHON, "v5e-1", tmp_path, input__batch_size=1 << 21, model__dropout=0.0
    )
    assert not found.fits and rows["step"].value == "refused"
    assert "of 16.91 GB" in rows["step"].note
    assert f"step, {found.changes[0].flags}, memory" in rows


def test_every_generation_is_tried():
    assert {name.removeprefix("TPU ") for name in TOPOLOGIES} == {
        target.partition("-")[0] for target in TARGETS
    }
