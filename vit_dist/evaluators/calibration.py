"""How far a classifier's confidence is from its accuracy ("On Calibration of Modern Neural
Networks", Guo et al. 2017, arXiv 1706.04599).
"""

from typing import NamedTuple

import numpy as np

# Temperatures between which the best one is looked for. A model that is right about every example
# has none: its likelihood grows for ever as the temperature falls.
LOWEST, HIGHEST = 1e-2, 1e2


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithm of softmax, float64 (N, C)."""
    logits = np.asarray(logits, np.float64)
    # The largest logit is subtracted, so that exp() cannot overflow.
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def mean_loss(log_p: np.ndarray, labels: np.ndarray) -> float:
    """The mean negative log-likelihood of the labels, (N,), in nats."""
    return float(-log_p[np.arange(len(labels)), labels].mean())


def calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> float:
    """The expected calibration error: sum over bins of |bin| / N * |accuracy - mean confidence|.

    Args:
      confidence: (N,), the probability of the class that an example was taken for.
      correct: bool (N,), whether it is of that class.
      bins: how many of equal width; bin i holds confidences in (i / bins, (i + 1) / bins].
    """
    # |bin| cancels: what is left of each bin is the sum of correct - confidence.
    places = bin_places(confidence, bins=bins)
    gaps = np.bincount(places, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def bin_places(confidence: np.ndarray, *, bins: int) -> np.ndarray:
    """The number of the bin of each confidence, int (N,) in [0, bins); see `calibration_error`."""
    edges = np.linspace(0, 1, bins + 1)
    # side="left" puts a confidence that is an edge into the bin below it.
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


class Reliability(NamedTuple):
    """What a reliability diagram shows, by bins of confidence as in `calibration_error`.

    Attributes:
      counts: int (bins,), examples of each bin.
      accuracy, confidence: float (bins,), means over the examples of a bin; NaN in an empty one.
      error: the expected calibration error.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    error: float


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> Reliability:
    """Counts by bins of confidence; arguments as in `calibration_error`."""
    places = bin_places(confidence, bins=bins)
    counts = np.bincount(places, minlength=bins)
    # 0 / 0 is NaN: an empty bin has no mean.
    divisor = np.where(counts > 0, counts, np.nan)
    return Reliability(
        counts=counts,
        accuracy=np.bincount(places, weights=correct, minlength=bins) / divisor,
        confidence=np.bincount(places, weights=confidence, minlength=bins) / divisor,
        error=calibration_error(confidence, correct, bins=bins),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T in [LOWEST, HIGHEST] with the least mean loss of logits / T.

    NaN where a logit is not finite.
    """
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        return float("nan")
    mine = logits[np.arange(len(labels)), labels]
    # The loss is convex in beta = 1 / T. Its slope is the mean over the examples of the expected
    # logit minus the label's, and its curvature the mean variance of the logits.
    low, high, beta = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        p = np.exp(log_probabilities(logits * beta))
        expected = (p * logits).sum(axis=1)
        slope = float((expected - mine).mean())
        curvature = float(((p * logits**2).sum(axis=1) - expected**2).mean())
        low, high = (beta, high) if slope < 0 else (low, beta)
        # Newton's step; halving what is left where it would leave the interval.
        new = beta - slope / curvature if curvature > 0 else low
        new = new if low < new < high else (low + high) / 2
        done, beta = abs(new - beta) <= 1e-10 * beta, new
        if done:
            break
    return 1 / beta
