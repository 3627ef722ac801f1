import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.recurrence import reference, tile

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 70, 2, 16, 24


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def keys(correlation, seed, length=LENGTH):
    """Unit keys of which any two have about this cosine."""
    common, own = normal(1, 1, HEADS, KEY, seed=9), normal(BATCH, length, HEADS, KEY, seed=seed)
    k = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return k / jnp.linalg.norm(k, axis=-1, keepdims=True)


def near(got, want, tolerance=2e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def agree(ours, definition, arrays, tolerance=2e-6, gradients=4e-6):
    """Values and gradients of both results in every array."""
    got, pull = jax.vjp(jax.jit(ours), *arrays)
    want, pull_want = jax.vjp(jax.jit(definition), *arrays)
    near(got[0], want[0], tolerance)
    near(got[1], want[1], tolerance)
    cotangents = tuple(normal(*t.shape, seed=5).astype(t.dtype) for t in want)
    both = zip(*(jax.tree.leaves(p(cotangents)) for p in (pull, pull_want)), strict=True)
    for a, b in both:
        assert np.isfinite(np.asarray(a)).all()
        near(a, b, gradients)


def gates(kind, strength):
    """Log decays per head, per channel, or none; up to some -3 * strength."""
    shape = {"none": None, "head": (1,), "channel": (KEY,)}[kind]
    if shape is None:
        return None
    return -strength * jnp.abs(normal(BATCH, LENGTH, HEADS, *shape, seed=4))


def gla_arrays(kind, strength=0.3):
    qkv = [normal(BATCH, LENGTH, HEADS, d, seed=i) for i, d in enumerate((KEY, KEY, VALUE))]
    return *qkv, gates(kind, strength), normal(BATCH, HEADS, KEY, VALUE, seed=6)


def delta_arrays(correlation, gated, beta=0.98):
    values = normal(BATCH, LENGTH, HEADS, VALUE, seed=3)
    betas = jnp.full((BATCH, LENGTH, HEADS), beta)
    g = gates("head", 0.3)[..., 0] if gated else None
    state = normal(BATCH, HEADS, KEY, VALUE, seed=6)
    return keys(correlation, 1), keys(correlation, 2), values, betas, g, state


@functools.partial(jax.jit, static_argnums=5)
def _gla(q, k, v, g, s, chunk):
    return kernels_pallas.gated_linear_attention(
        q, k, v, g, initial_state=s, chunk=chunk, precision="highest"
    )


@functools.partial(jax.jit, static_argnums=6)
def _delta(q, k, v, b, g, s, chunk):
    return kernels_pallas.delta_rule(
        q, k, v, b, g, initial_state=s, chunk=chunk, precision="highest"
    )


def gla(chunk=16):
    return lambda *arrays: _gla(*arrays, chunk)


def delta(chunk=16):
    return lambda *arrays: _delta(*arrays, chunk)


def gla_definition(q, k, v, g, s):
    g = jnp.zeros_like(q) if g is None else g
    return reference.gated_linear_attention(q, k, v, g, s, scale=KEY**-0.5)


def delta_definition(*arrays):
    return reference.delta_rule(*arrays, scale=KEY**-0.5)


@pytest.mark.parametrize(
    "kind, strength, chunk",
    [("none", 0, 64), ("head", 0.3, 16), ("head", 5, 16), ("head", 100, 16)]
    + [("channel", 0.01, 16), ("channel", 5, 16), ("channel", 5, 64), ("channel", 100, 16)],
)
def test_linear_attention_equals_its_recurrence_at_any_decay(kind, strength, chunk):
    agree(gla(chunk), gla_definition, gla_arrays(kind, strength))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_delta_rule_equals_its_recurrence_for_alike_keys(correlation):
    agree(delta(64), delta_definition, delta_arrays(correlation, False))


@pytest.mark.parametrize("correlation", [0.5, 0.9])  # at 1, d_g cancels to noise, here and there
def test_gated_delta_rule_equals_its_recurrence(correlation):
    agree(delta(16), delta_definition, delta_arrays(correlation, True))


def test_delta_rule_takes_negative_eigenvalues_and_other_chunks():
    arrays = delta_arrays(0.3, False, beta=1.9)
    agree(delta(128), delta_definition, arrays, 5e-6, 2e-5)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_triangular_inverse_is_accurate_where_powers_cancel(size):
    alike = jnp.tril(jnp.full((size, size), 0.98), -1)
    want = np.linalg.inv(np.eye(size) + np.asarray(alike, np.float64))
    near(tile.inverse(alike), want)


def test_a_gate_of_minus_infinity_starts_anew():
    for kind in ("head", "channel"):
        q, k, v, g, s = gla_arrays(kind)
        out, state = gla()(q, k, v, g.at[:, 30].set(-jnp.inf), s)
        want, want_state = gla()(q[:, 30:], k[:, 30:], v[:, 30:], g[:, 30:], jnp.zeros_like(s))
        near(out[:, 30:], want)
        near(state, want_state)
        d_g = jax.grad(lambda g, a=(q, k, v, s): gla()(*a[:3], g, a[3])[0].sum())(
            g.at[:, 30].set(-jnp.inf)
        )
        assert np.isfinite(np.asarray(d_g)).all()


def test_orthonormal_keys_store_and_overwrite():
    k = jnp.eye(KEY)[None, :, None]  # one batch, KEY steps, one head
    k = jnp.concatenate([k, k[:, :3]], axis=1)
    v = normal(1, KEY + 3, 1, VALUE)
    _, state = kernels_pallas.delta_rule(k, k, v, jnp.ones(k.shape[:3]))
    np.testing.assert_allclose(state[0, 0, :3], v[0, KEY:, 0], rtol=1e-6)
    np.testing.assert_allclose(state[0, 0, 3:], v[0, 3:KEY, 0], rtol=1e-6)


def test_states_carry_over_a_cut():
    cut = 40
    for call, arrays in ((gla(), gla_arrays("channel")), (delta(), delta_arrays(0.5, True))):
        *sequences, s = arrays
        out, state = call(*sequences, s)
        first, middle = call(*(t[:, :cut] for t in sequences), s)
        second, end = call(*(t[:, cut:] for t in sequences), middle)
        near(jnp.concatenate([first, second], axis=1), out)
        near(end, state)


def test_steps_equal_the_chunked_form():
    cases = (
        (kernels_pallas.gated_linear_attention_step, gla(), gla_arrays("channel")),
        (kernels_pallas.gated_linear_attention_step, gla(), gla_arrays("none")),
        (kernels_pallas.delta_rule_step, delta(), delta_arrays(0.5, True)),
    )
    for one, call, (*sequences, s) in cases:
        first = [None if x is None else x[:, :3] for x in sequences]
        out, want = call(*first, s)
        for t in range(3):
            now, s = one(*(None if x is None else x[:, t] for x in first), s)
            near(now, out[:, t])
        near(s, want)


def ssd_arrays(heads=4, groups=2, length=LENGTH):
    x = normal(BATCH, length, heads, VALUE)
    dt = jax.nn.softplus(normal(BATCH, length, heads, seed=1))
    A = -jnp.exp(normal(heads, seed=2))
    B, C = (normal(BATCH, length, groups, KEY, seed=i) for i in (3, 4))
    return x, dt, A, B, C, normal(heads, seed=5), normal(BATCH, heads, KEY, VALUE, seed=6)


def test_ssd_equals_its_recurrence_with_groups():
    def ours(x, dt, A, B, C, D, s):
        return kernels_pallas.ssd(x, dt, A, B, C, D=D, initial_state=s, precision="highest")

    arrays = ssd_arrays()
    agree(ours, reference.ssd, arrays)
    x, dt, A, B, C, D, s = arrays
    y, _ = ours(*arrays)
    now, _ = kernels_pallas.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], s, D=D)
    near(now, y[:, 0])


@pytest.mark.parametrize("parents", [(-1, 0, 1, 1, 0, 4, 2, -1, 7), tuple(range(-1, 8))], ids=str)
def test_tree_ssd_continues_the_parent(parents):
    x, dt, A, B, C, _, s = ssd_arrays(length=9)

    def ours(x, dt, A, B, C, s):
        return kernels_pallas.tree_ssd(x, dt, A, B, C, jnp.asarray(parents), initial_state=s)

    def definition(x, dt, A, B, C, s):
        return reference.tree_ssd(x, dt, A, B, C, parents, s)

    agree(ours, definition, (x, dt, A, B, C, s))


def test_selective_scan_equals_its_recurrence():
    x, dt = normal(BATCH, LENGTH, 6), jax.nn.softplus(normal(BATCH, LENGTH, 6, seed=1))
    A = -jnp.exp(normal(6, 4, seed=2))
    B, C = (normal(BATCH, LENGTH, 4, seed=i) for i in (3, 4))
    D, s = normal(6, seed=5), normal(BATCH, 6, 4, seed=6)

    def ours(x, dt, A, B, C, D, s):
        return kernels_pallas.selective_scan(x, dt, A, B, C, D=D, initial_state=s, chunk=16)

    agree(ours, reference.selective_scan, (x, dt, A, B, C, D, s))
    y, _ = ours(x, dt, A, B, C, D, s)
    now, _ = kernels_pallas.selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], s, D=D)
    near(now, y[:, 0])


def test_bfloat16_is_near_float32():
    for call, arrays in (
        (lambda *a: kernels_pallas.gated_linear_attention(*a[:4]), gla_arrays("channel")),
        (lambda *a: kernels_pallas.delta_rule(*a[:5]), delta_arrays(0.5, True)),
    ):
        low = [t.astype(jnp.bfloat16).astype(jnp.float32) for t in arrays]
        out, state = call(*(t.astype(jnp.bfloat16) for t in arrays))
        want, want_state = call(*low)
        assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
        near(out.astype(jnp.float32), want, 2e-2)
        near(state, want_state, 2e-2)


def test_gradients_of_gradients_and_forward_mode_exist():
    q, k, v, b, g, s = delta_arrays(0.5, True)

    def total(k):
        return delta()(q, k, v, b, g, s)[0].sum()

    direction = normal(*k.shape, seed=8)
    _, slope = jax.jvp(total, (k,), (direction,))
    near(slope, (jax.grad(total)(k) * direction).sum(), 1e-4)
    _, curvature = jax.jvp(jax.grad(total), (k,), (direction,))
    step = 1e-2
    difference = jax.grad(total)(k + step * direction) - jax.grad(total)(k - step * direction)
    near(curvature, difference / (2 * step), 3e-2)


BAD = {
    "chunk": (dict(chunk=48), "power of two"),
    "implementation": (dict(implementation="cuda"), "is unknown"),
    "gate": (dict(log_decay=normal(BATCH, LENGTH, HEADS, 3)), "log_decay has shape"),
    "state": (dict(initial_state=normal(BATCH, HEADS, VALUE, KEY)), "initial_state has shape"),
    "value": (dict(value=normal(BATCH, LENGTH, 3, VALUE)), "value agree"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_sentence(case):
    changes, message = BAD[case]
    q, k, v, g, s = gla_arrays("channel")
    arguments = dict(query=q, key=k, value=v, log_decay=g, initial_state=s) | changes
    with pytest.raises(ValueError, match=message):
        kernels_pallas.gated_linear_attention(**arguments)
