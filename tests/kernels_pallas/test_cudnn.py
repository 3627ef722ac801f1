"""Attention by cuDNN. No device is here: another body stands in for cuDNN's call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import attention, compat, explain
from kernels_pallas.attention import cudnn
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.masks import Causal, SlidingWindow
from kernels_pallas.scores import Softmax


def arrays(queries=12, keys=12, heads=4, kv_heads=2, width=8, dtype=jnp.bfloat16):
    keys_ = jax.random.split(jax.random.key(0), 4)
    shapes = [
        (2, queries, heads, width),
        *[(2, keys, kv_heads, width)] * 2,
        (2, queries, heads, width),
    ]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys_, shapes, strict=True)]


@pytest.fixture
def stand_in(monkeypatch):
    """cuDNN's call by the definition, counted."""
    calls = []

    def flash(query, key, value, scale, causal):
        calls.append(causal)
        out, lse = jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=causal, implementation="xla",
            return_residual=True,
        )  # fmt: skip
        return out, lse.transpose(0, 2, 1)

    monkeypatch.setattr(compat, "has_cudnn", lambda: True)
    monkeypatch.setattr(compat, "cudnn_attention", flash)
    return calls


def by_cudnn(mask, query, key, value, d_out):
    """Output and gradients as the body for CUDA computes them."""
    heads_first = [t.transpose(0, 2, 1, 3) for t in (query, key, value, d_out)]
    problem, x = Problem(mask=mask, scale=query.shape[-1] ** -0.5), Operands(*heads_first[:3])
    out, lse = cudnn.forward(problem, x)
    grads = cudnn.backward(problem, x, out, lse, heads_first[3], jnp.zeros_like(lse))
    return [t.transpose(0, 2, 1, 3) for t in (out, *grads[:3])]


def by_xla(mask, query, key, value, d_out):
    out, pull = jax.vjp(
        lambda *t: attention(*t, mask=mask, implementation="xla"), query, key, value
    )
    return [out, *pull(d_out)]


@pytest.mark.parametrize("mask", [None, Causal()], ids=["full", "causal"])
def test_values_and_gradients_are_those_of_the_plain_body(stand_in, mask):
    given = arrays()
    for ours, theirs in zip(by_cudnn(mask, *given), by_xla(mask, *given), strict=True):
        np.testing.assert_allclose(
            np.float32(ours), np.float32(theirs), atol=0.02 * float(jnp.abs(theirs).max())
        )
    assert stand_in and all(causal == (mask is not None) for causal in stand_in)


def test_what_a_causal_mask_hides_stays_hidden_when_it_is_not_finite(stand_in):
    query, key, value, d_out = arrays()
    value = value.at[0, -1].set(jnp.nan)
    d_out = d_out.at[1, 5].set(jnp.inf)
    for ours, theirs in zip(
        by_cudnn(Causal(), query, key, value, d_out),
        by_xla(Causal(), query, key, value, d_out), strict=True,
    ):  # fmt: skip
        assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
        assert np.isfinite(np.float32(ours)).any()


def test_a_process_without_the_device_runs_the_plain_body():
    given = arrays()
    assert not compat.has_cudnn()
    for ours, theirs in zip(by_cudnn(None, *given), by_xla(None, *given), strict=True):
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=0.02)
    out = attention(*given[:3], implementation="cudnn")
    assert np.array_equal(out, attention(*given[:3]))


def test_none_on_cuda_is_cudnn_where_it_can_run_the_call():
    def cuda(*given, **options):
        return dict(t.split(": ", 1) for t in explain(attention, *given, **options).split("\n"))[
            "cuda"
        ]

    query, key, value, _ = arrays()
    assert cuda(query, key, value).startswith("cudnn")
    assert cuda(query, key, value, mask=Causal()).startswith("cudnn")
    assert cuda(query, key, value, implementation="xla").startswith("xla")
    refused = [
        dict(mask=SlidingWindow(3)), dict(score=Softmax(cap=5.0)), dict(return_lse=True),
        dict(sinks=jnp.zeros(4)), dict(lengths=jnp.asarray([3, 12])),
        dict(mask=Causal(), query_offset=2), dict(slopes=jnp.ones(4)),
    ]  # fmt: skip
    for options in refused:
        assert cuda(query, key, value, **options).startswith("xla"), options
        with pytest.raises(ValueError, match="implementation='cudnn': "):
            attention(query, key, value, implementation="cudnn", **options)
    assert cuda(query, key[:, :5], value[:, :5], mask=Causal()).startswith("xla")
    assert cuda(*(t.astype(jnp.float32) for t in (query, key, value))).startswith("xla")
    assert cuda(*arrays(width=12)[:3]).startswith("xla")


def test_programs_for_cuda_call_cudnn_once_a_pass(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(compat, "has_cudnn", lambda: True)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    query, key, value, _ = arrays(width=64, queries=128, keys=128)
    gradient = jax.grad(
        lambda *t: attention(*t, mask=Causal()).sum().astype(jnp.float32), (0, 1, 2)
    )
    mesh = jax.make_mesh((1,), ("d",))
    alone = jax.shard_map(gradient, mesh=mesh, in_specs=P(), out_specs=P())
    traced = jax.jit(alone).trace(query, key, value)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "__cudnn$fmhaSoftmax" in text.replace("__cudnn$fmhaSoftmaxBackward", "")
