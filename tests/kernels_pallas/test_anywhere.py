"""The functions wherever JAX users call them: transformations, meshes, types, odd inputs."""

import itertools
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_equals_oracle, assert_near, operands, pairs
from test_attention_pallas import BODIES

import kernels_pallas as kp
from kernels_pallas import Causal, Softmax
from kernels_pallas.attention import tpu, xla
from kernels_pallas.attention.problem import Operands, Problem

BODIES = {"xla": xla, **BODIES}


def some_slow(cases, slow):
    """The names of cases, some of them marked slow."""
    return [pytest.param(n, marks=[pytest.mark.variants] if n in slow else []) for n in cases]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def attention(q, **options):
    return kp.attention(q, q, q, **options)


# --- no NaN, no silent difference between bodies -------------------------------------------------
def much_more(s, q, k):
    return s + 100.0


def only_near(s, q, k):
    return jnp.where(k > q - 20, s, -jnp.inf)


RAGGED = {
    "slopes below zero": dict(slopes=True, negative=True),
    "modifier": dict(score=Softmax(modify=much_more)),
    "modifier that hides": dict(score=Softmax(modify=only_near), mask=Causal()),
    "large bias": dict(bias=(1, 4), large=True),
}


RAGGED_BY_DEFAULT = {("slopes below zero", "tpu"), ("modifier that hides", "gpu")}


@pytest.mark.parametrize("case, name", pairs(RAGGED, BODIES, RAGGED_BY_DEFAULT))
def test_padded_rows_have_no_weight(case, name):
    options = dict(RAGGED[case])
    negative, large = options.pop("negative", False), options.pop("large", False)
    problem, x = operands(queries=150, keys=150, **options)
    if negative:
        x = x._replace(slopes=-x.slopes * 3)
    if large:
        x = x._replace(bias=x.bias + 200.0)
    assert_equals_oracle(BODIES[name], problem, x, 2e-5)


HIDING = {
    "segments": dict(segments=True),
    "boolean bias": dict(bias=(1, 1)),
    "float bias": dict(bias=(1, 1)),
    "mask": dict(mask=lambda q, k: (k < 140) & (q < 140)),
}


HIDING_BY_DEFAULT = {("segments", "xla"), ("float bias", "tpu"), ("segments", "gpu")}


@pytest.mark.parametrize("case, name", pairs(HIDING, BODIES, HIDING_BY_DEFAULT))
def test_what_is_hidden_changes_nothing(case, name):
    """Tokens from 140 on are padding, on both sides."""
    problem, x = operands(queries=150, keys=150, **(HIDING[case] if case == "mask" else {}))
    inside = jnp.arange(150) < 140
    if case == "segments":
        x = x._replace(query_segments=jnp.tile(jnp.where(inside, 0, -1), (2, 1)),
                       key_segments=jnp.tile(jnp.where(inside, 0, -2), (2, 1)))  # fmt: skip
    if "bias" in case:
        seen = (inside & inside[:, None])[None, None]
        x = x._replace(bias=seen if case == "boolean bias" else jnp.where(seen, 0.1, -jnp.inf))
    bad = jnp.asarray([np.nan, np.inf, 3e38, -3e38, 1e20] * 2)[:, None]
    names = "query", "key", "value"
    spoiled = x._replace(**{n: getattr(x, n).at[:, :, 140:].set(bad) for n in names})
    body = BODIES[name]

    @jax.jit
    def both(x):
        out, lse = body.forward(problem, x)
        return (
            out,
            lse,
            body.backward(problem, x, out, lse, jnp.ones_like(out), jnp.zeros_like(lse)),
        )

    for got, want in zip(*(jax.tree.leaves(both(t)) for t in (spoiled, x)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", some_slow(BODIES, ["gpu"]))
def test_packed_examples_do_not_reach_each_other(name):
    """The second example is not finite, nor are the gradients of its outputs."""
    problem, x = operands(queries=150, keys=150, mask=Causal())
    first = jnp.arange(150) < 90
    x = x._replace(**{n: jnp.tile(~first * 1, (2, 1)) for n in ("query_segments", "key_segments")})
    body = BODIES[name]

    @jax.jit
    def both(x, slope):
        out, lse = body.forward(problem, x)
        d_out = jnp.where(first[:, None], jnp.ones_like(out), slope)
        grads = body.backward(problem, x, out, lse, d_out, jnp.zeros_like(lse))
        return [t[:, :, :90] for t in (out, lse, *grads[:3])]

    for bad, slope in ((np.nan, 1.0), (3e38, np.nan)):
        names = "query", "key", "value"
        spoiled = x._replace(**{n: getattr(x, n).at[:, :, 90:].set(bad) for n in names})
        for got, want in zip(both(spoiled, slope), both(x, 1.0), strict=True):
            np.testing.assert_array_equal(got, want)


def window_call(lanes, implementation):
    """12 or 128 windows of 6 tokens, of which the last two are hidden from all others."""
    windows, width = (128, 16) if lanes else (12, 8)
    hidden = jnp.arange(6) >= 4
    mask = jnp.stack([hidden[:, None] == hidden, jnp.ones((6, 6), bool)])

    def call(qkv, bias):
        return kp.window_attention(
            qkv, num_heads=2, bias=bias, mask=mask, implementation=implementation
        )

    qkv, bias = normal(windows, 6, 6 * width), normal(2, 6, 6)
    seen = np.ones((windows, 6), bool)
    seen[::2, 4:] = False  # in windows of the first mask
    seen[5] = False
    return call, (qkv, bias), seen


def neighbourhood_call(implementation):
    """A map whose corner of two by two tokens is out of reach of all that is three or more away."""

    def call(qkv, bias):
        q, k, v = jnp.split(qkv, 3, -1)
        return kp.neighborhood_attention(
            q, k, v, kernel_size=3, bias=bias, implementation=implementation
        )

    seen = np.ones((1, 9, 9), bool)
    seen[:, :2, :2] = False
    return call, (normal(1, 9, 9, 2, 24), normal(2, 5, 5).at[:, 0, 0].set(-jnp.inf)), seen


UNSEEN = {
    **{f"windows in rows, {i}": partial(window_call, False, i) for i in ("xla", "pallas_tpu")},
    "windows in lanes": partial(window_call, True, "pallas_tpu"),
    **{
        f"neighbourhoods, {i}": partial(neighbourhood_call, i)
        for i in ("xla", "pallas_tpu", "pallas_gpu")
    },
}


@pytest.mark.parametrize("case", some_slow(UNSEEN, ["neighbourhoods, xla"]))
def test_small_windows_keep_what_is_not_finite_to_those_who_see_it(case):
    call, (qkv, bias), seen = UNSEEN[case]()
    rows, far = seen.copy(), seen.copy()
    if case.startswith("neigh"):
        rows[:, :3, :3] = False  # what sees the corner
        far[:, :4, :4] = False  # and what is seen by that

    def only(where, t, other=0.0):
        return jnp.where(where.reshape(*where.shape, *(1,) * (t.ndim - where.ndim)), t, other)

    @jax.jit
    def both(qkv, slope):
        out, pull = jax.vjp(lambda qkv: call(qkv, bias), qkv)
        (grad,) = pull(only(rows, only(far, 2 * out), slope))
        return only(far, out), only(far, grad)

    want = both(qkv, 0.0)
    for bad, slope in ((np.nan, 0.0), (np.inf, np.nan), (3e38, 0.0), (-3e38, np.nan)):
        spoiled = only(seen, qkv, bad)
        for a, b in zip(both(spoiled, slope), want, strict=True):
            np.testing.assert_array_equal(a, b)
    if not case.startswith("windows in lanes"):
        assert np.isnan(np.asarray(call(spoiled * jnp.nan, bias))).all()


def recurrences(length):
    q, k, v = (normal(1, length, 2, 8, seed=i) for i in range(3))
    k, gate = k / jnp.linalg.norm(k, axis=-1, keepdims=True), -jnp.abs(normal(1, length, 2, 8))
    x, dt, A = normal(1, length, 5), jnp.abs(normal(1, length, 5)), -jnp.abs(normal(5, 4))
    return {
        "gates": (lambda *a: kp.gated_linear_attention(*a, chunk=16), (q, k, v, gate[..., :1])),
        "channels": (lambda *a: kp.gated_linear_attention(*a, chunk=16), (q, k, v, gate)),
        "delta": (lambda q, k, v, g: kp.delta_rule(q, k, v, jnp.exp(g), g, chunk=16),
                  (q, k, v, gate[..., 0])),
        "scan": (lambda x, dt, B: kp.selective_scan(x, dt, A, B, B, chunk=16),
                 (x, dt, normal(1, length, 4))),
    }  # fmt: skip


@pytest.mark.parametrize("name", some_slow(recurrences(1), ["gates"]))
def test_later_steps_change_no_bit_of_earlier_ones(name):
    call, arrays = recurrences(24)[name]
    early = jax.jit(jax.value_and_grad(lambda *a: (call(*a)[0][:, :20] ** 2).sum(), (0, 1, 2)))
    want = early(*arrays)
    for bad in (np.nan, np.inf, 3e38, 1e20):
        spoiled = tuple(t.at[:, 20:].set(bad) for t in arrays[:3])
        for a, b in zip(*map(jax.tree.leaves, (early(*spoiled, *arrays[3:]), want)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_a_gate_forgets_and_what_is_packed_elsewhere_changes_nothing():
    call, (q, k, v, g) = recurrences(40)["channels"]
    v = v.at[:, 17].set(jnp.nan)
    out, state = call(q, k, v, g.at[:, 20].set(-jnp.inf))
    assert np.isnan(out[:, 17:20]).all() and np.isfinite(out[:, :17]).all()
    assert np.isfinite(out[:, 20:]).all() and np.isfinite(state).all()
    _, state = kp.gated_linear_attention_step(
        q[:, 0], k[:, 0], v[:, 0], jnp.full((1, 2, 1), -jnp.inf), jnp.full((1, 2, 8, 8), jnp.nan)
    )
    assert np.isfinite(state).all()
    out, state = kp.delta_rule(q, k, v, jnp.exp(g[..., 0]), cu_seqlens=jnp.asarray([0, 19, 40]))
    assert np.isnan(state[0]).all() and np.isfinite(state[1]).all()
    assert np.isfinite(out[:, 19:]).all()


@pytest.mark.parametrize("name", some_slow(["gates", "channels"], ["channels"]))
def test_what_a_gate_forgets_has_no_gradient_however_large(name):
    call, (q, k, v, g) = recurrences(24)[name]
    g = g.at[:, 9].set(-jnp.inf)
    late = jax.jit(jax.grad(lambda q, k, v: (call(q, k, v, g)[0][:, 9:] ** 2).sum(), (0, 1, 2)))
    for a, b in zip(late(q, k, v.at[:, :9].set(3e38)), late(q, k, v), strict=True):
        np.testing.assert_array_equal(a[:, 9:], b[:, 9:])


@pytest.mark.variants
def test_writes_that_overflow_change_no_bit_of_earlier_steps():
    _, (q, k, v, g) = recurrences(24)["delta"]
    beta = jnp.exp(g)

    def early(v, beta):
        return kp.delta_rule(q, k, v, beta, g, chunk=16)[0][:, :20]

    for v_late, beta_late in ((3e38, 0.5), (1.0, 3e38)):
        got = early(v.at[:, 20:].set(v_late), beta.at[:, 20:].set(beta_late))
        np.testing.assert_array_equal(got, early(v, beta))


def test_a_decoding_step_equals_the_row_of_the_full_pass():
    q, slopes = normal(2, 20, 4, 8), 2.0 ** -jnp.arange(1.0, 5.0)
    score = Softmax(modify=lambda s, i, j: s + 0.1 * jnp.cos((i - j).astype(jnp.float32)))
    full = attention(q, mask=Causal(), slopes=slopes, score=score)
    last = q[:, 19:]
    steps = (
        kp.attention(last, q, q, mask=Causal(19), slopes=slopes, score=score),
        kp.attention(last, q, q, mask=Causal(), query_offset=19, slopes=slopes, score=score),
        jax.jit(lambda n: kp.attention(last, q, q, mask=Causal(n), slopes=slopes, score=score))(19),
        jax.jit(lambda n: kp.attention(last, q, q, mask=Causal(), query_offset=n, slopes=slopes,
                                       score=score))(19),
    )  # fmt: skip
    for step in steps:
        assert_near(step, full[:, 19:], 1e-6)
    ragged = kp.attention(
        last, q, q, mask=Causal(), query_offset=jnp.asarray([19, 7]), slopes=slopes, score=score
    )
    assert_near(ragged[1:], kp.attention(last, q[:, :8], q[:, :8], mask=Causal(7), slopes=slopes,
                                         score=score)[1:], 1e-6)  # fmt: skip


def test_integers_are_refused_and_mixed_types_brought_together():
    q = jnp.ones((1, 4, 1, 8), jnp.int8)
    with pytest.raises(TypeError, match="query is int8"):
        attention(q)
    low, high = normal(1, 4, 1, 8, dtype=jnp.bfloat16), normal(1, 4, 1, 8)
    assert kp.attention(low, high, high).dtype == jnp.float32
    with pytest.raises(TypeError, match="query is int8"):
        kp.neighborhood_attention(q, q, q, kernel_size=3)
    mixed = kp.neighborhood_attention(high, low, low, kernel_size=3)
    assert mixed.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="query is int32"):
        kp.gated_linear_attention(*(jnp.ones((1, 4, 1, 8), jnp.int32),) * 3, None)


def test_float64_keeps_its_digits():
    with jax.enable_x64(True):
        q, k, v = (normal(1, 20, 2, 8, seed=i, dtype=jnp.float64) for i in range(3))

        def dense(q):
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
            return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)

        loss = lambda f: jax.grad(lambda q: (f(q) ** 2).sum())(q)  # noqa: E731
        got, want = loss(lambda q: kp.attention(q, k, v)), loss(dense)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


# --- any transformation ---------------------------------------------------------------------------
def test_hessian_vector_products_by_every_route_agree():
    q = normal(1, 24, 2, 4)
    t = normal(1, 24, 2, 4, seed=1)

    def energy(implementation):
        call = partial(attention, mask=Causal(), implementation=implementation)
        return lambda q: (jnp.sin(call(q)) ** 2).sum()

    def dense(q):
        s = jnp.einsum("bqhd,bkhd->bhqk", q, q) / 2
        s = jnp.where(jnp.tri(24, dtype=bool), s, -1e30)
        return (jnp.sin(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), q)) ** 2).sum()

    want = jax.jvp(jax.grad(dense), (q,), (t,))[1]
    for f in (energy(None), energy("pallas_tpu")):
        forward_over_reverse = jax.jit(lambda q, f=f: jax.jvp(jax.grad(f), (q,), (t,))[1])
        assert_near(forward_over_reverse(q), want, 1e-5)
    f = energy(None)
    reverse_over_reverse = jax.grad(lambda q: (jax.grad(f)(q) * t).sum())
    reverse_over_forward = jax.grad(lambda q: jax.jvp(f, (q,), (t,))[1])
    for route in (reverse_over_reverse, reverse_over_forward):
        assert_near(jax.jit(route)(q), want, 1e-5)
    assert_near(jax.linearize(jax.grad(f), q)[1](t), want, 1e-5)


def test_derivatives_commute_with_vmap():
    q = normal(3, 1, 12, 2, 4)
    f = lambda q: (attention(q, mask=Causal()) ** 2).sum()  # noqa: E731
    inside = jax.vmap(jax.grad(f))(q)
    outside = jax.grad(lambda q: jax.vmap(f)(q).sum())(q)
    assert_near(inside, jnp.stack([jax.grad(f)(t) for t in q]), 1e-6)
    assert_near(outside, inside, 1e-6)
    assert_near(
        jax.vmap(lambda t: jax.jvp(f, (t,), (t,))[1])(q), (inside * q).sum((1, 2, 3, 4)), 1e-5
    )


def test_modifiers_and_masks_close_over_arrays_and_traced_values():
    q, table = normal(1, 10, 2, 4), normal(19, seed=3)

    def call(q, table, last):
        score = Softmax(modify=lambda s, i, j: s + table[j - i + 9])
        return (kp.attention(q, q, q, score=score, mask=lambda i, j: j <= last) ** 2).sum()

    def with_bias(q, table, last):
        i, j = jnp.arange(10)[:, None], jnp.arange(10)
        bias = jnp.where(j <= last, table[j - i + 9], -jnp.inf)[None, None]
        return (kp.attention(q, q, q, bias=bias) ** 2).sum()

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(q, table, 6) for f in (call, with_bias))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(a, b, 1e-5)
    with pytest.raises(ValueError, match="close over arrays"):
        kp.attention(q, q, q, mask=lambda i, j: table[j - i + 9] > 0, implementation="pallas_tpu")


EXPORTED = {
    "attention": (attention, "b, n, 2, 8"),
    "causal with padding": (
        lambda q: attention(q, mask=Causal(), lengths=jnp.ones(q.shape[0], jnp.int32)),
        "b, n, 2, 8",
    ),
    "window": (lambda q: kp.window_attention(q, q, q), "b, 16, 2, 8"),
    "gates": (lambda q: kp.gated_linear_attention(q, q, q, -abs(q), chunk=16)[0], "b, n, 2, 8"),
    "scan": (
        lambda q: kp.selective_scan(
            q[..., 0], abs(q[..., 0]), -jnp.ones((2, 3)), q[:, :, 0, :3], q[:, :, 0, :3]
        )[0],
        "b, n, 2, 8",
    ),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_batch_and_length_may_be_open_in_an_export(case):
    f, shape = EXPORTED[case]
    shape = jax.export.symbolic_shape(shape)
    exported = jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = normal(3, 16, 2, 8)
    assert_near(exported.call(x), f(x), 1e-6)


def test_the_caller_traces_no_body():
    q = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: attention(q, mask=Causal()).sum()))(q)
    assert len(str(jaxpr).splitlines()) < 60


# --- what users of peers expect -----------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(
    "shape", some_slow([(2, 1, 1, 30), (1, 4, 20, 1), (2, 4, 1, 1)], [(1, 4, 20, 1), (2, 4, 1, 1)])
)
def test_a_bias_may_be_shared_by_queries_or_keys(shape, implementation):
    q, k, bias = normal(2, 20, 4, 8), normal(2, 30, 4, 8), normal(*shape)

    def loss(bias, implementation):
        return (kp.attention(q, k, k, bias=bias, implementation=implementation) ** 2).sum()

    got = jax.value_and_grad(loss)(bias, implementation)
    whole = jnp.broadcast_to(bias, (2, 4, 20, 30))
    want = jax.value_and_grad(lambda b: loss(jnp.broadcast_to(b, whole.shape), "xla"))(bias)
    assert_near(got[0], want[0], 1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=3e-5)


def test_blocks_sum_the_gradient_of_a_shared_bias(monkeypatch):
    monkeypatch.setattr(xla, "MIN_SCORES", 0)
    problem, x = operands(queries=60, keys=60, mask=Causal())
    x = x._replace(bias=normal(2, 1, 1, 60))
    d = normal(2, 4, 60, 12), normal(2, 4, 60)
    got = [
        xla.backward(problem, x, *xla.forward(problem, x, size), *d, size).bias
        for size in (1 << 30, 4 * 8 * 60 * 16)
    ]
    assert_near(got[1], got[0], 1e-5)


def test_any_number_of_batch_axes():
    q, k, bias = normal(2, 3, 10, 4, 8), normal(2, 3, 10, 2, 8), normal(2, 1, 1, 1, 10)
    got = kp.attention(q, k, k, bias=bias, lengths=jnp.asarray([[10, 4, 5], [6, 7, 8]]))
    flat = (t.reshape(6, *t.shape[2:]) for t in (q, k, k))
    want = kp.attention(*flat, bias=jnp.repeat(bias, 3, 1).reshape(6, 1, 1, 10),
                        lengths=jnp.asarray([10, 4, 5, 6, 7, 8]))  # fmt: skip
    np.testing.assert_array_equal(got.reshape(want.shape), want)
    one = kp.attention(q[0, 0], k[0, 0], k[0, 0], bias=bias[0, 0])
    assert_near(one, kp.attention(q, k, k, bias=bias)[0, 0], 1e-6)


def test_lengths_are_those_of_the_keys_where_queries_are_others():
    q, k = normal(2, 3, 4, 8), normal(2, 12, 2, 8)
    got = jax.jit(lambda n: kp.attention(q, k, k, lengths=n))(jnp.asarray([12, 5]))
    assert_near(got[1], kp.attention(q[1:], k[1:, :5], k[1:, :5])[0], 1e-6)


def test_sinks_take_weight_and_have_no_value():
    q, k, sinks = normal(2, 6, 4, 8), normal(2, 9, 2, 8), normal(4)
    out, lse = kp.attention(q, k, k, sinks=sinks, return_lse=True)
    full = jnp.repeat(k, 2, 2)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, full) * 8**-0.5
    s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (2, 4, 6, 1))], -1)
    want = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s)[..., :-1], full)
    assert_near(out, want, 1e-6)
    assert_near(lse, jax.nn.logsumexp(s, -1), 1e-6)


def test_groups_of_values_share_keys_in_the_delta_rule():
    q, k = normal(2, 20, 2, 16), normal(2, 20, 2, 16, seed=1)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v, beta = normal(2, 20, 6, 16), jax.nn.sigmoid(normal(2, 20, 6))
    decay = -jnp.abs(normal(2, 20, 6))
    want, state = kp.delta_rule(*(jnp.repeat(t, 3, 2) for t in (q, k)), v, beta, decay)
    got, own = kp.delta_rule(q, k, v, beta, decay)
    assert_near(got, want, 3e-6)
    assert_near(own, state, 3e-6)


BOUNDS = [0, 5, 5, 40, 57]


def packed_calls():
    q, k = normal(1, 57, 2, 16), normal(1, 57, 2, 16, seed=1) / 4
    v, beta, decay = (
        normal(1, 57, 2, 8),
        jax.nn.sigmoid(normal(1, 57, 2)),
        -jnp.abs(normal(1, 57, 2)),
    )
    x, dt, B = normal(1, 57, 6), jnp.abs(normal(1, 57, 6)), normal(1, 57, 4)
    A = -jnp.abs(normal(6, 4))
    state, small = normal(4, 2, 16, 8), normal(4, 6, 4)
    return {
        "delta": (partial(kp.delta_rule, chunk=16), (q, k, v, beta, decay), state),
        "gla": (partial(kp.gated_linear_attention, chunk=16), (q, k, v, decay[..., None]), state),
        "scan": (lambda x, dt, B, C, **o: kp.selective_scan(x, dt, A, B, C, chunk=16, **o),
                 (x, dt, B, B), small),
    }  # fmt: skip


@pytest.mark.parametrize("name", some_slow(["delta", "gla", "scan"], ["gla", "scan"]))
def test_packed_sequences_have_states_of_their_own(name):
    call, arrays, state = packed_calls()[name]

    def packed(arrays, state, bounds):
        return call(*arrays, initial_state=state, cu_seqlens=bounds)

    out, final = jax.jit(packed)(arrays, state, jnp.asarray(BOUNDS))
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
        if start == stop:
            np.testing.assert_array_equal(final[n], state[n])
            continue
        part = tuple(t[:, start:stop] for t in arrays)
        want, own = call(*part, initial_state=state[n : n + 1])
        assert_near(out[:, start:stop], want, 5e-6)
        assert_near(final[n], own[0], 5e-6)
    grads = jax.grad(lambda a, s: (packed(a, s, jnp.asarray(BOUNDS))[1] ** 2).sum(), (0, 1))
    assert all(np.isfinite(t).all() for t in jax.tree.leaves(grads(arrays, state)))


# --- any mesh -----------------------------------------------------------------------------------
MESHES = """
import sys, jax, jax.numpy as jnp, numpy as np, kernels_pallas as kp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
A = -jnp.abs(normal(8, 4))
ops = {
    "attention": (lambda q, b: kp.attention(q, q, q, bias=b, mask=kp.Causal()),
                  (normal(4, 24, 4, 8), normal(1, 4, 24, 24))),
    "window": (lambda q, b: kp.window_attention(q, q, q, bias=b),
               (normal(8, 9, 4, 8), normal(4, 9, 9))),
    "neighborhood": (lambda q, b: kp.neighborhood_attention(q, q, q, kernel_size=3, bias=b),
                     (normal(4, 6, 6, 4, 8), normal(4, 5, 5))),
    "gla": (lambda q, g: kp.gated_linear_attention(q, q, q, -abs(g), chunk=16)[0],
            (normal(4, 24, 4, 8), normal(4, 24, 4, 1))),
    "delta": (lambda q, b: kp.delta_rule(q, q / 8, q, jax.nn.sigmoid(b), chunk=16)[0],
              (normal(4, 24, 4, 8), normal(4, 24, 4))),
    "scan": (lambda x, B: kp.selective_scan(x, abs(x), A, B, B)[0],
             (normal(4, 24, 8), normal(4, 24, 4))),
}

def check(got, want, name):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5 * float(abs(b).max()), err_msg=name)

explicit, auto = (jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
                  for kind in (AxisType.Explicit, AxisType.Auto))
for name in sys.argv[1:]:
    f, (x, b) = ops[name]
    step = jax.jit(jax.value_and_grad(lambda x, b: (f(x, b) ** 2).sum(), (0, 1)))
    want = step(x, b)
    heads = P("data", *(None,) * (x.ndim - 3), "tensor")
    own = P("data") if b.shape[0] == len(x) and name in ("gla", "delta", "scan") else P()
    for mesh in (explicit, auto):
        for spec in (P("data"), heads):
            placed = jax.device_put(x, NamedSharding(mesh, spec)), jax.device_put(
                b, NamedSharding(mesh, own if spec != P() else P()))
            if mesh is auto:
                check(step(*placed), want, f"{name} {spec} without a mesh in context")
            with jax.set_mesh(mesh):
                check(step(*placed), want, f"{name} {spec} {mesh.axis_types[0]}")
    inside = jax.shard_map(jax.grad(lambda x, b: (f(x, b) ** 2).sum(), (0, 1)), mesh=auto,
                           in_specs=(P("data"), own), out_specs=(P("data"), own))
    check(jax.jit(inside)(x, b), want[1], f"{name} in shard_map")
print("equal")
"""


@pytest.mark.parametrize(
    "names",
    ["attention", pytest.param("window neighborhood gla delta scan", marks=pytest.mark.variants)],
)
def test_values_and_gradients_are_equal_on_any_mesh(names):
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", MESHES, *names.split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith("equal"), run.stderr[-2000:]


# --- decoding -----------------------------------------------------------------------------------
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_read_keys_once_for_a_group(queries):
    q, k = normal(2, queries, 8, 16), normal(2, 300, 2, 16)
    options = dict(lengths=jnp.asarray([300, 140]), mask=Causal(300 - queries))
    options["bias"] = normal(1, 8, queries, 300)
    got, want = (
        kp.attention(q, k, k, implementation=name, **options) for name in ("pallas_tpu", "xla")
    )
    assert_near(got, want, 2e-6)
    heads_first = (t.transpose(0, 2, 1, 3) for t in (q, k, k))
    call = tpu._Call(Problem(), Operands(*heads_first), 128)
    assert (call.heads, call.group, call.q.length) == (2, 1, 4 * queries)
