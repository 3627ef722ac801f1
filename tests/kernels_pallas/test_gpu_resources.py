"""The GPU bodies compiled to machine code of an H100: they fit, spill nothing, use tensor cores."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from attention_cases import cotangents, operands

from kernels_pallas import Causal, ClippedSoftmax, Sigmoid, aot
from kernels_pallas.attention import gpu

pytestmark = pytest.mark.skipif(
    not aot.can_compile_for_gpu(), reason="the package triton, which compiles for GPUs, is missing"
)
SHARED_MEMORY = 227 << 10  # of an H100, for one program


def attention(dtype=jnp.bfloat16, **case):
    """The kernels of the forward and backward pass of an attention call, by name."""
    problem, x = operands(dtype=dtype, value_dim=case["head_dim"], **case)
    problem = replace(problem, precision=None)

    def call(x, d_out, d_lse):
        out, lse = gpu.forward(problem, x)
        return out, gpu.backward(problem, x, out, lse, d_out, d_lse)

    found = aot.compile_for_gpu(call, x, *cotangents(problem, x))
    return {kernel.name.removeprefix("attention_"): kernel for kernel in found}


def assert_good(kernels):
    for kernel in kernels.values():
        assert kernel.stack == 0, kernel
        assert kernel.tensor_cores in ("wgmma", "mma"), kernel
        assert kernel.registers <= 255 and kernel.shared <= SHARED_MEMORY, kernel


CAUSAL = dict(queries=1024, keys=1024, mask=Causal())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_causal_attention_spills_nothing_and_uses_tensor_cores(head_dim):
    kernels = attention(head_dim=head_dim, bias=(1, 4), **CAUSAL)
    assert set(kernels) == {"forward", "dq", "dkv", "dbias"}
    assert_good(kernels)
    assert all(kernel.tensor_cores == "wgmma" for kernel in kernels.values())


def test_windows_of_49_tokens_spill_nothing_and_use_tensor_cores():
    kernels = attention(queries=49, keys=49, head_dim=32, heads=4, kv_heads=4, bias=(1, 4))
    assert set(kernels) == {"forward", "dq", "dkv", "dbias"}
    assert_good(kernels)


def test_spilling_is_seen(monkeypatch):
    greedy = dict(forward=(128, 128, 4), dq=(64, 32, 8), dkv=(32, 64, 8))
    monkeypatch.setitem(gpu.BLOCKS, (2, 128), greedy)
    problem, x = operands(dtype=jnp.bfloat16, head_dim=128, value_dim=128, **CAUSAL)
    problem = replace(problem, precision=None)
    (kernel,) = aot.compile_for_gpu(lambda x: gpu.forward(problem, x), x)
    assert kernel.warps == 4 and kernel.registers == 255 and kernel.stack > 0


EXTRAS = {
    "plain": {},
    "everything": dict(slopes=True, dropout=0.1, bias=(1, 4)),
    "clipped": dict(score=ClippedSoftmax(-0.1, 1.05), bias=(1, 4)),
    "sigmoid": dict(score=Sigmoid(-3.0)),
}
OTHER = {
    "hat": dict(queries=256, keys=576, head_dim=30, bias=(1, 4)),
    "video windows": dict(queries=392, keys=392, head_dim=32, bias=(1, 4)),
    "vit": dict(queries=197, keys=197, head_dim=64, heads=4, kv_heads=4),
    "head size 80": dict(queries=1000, keys=1000, head_dim=80, bias=(1, 4)),
    "decoding": dict(queries=1, keys=1500, head_dim=128),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("case", EXTRAS)
def test_causal_attention_of_any_kind_spills_nothing(case, head_dim, dtype):
    assert_good(attention(dtype, head_dim=head_dim, **CAUSAL, **EXTRAS[case]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", OTHER)
def test_the_sizes_of_other_systems_spill_nothing(case, dtype):
    assert_good(attention(dtype, **OTHER[case]))
