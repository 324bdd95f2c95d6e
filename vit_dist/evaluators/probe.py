"""A linear classifier on frozen features: logistic regression for a grid of penalties at once."""

import functools
from collections.abc import Sequence

import numpy as np

from vit_dist.config.errors import ConfigError
from vit_dist.evaluators.calibration import log_probabilities
from vit_dist.evaluators.checks import at_least_one, each_positive
from vit_dist.evaluators.lbfgs import minimize
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs


def make_linear_probe(
    *,
    l2: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    held_out: float = 0.1,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    seed: int = 0,
) -> Named:
    """Makes a function of features that judges them by a linear classifier, trained to the end.

    It minimises mean cross-entropy + l2 / 2 |W|^2, the bias without a penalty: scikit-learn's
    LogisticRegression with C = 1 / (l2 N). Which penalty counts is decided by training examples
    that are held out for it, never by those that are judged.

    Args:
      l2: penalties.
      held_out: share of the training examples, in (0, 1), drawn by `seed`, that chooses the
        penalty; the classifiers that are judged are trained on all. Of no effect for one penalty.
      tolerance: of the largest entry of the gradient.
      max_iterations: the most steps of L-BFGS.
      seed: of the examples that are held out.

    Returns:
      A function (judged, train) -> "accuracy" and "l2", of the penalty chosen, and
      "l2_X_accuracy" of each.

    Raises:
      ConfigError: a number that cannot be used.
    """
    each_positive("l2", l2)
    each_positive("tolerance", [tolerance])
    at_least_one("max_iterations", max_iterations)
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out must be in (0, 1), got {held_out!r}")
    penalties = np.array(sorted(set(l2)), np.float64)
    fit_all = functools.partial(
        fit, penalties=penalties, tolerance=tolerance, max_iterations=max_iterations
    )

    def evaluate(judged: Outputs, train: Outputs) -> dict[str, float]:
        num_classes = len(train.class_names)
        chosen = 0
        if len(penalties) > 1:
            order = np.random.default_rng(seed).permutation(len(train.labels))
            # At least one example on each side, however few there are.
            count = min(max(round(held_out * len(order)), 1), len(order) - 1)
            out, rest = order[:count], order[count:]
            weights = fit_all(train.values[rest], train.labels[rest], num_classes)
            found = accuracies(weights, train.values[out], train.labels[out])
            # Of equally good penalties the largest: the smoothest classifier.
            chosen = len(found) - 1 - int(found[::-1].argmax())
        weights = fit_all(train.values, train.labels, num_classes)
        found = accuracies(weights, judged.values, judged.labels)
        return {
            "accuracy": float(found[chosen]),
            "l2": float(penalties[chosen]),
            **{name: float(value) for name, value in zip(each, found, strict=True)},
        }

    each = [f"l2_{penalty:g}_accuracy" for penalty in penalties]
    return Named(evaluate, lambda class_names, num_train: ["accuracy", "l2", *each])


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: np.ndarray,
    *,
    tolerance: float,
    max_iterations: int,
) -> np.ndarray:
    """Trains a classifier for each of G penalties on features (N, F).

    Returns:
      float64 (G, F + 1, C), the bias in the last row.
    """
    # Centred, which changes no classifier but its bias, whose penalty is none: features with a
    # large common part would take many more steps.
    center = features.mean(axis=0, dtype=np.float64)
    x = np.pad(features - center, ((0, 0), (0, 1)), constant_values=1.0)
    count, width = x.shape
    rows = np.arange(count)

    def losses(problems: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = points.reshape(len(problems), width, num_classes)
        # (F + 1, G C): all problems in one product.
        wide = weights.transpose(1, 0, 2).reshape(width, -1)
        logits = (x @ wide).reshape(-1, num_classes)
        log_p = log_probabilities(logits).reshape(count, len(problems), num_classes)
        values = -log_p[rows, :, labels].mean(axis=0)
        p = np.exp(log_p)
        p[rows, :, labels] -= 1
        gradients = (x.T @ p.reshape(count, -1) / count).reshape(width, -1, num_classes)
        gradients = gradients.transpose(1, 0, 2).copy()
        held = weights[:, :-1]
        scale = penalties[problems]
        values += scale / 2 * (held**2).sum(axis=(1, 2))
        gradients[:, :-1] += scale[:, np.newaxis, np.newaxis] * held
        return values, gradients.reshape(points.shape)

    start = np.zeros((len(penalties), width * num_classes))
    found = minimize(losses, start, tolerance=tolerance, max_iterations=max_iterations)
    weights = found.reshape(len(penalties), width, num_classes)
    # The bias of the features as they are.
    weights[:, -1] -= np.einsum("f,gfc->gc", center, weights[:, :-1])
    return weights


def accuracies(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The accuracy of each of the G classifiers on features (N, F): float64 (G,)."""
    logits = np.asarray(features, np.float64) @ weights[:, :-1] + weights[:, -1:]
    return (logits.argmax(axis=-1) == labels).mean(axis=-1)
