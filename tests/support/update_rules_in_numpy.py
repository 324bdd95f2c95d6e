"""The optimizers' formulas restated in NumPy.

Each returns what is subtracted from the weights, decay included, and moves the slots in place; t
counts from 1, `decay` is 0 for what does not decay.
"""

import numpy as np


def adam(slots, g, t, *, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    m, v = slots.setdefault("momentum", 0 * g), slots.setdefault("velocity", 0 * g)
    m += (1 - beta_1) * (g - m)
    v += (1 - beta_2) * (g * g - v)
    return m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)


def adamw(w, slots, g, lr, t, *, decay, **options):
    return lr * adam(slots, g, t, **options) + lr * decay * w


def lamb(w, slots, g, lr, t, *, decay, **options):
    u = adam(slots, g, t, **{"epsilon": 1e-6, **options}) + decay * w
    return lr * u * (np.linalg.norm(w) / np.linalg.norm(u) if decay else 1.0)


def sgd(w, slots, g, lr, t, *, decay, momentum=0.9):
    """As torch and optax have it: the learning rate is no part of the trace."""
    if momentum:
        trace = slots.setdefault("momentum", 0 * g)
        trace *= momentum
        trace += g
        g = trace
    return lr * g + lr * decay * w


def lion(w, slots, g, lr, t, *, decay, beta_1=0.9, beta_2=0.99):
    m = slots.setdefault("momentum", 0 * g)
    sign = np.sign(beta_1 * m + (1 - beta_1) * g)
    m += (1 - beta_2) * (g - m)
    return lr * sign + lr * decay * w


def factored(slots, g, t, *, cap, least):
    """The gradient over the root of its second moment, arXiv 1804.04235, algorithm 4."""
    beta, squared = min(cap, 1 - t**-0.8), g * g + 1e-30
    if g.ndim < 2 or sorted(g.shape)[-2] < least:
        v = slots.setdefault("velocity", 0 * g)
        v += (1 - beta) * (squared - v)
        return g / np.sqrt(v)
    longest = int(np.argmax(g.shape))  # no ties here
    second = next(i for i, n in enumerate(g.shape) if n == sorted(g.shape)[-2])
    row = slots.setdefault("row", 0 * squared.mean(longest))
    column = slots.setdefault("column", 0 * squared.mean(second))
    row += (1 - beta) * (squared.mean(longest) - row)
    column += (1 - beta) * (squared.mean(second) - column)
    # The outer product over the mean of the moments along the two axes.
    rows, columns = np.expand_dims(row, longest), np.expand_dims(column, second)
    return g / np.sqrt(rows * columns / rows.mean(second, keepdims=True))


def rms(x):
    return np.sqrt((x**2).mean())


def adafactor(w, slots, g, lr, t, *, decay):
    u = factored(slots, g, t, cap=1.0, least=128)
    u = u / max(1, rms(u)) * max(1e-3, rms(w))
    return lr * u + lr * decay * w


def adafactor_vit(w, slots, g, lr, t, *, decay, beta_1=0.9, beta_2=0.999):
    m = slots.setdefault("momentum", 0 * g)
    m += (1 - beta_1) * (factored(slots, g, t, cap=beta_2, least=32) - m)
    return lr * m + lr * decay * w


def muon(w, slots, g, lr, t, *, decay, momentum=0.95):
    """Matrices; the rest has Adam."""
    if g.ndim != 2:
        return lr * adam(slots, g, t, epsilon=1e-7) + lr * decay * w
    m = slots.setdefault("momentum", 0 * g)
    m *= momentum
    m += g
    x = g + momentum * m
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    return lr * (0.2 * np.sqrt(max(g.shape)) * x + decay * w)


RULES = {
    "adamw": adamw, "sgd": sgd, "lamb": lamb, "lion": lion, "adafactor": adafactor,
    "adafactor_vit": adafactor_vit, "muon": muon,
}  # fmt: skip
