"""The bodies of the chunked recurrences, and the call that runs one of them."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, lazy
from kernels_pallas.lazy import Body
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.problem import Operands, Problem
from kernels_pallas.spread import SEQUENCE_AXES, divisions, spread


def _plain(narrow: bool) -> Body:
    """The scan over chunks; without `narrow`, bfloat16 is computed in float32."""

    def widened(x):
        if narrow:
            return x
        return Operands(
            *(t if t is None else t.astype(jnp.promote_types(t.dtype, jnp.float32)) for t in x)
        )

    def forward(problem, x, keep):
        out, state, *saved = xla.chunked(problem, widened(x), keep=keep)
        return (out.astype(x.value.dtype), state), tuple(saved)

    def backward(problem, x, results, saved, cotangents):
        return xla.chunked_backward(problem, widened(x), *saved, *cotangents)

    return Body(forward, backward)


# A CPU's compiler lacks some products of bfloat16.
ON_CPU, ON_ACCELERATOR = _plain(False), _plain(True)


def run(implementation: str | None, problem: Problem, x: Operands):
    """Output and final state by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    choice = dispatch.choose(
        implementation, "recurrence", x.value.shape[2], plain=ON_ACCELERATOR, plain_on_cpu=ON_CPU
    )

    def call(x):
        kept = (*x.state.shape[:2], x.value.shape[2] // problem.chunk, *x.state.shape[2:])
        state = jax.ShapeDtypeStruct(kept, x.state.dtype)
        return tuple(lazy.run(choice, problem, x, (x.value, x.state), (state,)))

    batch, groups = x.query.shape[:2]
    b, h, _ = divisions(
        (x.value, *jax.tree.leaves(x)), "bhl.", batch=lambda n: batch % n == 0,
        heads=lambda n: groups % n == 0, head_axes=SEQUENCE_AXES,
    )  # fmt: skip
    layout = Operands(*(None if t is None else "bh" for t in x))
    return spread(call, x, layout, ("bhl", "bh"), b, h)
