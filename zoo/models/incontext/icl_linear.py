"""One layer of linear self-attention, which learns linear regression in context, and its theory.

Zhang, Frei, Bartlett, "Trained Transformers Learn Linear Models In-Context", JMLR 2024, arXiv
2306.09927. No official code is known: the layer and the formulas are the paper's equations.

    e_j = (x_j, y_j) for j = 1..M,  e_q = (x_q, 0)                      one token a point
    f(E) = E + W_PV E (E^T W_KQ E) / M                                  columns of E are tokens
    prediction = last entry of f(E) at e_q = w_PV . (sum of e e^T) W_KQ e_q / M

There is no softmax, no mask, no LayerNorm and no position; W_KQ merges key and query, W_PV
projection and value, and only the last row of W_PV and the first columns of W_KQ matter. The model
predicts every y_i so, from the i points before it.

For x ~ N(0, L), w ~ N(0, I), y = w . x, prompts of N labelled points and small symmetric starts,
gradient flow on the squared error ends at a global minimum, with G = (1 + 1/N) L + (tr L / N) I:

    W_KQ = tr(G^-2)^-1/4 [[G^-1, 0], [0, 0]],   W_PV = tr(G^-2)^1/4 [[0, 0], [0, 1]]
    prediction = x_q . G^-1 (1/M) sum of y_j x_j

That is one gradient step with a preconditioner that remembers the covariance of training: the
error vanishes for long prompts as long as the covariance stays, and does not where it changes.

    features            icl_linear_d20
    tokens              20 21       of 20 points
    prediction          20
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.models.incontext.prompt import check_prompt, prompt_shapes
from zoo.system import System, Variant


def attend(
    tokens: Float[Array, "... length width"],
    kq: Float[Array, "width width"],
    pv: Float[Array, "width width"],
    examples: int,
) -> Float[Array, "... length width"]:
    """`f(E)` for tokens in rows: linear attention of all tokens to all, and the tokens again.

    Args:
      tokens: points with their labels; the last has the label 0.
      kq: W_KQ.
      pv: W_PV.
      examples: the number of labelled points, M.
    """
    scores = jnp.einsum("...ic,dc,...jd->...ij", tokens, kq, tokens)
    return tokens + jnp.einsum("...ij,...jc,dc->...id", scores, tokens, pv) / examples


def start_kq(scale: float) -> Callable[..., Array]:
    """`scale` times a multiple of the identity of Frobenius norm 1 on the features, 0 elsewhere."""

    def start(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
        dims = shape[0] - 1
        return jnp.zeros(shape, dtype).at[:dims, :dims].set(jnp.eye(dims) * scale / dims**0.5)

    return start


def start_pv(scale: float) -> Callable[..., Array]:
    """`scale` in the last place, 0 elsewhere."""
    return lambda key, shape, dtype=jnp.float32: jnp.zeros(shape, dtype).at[-1, -1].set(scale)


class InContextLinear(Model):
    """Predicts each label of a prompt by linear self-attention over the points before it.

    Attributes:
      dims: size of an x.
      start: s, how large the paper's start is. At 0 no gradient flows.
    """

    dims: int = 20
    start: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, points: int = 20
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for prompts of so many points."""
        return prompt_shapes(batch_size, points, self.dims)

    def __call__(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> Float[Array, "batch points"]:
        """A prediction of each label."""
        return self.features(xs, ys, train)["prediction"]

    @nn.compact
    def features(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> dict[str, Array]:
        """`tokens` and `prediction`.

        Raises:
          ValueError: if they are no prompt.
        """
        check_prompt(self, xs, ys, None)
        shape = (self.dims + 1, self.dims + 1)
        kq = self.param("kq", start_kq(self.start), shape, self.param_dtype)
        pv = self.param("pv", start_pv(self.start), shape, self.param_dtype)
        tokens = jnp.concatenate([xs, ys[..., None]], axis=-1)
        tokens = constrain(tokens, "batch", "length", "channels").astype(jnp.float32)
        queries = tokens.at[..., -1].set(0)
        keys = queries @ kq.astype(jnp.float32).T
        read = pv[-1].astype(jnp.float32)
        points = xs.shape[1]
        before = jnp.tril(jnp.ones((points, points)), -1)
        scores = jnp.einsum("bic,bjc->bij", keys, tokens) * before
        y = jnp.einsum("bij,bj->bi", scores, tokens @ read)
        y = y + (keys * queries).sum(-1) * (queries @ read)  # the query attends to itself, too
        y = y / jnp.maximum(jnp.arange(points), 1)
        return {"tokens": tokens, "prediction": y.astype(self.dtype)}


# --------------------------------------------------------------------------------- theory


def gamma(covariance: Float[np.ndarray, "dims dims"], examples: int) -> Float[np.ndarray, "d d"]:
    """G, by which the trained layer divides: the covariance, and what N points add to it."""
    dims = covariance.shape[0]
    more = np.trace(covariance) / examples * np.eye(dims)
    return (1 + 1 / examples) * covariance + more


def minimum(
    covariance: Float[np.ndarray, "dims dims"], examples: int
) -> tuple[Float[np.ndarray, "width width"], Float[np.ndarray, "width width"]]:
    """W_KQ and W_PV at the minimum that gradient flow ends at."""
    inverse = np.linalg.inv(gamma(covariance, examples))
    size = np.trace(inverse @ inverse) ** 0.25
    kq, pv = (np.zeros((covariance.shape[0] + 1,) * 2) for _ in range(2))
    kq[:-1, :-1], pv[-1, -1] = inverse / size, size
    return kq, pv


def random_covariance_minimum(
    covariances: Float[np.ndarray, "tasks dims"], examples: int
) -> Float[np.ndarray, "dims"]:
    """The diagonal preconditioner after training with a random diagonal covariance a task.

    Args:
      covariances: diagonals, drawn as the tasks are.
      examples: N.
    """
    squares = covariances**2
    total = covariances.sum(1, keepdims=True)
    gammas = (1 + 1 / examples) * covariances + total / examples
    return squares.mean(0) / (gammas * squares).mean(0)


def gradient_flow(
    covariance: Float[np.ndarray, "dims dims"],
    examples: int,
    *,
    start: float = 0.1,
    step: float = 0.01,
    steps: int = 60_000,
    record: tuple[int, ...] = (),
) -> list[tuple[float, Float[np.ndarray, "dims dims"]]]:
    """Euler's steps along the flow of the two blocks that move: u in W_PV, U in W_KQ.

    Args:
      covariance: L.
      examples: N.
      start: s.
      step: its length in time.
      steps: how many.
      record: after how many steps to note (u, U); the last step is always noted.
    """
    dims = covariance.shape[0]
    big = gamma(covariance, examples) @ covariance
    square = covariance @ covariance
    u, matrix = start, start * np.eye(dims) / dims**0.5
    noted = []
    for i in range(steps + 1):
        if i in record or i == steps:
            noted.append((u, matrix))
        pull = big @ matrix @ covariance
        slope = u * np.sum(pull * matrix) - np.sum(square * matrix)
        u, matrix = u - step * slope, matrix - step * (u**2 * pull - u * square)
    return noted


def reduced_loss(u: float, matrix: np.ndarray, covariance: np.ndarray, examples: int) -> float:
    """The population loss of the two blocks, without its constant: `tr(L) / 2`."""
    pull = gamma(covariance, examples) @ covariance @ matrix @ covariance
    return float(u**2 * np.sum(pull * matrix) / 2 - u * np.sum(covariance @ covariance * matrix))


def expected_error(
    covariance: np.ndarray,
    weights: Float[np.ndarray, "dims"] | None,
    *,
    trained_on: np.ndarray,
    examples: int,
    length: int,
    noise: float = 0.0,
) -> float:
    """The trained layer's expected squared error on `y = a . x + noise`, x Gaussian.

    Exact for any covariance of the test, also one that differs from the training's: with D the
    preconditioner, `x_q . D (1/M) sum of y x` has the mean `x_q . D L a` and the variance of one
    product over M.

    Args:
      covariance: L of the test.
      weights: a; None: averaged over `a ~ N(0, I)`.
      trained_on: the covariance of training.
      examples: N of training.
      length: M of the test.
      noise: standard deviation of the labels' noise.
    """
    inverse = np.linalg.inv(gamma(trained_on, examples))
    dims = covariance.shape[0]
    outer = np.eye(dims) if weights is None else np.outer(weights, weights)
    bias = inverse @ covariance - np.eye(dims)
    missed = np.sum((bias @ outer @ bias.T) * covariance)
    power = np.trace(outer @ covariance) + noise**2
    spread = covariance @ outer @ covariance + power * covariance
    return float(missed + np.trace(inverse @ spread @ inverse @ covariance) / length + noise**2)


# ------------------------------------------------------------------------------- variants

LAYOUTS = {"paper": Rules([Rule("W_KQ", "kq"), Rule("W_PV", "pv")])}

_COMMON = dict(
    module=InContextLinear,
    task="in_context_regression",
    paper="Trained Transformers Learn Linear Models In-Context, arXiv 2306.09927",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "icl_linear_d20": Variant(fields={}, params=882, **_COMMON),
    "icl_linear_d5": Variant(fields=dict(dims=5), params=72, **_COMMON),
    "icl_linear_test": Variant(fields=dict(dims=39), params=3200, **_COMMON),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, no_decay=("kq", "pv"))
