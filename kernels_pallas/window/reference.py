"""The definition of window attention: dense and in float32.

out = softmax(scale * q k^T + bias[h] + mask[w mod M]) v       within each window w
"""

import jax
import jax.numpy as jnp


def window_attention(query, key, value, bias=None, mask=None, *, scale):
    """`[windows, queries, heads, value_dim]`; a row that sees no key gives zeros."""
    q, k, v = (t.astype(jnp.float32) for t in (query, key, value))
    s = scale * jnp.einsum("wqhd,wkhd->whqk", q, k, precision="highest")
    if bias is not None:
        s = s + bias.astype(jnp.float32)
    if mask is not None:
        if mask.dtype == bool:
            mask = jnp.where(mask, 0.0, -jnp.inf)
        s = s + jnp.tile(mask, (len(s) // len(mask), 1, 1))[:, None]
    seen = s.max(-1, keepdims=True) > -1e30
    w = jnp.where(seen, jax.nn.softmax(jnp.maximum(s, -1e30), axis=-1), 0.0)
    return jnp.einsum("whqk,wkhd->wqhd", w, v, precision="highest")
