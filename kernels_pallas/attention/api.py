"""`attention`: one door to every body."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kernels_pallas.attention.choice import choose
from kernels_pallas.attention.core import attend
from kernels_pallas.attention.problem import Operands, Problem, capture
from kernels_pallas.dispatch import floats_alike, stated_precision
from kernels_pallas.masks import Causal, Full
from kernels_pallas.scores import Score, Softmax


def attention(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys kv_heads head_dim"],
    value: Float[Array, "*batch keys kv_heads value_dim"],
    *,
    bias: Float[Array, "*#batch #heads #queries #keys"] | Bool[Array, "..."] | None = None,
    mask: Callable | None = None,
    score: Score = Softmax(),  # noqa: B008 (a frozen dataclass)
    scale: float | None = None,
    query_segments: Int[Array, "*batch queries"] | None = None,
    key_segments: Int[Array, "*batch keys"] | None = None,
    lengths: Int[Array, "*batch"] | None = None,
    query_offset: int | Int[Array, "*#batch"] = 0,
    slopes: Float[Array, "heads"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Float[Array, "*batch heads queries"]]:
    """Attention: `out = weights(scale * q k^T + bias, masked) v`, without the matrix of weights.

    Memory is linear in the length, forward and backward: the residuals are the operands, the
    output and the log-sum-exp. Accumulation, maxima and sums are float32 (float64 of float64). Rows
    that see no key give zeros and zero gradients; what stands behind a mask, NaN included, changes
    nothing.

    Derivatives of any order and mode work. Kernels give values and first reverse-mode gradients;
    all others come from the plain JAX body, whichever implementation was asked for.

    Args:
      query: `[*batch, queries, heads, head_dim]`, any number of batch axes.
      key: `[*batch, keys, kv_heads, head_dim]`; kv_heads divides heads (grouped-query attention:
        query head h uses key head `h // (heads // kv_heads)`). Of a cache that is kept heads first,
        the transposition: it cancels with the call's own, so that nothing is copied.
      value: `[*batch, keys, kv_heads, value_dim]`. Arrays of several types are brought to the one
        that holds them all.
      bias: added to the scores, `[1 or batch, 1 or heads, 1 or queries, 1 or keys]`, never
        expanded; its gradient has its own shape. Boolean: True where the key is visible. Entries at
        or below -1e30 hide the key. Axes may be missing in front.
      mask: one of `kernels_pallas.masks`, or any `f(q_index, k_index) -> bool`. It is part of the
        compiled program; it may close over arrays and traced values, and then runs in XLA.
      score: `Softmax()`, `Sigmoid(bias)` or `ClippedSoftmax(gamma, zeta)`. Order: cap, modifier,
        slopes, bias (tokamax caps after the bias).
      scale: of the raw scores; `head_dim ** -0.5` if None.
      query_segments: a query sees the keys of its own segment only. Packed sequences.
      key_segments: the same as the query's if None (self-attention).
      lengths: example b has `lengths[b]` keys, the rest is padding that nobody sees. With as many
        queries as keys (self-attention) queries beyond the length are padding too and give zeros.
      query_offset: place of query 0 among the keys, for mask, modifier and slopes: the length of
        what a cache held before. One number, or one for each example. (`Causal(offset)` moves the
        queries too.)
      slopes: ALiBi, `- slopes[head] * |q_index - k_index|`.
      sinks: a logit for each head that takes part in the softmax and has no value.
      dropout: rate on the weights, with `rng`. The entries that fall out do not depend on the
        implementation or on how the arrays are sharded.
      rng: a key of `jax.random`.
      return_lse: also return `log(sum(exp(scores)))` over keys, and sinks, -1e30 where there is
        none; it is differentiable.
      implementation: None (by the platform that is compiled for), "xla", "pallas_tpu",
        "pallas_gpu", "cudnn" or "mosaic_gpu" (these two on CUDA; XLA's form elsewhere).
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      `[*batch, queries, heads, value_dim]` in the value's type, and the log-sum-exp if asked for.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
      TypeError: if arrays are not floating-point.
    """
    out_type = value.dtype
    query, key, value = floats_alike(query, key, value)
    _check_shapes(query, key, value)
    lead, (queries, heads, head_dim), keys = query.shape[:-3], query.shape[-3:], key.shape[-3]
    batch = 1
    for n in lead:
        batch = batch * n
    query, key, value = (t.reshape(batch, *t.shape[-3:]) for t in (query, key, value))
    bias = _flat_bias(bias, lead, heads, queries, keys)
    query_segments, key_segments, lengths = (
        t if t is None else _flat(t, name, lead)
        for name, t in (
            ("query_segments", query_segments), ("key_segments", key_segments), ("lengths", lengths)
        )
    )  # fmt: skip
    for name, t in (("slopes", slopes), ("sinks", sinks)):
        if t is not None and t.shape != (heads,):
            raise ValueError(f"{name} has shape {t.shape}; expected ({heads},), one per head.")
    if return_lse and not score.normalised:
        raise ValueError(f"return_lse=True: {score} has no log-sum-exp; only softmax scores do.")
    if sinks is not None and (score.clipped or not score.normalised):
        raise ValueError(f"sinks need Softmax, not {score}.")
    segments = _segments(query_segments, key_segments, lengths, batch, queries, keys)
    wide = jnp.promote_types(value.dtype, jnp.float32)
    if isinstance(mask, Causal) and isinstance(mask.offset, jax.Array):
        mask, query_offset = Causal(), query_offset + mask.offset
    mask, captured, arrays = capture(None if isinstance(mask, Full) else mask, *["int32"] * 2)
    modify, more, arrays_too = capture(score.modify, wide, "int32", "int32")
    captured = tuple(jnp.asarray(t) for t in (*captured, *more)) or None
    static = isinstance(query_offset, int | np.integer)
    problem = Problem(
        mask=mask,
        score=score if modify is score.modify else replace(score, modify=modify),
        scale=head_dim**-0.5 if scale is None else float(scale),
        dropout=float(dropout),
        precision=stated_precision(precision),
        offset=int(query_offset) if static else 0,
        arrays=arrays or arrays_too,
    )
    x = Operands(
        *(t.transpose(0, 2, 1, 3) for t in (query, key, value)),
        bias=bias,
        slopes=slopes,
        query_segments=segments[0],
        key_segments=segments[1],
        seeds=dropout_seeds(dropout, rng, batch, heads),
        offsets=None if static else _offsets(query_offset, lead, batch),
        captured=captured,
    )
    wants_lse = return_lse or sinks is not None
    out, lse = attend(choose(implementation, problem, x, wants_lse=wants_lse), problem, x)
    if sinks is not None:
        own, lse = lse, jnp.logaddexp(lse, sinks.astype(lse.dtype)[:, None])
        out = (out * jnp.exp(own - lse)[..., None]).astype(out.dtype)
    out = out.transpose(0, 2, 1, 3).reshape(*lead, queries, heads, -1).astype(out_type)
    return (out, lse.reshape(*lead, heads, queries)) if return_lse else out


def _flat(t, name, lead):
    """An array whose first axes are the batch axes, with one batch axis."""
    if t.shape[: len(lead)] != lead:
        raise ValueError(f"{name} has shape {t.shape}; expected {lead} in front, the batch.")
    return t if len(lead) == 1 else t.reshape(-1, *t.shape[len(lead) :])


def _offsets(offset, lead, batch):
    """One offset for each example."""
    offset = jnp.asarray(offset, jnp.int32)
    if offset.ndim not in (0, len(lead)):
        raise ValueError(
            f"query_offset has shape {offset.shape}; expected one number, or one each of {lead}."
        )
    return jnp.broadcast_to(offset, lead).reshape(batch)


def _flat_bias(bias, lead, heads, queries, keys):
    """`[1 or batch, 1 or heads, 1 or queries, 1 or keys]`."""
    if bias is None:
        return None
    full = (*lead, heads, queries, keys)
    shape = (1,) * (len(full) - bias.ndim) + bias.shape
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"bias has shape {bias.shape}; expected [{', '.join(f'1 or {n}' for n in full)}]: "
            "batch, heads, queries, keys."
        )
    if bias.dtype != bool and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias is {bias.dtype}; expected bool (True: visible) or floats to add.")
    bias = bias.reshape(shape)
    if len(lead) == 1:
        return bias
    own = shape[: len(lead)]
    if all(n == 1 for n in own):
        return bias.reshape(1, *shape[len(lead) :])
    bias = jnp.broadcast_to(bias, (*lead, *shape[len(lead) :]))
    return bias.reshape(-1, *shape[len(lead) :])


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
        if t.ndim < 3:
            raise ValueError(
                f"{name} has shape {t.shape}; expected the axes *batch length heads head_dim."
            )
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{shapes}: key and value must agree in batch, length and heads.")
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"{shapes}: query and key must agree in batch (the axes in front).")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{shapes}: query and key must agree in head_dim (the last axis).")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{shapes}: {key.shape[-2]} key heads do not divide {query.shape[-2]} query heads."
        )
    if any(isinstance(n, int) and n == 0 for t in (query, key, value) for n in t.shape):
        raise ValueError(f"{shapes}: every axis needs at least one entry.")


def _segments(query_segments, key_segments, lengths, batch, queries, keys):
    """The two segment arrays, or two Nones."""
    if lengths is not None:
        if query_segments is not None or key_segments is not None:
            raise ValueError("Give lengths or segments, not both.")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has shape {lengths.shape}; expected one for each example.")
        inside = jnp.arange(keys)[None, :] < lengths[:, None]
        key_segments = jnp.where(inside, 0, -2).astype(jnp.int32)
        if queries == keys:
            return jnp.where(inside, 0, -1).astype(jnp.int32), key_segments
        return jnp.zeros((batch, queries), jnp.int32), key_segments
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
