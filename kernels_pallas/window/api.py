"""`window_attention`: attention in thousands of small windows with a shared bias."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.attention.choice import choose
from kernels_pallas.attention.core import attend
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.dispatch import floats_alike, stated_precision
from kernels_pallas.spread import HEAD_AXES, divisions
from kernels_pallas.window import core


def window_attention(
    query: Float[Array, "windows queries heads head_dim"] | Float[Array, "windows tokens qkv"],
    key: Float[Array, "windows keys heads head_dim"] | None = None,
    value: Float[Array, "windows keys heads value_dim"] | None = None,
    *,
    num_heads: int | None = None,
    bias: Float[Array, "heads queries keys"] | None = None,
    mask: Float[Array, "masks queries keys"] | Bool[Array, "masks queries keys"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """`out = softmax(scale * q k^T + bias + mask) v` inside each window.

    Swin, Video Swin, CSWin stripes and, with more keys than queries, HAT's overlapping windows.
    The windows of one image lie one after the other, images after images: window w uses
    `mask[w % masks]`. Rows that see no key give zeros and zero gradients.

    Args:
      query: `[windows, queries, heads, head_dim]`; or, as the only array, the output of a fused
        projection `[windows, tokens, 3 * heads * head_dim]`, ordered q, k, v, each head-major.
      key: `[windows, keys, heads, head_dim]`.
      value: `[windows, keys, heads, value_dim]`.
      num_heads: needed with a fused array; otherwise checked if given.
      bias: `[heads, queries, keys]`, shared by all windows; has a gradient.
      mask: `[masks, queries, keys]` with masks dividing windows: floats that are added (Swin: 0 or
        -100), or booleans, True where visible. A constant: it gets no gradient.
      scale: of the raw scores; `head_dim ** -0.5` if None.
      implementation: None (by the platform that is compiled for), "xla", "pallas_tpu",
        "pallas_gpu" or "mosaic_gpu" (on CUDA; XLA's form elsewhere).
      precision: of the matrix products, as in `jax.lax.dot_general`; where the TPU kernel has
        windows in lanes (`window/tpu_lanes.py`) there are none, and all is float32.

    Returns:
      `[windows, queries, heads, value_dim]`, or `[windows, tokens, heads * head_dim]` for a fused
      array.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    fused = key is None and value is None
    given = (query,) if fused else (query, key, value)
    if fused:
        query, key, value = _unpack(query, num_heads)
    _check(query, key, value, num_heads, bias, mask)
    floats_alike(query, key, value)
    windows, queries, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else float(scale)
    problem = Problem(scale=scale, precision=stated_precision(precision))
    mask = None if mask is None else jax.lax.stop_gradient(mask)
    masks = 1 if mask is None else mask.shape[0]
    b, h, _ = divisions(
        given, "bl." if fused else "blh.",
        batch=lambda n: windows % n == 0 and windows // n % masks == 0,
        heads=lambda n: heads % n == 0,
        head_axes=HEAD_AXES,
    )  # fmt: skip
    if h:
        x = Operands(*(t.transpose(0, 2, 1, 3) for t in (query, key, value)),
                     bias=core.join(bias, mask))  # fmt: skip
        out, _ = attend(choose(implementation, problem, x, "window_attention"), problem, x)
        out = out.transpose(0, 2, 1, 3)
    else:
        if not fused:
            one = jnp.result_type(*given)
            given = tuple(t.reshape(*t.shape[:2], -1).astype(one) for t in given)
        x = core.Windows(given, bias, mask)
        out = core.attend(core.choose(implementation, problem, heads, x), problem, heads, x, b)
        out = out.astype(value.dtype)
    return out.reshape(windows, queries, *((-1,) if fused else (heads, value.shape[-1])))


def _unpack(qkv, num_heads):
    if num_heads is None:
        raise ValueError("A fused qkv array needs num_heads=.")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv has shape {qkv.shape}; expected [windows, tokens, 3 * {num_heads} * head_dim]."
        )
    windows, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    return (t.reshape(windows, tokens, num_heads, head_dim) for t in jnp.split(qkv, 3, axis=-1))


def _check(query, key, value, num_heads, bias, mask):
    if key is None or value is None:
        raise ValueError("Give query, key and value, or one fused qkv array alone.")
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}: expected 4 axes each, windows tokens heads head_dim.")
    windows, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    if key.shape != (windows, keys, heads, head_dim) or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{shapes}: they must agree in windows, heads and head_dim.")
    if num_heads not in (None, heads):
        raise ValueError(f"num_heads={num_heads}, but query has {heads} heads (axis 2).")
    if bias is not None and bias.shape != (heads, queries, keys):
        raise ValueError(
            f"bias has shape {bias.shape}; expected ({heads}, {queries}, {keys}): heads, queries, "
            "keys."
        )
    if mask is not None and (mask.ndim != 3 or mask.shape[1:] != (queries, keys)):
        raise ValueError(f"mask has shape {mask.shape}; expected [masks, {queries}, {keys}].")
    if mask is not None and windows % mask.shape[0]:
        raise ValueError(f"{mask.shape[0]} masks do not divide {windows} windows.")
