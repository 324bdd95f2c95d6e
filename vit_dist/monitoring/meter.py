"""Throughput between log steps, and the time left."""

import bisect
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Measures steps per second, without the time inside `pause` (evaluating, saving).

    A device works asynchronously: the host hands it work and runs ahead of it. So call `read(step)`
    right after a metric of that step has arrived on the host: then the device has done the step.

    Attributes:
      seconds: kind of pause -> seconds spent in it since the Meter was made.
      waited: seconds of this interval in which the host waited for batches. The loop adds to it; it
        may be a tensor, which only `read` waits for.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_devices: int,
        smoothing: float = 0.7,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._batch_size = batch_size
        self._num_devices = num_devices
        self._smoothing = smoothing
        self._clock = clock
        self._num_reads = 0
        self._smoothed: float | None = None  # seconds per step, a moving average for `eta`
        self._pause_began: float | None = None
        self.seconds: dict[str, float] = {}
        # (seconds of each step of a call, steps), of the calls of this interval.
        self._calls: list[tuple[float, int]] = []
        self.start(0)

    def start(self, step: int) -> None:
        """Begins an interval at `step`."""
        self._step = step
        self._began = self._clock()
        self._paused = 0.0
        self.waited = 0.0
        self._calls = []

    def called(self, steps: int, seconds: float) -> None:
        """Notes a call of so many steps, and the seconds until it came back."""
        self._calls.append((seconds / steps, steps))

    def step_times(self) -> dict[str, float]:
        """Seconds of a step since the last `read`: "step_seconds_median", "step_seconds_p95".

        A call of several steps counts as so many steps of equal length. On an accelerator the host
        runs ahead by as much as the runtime lets it: there these tell how evenly the device takes
        work rather than how long it works. {} before the first call.
        """
        if not self._calls:
            return {}
        # From the fastest call to the slowest; done[i] counts the steps of calls 0 to i.
        seconds, steps = zip(*sorted(self._calls), strict=True)
        done = list(itertools.accumulate(steps))

        def quantile(share: float) -> float:
            # The first call by which so many of all steps have been done as fast.
            return seconds[bisect.bisect_left(done, share * done[-1])]

        return {"step_seconds_median": quantile(0.5), "step_seconds_p95": quantile(0.95)}

    @contextmanager
    def pause(self, kind: str = "other") -> Iterator[None]:
        """Stops the clock for the body of a `with`, whose time is counted as `kind`."""
        assert self._pause_began is None, "pauses do not nest"
        self._pause_began = self._clock()
        try:
            yield
        finally:
            passed = self._clock() - self._pause_began
            self._paused += passed
            self.seconds[kind] = self.seconds.get(kind, 0.0) + passed
            self._pause_began = None

    def read(self, step: int) -> dict[str, float]:
        """Returns the rates since `start` or the last `read`, and begins the next interval.

        Returns:
          "examples_per_second" and "examples_per_second_per_device"; "seconds_per_step";
          "input_stall", `waited` as a share of the interval. An accelerator works on while the host
          waits, so it loses at most that share of its time.
        """
        assert step > self._step, f"no step between {self._step} and {step}"
        # At least 1e-9 s: a coarse clock may not have moved, and a rate must not be infinite.
        interval = max(self._clock() - self._began - self._paused, 1e-9)
        stall = min(float(self.waited) / interval, 1.0)
        seconds = interval / (step - self._step)
        self._smooth(seconds)
        self.start(step)
        rate = self._batch_size / seconds
        return {
            "examples_per_second": rate,
            "examples_per_second_per_device": rate / self._num_devices,
            "seconds_per_step": seconds,
            "input_stall": stall,
        }

    def eta(self, step: int, total: int) -> float | None:
        """Returns the seconds left, pauses not counted; None before the first `read`."""
        return None if self._smoothed is None else self._smoothed * max(total - step, 0)

    def _smooth(self, seconds: float) -> None:
        self._num_reads += 1
        # The first interval contains tracing and compilation: the second one replaces it, and only
        # later ones are averaged.
        if self._smoothed is None or self._num_reads == 2:
            self._smoothed = seconds
        else:
            self._smoothed += (1 - self._smoothing) * (seconds - self._smoothed)
