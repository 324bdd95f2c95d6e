"""Ending a run early without losing it: SIGTERM and Ctrl-C save a checkpoint first."""

import signal
from typing import Any

import tensorflow as tf
from absl import logging

from vit_dist.strategy import num_hosts


class Preemption:
    """Notices SIGTERM and Ctrl-C; a second Ctrl-C ends at once. Make it after the strategy.

    TensorFlow's runtime puts its own SIGTERM handler in place when a multi-worker strategy starts.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy, self._flag = strategy, False
        try:
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread (train() called from a notebook or a test)
            logging.warning("not in the main thread: SIGTERM will not save a checkpoint")

    def _note(self, number: int, frame: Any) -> None:
        if self._flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._flag = True

    def requested(self) -> bool:
        """Whether any host was asked to stop; all hosts get the same answer at the same step."""
        if num_hosts(self._strategy) == 1:
            return self._flag
        flag = tf.constant(float(self._flag))
        total = self._strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce("SUM", flag)
        )
        return float(self._strategy.experimental_local_results(total)[0]) > 0
