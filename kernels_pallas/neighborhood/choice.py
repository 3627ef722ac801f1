"""The bodies of neighbourhood attention, and the call that runs one of them.

The forward pass keeps the operands and the output. On a mesh each device computes its share of the
batch and of the heads.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, lazy
from kernels_pallas.lazy import Body
from kernels_pallas.neighborhood import xla
from kernels_pallas.neighborhood.problem import Operands, Problem
from kernels_pallas.spread import HEAD_AXES, divisions, spread


def _plain_forward(narrow: bool, problem: Problem, x: Operands, bad=None):
    """Heads first and back; without `narrow`, bfloat16 is computed in float32."""
    rank, dtype = len(problem.axes), x.value.dtype
    first = (0, rank + 1, *range(1, rank + 1), rank + 2)
    bias = None if x.bias is None else x.bias.reshape(len(x.bias), -1)
    arrays = x[:3]
    if not narrow:
        arrays = (t.astype(jnp.promote_types(t.dtype, jnp.float32)) for t in arrays)
    out = xla.attend(
        problem.axes,
        *(t.transpose(first) for t in arrays),
        bias,
        None if bad is None else bad.transpose(first),
        scale=problem.scale,
        precision=problem.precision,
    )
    return out.transpose(0, *range(2, rank + 2), 1, rank + 2).astype(dtype)


def _plain(narrow: bool) -> Body:
    run = partial(_plain_forward, narrow)

    def forward(problem, x, keep):
        return (run(problem, x),), ()

    def backward(problem, x, results, saved, cotangents):
        d_out, bad = xla.finite(cotangents[0], jnp.promote_types(x.value.dtype, jnp.float32))
        return jax.vjp(lambda x: run(problem, x, bad), x)[1](d_out)[0]

    return Body(forward, backward)


def _module(platform: str):
    name = {"tpu": "tpu", "cuda": "gpu"}[platform]
    return importlib.import_module(f"kernels_pallas.neighborhood.{name}")


def _kernel(platform: str, **options) -> Body:
    def forward(problem, x, keep):
        problem = dispatch.for_kernel(problem, x.value.dtype)
        return (_module(platform).forward(problem, x, **options),), ()

    def backward(problem, x, results, saved, cotangents):
        problem = dispatch.for_kernel(problem, x.value.dtype)
        grads = _module(platform).backward(problem, x, *results, *cotangents, **options)
        return Operands(*grads)

    return Body(forward, backward)


# A CPU's compiler lacks some products of bfloat16.
ON_CPU, ON_ACCELERATOR = _plain(False), _plain(True)
PALLAS = {platform: _kernel(platform) for platform in ("tpu", "cuda")}
INTERPRETED = {platform: _kernel(platform, interpret=True) for platform in ("tpu", "cuda")}


def refusal(problem: Problem, x: Operands, platform: str) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    types = (jnp.bfloat16, jnp.float32)
    for name in ("query", "key", "value"):
        if getattr(x, name).dtype not in types:
            return f"{name} is {getattr(x, name).dtype}; the kernel takes bfloat16 and float32"
    if any(not isinstance(n, int) for n in x.query.shape):
        return "export leaves a size open"
    return _module(platform).refusal(problem, x)


def run(implementation: str | None, problem: Problem, x: Operands):
    """`[batch, *space, heads, value_dim]` by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    choice = dispatch.choose(
        implementation, "neighborhood_attention", problem.positions, partial(refusal, problem, x),
        plain=ON_ACCELERATOR, plain_on_cpu=ON_CPU, pallas=PALLAS, interpreted=INTERPRETED,
    )  # fmt: skip

    def call(x):
        out = jax.ShapeDtypeStruct((*x.query.shape[:-1], x.value.shape[-1]), x.value.dtype)
        return tuple(lazy.run(choice, problem, x, (out,)))

    batch, heads = x.query.shape[0], x.query.shape[-2]
    image = "b" + "." * len(problem.axes) + "h"
    b, h, _ = divisions(
        jax.tree.leaves(x), image + ".", batch=lambda n: batch % n == 0,
        heads=lambda n: heads % n == 0, head_axes=HEAD_AXES,
    )  # fmt: skip
    layout = Operands(image, image, image, None if x.bias is None else "h")
    return spread(call, x, layout, (image,), b, h)[0]
