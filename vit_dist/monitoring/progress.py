"""Progress of a run: a bar on a terminal, plain lines in a log file."""

from collections.abc import Mapping

from rich import progress
from rich.console import Console
from rich.table import Column

_SHORT_NAMES = {
    "examples_per_second": "img/s",
    "examples_per_second_per_device": "img/s/device",
    "seconds_per_step": "s/step",
}


class Progress:
    """Shows how far a run is. Use as a context manager.

    On an interactive terminal: a bar with the latest metrics. Anywhere else (a pipe, a log file, a
    scheduler): one plain line for each `update`.
    """

    def __init__(
        self, total_steps: int, *, first_step: int = 0, title: str, console: Console | None = None
    ):
        self._total = total_steps
        self._title = title
        self._console = console or Console()
        self._bar = _make_bar(self._console) if self._console.is_interactive else None
        if self._bar:
            self._task = self._bar.add_task(
                title, total=total_steps, completed=first_step, metrics="", eta=""
            )

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        else:
            self.note(self._title)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float], *, eta: float | None = None) -> None:
        """Moves on to `step`; `eta` is in seconds (`Meter.eta`), and not shown if unknown."""
        shown = "  ".join(
            f"{_SHORT_NAMES.get(name, name)} {format_number(value)}"
            for name, value in metrics.items()
        )
        left = "" if eta is None else f"eta {format_duration(eta)}"
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=shown, eta=left, refresh=True)
        else:
            percent = 100 * step // max(self._total, 1)
            parts = (f"step {step}/{self._total}", f"{percent}%", shown, left)
            self.note("  ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """Prints a line; on a terminal, above the bar."""
        # soft_wrap: a log file has no width at which to break lines.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def format_number(value: float) -> str:
    """Returns four significant digits; thousands are separated rather than lost."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Returns m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _make_bar(console: Console) -> progress.Progress:
    metrics = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[eta]}", markup=False),
        progress.TextColumn("{task.fields[metrics]}", markup=False, table_column=metrics),
        console=console,
        refresh_per_second=2,  # the thread that draws competes with the one that trains
        expand=True,
    )
