"""When a training logs, saves and evaluates, and how many steps one call runs."""

import pytest

from vit_dist.run.calendar import Calendar, Pace

EVENTS = {
    "all at their own time": (
        Calendar(total=12, log=4, save=6, evaluate=5),
        {"log": [4, 8, 12], "save": [6, 12], "evaluate": [5, 10]},
    ),
    "only at the end": (
        Calendar(total=3, log=0, save=0, evaluate=0),
        {"log": [3], "save": [3], "evaluate": []},
    ),
    "each step": (
        Calendar(total=3, log=1, save=1, evaluate=1),
        {"log": [1, 2, 3], "save": [1, 2, 3], "evaluate": [1, 2]},
    ),
    "longer than the run": (
        Calendar(total=3, log=50, save=50, evaluate=50),
        {"log": [3], "save": [3], "evaluate": []},
    ),
    "with figures": (
        Calendar(total=7, log=7, save=0, evaluate=0, draw=3),
        {"log": [7], "save": [7], "evaluate": [], "draw": [3, 6, 7]},
    ),
}


@pytest.mark.parametrize("calendar, events", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_events(calendar, events, first):
    """From any first step a run that goes from event to event meets all that are behind it."""
    step, met = first, {"log": [], "save": [], "evaluate": [], "draw": []}
    while step < calendar.total:
        n = calendar.steps_to_event(step)
        assert n >= 1
        step += n
        for name, due in (
            ("log", calendar.logs_at(step)),
            ("save", calendar.saves_at(step)),
            ("evaluate", calendar.evaluates_at(step)),
            ("draw", calendar.draws_at(step)),
        ):
            if due:
                met[name].append(step)
        assert any(step in steps for steps in met.values()), "a stop for nothing"
    events = {"draw": [], **events}
    assert met == {name: [s for s in steps if s > first] for name, steps in events.items()}


def test_nothing_is_due_before_the_first_step():
    calendar = Calendar(total=5, log=1, save=1, evaluate=1)
    assert not (calendar.logs_at(0) or calendar.saves_at(0) or calendar.evaluates_at(0))


def run(pace, per_step, *, calls, compiling=100.0):
    sizes = []
    for _ in range(calls):
        n = pace.limit
        pace.done(n, (compiling if not sizes else 0) + n * per_step)
        sizes.append(n)
    return sizes


@pytest.mark.parametrize(
    "per_step, sizes",
    [
        (1e-4, [1, 2, 4, 8, 16, 32, 64, 128, 256]),  # grows
        (1.0, [1, 2, 4, 8, 10, 10]),  # up to the limit of 10 s
        (30.0, [1, 2, 1, 1]),  # one that takes longer by itself
    ],
)
def test_calls_end_within_the_limit(per_step, sizes):
    assert run(Pace(10.0), per_step, calls=len(sizes)) == sizes


def test_a_slow_call_is_remembered_for_the_next_two():
    pace = Pace(10.0)
    run(pace, 0.01, calls=12)
    fast = pace.limit
    pace.done(fast, 10.0 * fast)
    assert pace.limit == 1
    pace.done(1, 0.01)
    assert pace.limit == 1
    pace.done(1, 0.01)
    assert pace.limit == 2


def test_calls_end_at_looks_and_where_a_profile_begins_and_ends():
    calendar = Calendar(total=20, log=0, save=0, evaluate=0, watch=8, bounds=(5, 6, 7))
    step, ends = 0, []
    while step < calendar.total:
        step += calendar.steps_to_event(step)
        ends.append(step)
    assert ends == [5, 6, 7, 8, 16, 20]
    assert [end for end in ends if calendar.watches_at(end)] == [8, 16]
