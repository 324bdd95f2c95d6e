"""A profile of some steps, for TensorBoard's profile plugin (config.profile)."""

import contextlib
from collections.abc import Callable, Iterator

import tensorflow as tf
from absl import logging

from vit_dist.storage.errors import cause


class Profiler:
    """Profiles the steps from `first` on, exactly `count` of them, each in a call of its own.

    A run that begins behind `first`, such as a resumed one, profiles nothing: part of the steps
    would be taken for all. A profiler that fails is told once and ends no run.

    Args:
      folder: of TensorBoard's events; the profile goes to plugins/profile in it.
      first: the first step to profile, from 0; None for no profile.
      count: how many steps.
      active: whether this host is the one that writes.
    """

    def __init__(self, folder: str, *, first: int | None, count: int, active: bool = True):
        self._folder, self._active = folder, active
        self._steps = range(0) if first is None else range(first, first + count)
        self._running = False

    @property
    def bounds(self) -> tuple[int, ...]:
        """The steps at which a call of the loop has to end, on all hosts alike."""
        # Every step between is a bound as well, since each is profiled in a call of its own.
        return tuple(range(self._steps.start, self._steps.stop + 1)) if self._steps else ()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a call of the step number `step`, which begins the profile at the first one."""
        if self._active and self._steps and step == self._steps.start:
            self._start()
        if not self._running:
            yield
            return
        # `_r` marks the root of a step, by which the plugin tells steps apart.
        with tf.profiler.experimental.Trace("train", step_num=step, _r=1):
            yield

    def ends_at(self, step: int) -> bool:
        """Whether `stop` is due when so many steps have been done."""
        return self._running and step == self._steps.stop

    def stop(self, wait: Callable[[], object] = lambda: None) -> None:
        """Ends the profile and writes it, if one is being made.

        It is written at once and not by a thread: what ran meanwhile would be in it.

        Args:
          wait: returns when the device has done what it was given.
        """
        if not self._running:
            return
        wait()
        self._running = False
        with self._telling():
            tf.profiler.experimental.stop()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        # TensorFlow has one profiler in a process: left on, none could begin again.
        self.stop()

    def _start(self) -> None:
        with self._telling():
            tf.profiler.experimental.start(self._folder)
            self._running = True

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        # Of any kind: it depends on drivers and libraries, and a run is worth more than a profile.
        except Exception as error:
            logging.warning(
                "no profile in %s (%s): going on without it", self._folder, cause(error)
            )
