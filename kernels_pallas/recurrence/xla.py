"""Recurrences in plain JAX: a scan over chunks that keeps one state per chunk for the backward."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.recurrence import tile
from kernels_pallas.recurrence.problem import Gradients, Operands, Problem


def chunked(problem: Problem, x: Operands, *, keep=False):
    """Output in the value's type, the final state, and with `keep` the state before each chunk."""
    one, chunks, grouped = by_chunk(problem, x)

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, chunk):
        out, after = one(*chunk, state)
        out = out.astype(x.value.dtype)
        return after, (out, state) if keep else (out,)

    start = x.state.reshape(*grouped, *x.state.shape[2:])
    state, (out, *states) = jax.lax.scan(body, start, chunks)
    states = (_joined(t).reshape(*x.state.shape[:2], -1, *x.state.shape[2:]) for t in states)
    return steps(out, x.value.shape), state.reshape(x.state.shape), *states


def chunked_backward(problem: Problem, x: Operands, states, d_out, d_final) -> Gradients:
    """Gradients in the operands' types, from the states before the chunks."""
    one, chunks, grouped = by_chunk(problem, x)
    size = x.state.shape[2:]
    before = jnp.moveaxis(states.reshape(*grouped, -1, *size), -3, 0)
    d_out = _chunks(d_out, grouped, problem.chunk)
    wide = x.state.dtype

    def body(d_state, inputs):
        state, d_out, chunk = inputs
        _, pull = jax.vjp(one, *chunk, state)
        *grads, d_state = pull((d_out.astype(wide), d_state))
        return d_state, grads

    start = d_final.reshape(*grouped, *size)
    d_state, grads = jax.lax.scan(body, start, (before, d_out, chunks), reverse=True)
    grads = (
        None if t is None else steps(g, t.shape).astype(t.dtype)
        for g, t in zip(grads, x[:5], strict=True)
    )  # fmt: skip
    return Gradients(*grads, d_state.reshape(x.state.shape))


def by_chunk(problem: Problem, x: Operands):
    """One chunk of all heads; the operands, chunks first; and the axes of heads in groups."""
    batch, groups = x.query.shape[:2]
    grouped = (batch, groups, x.value.shape[1] // groups)
    one = partial(tile.step, problem)
    one = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))  # heads of one group
    one = jax.vmap(jax.vmap(one))
    chunks = tuple(
        None if t is None else _chunks(t, lead, problem.chunk)
        for t, lead in zip(x[:5], (grouped[:2],) * 2 + (grouped,) * 3, strict=True)
    )
    return one, chunks, grouped


def _chunks(t, lead, chunk):
    """`[batch, heads, length, d]` to `[chunks, batch, groups(, heads of one), chunk, d]`."""
    t = t.reshape(*lead, t.shape[2] // chunk, chunk, t.shape[-1])
    return jnp.moveaxis(t, -3, 0)


def _joined(t):
    return jnp.moveaxis(t, 0, -3)


def steps(t, shape):
    """The inverse of `_chunks`."""
    return _joined(t).reshape(shape)


def selective_scan(x, dt, A, B, C, state, *, chunk: int, keep=False):
    """Output y `[batch, length, channels]` without D, the final state, with `keep` those before.

    Steps of a chunk are combined pairwise (`associative_scan`), chunks one after the other; what
    stays in memory is one state per chunk, kept as `[batch, chunks, state, channels]`.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, inputs):
        after, y = scan_chunk(A, state, *inputs)
        return after, (y, state) if keep else (y,)

    inputs = tuple(chunks_first(t, chunk) for t in (x, dt, B, C))
    state, (y, *states) = jax.lax.scan(body, state, inputs)
    states = (t.transpose(1, 0, 3, 2) for t in states)
    return steps_second(y), state, *states


def selective_scan_backward(x, dt, A, B, C, states, d_y, d_final, *, chunk: int):
    """Gradients of x, dt, A, B, C and the initial state, from the states before the chunks."""

    def body(carry, inputs):
        d_state, d_A = carry
        state, d_y, *inputs = inputs
        _, pull = jax.vjp(scan_chunk, A, state, *inputs)
        d_A_here, d_state, *grads = pull((d_state, d_y))
        return (d_state, d_A + d_A_here), grads

    steps = (chunks_first(t, chunk) for t in (d_y, x, dt, B, C))
    inputs = (states.transpose(1, 0, 3, 2), *steps)
    start = (d_final, jnp.zeros_like(A))
    (d_state, d_A), grads = jax.lax.scan(body, start, inputs, reverse=True)
    d_x, d_dt, d_B, d_C = (steps_second(g) for g in grads)
    return d_x, d_dt, d_A, d_B, d_C, d_state


def scan_chunk(A, state, x, dt, B, C):
    """The state after a chunk of `[chunk, batch, ...]`, and its outputs.

    What is not finite counts as zero and makes later outputs of its channels NaN, not earlier ones.
    """
    each, all_channels = partial(_spoiled, axis=()), partial(_spoiled, axis=-1)
    (x, bad_x), (dt, bad_dt), (state, lost) = each(x), each(dt), all_channels(state)
    (B, bad_B), (C, bad_C) = all_channels(B), all_channels(C)
    rate, bad_rate = each(dt * x)
    decay, bad_decay = all_channels(jnp.exp(dt[..., None] * A))
    write, bad_write = all_channels(rate[..., None] * B[:, :, None, :])
    bad = bad_x | bad_dt | bad_B | bad_rate | (bad_decay | bad_write)[..., 0]
    written = jax.lax.cummax(bad.astype(jnp.int32), axis=0) > 0
    bad = _nan(written | lost[..., 0], state.dtype)
    decay, write = jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, write)
    )
    h = decay * state + write
    y = jnp.einsum("lben,lbn->lbe", h, C)
    return h[-1] + bad[-1][..., None], y + bad + _nan(bad_C, y.dtype)


def _spoiled(t, axis):
    """`t` with zeros where it is not finite, and where that is, along an axis or each by itself."""
    good = jnp.isfinite(t)
    return jnp.where(good, t, 0), ~good.all(axis, keepdims=True)


def _nan(bad, dtype):
    return jnp.where(bad, jnp.nan, 0.0).astype(dtype)


def chunks_first(t, chunk):
    """`[batch, length, ...]` to `[chunks, chunk, batch, ...]`."""
    t = jnp.moveaxis(t, 1, 0)
    return t.reshape(-1, chunk, *t.shape[1:])


def steps_second(t):
    """The inverse of `chunks_first`."""
    return jnp.moveaxis(t.reshape(-1, *t.shape[2:]), 0, 1)


def tree_ssd(x, dt, A, B, C, parents, state):
    """Output y `[batch, nodes, heads, P]` and all states `[batch, nodes, heads, N, P]`.

    Causal decay becomes decay along the path: from node j to its descendant i, the sum of log
    decays of the nodes after j on the path, zero weight where j is no ancestor of i.
    """
    ancestor = ancestors(parents).astype(x.dtype)
    strict = ancestor - jnp.eye(len(parents), dtype=ancestor.dtype)
    (x, bad_x), (B, bad_B), (C, bad_C) = (_spoiled(t, -1) for t in (x, B, C))
    (dt, bad_dt), (state, lost) = _spoiled(dt, ()), _spoiled(state, (-2, -1))
    written = (bad_x | bad_B)[..., 0] | bad_dt
    seen = jnp.einsum("ij,bjh->bih", ancestor, written.astype(x.dtype)) > 0
    bad = _nan(seen | lost[:, None, :, 0, 0], x.dtype)[..., None]
    log_decay = dt * A  # [batch, nodes, heads]
    along = jnp.einsum("ir,rj,brh->bhij", ancestor, strict, log_decay, precision="highest")
    decay = jnp.exp(along) * ancestor
    from_root = jnp.exp(jnp.einsum("ir,brh->bih", ancestor, log_decay, precision="highest"))
    exact = partial(jnp.einsum, precision="highest")
    x = x * dt[..., None]
    # y does not go through the states, so that a program which ignores them never forms them
    scores = exact("bihn,bjhn->bhij", C, B) * decay
    y = exact("bhij,bjhp->bihp", scores, x)
    y = y + from_root[..., None] * exact("bihn,bhnp->bihp", C, state)
    states = exact("bhij,bjhn,bjhp->bihnp", decay, B, x)
    states = states + from_root[..., None, None] * state[:, None] + bad[..., None]
    return y + bad + _nan(bad_C, y.dtype), states


def ancestors(parents):
    """`[i, j]`: whether j is i or one of its ancestors, by doubling the reach of paths."""
    nodes = len(parents)
    node = jnp.arange(nodes)
    reach = (node[:, None] == node) | (parents[:, None] == node)
    for _ in range(max(1, (nodes - 1).bit_length())):
        reach = (reach.astype(jnp.float32) @ reach.astype(jnp.float32)) > 0
    return reach
