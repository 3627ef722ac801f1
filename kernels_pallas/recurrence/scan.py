"""Mamba's selective scan: its operands, its bodies, and which of them a call runs.

Every body cuts the length into chunks and keeps one state before each chunk for the backward,
`[batch, chunks, state, channels]`; inside a chunk states are formed again.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas.dispatch import Body
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.choice import choose, split
from kernels_pallas.recurrence.tile import Problem


class Operands(NamedTuple):
    """Arrays; the length is a multiple of the chunk. A, D and the state are float32."""

    x: Float[Array, "batch length channels"]
    dt: Float[Array, "batch length channels"]
    A: Float[Array, "channels state"]
    B: Float[Array, "batch length state"]
    C: Float[Array, "batch length state"]
    D: Float[Array, "channels"] | None
    state: Float[Array, "batch channels state"]


class Gradients(NamedTuple):
    """Of the operands, in their types; None where one is absent."""

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    state: Array


def _wide(x: Operands):
    """What `xla` takes: all but D and the state, in float32."""
    return tuple(t.astype(jnp.float32) for t in x[:5])


def _xla_forward(keep: bool, problem: Problem, x: Operands):
    y, *states = xla.selective_scan(*_wide(x), x.state, chunk=problem.chunk, keep=keep)
    if x.D is not None:
        y = y + x.D * x.x.astype(jnp.float32)
    return y.astype(x.x.dtype), *states


def _xla_backward(problem: Problem, x: Operands, states, d_y, d_final):
    wide, d_y = _wide(x), d_y.astype(jnp.float32)
    *grads, d_state = xla.selective_scan_backward(*wide, states, d_y, d_final, chunk=problem.chunk)
    d_D = None
    if x.D is not None:
        grads[0] = grads[0] + x.D * d_y
        d_D = (wide[0] * d_y).sum((0, 1))
    grads = (g.astype(t.dtype) for g, t in zip(grads, x[:5], strict=True))
    return Gradients(*grads, d_D, d_state)


def _tpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.recurrence import scan_tpu

    return getattr(scan_tpu, which)(problem, *arrays, **options)


def _gpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.recurrence import scan_gpu

    return getattr(scan_gpu, which)(problem, *arrays, **options)


def _body(run, **options) -> dict[bool, Body]:
    """By whether the states before the chunks are wanted."""
    backward = partial(run, "backward", **options)
    return {
        keep: Body(partial(run, "forward", keep=keep, **options), backward)
        for keep in (False, True)
    }


XLA = {keep: Body(partial(_xla_forward, keep), _xla_backward) for keep in (False, True)}
PALLAS = {"tpu": _body(_tpu), "cuda": _body(_gpu)}
INTERPRETED = {"tpu": _body(_tpu, interpret=True), "cuda": _body(_gpu, interpret=True)}


def refusal(platform: str, problem: Problem, x: Operands) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    if problem.chunk == 1:
        return "the sequence is one step"
    for name in ("x", "dt"):
        if (dtype := getattr(x, name).dtype) not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {dtype}; the {platform} kernel takes bfloat16 and float32"
    return None


def run(implementation: str | None, problem: Problem, x: Operands):
    """Output in x's type and the final state, by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    bodies = choose(
        implementation, "selective_scan", x.x.shape[1],
        lambda platform: refusal(platform, problem, x), XLA, PALLAS, INTERPRETED,
    )  # fmt: skip
    if bodies is None:
        return _xla_forward(False, problem, x)  # derivatives of any order and mode

    def specs(b, h):
        each = Operands(P(b, None, h), P(b, None, h), P(h), P(b), P(b), P(h), P(b, h))
        each = Operands(*(s if t is not None else None for s, t in zip(each, x, strict=True)))
        return each, (P(b, None, h), P(b, h))

    return split(bodies, problem, x, x.x.shape[0], x.x.shape[2], specs)
