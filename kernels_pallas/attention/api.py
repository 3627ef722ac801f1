"""`attention`: one door to every body."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kernels_pallas.attention.choice import choose
from kernels_pallas.attention.core import attend
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.masks import Full
from kernels_pallas.scores import Score, Softmax


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    bias: Float[Array, "#batch #heads queries keys"] | Bool[Array, "..."] | None = None,
    mask: Callable | None = None,
    score: Score = Softmax(),  # noqa: B008 (a frozen dataclass)
    scale: float | None = None,
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
    slopes: Float[Array, "heads"] | None = None,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Float[Array, "batch heads queries"]]:
    """Attention: `out = weights(scale * q k^T + bias, masked) v`, without the matrix of weights.

    Memory is linear in the length, forward and backward: the residuals are the operands, the
    output and the log-sum-exp. Accumulation, maxima and sums are float32. Rows that see no key
    give zeros and zero gradients.

    Second derivatives, as energy-based models take them, need `implementation="xla"`: the Pallas
    bodies have first derivatives only, and with None long sequences carry them for TPU and GPU.
    Forward-mode derivatives work of the gradient, not of the function itself.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`; kv_heads divides heads (grouped-query attention:
        query head h uses key head `h // (heads // kv_heads)`).
      value: `[batch, keys, kv_heads, value_dim]`.
      bias: added to the scores, `[1 or batch, 1 or heads, queries, keys]`, never expanded; its
        gradient has its own shape. Boolean: True where the key is visible. Entries at or below
        -1e30 hide the key.
      mask: one of `kernels_pallas.masks`, or any `f(q_index, k_index) -> bool`. It is part of the
        compiled program: define functions once, outside of the model's call.
      score: `Softmax()`, `Sigmoid(bias)` or `ClippedSoftmax(gamma, zeta)`.
      scale: of the raw scores; `head_dim ** -0.5` if None.
      query_segments: a query sees the keys of its own segment only. Packed sequences.
      key_segments: the same as the query's if None (self-attention).
      lengths: example b has `lengths[b]` tokens, the rest is padding that nobody sees and that
        gives zeros (self-attention; instead of segments).
      slopes: ALiBi, `- slopes[head] * |q_index - k_index|`.
      dropout: rate on the weights, with `rng`. The entries that fall out do not depend on the
        implementation or on how the arrays are sharded.
      rng: a key of `jax.random`.
      return_lse: also return `log(sum(exp(scores)))` over keys, -1e30 where there is none; it is
        differentiable.
      implementation: None (by the platform that is compiled for), "xla", "pallas_tpu" or
        "pallas_gpu".
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      `[batch, queries, heads, value_dim]` in the value's type, and the log-sum-exp if asked for.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    _check_shapes(query, key, value)
    batch, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    _check_bias(bias, batch, heads, queries, keys)
    if slopes is not None and slopes.shape != (heads,):
        raise ValueError(f"slopes has shape {slopes.shape}; expected ({heads},), one per head.")
    if return_lse and not score.normalised:
        raise ValueError(f"return_lse=True: {score} has no log-sum-exp; only softmax scores do.")
    segments = _segments(query_segments, key_segments, lengths, batch, queries, keys)
    problem = Problem(
        mask=None if isinstance(mask, Full) else mask,
        score=score,
        scale=head_dim**-0.5 if scale is None else float(scale),
        dropout=float(dropout),
        precision=precision,
    )
    x = Operands(
        *(t.transpose(0, 2, 1, 3) for t in (query, key, value)),
        bias=bias,
        slopes=slopes,
        query_segments=segments[0],
        key_segments=segments[1],
        seeds=dropout_seeds(dropout, rng, batch, heads),
    )
    out, lse = attend(choose(implementation, problem, x), problem, x)
    out = out.transpose(0, 2, 1, 3)
    return (out, lse) if return_lse else out


def dropout_seeds(dropout: float, rng: PRNGKeyArray | None, batch: int, heads: int):
    """One uint32 for each (batch, head), or None without dropout."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a rate; it must lie in [0, 1).")
    if not dropout:
        return None
    if rng is None:
        raise ValueError(f"dropout={dropout} needs rng=, a key of jax.random.")
    return jax.random.bits(rng, (batch, heads), jnp.uint32)


def _check_shapes(query, key, value):
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.ndim != 4:
            raise ValueError(
                f"{name} has shape {t.shape}; expected 4 axes: batch length heads head_dim."
            )
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"{shapes}: key and value must agree in batch, length and heads.")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"{shapes}: query and key must agree in batch (axis 0).")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"{shapes}: query and key must agree in head_dim (axis 3).")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{shapes}: {key.shape[2]} key heads do not divide {query.shape[2]} query heads."
        )
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"{shapes}: every axis needs at least one entry.")


def _check_bias(bias, batch, heads, queries, keys):
    if bias is None:
        return
    fits = bias.ndim == 4 and bias.shape[2:] == (queries, keys)
    if not (fits and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)):
        raise ValueError(
            f"bias has shape {bias.shape}; expected [1 or {batch}, 1 or {heads}, {queries}, "
            f"{keys}]: batch, heads, queries, keys."
        )


def _segments(query_segments, key_segments, lengths, batch, queries, keys):
    """The two segment arrays, or two Nones."""
    if lengths is not None:
        if query_segments is not None or key_segments is not None:
            raise ValueError("Give lengths or segments, not both.")
        if lengths.shape != (batch,) or queries != keys:
            raise ValueError(
                f"lengths has shape {lengths.shape}, with {queries} queries and {keys} keys; "
                f"expected ({batch},) and self-attention. Otherwise use segments."
            )
        inside = jnp.arange(queries)[None, :] < lengths[:, None]
        return jnp.where(inside, 0, -1), jnp.where(inside, 0, -2)
    if query_segments is None and key_segments is None:
        return None, None
    if query_segments is None:
        raise ValueError("key_segments needs query_segments, which says who may see which.")
    if key_segments is None:
        key_segments = query_segments
    if query_segments.shape != (batch, queries) or key_segments.shape != (batch, keys):
        raise ValueError(
            f"query_segments {query_segments.shape} and key_segments {key_segments.shape}; "
            f"expected ({batch}, {queries}) and ({batch}, {keys})."
        )
    return query_segments.astype(jnp.int32), key_segments.astype(jnp.int32)
