"""The gradient of LoRA on attention, exactly and in time that is nearly linear in the length.

Hu, Su, Kuo, Song, Liu, "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based
Models", arXiv 2406.03136 (theory; no code). With `X [L, d]` and maps at the right, `Q = X W_Q`:

    loss = 1/2 |f V - Y|^2        f = softmax(beta Q K^T)      W_Q = W_Q* + (alpha / r) B_Q A_Q
    c = f V - Y;   g = c V^T;   p = f * g - diag(rowsum(f * g)) f
    dW_Q = beta X^T p K;   dW_K = beta X^T p^T Q;   dW_V = X^T f^T c
    dA = (alpha / r) B^T dW;    dB = (alpha / r) dW A^T

Every factor is nearly of low rank: with the monomials of up to degree g as features,
`exp(q . k) ~ phi(q) . phi(k)`, f is `U1 U2^T` with C(d + g, g) columns, `f * g` is the product of
the rows' outer products, and `rowsum(f * g)` is `c . (f V)`. So no matrix of L x L is made. The
degree that is needed grows with the largest logit: for small weights the error falls with each
degree, for large ones it does not, which is the paper's phase transition. A polynomial of odd
degree can have a normaliser that is not positive.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def low_rank_sum(
    weight: Float[Array, "inputs outputs"],
    a: Float[Array, "rank outputs"],
    b: Float[Array, "inputs rank"],
    alpha: float,
) -> Float[Array, "inputs outputs"]:
    """`W* + (alpha / r) B A`."""
    return weight + alpha / a.shape[0] * (b @ a)


def pair_gradients(
    d_weight: Float[Array, "inputs outputs"],
    a: Float[Array, "rank outputs"],
    b: Float[Array, "inputs rank"],
    alpha: float,
) -> tuple[Float[Array, "rank outputs"], Float[Array, "inputs rank"]]:
    """Gradients of A and B from that of the whole matrix."""
    scale = alpha / a.shape[0]
    return scale * (b.T @ d_weight), scale * (d_weight @ a.T)


def exact(
    x: Float[Array, "length d"],
    y: Float[Array, "length d"],
    weights: dict[str, Float[Array, "d d"]],
    beta: float,
) -> dict[str, Array]:
    """Output, loss and gradients of the three matrices, with the L x L attention.

    Args:
      x: the tokens.
      y: what attention should give.
      weights: `query`, `key`, `value`.
      beta: factor on the logits.

    Returns:
      `output`, `loss`, `query`, `key`, `value`.
    """
    query, key, value = (x @ weights[name] for name in ("query", "key", "value"))
    f = jax.nn.softmax(beta * query @ key.T, -1)
    output = f @ value
    c = output - y
    fg = f * (c @ value.T)
    p = fg - fg.sum(-1, keepdims=True) * f
    return {
        "output": output,
        "loss": 0.5 * jnp.sum(c * c),
        "query": beta * x.T @ (p @ key),
        "key": beta * x.T @ (p.T @ query),
        "value": x.T @ (f.T @ c),
    }


def monomials(dim: int, degree: int) -> list[tuple[int, ...]]:
    """The exponents of all monomials of `dim` variables up to a degree: C(dim + degree, degree)."""
    powers = itertools.product(range(degree + 1), repeat=dim)
    return [each for each in powers if sum(each) <= degree]


def features(x: Float[Array, "length d"], degree: int) -> Float[Array, "length features"]:
    """`phi`, of which `phi(q) . phi(k)` is the Taylor polynomial of `exp(q . k)`."""
    exponents = np.array(monomials(x.shape[-1], degree))
    weights = np.array([math.prod(map(math.factorial, each)) ** -0.5 for each in exponents])
    powers = jnp.stack([x**n for n in range(degree + 1)])  # degree length d
    columns = [powers[exponents[:, i], :, i] for i in range(x.shape[-1])]
    return (math.prod(columns[1:], start=columns[0]) * weights[:, None]).T.astype(x.dtype)


def approximate(
    x: Float[Array, "length d"],
    y: Float[Array, "length d"],
    weights: dict[str, Float[Array, "d d"]],
    beta: float,
    degree: int,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """What `exact` gives, from polynomial features, in time linear in the length.

    Returns:
      As `exact`, and whether all normalisers are positive (else the numbers mean nothing).
    """
    query, key, value = (x @ weights[name] for name in ("query", "key", "value"))
    left, right = features(beta * query, degree), features(key, degree)
    normaliser = left @ right.sum(0)
    left = left / normaliser[:, None]  # f = left right^T
    output = left @ (right.T @ value)
    c = output - y
    rows = jnp.sum(c * output, -1, keepdims=True)  # of f * g

    def weighted(left: Array, c: Array, right: Array, value: Array, z: Array) -> Array:
        """`(f * (c value^T)) z`."""
        inner = jnp.einsum("ja,jb,je->abe", right, value, z)
        return jnp.einsum("ia,ib,abe->ie", left, c, inner)

    p_key = weighted(left, c, right, value, key) - rows * (left @ (right.T @ key))
    p_query = weighted(right, value, left, c, query) - right @ (left.T @ (rows * query))
    out = {
        "output": output,
        "loss": 0.5 * jnp.sum(c * c),
        "query": beta * x.T @ p_key,
        "key": beta * x.T @ p_query,
        "value": (x.T @ right) @ (left.T @ c),
    }
    return out, jnp.all(normaliser > 0)
