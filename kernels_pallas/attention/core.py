"""The differentiable core that all attention functions share, whichever body computes it.

What is kept for the backward pass: the operands, the output and the log-sum-exp
(`[batch, heads, queries]`), nothing of size queries x keys. The two results carry the names
`attention_out` and `attention_lse` for remat policies.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import lazy
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.lazy import Choice
from kernels_pallas.spread import SEQUENCE_AXES, divisions, spread

NAMES = "attention_out", "attention_lse"


def attend(choice: Choice, problem: Problem, x: Operands):
    """Output `[batch, heads, queries, value_dim]` and log-sum-exp `[batch, heads, queries]`.

    On a mesh each device computes its share of the batch and of the heads. Key heads that the mesh
    does not divide are repeated to one for each query head.
    """
    batch, heads = x.query.shape[:2]
    rows = 1 if x.bias is None else x.bias.shape[0]

    def splits_batch(n):
        return batch % n == 0 and (rows in (1, batch) or batch // n % rows == 0)

    b, h, pieces = divisions(
        jax.tree.leaves(x), "bhl.", batch=splits_batch, heads=lambda n: heads % n == 0,
        head_axes=SEQUENCE_AXES,
    )  # fmt: skip
    if x.key.shape[1] % pieces:
        key, value = (jnp.repeat(t, heads // t.shape[1], axis=1) for t in (x.key, x.value))
        x = x._replace(key=key, value=value)
    bias = None
    if x.bias is not None:
        bias = ("b" if rows == batch and rows != 1 else ".") + ("h" if x.bias.shape[1] != 1 else "")
    captured = None if x.captured is None else tuple("" for _ in x.captured)
    layout = Operands("bh", "bh", "bh", bias, "h", "b", "b", "bh", "b", captured)
    layout = Operands(*(s if t is not None else None for s, t in zip(layout, x, strict=True)))
    return spread(lambda x: _attend(choice, problem, x), x, layout, ("bhl", "bhl"), b, h)


def _attend(choice, problem, x):
    lse_type = jnp.promote_types(x.value.dtype, jnp.float32)
    results = (
        jax.ShapeDtypeStruct((*x.query.shape[:3], x.value.shape[3]), x.value.dtype),
        jax.ShapeDtypeStruct(x.query.shape[:3], lse_type),
    )
    return tuple(lazy.run(choice, problem, x, results, names=NAMES))
