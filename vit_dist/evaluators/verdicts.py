"""What a classifier said of each example of a split: what pictures of an evaluation are made of."""

import dataclasses

import numpy as np

from vit_dist.evaluators.calibration import log_probabilities
from vit_dist.evaluators.outputs import Outputs
from vit_dist.evaluators.real import with_likeliest


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """N judged examples, in the order of their source.

    Attributes:
      indices: int64 (N,), the place of each example in its source.
      labels: int64 (N,), class numbers; of an example with several labels the likeliest of them.
      predictions: int64 (N,), the class with the largest logit.
      confidence: float32 (N,), softmax's probability of the prediction.
      certainty: float32 (N,), softmax's probability of the label.
    """

    indices: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    certainty: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Which predictions are right, bool (N,)."""
        return self.labels == self.predictions

    def extremes(self, count: int, *, before: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the worst and the best examples are: two arrays of numbers in [0, N).

        Args:
          count: how many of each at most; the best are none of the worst.
          before: only examples at a smaller place in their source are looked at.

        Returns:
          The examples whose label is least likely to the model, the worst first (NaN is worse
          than all), and the ones whose label is likeliest, the best first.
        """
        places = np.flatnonzero(self.indices < before)
        certainty = self.certainty[places]
        # Stable, so that of equal probabilities the first examples of the source are shown.
        order = places[np.argsort(np.where(np.isnan(certainty), -1, certainty), kind="stable")]
        worst = order[:count]
        likeliest = places[np.argsort(np.where(np.isnan(certainty), 1, -certainty), kind="stable")]
        best = likeliest[: min(count, len(places) - len(worst))]
        return worst, best[~np.isin(best, worst)]


def verdicts_of(judged: Outputs, indices: np.ndarray) -> Verdicts:
    """The verdicts of logits that have been gathered on the host.

    Args:
      judged: logits (N, C) and labels; of sets of labels those that are empty have no verdict.
      indices: int64 (N,), the place of each example in its source.
    """
    if judged.labels.ndim == 2:
        judged, rows = with_likeliest(judged)
        indices = indices[rows]
    log_p = log_probabilities(judged.values)
    predictions = judged.values.argmax(axis=1)
    each = np.arange(len(predictions))
    return Verdicts(
        indices=indices,
        labels=judged.labels,
        predictions=predictions,
        confidence=np.exp(log_p[each, predictions]).astype(np.float32),
        certainty=np.exp(log_p[each, judged.labels]).astype(np.float32),
    )
