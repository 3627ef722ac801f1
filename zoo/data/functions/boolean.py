"""Boolean functions of {-1, 1}^d as github.com/satwik77/incontext-bool (MIT) draws them.

Bhattamishra et al., arXiv 2310.03016. Labels are -1 and 1. A term is a vector w of {-1, 0, 1}: its
literals are its entries that are not 0, a positive one wanting 1.

    conjunction  sign(w . x - (|w| - 1))      all literals hold; without literals always 1
    disjunction  sign(w . x + (|w| - 1))      one holds; without literals always -1
    DNF, CNF     the largest label of three conjunctions, the smallest of three disjunctions
    majority     sign(w . x - 1/2), w of {0, 1}; with integer w a halfspace
    threshold    sign(w . x - theta)
    parity       1 if an odd number of the chosen inputs is 1

Inputs are uniform, but a part of the points of conjunctions, disjunctions and their normal forms is
changed until (one) term holds, or none of its literals does: labels would hardly differ else.
A teaching sequence is a prompt's beginning that leaves one function of the class.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from zoo.data.functions.prompts import Prompt

Points = Float[np.ndarray, "*batch points dims"]
Labels = Float[np.ndarray, "*batch points"]
Term = Float[np.ndarray, "*batch dims"]


# ------------------------------------------------------------------------------ functions


def _sum(xs: Points, weights: Term) -> Labels:
    return np.einsum("...pd,...d->...p", xs, weights)


def _literals(term: Term) -> np.ndarray:
    return np.abs(term).sum(-1)[..., None]


def conjunction(xs: Points, term: Term) -> Labels:
    """1 where all literals of the term hold."""
    return np.sign(_sum(xs, term) - (_literals(term) - 1))


def disjunction(xs: Points, term: Term) -> Labels:
    """1 where one literal of the term holds."""
    return np.sign(_sum(xs, term) + (_literals(term) - 1))


def halfspace(xs: Points, weights: Term, threshold: float | np.ndarray = 0.5) -> Labels:
    """`sign(w . x - threshold)`."""
    return np.sign(_sum(xs, weights) - threshold)


def parity(xs: Points, chosen: Term) -> Labels:
    """1 where an odd number of the inputs is 1 that are chosen (1, not 0)."""
    return 2 * (_sum((xs + 1) / 2, chosen) % 2) - 1


def dnf(xs: Points, terms: list[Term]) -> Labels:
    """1 where one of the conjunctions holds."""
    return np.max([conjunction(xs, term) for term in terms], axis=0)


def cnf(xs: Points, terms: list[Term]) -> Labels:
    """1 where all disjunctions hold."""
    return np.min([disjunction(xs, term) for term in terms], axis=0)


def nearest_label(
    xs: Float[np.ndarray, "points dims"], ys: Float[np.ndarray, "start"]
) -> Float[np.ndarray, "points"]:
    """The first labels as given, and each later one that of the closest point before, by angle.

    A point that has been there before keeps its label, also among the first.
    """
    units = xs / np.linalg.norm(xs, axis=1, keepdims=True)
    labels = list(ys)
    for i in range(1, len(xs)):
        likeness = np.round(units[:i] @ units[i], 7)
        closest = int(np.argmax(likeness))
        if i >= len(ys):
            labels.append(labels[closest])
        elif likeness[closest] > 0.9999:
            labels[i] = labels[closest]
    return np.array(labels)


def teach_conjunction(term: Float[np.ndarray, "dims"]) -> Float[np.ndarray, "points dims"]:
    """Points that single out a conjunction of positive literals, {0, 1}, among all such.

    First its literals alone, which it holds at; then each of them missing in turn.
    """
    literals = np.flatnonzero(term)
    points = np.tile(2.0 * term - 1, (len(literals) + 1, 1))
    points[np.arange(1, len(points)), literals] = -1
    return points


def teach_signed_conjunction(term: Float[np.ndarray, "dims"]) -> Float[np.ndarray, "points dims"]:
    """Points that single out any conjunction: two at which it holds, then each literal broken.

    All other inputs are -1, in the second point 1; positive literals are broken before negative.
    """
    literals = np.concatenate([np.flatnonzero(term == 1), np.flatnonzero(term == -1)])
    points = np.tile(np.where(term == 0, -1.0, term), (len(literals) + 2, 1))
    points[1] = np.where(term == 0, 1.0, term)
    points[np.arange(2, len(points)), literals] *= -1
    return points


# -------------------------------------------------------------------------------- classes


def _uniform(rng: np.random.Generator, points: int, dims: int) -> np.ndarray:
    return 2.0 * rng.integers(0, 2, (points, dims)) - 1


def _term(rng: np.random.Generator, dims: int, positive: float, negative: float) -> np.ndarray:
    return rng.choice([0.0, 1.0, -1.0], dims, p=[1 - positive - negative, positive, negative])


def _some(rng: np.random.Generator, count: int, dims: int) -> np.ndarray:
    """A vector of {0, 1} with `count` ones."""
    if count > dims:
        raise ValueError(f"{count} inputs cannot be chosen of {dims}; give more dims.")
    chosen = np.zeros(dims)
    chosen[rng.permutation(dims)[:count]] = 1
    return chosen


def _force(
    rng: np.random.Generator, xs: np.ndarray, term: np.ndarray, rate: float, hold: bool
) -> np.ndarray:
    """Points of which a part is changed so that all literals hold, or none does."""
    forced = rng.random(len(xs)) < rate
    return np.where(forced[:, None] & (term != 0), term if hold else -term, xs)


@dataclass(frozen=True)
class Conjunction:
    """Conjunctions; `positive` and `negative` are the probabilities of a literal.

    Attributes:
      forced: the part of the points at which it is made to hold.
      teach: begin with its teaching sequence; the points behind are as they are.
    """

    positive: float = 0.15
    negative: float = 0.15
    forced: float = 0.3
    teach: bool = False

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        term = _term(rng, dims, self.positive, self.negative)
        xs = _force(rng, _uniform(rng, points, dims), term, self.forced, True)
        if self.teach:
            monotone = self.negative == 0
            lesson = (teach_conjunction if monotone else teach_signed_conjunction)(term)[:points]
            xs[: len(lesson)] = lesson
        ys = conjunction(xs, term)
        return Prompt(xs, ys, ys)


TEACH_CONJUNCTION = Conjunction(0.3, 0.0, forced=0.4, teach=True)
"""The class of this name: monotone conjunctions, taught."""
TEACH_BICONJUNCTION = Conjunction(forced=0.4, teach=True)
"""The class of this name: all conjunctions, taught."""


@dataclass(frozen=True)
class Disjunction:
    """Disjunctions; with `literals`, of so many positive ones.

    Attributes:
      forced: the part of the points at which none of its literals holds.
    """

    positive: float = 0.15
    negative: float = 0.15
    forced: float = 0.3
    literals: int | None = None

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        if self.literals is None:
            term = _term(rng, dims, self.positive, self.negative)
        else:
            term = _some(rng, self.literals, dims)
        xs = _force(rng, _uniform(rng, points, dims), term, self.forced, False)
        ys = disjunction(xs, term)
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class NormalForm:
    """A DNF of three conjunctions, or a CNF of three disjunctions.

    Attributes:
      conjunctive: whether it is a CNF.
      forced: the part of the points at which one term, the same in a prompt, is made to hold (of a
        CNF: to fail). The official code has 0.35 for a DNF and 0.3 for a CNF.
      teach: begin with the teaching sequences of the terms, one behind the other (a DNF).
    """

    conjunctive: bool = False
    positive: float = 0.1
    negative: float = 0.1
    forced: float = 0.35
    terms: int = 3
    teach: bool = False

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        terms = [_term(rng, dims, self.positive, self.negative) for _ in range(self.terms)]
        chosen = terms[rng.integers(self.terms)]
        xs = _uniform(rng, points, dims)
        xs = _force(rng, xs, chosen, self.forced, not self.conjunctive)
        if self.teach:
            lesson = np.concatenate([teach_conjunction(term) for term in terms])[:points]
            xs[: len(lesson)] = lesson
        ys = (cnf if self.conjunctive else dnf)(xs, terms)
        return Prompt(xs, ys, ys)


DNF = NormalForm()
CNF = NormalForm(conjunctive=True, forced=0.3)
TEACH_DNF = NormalForm(positive=0.2, negative=0.0, teach=True)


@dataclass(frozen=True)
class Halfspace:
    """`sign(w . x - threshold)`, w by `kind`.

    Attributes:
      kind: "majority": w of {0, 1}, each input in it with probability 0.3; "integer": w of -3..3;
        "threshold": w a term of literals with 0.15 each sign, and thresholds of -2.5, -1.5 .. 2.5.
    """

    kind: str = "majority"

    def __post_init__(self):
        if self.kind not in ("majority", "integer", "threshold"):
            raise ValueError(f"kind={self.kind!r} is none of 'majority', 'integer', 'threshold'.")

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        threshold = 0.5
        if self.kind == "majority":
            weights = (rng.random(dims) < 0.3).astype(float)
        elif self.kind == "integer":
            weights = rng.integers(-3, 4, dims).astype(float)
        else:
            weights = _term(rng, dims, 0.15, 0.15)
            threshold = rng.integers(-3, 3) + 0.5
        xs = _uniform(rng, points, dims)
        ys = halfspace(xs, weights, threshold)
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class Parity:
    """Parities of any subset of the inputs, or of `size` of them."""

    size: int | None = None

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        some = self.size is not None
        chosen = _some(rng, self.size, dims) if some else rng.integers(0, 2, dims).astype(float)
        xs = _uniform(rng, points, dims)
        ys = parity(xs, chosen)
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class NearestNeighbour:
    """Random labels of the first `start` points; later ones are those of the closest before."""

    start: int = 20

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        xs = _uniform(rng, points, dims)
        ys = nearest_label(xs, 2.0 * rng.integers(0, 2, min(self.start, points)) - 1)
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class Flipped:
    """Another class, of whose labels each is turned with a probability; targets stay."""

    functions: object
    rate: float

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        prompt = self.functions.sample(rng, points, dims)
        turned = rng.random(points) < self.rate
        return prompt._replace(ys=np.where(turned, -prompt.ys, prompt.ys))
