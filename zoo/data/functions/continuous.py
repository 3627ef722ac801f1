"""Functions of real numbers, as github.com/dtsip/in-context-learning (MIT) draws them, and windows.

Garg et al., arXiv 2208.01066: linear, sparse and noisy linear, quadratic, two-layer ReLU, decision
trees, linear classification. x ~ N(0, I); weights ~ N(0, 1); scales keep the labels' variance near
the dimension. The sliding windows are for Campbell et al., arXiv 2312.12655, whose text we could
not read: their definition, and that of random labels, is ours.

    window   y_i = f(x_i, x_i-1, ..., x_i-k+1),  x = 0 before the first point
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from zoo.data.functions.prompts import FunctionClass, Prompt

Points = Float[np.ndarray, "*batch points dims"]
Labels = Float[np.ndarray, "*batch points"]


# ------------------------------------------------------------------------------ functions


def linear(xs: Points, weights: Float[np.ndarray, "*batch dims"]) -> Labels:
    """`w . x`."""
    return np.einsum("...pd,...d->...p", xs, weights)


def quadratic(xs: Points, weights: Float[np.ndarray, "*batch dims"]) -> Labels:
    """`sum of w_j x_j^2 / sqrt 3`, of the variance of the linear function."""
    return linear(xs**2, weights) / np.sqrt(3)


def relu_network(
    xs: Points,
    hidden: Float[np.ndarray, "*batch dims units"],
    out: Float[np.ndarray, "*batch units"],
) -> Labels:
    """`relu(x W) v sqrt(2 / units)`."""
    return linear(np.maximum(xs @ hidden, 0), out) * np.sqrt(2 / out.shape[-1])


def decision_tree(
    xs: Float[np.ndarray, "points dims"],
    coordinates: Float[np.ndarray, "nodes"],
    values: Float[np.ndarray, "nodes"],
    depth: int,
) -> Float[np.ndarray, "points"]:
    """The value of the leaf that each point falls to.

    Args:
      xs: the points.
      coordinates: which coordinate each node looks at: from node j to 2j + 1, or 2j + 2 if it is
        positive.
      values: of the nodes; those of the leaves count.
      depth: decisions of a point.
    """
    node = np.zeros(len(xs), int)
    for _ in range(depth):
        node = 2 * node + 1 + (xs[np.arange(len(xs)), coordinates[node]] > 0)
    return values[node]


def windows(xs: Points, width: int) -> Float[np.ndarray, "*batch points width dims"]:
    """Each point and the `width - 1` before it, the latest first; zeros before the first."""
    if width < 1:
        raise ValueError(f"A window has at least 1 point, not {width}.")
    points = xs.shape[-2]
    lagged = []
    for lag in range(width):
        shifted = np.zeros_like(xs)
        shifted[..., min(lag, points) :, :] = xs[..., : max(points - lag, 0), :]
        lagged.append(shifted)
    return np.stack(lagged, axis=-2)


def window_linear(xs: Points, weights: Float[np.ndarray, "*batch width dims"]) -> Labels:
    """`sum over lags j of w_j . x_i-j`."""
    return np.einsum("...pkd,...kd->...p", windows(xs, weights.shape[-2]), weights)


def randomise(ys: Labels, chosen: Float[np.ndarray, "*batch points"], drawn: Labels) -> Labels:
    """Labels of which the `chosen` are `drawn` anew, with the deviation of the prompt's."""
    return np.where(chosen, drawn * ys.std(-1, keepdims=True), ys)


# -------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Linear:
    """Linear functions; `y = scale w . x + noise`.

    Attributes:
      scale: of the labels.
      sparsity: how many weights are not 0; None: all.
      noise: its standard deviation.
      renormalise: scale the noisy labels to the deviation `sqrt(dims)`, prompt by prompt.
      sign: give the sign of the labels: classification.
      deviations: of each coordinate of x; None: 1.
    """

    scale: float = 1.0
    sparsity: int | None = None
    noise: float = 0.0
    renormalise: bool = False
    sign: bool = False
    deviations: tuple[float, ...] | None = None

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        xs = rng.standard_normal((points, dims))
        if self.deviations is not None:
            xs = xs * np.asarray(self.deviations)[:dims]
        weights = rng.standard_normal(dims)
        if self.sparsity is not None:
            weights[rng.permutation(dims)[self.sparsity :]] = 0
        targets = self.scale * linear(xs, weights)
        ys = targets + self.noise * rng.standard_normal(points)
        if self.renormalise:
            factor = np.sqrt(dims) / ys.std(ddof=1)
            ys, targets = ys * factor, targets * factor
        return Prompt(xs, np.sign(ys), np.sign(targets)) if self.sign else Prompt(xs, ys, targets)


@dataclass(frozen=True)
class Quadratic:
    """`sum of w_j x_j^2 / sqrt 3`."""

    scale: float = 1.0

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        xs = rng.standard_normal((points, dims))
        ys = self.scale * quadratic(xs, rng.standard_normal(dims))
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class ReluNetwork:
    """Networks with one hidden layer.

    Attributes:
      units: hidden ones.
      sparsity: how many of them count; None: all.
      fixed: a seed: one hidden layer for all prompts, which differ in the output weights alone,
        "regression with a representation" of AlgoFormer. None: every prompt has its own.
      slope: of the ReLU below 0 (leaky).
    """

    units: int = 100
    scale: float = 1.0
    sparsity: int | None = None
    fixed: int | None = None
    slope: float = 0.0

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        xs = rng.standard_normal((points, dims))
        layer = rng if self.fixed is None else np.random.default_rng(self.fixed)
        hidden, out = layer.standard_normal((dims, self.units)), rng.standard_normal(self.units)
        if self.sparsity is not None:
            out[rng.permutation(self.units)[self.sparsity :]] = 0
        ys = relu_network(xs, hidden, out)
        if self.slope:
            ys = ys - self.slope * relu_network(-xs, hidden, out)
        return Prompt(xs, self.scale * ys, self.scale * ys)


@dataclass(frozen=True)
class DecisionTree:
    """Trees that look at the sign of one coordinate in each node; leaves are N(0, 1)."""

    depth: int = 4

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        nodes = 2 ** (self.depth + 1) - 1
        xs = rng.standard_normal((points, dims))
        coordinates, values = rng.integers(0, dims, nodes), rng.standard_normal(nodes)
        ys = decision_tree(xs, coordinates, values, self.depth)
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class Window:
    """Functions of the last `width` points; their labels have the variance of the dimension.

    Attributes:
      width: points that a label depends on; 1 is a function of one point.
      kind: "linear", "tanh" (of the linear function) or "relu" (a network of the whole window).
      units: hidden ones of the network.
    """

    width: int = 2
    kind: str = "linear"
    units: int = 32

    def __post_init__(self):
        if self.kind not in ("linear", "tanh", "relu"):
            raise ValueError(f"kind={self.kind!r} is none of 'linear', 'tanh', 'relu'.")

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        xs = rng.standard_normal((points, dims))
        if self.kind == "relu":
            seen = windows(xs, self.width).reshape(points, -1) / np.sqrt(self.width)
            hidden = rng.standard_normal((self.width * dims, self.units))
            ys = relu_network(seen, hidden, rng.standard_normal(self.units))
            return Prompt(xs, ys, ys)
        weights = rng.standard_normal((self.width, dims)) / np.sqrt(self.width)
        ys = window_linear(xs, weights)
        ys = np.tanh(ys) * np.sqrt(dims) if self.kind == "tanh" else ys
        return Prompt(xs, ys, ys)


@dataclass(frozen=True)
class Repeated:
    """Prompts whose points come again, with their labels, every `period` points."""

    functions: FunctionClass
    period: int

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        once = self.functions.sample(rng, self.period, dims)
        again = np.arange(points) % self.period
        return Prompt(*(part[again] for part in once))


@dataclass(frozen=True)
class RandomLabels:
    """Another class, of whose labels each is replaced with a probability by one that says nothing.

    Attributes:
      functions: the class; its labels stay the targets.
      probability: of a label to be replaced by a normal number of the prompt's deviation.
    """

    functions: FunctionClass
    probability: float

    def sample(self, rng: np.random.Generator, points: int, dims: int) -> Prompt:
        """A function at so many points."""
        prompt = self.functions.sample(rng, points, dims)
        chosen = rng.random(points) < self.probability
        ys = randomise(prompt.ys, chosen, rng.standard_normal(points))
        return prompt._replace(ys=ys)
