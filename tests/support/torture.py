"""Runs of two hosts under the supervisor that are disturbed, start after start, by a table's cells.

A cell is a fault, the host that it hits, and what that host does just then. A chain is one run that
suffers its cells one after the other: each start of the hosts goes on from the newest checkpoint
and meets the next cell. A chain passes if it ends with the bits of a run that was not disturbed,
and no start ever began at zero.
"""

import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support import processes, tiny
from tests.support.clusters import free_addresses
from tests.support.forking import supervise
from tests.support.supervision import children_of
from tests.support.tortured import FASTER, FAULTS, MISSING, PHASES, SAVE_STEPS
from tests.support.waiting import pause
from vit_dist.training.checkpoint import open_checkpoint

HOSTS = ("chief", "other")
TOTAL = 160  # steps; a start takes some eight of them until its fault
HANGS = 150  # seconds in which nothing happens, until a chain counts as hung
# What a run computes; PLAIN takes a third less time to begin.
RICH = (
    "--config.model.dropout=0.1",
    "--config.step.ema_decay=0.9",
    "--config.mixing.mixup_alpha=0.2",
)
PLAIN = ("--config.model.dropout=0",)
FLAGS = (
    f"--config={processes.TINY}",
    "--config.log_steps=2",
    f"--config.save_steps={SAVE_STEPS}",
    f"--config.eval_steps={SAVE_STEPS}",
    "--config.input.eval_batch_size=60",
    "--config.model.depth=1",
    # The first is allowed for what compiles, also on a machine that is busy otherwise.
    "--config.strategy.timeout_seconds=45",
    "--config.strategy.patience_seconds=10",
)
# A host that fails leaves the others 6 s.
SUPERVISION = ("--program=tests.support.tortured", "--backoff=0", "--grace=6")


class Cell(NamedTuple):
    fault: str
    host: int
    phase: str

    @property
    def name(self):
        return f"{self.fault}, {HOSTS[self.host]}, {self.phase}"

    @property
    def senseless(self):
        """Why there is no such cell; "" where there is."""
        if self.fault == "disk full" and self.host:
            return "only the chief writes files"
        if self.fault == "network cut" and self.host:
            return "as for the chief: a cut has two ends"
        if self.fault == MISSING and self.phase != PHASES[0]:
            return "only before all phases"
        if self.fault == FASTER and self != (FASTER, 0, "save"):
            return "only the chief saves"
        return ""


class Outcome(NamedTuple):
    """What came of a cell.

    Attributes:
      cell: see Cell.
      what: "bit-equal", or what was wrong.
      seconds: from the fault to the supervisor's first word about it.
      restarts: until the next cell, or the end.
      message: of the host that told of it first, as a person reads it.
    """

    cell: Cell
    what: str
    seconds: float
    restarts: int
    message: str


CELLS = [c for c in itertools.starmap(Cell, itertools.product(FAULTS, range(2), PHASES))]


class Run:
    """A run of two hosts under the supervisor; ends with the test's `with`.

    Args:
      folder: for its logs, what its faults note, and its workdir "run".
      flags: of the training, after FLAGS.
      options: of the supervisor.
      environment: more variables.
      supervisors: 2 for a supervisor of its own for each host, as on two machines.
    """

    def __init__(self, folder, *flags, options=(), environment=None, supervisors=1):
        self.folder, self.workdir = Path(folder), Path(folder) / "run"
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [*SUPERVISION, *options, f"--workdir={self.workdir}", *FLAGS, *flags]
        where = [["--workers=2"]]
        if supervisors == 2:
            hosts = f"--hosts={','.join(free_addresses(2))}"
            where = [[hosts, f"--host_index={i}"] for i in range(2)]
        variables = {"TORTURE_FOLDER": str(self.folder), **(environment or {})}
        self.supervisors = [
            processes.Call(
                supervise, [*some, *words], variables, log=self.folder / f"supervisor-{i}"
            )
            for i, some in enumerate(where)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for one in self.supervisors:
            one.__exit__()

    def text(self):
        return "".join(one.text() for one in self.supervisors)

    def is_alive(self):
        return any([one.is_alive() for one in self.supervisors])

    def wait(self, seconds=HANGS):
        """The worst exit code."""
        return max(one.wait(seconds) for one in self.supervisors)

    def hosts(self):
        """Numbers of the processes that run, the chief's first."""
        return sorted(pid for one in self.supervisors for pid in children_of(one.pid))

    def restarts(self):
        return self.text().count("starting all again in")

    def fired(self):
        """When each fault happened, by time.time()."""
        count = len(list(self.folder.glob("fired-*")))
        texts = [(self.folder / f"fired-{i}").read_text() for i in range(count)]
        return [float(text) for text in texts if text]


def restore(base, folder):
    """Puts what an undisturbed run had at its first save into the folder of a chain."""
    shutil.rmtree(folder, ignore_errors=True)
    workdir = folder / "run"
    shutil.copytree(base, workdir, ignore=shutil.ignore_patterns("logs", "lock.json"))
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > SAVE_STEPS:
            shutil.rmtree(checkpoint)
    rows = [json.dumps(row) for row in tiny.rows(workdir) if row["step"] <= SAVE_STEPS]
    (workdir / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))


def flags_of(jit, total, *, judged):
    flags = [f"--config.total_steps={total}", f"--config.step.jit={jit}"]
    # To trace an evaluation takes seconds of each start.
    return flags if judged else [*flags, "--config.data.val_split="]


class Reference:
    """Undisturbed runs, with all their checkpoints; with and without XLA, evaluated and not.

    Args:
      folder: for their workdirs.
      computed: RICH or PLAIN, also for the chains that are compared with them.
    """

    def __init__(self, folder, *, computed=RICH):
        self.folder, self.computed = Path(folder), computed

    def workdir(self, jit, total, *, judged=False):
        folder = self.folder / f"{jit}-{total}{'-judged' * judged}"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            flags = flags_of(jit, total, judged=judged)
            keep = f"--config.keep_checkpoints={total}"
            with Run(folder, *flags, *self.computed, keep) as run:
                # A second for each step is plenty.
                assert run.wait(HANGS + total) == 0, run.text()[-3000:]
                assert not run.restarts()
            (folder / "done").touch()
        return folder / "run"

    def differs(self, workdir, jit, *, total=TOTAL, judged=False):
        """What a run that has ended has other than the undisturbed one; "" if nothing.

        With `judged` its evaluations are compared as well.
        """
        reference = self.workdir(jit, total, judged=judged)
        found, expected = (open_checkpoint(str(w)) for w in (workdir, reference))
        if found.step != total:
            return f"ended at step {found.step}"
        names = set(found.arrays) ^ set(expected.arrays)
        names |= {
            name
            for name in set(found.arrays) & set(expected.arrays)
            if not np.array_equal(found.arrays[name], expected.arrays[name])
        }
        if names:
            return f"{len(names)} arrays differ"
        if not judged:
            return ""
        # An evaluation that a fault ended has been done again.
        losses = [
            {row["step"]: row["val/loss"] for row in tiny.rows(w) if "val/loss" in row}
            for w in (workdir, reference)
        ]
        missing = set(losses[1].items()) - set(losses[0].items())
        return f"evaluations of steps {sorted(missing)} differ" if missing else ""


def run_chain(cells, reference, folder, *, total=TOTAL, say=print):
    """Runs cells one after the other; they are all of one phase, or of none that compiles.

    The run ends at step `total`.

    Returns:
      A list of Outcomes.
    """
    folder, jit = Path(folder), "auto" if cells[0].phase == "compiling" else "off"
    judged = any(cell.phase == "evaluation" for cell in cells)
    restore(reference.workdir(jit, total, judged=judged), folder)
    flags = [*flags_of(jit, total, judged=judged), *reference.computed]
    if cells[0].fault == MISSING:
        flags += ["--config.strategy.timeout_seconds=10", "--config.strategy.patience_seconds=30"]
    environment = {"TORTURE_CELLS": json.dumps(cells)}
    two = cells[0].fault == FASTER
    options = [f"--max_restarts={len(cells) + 3}"]
    with Run(folder, *flags, options=options, environment=environment, supervisors=1 + two) as run:
        lines, code = _follow(run, say)
        fired, text = run.fired(), run.text()
    what = _judge(cells, fired, text, code)
    what = what or reference.differs(run.workdir, jit, total=total, judged=judged)
    what = what or "bit-equal"
    return [_outcome(cell, i, fired, lines, what) for i, cell in enumerate(cells)]


def _follow(run, say):
    """([(when, line)] of what the supervisors say; their exit code, None if the run hung)"""
    lines, last = [], time.monotonic()
    seen = [0] * len(run.supervisors)
    while True:
        alive = run.is_alive()
        for i, supervisor in enumerate(run.supervisors):
            new = supervisor.text().splitlines()[seen[i] :]
            seen[i] += len(new)
            for line in new:
                lines.append((time.time(), line))
                last = time.monotonic()
                if line.startswith("launch: worker"):
                    say(f"  {line}")
        if not alive:
            return lines, run.wait(1)
        if time.monotonic() - last > HANGS:
            return lines, None
        pause(0.05)


def _judge(cells, fired, text, code):
    """What is wrong with a chain; "" if nothing."""
    begun = [int(step) for step in re.findall(r"\[worker 0\] resumed from step (\d+) ", text)]
    if "starting from scratch" in text or min(begun, default=0) < SAVE_STEPS:
        return "began at zero"
    if begun != sorted(begun):
        return f"went back: began at steps {begun}"
    if code is None:
        return "hung"
    if code:
        return f"exit {code}"
    if len(fired) < len(cells):
        return f"{len(cells) - len(fired)} faults did not happen"
    return ""


def _outcome(cell, i, fired, lines, what):
    if i >= len(fired):
        return Outcome(cell, what, -1.0, 0, "")
    until = fired[i + 1] if i + 1 < len(fired) else float("inf")
    after = [(when, line) for when, line in lines if fired[i] <= when < until]
    words = [when for when, line in after if line.startswith("launch: ")]
    restarts = sum("starting all again in" in line for _, line in after)
    found = [re.match(r"\[worker \d\] (error: .*)", line) for _, line in after]
    found += [re.match(r"launch: (worker \d .*?)(?:; see .*)?$", line) for _, line in after]
    message = next((match[1] for match in found if match), "")
    return Outcome(cell, what, words[0] - fired[i] if words else -1.0, restarts, message[:300])


def chains(cells):
    """Cells in chains: by host and phase; those that need flags of their own are alone."""
    alone = [cell for cell in cells if cell.fault in (MISSING, FASTER)]
    rest = [cell for cell in cells if cell not in alone]
    groups = [
        [cell for cell in rest if (cell.host, cell.phase) == pair]
        for pair in itertools.product(range(2), PHASES)
    ]
    return [group for group in groups if group] + [[cell] for cell in alone]
