"""Attention inside blocks of a sequence and to the blocks beside them: local-attention 1.4.3.

A query of block b sees the keys of blocks b - before to b + after; if causal, none behind itself.
Rotary positions turn channel i of the first half with channel i of the second.
"""

# ruff: noqa: D102 (kernels_pallas.masks.Mask documents both methods)

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import kernels_pallas
from kernels_pallas.masks import Mask
from zoo.layers.rotary import Rotary

Heads = Float[Array, "batch length heads head_dim"]


@dataclass(frozen=True)
class NearBlocks(Mask):
    """Query `i` sees keys whose block of `size` lies at most `before` or `after` blocks away."""

    size: int
    before: int = 1
    after: int = 1

    def __call__(self, q_index, k_index):
        away = k_index // self.size - q_index // self.size
        return (away >= -self.before) & (away <= self.after)

    def blocks(self, q_first, q_last, k_first, k_last):
        q0, q1 = q_first // self.size, q_last // self.size
        k0, k1 = k_first // self.size, k_last // self.size
        some = (k1 >= q0 - self.before) & (k0 <= q1 + self.after)
        return some, (k0 >= q1 - self.before) & (k1 <= q0 + self.after)


def local_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    window: int,
    before: int = 1,
    after: int = 0,
    causal: bool = False,
    rotary: bool = True,
    visible: Bool[Array, "batch length"] | None = None,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
) -> Heads:
    """Attend inside blocks of `window` tokens and their neighbours.

    The reference fills a text up to whole blocks with zeros, and without `visible` (False at
    padding) these are keys like any other: they are here, too. A query at padding gets the mean of
    all values of its blocks, -1 for blocks beyond the ends, as equal scores give there.
    """
    length = query.shape[1]
    if rotary:
        at = jnp.arange(length)[None]
        query, key = Rotary()(query, at), Rotary()(key, at)
    extra = -length % window
    after = 0 if causal else after
    if extra and not (causal and visible is None):
        widths = ((0, 0), (0, extra), (0, 0), (0, 0))
        query, key, value = (jnp.pad(t, widths) for t in (query, key, value))
        visible = None if visible is None else jnp.pad(visible, ((0, 0), (0, extra)))
    mask = NearBlocks(window, before, after)
    segments = None if visible is None else visible.astype(jnp.int32)
    y = kernels_pallas.attention(
        query,
        key,
        value,
        mask=mask & kernels_pallas.Causal() if causal else mask,
        query_segments=None if segments is None else jnp.ones_like(segments),
        key_segments=segments,
        dropout=dropout,
        rng=rng,
    )
    if visible is not None:
        blocks = value.reshape(value.shape[0], -1, window, *value.shape[2:]).sum(2)
        widths = ((0, 0), (before, after), (0, 0), (0, 0))
        around = jnp.pad(blocks, widths, constant_values=-window)
        count = blocks.shape[1]
        total = sum(around[:, i : i + count] for i in range(before + after + 1))
        mean = jnp.repeat(total / ((before + after + 1) * window), window, axis=1)
        y = jnp.where(visible[:, :, None, None], y, mean.astype(y.dtype))
    return y[:, :length]
