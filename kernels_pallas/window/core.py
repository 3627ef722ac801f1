"""The differentiable core of window attention by the TPU kernels.

What is kept for the backward pass: the operands alone. A window's weights are formed again from
them, as a whole row of scores fits into a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from kernels_pallas import dispatch
from kernels_pallas.attention.problem import Problem
from kernels_pallas.dispatch import Body, Choice


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


def _lanes(heads, x):
    """The body with windows in lanes, where XLA stores a fused array so that it fits; or None."""
    from kernels_pallas.window import tpu_lanes

    fits = len(x.arrays) == 1 and tpu_lanes.layout(x.arrays[0], x.mask, heads)
    return tpu_lanes if fits else None


def _forward(interpret, heads, problem, x):
    from kernels_pallas.window import tpu

    options = dict(heads=heads, scale=problem.scale, interpret=interpret)
    if lanes := _lanes(heads, x):
        return lanes.forward(*x.arrays, x.bias, x.mask, **options)
    return tpu.forward(*x, precision=problem.precision, **options)


def _backward(interpret, heads, problem, x, d_out):
    from kernels_pallas.window import tpu

    options = dict(heads=heads, scale=problem.scale, interpret=interpret)
    if lanes := _lanes(heads, x):
        d_qkv, d_bias = lanes.backward(*x.arrays, x.bias, x.mask, d_out, **options)
        return (d_qkv,), d_bias
    return tpu.backward(*x, d_out, precision=problem.precision, **options)


def pallas_tpu(heads: int) -> Choice:
    """The TPU kernel; on CPU its interpreter."""
    real, interpreted = (
        Body(partial(_forward, flag, heads), partial(_backward, flag, heads))
        for flag in (False, True)
    )
    return Choice(real, (("cpu", interpreted),))


def attend(choice: Choice, problem: Problem, x: Windows):
    """`[windows, queries, heads * value_dim]`; a mesh in context divides the windows."""
    axes = dispatch.mesh_axes()
    if not axes:
        return _attend(choice, problem, x)
    windows, masks = x.arrays[0].shape[0], 1 if x.mask is None else x.mask.shape[0]
    names, _ = dispatch.fitting(
        axes, dispatch.BATCH_AXES, lambda n: windows % n == 0 and windows // n % masks == 0
    )
    specs = Windows((P(names),) * len(x.arrays), *(None if t is None else P() for t in x[1:]))
    call = partial(_attend, choice, problem)
    return jax.shard_map(call, in_specs=(specs,), out_specs=P(names), check_vma=False)(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, problem: Problem, x: Windows):
    return choice.run("forward", problem, x)


def _attend_forward(choice, problem, x):
    return choice.run("forward", problem, x), x


def _attend_backward(choice, problem, x, d_out):
    d_arrays, d_bias = choice.run("backward", problem, x, d_out)
    d_mask = x.mask
    if d_mask is not None:
        floats = jnp.issubdtype(d_mask.dtype, jnp.floating)
        d_mask = jnp.zeros_like(d_mask) if floats else np.zeros(d_mask.shape, jax.dtypes.float0)
    d_bias = None if x.bias is None else d_bias.astype(x.bias.dtype)
    return (Windows(d_arrays, d_bias, d_mask),)


_attend.defvjp(_attend_forward, _attend_backward)
