"""The bodies of neighbourhood attention, which of them a call runs, and its derivative.

The forward pass keeps the operands and the output. With a mesh in context, each device computes
its share of the batch and of the heads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Body, Choice
from kernels_pallas.neighborhood import xla
from kernels_pallas.neighborhood.problem import Operands, Problem
from kernels_pallas.recurrence.choice import choose


def _xla_forward(problem: Problem, x: Operands):
    rank = len(problem.axes)
    first = (0, rank + 1, *range(1, rank + 1), rank + 2)
    bias = None if x.bias is None else x.bias.reshape(len(x.bias), -1)
    out = xla.attend(
        problem.axes,
        *(t.transpose(first) for t in x[:3]),
        bias,
        scale=problem.scale,
        precision=problem.precision,
    )
    return out.transpose(0, *range(2, rank + 2), 1, rank + 2)


def _xla_backward(problem: Problem, x: Operands, out, d_out):
    del out
    return jax.vjp(partial(_xla_forward, problem), x)[1](d_out)[0]


def _tpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.neighborhood import tpu

    return getattr(tpu, which)(problem, *arrays, **options)


def _gpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.neighborhood import gpu

    return getattr(gpu, which)(problem, *arrays, **options)


def _body(run, **options) -> Body:
    return Body(partial(run, "forward", **options), partial(run, "backward", **options))


XLA = Body(_xla_forward, _xla_backward)
PALLAS = {"tpu": _body(_tpu), "cuda": _body(_gpu)}
INTERPRETED = {"tpu": _body(_tpu, interpret=True), "cuda": _body(_gpu, interpret=True)}


def refusal(problem: Problem, x: Operands, platform: str) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    types = (jnp.bfloat16, jnp.float32)
    for name in ("query", "key", "value"):
        if getattr(x, name).dtype not in types:
            return f"{name} is {getattr(x, name).dtype}; the kernel takes bfloat16 and float32"
    return (_tpu if platform == "tpu" else _gpu)("refusal", problem, x)


def run(implementation: str | None, problem: Problem, x: Operands):
    """`[batch, *space, heads, value_dim]` by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    bodies = choose(
        implementation, "neighborhood_attention", problem.positions,
        partial(refusal, problem, x), XLA, PALLAS, INTERPRETED,
    )  # fmt: skip
    if bodies is None:
        return _xla_forward(problem, x)  # not a custom_vjp: derivatives of any order and mode
    call, axes = partial(_attend, Choice(*bodies), problem), dispatch.mesh_axes()
    if not axes:
        return call(x)
    batch, heads = x.query.shape[0], x.query.shape[-2]
    b, _ = dispatch.fitting(axes, dispatch.BATCH_AXES, lambda n: batch % n == 0)
    h, _ = dispatch.fitting(axes, dispatch.HEAD_AXES, lambda n: heads % n == 0)
    image = P(b, *(None for _ in problem.axes), h)
    specs = Operands(image, image, image, None if x.bias is None else P(h))
    return jax.shard_map(call, in_specs=(specs,), out_specs=image, check_vma=False)(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, problem: Problem, x: Operands):
    return choice.run("forward", problem, x)


def _forward(choice, problem, x):
    out = choice.run("forward", problem, x)
    return out, (x, out)


def _backward(choice, problem, residuals, d_out):
    return (Operands(*choice.run("backward", problem, *residuals, d_out)),)


_attend.defvjp(_forward, _backward)
