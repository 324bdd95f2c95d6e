"""L-BFGS for several convex problems at once (Nocedal and Wright, Numerical Optimization, 7.4).

One call of the function computes all problems, which for linear classifiers on the same features is
one product of large matrices in place of many thin ones. A problem that has converged drops out.
"""

from collections.abc import Callable

import numpy as np

_MEMORY = 10  # steps that the curvature is estimated from
_HALVINGS = 30  # of a step, before it counts as no way down

# (problems (G,), points (G, P)) -> (values (G,), gradients (G, P)).
Function = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# Steps, changes of the gradient, both (G, P), and 1 / their product (G,).
_Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def minimize(
    function: Function, start: np.ndarray, *, tolerance: float, max_iterations: int
) -> np.ndarray:
    """Minimises convex, smooth functions.

    Args:
      function: of some of the problems, given by their numbers, at a point for each.
      start: (G, P), a point for each problem.
      tolerance: a problem has converged where no entry of its gradient is larger.
      max_iterations: the most steps.

    Returns:
      (G, P), the points reached.
    """
    points = np.array(start, np.float64)
    active = np.arange(len(points))
    values, gradients = function(active, points)
    history: list[_Pair] = []
    for _ in range(max_iterations):
        going = np.abs(gradients).max(axis=1) > tolerance
        if not going.all():
            active, values, gradients = active[going], values[going], gradients[going]
            history = [(s[going], y[going], rho[going]) for s, y, rho in history]
        if not len(active):
            break
        x = points[active]
        directions = -_times_inverse(history, gradients)
        new, new_values, new_gradients = _search(
            function, active, x, values, gradients, directions, first=not history
        )
        step, change = new - x, new_gradients - gradients
        product = (step * change).sum(axis=1)
        # Positive wherever the function is convex; at the limit of rounding the pair is left out.
        usable = product > 1e-20
        rho = np.where(usable, 1 / np.where(usable, product, 1.0), 0.0)
        history = [*history[1 - _MEMORY :], (step, change, rho)]
        # A problem that made no step is at the limit of rounding: its gradient is counted as none,
        # so that it drops out.
        new_gradients[~step.any(axis=1)] = 0.0
        points[active], values, gradients = new, new_values, new_gradients
    return points


def _times_inverse(history: list[_Pair], gradients: np.ndarray) -> np.ndarray:
    """The two-loop recursion: an estimate of the inverse Hessian times the gradients."""
    q, alphas = gradients.copy(), []
    for step, change, rho in reversed(history):
        alpha = rho * (step * q).sum(axis=1)
        q -= alpha[:, np.newaxis] * change
        alphas.append(alpha)
    if history:
        step, change, rho = history[-1]
        square = (change * change).sum(axis=1)
        # The scale of the newest curvature; 1 where the newest pair is left out.
        scale = np.where(rho > 0, (step * change).sum(axis=1) / np.where(square > 0, square, 1), 1)
        q *= scale[:, np.newaxis]
    for (step, change, rho), alpha in zip(history, reversed(alphas), strict=True):
        beta = rho * (change * q).sum(axis=1)
        q += (alpha - beta)[:, np.newaxis] * step
    return q


def _search(
    function: Function,
    active: np.ndarray,
    x: np.ndarray,
    values: np.ndarray,
    gradients: np.ndarray,
    directions: np.ndarray,
    *,
    first: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halves each problem's step until its value falls enough (Armijo's rule)."""
    slopes = (directions * gradients).sum(axis=1)
    # Without an estimate of the curvature the first step has length 1 at most.
    lengths = np.ones(len(x))
    if first:
        lengths = np.minimum(1.0, 1 / np.linalg.norm(directions, axis=1))
    # Rounding of the value: near the minimum a good step may not show in it.
    slack = 1e-14 * np.abs(values)
    for _ in range(_HALVINGS):
        new = x + lengths[:, np.newaxis] * directions
        new_values, new_gradients = function(active, new)
        good = new_values <= values + 1e-4 * lengths * slopes + slack
        if good.all():
            return new, new_values, new_gradients
        lengths = np.where(good, lengths, lengths / 2)
    # No way down for some problem: it stays where it is.
    new = np.where(good[:, np.newaxis], new, x)
    new_values = np.where(good, new_values, values)
    return new, new_values, np.where(good[:, np.newaxis], new_gradients, gradients)
