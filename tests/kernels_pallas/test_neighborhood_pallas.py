"""The kernels of neighbourhood attention: values, gradients, races, compiles."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import pairs
from jax.sharding import PartitionSpec as P
from test_neighborhood import arrays, near, normal

import kernels_pallas
from kernels_pallas import aot, compat
from kernels_pallas.neighborhood import gpu, reference, tpu
from kernels_pallas.neighborhood.geometry import Axis
from kernels_pallas.neighborhood.problem import Operands, Problem

CASES = {
    "1d, other value size": dict(space=(150,), kernel=(7,)),
    "1d, dilated, causal": dict(space=(75,), kernel=(13,), dilation=(2,), causal=(True,), v=8),
    "2d, more columns than a tile": dict(space=(5, 140), kernel=(3, 7), v=8),
    "2d, four heads in one product": dict(space=(9, 19), kernel=(7, 7), heads=8, d=32, v=32),
    "2d, dilated, classes of two sizes": dict(space=(10, 23), kernel=(3, 5), dilation=(3, 4), v=8),
    "2d, one axis causal, no bias": dict(
        space=(9, 18), kernel=(5, 3), causal=(True, False), bias=False, v=8
    ),
    "3d": dict(space=(5, 9, 7), kernel=(3, 5, 3), dilation=(1, 1, 2)),
}


def problem_of(space, kernel, dilation=None, causal=None, d=8, precision="highest", **_):
    rank = len(space)
    rows = zip(space, kernel, dilation or (1,) * rank, causal or (False,) * rank, strict=True)
    return Problem(tuple(Axis(*row, queries=8) for row in rows), d**-0.5, precision)


def operands_of(space, kernel, bias=True, heads=2, d=8, v=6, dtype=jnp.float32, **_):
    q, k, v, table = arrays(space, kernel, bias, heads, head_dim=d, value_dim=v, batch=2)
    return Operands(*(t.astype(dtype) for t in (q, k, v)), table)


def both_passes(body, problem, x, interpret):
    def call(x, d_out):
        out = body.forward(problem, x, interpret=interpret)
        return out, body.backward(problem, x, out, d_out, interpret=interpret)

    d_out = normal(*x.value.shape, seed=4, dtype=x.value.dtype)
    return jax.jit(call)(x, d_out), d_out


def assert_equals_definition(body, problem, x, interpret=True, tolerance=3e-6):
    names = ("kernel", "dilation", "causal")
    options = {name: tuple(getattr(a, name) for a in problem.axes) for name in names}

    def definition(x, d_out):
        def function(x):
            return reference.neighborhood_attention(*x, scale=problem.scale, **options)

        out, pullback = jax.vjp(function, x)
        return out, pullback(d_out.astype(out.dtype))[0]

    got, d_out = both_passes(body, problem, x, interpret)
    want = jax.jit(definition)(x, d_out)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        near(np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance)
    return got


def slow(cases, *names):
    marks = {name: pytest.mark.slow for name in names}
    return [pytest.param(name, marks=marks.get(name, ())) for name in cases]


BODIES = pytest.mark.parametrize("body", [tpu, gpu], ids=["tpu", "gpu"])
TPU_FIRST = pytest.mark.parametrize(
    "body", [tpu, pytest.param(gpu, marks=pytest.mark.slow)], ids=["tpu", "gpu"]
)


NAMES = {"tpu": tpu, "gpu": gpu}
BY_DEFAULT = {
    ("1d, dilated, causal", "tpu"),
    ("2d, four heads in one product", "tpu"),
    ("3d", "tpu"),
    ("2d, dilated, classes of two sizes", "gpu"),
    ("2d, one axis causal, no bias", "gpu"),
}


@pytest.mark.parametrize("case, body", pairs(CASES, NAMES, BY_DEFAULT))
def test_the_kernels_equal_the_definition_forward_and_backward(case, body):
    body = NAMES[body]
    assert_equals_definition(body, problem_of(**CASES[case]), operands_of(**CASES[case]))


SINGLE = dict(space=(3, 20), kernel=(2, 3), dilation=(5, 1), causal=(True, False), v=8)


@pytest.mark.slow
@BODIES
def test_a_dilation_larger_than_the_axis_leaves_positions_alone(body):
    assert_equals_definition(body, problem_of(**SINGLE), operands_of(**SINGLE))


BFLOAT16 = dict(space=(7, 18), kernel=(5, 5), heads=4, d=32, v=32)


@TPU_FIRST
def test_bfloat16_is_near_the_definition(body):
    x = operands_of(**BFLOAT16, dtype=jnp.bfloat16)
    problem = problem_of(**BFLOAT16, precision=None)
    out, grads = assert_equals_definition(body, problem, x, tolerance=2e-2)
    assert out.dtype == grads.query.dtype == jnp.bfloat16 and grads.bias.dtype == jnp.float32


EXTREME = dict(space=(9, 18), kernel=(3, 3))


@TPU_FIRST
def test_extreme_scores_and_forbidden_neighbours_stay_finite(body):
    x = operands_of(**EXTREME)
    bias = x.bias.at[0, 2, 2].set(-jnp.inf).at[1].set(-jnp.inf)
    bias = bias.at[1, 1:4, 2].set(0.0).at[0, 0].set(1e30)
    x = x._replace(query=1e4 * x.query, bias=bias)
    (out, grads), _ = both_passes(body, problem_of(**EXTREME), x, True)
    for t in (out, *grads):
        assert np.isfinite(np.asarray(t)).all()
    assert float(abs(out).max()) <= float(abs(x.value).max()) * 1.001


BLIND = dict(space=(4, 18), kernel=(3, 3))


@BODIES
def test_positions_that_see_no_key_give_zeros_and_zero_gradients(body):
    x = operands_of(**BLIND)
    x = x._replace(bias=jnp.full_like(x.bias, -jnp.inf).at[1].set(0.0))
    (out, grads), _ = both_passes(body, problem_of(**BLIND), x, True)
    for t in (out, *grads[:3]):
        assert np.all(np.asarray(t[..., 0, :]) == 0) and np.any(np.asarray(t[..., 1, :]) != 0)
    assert np.all(np.asarray(grads.bias[0]) == 0) and np.any(np.asarray(grads.bias[1]) != 0)


STRICT = dict(space=(9, 19), kernel=(5, 3), heads=2, v=8)


def test_the_strict_interpreter_finds_no_race_and_no_stray_read():
    strict = compat.strict_interpreter()
    assert_equals_definition(tpu, problem_of(**STRICT), operands_of(**STRICT), strict)
    assert not compat.races_found()


def test_the_door_runs_the_kernel_and_explains_its_choice():
    q, k, v, bias = arrays((9, 18), (3, 5), value_dim=8)
    options = dict(kernel_size=(3, 5), dilation=(2, 1), bias=bias)

    def gradients(implementation, *arrays):
        def loss(*arrays):
            out = kernels_pallas.neighborhood_attention(
                *arrays, **options, precision="highest", implementation=implementation
            )
            return (out**2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    want = gradients("xla", q, k, v)
    for implementation in ("pallas_tpu", "pallas_gpu"):
        for a, b in zip(gradients(implementation, q, k, v), want, strict=True):
            near(a, b, 4e-6)
    told = kernels_pallas.explain(kernels_pallas.neighborhood_attention, q, k, v, **options)
    assert told.splitlines()[0] == "cpu: xla" and "tpu: xla, because the table sends" in told
    low = [t.astype(jnp.float16) for t in (q, k, v)]
    with pytest.raises(ValueError, match="query is float16; the kernel takes bfloat16"):
        gradients("pallas_tpu", *low)
    wide = jax.ShapeDtypeStruct((1, 20, 2, 72), jnp.float32)
    told = kernels_pallas.explain(
        kernels_pallas.neighborhood_attention, wide, wide, wide, kernel_size=3
    )
    assert "cuda: xla, because head_dim 72 is above 64" in told


# DiNAT's stages and its dilations; detection's larger maps; time, rows and columns.
COMPILED = {
    "stage 1": dict(space=(56, 56), kernel=(7, 7), heads=2),
    "stage 1, dilated": dict(space=(56, 56), kernel=(7, 7), dilation=(8, 8), heads=3),
    "stage 4": dict(space=(7, 7), kernel=(7, 7), heads=24),
    "kernel 13": dict(space=(56, 56), kernel=(13, 13), heads=4),
    "large map": dict(space=(128, 128), kernel=(7, 7), heads=4),
    "clip": dict(space=(8, 28, 28), kernel=(3, 7, 7), heads=4),
    "series": dict(space=(1000,), kernel=(13,), dilation=(4,), heads=4),
}


@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
@pytest.mark.parametrize(
    "case, chip",
    pairs(COMPILED, aot.CHIPS, {("stage 1", "v6e")}),
)
def test_forward_and_backward_compile_for_tpu_without_square_temporaries(case, chip):
    sizes = dict(d=32, v=32) | COMPILED[case]
    problem = problem_of(**sizes, precision=None)
    x = jax.eval_shape(lambda: operands_of(**sizes, dtype=jnp.bfloat16))

    def call(x, d_out):
        out = tpu.forward(problem, x)
        return out, tpu.backward(problem, x, out, d_out)

    compiled = aot.compile_for_tpu(call, x, x.value, mesh=aot.tpu_mesh(chip))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    images = sum(t.size * 2 for t in x[:3])
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * images


def large_map(x):
    """The gradients of a call through the door."""

    def loss(q, k, v, bias):
        out = kernels_pallas.neighborhood_attention(
            q, k, v, kernel_size=7, bias=bias, implementation="pallas_tpu"
        )
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, (0, 1, 2, 3))(*x)


def large_operands():
    return jax.eval_shape(lambda: operands_of((64, 64), (7, 7), heads=8, d=32, v=32))


@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
def test_sharded_calls_compile_with_no_collective_but_the_sum_of_the_bias():
    mesh = aot.tpu_mesh("v5e", (2, 2), ("data", "tensor"))
    image = P("data", None, None, "tensor")
    specs = Operands(image, image, image, P("tensor"))
    compiled = aot.compile_for_tpu(large_map, large_operands(), mesh=mesh, specs=(specs,))
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 1
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text


def test_a_large_map_exports_for_tpu_with_the_kernel():
    exported = jax.export.export(jax.jit(large_map), platforms=("tpu",))(large_operands())
    assert str(exported.mlir_module()).count("tpu_custom_call") >= 2


ON_GPU = {
    "stage 1": (COMPILED["stage 1"], jnp.bfloat16, 32),
    "dilated, classes of two sizes": (
        dict(space=(56, 56), kernel=(13, 13), dilation=(2, 3), heads=4), jnp.float32, 64
    ),
    "clip": (COMPILED["clip"], jnp.bfloat16, 64),
    "series": (COMPILED["series"], jnp.bfloat16, 128),
}  # fmt: skip


def gpu_program(case):
    sizes, dtype, width = ON_GPU[case]
    sizes = sizes | dict(d=width, v=width)
    problem = problem_of(**sizes, precision=None)

    def call(x, d_out):
        out = gpu.forward(problem, x)
        return out, gpu.backward(problem, x, out, d_out)

    x = jax.eval_shape(lambda: operands_of(**sizes, dtype=dtype))
    return call, x, x.value


@pytest.mark.parametrize("case", slow(ON_GPU, "clip", "series"))
def test_forward_and_backward_lower_to_triton_for_an_h100(case):
    text = aot.lower_for_cuda(*gpu_program(case)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton, which compiles for GPUs, is missing"
)
@pytest.mark.parametrize("case", slow(ON_GPU, "clip", "series"))
def test_the_gpu_kernels_spill_nothing_and_use_tensor_cores(case):
    kernels = aot.compile_for_gpu(*gpu_program(case))
    names = [kernel.name.removeprefix("neighborhood_") for kernel in kernels]
    assert names == ["forward", "dq", "dkv", "dbias"]
    for kernel in kernels:
        assert kernel.stack == 0 and kernel.tensor_cores == "wgmma", kernel
        assert kernel.shared <= 227 << 10, kernel
