from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import pairs

import kernels_pallas
from kernels_pallas import aot, compat
from kernels_pallas.window import reference, tpu_lanes


def arrays(windows=12, queries=9, keys=9, heads=3, head_dim=8, masks=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = (normal(windows, n, heads, head_dim) for n in (queries, keys, keys))
    mask = jnp.where(normal(masks, queries, keys) > 0.5, -100.0, 0.0) if masks else None
    return q, k, v, normal(heads, queries, keys), mask


def near(got, want, tolerance=3e-6):
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()), rtol=0)


@pytest.mark.parametrize("shape", [dict(), dict(masks=None), dict(keys=25), dict(masks=1)], ids=str)
def test_windows_equal_the_definition_forward_and_backward(shape):
    q, k, v, bias, mask = arrays(**shape)

    def ours(q, k, v, bias):
        return kernels_pallas.window_attention(q, k, v, bias=bias, mask=mask, precision="highest")

    def definition(q, k, v, bias):
        return reference.window_attention(q, k, v, bias, mask, scale=8**-0.5)

    got, pullback = jax.vjp(ours, q, k, v, bias)
    want, want_pullback = jax.vjp(definition, q, k, v, bias)
    near(got, want)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=want.shape), jnp.float32)
    for a, b in zip(pullback(d_out), want_pullback(d_out), strict=True):
        near(a, b, 6e-6)


FUSED = {
    "pairs": dict(),
    "no mask": dict(masks=None),
    "one mask": dict(masks=1),
    "odd": dict(windows=9, masks=3),
    "wide": dict(windows=4, queries=70, keys=70, masks=2),
    "windows": dict(windows=256, heads=2, head_dim=16, masks=4),
    "windows, ragged": dict(windows=200, heads=1, head_dim=16, masks=None),
    "channels": dict(windows=256, queries=6, keys=6, heads=4, head_dim=64, masks=4),
}


@pytest.mark.parametrize("shape", FUSED)
def test_the_layout_that_pads_least_decides_between_the_tpu_bodies(shape):
    q, _, _, _, mask = arrays(**FUSED[shape])
    windows, tokens, heads, head_dim = q.shape
    fused = jax.ShapeDtypeStruct((windows, tokens, 3 * heads * head_dim), jnp.bfloat16)
    lanes = shape.startswith(("windows", "channels"))
    assert tpu_lanes.layout(fused, mask, heads) == (shape.split(",")[0] if lanes else None)


def fused_case(shape):
    """`(qkv, bias, mask, d_out)`."""
    q, k, v, bias, mask = arrays(**shape)
    q, k, v = (t.reshape(*t.shape[:2], -1) for t in (q, k, v))
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    return jnp.concatenate([q, k, v], axis=-1), bias, mask, d_out


@partial(jax.jit, static_argnums=4)
def both_passes(qkv, bias, mask, d_out, implementation):
    def call(qkv, bias):
        return kernels_pallas.window_attention(
            qkv, num_heads=len(bias), bias=bias, mask=mask, precision="highest",
            implementation=implementation,
        )  # fmt: skip

    out, pullback = jax.vjp(call, qkv, bias)
    return out, *pullback(d_out)


FUSED_BY_DEFAULT = [
    pytest.param(n, marks=() if n in ("pairs", "wide", "windows, ragged", "channels") else
                 pytest.mark.slow) for n in FUSED
]  # fmt: skip


@pytest.mark.parametrize("shape", FUSED_BY_DEFAULT)
def test_the_tpu_kernel_equals_the_definition_on_fused_arrays(shape):
    case = fused_case(FUSED[shape])
    got, want = (both_passes(*case, name) for name in ("pallas_tpu", "xla"))
    for a, b in zip(got, want, strict=True):
        near(a, b, 6e-6)


STRICT = {
    "windows": dict(windows=129, heads=1, head_dim=16, masks=None),
    "channels": dict(windows=256, queries=2, keys=2, heads=2, head_dim=64, masks=2),
}


@pytest.mark.parametrize("order", ["windows", pytest.param("channels", marks=pytest.mark.slow)])
def test_the_strict_interpreter_finds_no_race_and_no_stray_access_in_lanes(order):
    """Two blocks of windows: one ragged, with blocks of queries; or two heads, and copies out."""
    qkv, bias, mask, d_out = fused_case(STRICT[order])
    heads = len(bias)
    assert tpu_lanes.layout(qkv, mask, heads) == order
    scale = STRICT[order]["head_dim"] ** -0.5
    options = dict(heads=heads, scale=scale, interpret=compat.strict_interpreter())
    out = tpu_lanes.forward(qkv, bias, mask, **options)
    got = out, *tpu_lanes.backward(qkv, bias, mask, d_out, **options)
    assert not compat.races_found()
    for a, b in zip(got, both_passes(qkv, bias, mask, d_out, "xla"), strict=True):
        near(a, b, 6e-6)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_overlapping_windows_run_in_the_kernels(implementation):
    q, k, v, bias, mask = arrays(windows=4, keys=25)

    def loss(implementation, *arrays):
        *qkv, bias = arrays
        out = kernels_pallas.window_attention(
            *qkv, bias=bias, mask=mask, precision="highest", implementation=implementation
        )
        return (out**2).sum()

    grad = jax.jit(jax.grad(loss, (1, 2, 3, 4)), static_argnums=0)
    got, want = (grad(name, q, k, v, bias) for name in (implementation, "xla"))
    for a, b in zip(got, want, strict=True):
        near(a, b, 6e-6)


@pytest.mark.parametrize(
    "implementation, windows",
    [("xla", 4), ("pallas_tpu", 4), ("pallas_tpu", 128), ("pallas_gpu", 4)],
)
def test_fused_windows_without_a_visible_key_have_zero_gradients(implementation, windows):
    fused = jnp.asarray(np.random.default_rng(0).normal(size=(windows, 9, 96)), jnp.float32)
    visible = jnp.ones((2, 9, 9), bool).at[1].set(False)

    def call(qkv):
        return kernels_pallas.window_attention(
            qkv, num_heads=2, mask=visible, implementation=implementation
        )

    def both(qkv):
        out, pullback = jax.vjp(call, qkv)
        return out, *pullback(jnp.ones_like(out))

    for t in jax.jit(both)(fused):
        assert np.all(np.asarray(t[1::2]) == 0) and np.isfinite(t).all()
        assert np.any(np.asarray(t[0]) != 0)


def test_a_fused_array_gives_the_same_as_three():
    q, k, v, bias, mask = arrays()
    fused = jnp.concatenate([t.reshape(12, 9, 24) for t in (q, k, v)], axis=-1)
    got = kernels_pallas.window_attention(fused, num_heads=3, bias=bias, mask=mask)
    want = kernels_pallas.window_attention(q, k, v, bias=bias, mask=mask)
    np.testing.assert_array_equal(got, want.reshape(12, 9, 24))


def test_boolean_masks_equal_large_negative_ones():
    q, k, v, bias, mask = arrays()
    visible = mask == 0
    got = kernels_pallas.window_attention(q, k, v, bias=bias, mask=visible)
    want = kernels_pallas.window_attention(q, k, v, bias=bias, mask=jnp.where(visible, 0, -1e4))
    near(got, want)
    alone = kernels_pallas.window_attention(q, k, v, mask=visible)
    near(alone, reference.window_attention(q, k, v, None, visible, scale=8**-0.5))


def test_windows_without_a_visible_key_are_zero_with_zero_gradients():
    q, k, v, bias, _ = arrays()
    visible = jnp.ones((4, 9, 9), bool).at[1].set(False)

    def call(q, bias):
        return kernels_pallas.window_attention(q, k, v, bias=bias, mask=visible)

    out, pullback = jax.vjp(call, q, bias)
    d_q, d_bias = pullback(jnp.ones_like(out))
    assert np.all(np.asarray(out[1::4]) == 0) and np.all(np.asarray(d_q[1::4]) == 0)
    assert np.isfinite(d_bias).all() and np.all(np.asarray(out[0]) != 0)


def test_masks_belong_to_windows_in_turn():
    q, k, v, _, _ = arrays()
    only_key_2 = jnp.zeros((4, 9, 9), bool).at[3, :, 2].set(True).at[:3].set(True)
    out = kernels_pallas.window_attention(q, k, v, mask=only_key_2)
    for window in (3, 7, 11):
        np.testing.assert_allclose(out[window], jnp.tile(v[window, 2], (9, 1, 1)), rtol=1e-6)


BAD = {
    "no heads": (lambda q, k, v, b, m: ((q,), {}), "needs num_heads"),
    "fused width": (lambda q, k, v, b, m: ((jnp.zeros((4, 9, 70)),), dict(num_heads=3)), "3 \\* 3"),
    "one missing": (lambda q, k, v, b, m: ((q, k), {}), "query, key and value"),
    "masks": (lambda q, k, v, b, m: ((q, k, v), dict(mask=jnp.zeros((5, 9, 9)))), "do not divide"),
    "bias": (lambda q, k, v, b, m: ((q, k, v), dict(bias=b[:2])), "expected \\(3, 9, 9\\)"),
    "heads": (lambda q, k, v, b, m: ((q, k, v), dict(num_heads=4)), "has 3 heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_sentence(case):
    make, message = BAD[case]
    positional, options = make(*arrays())
    with pytest.raises(ValueError, match=message):
        kernels_pallas.window_attention(*positional, **options)


SIZES = {
    "swin": (3, 256, 49, 64),
    "base": (4, 256, 49, 4),
    "swin_384": (4, 128, 144, 64),
    "deep": (16, 64, 49, None),
}


@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
@pytest.mark.parametrize(
    "size, chip", pairs(SIZES, aot.TOPOLOGIES, {("swin", "v5e"), ("deep", "v6e"), ("swin", "v4")})
)
def test_forward_and_backward_compile_for_tpu_in_two_kernels(size, chip):
    heads, windows, tokens, masks = SIZES[size]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def call(d_out, qkv, bias, mask=None):
        def function(qkv, bias):
            return kernels_pallas.window_attention(
                qkv, num_heads=heads, bias=bias, mask=mask, implementation="pallas_tpu"
            )

        out, pullback = jax.vjp(function, qkv, bias)
        return out, pullback(d_out)

    arrays = [
        shape(windows, tokens, heads * 32, dtype=jnp.bfloat16),
        shape(windows, tokens, 3 * heads * 32, dtype=jnp.bfloat16),
        shape(heads, tokens, tokens),
    ]
    arrays += [shape(masks, tokens, tokens)] if masks else []
    compiled = aot.compile_for_tpu(call, *arrays, mesh=aot.tpu_mesh(chip))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    if chip in aot.CHIPS and tpu_lanes.layout(
        arrays[1], arrays[3] if masks else None, heads
    ):  # nothing is copied around
        assert compiled.memory_analysis().temp_size_in_bytes < 1e5


@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_the_overlapping_windows_of_hat_compile_for_tpu(chip):
    windows, heads, width = 4, 6, 30

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def call(d_out, *arrays):
        def function(q, k, v, bias):
            return kernels_pallas.window_attention(q, k, v, bias=bias, implementation="pallas_tpu")

        out, pullback = jax.vjp(function, *arrays)
        return out, pullback(d_out)

    queries, keys = (shape(windows, n, heads, width) for n in (256, 576))
    bias = shape(heads, 256, 576, dtype=jnp.float32)
    arrays = (queries, queries, keys, keys, bias)
    compiled = aot.compile_for_tpu(call, *arrays, mesh=aot.tpu_mesh(chip))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
