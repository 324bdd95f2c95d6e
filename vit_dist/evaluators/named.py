"""Evaluations that tell the names of their metrics before they judge anything."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Named:
    """What a kind's `make` may return in the place of a plain function.

    With it config.keep_best is checked before a run begins, and not at the first evaluation.

    Attributes:
      judge: as the plain function: Outputs -> name -> number.
      names: names of the classes, number of training examples (0 for kinds without) -> the names of
        the metrics that `judge` can return.
    """

    judge: Callable[..., Mapping[str, float]]
    names: Callable[[Sequence[str], int], Sequence[str]]

    def __call__(self, *arguments: object) -> Mapping[str, float]:
        return self.judge(*arguments)
