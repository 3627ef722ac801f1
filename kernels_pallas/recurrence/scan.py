"""Mamba's selective scan: its operands, its bodies, and which of them a call runs.

Every body cuts the length into chunks and keeps one state before each chunk for the backward,
`[batch, chunks, state, channels]`; inside a chunk states are formed again.
"""

import jax

from kernels_pallas import dispatch, lazy
from kernels_pallas.lazy import Body
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.problem import Problem
from kernels_pallas.recurrence.problem import ScanGradients as Gradients
from kernels_pallas.recurrence.problem import ScanOperands as Operands
from kernels_pallas.spread import SEQUENCE_AXES, divisions, spread


def _wide(x: Operands):
    """What `xla` takes: all but D and the state, in float32 at least."""
    return tuple(t.astype(x.state.dtype) for t in x[:5])


def _forward(problem: Problem, x: Operands, keep: bool):
    y, state, *states = xla.selective_scan(*_wide(x), x.state, chunk=problem.chunk, keep=keep)
    if x.D is not None:
        y = y + x.D * x.x.astype(y.dtype)
    return (y.astype(x.x.dtype), state), tuple(states)


def _backward(problem: Problem, x: Operands, results, saved, cotangents):
    d_y, d_final = cotangents
    wide, d_y = _wide(x), d_y.astype(x.state.dtype)
    *grads, d_state = xla.selective_scan_backward(*wide, *saved, d_y, d_final, chunk=problem.chunk)
    d_D = None
    if x.D is not None:
        grads[0] = grads[0] + x.D * d_y
        d_D = (wide[0] * d_y).sum((0, 1))
    grads = (g.astype(t.dtype) for g, t in zip(grads, x[:5], strict=True))
    return Gradients(*grads, d_D, d_state)


XLA = Body(_forward, _backward)


def run(implementation: str | None, problem: Problem, x: Operands):
    """Output in x's type and the final state, by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    choice = dispatch.choose(implementation, "selective_scan", x.x.shape[1], plain=XLA)
    batch, _, channels = x.x.shape

    def call(x):
        batch, length, channels = x.x.shape
        kept = (batch, length // problem.chunk, x.A.shape[1], channels)
        state = jax.ShapeDtypeStruct(kept, x.state.dtype)
        return tuple(lazy.run(choice, problem, x, (x.x, x.state), (state,)))

    b, h, _ = divisions(
        jax.tree.leaves(x), "blh", batch=lambda n: batch % n == 0,
        heads=lambda n: channels % n == 0, head_axes=SEQUENCE_AXES,
    )  # fmt: skip
    layout = Operands("b.h", "b.h", "h", "b", "b", "h", "bh")
    layout = Operands(*(s if t is not None else None for s, t in zip(layout, x, strict=True)))
    return spread(call, x, layout, ("blh", "bh"), b, h)
