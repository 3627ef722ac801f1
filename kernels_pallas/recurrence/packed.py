"""Several sequences in one row, each with a state of its own.

The tokens are laid out anew so that every sequence starts with a chunk: at most a chunk less one
step more for each sequence. The scan over chunks then takes the state of a sequence where it
starts, and what is left after the last chunk of each is its final state. Steps of zeros in between
neither write, nor decay, nor are they read.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels_pallas import dispatch, lazy
from kernels_pallas.lazy import Body
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.problem import Problem


class Layout(NamedTuple):
    """Where the tokens of packed sequences lie.

    Attributes:
      token: of each aligned place, and the number of tokens where there is none.
      place: of each token.
      starts: for each chunk, the sequence that starts with it, or -1.
      ends: for each sequence, its last chunk; -1 if it is empty.
    """

    token: Int[Array, "places"]
    place: Int[Array, "tokens"]
    starts: Int[Array, "chunks"]
    ends: Int[Array, "sequences"]


def layout(bounds: Int[Array, "sequences+1"], tokens: int, chunk: int) -> Layout:
    """The aligned places of sequences that lie between `bounds`."""
    bounds = bounds.astype(jnp.int32)
    count = bounds.shape[0] - 1
    places = -(-(tokens + count * (chunk - 1)) // chunk) * chunk
    lengths = bounds[1:] - bounds[:-1]
    chunks = -(-lengths // chunk)
    after = jnp.cumsum(chunks)
    first = (after - chunks) * chunk  # place of each sequence
    t, p = jnp.arange(tokens, dtype=jnp.int32), jnp.arange(places, dtype=jnp.int32)
    of_token = jnp.clip(jnp.searchsorted(bounds, t, side="right") - 1, 0, count - 1)
    place = first[of_token] + t - bounds[of_token]
    of_place = jnp.clip(jnp.searchsorted(after * chunk, p, side="right"), 0, count - 1)
    inside = p - first[of_place]
    token = jnp.where(inside < lengths[of_place], bounds[of_place] + inside, tokens)
    c = p[::chunk]
    starts = jnp.where((c == first[of_place[::chunk]]) & (token[::chunk] < tokens),
                       of_place[::chunk], -1)  # fmt: skip
    return Layout(token, place, starts, jnp.where(lengths > 0, after - 1, -1))


def align(t, where: Layout, axis: int):
    """An array by token as one by aligned place, zeros in between."""
    if t is None:
        return None
    return jnp.take(t, where.token, axis=axis, mode="fill", fill_value=0)


def scan(step: Callable, state, chunks, starts, ends):
    """Outputs by chunk and the final state of each sequence.

    Args:
      step: `f(state, chunk) -> (after, out)` of one row.
      state: before each sequence, `[sequences, ...]`.
      chunks: pytree of arrays, chunks first.
      starts: as in `Layout`.
      ends: as in `Layout`.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def body(before, inputs):
        chunk, start = inputs
        own = jax.lax.dynamic_slice_in_dim(state, jnp.maximum(start, 0), 1)
        after, out = step(jnp.where(start >= 0, own, before), chunk)
        return after, (out, after)

    _, (out, after) = jax.lax.scan(body, jnp.zeros_like(state[:1]), (chunks, starts))
    final = after[jnp.maximum(ends, 0), 0]
    empty = (ends < 0).reshape(-1, *(1,) * (state.ndim - 1))
    return out, jnp.where(empty, state, final)


class Arrays(NamedTuple):
    """Aligned operands, heads first in the chunked recurrences, and where sequences begin and end.

    Attributes:
      arrays: a NamedTuple of `recurrence.problem`, whose state leads with the sequences.
      starts: as in `Layout`.
      ends: as in `Layout`.
    """

    arrays: NamedTuple
    starts: Int[Array, "chunks"]
    ends: Int[Array, "sequences"]


def chunked(problem: Problem, x: Arrays):
    """Output in the value's type and the final states of the chunked recurrences."""
    one, chunks, grouped = xla.by_chunk(problem, x.arrays)
    value, state = x.arrays.value, x.arrays.state

    def step(before, chunk):
        out, after = one(*chunk, before)
        return after, out.astype(value.dtype)

    by_group = state.reshape(-1, *grouped[1:], *state.shape[2:])
    out, final = scan(step, by_group, chunks, x.starts, x.ends)
    return xla.steps(out, value.shape), final.reshape(state.shape)


def selective_scan(problem: Problem, x: Arrays):
    """Output and final states of the selective scan."""
    x, starts, ends = x
    dtype = x.state.dtype
    moving = tuple(xla.chunks_first(t.astype(dtype), problem.chunk) for t in (x.x, x.dt, x.B, x.C))
    step = lambda state, chunk: xla.scan_chunk(x.A.astype(dtype), state, *chunk)  # noqa: E731
    y, final = scan(step, x.state, moving, starts, ends)
    y = xla.steps_second(y)
    if x.D is not None:
        y = y + x.D * x.x.astype(dtype)
    return y.astype(x.x.dtype), final


def _body(function: Callable, widen: bool) -> Body:
    def call(problem, x):
        if widen:  # a CPU's compiler lacks some products of bfloat16
            dtype = x.arrays[2].dtype
            wide = (_widened(t) for t in x.arrays)
            out, final = function(problem, x._replace(arrays=type(x.arrays)(*wide)))
            return out.astype(dtype), final
        return tuple(function(problem, x))

    def forward(problem, x, keep):
        return call(problem, x), ()

    def backward(problem, x, results, saved, cotangents):
        grads = jax.vjp(partial(call, problem), x)[1](tuple(cotangents))[0]
        return jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, grads)

    return Body(forward, backward)


def _widened(t):
    return t if t is None else t.astype(jnp.promote_types(t.dtype, jnp.float32))


def run(implementation: str | None, operation: str, problem: Problem, x: Arrays, results):
    """The results of packed sequences, of these shapes.

    Raises:
      ValueError: for an implementation that is unknown, or a kernel.
    """
    plain, plain_on_cpu = BODIES[operation]
    choice = dispatch.choose(
        implementation, operation, len(x.ends), plain=plain, plain_on_cpu=plain_on_cpu
    )
    return lazy.run(choice, problem, x, results)


BODIES = {
    "recurrence": (_body(chunked, False), _body(chunked, True)),
    "selective_scan": (_body(selective_scan, False), None),
}
