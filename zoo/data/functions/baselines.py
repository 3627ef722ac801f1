"""Regressions that predict each label of a prompt from the points before it, in closed form.

All take `xs [points, dims]` and `ys [points]` of one prompt, in the number type of the arrays, and
predict 0 where they know nothing. `over(baseline, xs, ys)` runs one over a batch. Definitions are
those of github.com/dtsip/in-context-learning and github.com/satwik77/incontext-bool (MIT).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "points dims"]
Labels = Float[np.ndarray, "points"]


def over(baseline: Callable[..., Labels], xs: np.ndarray, ys: np.ndarray, **options) -> np.ndarray:
    """A baseline's predictions for a batch of prompts: `[batch, points]`."""
    return np.stack([baseline(x, y, **options) for x, y in zip(xs, ys, strict=True)])


def least_squares(xs: Points, ys: Labels) -> Labels:
    """Least squares; of the solutions, while there are many, the shortest."""
    rows = [np.zeros((), xs.dtype)]
    rows += [xs[i] @ (np.linalg.pinv(xs[:i]) @ ys[:i]) for i in range(1, len(xs))]
    return np.stack(rows)


def ridge(xs: Points, ys: Labels, penalty: float = 1.0) -> Labels:
    """Least squares with `penalty |w|^2`: Bayes-optimal if that is noise over prior variance."""
    rows = []
    eye = np.eye(xs.shape[1])
    for i in range(len(xs)):
        gram = xs[:i].T @ xs[:i] + penalty * eye
        rows.append(xs[i] @ np.linalg.solve(gram, xs[:i].T @ ys[:i]))
    return np.stack(rows)


def lasso(xs: Points, ys: Labels, penalty: float = 0.1, sweeps: int = 200) -> Labels:
    """Minimises `|y - X w|^2 / 2n + penalty |w|_1` by coordinate descent, prefix by prefix."""
    rows, weights = [np.zeros((), xs.dtype)], np.zeros(xs.shape[1])
    for i in range(1, len(xs)):
        gram, target = xs[:i].T @ xs[:i] / i, xs[:i].T @ ys[:i] / i
        for _ in range(sweeps):
            before = weights.copy()
            for j in range(len(weights)):
                rest = target[j] - gram[j] @ weights + gram[j, j] * weights[j]
                small = np.maximum(np.abs(rest) - penalty, 0)
                weights[j] = np.sign(rest) * small / gram[j, j] if gram[j, j] > 0 else 0
            if np.abs(weights - before).max() < 1e-7:
                break
        rows.append(xs[i] @ weights)
    return np.stack(rows)


def nearest(xs: Points, ys: Labels, neighbours: int = 3, by_distance: bool = False) -> Labels:
    """The mean label of the nearest points so far; the first of equally near ones counts.

    Args:
      xs: the points.
      ys: their labels.
      neighbours: how many.
      by_distance: weigh them by the inverse of their distance; equal points by themselves.
    """
    rows = [np.zeros((), xs.dtype)]
    for i in range(1, len(xs)):
        distance = np.sqrt(((xs[:i] - xs[i]) ** 2).sum(1))
        chosen = np.argsort(distance, kind="stable")[:neighbours]
        weights = np.ones(len(chosen))
        if by_distance:
            same = distance == 0
            near = distance[chosen]
            weights = same[chosen].astype(float) if same.any() else 1 / near
        rows.append((weights * ys[chosen]).sum() / weights.sum())
    return np.stack(rows)


def nearest_cosine(xs: Points, ys: Labels) -> Labels:
    """The label of the point so far with the smallest angle; the first of equals."""
    units = xs / np.linalg.norm(xs, axis=1, keepdims=True)
    rows = [np.zeros((), xs.dtype)]
    rows += [ys[np.argmax(np.round(units[:i] @ units[i], 7))] for i in range(1, len(xs))]
    return np.stack(rows)


def averaging(xs: Points, ys: Labels) -> Labels:
    """`x . mean of y_j x_j`: one gradient step from 0, without a preconditioner."""
    sums = np.cumsum(xs * ys[:, None], axis=0)[:-1] / np.arange(1, len(xs))[:, None]
    return np.concatenate([np.zeros(1, xs.dtype), (sums * xs[1:]).sum(1)])


def gradient_descent(xs: Points, ys: Labels, steps: int = 10, rate: float = 0.1) -> Labels:
    """A linear function after so many gradient steps on the mean squared error, from 0."""
    rows = [np.zeros((), xs.dtype)]
    for i in range(1, len(xs)):
        weights = np.zeros(xs.shape[1])
        for _ in range(steps):
            weights = weights - rate * xs[:i].T @ (xs[:i] @ weights - ys[:i]) / i
        rows.append(xs[i] @ weights)
    return np.stack(rows)


def never(xs: Points, ys: Labels) -> Labels:
    """Always -1, whatever was seen."""
    return -np.ones(len(xs), xs.dtype)
