"""The definition of neighbourhood attention: dense and in float32, neighbours listed one by one."""

import jax
import jax.numpy as jnp
import numpy as np


def neighbours(size: int, kernel: int, dilation: int, causal: bool) -> list[list[int]]:
    """Whom each position of an axis sees, in order.

    The `kernel` nearest among the positions of the same remainder modulo `dilation`, the window
    shifted inwards at the borders; causal: the `kernel` up to itself, fewer at the start.
    """
    lists = []
    for i in range(size):
        alike = list(range(i % dilation, size, dilation))
        at = alike.index(i)
        if causal:
            lists.append(alike[max(0, at - kernel + 1) : at + 1])
        else:
            start = min(max(0, at - kernel // 2), len(alike) - kernel)
            lists.append(alike[start : start + kernel])
    return lists


def neighborhood_attention(query, key, value, bias=None, *, kernel, dilation, causal, scale):
    """`[batch, *space, heads, value_dim]`; `kernel`, `dilation`, `causal`: one entry an axis."""
    space = query.shape[1:-2]
    visible = np.ones((1, 1), bool)
    offset = np.zeros((1, 1), int)  # row of the flat bias table
    for size, k, d, c in zip(space, kernel, dilation, causal, strict=True):
        one = np.zeros((size, size), bool)
        for i, seen in enumerate(neighbours(size, k, d, c)):
            one[i, seen] = True
        away = np.clip((np.arange(size) - np.arange(size)[:, None]) // d + k - 1, 0, 2 * k - 2)
        visible = np.kron(visible, one).astype(bool)
        offset = np.kron(offset * (2 * k - 1), np.ones_like(away)) + np.tile(away, offset.shape)
    q, k, v = (
        t.astype(jnp.float32).reshape(len(t), -1, *t.shape[-2:]) for t in (query, key, value)
    )
    s = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if bias is not None:
        s = s + bias.astype(jnp.float32).reshape(len(bias), -1)[:, offset]
    w = jax.nn.softmax(jnp.where(visible, s, -jnp.inf), axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", w, v, precision="highest")
    return out.reshape(*query.shape[:-1], -1)
