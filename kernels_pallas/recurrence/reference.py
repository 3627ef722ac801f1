"""The definitions of the recurrences: one step at a time, in float32, no tricks.

All states are `[batch, heads, key_dim, value_dim]` (selective scan: `[batch, channels, state]`).
"""

import jax
import jax.numpy as jnp


def _scan(step, state, *sequences):
    """Outputs `[batch, length, ...]` and the final state of `step` over axis 1 of the sequences."""
    by_time = [jnp.moveaxis(s.astype(jnp.float32), 1, 0) for s in sequences]
    state, out = jax.lax.scan(lambda s, x: step(s, *x), state, tuple(by_time))
    return jnp.moveaxis(out, 0, 1), state


def _zeros(initial_state, *shape):
    return jnp.zeros(shape, jnp.float32) if initial_state is None else initial_state


def gated_linear_attention(query, key, value, log_decay, initial_state=None, *, scale):
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T;   o_t = scale * q_t S_t."""

    def step(state, q, k, v, g):
        state = jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    state = _zeros(initial_state, *key.shape[::2], key.shape[3], value.shape[3])
    return _scan(step, state, query, key, value, log_decay)


def delta_rule(query, key, value, beta, log_decay=None, initial_state=None, *, scale):
    """S' = exp(g_t) S_{t-1};   S_t = S' + beta_t k_t (v_t - k_t S')^T;   o_t = scale * q_t S_t."""
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay

    def step(state, q, k, v, b, g):
        state = jnp.exp(g)[..., None, None] * state
        kept = jnp.einsum("bhk,bhkv->bhv", k, state, precision="highest")
        state = state + k[..., :, None] * (b[..., None] * (v - kept))[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    state = _zeros(initial_state, *key.shape[::2], key.shape[3], value.shape[3])
    return _scan(step, state, query, key, value, beta, log_decay)


def ssd(x, dt, A, B, C, D=None, initial_state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T;   y_t = C_t h_t + D x_t."""
    heads = x.shape[2]
    B, C = (jnp.repeat(t, heads // t.shape[2], axis=2) for t in (B, C))
    y, state = gated_linear_attention(
        C, B, x * dt[..., None], (dt * A)[..., None], initial_state, scale=1.0
    )
    return y + (0 if D is None else D[:, None] * x), state


def tree_ssd(x, dt, A, B, C, parents, initial_state):
    """As `ssd`, with h of the parent in place of h_{t-1}; the parent of a root is `initial_state`.

    Also returns the states of all nodes, `[batch, nodes, heads, key_dim, value_dim]`.
    """
    y, states = [], []
    for i, parent in enumerate(parents):
        before = initial_state if parent < 0 else states[parent]
        now = slice(i, i + 1)
        out, state = ssd(x[:, now], dt[:, now], A, B[:, now], C[:, now], None, before)
        y.append(out)
        states.append(state)
    return jnp.concatenate(y, axis=1), jnp.stack(states, axis=1)


def selective_scan(x, dt, A, B, C, D=None, initial_state=None):
    """h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T;   y_t = h_t C_t + D x_t,  per channel."""

    def step(h, x, dt, B, C):
        h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B[:, None, :]
        return h, jnp.einsum("ben,bn->be", h, C, precision="highest")

    h = _zeros(initial_state, x.shape[0], *A.shape)
    y, h = _scan(step, h, x, dt, B, C)
    return y + (0 if D is None else D * x), h
