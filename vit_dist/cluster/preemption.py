"""Ending a run early without losing it: SIGTERM and Ctrl-C save a checkpoint first."""

import signal
from typing import Any

import tensorflow as tf
from absl import logging

from vit_dist.cluster.hosts import all_hosts


class Preemption:
    """Notices SIGTERM and Ctrl-C within a `with`; a second Ctrl-C ends at once.

    Enter it after the strategy is made: TensorFlow's runtime puts its own SIGTERM handler in place
    when a multi-worker strategy starts.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy, self._flag = strategy, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread (train() called from a notebook or a test)
            logging.warning("not in the main thread: SIGTERM will not save a checkpoint")
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # None: set by C code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._flag = True

    @property
    def noticed(self) -> bool:
        """Whether this host was asked to stop."""
        return self._flag

    def requested(self) -> bool:
        """Whether any host was asked to stop; all hosts get the same answer at the same step."""
        return any(all_hosts(self._strategy, self._flag))
