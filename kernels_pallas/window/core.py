"""The bodies of window attention, and the call that runs one of them.

What is kept for the backward pass: the operands, the output, and the log-sum-exp, which the TPU
kernels do without: a window's weights are formed again from a whole row of scores.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas import dispatch, lazy
from kernels_pallas.attention import choice as attention_bodies
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.lazy import Body
from kernels_pallas.scores import MASKED
from kernels_pallas.spread import spread


class Windows(NamedTuple):
    """The arrays of a call.

    Attributes:
      arrays: `(qkv,)` of a fused projection, `[windows, tokens, 3 * heads * head_dim]`, or
        `(query, key, value)`, each `[windows, tokens, heads * head_dim]`.
      bias: `[heads, queries, keys]`.
      mask: `[masks, queries, keys]`.
    """

    arrays: tuple[Array, ...]
    bias: Array | None
    mask: Array | None


def operands(heads: int, x: Windows) -> Operands:
    """The call as attention, heads first."""
    arrays = x.arrays if len(x.arrays) == 3 else jnp.split(x.arrays[0], 3, axis=-1)
    arrays = (t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) for t in arrays)
    return Operands(*arrays, bias=join(x.bias, x.mask))


def join(bias, mask):
    """Bias and mask as one `[masks or 1, heads or 1, queries, keys]`."""
    if bias is not None:
        bias = bias[None]
    if mask is None:
        return bias
    mask = mask[:, None]
    if bias is None:
        return mask
    if mask.dtype == bool:
        return jnp.where(mask, bias, jnp.asarray(MASKED, bias.dtype))
    return bias + mask.astype(bias.dtype)


def _packed(t):
    """`[windows, heads, tokens, d]` to `[windows, tokens, heads * d]`."""
    return t.transpose(0, 2, 1, 3).reshape(t.shape[0], t.shape[2], -1)


@functools.cache
def _by_attention(heads: int, body: Body) -> Body:
    """A body of attention on windows."""

    def forward(problem, x, keep):
        (out, lse), _ = body.forward(problem, operands(heads, x), keep)
        return (_packed(out),), (lse,) if keep else ()

    def backward(problem, x, results, saved, cotangents):
        full = operands(heads, x)
        out, d_out = (
            t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3)
            for t in (results[0], cotangents[0])
        )
        lse = saved[0]
        grads = body.backward(problem, full, (out, lse), (), (d_out, jnp.zeros_like(lse)))
        arrays = tuple(map(_packed, grads[:3]))
        if len(x.arrays) == 1:
            arrays = (jnp.concatenate(arrays, axis=-1),)
        return Windows(arrays, None if x.bias is None else grads.bias.sum(0), None)

    return Body(forward, backward)


def _lanes(heads, x):
    """The body with windows in lanes, where XLA stores a fused array so that it fits; or None."""
    from kernels_pallas.window import tpu_lanes

    fits = len(x.arrays) == 1 and tpu_lanes.layout(x.arrays[0], x.mask, heads)
    return tpu_lanes if fits else None


@functools.cache
def _on_tpu(interpret: bool, heads: int) -> Body:
    """The kernels for TPU, or their interpreter."""

    def forward(problem, x, keep):
        from kernels_pallas.window import tpu

        problem = dispatch.for_kernel(problem, x.arrays[-1].dtype)
        options = dict(heads=heads, scale=problem.scale, interpret=interpret)
        if lanes := _lanes(heads, x):
            out = lanes.forward(*x.arrays, x.bias, x.mask, **options)
        else:
            out = tpu.forward(*x, precision=problem.precision, **options)
        return (out,), (jnp.zeros(_lse_shape(heads, x), jnp.float32),) if keep else ()

    def backward(problem, x, results, saved, cotangents):
        from kernels_pallas.window import tpu

        problem = dispatch.for_kernel(problem, x.arrays[-1].dtype)
        options = dict(heads=heads, scale=problem.scale, interpret=interpret)
        if lanes := _lanes(heads, x):
            d_qkv, d_bias = lanes.backward(*x.arrays, x.bias, x.mask, *cotangents, **options)
            return Windows((d_qkv,), d_bias, None)
        return Windows(*tpu.backward(*x, *cotangents, precision=problem.precision, **options), None)

    return Body(forward, backward)


def _lse_shape(heads, x):
    return x.arrays[0].shape[0], heads, x.arrays[0].shape[1]


def choose(implementation: str | None, problem: Problem, heads: int, x: Windows) -> lazy.Choice:
    """The bodies that a call may run, by platform."""
    keys = x.arrays[-1].shape[1]
    gpu = partial(_by_attention, heads)
    whole = jax.eval_shape(partial(operands, heads), x)

    def refusal(platform: str) -> str | None:
        return attention_bodies.refusal(platform, problem, whole)

    return dispatch.choose(
        implementation, "window_attention", keys,
        refusal,
        plain=gpu(attention_bodies.ON_ACCELERATOR), plain_on_cpu=gpu(attention_bodies.ON_CPU),
        pallas={"tpu": _on_tpu(False, heads), "cuda": gpu(attention_bodies.PALLAS["cuda"])},
        interpreted={
            "tpu": _on_tpu(True, heads), "cuda": gpu(attention_bodies.INTERPRETED["cuda"])
        },
        mosaic=gpu(attention_bodies.MOSAIC),
    )  # fmt: skip


def attend(choice: lazy.Choice, problem: Problem, heads: int, x: Windows, b: tuple):
    """`[windows, queries, heads * value_dim]`; `b` are mesh axes that divide the windows."""

    def call(x):
        value = x.arrays[-1].shape[2] // (3 if len(x.arrays) == 1 else 1)
        out = jax.ShapeDtypeStruct((*x.arrays[0].shape[:2], value), x.arrays[-1].dtype)
        wide = jnp.promote_types(out.dtype, jnp.float32)
        lse = jax.ShapeDtypeStruct(_lse_shape(heads, x), wide)
        return tuple(lazy.run(choice, problem, x, (out,), (lse,)))

    layout = Windows(("b",) * len(x.arrays), *(None if t is None else "" for t in x[1:]))
    return spread(call, x, layout, ("b",), b, ())[0]
