"""A run that stands still is noticed, and the hosts that are behind are named."""

import re
import sys
import threading
import time
import types

import pytest

from tests.support import processes
from tests.support.clusters import free_addresses, in_threads
from tests.support.waiting import pause, wait_for
from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.meeting import meet
from vit_dist.cluster.watchdog import Limits, State, Watchdog, find_stuck

# how long a stretch of work may take


@pytest.mark.parametrize(
    "seconds, limit",
    [
        ([], 1800.0),
        ([100.0, 1.0], 1800.0),  # too few to learn from
        ([100.0, 1.0, 2.0], 600.0),  # never less: storage may have to come back
        ([100.0, 1.0, 70.0, 2.0], 700.0),  # ten times the slowest, the first left out: it compiles
        ([1.0, 1.0, 1000.0], 1800.0),  # never more
    ],
)
def test_limits_are_learned(seconds, limit):
    limits = Limits(1800.0)
    for length in seconds:
        limits.note("train", length)
    assert limits.of("train") == limit
    assert limits.of("save") == 1800.0


def test_the_timeout_counts_where_it_is_shorter():
    """But not for what compiles: a slow machine needs more than that."""
    limits = Limits(20.0)
    for _ in range(3):
        assert limits.of("train") == 600.0
        limits.note("train", 1.0)
    assert limits.of("train") == 20.0


# who is stuck

ON = State(turns=5, waiting=1.0, limit=300.0)
STILL = State(turns=5, waiting=301.0, limit=300.0)


@pytest.mark.parametrize(
    "states, stuck",
    [
        ([ON, ON], None),
        ([STILL, ON], None),
        # The chief saves for long, within the limit of a save: the other waits for it rightly.
        ([STILL._replace(turns=4, limit=1800.0), STILL], None),
        ([STILL, STILL._replace(turns=4)], [1]),
        ([STILL, STILL], []),
        ([STILL, ON._replace(silent=301.0)], [1]),
        ([STILL, ON._replace(silent=299.0)], None),
        ([STILL, ON._replace(end="no space left")], [1]),
        ([STILL, STILL._replace(end="")], []),  # it was done and has left
        ([ON, ON._replace(end="no space left")], None),
        ([STILL, ON._replace(silent=400.0), ON._replace(end="x")], [2]),
    ],
)
def test_who_keeps_the_others_waiting(states, stuck):
    assert find_stuck(states) == stuck


# hosts that are threads


def watch_in_threads(function, count=2, timeout=60.0):
    """Runs function(index, watchdog) on each host; index -> what it returned, or its error."""
    workers = free_addresses(count)

    def one(index):
        cluster = Cluster(tuple(workers), index, "TF_CONFIG")
        with (
            meet(cluster, timeout_seconds=60) as meeting,
            Watchdog(meeting, timeout_seconds=timeout, patience_seconds=0.1) as watchdog,
        ):
            return function(index, watchdog)

    return workers, in_threads(one, range(count))


@pytest.fixture
def quick(monkeypatch):
    """Beats follow each other fast, and a verdict is kept instead of ending the process."""
    monkeypatch.setattr("vit_dist.cluster.watchdog.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("vit_dist.cluster.watchdog._SILENT_SECONDS", 0.3)
    verdicts = {}
    done = threading.Barrier(2, timeout=90)

    def leave(text):
        verdicts.setdefault(threading.current_thread(), text)

    monkeypatch.setattr("vit_dist.cluster.watchdog.leave", leave)
    return verdicts, done


def test_the_host_that_is_behind_is_named(quick):
    """Both come to step 7; then host 1 does not begin the next turn."""
    verdicts, done = quick

    def run(index, watchdog):
        for step in range(8 - index):
            watchdog.progress(step)
        wait_for(lambda: len(verdicts) == 2)
        done.wait()

    workers, outcome = watch_in_threads(run, timeout=0.5)
    assert outcome == {0: None, 1: None}
    for text in verdicts.values():
        assert re.match(
            r"the run has stood still at step [67] for \d+ s: behind is worker 1 ", text
        )
        said = rf"\({workers[1]}\), at step 6 in train for \d+ s; waiting: worker 0 \("
        assert re.search(said, text)
        assert text.endswith("raise strategy.timeout_seconds (0.5)")


def test_a_run_that_gets_on_is_left_alone(quick):
    verdicts, done = quick

    def run(index, watchdog):
        for step in range(100):
            watchdog.progress(step)
            done.wait()
        # Longer than the other host may train, but a save may take longer.
        if index == 0:
            watchdog.progress(100, "the save")
            pause(0.5)
        done.wait()

    _, outcome = watch_in_threads(run, timeout=20.0)
    assert outcome == {0: None, 1: None} and not verdicts


@pytest.mark.parametrize("leaving", [0, 1])
def test_the_last_words_of_a_host_are_told(quick, leaving):
    def run(index, watchdog):
        watchdog.progress(3)
        if index == leaving:
            raise OSError("no space left on device")
        return watchdog.lost(20)

    workers, outcome = watch_in_threads(run)
    said = f"worker {leaving} ({workers[leaving]}) ended: no space left on device"
    assert outcome[1 - leaving] == said


def test_a_third_host_hears_of_it_from_the_chief(quick):
    def run(index, watchdog):
        watchdog.progress(3)
        if index == 1:
            raise OSError("no space left on device")
        raise OSError(f"lost {watchdog.lost(20)}")

    workers, outcome = watch_in_threads(run, count=3)
    assert f"worker 1 ({workers[1]}) ended: no space left" in str(outcome[2])


def test_nobody_is_blamed_without_a_reason(quick):
    _, done = quick

    def run(index, watchdog):
        said = watchdog.lost(0.2)
        done.wait()
        return said

    _, outcome = watch_in_threads(run)
    assert set(outcome.values()) == {None}


def watch_alone(act, timeout=0.5):
    """Runs act(watchdog) on a host that is alone."""
    with (
        meet(None, timeout_seconds=1) as meeting,
        Watchdog(meeting, timeout_seconds=timeout, patience_seconds=0.1) as watchdog,
    ):
        for step in range(4):  # enough to learn from
            watchdog.progress(step, "the save")
        act(watchdog)


def test_a_host_that_is_alone_is_watched(quick):
    verdicts, _ = quick
    before = threading.active_count()
    watch_alone(lambda watchdog: wait_for(lambda: verdicts))
    (text,) = verdicts.values()
    assert "at step 3 for" in text and "hangs in the save. Above you see" in text
    assert threading.active_count() == before and "worker" not in text


def test_nobody_watches_over_a_notebook(quick, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = threading.active_count()

    def act(watchdog):
        assert threading.active_count() == before and watchdog.lost() is None

    watch_alone(act)


def test_a_process_that_was_stopped_has_not_stood_still(quick, monkeypatch):
    """As by Ctrl-Z: the clock goes on, no thread runs."""
    verdicts, _ = quick
    ahead = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("vit_dist.cluster.watchdog.time", clock)

    def act(watchdog):
        ahead[0] = 1000.0
        wait_for(lambda: watchdog._pauses)
        for state in watchdog._states():
            assert state.waiting < 500

    watch_alone(act, timeout=500.0)
    assert not verdicts


def test_pauses_before_the_present_stretch_are_forgotten(quick, monkeypatch):
    """In a run of weeks they would pile up."""
    ahead = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("vit_dist.cluster.watchdog.time", clock)

    def act(watchdog):
        for turn in range(3):
            began = clock.monotonic()
            watchdog.progress(turn)
            ahead[0] += 1000.0
            wait_for(lambda began=began: any(end > began for end, _ in watchdog._pauses))
            assert all(end > began for end, _ in watchdog._pauses)

    watch_alone(act, timeout=5000.0)


# the process ends


def be_stuck(address, index):
    with (
        meet(Cluster(tuple(address), index, "TF_CONFIG"), timeout_seconds=60) as meeting,
        Watchdog(meeting, timeout_seconds=4.0) as watchdog,
    ):
        for _ in range(4):  # enough to learn from
            watchdog.progress(17)
        if index == 0:
            watchdog.progress(18)
        threading.Event().wait()


def test_a_stuck_process_says_where_its_threads_are_and_ends(tmp_path):
    workers = free_addresses(2)
    outcome = in_threads(
        lambda i: processes.call(be_stuck, workers, i, log=tmp_path / str(i)), range(2)
    )
    for code, text in outcome.values():
        assert code == 1
        assert "be_stuck" in text[: text.index("error: ")] and "Traceback" not in text
        (message,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert f"behind is worker 1 ({workers[1]}), at step 17 in train" in message
