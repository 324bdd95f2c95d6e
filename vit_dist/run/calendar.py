"""When a training logs, saves and evaluates, and how many steps one call may run."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Calendar:
    """The events of a run by its steps; an event at step n comes after n steps have been done.

    Attributes:
      total: steps of the run; at its end it logs and saves in any case.
      log, save, evaluate: every so many steps; 0 for never before the end.
    """

    total: int
    log: int
    save: int
    evaluate: int

    def logs_at(self, step: int) -> bool:
        """Whether metrics are written at `step`."""
        return step == self.total or _due(self.log, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is begun at `step`."""
        return step == self.total or _due(self.save, step)

    def evaluates_at(self, step: int) -> bool:
        """Whether "val" is judged at `step`; at the end that comes after the training."""
        return step < self.total and _due(self.evaluate, step)

    def steps_to_event(self, step: int) -> int:
        """How many steps from `step`, before the end, to the next event."""
        ends = [self.total - step]
        ends += [every - step % every for every in (self.log, self.save, self.evaluate) if every]
        return min(ends)


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


class Pace:
    """How many steps one call may run, so that it ends within `seconds`.

    A wish to stop is seen between calls only, and a scheduler that takes a machine away gives some
    30 s. So the first call has one step, each later one at most twice as many as the one before,
    and none more than fit by the slowest time per step of the last two calls.
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
        # The very first call traces and compiles, which says nothing of the next.
        before, self._per_step = self._per_step, seconds / steps
        if before is None:
            self._limit, self._per_step = 2, 0.0
            return
        fits = self._seconds / max(before, self._per_step, 1e-9)
        self._limit = max(min(2 * self._limit, int(fits)), 1)
