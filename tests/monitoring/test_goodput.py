"""Goodput from records of starts, against numbers worked out by hand."""

import pytest

from vit_dist.monitoring.goodput import (
    KINDS,
    Spending,
    StartRecord,
    counted_steps,
    format_table,
    measure,
    read_records,
    summary,
    table,
)


def run(*starts, gap=10.0):
    """Records of (first step, last step, reason); a step takes 1 s, all else of a start 5 s."""
    records, now = [], 1000.0
    for number, (first, last, reason) in enumerate(starts):
        steps = 0 if first is None else last - first
        seconds = {"compiling": 2.0, "building": 3.0, "steps": float(steps)}
        until = now + 5 + steps
        records.append(
            StartRecord(
                start=number,
                began=now,
                until=until,
                reason=reason,
                hosts=1,
                replicas=2,
                first_step=first,
                last_step=last,
                seconds=seconds,
            )
        )
        now = until + gap
    return records


# (first step, last step, reason) of each start -> how many of its steps count.
LINEAGES = [
    ([(0, 40, "done")], [40]),
    # Killed at 55, saved at 40: the last 15 are trained again.
    ([(0, 55, None), (40, 100, "done")], [40, 60]),
    # Nothing was saved yet.
    ([(0, 9, None), (0, 100, "done")], [0, 100]),
    # A start that failed before it knew its first step, and one that trained nothing.
    (
        [(0, 50, None), (None, None, "StorageError"), (40, 40, None), (40, 60, "done")],
        [40, 0, 0, 20],
    ),
    # The third goes back behind the second: its checkpoint, and that of the first at 80, are gone.
    ([(0, 85, None), (80, 90, None), (60, 100, "done")], [60, 0, 40]),
    # The second could read no later checkpoint than 50 and saved none; then 100 is there again.
    ([(0, 100, None), (50, 60, None), (100, 120, "done")], [100, 0, 20]),
    # 40 was saved twice; what the later start wrote is what counts.
    ([(0, 45, None), (20, 45, None), (40, 50, "done")], [20, 20, 10]),
    # The last lines of the first start are lost: it had got to 40, and told of 30.
    ([(0, 30, None), (40, 50, "done")], [40, 10]),
    # A run that goes on from another run's step 100.
    ([(100, 130, None), (120, 140, "done")], [20, 20]),
    # Still running: all of it counts until something is lost.
    ([(0, 50, None), (40, 60, None)], [40, 20]),
    ([(None, None, None)], [0]),
]


@pytest.mark.parametrize(("starts", "counted"), LINEAGES)
def test_steps_that_count(starts, counted):
    assert counted_steps(run(*starts)) == counted


def test_measure():
    """40 of 55 steps and 60 of 60 count: 100 s of 5 + 55 + 10 + 5 + 60."""
    found = measure(run((0, 55, None), (40, 100, "done")))
    assert found.wall == 135 and found.between == 10 and found.counted == pytest.approx(100)
    assert found.share == pytest.approx(100 / 135)
    assert found.share_running == pytest.approx(100 / 125)
    assert (found.restarts, found.lost_steps) == (1, 15)


def test_what_comes_after_done_is_no_restart():
    """Nobody wanted the run to go on in the 10,000 s between."""
    found = measure(run((0, 40, "done"), (40, 80, "done"), gap=10_000.0))
    assert (found.restarts, found.wall, found.counted) == (0, 90, 80)


def test_a_restart_on_a_machine_whose_clock_is_slow():
    found = measure(run((0, 40, None), (40, 80, "done"), gap=-30.0))
    assert found.between == 0 and found.wall == 90 and 0 < found.share < 1


def test_lines_that_are_lost_do_not_give_more_than_all():
    found = measure(run((0, 30, None), (40, 50, "done")))
    assert found.counted == 40 and found.lost_steps == 0


def test_summary_and_table():
    records = run((0, 55, None), (None, None, "StorageError"), (40, 100, "done"))
    assert summary(records) == (
        "goodput 66.7% (76.9% while it ran), 2 restarts, 15 steps trained again; "
        "between starts 13.3%, building 6.0%, compiling 4.0%"
    )
    rows = table(records)
    assert [row["reason"] for row in rows] == ["killed", "StorageError", "done"]
    assert [(row["counted"], row["lost"]) for row in rows] == [(40, 15), (0, 0), (60, 0)]
    assert [row["seconds"] for row in rows] == [60, 5, 65]
    assert set(KINDS) < set(rows[0])
    lines = format_table(records).splitlines()
    assert len(lines) == 5 and lines[-1] == summary(records)
    assert lines[0].split()[:3] == ["start", "reason", "hosts"]
    assert lines[2].split()[:5] == ["1", "StorageError", "1", "2", "-"]
    assert summary(run((0, 40, "done"))).startswith("goodput 88.9%, 0 restarts; building")
    assert table(run((0, 40, None)))[0]["reason"] == "running"


def test_lines_are_read_as_they_were_written():
    records = run((0, 55, None), (40, 100, "done"))
    assert read_records("".join(r.to_line() for r in records)) == records


def test_the_last_whole_line_of_a_start_counts():
    early, late = run((0, 5, None))[0], run((0, 50, None))[0]
    torn = late.to_line()[:70]
    foreign = '[1]\n{"start": 0}\n{"other": 1}\n\n{"start": 0, "began": "x", "until": 0}\nnull\n'
    text = early.to_line() + late.to_line() + foreign + torn
    assert read_records(text) == [late]
    newer = late.to_line().replace('"reason"', '"a newer field": 1, "reason"')
    assert read_records(newer) == [late]


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def test_spending_divides_all_time():
    clock = Clock()
    spending = Spending(clock)
    for kind, seconds in (("meeting", 1), ("building", 2), ("steps", 4)):
        clock.now += seconds  # goes to the kind before
        spending.switch(kind)
    with spending.on("saving"):
        clock.now += 8
    with pytest.raises(ZeroDivisionError), spending.on("evaluating"):
        clock.now += 16
        raise ZeroDivisionError
    clock.now += 32
    expected = {"checking": 1, "meeting": 2, "building": 4, "saving": 8, "evaluating": 16}
    assert spending.seconds() == {**expected, "steps": 32}
    spending.stalled(12.0)
    assert spending.seconds() == {**expected, "steps": 20, "input_stall": 12}
    # No more than there was, and a clock that goes back takes nothing away.
    spending.stalled(1000.0)
    spending.stalled(-1.0)
    assert spending.seconds() == {**expected, "input_stall": 32}
    with pytest.raises(ValueError, match="'sleeping' is none of"):
        spending.switch("sleeping")
