"""Recurrences in plain JAX: a scan over chunks that keeps one state per chunk for the backward."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.recurrence import tile
from kernels_pallas.recurrence.tile import Operands, Problem


def chunked(problem: Problem, x: Operands, *, keep=False):
    """Output in the value's type, the final state, and with `keep` the state before each chunk.

    On a CPU bfloat16 is computed in float32: its compiler lacks some products of bfloat16.
    """
    run = partial(_chunked, problem, keep=keep)
    if x.value.dtype != jnp.bfloat16:
        return run(x)

    def on_cpu(x):
        wide = Operands(*(None if t is None else t.astype(jnp.float32) for t in x))
        out, *states = run(wide)
        return out.astype(x.value.dtype), *states

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=run)


def _chunked(problem: Problem, x: Operands, *, keep):
    batch, groups, length, _ = x.query.shape
    heads = x.value.shape[1]
    grouped = (batch, groups, heads // groups)

    def by_chunk(t, heads):
        if t is None:
            return None
        t = t.reshape(*heads, length // problem.chunk, problem.chunk, t.shape[-1])
        return jnp.moveaxis(t, -3, 0)

    one = partial(tile.step, problem)
    one = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))  # heads of one group
    one = jax.vmap(jax.vmap(one))

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, chunk):
        out, after = one(*chunk, state)
        out = out.astype(x.value.dtype)
        return after, (out, state) if keep else (out,)

    chunks = (
        by_chunk(x.query, grouped[:2]),
        by_chunk(x.key, grouped[:2]),
        by_chunk(x.value, grouped),
        by_chunk(x.log_decay, grouped),
        by_chunk(x.beta, grouped),
    )
    size = x.state.shape[2:]
    state, (out, *states) = jax.lax.scan(body, x.state.reshape(*grouped, *size), chunks)
    out = jnp.moveaxis(out, 0, -3).reshape(x.value.shape)
    states = (jnp.moveaxis(t, 0, -3).reshape(batch, heads, -1, *size) for t in states)
    return out, state.reshape(x.state.shape), *states


def selective_scan(x, dt, A, B, C, state, *, chunk: int, keep=False):
    """Output y `[batch, length, channels]` without D, the final state, with `keep` those before.

    Steps of a chunk are combined pairwise (`associative_scan`), chunks one after the other; what
    stays in memory is one state per chunk, kept as `[batch, chunks, state, channels]`.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, inputs):
        after, y = _scan_chunk(A, state, *inputs)
        return after, (y, state) if keep else (y,)

    inputs = tuple(_chunks_first(t, chunk) for t in (x, dt, B, C))
    state, (y, *states) = jax.lax.scan(body, state, inputs)
    states = (t.transpose(1, 0, 3, 2) for t in states)
    return _steps_second(y), state, *states


def selective_scan_backward(x, dt, A, B, C, states, d_y, d_final, *, chunk: int):
    """Gradients of x, dt, A, B, C and the initial state, from the states before the chunks."""

    def body(carry, inputs):
        d_state, d_A = carry
        state, d_y, *inputs = inputs
        _, pull = jax.vjp(_scan_chunk, A, state, *inputs)
        d_A_here, d_state, *grads = pull((d_state, d_y))
        return (d_state, d_A + d_A_here), grads

    steps = (_chunks_first(t, chunk) for t in (d_y, x, dt, B, C))
    inputs = (states.transpose(1, 0, 3, 2), *steps)
    start = (d_final, jnp.zeros_like(A))
    (d_state, d_A), grads = jax.lax.scan(body, start, inputs, reverse=True)
    d_x, d_dt, d_B, d_C = (_steps_second(g) for g in grads)
    return d_x, d_dt, d_A, d_B, d_C, d_state


def _scan_chunk(A, state, x, dt, B, C):
    """The state after a chunk of `[chunk, batch, ...]`, and its outputs."""
    decay = jnp.exp(dt[..., None] * A)
    write = (dt * x)[..., None] * B[:, :, None, :]
    decay, write = jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, write)
    )
    h = decay * state + write
    return h[-1], jnp.einsum("lben,lbn->lbe", h, C)


def _chunks_first(t, chunk):
    t = jnp.moveaxis(t, 1, 0)
    return t.reshape(-1, chunk, *t.shape[1:])


def _steps_second(t):
    return jnp.moveaxis(t.reshape(-1, *t.shape[2:]), 0, 1)


def tree_ssd(x, dt, A, B, C, parents, state):
    """Output y `[batch, nodes, heads, P]` and all states `[batch, nodes, heads, N, P]`.

    Causal decay becomes decay along the path: from node j to its descendant i, the sum of log
    decays of the nodes after j on the path, zero weight where j is no ancestor of i.
    """
    ancestor = ancestors(parents).astype(jnp.float32)
    strict = ancestor - jnp.eye(len(parents))
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
    return y, states + from_root[..., None, None] * state[:, None]


def ancestors(parents):
    """`[i, j]`: whether j is i or one of its ancestors, by doubling the reach of paths."""
    nodes = len(parents)
    node = jnp.arange(nodes)
    reach = (node[:, None] == node) | (parents[:, None] == node)
    for _ in range(max(1, (nodes - 1).bit_length())):
        reach = (reach.astype(jnp.float32) @ reach.astype(jnp.float32)) > 0
    return reach
