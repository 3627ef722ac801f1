"""The differentiable core that all attention functions share, whichever body computes it.

One `custom_vjp` keeps the operands, the output and the log-sum-exp (`[batch, heads, queries]`,
float32), nothing of size queries x keys, and hands both passes to the body that `dispatch` picks.
The two results carry the names `attention_out` and `attention_lse` for remat policies.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.dispatch import Choice


def attend(choice: Choice, problem: Problem, x: Operands):
    """Output `[batch, heads, queries, value_dim]` and log-sum-exp `[batch, heads, queries]`.

    With a mesh in context, each device computes its share of the batch and of the heads. Key heads
    that the mesh does not divide are repeated to one for each query head.
    """
    axes = dispatch.mesh_axes()
    if not axes:
        return _attend(choice, problem, x)
    batch, heads = x.query.shape[:2]
    rows = 1 if x.bias is None else x.bias.shape[0]

    def splits_batch(n):
        return batch % n == 0 and (rows in (1, batch) or batch // n % rows == 0)

    b, _ = dispatch.fitting(axes, dispatch.BATCH_AXES, splits_batch)
    h, head_shards = dispatch.fitting(axes, dispatch.SEQUENCE_AXES, lambda n: heads % n == 0)
    if x.key.shape[1] % head_shards:
        key, value = (jnp.repeat(t, heads // t.shape[1], axis=1) for t in (x.key, x.value))
        x = x._replace(key=key, value=value)
    bias = None
    if x.bias is not None:
        bias = P(b if rows == batch > 1 else None, h if x.bias.shape[1] > 1 else None)
    specs = Operands(P(b, h), P(b, h), P(b, h), bias, P(h), P(b), P(b), P(b, h))
    specs = Operands(*(s if t is not None else None for s, t in zip(specs, x, strict=True)))
    split = jax.shard_map(
        partial(_attend, choice, problem),
        in_specs=(specs,),
        out_specs=(P(b, h), P(b, h)),
        check_vma=False,
    )
    return split(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, problem: Problem, x: Operands):
    return choice.run("forward", problem, x)


def _forward(choice, problem, x):
    out, lse = choice.run("forward", problem, x)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (x, out, lse)


def _backward(choice, problem, residuals, cotangents):
    x, out, lse = residuals
    grads = choice.run("backward", problem, x, out, lse, *cotangents)

    def of(name):
        value = getattr(x, name)
        if value is None:
            return None
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return np.zeros(value.shape, jax.dtypes.float0)
        return getattr(grads, name)

    return (Operands(*(of(name) for name in Operands._fields)),)


_attend.defvjp(_forward, _backward)
