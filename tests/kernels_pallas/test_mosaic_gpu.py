"""Attention in Mosaic GPU: in the interpreter of GPU kernels, and lowered for an H100.

No device is here. The interpreter runs each warpgroup as a thread, with barriers and copies, starts
with NaN in all memory and raises on races; lowering gives the program without its machine code.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, assert_near, cotangents, operands, oracle

from kernels_pallas import (
    aot,
    attention,
    compat,
    explain,
    gated_linear_attention,
    window_attention,
)
from kernels_pallas.attention import mosaic_gpu, reference, xla
from kernels_pallas.attention.problem import Operands
from kernels_pallas.masks import Causal, SlidingWindow
from kernels_pallas.scores import Sigmoid, Softmax

needs_mosaic = pytest.mark.skipif(
    not compat.has_mosaic_gpu(), reason="this JAX does not lower Mosaic GPU kernels (0.12 does)"
)
BF16 = 2.0**-8  # of a number's size, the distance to the next


def problem_of(name, **more):
    case = CASES[name] | more
    problem, x = operands(dtype=jnp.bfloat16, **{k: v for k, v in case.items() if k != "dropout"})
    return replace(problem, precision=None), x


@pytest.fixture
def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    yield plgpu.InterpretGPUParams(detect_races=True)
    gpu_callbacks.reset_gpu_interpret_mode_state()


def both(problem, x, interpreter):
    """Results and gradients of the kernels, and by the definition in float32."""
    d_out, d_lse = cotangents(problem, x)
    out, lse = mosaic_gpu.forward(problem, x, interpret=interpreter)
    got = mosaic_gpu.backward(problem, x, out, lse, d_out, d_lse, interpret=interpreter)
    wide = jax.tree.map(lambda t: t.astype(jnp.float32) if t.dtype == jnp.bfloat16 else t, x)
    (want_out, want_lse), want = oracle(problem, wide, d_out, d_lse)
    return (out, lse, got), (want_out, want_lse, want)


def assert_right(problem, x, interpreter):
    """Compares both passes with the definition; returns output, log-sum-exp, gradients."""
    (out, lse, got), (want_out, want_lse, want) = both(problem, x, interpreter)
    assert_near(out, want_out, 2 * BF16, "out")
    assert_near(lse, want_lse, BF16, "lse")
    for name in ("query", "key", "value"):
        assert_near(getattr(got, name), want[name], 4 * BF16, name)
    return out, lse, got


SERVED = [name for name in CASES if name not in ("function", "score_function", "slopes", "all")]


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_both_passes_equal_the_definition(name, interpreter):
    assert_right(*problem_of(name), interpreter)


@needs_mosaic
def test_the_forward_pass_equals_the_definition(interpreter):
    sizes = dict(queries=70, keys=70, heads=2, kv_heads=1, mask=Causal())
    problem, x = operands(dtype=jnp.bfloat16, **sizes)
    problem, x = replace(problem, precision=None), jax.tree.map(lambda t: t[:1], x)
    want, want_lse = reference.attention(problem, jax.tree.map(jnp.float32, x))
    out, lse = mosaic_gpu.forward(problem, x, interpret=interpreter)
    assert_near(out, want, 2 * BF16, "out")
    assert_near(lse, want_lse, BF16, "lse")


@needs_mosaic
@pytest.mark.slow
def test_many_blocks_with_bias_segments_and_a_causal_mask(interpreter):
    sizes = dict(queries=150, keys=150, heads=2, kv_heads=1, mask=Causal(), bias=(1, 2))
    problem, x = operands(dtype=jnp.bfloat16, **sizes)  # 3 blocks of 64 each way, 2 heads a group
    problem, segments = (
        replace(problem, precision=None),
        jnp.asarray([[0] * 60 + [1] * 70 + [-1] * 20]),
    )
    x = Operands(
        *(t[:1] for t in x[:3]), bias=x.bias, query_segments=segments,
        key_segments=jnp.where(segments < 0, -2, segments),
    )  # fmt: skip
    out, lse, got = assert_right(problem, x, interpreter)
    assert np.all(np.asarray(lse)[0, :, 130:] == -1e30)
    for t in (out, *got[:3]):
        assert not np.asarray(t[0, :, 130:], np.float32).any()


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_wide_heads_capped_scores_and_unequal_lengths(dtype, interpreter):
    sizes = dict(queries=130, keys=200, heads=3, kv_heads=3, head_dim=72, value_dim=128)
    problem, x = operands(dtype=dtype, score=Softmax(cap=2.0), **sizes)
    assert_right(replace(problem, precision=None), x, interpreter)


@needs_mosaic
@pytest.mark.slow
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(interpreter):
    problem, x = problem_of("causal")
    x = x._replace(
        value=x.value.at[0, 0, 30, 2].set(jnp.nan), key=x.key.at[1, 1, 20, 0].set(jnp.nan)
    )
    d_out, d_lse = cotangents(problem, x)
    d_out = d_out.at[1, 0, 5, 1].set(jnp.inf)
    out, lse = mosaic_gpu.forward(problem, x, interpret=interpreter)
    got = mosaic_gpu.backward(problem, x, out, lse, d_out, d_lse, interpret=interpreter)
    want_out, want_lse = xla.forward(problem, x)
    want = xla.backward(problem, x, want_out, want_lse, d_out, d_lse)
    for name, a, b in zip(
        ("out", "lse", "query", "key", "value"),
        (out, lse, *got[:3]), (want_out, want_lse, *want[:3]), strict=True,
    ):  # fmt: skip
        a, b = (np.asarray(t, np.float32) for t in (a, b))
        rows = [np.isfinite(t).all(-1) if t.ndim == 4 else np.isfinite(t) for t in (a, b)]
        assert np.array_equal(*rows), name
        assert not rows[0].all() and rows[0].any(), name
        assert_near(a[rows[0]], b[rows[0]], 4 * BF16, name)


# --- lowered ------------------------------------------------------------------------------------
def kernels(text):
    return re.findall(r"custom_call @mosaic_gpu\w*", text)


def lowered(function, *arrays):
    return aot.lower_for_cuda(function, *arrays).as_text()


def arrays(heads=4, kv_heads=2, width=64, length=256, dtype=jnp.bfloat16):
    shapes = [(2, length, heads, width), *[(2, length, kv_heads, width)] * 2]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


OPTIONS = {
    "causal": dict(mask=Causal()),
    "plain": {},
    "scale and cap": dict(scale=0.3, score=Softmax(cap=30.0)),
    "bias": dict(bias=jnp.zeros((1, 4, 256, 256))),
    "bias of keys": dict(bias=jnp.zeros((2, 1, 1, 256), bool)),
    "bias of nothing": dict(bias=jnp.ones((1, 1, 1, 1))),
    "segments": dict(query_segments=jnp.zeros((2, 256), int), mask=SlidingWindow(100)),
    "lengths": dict(lengths=jnp.asarray([200, 256])),
    "offset": dict(mask=Causal(), query_offset=3),
}


@needs_mosaic
@pytest.mark.parametrize(
    "name", [n if n == "causal" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
def test_both_passes_lower_for_h100_with_wgmma_and_tma(name):
    def loss(*t):
        out = attention(*t, implementation="mosaic_gpu", **OPTIONS[name])
        return out.astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, (0, 1, 2)), *arrays())
    assert len(kernels(text)) == 3
    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"):
        assert instruction in text


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("length, width", [(1, 64), (197, 80), (4096, 128)])
def test_other_sizes_fit_into_an_h100(length, width):
    def loss(*t):
        out = attention(*t, mask=Causal(), implementation="mosaic_gpu")
        return out.astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, (0, 1, 2)), *arrays(width=width, length=length))
    assert len(kernels(text)) == 3


@needs_mosaic
def test_windows_are_served_by_the_same_kernels():
    qkv = jax.ShapeDtypeStruct((8, 49, 3 * 4 * 32), jnp.bfloat16)
    bias = jnp.zeros((4, 49, 49))
    text = lowered(
        lambda qkv: window_attention(qkv, num_heads=4, bias=bias, implementation="mosaic_gpu"), qkv
    )
    assert len(kernels(text)) == 1


@needs_mosaic
def test_the_gradient_of_a_bias_comes_from_the_plain_form():
    def loss(bias, *t):
        out = attention(*t, bias=bias, implementation="mosaic_gpu")
        return out.astype(jnp.float32).sum()

    bias = jax.ShapeDtypeStruct((1, 4, 256, 256), jnp.float32)
    text = lowered(jax.grad(loss), bias, *arrays())
    assert "dot_general" in text and len(kernels(text)) == 3


# --- chosen and refused ---------------------------------------------------------------------------
def test_nothing_of_it_runs_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(compat, "has_mosaic_gpu", lambda: True)
    for dtype in (jnp.bfloat16, jnp.float32):
        for options in ({}, dict(mask=Causal()), dict(lengths=jnp.asarray([3, 256]))):
            assert "mosaic" not in explain(attention, *arrays(dtype=dtype), **options)
    told = explain(attention, *arrays(), implementation="mosaic_gpu").splitlines()
    assert "cpu: xla" in told and "cuda: mosaic_gpu (asked for)" in told


def test_other_platforms_run_the_plain_form(monkeypatch):
    monkeypatch.setattr(compat, "has_mosaic_gpu", lambda: True)
    keys = jax.random.split(jax.random.key(0), 3)
    given = [
        jax.random.normal(k, t.shape, t.dtype)
        for k, t in zip(keys, arrays(length=9, width=8), strict=True)
    ]
    asked = attention(*given, implementation="mosaic_gpu")
    assert np.array_equal(asked, attention(*given, implementation="xla"))


def test_what_it_cannot_run_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(compat, "has_mosaic_gpu", lambda: True)
    refused = {
        "query is float32": (arrays(dtype=jnp.float32), {}),
        "holds up to 128": (arrays(width=136), {}),
        "plain and capped softmax": (arrays(), dict(score=Sigmoid(-3.0))),
        "no modifier": (arrays(), dict(score=Softmax(modify=lambda s, q, k: s + q))),
        "slopes or dropout": (arrays(), dict(slopes=jnp.ones(4))),
        "dropout": (arrays(), dict(dropout=0.1, rng=jax.random.key(0))),
        "mask is a function": (arrays(), dict(mask=lambda q, k: q >= k)),
        "query_offset is traced": (arrays(), dict(query_offset=jnp.asarray(3))),
        "bias is float16": (arrays(), dict(bias=jnp.zeros((1, 1, 256, 256), jnp.float16))),
    }
    for sentence, (given, options) in refused.items():
        with pytest.raises(ValueError, match=f"implementation='mosaic_gpu': .*{sentence}"):
            explain(attention, *given, implementation="mosaic_gpu", **options)
    q = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match="'mosaic_gpu': only attention"):
        gated_linear_attention(q, q, q, None, implementation="mosaic_gpu")


def test_an_older_jax_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(compat, "has_mosaic_gpu", lambda: False)
    with pytest.raises(ValueError, match=r"'mosaic_gpu': JAX .* needs JAX 0.12 or newer"):
        explain(attention, *arrays(), implementation="mosaic_gpu")


def test_a_device_of_another_generation_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(compat, "cuda_capability", lambda: 8.0)
    with pytest.raises(NotImplementedError, match=r"capability 8.0; wgmma"):
        mosaic_gpu.forward(*problem_of("plain"))
