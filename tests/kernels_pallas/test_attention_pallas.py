"""The TPU and GPU bodies of attention: numerics in interpreters, compiles and lowerings."""

import re
from dataclasses import replace
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
    cotangents,
    floats,
    operands,
    pairs,
)
from jax.sharding import PartitionSpec as P

import kernels_pallas
from kernels_pallas import Causal, Neighborhood, Sigmoid, SlidingWindow, aot, compat
from kernels_pallas.attention import gpu, reference, tpu


def body(module, **options):
    return SimpleNamespace(
        forward=partial(module.forward, **options), backward=partial(module.backward, **options)
    )


BODIES = {
    "tpu": body(tpu, limit=128, interpret=True),  # two blocks each way, the second ragged
    "gpu": body(gpu, interpret=True),
}
LONG = dict(queries=150, keys=200)
WIDE_CASES = {
    "sliding": dict(mask=SlidingWindow(20, 3), bias=(1, 4), **LONG),
    "neighborhood": dict(mask=Neighborhood((10, 20), 3), queries=200, keys=200),
    "bias_of_examples": dict(bias=(2, 1), **LONG),
    "dropout_and_slopes": dict(dropout=0.3, slopes=True, mask=Causal(50), **LONG),
    "segments": CASES["segments"],
    "score_function": CASES["score_function"],
    "boolean_bias": dict(bias=(2, 1), boolean=True, **LONG),
    "all": CASES["all"],
    "one_query": dict(queries=1, keys=200),
    "one_key": CASES["one_key"],
    "no_group": dict(heads=2, kv_heads=2, head_dim=16, value_dim=16, queries=49, keys=49),
}


BY_DEFAULT = {(c, "tpu") for c in ("sliding", "segments", "all", "one_query", "score_function")}
BY_DEFAULT |= {(c, "gpu") for c in ("neighborhood", "boolean_bias", "dropout_and_slopes")}


@pytest.mark.parametrize("case, name", pairs(WIDE_CASES, BODIES, BY_DEFAULT))
def test_kernels_equal_the_definition(case, name):
    assert_equals_oracle(BODIES[name], *operands(**WIDE_CASES[case]))


SCORE_NAMES = {"softmax": 0, "cap": 1, "sigmoid": 2, "clipped": 3}


@pytest.mark.parametrize(
    "name, score",
    pairs(BODIES, SCORE_NAMES, {("tpu", "softmax"), ("tpu", "clipped"), ("gpu", "sigmoid")}),
)
def test_every_score_equals_the_definition_with_empty_rows(name, score):
    score = SCORES[SCORE_NAMES[score]]
    problem, x = operands(score=score, bias=(1, 4), mask=Causal(), **LONG)
    x = x._replace(bias=x.bias.at[:, :, 3:40].set(-jnp.inf).at[:, :, 140].set(-3e38))
    out, _, grads = assert_equals_oracle(BODIES[name], problem, x)
    for t in (out, grads.query, grads.bias):
        assert np.all(np.asarray(t[:, :, 3:40]) == 0) and np.all(np.isfinite(t))


@pytest.mark.parametrize("name", ["tpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_extreme_scores_and_bfloat16(name):
    problem, x = operands(dtype=jnp.bfloat16, mask=Causal(), queries=140, keys=140)
    x = x._replace(query=x.query * 30)
    exact = x._replace(**{k: v.astype(jnp.float32) for k, v in floats(x).items()})
    want, _ = jax.jit(partial(reference.attention, problem))(exact)
    out, lse = jax.jit(partial(BODIES[name].forward, problem))(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2 * float(abs(want).max()))
    d_out, d_lse = cotangents(problem, x)
    grads = BODIES[name].backward(problem, x, out, lse, d_out.astype(out.dtype), d_lse)
    assert all(np.isfinite(t.astype(jnp.float32)).all() for t in grads[:3])


@pytest.mark.parametrize(
    "score", [SCORES[0], pytest.param(SCORES[3], marks=pytest.mark.slow)], ids=str
)
def test_the_strict_interpreter_finds_no_race_and_no_stray_read(score):
    strict = body(tpu, limit=128, interpret=compat.strict_interpreter())
    sizes = dict(heads=2, kv_heads=1, queries=140, keys=150)
    assert_equals_oracle(strict, *operands(score=score, bias=(1, 2), mask=Causal(), **sizes))
    assert not compat.races_found()


def test_asking_for_a_kernel_on_a_cpu_runs_its_interpreter():
    _, x = operands(value_dim=8)
    arrays = [t.transpose(0, 2, 1, 3) for t in x[:3]]
    want = kernels_pallas.attention(*arrays, mask=Causal(), implementation="xla")
    for implementation in ("pallas_tpu", "pallas_gpu"):
        got = kernels_pallas.attention(*arrays, mask=Causal(), implementation=implementation)
        np.testing.assert_allclose(got, want, atol=2e-6)


COMPILED = {
    "vit": dict(queries=197, keys=197, head_dim=64, value_dim=64),
    "swin": dict(queries=49, keys=49, head_dim=32, value_dim=32, bias=(1, 4)),
    "causal": dict(queries=4096, keys=4096, head_dim=64, value_dim=64, mask=Causal()),
    "biased": dict(queries=1000, keys=1000, head_dim=80, value_dim=80, bias=(1, 4)),
    "decode": dict(queries=1, keys=1500, head_dim=128, value_dim=128),
    "neighbours": dict(queries=1024, keys=1024, head_dim=32, value_dim=32,
                       mask=Neighborhood((32, 32), 7)),
    "everything": dict(queries=300, keys=300, head_dim=64, value_dim=64, dropout=0.1, slopes=True,
                       mask=Causal(), score=Sigmoid(-3.0)),
    "clipped": dict(queries=600, keys=600, head_dim=64, value_dim=64, score=SCORES[3]),
    "float32 heads of 256": dict(queries=2048, keys=2048, head_dim=256, value_dim=256,
                                 dtype=jnp.float32),
}  # fmt: skip


def step(module, problem):
    def call(x, d_out, d_lse):
        out, lse = module.forward(problem, x)
        return out, module.backward(problem, x, out, lse, d_out, d_lse)

    return call


def arguments(case):
    problem, x = operands(**dict(dtype=jnp.bfloat16) | COMPILED[case])
    return replace(problem, precision=None), (x, *cotangents(problem, x))


needs_libtpu = pytest.mark.skipif(
    not aot.can_compile_for_tpu(), reason="libtpu, which compiles for TPU, is not installed"
)


SMALL_CHIPS = {("float32 heads of 256", "v4")}


@needs_libtpu
@pytest.mark.parametrize(
    "case, chip",
    pairs(COMPILED, aot.TOPOLOGIES,
          {("causal", "v5e"), ("everything", "v6e"), ("decode", "v5e"), *SMALL_CHIPS}),
)  # fmt: skip
def test_forward_and_backward_compile_for_tpu(case, chip):
    problem, arrays = arguments(case)
    compiled = aot.compile_for_tpu(step(tpu, problem), *arrays, mesh=aot.tpu_mesh(chip))
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels >= 3


@needs_libtpu
def test_sixteen_thousand_tokens_have_no_square_temporary_on_a_tpu():
    t = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.bfloat16)

    def call(q, k, v, d_out):
        return jax.vjp(kernels_pallas.attention, q, k, v)[1](d_out)

    compiled = aot.compile_for_tpu(call, t, t, t, t, mesh=aot.tpu_mesh("v5e"))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28 < 8 * 16384**2


@needs_libtpu
def test_sharded_calls_gather_nothing_on_a_tpu():
    mesh = aot.tpu_mesh("v5e", (2, 2), ("data", "tensor"))
    t = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.bfloat16)

    def call(q, k, v, d_out):
        function = partial(kernels_pallas.attention, mask=Causal())
        out, pullback = jax.vjp(function, q, k, v)
        return out, pullback(d_out)

    specs = (P("data", None, "tensor"),) * 4
    text = aot.compile_for_tpu(call, t, t, t, t, mesh=mesh, specs=specs).as_text()
    assert "tpu_custom_call" in text
    assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", text)


LOWERED = [pytest.param(case, marks=() if case in ("causal", "clipped", "biased") else
                        pytest.mark.slow) for case in COMPILED]  # fmt: skip


@pytest.mark.parametrize("case", LOWERED)
def test_forward_and_backward_lower_to_triton_for_an_h100(case):
    problem, arrays = arguments(case)
    lowered = aot.lower_for_cuda(step(gpu, problem), *arrays)
    kernels = lowered.as_text().count("__gpu$xla.gpu.triton")
    assert kernels == 3 + (arrays[0].bias is not None) + problem.score.clipped


def test_programs_for_tpu_are_exported_from_any_host():
    t = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)
    function = jax.jit(lambda q: kernels_pallas.attention(q, q, q, mask=Causal()))
    exported = jax.export.export(function, platforms=["tpu"])(t)
    assert "tpu_custom_call" in exported.mlir_module()
    assert "tpu_custom_call" not in jax.export.export(function, platforms=["cpu"])(t).mlir_module()


def test_programs_for_cuda_are_exported_from_any_host():
    """JAX promises no compatibility of Triton calls between its versions; one has to allow them."""
    t = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)
    call = partial(kernels_pallas.attention, mask=Causal(), implementation="pallas_gpu")
    function = jax.jit(jax.grad(lambda q: call(q, q, q).sum()))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with aot.described_gpu():
        exported = jax.export.export(function, platforms=["cuda"], disabled_checks=allowed)(t)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("@__gpu$xla.gpu.triton(") == 3  # forward, dq, dk and dv
