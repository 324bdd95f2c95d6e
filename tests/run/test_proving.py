"""What a plan makes of the compiler's answers, from a compiler that answers by a formula."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest

from vit_dist.config import finalize, get_defaults
from vit_dist.config.errors import ConfigError
from vit_dist.costs.compiled import Compiled, TooLarge
from vit_dist.costs.memory import count_state
from vit_dist.costs.targets import parse_target
from vit_dist.data.mixing import make_mixing
from vit_dist.run import planning, proving
from vit_dist.run.check import check
from vit_dist.run.planning import Planner
from vit_dist.run.proving import prove

# Compiled activations over estimated ones.
GROWN = 1.3


@functools.cache
def checked():
    config = get_defaults()
    config.total_steps, config.precision = 10, "bfloat16"
    config.model.variant = "S/16"
    config.model.depth = 1  # counting its variables takes time, and more blocks show nothing more
    config.data.update({"source": "synthetic", "num_examples": 10_000, "num_classes": 10})
    config.data.update({"val_split": "", "test_split": ""})
    return check(finalize(config))


def opened(batch_size, *, mixing=None, shard_state=False):
    options, data = checked()
    given = dataclasses.replace(options.input, batch_size=batch_size, mixing=mixing)
    optimizer = dataclasses.replace(options.optimizer, shard_state=shard_state)
    return dataclasses.replace(options, input=given, optimizer=optimizer), data


@functools.cache
def counted(momentum_dtype):
    options, _ = checked()
    optimizer = dataclasses.replace(options.optimizer, momentum_dtype=momentum_dtype)
    return count_state(options.model.network, optimizer, ema=False)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(
        planning, "count_state", lambda network, options, *, ema: counted(options.momentum_dtype)
    )


class Formula:
    """A compiler whose programs take GROWN times the activations, and refuses what is too large."""

    def __init__(self, planner, limit=None):
        self.planner, self.compiled = planner, []
        self.limit = limit or planner.target.device.memory * 1e9

    def kept(self, program, topology):
        return Path("/nowhere") / topology

    def compile(self, program, topology):
        self.compiled.append(asked := json.loads(program))
        if "choice" not in asked:  # an evaluation
            temp, arguments = 1e6 * asked["share"], self.planner.state().weights
        else:
            estimated = self.planner.memory(CHOICES[asked["choice"]], batch_size=asked["share"])
            temp = GROWN * max(estimated.activations, estimated.gradients)
            arguments = estimated.total - max(estimated.activations, estimated.gradients)
            arguments -= estimated.batch // 2
        if temp + arguments > self.limit:
            return TooLarge(temp, self.limit, 5.0)
        return Compiled(arguments, 0, 0, temp, 0, 1e9, 1e9, 61.0)


CHOICES = {}


@pytest.fixture(autouse=True)
def no_tracing(monkeypatch):
    """A program is a note of what it is to be: tracing a network takes seconds."""

    class Note:
        def __init__(self, **what):
            self.what = what

        def module(self):
            return json.dumps(self.what).encode()

    def of_step(options, data, *, share, kind):
        choice = proving.Choice(
            options.step.accumulation,
            options.model.network["remat"],
            options.optimizer.momentum_dtype,
            options.optimizer.shard_state,
            options.model.precision,
        )
        CHOICES[str(choice)] = choice
        return Note(share=share, choice=str(choice))

    monkeypatch.setattr(proving, "lower_step", of_step)
    monkeypatch.setattr(
        proving, "lower_evaluation", lambda options, source, *, share, kind: Note(share=share)
    )


def proved(batch_size, target="v5e-1", *, limit=None, search=False, judge=False, **changed):
    options, data = opened(batch_size, **changed)
    planner = Planner(options, 10_000, parse_target(target))
    compiler, said = Formula(planner, limit), []
    source = data.sources["train"] if judge else None
    proof = prove(planner, data, compiler, evaluated=source, search=search, say=said.append)
    return proof, planner, compiler, said


def values(proof):
    return {row.name: row for row in proof.rows}


def test_what_compiles_fits():
    proof, planner, compiler, said = proved(64, "v5e-4")
    assert proof.fits and not proof.changes and len(compiler.compiled) == 1
    assert compiler.compiled[0]["share"] == 16
    rows = values(proof)
    memory = planner.memory()
    assert rows["step, temp"].value * 1e9 == pytest.approx(GROWN * memory.activations)
    assert {row.how for row in proof.rows} == {"compiled"}
    # Each compilation is told, with how long it took.
    assert "16 images a device" in said[0] and "compiled for 61 s" in said[-1]


def test_what_the_compiler_refuses_is_refused_with_flags_that_compile():
    # Estimated to fit, by little.
    options, _ = opened(8)
    planner = Planner(options, 10_000, parse_target("v5e-1"))
    largest = planner.largest_batch(planner.choice)
    proof, planner, compiler, said = proved(largest)
    assert not proof.fits and values(proof)["step"].value == "refused"
    assert "of 17.20 GB" in said[2]
    # The first suggestion was compiled, and fits by what was learned from the refusal.
    assert len(compiler.compiled) == 2
    assert f"step, {proof.changes[0].flags}, memory" in values(proof)
    assert all(change.need <= planner.available for change in proof.changes)


def test_a_hopeless_step_is_not_compiled_but_what_is_suggested():
    proof, _, compiler, _ = proved(16384)
    assert not proof.fits and values(proof)["step"].value == "not compiled"
    # The first guess knows nothing yet of the compiler, the second does.
    assert 1 <= len(compiler.compiled) <= 2
    assert any(row.name.endswith(", memory") for row in proof.rows)


def test_a_suggestion_that_is_refused_is_followed_by_another():
    # The device gives less than its table says.
    proof, _, compiler, _ = proved(16384, limit=7e9)
    choices = [asked["choice"] for asked in compiler.compiled]
    assert len(choices) > 1 and len(set(choices)) == len(choices)
    assert not proof.fits


def test_an_estimate_that_is_too_high_is_corrected(monkeypatch):
    monkeypatch.setitem(globals(), "GROWN", 0.8)
    options, _ = opened(8)
    planner = Planner(options, 10_000, parse_target("v5e-1"))
    largest = planner.largest_batch(planner.choice)
    above = int(1.15 * largest) // 8 * 8
    assert not Planner(opened(above)[0], 10_000, parse_target("v5e-1")).fits
    proof, *_ = proved(above)
    assert proof.fits


@pytest.mark.parametrize("grown", [0.7, 1.0, 1.4])
def test_a_search_finds_the_largest_batch(grown, monkeypatch):
    monkeypatch.setitem(globals(), "GROWN", grown)
    proof, planner, compiler, _ = proved(64, search=True)
    row = values(proof)["largest of a device in one piece, model.remat=none"]
    memory = planner.target.device.memory * 1e9

    def fits(share):
        estimated = planner.memory(batch_size=share)
        return estimated.total + (grown - 1) * estimated.activations <= memory

    truth = max(share for share in range(8, 65536, 8) if fits(share))
    assert row.how == "compiled" and row.value % 8 == 0
    assert truth / 1.1 < row.value <= truth
    assert row.value in [asked["share"] for asked in compiler.compiled]
    assert len(compiler.compiled) <= 7


def test_a_search_with_groups_of_a_mixture():
    proof, _, compiler, _ = proved(
        60, search=True, mixing=make_mixing(mixup_alpha=0.2, group_size=12)
    )
    assert all(asked["share"] % 12 == 0 for asked in compiler.compiled)
    assert values(proof)["largest of a device in one piece, model.remat=none"].value % 24 == 0


def test_an_evaluation_has_room_beside_the_optimizer():
    proof, planner, compiler, _ = proved(64, judge=True)
    rows = values(proof)
    assert proof.fits and not proof.evaluation
    assert rows["evaluation, images of a device"].value == 1024
    assert compiler.compiled[-1] == {"share": 1024}
    beside = planner.state().optimizer / 1e9
    assert f"{rows['evaluation, memory'].value + beside:.2f}" in rows["evaluation, memory"].note


def test_an_evaluation_without_room_is_told_a_batch_that_has():
    proof, *_ = proved(64, judge=True, limit=0.9e9)
    assert not proof.fits
    note = values(proof)["evaluation, memory"].note
    assert "--config.input.eval_batch_size=" in note and note.endswith(proof.evaluation)
    batch = int(note.rpartition("=")[2])
    assert 8 <= batch < 1024 and batch % 8 == 0


@pytest.mark.parametrize("target", ["8xH100", "1xRTX4090"])
def test_cards_have_no_compiler_here(target):
    with pytest.raises(ConfigError, match=r"--compile .*TPU v5e.* cpu"):
        proved(64, target)


def test_divided_state_is_not_compiled():
    with pytest.raises(ConfigError, match="shard_state"):
        proved(64, "2xcpu", shard_state=True)


def test_estimates_without_the_compiler_are_as_before():
    planner = Planner(opened(64)[0], 10_000, parse_target("v5e-1"))
    assert planner.correction == 1 and planner.need() == planner.memory().total
    assert math.isfinite(planner.available)
