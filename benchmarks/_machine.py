"""The machine that a benchmark runs on: what it is, and whether it did anything else meanwhile.

A ratio from a busy machine, or from rounds that disagree, is worse than none: it is not printed.
With --record what is printed is kept in measured.jsonl, of which tools/benchmarks_page.py makes a
part of docs/benchmarks.md.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# The share of the processor that others may have, and by which rounds may differ from the median.
OTHERS = DISAGREE = 0.1
MEASURED = Path(__file__).with_name("measured.jsonl")
# Instructions that decide the speed of products of matrices.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")


def describe(cpuinfo: str | None = None) -> str:
    """One line: processor, cores, its instructions, and the load of the last minute."""
    return f"{processor(cpuinfo)}, load {os.getloadavg()[0]:.1f}"


def processor(cpuinfo: str | None = None) -> str:
    """Name, cores and instructions; of this machine, or of the text of another /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = re.search(r"^flags\s*: (.*)$", text, re.M)
    has = set(flags[1].split()) if flags else set()
    known = " ".join(flag for flag in _FLAGS if flag in has) or "no vector instructions known"
    return f"{name[1] if name else 'unknown processor'}, {os.cpu_count()} cores, {known}"


def ticks(stat: str | None = None) -> tuple[float, float]:
    """Seconds that all cores were busy, and that they were there, since the machine started.

    What a virtual machine's host takes away ("steal") counts as busy.
    """
    text = Path("/proc/stat").read_text() if stat is None else stat
    numbers = [int(x) for x in text.splitlines()[0].split()[1:9]]
    idle = numbers[3] + numbers[4]  # idle, and waiting for a disk
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(numbers) - idle) / per_second, sum(numbers) / per_second


def own() -> float:
    """CPU seconds of this process and of those of its children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Machine:
    """What the machine does while a benchmark runs; made when that begins.

    Args:
      smoke: whether numbers mean nothing, so that all is printed and nothing is kept.
      record: whether results are kept.
      busy: tells ticks(), own: tells own(); other ones for a test.
    """

    def __init__(
        self,
        *,
        smoke: bool,
        record: bool = False,
        busy: Callable[[], tuple[float, float]] = ticks,
        own: Callable[[], float] = own,
    ):
        self._smoke, self._record, self._busy, self._own = smoke, record, busy, own
        self._began, self._began_own = busy(), own()
        print(f"{describe()}, {time.strftime('%Y-%m-%d')}", flush=True)

    def others(self) -> float:
        """The share of all cores that other processes have had since the beginning."""
        busy, there = (now - then for now, then in zip(self._busy(), self._began, strict=True))
        return max(busy - (self._own() - self._began_own), 0.0) / max(there, 1e-9)

    def conclude(self, text: str, ratios: Sequence[float] = ()) -> None:
        """Prints a result if the machine was quiet, and the ratios of its rounds agree.

        Call it when the benchmark's processes have ended: only then their time counts as its own.

        Raises:
          SystemExit: it was not, or they do not; says which.
        """
        problem = self._problem(ratios)
        if problem and not self._smoke:
            raise SystemExit(f"no result: {problem}; let nothing else run, and try again")
        print(text, flush=True)
        if self._record and not self._smoke:
            row = {
                "benchmark": Path(sys.argv[0]).stem,
                "processor": processor(),
                "date": time.strftime("%Y-%m-%d"),
                "text": text,
            }
            with open(MEASURED, "a") as file:
                file.write(f"{json.dumps(row)}\n")

    def _problem(self, ratios: Sequence[float]) -> str | None:
        others = self.others()
        if others > OTHERS:
            return f"others had {others:.0%} of the processor, more than {OTHERS:.0%}"
        if len(ratios) > 2:
            middle = sorted(ratios)[len(ratios) // 2]
            # One round may be an accident; the median does not see it.
            far = sorted(abs(ratio / middle - 1) for ratio in ratios)[-2]
            if far > DISAGREE:
                shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                return f"rounds disagree by {far:.0%}, more than {DISAGREE:.0%}: {shown}"
        return None
