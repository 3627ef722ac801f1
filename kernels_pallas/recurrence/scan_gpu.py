"""The selective scan for NVIDIA GPUs (Pallas-Triton).

One program, of one warp, for 32 channels of one batch row: it walks over all steps with the state
`[components, 32]` in registers, one channel a thread, so that sums over components stay inside a
thread. Nothing is multiplied as a matrix: the tensor cores are not used.

The backward walks the chunks from last to first. It forms the states of a chunk again from the one
before it and puts them aside in global memory, one chunk for each program. Sums over channels
(the gradients of B and C) are formed in parts, one for each program, which XLA adds.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.recurrence.problem import Problem
from kernels_pallas.recurrence.problem import ScanGradients as Gradients
from kernels_pallas.recurrence.problem import ScanOperands as Operands

CHANNELS = 32  # of a program: one a thread of its warp


class _Call:
    """Arrays as the kernels want them: whole blocks of channels, components a power of two."""

    def __init__(self, problem: Problem, x: Operands):
        self.batch, self.length, self.channels = x.x.shape
        self.chunk, self.chunks = problem.chunk, self.length // problem.chunk
        self.components = x.A.shape[1]
        self.rows = 1 << (self.components - 1).bit_length()
        self.blocks = -(-self.channels // CHANNELS)
        self.padded = self.blocks * CHANNELS
        self.arrays = [
            self.pad(x.x, 2),
            self.pad(x.dt, 2),
            self.pad(x.A.T, 1, 0),
            self.pad(x.B, None, 2),
            self.pad(x.C, None, 2),
        ]

    def pad(self, t, channels, components=None):
        """Zeros up to `padded` channels and `rows` components, on the axes of these."""
        extra = {channels: self.padded - self.channels, components: self.rows - self.components}
        return jnp.pad(t, [(0, extra.get(axis, 0)) for axis in range(t.ndim)])

    def state(self, t):
        """`[batch, channels, components]` to `[batch, rows, padded]`."""
        return self.pad(t.swapaxes(1, 2), 2, 1)

    def cut(self, t):
        """The inverse of `state`."""
        return t[:, : self.components, : self.channels].swapaxes(1, 2)

    def run(self, kernel, name, outputs, interpret):
        """The pallas_call; `outputs` are `(shape, dtype)`."""
        pl, triton = compat.pallas(), compat.triton()
        return pl.pallas_call(
            kernel,
            grid=(self.blocks, self.batch),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
            name=f"selective_scan_{name}",
            interpret=interpret,
        )(*self.arrays)


def _here():
    """`(block, batch row, its channels)` of a program."""
    pl = compat.pallas()
    block = pl.program_id(0)
    return block, pl.program_id(1), pl.ds(block * CHANNELS, CHANNELS)


def _row(ref, b, t, at):
    """Numbers of step t by channel, float32 `[1, channels]`."""
    return ref[b, t, at].astype(jnp.float32)[None, :]


def _column(ref, b, t):
    """Numbers of step t by component, float32 `[rows, 1]`."""
    return ref[b, t, :].astype(jnp.float32)[:, None]


def forward(problem: Problem, x: Operands, *, keep=False, interpret=False):
    """Output, final state, and with `keep` the states before every chunk."""
    call = _Call(problem, x)
    call.arrays.append(call.state(x.state))

    def kernel(x, dt, A, B, C, initial, y, final, *states):
        _, b, at = _here()
        rates = A[:, at]

        def chunk(c, h):
            for ref in states:
                ref[b, c, :, at] = h

            def step(t, h):
                t = c * call.chunk + t
                size = _row(dt, b, t, at)
                write = (size * _row(x, b, t, at)) * _column(B, b, t)
                h = jnp.exp(size * rates) * h + write
                y[b, t, at] = (h * _column(C, b, t)).sum(0)
                return h

            return lax.fori_loop(0, call.chunk, step, h)

        final[b, :, at] = lax.fori_loop(0, call.chunks, chunk, initial[b, :, at])

    steps, state = (call.batch, call.length, call.padded), (call.rows, call.padded)
    outputs = [(steps, jnp.float32), ((call.batch, *state), jnp.float32)]
    outputs += [((call.batch, call.chunks, *state), jnp.float32)] if keep else []
    y, final, *states = call.run(kernel, "forward", outputs, interpret)
    y = y[:, :, : call.channels]
    if x.D is not None:
        y = y + x.D * x.x.astype(jnp.float32)
    states = (t[:, :, : call.components, : call.channels] for t in states)
    return y.astype(x.x.dtype), call.cut(final), *states


def backward(problem: Problem, x: Operands, states, d_y, d_final, *, interpret=False):
    """Gradients in the operands' types."""
    call = _Call(problem, x)
    d_y = d_y.astype(jnp.float32)
    call.arrays += [call.pad(states, 3, 2), call.pad(d_y, 2), call.state(d_final)]

    def kernel(x, dt, A, B, C, before, d_y, d_final, *outs):
        d_x, d_dt, d_A, d_B, d_C, d_initial, aside = outs
        block, b, at = _here()
        rates = A[:, at]

        def chunk(i, carry):
            c = call.chunks - 1 - i

            def again(t, h):
                now = c * call.chunk + t
                aside[b, t, :, at] = h
                size = _row(dt, b, now, at)
                write = (size * _row(x, b, now, at)) * _column(B, b, now)
                return jnp.exp(size * rates) * h + write

            lax.fori_loop(0, call.chunk, again, before[b, c, :, at])
            if not interpret:
                compat.triton().debug_barrier()

            def step(t, carry):
                g, d_rates = carry
                t = call.chunk - 1 - t
                now = c * call.chunk + t
                size, inputs = _row(dt, b, now, at), _row(x, b, now, at)
                dy, column = _row(d_y, b, now, at), _column(B, b, now)
                decay = jnp.exp(size * rates)
                kept = decay * aside[b, t, :, at]
                g = g + dy * _column(C, b, now)
                d_C[block, b, now, :] = (dy * (kept + size * inputs * column)).sum(1)
                d_B[block, b, now, :] = (g * (size * inputs)).sum(1)
                d_log, d_write = g * kept, (g * column).sum(0)
                d_x[b, now, at] = size[0] * d_write
                d_dt[b, now, at] = inputs[0] * d_write + (rates * d_log).sum(0)
                return decay * g, d_rates + size * d_log

            carry = lax.fori_loop(0, call.chunk, step, carry)
            if not interpret:
                compat.triton().debug_barrier()
            return carry

        start = d_final[b, :, at], jnp.zeros((call.rows, CHANNELS), jnp.float32)
        d_initial[b, :, at], d_A[b, :, at] = lax.fori_loop(0, call.chunks, chunk, start)

    steps, state = (call.batch, call.length, call.padded), (call.batch, call.rows, call.padded)
    parts = (call.blocks, call.batch, call.length, call.rows)
    memory = (call.batch, call.chunk, call.rows, call.padded)
    shapes = (steps, steps, state, parts, parts, state, memory)
    outputs = [(shape, jnp.float32) for shape in shapes]
    d_x, d_dt, d_A, d_B, d_C, d_state, _ = call.run(kernel, "backward", outputs, interpret)
    d_x, d_D = d_x[:, :, : call.channels], None
    if x.D is not None:
        d_x = d_x + x.D * d_y
        d_D = (x.x.astype(jnp.float32) * d_y).sum((0, 1))
    d_B, d_C = (t.sum(0)[:, :, : call.components] for t in (d_B, d_C))
    return Gradients(
        d_x.astype(x.x.dtype),
        d_dt[:, :, : call.channels].astype(x.dt.dtype),
        call.cut(d_A).sum(0),
        d_B.astype(x.B.dtype),
        d_C.astype(x.C.dtype),
        d_D,
        call.cut(d_state),
    )
