"""When a training logs, saves and evaluates, and how many steps one call may run."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Calendar:
    """The events of a run by its steps; an event at step n comes after n steps have been done.

    All methods are functions of the step alone, so a resumed run has the same events.

    Attributes:
      total: steps of the run; at its end it logs and saves in any case.
      log, save, evaluate: steps from one event to the next; 0 for none before the end.
      draw: the same of figures; 0 for none at all.
      evals: the same for each of config.evals by name.
      watch: the same of looks at the variables; 0 for none at all.
      bounds: further steps at which a call has to end.
    """

    total: int
    log: int
    save: int
    evaluate: int
    draw: int = 0
    evals: Mapping[str, int] = dataclasses.field(default_factory=dict)
    watch: int = 0
    bounds: tuple[int, ...] = ()

    def logs_at(self, step: int) -> bool:
        """Whether metrics are written at `step`."""
        return step == self.total or _due(self.log, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is begun at `step`."""
        return step == self.total or _due(self.save, step)

    def evaluates_at(self, step: int) -> bool:
        """Whether "val" is judged at `step`, before the end of the training."""
        # At the end `train` judges val and test in any case, when the last checkpoint is saved.
        return step < self.total and _due(self.evaluate, step)

    def draws_at(self, step: int) -> bool:
        """Whether figures of the model's inside are drawn at `step`."""
        return self.draw > 0 and (step == self.total or _due(self.draw, step))

    def evals_at(self, step: int) -> list[str]:
        """Which of config.evals are judged at `step`, before the end of the training."""
        return [
            name for name, every in self.evals.items() if step < self.total and _due(every, step)
        ]

    def watches_at(self, step: int) -> bool:
        """Whether the step that ends at `step` has looked at the variables."""
        return _due(self.watch, step)

    def steps_to_event(self, step: int) -> int:
        """How many steps from `step`, which is before the end, to the next event."""
        ends = [self.total - step]
        # At a multiple of `every` the next event is a whole period away, never 0 steps.
        periods = (self.log, self.save, self.evaluate, self.draw, self.watch, *self.evals.values())
        ends += [every - step % every for every in periods if every]
        ends += [bound - step for bound in self.bounds if bound > step]
        return min(ends)


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


class Pace:
    """How many steps one call may run, so that it ends within `seconds`.

    A signal to stop is acted on only between calls, and a scheduler that takes a machine away gives
    some 30 s. So the first call has one step, and each later one at most twice as many steps as the
    call before, and no more than fit by the slower time per step of the last two calls.
    """

    def __init__(self, seconds: float = 10.0):
        self._seconds = seconds
        self._limit = 1
        self._per_step: float | None = None

    @property
    def limit(self) -> int:
        """The most steps of the next call."""
        return self._limit

    def done(self, steps: int, seconds: float) -> None:
        """Notes that a call of so many steps took so long."""
        # The first call traces and compiles, so its time says nothing of the next: it is noted as
        # 0, and the second call may have two steps.
        before, self._per_step = self._per_step, seconds / steps
        if before is None:
            self._limit, self._per_step = 2, 0.0
            return
        # The slower of two calls: one that was slow by chance, such as for a read that hung, is
        # forgotten after two more. 1e-9: a clock may show no time at all.
        fits = self._seconds / max(before, self._per_step, 1e-9)
        self._limit = max(min(2 * self._limit, int(fits)), 1)
