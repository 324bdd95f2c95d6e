"""Progress of a run: a bar on a terminal, plain lines in a log file."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from absl import logging
from rich import progress
from rich.console import Console, Group, RenderableType
from rich.text import Text

from vit_dist.monitoring.log import detail

# Short names, for a terminal of 80 columns; metrics.jsonl and TensorBoard have the full ones.
_SHORT_NAMES = {
    "learning_rate": "lr",
    "examples_per_second": "img/s",
    "examples_per_second_per_device": "img/s/device",
    "seconds_per_step": "s/step",
}


class Progress:
    """Shows how far a run has come; use it as a context manager.

    On an interactive terminal: a bar, and below it the latest metrics. Anywhere else (a pipe, a log
    file, a scheduler): one plain line for each `update`. Lines also go to the log of the run.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        title: str,
        waits: str = "",
        console: Console | None = None,
    ):
        """`waits` is shown in place of metrics until the first ones come: what takes so long."""
        self._total = total_steps
        self._title = title
        self._console = console or Console()
        self._bar = _Bar(self._console) if self._console.is_interactive else None
        self._at_exit = ExitStack()
        if self._bar:
            self._task = self._bar.add_task(
                title, total=total_steps, completed=first_step, metrics=waits, left=""
            )

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._at_exit.callback(self._bar.stop)
            self._redirect_warnings()
        else:
            self.note(self._title)
        return self

    def __exit__(self, *exc: object) -> None:
        self._at_exit.close()

    def update(self, step: int, metrics: Mapping[str, float], *, eta: float | None = None) -> None:
        """Moves on to `step`; `eta` is in seconds (`Meter.eta`), and not shown if unknown."""
        shown = "  ".join(
            f"{_SHORT_NAMES.get(name, name)} {format_number(value)}"
            for name, value in metrics.items()
        )
        left = "" if eta is None else f"eta {format_duration(eta)}"
        percent = 100 * step // max(self._total, 1)
        parts = (f"step {step}/{self._total}", f"{percent}%", shown, left)
        line = "  ".join(part for part in parts if part)
        # The bar overwrites itself; the log of the run keeps a line of each update.
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=shown, left=left, refresh=True)
            detail("%s", line)
        else:
            self.note(line)

    def note(self, text: str) -> None:
        """Prints a line; on a terminal, above the bar."""
        # soft_wrap: a log file has no width at which to break lines.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        detail("%s", text)

    def _redirect_warnings(self) -> None:
        """Prints warnings above the bar, not into it.

        While the bar is shown, rich replaces sys.stderr by a stream that prints above the bar. But
        absl's handler still holds the sys.stderr from when absl was imported.
        """
        handler = logging.get_absl_handler().python_handler
        before = handler.setStream(sys.stderr)
        # setStream returns None if the handler had this stream already: nothing to put back.
        if before is not None:
            self._at_exit.callback(handler.setStream, before)


class _Bar(progress.Progress):
    """A line with the bar, and one below it for metrics, which 80 columns do not hold beside it."""

    def __init__(self, console: Console):
        super().__init__(
            progress.TextColumn("{task.description}", markup=False),
            # None: as wide as the other columns leave room for.
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[left]}", markup=False),
            console=console,
            # Seldom: the thread that draws takes Python's lock from the thread that trains.
            refresh_per_second=2,
            expand=True,
            # If standard error goes to a file, it is to stay there, not to appear above the bar.
            redirect_stderr=sys.stderr.isatty(),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's line, then the metrics; a terminal that is narrower breaks them at spaces."""
        metrics = [Text(task.fields["metrics"]) for task in self.tasks if task.fields["metrics"]]
        yield Group(*super().get_renderables(), *metrics)


def format_number(value: float) -> str:
    """Returns four significant digits; thousands are separated rather than lost."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Returns m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
