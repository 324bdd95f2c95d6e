"""Disturbs runs of two hosts in every way that tests/support/torture.py knows; makes its page.

    python -m tools.torture                  the matrix, the kills and the long run: an hour or two
    python -m tools.torture --only REGEX     cells of the matrix: "SIGKILL", "chief, save"
    python -m tools.torture --part NAME      one of PARTS
    python -m tools.torture --page           only writes docs/torture.md from what was measured

What was measured is kept in runs/torture/; of each cell and part the newest result counts.
"""

import argparse
import datetime
import json
import os
import random
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import torture
from tests.support.torture import HOSTS, Cell, Reference, Run
from tests.support.tortured import FAULTS, PHASES, SUDDEN, WITHIN
from tests.support.waiting import pause, wait_for
from vit_dist.monitoring.goodput import format_table, measure, summary, table
from vit_dist.monitoring.starts import load_starts
from vit_dist.training.layout import newest_whole_step

ROOT = Path(__file__).resolve().parents[1]
HOME, PAGE = ROOT / "runs" / "torture", ROOT / "docs" / "torture.md"
RESULTS = HOME / "results.jsonl"
LONG = 10**6  # steps: a run that ends when it is told to
KILLS = 20
FLAT_FROM, FLAT_TO = 500, 5500  # steps
PAUSE = "0.3"  # seconds that each call of the step takes more, where a run is to last for minutes
# A soak takes what needs no hook of its own.
SOAKED = [fault for fault in (*SUDDEN, *WITHIN) if fault != "network cut"]


def main() -> int:
    """The command; returns its exit code: 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression for names of cells")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the faults that are drawn")
    parser.add_argument("--page", action="store_true", help="only write docs/torture.md")
    options = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    parts = ["matrix"] if options.only else ["matrix", "kills", "flat"]
    parts = [] if options.page else [options.part] if options.part else parts
    held = [PARTS[part](options) for part in parts]
    if not options.only:
        PAGE.write_text(make_page(read_results()))
        say(f"wrote {PAGE.relative_to(ROOT)}")
    return 0 if all(held) else 1


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def record(kind: str, result: Any) -> None:
    """Keeps what was measured."""
    found = {"kind": kind, "date": str(datetime.date.today()), "on": processor(), "result": result}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(found) + "\n")


def processor() -> str:
    """The name of this machine's processor and how many of its cores are ours."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {len(names)} cores"


# measuring


def run_matrix(options: argparse.Namespace) -> bool:
    """The cells, one chain after the other; whether all hold."""
    chosen = [
        cell for cell in torture.CELLS if not cell.senseless and re.search(options.only, cell.name)
    ]
    reference, held = Reference(HOME / "reference"), True
    for number, chain in enumerate(torture.chains(chosen)):
        say(f"{HOSTS[chain[0].host]}, {chain[0].phase}: {', '.join(c.fault for c in chain)}")
        outcomes = torture.run_chain(chain, reference, HOME / f"chain-{number}", say=say)
        for outcome in outcomes:
            record("cell", outcome)
            say(
                f"{outcome.what:>10}  {outcome.seconds:6.1f} s  {outcome.restarts} restart(s)  "
                f"{outcome.cell.name}: {outcome.message}"
            )
            held &= outcome.what == "bit-equal"
    return held


def _endless(name: str, **environment: str) -> Run:
    """A run that goes on until it is stopped, and waits for orders."""
    folder = HOME / name
    torture.restore(Reference(HOME / "reference").workdir("off", torture.SAVE_STEPS), folder)
    (folder / "orders").mkdir()
    return Run(
        folder,
        *torture.flags_of("off", LONG, judged=False),
        *torture.RICH,
        options=("--max_restarts=1000",),
        environment=environment,
    )


def _stop_and_compare(run: Run) -> tuple[int, str]:
    """Stops an endless run; its last step, and how it compares with an undisturbed one."""
    before = newest_whole_step(run.workdir) or 0
    wait_for(lambda: (newest_whole_step(run.workdir) or 0) > before, 120)
    os.kill(run.supervisors[0].pid, signal.SIGTERM)
    code = run.wait()
    step = newest_whole_step(run.workdir)
    assert step is not None
    if code != 42:
        return step, f"exit {code}"
    reference = Reference(HOME / "reference")
    return step, reference.differs(run.workdir, "off", total=step) or "bit-equal"


def run_kills(options: argparse.Namespace) -> bool:
    """SIGKILL to a random host at a random moment, KILLS times in one run."""
    draw = random.Random(options.seed)
    with _endless("kills", TORTURE_PAUSE=PAUSE) as run:
        for number in range(KILLS):
            # A start takes 10 to 20 s: many a kill comes before the first step.
            pause(draw.uniform(0, 25))
            victim = draw.randrange(2)
            wait_for(lambda: len(run.hosts()) == 2, 120)
            os.kill(run.hosts()[victim], signal.SIGKILL)
            wait_for(lambda n=number: run.restarts() > n, 120)
            say(f"kill {number + 1}, {HOSTS[victim]}: from step {newest_whole_step(run.workdir)}")
        step, what = _stop_and_compare(run)
    record("kills", {"kills": KILLS, "seed": options.seed, "steps": step, "what": what})
    say(f"{KILLS} kills: {what} after {step} steps")
    return what == "bit-equal"


def run_flat(options: argparse.Namespace) -> bool:
    """Threads, open files and memory of both hosts over some thousand steps."""
    with _endless("flat") as run:
        measured = []
        for step in (FLAT_FROM, FLAT_TO):
            wait_for(lambda s=step: (newest_whole_step(run.workdir) or 0) >= s, 1200)
            measured.append([resources_of(pid) for pid in run.hosts()])
            say(f"step {step}: (threads, files, MB) of each host: {measured[-1]}")
    names = ("threads", "files", "MB")
    grown = [
        {name: b - a for name, a, b in zip(names, *pair, strict=True)}
        for pair in zip(*measured, strict=True)
    ]
    # The allocator and Python's caches may take some MB more; a leak of 10 kB a step is 50 MB.
    held = all(g["threads"] < 5 and g["files"] < 5 and g["MB"] < 30 for g in grown)
    record("flat", {"steps": FLAT_TO - FLAT_FROM, "before": measured[0], "grown": grown})
    return held


def run_soak(options: argparse.Namespace) -> bool:
    """A fault each minute for options.minutes; no step may be lost beyond the last save."""
    draw, faults = random.Random(options.seed), []
    with _endless("soak", TORTURE_PAUSE=PAUSE) as run:
        began = time.monotonic()
        for number in range(int(options.minutes)):
            wait_for(lambda n=number: time.monotonic() - began > 60 * n + 30, 120)
            fault, host = draw.choice(SOAKED), draw.randrange(2)
            (run.folder / "orders" / f"{number:03d}-{host}-{fault}").touch()
            faults.append(f"{fault} ({HOSTS[host]})")
            say(f"minute {number}: {faults[-1]}; step {newest_whole_step(run.workdir)}")
        wait_for(lambda: time.monotonic() - began > 60 * options.minutes, 120)
        step, what = _stop_and_compare(run)
        starts = load_starts(run.workdir)
    # Each start trains again what came after the checkpoint before: the interval of saves, one more
    # as the next checkpoint may not have been written to its end, and the call in progress.
    most = 2 * torture.SAVE_STEPS + 2
    lost = [row["lost"] for row in table(starts)]
    result = {
        "minutes": options.minutes,
        "seed": options.seed,
        "faults": faults,
        "restarts": measure(starts).restarts,
        "steps": step,
        "what": what,
        "lost": lost,
        "goodput": summary(starts),
        "table": format_table(starts),
    }
    record("soak", result)
    say(f"{result['table']}\n{what} after {step} steps")
    return what == "bit-equal" and max(lost) <= most


def resources_of(pid: int) -> tuple[int, int, int]:
    """(threads, open files, resident MB) of a process."""
    proc = Path(f"/proc/{pid}")
    resident = re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())
    assert resident is not None
    counts = [len(list((proc / name).iterdir())) for name in ("task", "fd")]
    return counts[0], counts[1], int(resident[1]) // 1024


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "matrix": run_matrix,
    "kills": run_kills,
    "flat": run_flat,
    "soak": run_soak,
}


# the page


def read_results() -> list[dict[str, Any]]:
    """What was measured, the newest of each cell and part."""
    found = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        row = json.loads(line)
        key = tuple(row["result"][0]) if row["kind"] == "cell" else row["kind"]
        found[key] = row
    return list(found.values())


def make_page(results: list[dict[str, Any]]) -> str:
    """docs/torture.md."""
    cells = {Cell(*r["result"][0]): r for r in results if r["kind"] == "cell"}
    parts = {r["kind"]: r for r in results if r["kind"] != "cell"}
    missing = [c for c in torture.CELLS if not c.senseless and c not in cells]
    lines = [HEAD, _where([*cells.values()]), *_rows(cells)]
    if missing:
        lines += ["", f"{len(missing)} cells have not been run."]
    senseless = {c.senseless: c.fault for c in torture.CELLS if c.senseless}
    lines += ["", f"-: no such cell. {'; '.join(f'{f}: {w}' for w, f in senseless.items())}."]
    lines += ["", "## What a person is told", "", MESSAGES, *_messages(cells)]
    for kind, write in (("kills", _kills), ("flat", _flat), ("soak", _soak)):
        lines += ["", *(write(parts[kind]) if kind in parts else (f"## {kind}: not run",))]
    return "\n".join(lines) + "\n"


HEAD = """# Every fault, on every host, at every moment

Made by `make torture` (`python -m tools.torture`; `TORTURE='SIGKILL|chief, save' make torture` runs
some cells) from what was really run: two hosts on one machine under the supervisor
(`python -m vit_dist.launch --workers=2`), a ViT of one block on the digits, with dropout, a moving
average and mixup, and with XLA where a compilation is disturbed. Each start suffers one fault and
all go on from the newest checkpoint, so a chain of faults is one run: it ends **bit-equal** (`=`)
to a run that nobody disturbed, weights, average, optimizer and evaluations, or the cell says what
is wrong. No start began at step 0 or before the newest checkpoint.

- *compiling*: while the step is traced, or XLA compiles it. *step*: in a call of the step. *save*:
  on the chief between a checkpoint's state and its manifest, on the other host beside it.
  *evaluation*: between two batches.
- `= 1.2 s, 1`: bit-equal; the supervisor knew of it after 1.2 s; one restart. Of a signal to stop
  the seconds are those until the checkpoint is saved. "went on": all began again from the newest
  checkpoint, but the chain was not run to its end, so nothing was compared.
- What stands still is noticed by the watchdog, which here allows 10 to 45 s
  (`config.strategy.patience_seconds`, `timeout_seconds`), instead of 600 to 1800 by default. A host
  that is stopped, or cut off, is noticed by TensorFlow's heartbeats.
"""
MESSAGES = "The first line about each fault that names it, of the hosts or the supervisor.\n"


def _where(results: list[dict[str, Any]]) -> str:
    found = sorted({f"{r['on']}, {r['date']}" for r in results})
    return f"Measured on {'; '.join(found) or 'nothing yet'}; other work ran beside it.\n"


def _rows(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    lines = [f"| Fault | Host | {' | '.join(PHASES)} |", "|---|---|" + "---|" * len(PHASES)]
    for fault in FAULTS:
        for host, name in enumerate(HOSTS):
            shown = [_cell(Cell(fault, host, phase), cells) for phase in PHASES]
            if set(shown) != {"-"}:
                lines.append(f"| {fault} | {name} | {' | '.join(shown)} |")
    return lines


def _cell(cell: Cell, cells: dict[Cell, dict[str, Any]]) -> str:
    if cell.senseless:
        return "-"
    if cell not in cells:
        return "not run"
    _, what, seconds, restarts, _ = cells[cell]["result"]
    when = f" {seconds:.1f} s" if seconds >= 0 else ""
    return f"{'=' if what == 'bit-equal' else what}{when}, {restarts}"


def _messages(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    lines = ["| Fault | Host, phase | Said |", "|---|---|---|"]
    for fault in FAULTS:
        told = [(c, r["result"][4]) for c, r in cells.items() if c.fault == fault]
        for cell, message in told[:1]:
            text = re.sub(r"localhost:\d+", "localhost:PORT", message).replace("|", "\\|")
            text = textwrap.shorten(text.replace(str(ROOT) + "/", ""), 240, placeholder=" ...")
            lines.append(f"| {fault} | {HOSTS[cell.host]}, {cell.phase} | {text} |")
    return lines


def _kills(part: dict[str, Any]) -> list[str]:
    r = part["result"]
    return [
        "## Random kills",
        "",
        f"{r['kills']} SIGKILLs to random hosts at random moments of one run (seed {r['seed']}): "
        f"**{r['what']}** after {r['steps']} steps. {part['on']}, {part['date']}.",
    ]


def _flat(part: dict[str, Any]) -> list[str]:
    r = part["result"]
    grown = "; ".join(
        f"{HOSTS[i]}: {', '.join(f'{n} {v:+d}' for n, v in g.items())}"
        for i, g in enumerate(r["grown"])
    )
    before = "; ".join(f"{HOSTS[i]} {b}" for i, b in enumerate(r["before"]))
    return [
        "## Nothing piles up",
        "",
        f"Over {r['steps']} steps, from step {FLAT_FROM} on (threads, files, MB there: {before}), "
        f"each host grew by: {grown}. {part['on']}, {part['date']}.",
    ]


def _soak(part: dict[str, Any]) -> list[str]:
    r = part["result"]
    return [
        "## Soak",
        "",
        f"A fault each minute for {r['minutes']:g} minutes, drawn by seed {r['seed']} (30 minutes "
        f"in `make soak`): **{r['what']}** after {r['steps']} steps and {r['restarts']} "
        f"restarts; at most {max(r['lost'])} steps were trained again after a fault, with a save "
        f"every {torture.SAVE_STEPS}. {part['on']}, {part['date']}.",
        "",
        f"Faults: {', '.join(r['faults'])}.",
        "",
        "```",
        r["table"],
        "```",
    ]


if __name__ == "__main__":
    sys.exit(main())
