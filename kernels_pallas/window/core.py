"""The differentiable core of window attention on a fused `qkv` array.

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
    """`qkv [windows, tokens, 3 * heads * head_dim]`, `bias [heads, n, n]`, `mask [masks, n, n]`."""

    qkv: Array
    bias: Array | None
    mask: Array | None


def _kernels(interpret, heads, problem, x):
    """`(module, options)`: of the two TPU bodies the one whose layout pads less."""
    from kernels_pallas.window import tpu, tpu_lanes

    module = tpu_lanes if tpu_lanes.fits(x.qkv, x.mask, heads) else tpu
    options = dict(heads=heads, scale=problem.scale, precision=problem.precision)
    return module, {**options, "interpret": interpret}


def _forward(interpret, heads, problem, x):
    module, options = _kernels(interpret, heads, problem, x)
    return module.forward(*x, **options)


def _backward(interpret, heads, problem, x, d_out):
    module, options = _kernels(interpret, heads, problem, x)
    return module.backward(*x, d_out, **options)


def pallas_tpu(heads: int) -> Choice:
    """The TPU kernel; on CPU its interpreter."""
    real, interpreted = (
        Body(partial(_forward, flag, heads), partial(_backward, flag, heads))
        for flag in (False, True)
    )
    return Choice(real, (("cpu", interpreted),))


def attend(choice: Choice, problem: Problem, x: Windows):
    """`[windows, tokens, heads * head_dim]`; with a mesh in context, windows are split over it."""
    axes = dispatch.mesh_axes()
    if not axes:
        return _attend(choice, problem, x)
    windows, masks = x.qkv.shape[0], 1 if x.mask is None else x.mask.shape[0]
    names, _ = dispatch.fitting(
        axes, dispatch.BATCH_AXES, lambda n: windows % n == 0 and windows // n % masks == 0
    )
    specs = Windows(P(names), None if x.bias is None else P(), None if x.mask is None else P())
    call = partial(_attend, choice, problem)
    return jax.shard_map(call, in_specs=(specs,), out_specs=P(names), check_vma=False)(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, problem: Problem, x: Windows):
    return choice.run("forward", problem, x)


def _attend_forward(choice, problem, x):
    return choice.run("forward", problem, x), x


def _attend_backward(choice, problem, x, d_out):
    d_qkv, d_bias = choice.run("backward", problem, x, d_out)
    d_mask = x.mask
    if d_mask is not None:
        floats = jnp.issubdtype(d_mask.dtype, jnp.floating)
        d_mask = jnp.zeros_like(d_mask) if floats else np.zeros(d_mask.shape, jax.dtypes.float0)
    d_bias = None if x.bias is None else d_bias.astype(x.bias.dtype)
    return (Windows(d_qkv, d_bias, d_mask),)


_attend.defvjp(_attend_forward, _attend_backward)
