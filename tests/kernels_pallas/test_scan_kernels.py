"""The TPU and GPU bodies of the selective scan: numbers in interpreters, compiles, choices."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from test_recurrence import near, normal

import kernels_pallas
from kernels_pallas import aot, compat
from kernels_pallas.recurrence import scan_tpu
from kernels_pallas.recurrence.problem import Problem
from kernels_pallas.recurrence.problem import ScanOperands as Operands
from kernels_pallas.recurrence.scan import XLA

needs_libtpu = pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
needs_triton = pytest.mark.skipif(
    not aot.can_compile_for_gpu(), reason="the package triton, which compiles for GPUs, is missing"
)


def arrays(batch=2, length=40, channels=40, components=5, dtype=jnp.float32):
    """x, dt, A, B, C, D and the first state; nothing fills a block."""
    x = normal(batch, length, channels, dtype=dtype)
    dt = jax.nn.softplus(normal(batch, length, channels, seed=1)).astype(dtype)
    A = -jnp.exp(normal(channels, components, seed=2))
    B, C = (normal(batch, length, components, seed=i, dtype=dtype) for i in (3, 4))
    return x, dt, A, B, C, normal(channels, seed=5), normal(batch, channels, components, seed=6)


def scan(x, dt, A, B, C, D=None, s=None, **options):
    return kernels_pallas.selective_scan(x, dt, A, B, C, D=D, initial_state=s, **options)


def values_and_gradients(implementation, arrays):
    call = partial(scan, chunk=16, implementation=implementation)
    out, pull = jax.vjp(jax.jit(call), *arrays)
    cotangents = tuple(normal(*t.shape, seed=5).astype(t.dtype) for t in out)
    return *out, *pull(cotangents)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_equal_xla_forward_and_backward(implementation):
    got, want = (values_and_gradients(i, arrays()) for i in (implementation, "xla"))
    assert len(got) == 9
    for a, b in zip(got, want, strict=True):
        near(a, b, 4e-6)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_take_bfloat16(implementation):
    low = arrays(length=20, dtype=jnp.bfloat16)
    y, state = scan(*low, implementation=implementation)
    want, want_state = scan(*(t.astype(jnp.float32) for t in low), implementation="xla")
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    near(y.astype(jnp.float32), want, 1e-2)
    near(state, want_state)


def test_the_strict_interpreter_finds_no_race_and_no_stray_access():
    x, dt, A, B, C, D, s = arrays(batch=1, length=32, channels=20)
    x = Operands(x, dt, A, B, C, D, s)
    problem, strict = Problem(chunk=16), compat.strict_interpreter()
    *got, states = scan_tpu.forward(problem, x, keep=True, interpret=strict)
    assert not compat.races_found()
    want, (want_states,) = XLA.forward(problem, x, True)
    cotangents = [jnp.ones_like(t) for t in want]
    got += scan_tpu.backward(problem, x, states, *cotangents, interpret=strict)
    assert not compat.races_found()
    want += XLA.backward(problem, x, want, (want_states,), cotangents)
    for a, b in zip(got, want, strict=True):
        near(a, b, 4e-6)


def of_size(batch=2, length=512, channels=768, components=16):
    """Mamba-130m's inner width, as shapes."""
    low, full = (lambda *s, t=t: jax.ShapeDtypeStruct(s, t) for t in (jnp.bfloat16, jnp.float32))
    wide, narrow = low(batch, length, channels), low(batch, length, components)
    return wide, wide, full(channels, components), narrow, narrow, full(channels)


def step(implementation, *arrays):
    def loss(*arrays):
        y, state = scan(*arrays, implementation=implementation)
        return y.astype(jnp.float32).sum() + state.sum()

    return jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))(*arrays)


@needs_libtpu
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_forward_and_backward_compile_for_tpu(chip):
    function = partial(step, "pallas_tpu")
    text = aot.compile_for_tpu(function, *of_size(), mesh=aot.tpu_mesh(chip)).as_text()
    assert "selective_scan_forward" in text and "selective_scan_backward" in text


@needs_libtpu
def test_channels_stay_on_their_chips():
    mesh = aot.tpu_mesh("v5e", (2, 2), ("data", "tensor"))
    steps = P("data", None, "tensor")
    specs = (steps, steps, P("tensor"), P("data"), P("data"), P("tensor"))
    function = partial(step, "pallas_tpu")
    text = aot.compile_for_tpu(function, *of_size(4), mesh=mesh, specs=specs).as_text()
    assert "selective_scan_backward" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_forward_and_backward_lower_to_triton_for_an_h100():
    text = aot.lower_for_cuda(partial(step, "pallas_gpu"), *of_size()).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


@needs_triton
def test_machine_code_for_an_h100_spills_nothing():
    kernels = aot.compile_for_gpu(partial(step, "pallas_gpu"), *of_size())
    assert [k.name for k in kernels] == ["selective_scan_forward", "selective_scan_backward"]
    assert all(k.stack == 0 and k.registers < 255 for k in kernels), kernels


def test_a_caller_can_ask_why():
    told = kernels_pallas.explain(scan, *of_size())
    assert "tpu: xla, because the table" in told and "cuda: xla, because the table" in told
    told = kernels_pallas.explain(scan, *of_size(), implementation="pallas_gpu")
    assert told.startswith("cuda: pallas_gpu (asked for)")
    with pytest.raises(ValueError, match="x is float16"):
        scan(*arrays(dtype=jnp.float16), implementation="pallas_gpu")


def test_kernels_run_under_vmap_remat_and_scan():
    x, dt, A, B, C, D, s = arrays(length=16, channels=6)

    def loss(x, implementation):
        @jax.checkpoint
        def one(state, dt):
            y, state = scan(x, dt, A, B, C, D, state, implementation=implementation)
            return state, y.sum()

        state, sums = jax.lax.scan(one, s, jnp.stack([dt, 2 * dt]))
        return state.sum() + sums.sum()

    several = jnp.stack([x, -x])
    want, *got = (
        jax.jit(jax.vmap(jax.grad(partial(loss, implementation=i))))(several)
        for i in ("xla", "pallas_tpu", "pallas_gpu")
    )
    for t in got:
        near(t, want)
