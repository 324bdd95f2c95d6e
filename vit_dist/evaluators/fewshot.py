"""Least squares on the features of a few examples a class (big_vision's fewshot_lsr.py)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vit_dist.evaluators.checks import at_least_one, each_positive
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs

# The constant feature that stands for a bias: so large that the penalty hardly holds it down.
_BIAS = 100.0


def make_fewshot(
    *,
    shots: Sequence[int] = (1, 5, 10, 25),
    l2: Sequence[float] = (2.0**10,),
    num_seeds: int = 3,
) -> Named:
    """Makes a function of features that judges them by regression on a few of the training's.

    For each seed 0, 1, ... the examples of each class are shuffled, and the first ones of each are
    trained on: all that there are, where a class has fewer than `shots`.

    Args:
      shots: training examples of each class.
      l2: penalties; they share one eigendecomposition.
      num_seeds: how many draws of the examples are averaged.

    Returns:
      A function (judged, train) -> "Nshot_accuracy", or "Nshot_l2_X_accuracy" where `l2` has
      several: means over the seeds.

    Raises:
      ConfigError: a number that cannot be used.
    """
    each_positive("shots", shots, kind=int)
    each_positive("l2", l2)
    at_least_one("num_seeds", num_seeds)

    def name(count: int, penalty: float) -> str:
        return f"{count}shot{f'_l2_{penalty:g}' if len(l2) > 1 else ''}_accuracy"

    def evaluate(judged: Outputs, train: Outputs) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for seed in range(num_seeds):
            # One generator goes through the classes, as in big_vision: the same examples are drawn.
            random = np.random.default_rng(seed)
            by_class = [
                random.permutation(np.flatnonzero(train.labels == label))
                for label in range(len(train.class_names))
            ]
            for count in shots:
                rows = np.concatenate([indices[:count] for indices in by_class])
                labels = train.labels[rows]
                fit = _decompose(train.values[rows], labels, len(train.class_names))
                for penalty in l2:
                    hits = fit.predict(judged.values, penalty) == judged.labels
                    found.setdefault(name(count, penalty), []).append(float(hits.mean()))
        return {key: float(np.mean(values)) for key, values in found.items()}

    names = [name(count, penalty) for count in shots for penalty in l2]
    return Named(evaluate, lambda class_names, num_train: names)


class _Fit(NamedTuple):
    """Least squares for any penalty: weights = left diag(1 / (values + penalty)) right.

    Attributes:
      mean, deviation: of the training's features, (F,).
      left: (F + 1, R); values: (R,), eigenvalues; right: (R, C).
    """

    mean: np.ndarray
    deviation: np.ndarray
    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    def predict(self, features: np.ndarray, penalty: float) -> np.ndarray:
        """The class of each row of features (N, F): int (N,)."""
        weights = (self.left / (self.values + penalty)) @ self.right
        return (_standardized(features, self.mean, self.deviation) @ weights).argmax(axis=1)


def _decompose(features: np.ndarray, labels: np.ndarray, num_classes: int) -> _Fit:
    """Prepares the fit of targets -1 and 1 to features (N, F), standardised and with a constant."""
    features = np.asarray(features, np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-5
    x = _standardized(features, mean, deviation)
    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    # The weights are (X'X + l2)^-1 X'Y, or equally X'(XX' + l2)^-1 Y: the smaller matrix is taken.
    # It is decomposed once into Q diag(values) Q', and then inverted for any l2.
    if x.shape[0] >= x.shape[1]:
        values, q = np.linalg.eigh(x.T @ x)
        return _Fit(mean, deviation, q, values, q.T @ (x.T @ targets))
    values, q = np.linalg.eigh(x @ x.T)
    return _Fit(mean, deviation, x.T @ q, values, q.T @ targets)


def _standardized(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    x = (np.asarray(features, np.float64) - mean) / deviation
    return np.pad(x, ((0, 0), (0, 1)), constant_values=_BIAS)
