"""The GPU body of the chunked recurrences: numbers in the interpreter, lowering, machine code."""

import jax
import jax.numpy as jnp
import pytest
from test_recurrence import near, normal
from test_recurrence_tpu import CASES, gla, of_size

import kernels_pallas
from kernels_pallas import aot
from kernels_pallas.recurrence import gpu

needs_triton = pytest.mark.skipif(
    not aot.can_compile_for_gpu(), reason="the package triton, which compiles for GPUs, is missing"
)


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_body_equals_xla_forward_and_backward(case):
    function, make = CASES[case]
    equal_to_xla(function, make())


def test_key_channels_with_their_own_gates_run_in_blocks():
    key = gpu.KEYS + 8
    arrays = [normal(1, 32, 2, d, seed=i) for i, d in enumerate((key, key, 16))]
    arrays.append(-jnp.abs(normal(1, 32, 2, key, seed=4)))
    equal_to_xla(gla, (*arrays, normal(1, 2, key, 16, seed=6)))


def equal_to_xla(function, arrays):
    def run(implementation):
        def call(*arrays):
            return function(*arrays, chunk=32, precision="highest", implementation=implementation)

        out, pull = jax.vjp(jax.jit(call), *arrays)
        cotangents = tuple(normal(*t.shape, seed=5) for t in out)
        return *out, *jax.tree.leaves(pull(cotangents))

    for got, want in zip(run("pallas_gpu"), run("xla"), strict=True):
        near(got, want)


@pytest.mark.parametrize("case, low", [("groups", (0, 3, 4)), ("gated delta", (0, 1, 2))])
def test_gradients_in_bfloat16_are_those_of_float32_up_to_its_digits(case, low):
    """Cotangents are rounded to bfloat16 before they are multiplied; eight bits remain."""
    function, make = CASES[case]
    rounded = [t.astype(jnp.bfloat16) if i in low else t for i, t in enumerate(make())]

    def gradients(kind, implementation, precision):
        def loss(*arrays):
            out, state = function(
                *arrays, chunk=32, precision=precision, implementation=implementation
            )
            weight = normal(*out.shape, seed=5)
            return (out.astype(jnp.float32) * weight).sum() + (state * weight.sum()).sum()

        arrays = [t.astype(kind) if i in low else t for i, t in enumerate(rounded)]
        floats = tuple(i for i, t in enumerate(arrays) if t is not None)
        return jax.jit(jax.grad(loss, argnums=floats))(*arrays)

    got = gradients(jnp.bfloat16, "pallas_gpu", None)
    want = gradients(jnp.float32, "xla", "highest")
    for a, b in zip(got, want, strict=True):
        near(a.astype(jnp.float32), b, 0.01)


def step(function):
    def loss(*arrays):
        out, state = function(*arrays, implementation="pallas_gpu")
        return out.astype(jnp.float32).sum() + state.sum()

    def call(*arrays):
        floats = tuple(i for i, t in enumerate(arrays) if t is not None)
        return jax.value_and_grad(loss, argnums=floats)(*arrays)

    return call


@pytest.mark.parametrize("kind", ["head", "channel", "gated delta", "ssd"])
def test_forward_and_backward_lower_to_triton_for_an_h100(kind):
    function, arrays = of_size(kind)
    text = aot.lower_for_cuda(step(function), *arrays).as_text()
    # the forward, again for the states before every sixteen steps, and the backward
    assert text.count("__gpu$xla.gpu.triton") == 3


@needs_triton
@pytest.mark.parametrize("kind", ["head", "channel", "ssd", "delta"])
def test_machine_code_for_an_h100_uses_tensor_cores_and_spills_nothing(kind):
    function, arrays = of_size(kind)
    for kernel in aot.compile_for_gpu(step(function), *arrays):
        assert kernel.stack == 0 and kernel.tensor_cores == "wgmma", kernel


@needs_triton
@pytest.mark.slow
def test_the_gated_delta_rule_spills_little():
    function, arrays = of_size("gated delta")
    for kernel in aot.compile_for_gpu(step(function), *arrays):
        assert kernel.stack <= 96 and kernel.tensor_cores == "wgmma", kernel


def test_a_caller_can_ask_for_the_gpu_body():
    shapes = of_size("channel")[1]
    told = kernels_pallas.explain(gla, *shapes, implementation="pallas_gpu")
    assert told.startswith("cuda: pallas_gpu (asked for)")
    low = [jax.ShapeDtypeStruct(t.shape, jnp.float16) for t in shapes[:3]]
    with pytest.raises(ValueError, match="value is float16; the cuda kernel"):
        jax.eval_shape(lambda *t: gla(*t, None, implementation="pallas_gpu"), *low)


def test_programs_for_cuda_are_exported_from_any_host():
    """JAX promises no compatibility of Triton calls between its versions; one has to allow them."""
    function, shapes = of_size("head")
    call = jax.jit(lambda *t: function(*t, implementation="pallas_gpu"))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with aot.described_gpu():
        exported = jax.export.export(call, platforms=["cuda"], disabled_checks=allowed)(*shapes)
    assert "recurrence_forward" in exported.mlir_module()
