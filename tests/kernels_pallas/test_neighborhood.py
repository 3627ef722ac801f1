import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import Neighborhood
from kernels_pallas.neighborhood import reference

CASES = {
    "1d": dict(space=(150,), kernel=(7,)),
    "1d_dilated": dict(space=(150,), kernel=(5,), dilation=(4,)),
    "1d_causal": dict(space=(150,), kernel=(13,), dilation=(2,), causal=(True,)),
    "2d": dict(space=(19, 22), kernel=(7, 7)),
    "2d_small": dict(space=(7, 9), kernel=(7, 5)),
    "2d_dilated": dict(space=(17, 23), kernel=(3, 5), dilation=(3, 4)),
    "2d_causal": dict(space=(18, 18), kernel=(5, 3), causal=(True, False)),
    "2d_even": dict(space=(17, 18), kernel=(4, 2), bias=False),
    "2d_13": dict(space=(20, 16), kernel=(13, 13)),
    "3d": dict(space=(5, 9, 7), kernel=(3, 5, 3), dilation=(1, 1, 2)),
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def arrays(space, kernel, bias=True, heads=2, head_dim=8, value_dim=6, batch=2, **_):
    q, k = (normal(batch, *space, heads, head_dim, seed=i) for i in (0, 1))
    v = normal(batch, *space, heads, value_dim, seed=2)
    table = normal(heads, *(2 * n - 1 for n in kernel), seed=3) if bias else None
    return q, k, v, table


def near(got, want, tolerance=2e-6):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_neighbourhoods_equal_the_definition_forward_and_backward(case):
    options = CASES[case]
    kernel, rank = options["kernel"], len(options["space"])
    dilation = options.get("dilation", (1,) * rank)
    causal = options.get("causal", (False,) * rank)

    def ours(q, k, v, bias):
        return kernels_pallas.neighborhood_attention(
            q, k, v, kernel_size=kernel, dilation=dilation, bias=bias, causal=causal,
            precision="highest",
        )  # fmt: skip

    def definition(q, k, v, bias):
        return reference.neighborhood_attention(
            q, k, v, bias, kernel=kernel, dilation=dilation, causal=causal, scale=8**-0.5
        )

    given = arrays(**options)
    got, pull = jax.vjp(jax.jit(ours), *given)
    want, pull_want = jax.vjp(jax.jit(definition), *given)
    near(got, want)
    d_out = normal(*want.shape, seed=4)
    both = zip(*(jax.tree.leaves(p(d_out)) for p in (pull, pull_want)), strict=True)
    for a, b in both:
        near(a, b, 4e-6)


@pytest.mark.parametrize("dilation, causal", [(1, False), (2, False), (1, True)])
def test_neighbourhoods_equal_attention_with_that_mask(dilation, causal):
    space = (18, 17)
    q, k, v, _ = arrays(space, (5, 5))
    got = kernels_pallas.neighborhood_attention(
        q, k, v, kernel_size=5, dilation=dilation, causal=causal
    )
    want = kernels_pallas.attention(
        *(t.reshape(2, -1, *t.shape[-2:]) for t in (q, k, v)),
        mask=Neighborhood(space, 5, dilation, causal),
    )
    near(got.reshape(want.shape), want)


def test_a_window_as_wide_as_the_grid_is_plain_attention():
    q, k, v, _ = arrays((16, 20), (7, 7))
    got = kernels_pallas.neighborhood_attention(q, k, v, kernel_size=(16, 20))
    want = kernels_pallas.attention(*(t.reshape(2, -1, *t.shape[-2:]) for t in (q, k, v)))
    near(got.reshape(want.shape), want)


def test_extreme_scores_stay_finite_and_bfloat16_is_near():
    q, k, v, bias = arrays((17, 18), (7, 7))
    out = kernels_pallas.neighborhood_attention(1e4 * q, 1e4 * k, v, kernel_size=7, bias=bias)
    assert np.isfinite(np.asarray(out)).all() and np.abs(out).max() <= np.abs(v).max()
    low = [t.astype(jnp.bfloat16) for t in (q, k, v)]
    got = kernels_pallas.neighborhood_attention(*low, kernel_size=7, bias=bias)
    assert got.dtype == jnp.bfloat16
    want = kernels_pallas.neighborhood_attention(
        *(t.astype(jnp.float32) for t in low), kernel_size=7, bias=bias
    )
    near(got.astype(jnp.float32), want, 2e-2)


def test_memory_does_not_hold_all_scores():
    shape = jax.ShapeDtypeStruct((1, 96, 96, 2, 32), jnp.float32)

    def loss(q, k, v):
        return kernels_pallas.neighborhood_attention(q, k, v, kernel_size=7).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    dense = 2 * (96 * 96) ** 2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 5


BAD = {
    "too large": (dict(kernel_size=7, dilation=3), "larger than an axis"),
    "kernel": (dict(kernel_size=(3, 3, 3)), "does not fit 2 axes"),
    "zero": (dict(kernel_size=3, dilation=0), "does not fit 2 axes"),
    "bias": (dict(kernel_size=5), "bias has shape"),
    "implementation": (dict(kernel_size=7, implementation="gpu"), "is unknown"),
    "pallas": (dict(kernel_size=(1, 7), implementation="pallas_gpu"), "bias has shape"),
    "key": (dict(kernel_size=7, key=jnp.zeros((2, 17, 17, 2, 8))), "must be alike"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_sentence(case):
    changes, message = BAD[case]
    q, k, v, bias = arrays((17, 18), (7, 7))
    arguments = dict(query=q, key=k, value=v, bias=bias) | changes
    with pytest.raises(ValueError, match=message):
        kernels_pallas.neighborhood_attention(**arguments)
