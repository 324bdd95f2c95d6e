"""Goodput: which share of a run's wall time went into steps that count.

Pure functions over records, one for each start of a run; `starts` writes and reads them. The
definition is that of Google's ML Goodput Measurement
(https://docs.cloud.google.com/tpu/docs/goodput): productive time is the time in steps whose
progress was preserved, and goodput is productive time / all time that has elapsed since the job
first started. Here:

- A step *counts* if what it did is in the weights now. The steps that a start trained after the
  checkpoint from which a later start went on do not count: they were trained again.
- Time in steps leaves out the first call of each start, which compiles, and the time in which the
  host waited for input. An accelerator works on while the host waits, so with a slow input the true
  goodput lies between what is told and what is told plus "input_stall".
- Wall time is the time within starts plus the time between them. After a start that was *done*
  nobody wants the run to go on, so the time until a later start (say with a larger total_steps) is
  not counted, and that start is no restart.
- A start begins when `train` is called. Python's start and the import of TensorFlow, some seconds,
  fall between two starts, and those of the first start are not counted.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

# What a start spends its time on. At each moment the time goes to one of these, so their sum is the
# length of the start.
KINDS = (
    "checking",  # the config; opening the data
    "meeting",  # waiting for the other hosts, and for the lock of the workdir
    "restoring",  # finding, proving and reading the checkpoint
    "building",  # devices, model, optimizer, input
    "compiling",  # the first call of the step, which traces, compiles and runs it, on all hosts
    "steps",
    "input_stall",  # within steps the host waited for a batch
    "saving",  # as far as training stood still for it; a thread writes while training goes on
    "evaluating",
    "drawing",  # as far as training stood still for pictures, at its end until they are there
    "profiling",  # writing what config.profile asks for
    "ending",  # waiting for the other hosts, writing and closing files
)
DONE = "done"


@dataclasses.dataclass(frozen=True)
class StartRecord:
    """What is known of one start of a run; one line of starts.jsonl.

    Attributes:
      start: its number, from 0.
      began: Unix time, seconds.
      until: Unix time of this record: when the start ended, or was last heard of.
      reason: "done", "stopped: SIGTERM", the class of an error; None while it runs, and for ever if
        the process was killed.
      hosts, replicas: over the whole run; None before the devices are there.
      first_step: steps that had been done when it began; None before that is known.
      last_step: steps that have been done; None as first_step.
      seconds: kind of KINDS -> seconds; a kind without time may be absent.
    """

    start: int
    began: float
    until: float
    reason: str | None = None
    hosts: int | None = None
    replicas: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps it has trained."""
        if self.first_step is None or self.last_step is None:
            return 0
        return self.last_step - self.first_step

    def to_line(self) -> str:
        """The record as a line of JSON."""
        fields = dataclasses.asdict(self)
        # A millisecond is exact enough, and seventeen digits are hard to read.
        fields |= {name: round(fields[name], 3) for name in ("began", "until")}
        fields["seconds"] = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return json.dumps(fields) + "\n"


def read_records(text: str) -> list[StartRecord]:
    """The records in the text of starts.jsonl, in order; of each start the last line counts.

    A line that a kill has torn, and one that is no record, is passed over.
    """
    names = {field.name for field in dataclasses.fields(StartRecord)}
    found: dict[int, StartRecord] = {}
    for line in text.split("\n"):
        try:
            # Fields that a newer version may have added are left out.
            record = StartRecord(**{k: v for k, v in json.loads(line).items() if k in names})
            record.to_line()  # fails where a value is of the wrong type
            found[int(record.start)] = record
        except (ValueError, TypeError, AttributeError):
            continue
    return [found[number] for number in sorted(found)]


def counted_steps(records: Sequence[StartRecord]) -> list[int]:
    """For each start, how many of its steps are in the weights now."""
    counted = [0] * len(records)
    # (index, first step, last step) of the starts that got as far as to know them.
    trained = [
        (i, record.first_step, record.last_step)
        for i, record in enumerate(records)
        if record.first_step is not None and record.last_step is not None
    ]
    # Backwards from the newest step: from each start to the one that made the checkpoint it began
    # with, which is the last start before it that began below that step and reached it.
    needed = trained[-1][2] if trained else 0
    while earlier := [each for each in trained if each[1] < needed]:
        # Where none has reached it, the last lines of a start were lost, as in a bucket, which gets
        # them every 30 s only: then it was the last one that began below that step.
        maker = ([each for each in earlier if each[2] >= needed] or earlier)[-1]
        index, first, _ = maker
        counted[index] = needed - first
        needed = first
        trained = trained[: trained.index(maker)]
    return counted


class Goodput(NamedTuple):
    """How well a run has used its time, see the module.

    Attributes:
      share: seconds of steps that count / wall seconds since the first start; in [0, 1].
      share_running: the same, the time between starts left out.
      restarts: how many starts followed one that was not done.
      lost_steps: steps that were trained and do not count.
      wall: seconds since the first start.
      between: those of them in which nothing ran.
      counted: seconds of steps that count.
    """

    share: float
    share_running: float
    restarts: int
    lost_steps: int
    wall: float
    between: float
    counted: float


def measure(records: Sequence[StartRecord]) -> Goodput:
    """The goodput of a run from the records of its starts, of which there is at least one."""
    counted, lost = 0.0, 0
    for record, steps in zip(records, counted_steps(records), strict=True):
        lost += max(record.steps - steps, 0)
        # The steps of a start take equally long, so those that count take their share of the time.
        # Of a start whose last lines are lost more steps may count than it has told of.
        share = min(steps / record.steps, 1.0) if record.steps else 0.0
        # A start that ended before its first step has spent no time on steps.
        counted += share * record.seconds.get("steps", 0.0)
    between, restarts = 0.0, 0
    for before, after in itertools.pairwise(records):
        if before.reason != DONE:
            restarts += 1
            # Never less than nothing: a restart on another machine may have another clock.
            between += max(after.began - before.until, 0.0)
    running = sum(record.until - record.began for record in records)
    wall = max(running + between, 1e-9)
    return Goodput(
        share=min(counted / wall, 1.0),
        share_running=min(counted / max(running, 1e-9), 1.0),
        restarts=restarts,
        lost_steps=lost,
        wall=wall,
        between=between,
        counted=counted,
    )


def summary(records: Sequence[StartRecord]) -> str:
    """One line for people: "goodput 93.1% (96.0% while it ran), 2 restarts, 40 steps lost"."""
    found = measure(records)
    text = f"goodput {found.share:.1%}"
    if found.restarts:
        text += f" ({found.share_running:.1%} while it ran)"
    text += f", {found.restarts} restart{'' if found.restarts == 1 else 's'}"
    if found.lost_steps:
        text += f", {found.lost_steps} steps trained again"
    # The three largest of what took the rest: where to look first.
    spent = {kind: 0.0 for kind in KINDS if kind != "steps"}
    for record in records:
        for kind in spent:
            spent[kind] += record.seconds.get(kind, 0.0)
    spent["between starts"] = found.between
    most = sorted(spent.items(), key=lambda item: -item[1])[:3]
    rest = [f"{k.replace('_', ' ')} {v / found.wall:.1%}" for k, v in most if v / found.wall > 5e-4]
    return text + (f"; {', '.join(rest)}" if rest else "")


def table(records: Sequence[StartRecord]) -> list[dict[str, str | float | None]]:
    """A row for each start: number, reason, hosts, replicas, steps, and seconds by kind.

    "killed" is a start that left no reason and was followed by another one; "running" the last one
    without a reason, which may have been killed as well. "counted" and "lost" are numbers of steps.
    """
    rows: list[dict[str, str | float | None]] = []
    for record, steps in zip(records, counted_steps(records), strict=True):
        silent = "running" if record is records[-1] else "killed"
        rows.append(
            {
                "start": record.start,
                "reason": record.reason or silent,
                "hosts": record.hosts,
                "replicas": record.replicas,
                "first_step": record.first_step,
                "last_step": record.last_step,
                "counted": steps,
                "lost": max(record.steps - steps, 0),
                "seconds": round(record.until - record.began, 1),
                **{kind: round(record.seconds.get(kind, 0.0), 1) for kind in KINDS},
            }
        )
    return rows


def format_table(records: Sequence[StartRecord]) -> str:
    """`table` as text with columns of equal width, and `summary` below it."""
    rows = table(records)
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([*lines, summary(records)])


def _cell(value: str | float | None) -> str:
    return "-" if value is None else str(value)


class Spending:
    """Divides time among KINDS: at each moment it goes to one of them.

    Args:
      clock: seconds, from any beginning.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = KINDS[0], clock()

    def switch(self, kind: str) -> str:
        """From now on time goes to `kind`; returns the kind before."""
        if kind not in self._seconds:
            raise ValueError(f"{kind!r} is none of {KINDS}")
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """The time within the `with` goes to `kind`."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def stalled(self, seconds: float) -> None:
        """So many seconds of "steps" so far were spent waiting for input."""
        self.switch(self._kind)  # takes in what has passed until now
        # A clock of TensorFlow's measured the stall, so it may seem longer than the whole.
        moved = min(max(seconds, 0.0), self._seconds["steps"])
        self._seconds["steps"] -= moved
        self._seconds["input_stall"] += moved

    def seconds(self) -> dict[str, float]:
        """Kind -> seconds until now, of those kinds that took any."""
        self.switch(self._kind)
        return {kind: value for kind, value in self._seconds.items() if value > 0}
