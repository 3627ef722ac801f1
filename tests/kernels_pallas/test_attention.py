from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    SCORES,
    assert_equals_oracle,
    assert_near,
    cotangents,
    floats,
    operands,
    oracle,
)

import kernels_pallas
from kernels_pallas import Causal, Chunked, Neighborhood, Sigmoid, SlidingWindow
from kernels_pallas.attention import reference, xla
from kernels_pallas.attention.choice import plain
from kernels_pallas.attention.core import attend
from kernels_pallas.lazy import Choice
from kernels_pallas.scores import MASKED


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes the XLA body loop, at sizes where it would not."""
    monkeypatch.setattr(xla, "MIN_SCORES", 0)
    return lambda keys, rows, scores=8: 4 * scores * keys * rows


def blocked(block_bytes):
    """The XLA body with blocks of that size."""
    return SimpleNamespace(
        forward=partial(with_last, xla.forward, block_bytes),
        backward=partial(with_last, xla.backward, block_bytes),
    )


def with_last(function, last, *arrays):
    return function(*arrays, last)


@pytest.mark.parametrize("case", CASES)
def test_xla_in_one_block_equals_the_definition(case):
    assert_equals_oracle(xla, *operands(**CASES[case]))


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("case", ["plain", "sliding", "all"])
def test_every_score_equals_the_definition(score, case):
    assert_equals_oracle(xla, *operands(**{**CASES[case], "score": score}))


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_blocks_of_queries_change_nothing(score, small_blocks):
    sizes = dict(queries=150, keys=150, head_dim=4, value_dim=4)
    body = blocked(small_blocks(keys=150, rows=32))
    assert_equals_oracle(body, *operands(mask=Causal(), score=score, bias=(1, 4), **sizes))


@pytest.mark.parametrize(
    "mask", [None, SlidingWindow(20, 3), Chunked(50), Neighborhood((15, 20), 5, 2)], ids=str
)
def test_blocks_read_only_the_keys_they_see(mask, small_blocks):
    problem, x = operands(mask=mask, queries=300, keys=300, head_dim=4, value_dim=4, slopes=True,
                          dropout=0.1)  # fmt: skip
    size = small_blocks(keys=300, rows=32)
    assert_equals_oracle(blocked(size), problem, x)
    groups = xla.plan(problem, 8, 300, 300, size)[1]
    assert (max(g.width for g in groups) < 300) == (mask is not None)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("rows", [70, 32])
def test_rows_without_a_visible_key_are_zero_and_have_zero_gradients(score, rows, small_blocks):
    body = blocked(small_blocks(keys=70, rows=rows))
    problem, x = operands(score=score, bias=(1, 4), queries=70, keys=70)
    x = x._replace(bias=x.bias.at[:, :, 3:40].set(-jnp.inf).at[:, :, 50].set(-3e38))
    out, lse, grads = assert_equals_oracle(body, problem, x)
    for t in (out, grads.query, grads.bias):
        assert np.all(np.asarray(t[:, :, 3:40]) == 0) and np.all(np.isfinite(t))
    if score.normalised:
        assert np.all(np.asarray(lse[:, :, 3:40]) == np.float32(MASKED))


def test_extreme_scores_stay_finite():
    problem, x = operands()
    x = x._replace(query=x.query * 1e4, key=x.key.at[:, :, 0].set(0.0))
    d_out, d_lse = cotangents(problem, x)
    out, lse = xla.forward(problem, x)
    grads = xla.backward(problem, x, out, lse, d_out, d_lse)
    want_out, want_lse = reference.attention(problem, x)
    np.testing.assert_allclose(out, want_out, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    assert all(np.isfinite(t).all() for t in grads[:3])


def test_bfloat16_is_near_the_float32_definition():
    problem, x = operands(dtype=jnp.bfloat16, bias=(1, 4), mask=Causal(), queries=100, keys=100)
    exact = x._replace(**{k: v.astype(jnp.float32) for k, v in floats(x).items()})
    d_out, d_lse = cotangents(problem, x)
    (want_out, _), want = jax.jit(partial(oracle, problem))(exact, d_out, d_lse)
    out, lse = xla.forward(problem, x)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert_near(out, want_out, 2e-2)
    got = xla.backward(problem, x, out, lse, d_out, d_lse)
    for name, gradient in want.items():
        assert getattr(got, name).dtype == jnp.bfloat16
        assert_near(getattr(got, name), gradient, 3e-2, name)


def by_length(x):
    return (t.transpose(0, 2, 1, 3) for t in (x.query, x.key, x.value))


def test_the_public_function_has_the_gradients_of_the_definition():
    problem, x = operands(mask=Causal(), bias=(1, 4), value_dim=8)
    d_out, d_lse = cotangents(problem, x)
    (want_out, want_lse), want = jax.jit(partial(oracle, problem))(x, d_out, d_lse)

    def call(q, k, v, bias):
        return kernels_pallas.attention(q, k, v, bias=bias, mask=Causal(), return_lse=True,
                                        precision="highest")  # fmt: skip

    def both(arrays, gradients):
        results, pullback = jax.vjp(call, *arrays)
        return results, pullback(gradients)

    gradients = d_out.transpose(0, 2, 1, 3), d_lse
    (out, lse), (dq, dk, dv, d_bias) = jax.jit(both)((*by_length(x), x.bias), gradients)
    assert_near(out.transpose(0, 2, 1, 3), want_out, 3e-6)
    assert_near(lse, want_lse, 3e-6)
    for name, t in (("query", dq), ("key", dk), ("value", dv)):
        assert_near(t.transpose(0, 2, 1, 3), want[name], 5e-6, name)
    assert_near(d_bias, want["bias"], 5e-6)


def test_lengths_hide_padding_and_give_it_zeros():
    _, x = operands()
    q, k, v = by_length(x)
    out = kernels_pallas.attention(q, k, v, lengths=jnp.asarray([20, 37]))
    alone = kernels_pallas.attention(q[:1, :20], k[:1, :20], v[:1, :20])
    np.testing.assert_allclose(out[0, :20], alone[0], atol=1e-6)
    assert np.all(np.asarray(out[0, 20:]) == 0) and np.all(np.asarray(out[1]) != 0)


def test_packed_sequences_equal_separate_ones():
    _, x = operands()
    q, k, v = by_length(x)
    packed = kernels_pallas.attention(
        q, k, v, mask=Causal(), query_segments=jnp.tile(jnp.arange(37) // 20, (2, 1))
    )
    for part in (slice(0, 20), slice(20, 37)):
        alone = kernels_pallas.attention(q[:, part], k[:, part], v[:, part], mask=Causal())
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


@pytest.mark.parametrize("rows", [19, 10])
def test_second_derivatives_equal_those_of_the_definition(rows, small_blocks):
    problem, x = operands(mask=Causal(), queries=19, keys=19)
    choice = Choice(plain(small_blocks(keys=19, rows=rows)))

    def energy(call):
        return lambda q: (call(x._replace(query=q))[0] ** 2).sum()

    def penalty(call):
        return lambda q: (jax.grad(energy(call))(q) ** 2).sum()

    ours = lambda x: attend(choice, problem, x)  # noqa: E731
    definition = lambda x: reference.attention(problem, x)  # noqa: E731

    @jax.jit
    def second(q):
        products = (jax.jvp(jax.grad(energy(c)), (q,), (jnp.ones_like(q),))[1] for c in calls)
        return [jax.grad(penalty(c))(q) for c in calls], list(products)

    calls = ours, definition
    for got, want in second(x.query):
        assert_near(got, want, 1e-5)


def test_dropout_keeps_the_stated_share_and_its_expectation():
    ones = jnp.ones((4, 256, 2, 8))
    out = kernels_pallas.attention(ones, ones, ones, dropout=0.25, rng=jax.random.key(0))
    kept = np.asarray(out[..., 0]) * 0.75
    assert abs(kept.mean() - 0.75) < 2e-3
    deviation = np.sqrt(0.75 * 0.25 / 256)
    assert abs(kept.std() / deviation - 1) < 0.05
    again = kernels_pallas.attention(ones, ones, ones, dropout=0.25, rng=jax.random.key(0))
    np.testing.assert_array_equal(out, again)
    other = kernels_pallas.attention(ones, ones, ones, dropout=0.25, rng=jax.random.key(1))
    assert np.any(np.asarray(out) != np.asarray(other))


def test_vmap_scan_and_remat_agree_with_plain_calls():
    _, x = operands(value_dim=8, kv_heads=4)
    q, k, v = by_length(x)

    def layer(h):
        return kernels_pallas.attention(h, k, v, mask=Causal())

    looped = layer(layer(q))
    scanned, _ = jax.lax.scan(lambda h, _: (jax.checkpoint(layer)(h), None), q, length=2)
    np.testing.assert_allclose(scanned, looped, atol=1e-6)
    mapped = jax.vmap(layer)(jnp.stack([q, 2 * q]))
    np.testing.assert_allclose(mapped[1], layer(2 * q), atol=1e-6)
    twice = lambda f: lambda q: f(f(q)).sum()  # noqa: E731
    plain, saved = jax.grad(twice(layer))(q), jax.grad(twice(jax.checkpoint(layer)))(q)
    np.testing.assert_allclose(plain, saved, atol=1e-6)


def test_memory_of_sixteen_thousand_tokens_stays_under_a_gibibyte():
    t = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)

    def step(q, k, v, d_out):
        return jax.vjp(kernels_pallas.attention, q, k, v)[1](d_out)

    memory = jax.jit(step).lower(t, t, t, t).compile().memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert total < 2**30


BAD = {
    "2 axes": (dict(query=(5, 8)), "batch length heads head_dim"),
    "batch": (dict(query=(3, 5, 4, 8)), "agree in batch"),
    "head_dim": (dict(query=(2, 5, 4, 9)), "agree in head_dim"),
    "groups": (dict(query=(2, 5, 3, 8)), "do not divide 3 query heads"),
    "value": (dict(value=(2, 6, 2, 8)), "key and value must agree"),
    "bias": (dict(bias=jnp.zeros((3, 5, 7))), r"expected \[1 or 2, 1 or 4, 1 or 5, 1 or 7\]"),
    "slopes": (dict(slopes=jnp.zeros(2)), "one per head"),
    "no rng": (dict(dropout=0.1), "needs rng="),
    "rate": (dict(dropout=1.0), "must lie in"),
    "lse": (dict(score=Sigmoid(0.0), return_lse=True), "no log-sum-exp"),
    "lengths": (dict(lengths=jnp.zeros(3, int)), "expected one for each example|the batch"),
    "segments": (dict(query_segments=jnp.zeros((2, 7), int)), r"expected \(2, 5\)"),
    "implementation": (dict(implementation="cuda"), "'cuda' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_sentence(case):
    changes, message = BAD[case]
    shapes = dict(query=(2, 5, 4, 8), key=(2, 7, 2, 8), value=(2, 7, 2, 8))
    arrays = [jnp.zeros(changes.get(name, shape)) for name, shape in shapes.items()]
    options = {k: v for k, v in changes.items() if k not in shapes}
    with pytest.raises(ValueError, match=message) as error:
        kernels_pallas.attention(*arrays, **options)
    assert "\n" not in str(error.value)
