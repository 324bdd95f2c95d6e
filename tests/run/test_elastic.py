"""The global batch cut up for another number of replicas than a run began with."""

import pytest
from etils import epath

from tests.support.tiny import arrays, assert_same, make, without_evaluation
from vit_dist.config.errors import ConfigError
from vit_dist.run.check import check
from vit_dist.run.elastic import cut_batch
from vit_dist.run.start import Start
from vit_dist.train import train
from vit_dist.training.checkpoint import Checkpoint, open_checkpoint


def start_of(how="resume", *, accumulation=1, micro_batch=None):
    notes = {"config": {"step": {"accumulation": accumulation}}}
    if micro_batch:
        notes["micro_batch"] = micro_batch
    return Start(how, Checkpoint(epath.Path("run"), 5, notes, {}))


def cut(batch, replicas, start, **changed):
    options, _ = check(without_evaluation(input__batch_size=batch, **changed))
    return cut_batch(options, start, num_replicas=replicas)


MIXED = {"mixing__mixup_alpha": 0.5}  # in groups of two


@pytest.mark.parametrize(
    ("batch", "first", "accumulation", "changed", "expected"),
    [
        # The first start had `first` replicas; then (replicas, micro-batches for each).
        (12, 3, 1, {}, [(3, 1), (2, 2), (1, 3), (4, 1), (6, 1), (12, 1)]),
        (12, 3, 2, {}, [(3, 2), (2, 3), (1, 6), (4, 3), (6, 1)]),
        (24, 3, 1, MIXED, [(2, 2), (1, 3), (4, 1), (12, 1)]),
        (1024, 8, 4, {}, [(8, 4), (4, 8), (16, 2), (64, 1), (1, 32)]),
        # 20 for each of two do not divide into parts of 8: it takes parts of 5, not of 10.
        (40, 5, 1, {}, [(2, 4), (1, 5), (4, 2)]),
    ],
)
def test_micro_batches_grow_no_larger(batch, first, accumulation, changed, expected):
    changed = {**changed, "step__accumulation": accumulation}
    largest = cut(batch, first, Start("scratch", None), **changed).micro_batch
    assert largest == batch // (first * accumulation)
    start = start_of(accumulation=accumulation, micro_batch=largest)
    for replicas, parts in expected:
        found = cut(batch, replicas, start, **changed)
        assert (found.accumulation, found.micro_batch) == (parts, largest), replicas
        size = batch // (replicas * parts)
        assert size <= largest and size * replicas * parts == batch
        assert bool(found.note) == (parts != accumulation)
        assert f"{parts} micro-batches of {size}" in found.note or not found.note


def test_what_the_user_changes_counts():
    """A step.accumulation other than the run's is taken as it is, also for the starts after it."""
    start = start_of(accumulation=1, micro_batch=4)
    assert cut(12, 2, start, step__accumulation=3)[:2] == (3, 2)
    with pytest.raises(ConfigError, match=r"12 is not divisible by 2 replicas x 4 micro-batches"):
        cut(12, 2, start, step__accumulation=4)


@pytest.mark.parametrize(
    "start", [Start("scratch", None), start_of("resume_from", micro_batch=2), start_of("resume")]
)
def test_where_nothing_is_known_the_config_counts(start):
    assert cut(12, 2, start)[:2] == (1, 6)


@pytest.mark.parametrize(
    ("replicas", "changed", "said"),
    [
        (5, {}, "12 examples cannot be divided among 5 replicas: go on with 4 or 6 replicas"),
        (13, {}, "go on with 12 replicas"),
        (4, MIXED, "among 4 replicas in whole groups of mixing.group_size=2: go on with 3 or 6 "),
    ],
)
@pytest.mark.parametrize("micro_batch", [4, None])
def test_a_batch_that_does_not_come_out_even(replicas, changed, said, micro_batch):
    with pytest.raises(ConfigError) as error:
        cut(12, replicas, start_of(micro_batch=micro_batch), **changed)
    assert said in str(error.value) and "config.resume_from" in str(error.value)


def test_groups_that_have_grown_since():
    grown = {**MIXED, "mixing__group_size": 4}
    assert cut(24, 3, start_of(micro_batch=2), **grown)[:2] == (2, 2)


# Of hosts that come back: tests/cluster/test_elastic.py.
@pytest.mark.parametrize("starts", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_two_replicas_then_one_then_two(starts, tmp_path, capsys):
    """The same weights as on one device all the time; dropout's masks depend on the replica."""
    one = {"model__dropout": 0.0, "optimizer__name": "sgd", "mixing__mixup_alpha": 0.5}
    one |= {"step__ema_decay": 0.9, "total_steps": 2 * starts}
    two = {**one, "strategy__name": "mirrored", "strategy__virtual_cpus": 2}
    train(without_evaluation(**one), str(tmp_path / "whole"))
    capsys.readouterr()
    # Its schedule is constant, so that an end at another step changes nothing before it.
    turns = ((2, two, ""), (4, one, "in 2 micro"), (6, two, ""))[:starts]
    for steps, devices, parts in turns:
        train(without_evaluation(**{**devices, "total_steps": steps}), str(tmp_path / "parts"))
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "replica(s) on CPU" in x]
        assert parts in line and ("micro" in line) == bool(parts)
        assert open_checkpoint(str(tmp_path / "parts")).notes["micro_batch"] == 8
    assert_same(arrays(tmp_path / "parts"), arrays(tmp_path / "whole"), atol=1e-5)


def test_a_change_before_the_devices_start():
    """What is wrong whatever the number of replicas dies with the config."""
    with pytest.raises(ConfigError, match="16 is not divisible by 1 replicas x 3 micro-batches"):
        check(make(step__accumulation=3))
