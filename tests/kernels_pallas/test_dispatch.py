import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import aot, chips
from kernels_pallas.spread import fitting


def shapes(length, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((2, length, 4, 64), dtype)] * 3


def lines(*arrays, function=kernels_pallas.attention, **options):
    text = kernels_pallas.explain(function, *arrays, **options)
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_long_sequences_go_to_pallas_and_short_ones_to_xla():
    assert lines(*shapes(4096))["tpu"] == "pallas_tpu"
    assert lines(*shapes(4096))["cpu"] == "xla"
    assert "fewer than 1024 keys" in lines(*shapes(197))["tpu"]


def test_explain_names_the_type_that_a_kernel_does_not_take():
    told = lines(*shapes(4096, jnp.float16))
    assert told["cuda"].startswith("cudnn")
    assert "query is float16" in told["tpu"]
    assert "will remove Pallas-Triton" in lines(*shapes(4096, jnp.float32))["cuda"]


def test_explain_follows_the_argument():
    assert "asked for" in lines(*shapes(4096), implementation="xla")["tpu"]
    assert "asked for" in lines(*shapes(100), implementation="pallas_tpu")["tpu"]


def test_explain_says_why_trees_have_no_kernel():
    x, dt, A = jnp.zeros((1, 3, 2, 4)), jnp.ones((1, 3, 2)), -jnp.ones(2)
    B, parents, state = jnp.zeros((1, 3, 1, 8)), jnp.asarray([-1, 0, 0]), jnp.zeros((1, 2, 8, 4))
    told = lines(x, dt, A, B, B, parents, function=kernels_pallas.tree_ssd, initial_state=state)
    assert told["cpu"] == "xla" and "no kernel" in told["tpu"] and "no kernel" in told["cuda"]


def test_recurrences_say_that_they_have_no_kernel():
    q = jnp.zeros((1, 16, 2, 8))
    for more in ({}, {"cu_seqlens": jnp.asarray([0, 4, 16])}):
        with pytest.raises(ValueError, match="'pallas_tpu': no kernel"):
            call = kernels_pallas.gated_linear_attention
            call(q, q, q, None, implementation="pallas_tpu", **more)


@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
def test_a_kernel_may_take_three_quarters_of_a_chips_vector_memory():
    for chip, mib in {"v4": 12, "v5e": 96, "v5p": 48, "v7x": 48}.items():
        with jax.set_mesh(aot.tpu_mesh(chip)):
            assert chips.vmem_bytes() == mib << 20
    assert chips.vmem_bytes() == 96 << 20  # a process without a TPU


def test_a_kernel_that_cannot_run_the_call_says_so():
    arrays = [jnp.zeros((1, 16, 2, 8), jnp.float16)] * 3
    with pytest.raises(ValueError, match="'pallas_tpu': query is float16"):
        kernels_pallas.attention(*arrays, implementation="pallas_tpu")


def test_mesh_axes_are_used_as_far_as_they_divide():
    axes = {"data": 4, "fsdp": 2, "tensor": 2}
    assert fitting(axes, ("data", "fsdp"), lambda n: 8 % n == 0) == (("data", "fsdp"), 8)
    assert fitting(axes, ("data", "fsdp"), lambda n: 12 % n == 0) == (("data",), 4)
    assert fitting(axes, ("data", "fsdp"), lambda n: 3 % n == 0) == ((), 1)


def test_importing_the_package_does_not_import_pallas():
    code = "import sys, kernels_pallas; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import kernels_pallas

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
q, k, v, bias = normal(4, 33, 4, 8), normal(4, 33, 2, 8), normal(4, 33, 2, 8), normal(1, 4, 33, 33)
qkv, window_bias, mask = normal(16, 9, 96), normal(4, 9, 9), normal(4, 9, 9)
key = jax.random.key(0)

def attention(q, k, v, bias):
    out = kernels_pallas.attention(q, k, v, bias=bias, mask=kernels_pallas.Causal(), dropout=0.2,
                                   rng=key, lengths=jnp.asarray([33, 20, 5, 33]))
    return (out ** 2).sum(), out

def windows(qkv, bias):
    out = kernels_pallas.window_attention(qkv, num_heads=4, bias=bias, mask=mask)
    return (out ** 2).sum(), out

for loss, arrays in ((attention, (q, k, v, bias)), (windows, (qkv, window_bias))):
    step = jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)
    want = jax.jit(step)(*arrays)
    for shape in ((4, 1, 2), (2, 1, 4), (1, 8, 1)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            split = NamedSharding(mesh, P("data"))
            placed = [jax.device_put(t, split) if t.shape[0] % shape[0] == 0 and t.ndim > 2 and
                      t.shape[0] > 1 and t is not window_bias else t for t in arrays]
            got = jax.jit(step)(*placed)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
print("equal")
"""


@pytest.mark.variants  # test_anywhere has the same on fewer devices
def test_results_do_not_depend_on_the_mesh():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip().endswith("equal"), run.stderr[-2000:]
