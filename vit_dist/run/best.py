"""The best checkpoint of a run by one of its metrics, and when to stop looking for a better one.

It lies in the folder "best" of the run's folder, which is laid out like a run's: whatever reads a
run reads RUN/best. Its manifest notes the metric and the value, so a resume knows what to beat.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.cluster.hosts import all_hosts, is_chief
from vit_dist.config.errors import ConfigError
from vit_dist.paths import expand
from vit_dist.run.options import BestOptions
from vit_dist.training.checkpoint import Checkpointer

FOLDER = "best"


class Best:
    """Keeps the checkpoint with the best value of a metric.

    The chief decides, as only it is sure to have read the earlier best one, and numbers of other
    hosts may differ in their last digit.

    Args:
      options: None for a run that keeps none.
      workdir: folder of the run.
      strategy: the run's.
      permit: see Checkpointer.

    Attributes:
      name: of what is judged: "val", or one of config.evals; "" where none is kept.
      step: the step of the best value; -1 for none yet.
    """

    def __init__(
        self,
        options: BestOptions | None,
        workdir: str,
        strategy: tf.distribute.Strategy,
        *,
        permit: Callable[[], None] = lambda: None,
    ):
        self._options, self._strategy = options, strategy
        self._chief = is_chief(strategy)
        self._checkpointer = Checkpointer(
            expand(workdir) / FOLDER, keep=1, alone=True, permit=permit
        )
        self.name = options.metric.partition("/")[0] if options is not None else ""
        self.step, self._value = -1, math.nan
        if options is not None and self._chief:
            self._read(options)
        if options is not None:
            self.step = all_hosts(strategy, self.step)[0]

    def _read(self, options: BestOptions) -> None:
        found = self._checkpointer.newest()
        if found is None:
            return
        noted = found.notes["best"]
        if noted["metric"] == options.metric:
            self.step, self._value = found.step, float(noted["value"])
        else:
            logging.warning(
                "%s is the best by %s; by %s a new one is looked for",
                found.path,
                noted["metric"],
                options.metric,
            )
        found.close()

    def is_better(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of a step hold a better value than any before; a collective.

        Args:
          step: number of steps done.
          metrics: metric -> value, of what is called `name`.

        Raises:
          ConfigError: what was judged has no such metric; names those that it has.
        """
        options = self._options
        assert options is not None, "no best one is kept"
        metric = options.metric.partition("/")[2]
        if metric not in metrics:
            known = ", ".join(f"{self.name}/{key}" for key in metrics)
            raise ConfigError(f"config.keep_best {options.metric!r} is unknown; there are {known}")
        value = metrics[metric]
        # A value that is no number is never better, and any number is better than none.
        better = math.isfinite(value) and (
            self.step < 0 or (value < self._value if options.mode == "min" else value > self._value)
        )
        if not all_hosts(self._strategy, int(better))[0]:
            return False
        self.step, self._value = step, value
        return True

    def save(self, arrays: Mapping[str, np.ndarray], notes: dict[str, Any], *, step: int) -> None:
        """Starts to write the state that `is_better` was told of, by the chief alone."""
        if self._chief and self._options is not None:
            best = {"metric": self._options.metric, "value": self._value}
            self._checkpointer.save(arrays, step=step, notes={**notes, "best": best})

    def is_over(self, step: int) -> bool:
        """Whether the last `patience` steps have brought nothing better; the same on all hosts."""
        patience = self._options.patience if self._options is not None else 0
        return bool(patience) and self.step >= 0 and step - self.step >= patience

    def poll(self) -> None:
        """Raises StorageError if the checkpoint being written has failed; never waits."""
        self._checkpointer.poll()

    def wait(self) -> None:
        """Returns when the checkpoint is on disk; raises StorageError where that failed."""
        self._checkpointer.wait()
