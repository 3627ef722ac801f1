"""The exact mean and variance of the next label, for linear functions with noise.

    y = w . x + sigma eps,  w ~ N(0, tau^2 I),  eps ~ N(0, 1)

Row i of an answer uses the points before i, and x_i. The weights of the values of sigma are in
logarithms, and the evidence goes through Cholesky factors.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "points dims"]
Labels = Float[np.ndarray, "points"]


class Belief(NamedTuple):
    """What is known of each label before it is seen."""

    mean: Labels
    variance: Labels


def known_noise(xs: Points, ys: Labels, sigma: float, tau: float = 1.0) -> Belief:
    """The belief where the noise's deviation is known."""
    means, variances = [], []
    for i in range(len(xs)):
        gram = xs[:i].T @ xs[:i] + sigma**2 / tau**2 * np.eye(xs.shape[1])
        solved = np.linalg.solve(gram, np.stack([xs[:i].T @ ys[:i], xs[i]], 1))
        means.append(xs[i] @ solved[:, 0])
        variances.append(sigma**2 * (1 + xs[i] @ solved[:, 1]))
    return Belief(np.array(means), np.array(variances))


def log_evidence(xs: Points, ys: Labels, sigma: float, tau: float = 1.0) -> Labels:
    """The logarithm of the density of the labels before each point."""
    rows = [0.0]
    for i in range(1, len(xs)):
        covariance = tau**2 * xs[:i] @ xs[:i].T + sigma**2 * np.eye(i)
        factor = np.linalg.cholesky(covariance)
        solved = np.linalg.solve(factor, ys[:i])
        size = np.log(np.diag(factor)).sum()
        rows.append(-0.5 * solved @ solved - size - 0.5 * i * np.log(2 * np.pi))
    return np.array(rows)


def mixture(
    means: Float[np.ndarray, "points cases"],
    variances: Float[np.ndarray, "points cases"],
    logarithms: Float[np.ndarray, "points cases"],
) -> tuple[Belief, Float[np.ndarray, "points cases"]]:
    """The belief that weighs several by (the exponentials of) these numbers, and the weights."""
    weights = np.exp(logarithms - logarithms.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True)
    mean = (weights * means).sum(1)
    second = (weights * (variances + means**2)).sum(1)
    return Belief(mean, second - mean**2), weights


def unknown_noise(
    xs: Points, ys: Labels, sigmas: tuple[float, ...], tau: float = 1.0
) -> tuple[Belief, Float[np.ndarray, "points sigmas"]]:
    """The belief where the noise is one of `sigmas`, each as likely before; and how likely now."""
    each = [known_noise(xs, ys, sigma, tau) for sigma in sigmas]
    evidence = np.stack([log_evidence(xs, ys, sigma, tau) for sigma in sigmas], 1)
    means, variances = (np.stack([b[part] for b in each], 1) for part in (0, 1))
    return mixture(means, variances, evidence)


def inverse_gamma_noise(
    xs: Points, ys: Labels, shape: float = 3.0, rate: float = 2.0, tau: float = 1.0
) -> Belief:
    """The belief where `sigma^2 ~ IG(shape, rate)` and `w ~ N(0, sigma^2 tau^2 I)`: Student's t."""
    means, variances = [], []
    for i in range(len(xs)):
        gram = xs[:i].T @ xs[:i] + np.eye(xs.shape[1]) / tau**2
        weights, towards = np.linalg.solve(gram, np.stack([xs[:i].T @ ys[:i], xs[i]], 1)).T
        left = rate + (ys[:i] @ ys[:i] - weights @ gram @ weights) / 2
        means.append(xs[i] @ weights)
        variances.append(left / (shape + i / 2 - 1) * (1 + xs[i] @ towards))
    return Belief(np.array(means), np.array(variances))


def pool(
    xs: Points,
    ys: Labels,
    weights: Float[np.ndarray, "tasks dims"],
    sigmas: Float[np.ndarray, "tasks"],
) -> Belief:
    """The belief where the function is one of a pool, each as likely before."""
    means = xs @ weights.T
    squares = ((ys[:, None] - means) / sigmas) ** 2
    density = -0.5 * squares - np.log(sigmas)
    before = np.concatenate([np.zeros((1, len(sigmas))), np.cumsum(density, 0)[:-1]])
    variances = np.broadcast_to(sigmas**2, means.shape)
    return mixture(means, variances, before)[0]


def without_prior(xs: Points, ys: Labels) -> Belief:
    """Least squares and the residual variance; not a number for prompts up to `dims` points."""
    means, variances = np.full(len(xs), np.nan), np.full(len(xs), np.nan)
    dims = xs.shape[1]
    for i in range(dims + 1, len(xs)):
        weights, towards = np.linalg.solve(
            xs[:i].T @ xs[:i], np.stack([xs[:i].T @ ys[:i], xs[i]], 1)
        ).T
        residual = ((ys[:i] - xs[:i] @ weights) ** 2).sum() / (i - dims)
        means[i], variances[i] = xs[i] @ weights, residual * (1 + xs[i] @ towards)
    return Belief(means, variances)


def negative_log_likelihood(belief: Belief, ys: Labels) -> Labels:
    """`log(v) / 2 + (y - m)^2 / 2v`: of a normal distribution, without its constant."""
    return 0.5 * np.log(belief.variance) + 0.5 * (ys - belief.mean) ** 2 / belief.variance
