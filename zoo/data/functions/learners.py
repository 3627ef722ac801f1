"""Learners that are optimal for a class of Boolean functions: what a prompt tells, and no more.

Each predicts the label of every point from those before it, in {-1, 1}, or 0 where both are as
likely. `xs [points, dims]` and `ys [points]` are one prompt without wrong labels.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "points dims"]
Labels = Float[np.ndarray, "points"]


def vote(
    labels: Float[np.ndarray, "functions points"],
    ys: Labels,
    prior: Float[np.ndarray, "functions"] | None = None,
) -> Labels:
    """Bayes' prediction: the weighed vote of the functions that agree with all labels so far.

    Args:
      labels: what each function of the class says at each point.
      ys: the labels.
      prior: how likely each function is, up to a factor; None: all alike.
    """
    weights = np.ones(len(labels)) if prior is None else prior
    agree = np.cumprod(labels == ys, axis=1)
    agree = np.concatenate([np.ones((len(labels), 1)), agree[:, :-1]], axis=1)
    votes = (weights[:, None] * agree * labels).sum(0)
    return np.sign(np.round(votes / weights.sum(), 12))


def terms(
    dims: int, positive: float = 0.15, negative: float = 0.15
) -> tuple[Float[np.ndarray, "terms dims"], Float[np.ndarray, "terms"]]:
    """All terms over `dims` inputs and how likely each is drawn; 3^dims, or 2^dims if monotone.

    Raises:
      ValueError: above 12 inputs, where there are too many.
    """
    if dims > 12:
        raise ValueError(f"There are 3^{dims} terms of {dims} inputs; enumerate 12 at most.")
    signs = (0, 1, -1) if negative else (0, 1)
    every = np.array(list(itertools.product(signs, repeat=dims)), float)
    rates = {0: 1 - positive - negative, 1: positive, -1: negative}
    prior = np.prod(np.vectorize(rates.get)(every), axis=1)
    return every, prior


def subsets(dims: int, size: int) -> Float[np.ndarray, "subsets dims"]:
    """All choices of `size` inputs, as vectors of {0, 1}."""
    rows = list(itertools.combinations(range(dims), size))
    chosen = np.zeros((len(rows), dims))
    chosen[np.arange(len(rows))[:, None], rows] = 1
    return chosen


def enumerate_class(
    function: Callable[[Points, np.ndarray], Labels], members: np.ndarray, xs: Points
) -> Float[np.ndarray, "functions points"]:
    """What each member of a class says: `function(xs, member)`, all at once."""
    return function(np.broadcast_to(xs, (len(members), *xs.shape)), members)


def eliminate(xs: Points, ys: Labels, disjunctive: bool = False) -> Labels:
    """The classical learner of conjunctions: keep every literal that no positive point has broken.

    It says 1 only where it is sure, and is never wrong about that. It learns disjunctions from
    their negation.
    """
    sign = -1 if disjunctive else 1
    possible = np.ones((2, xs.shape[1]), bool)  # x_j = 1, x_j = -1
    rows = []
    for x, y in zip(sign * xs, sign * ys, strict=True):
        holds = np.stack([x == 1, x == -1])
        rows.append(sign if not (possible & ~holds).any() else -sign)
        possible &= holds if y == 1 else True
    return np.array(rows, float)


def solve_parity(xs: Points, ys: Labels) -> Labels:
    """Gaussian elimination over the field of two: exact once the prompt's points span this one."""
    bits = ((xs + 1) / 2).astype(np.uint8)
    answers = ((ys + 1) / 2).astype(np.uint8)
    rows: dict[int, tuple[np.ndarray, int]] = {}  # leading input -> reduced row and its answer

    def reduce(row: np.ndarray, answer: int) -> tuple[np.ndarray, int]:
        for lead in range(len(row)):
            if row[lead] and lead in rows:
                row, answer = row ^ rows[lead][0], answer ^ rows[lead][1]
        return row, answer

    predictions = []
    for row, answer in zip(bits, answers, strict=True):
        left, offset = reduce(row, 0)
        predictions.append(0 if left.any() else 2 * int(offset) - 1)
        left, value = reduce(row, int(answer))
        if left.any():
            rows[int(np.argmax(left))] = left, value
    return np.array(predictions, float)
