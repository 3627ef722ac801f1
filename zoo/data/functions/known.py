"""Baselines with their settings, as configs name them: `f(xs, ys) -> predictions` of a prompt."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from zoo.data.functions import baselines, bayes, boolean, learners
from zoo.data.functions.continuous import windows

Points = Float[np.ndarray, "points dims"]
Labels = Float[np.ndarray, "points"]


@dataclass(frozen=True)
class Ridge:
    """Least squares with a penalty."""

    penalty: float = 1.0

    def __call__(self, xs: Points, ys: Labels) -> Labels:
        """Its predictions."""
        return baselines.ridge(xs, ys, self.penalty)


@dataclass(frozen=True)
class Nearest:
    """The mean label of the nearest points."""

    neighbours: int = 3

    def __call__(self, xs: Points, ys: Labels) -> Labels:
        """Its predictions."""
        return baselines.nearest(xs, ys, self.neighbours)


@dataclass(frozen=True)
class WindowLeastSquares:
    """Least squares on the last points together; with a penalty, ridge."""

    width: int
    penalty: float = 0.0

    def __call__(self, xs: Points, ys: Labels) -> Labels:
        """Its predictions."""
        seen = windows(xs, self.width).reshape(len(xs), -1)
        if self.penalty:
            return baselines.ridge(seen, ys, self.penalty)
        return baselines.least_squares(seen, ys)


@dataclass(frozen=True)
class Bayes:
    """The exact belief where the noise is one of `sigmas` and weights have the deviation `tau`."""

    sigmas: tuple[float, ...]
    tau: float = 1.0

    def __call__(self, xs: Points, ys: Labels) -> bayes.Belief:
        """Its beliefs."""
        return bayes.unknown_noise(xs, ys, self.sigmas, self.tau)[0]


@dataclass(frozen=True)
class Terms:
    """Bayes' vote over all conjunctions, or disjunctions, as likely as they are drawn."""

    positive: float = 0.15
    negative: float = 0.15
    disjunctive: bool = False

    def __call__(self, xs: Points, ys: Labels) -> Labels:
        """Its predictions."""
        members, prior = learners.terms(xs.shape[1], self.positive, self.negative)
        function = boolean.disjunction if self.disjunctive else boolean.conjunction
        return learners.vote(learners.enumerate_class(function, members, xs), ys, prior)


@dataclass(frozen=True)
class Parities:
    """Bayes' vote over all parities, or those of `size` inputs."""

    size: int | None = None

    def __call__(self, xs: Points, ys: Labels) -> Labels:
        """Its predictions."""
        if self.size is None:
            return learners.solve_parity(xs, ys)
        members = learners.subsets(xs.shape[1], self.size)
        return learners.vote(learners.enumerate_class(boolean.parity, members, xs), ys)
