"""The TPU bodies of the recurrences: numbers in the interpreter, compiles for described chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recurrence import delta_arrays, gla_arrays, near, normal, ssd_arrays

import kernels_pallas
from kernels_pallas import aot, compat
from kernels_pallas.recurrence import tpu
from kernels_pallas.recurrence.problem import Operands, Problem

needs_libtpu = pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")


def gla(q, k, v, g, s=None, **options):
    return kernels_pallas.gated_linear_attention(q, k, v, g, initial_state=s, **options)


def delta(q, k, v, b, g, s=None, **options):
    return kernels_pallas.delta_rule(q, k, v, b, g, initial_state=s, **options)


def ssd(x, dt, A, B, C, D=None, s=None, **options):
    return kernels_pallas.ssd(x, dt, A, B, C, D=D, initial_state=s, **options)


CASES = {
    "no decay": (gla, lambda: gla_arrays("none")),
    "decay of channels": (gla, lambda: gla_arrays("channel", 5)),
    "gated delta": (delta, lambda: delta_arrays(0.9, True)),
    "groups": (ssd, ssd_arrays),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_body_equals_xla_forward_and_backward(case):
    function, make = CASES[case]
    arrays = make()

    def run(implementation):
        def call(*arrays):
            return function(*arrays, chunk=64, precision="highest", implementation=implementation)

        out, pull = jax.vjp(jax.jit(call), *arrays)
        cotangents = tuple(normal(*t.shape, seed=5) for t in out)
        return *out, *jax.tree.leaves(pull(cotangents))

    for got, want in zip(run("pallas_tpu"), run("xla"), strict=True):
        near(got, want)


def test_the_strict_interpreter_finds_no_race_and_no_stray_access():
    x, dt, A, B, C, _, s = ssd_arrays(heads=4, groups=2, length=48)
    heads_first = (t.transpose(0, 2, 1, 3) for t in (C, B, x, (dt * A)[..., None]))
    x = Operands(*heads_first, None, s)
    problem = Problem(chunk=16, precision="highest")
    strict = compat.strict_interpreter()
    *results, states = tpu.forward(problem, x, keep=True, interpret=strict)
    assert not compat.races_found()
    for got, want in zip(results, tpu.forward(problem, x, interpret=True), strict=True):
        near(got, want)
    cotangents = [jnp.ones_like(t) for t in results]
    got = tpu.backward(problem, x, states, *cotangents, interpret=strict)
    assert not compat.races_found()
    want = tpu.backward(problem, x, states, *cotangents, interpret=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        near(a, b)


def of_size(kind):
    """Shapes that systems use: `(function, arrays)`."""
    low, full = (lambda *s, t=t: jax.ShapeDtypeStruct(s, t) for t in (jnp.bfloat16, jnp.float32))
    length = 512
    if kind == "ssd":
        group = low(1, length, 1, 128)
        x = low(1, length, 24, 64)
        return ssd, (x, full(1, length, 24), full(24), group, group)
    key, value = (128, 256) if kind == "channel" else (128, 128)
    qkv = [low(1, length, 4, d) for d in (key, key, value)]
    if kind in ("head", "channel"):
        return gla, (*qkv, full(1, length, 4, key if kind == "channel" else 1))
    strength = full(1, length, 4)
    return delta, (*qkv, strength, strength if kind == "gated delta" else None)


@needs_libtpu
@pytest.mark.parametrize(
    "kind, chip",
    [("head", "v5e"), ("channel", "v5e"), ("channel", "v6e"), ("delta", "v6e")]
    + [("gated delta", "v5e"), ("ssd", "v5e"), ("ssd", "v6e")],
)
def test_forward_and_backward_compile_for_tpu(kind, chip):
    function, arrays = of_size(kind)

    def loss(*arrays):
        out, state = function(*arrays, implementation="pallas_tpu")
        return out.astype(jnp.float32).sum() + state.sum()

    floats = tuple(i for i, t in enumerate(arrays) if t is not None)
    step = jax.value_and_grad(loss, argnums=floats)
    compiled = aot.compile_for_tpu(step, *arrays, mesh=aot.tpu_mesh(chip))
    text = compiled.as_text()
    assert "recurrence_forward" in text and "recurrence_backward" in text


@needs_libtpu
def test_heads_stay_on_their_chips():
    function, arrays = of_size("channel")
    mesh = aot.tpu_mesh("v5e", (2, 2), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    arrays = tuple(jax.ShapeDtypeStruct((2, *t.shape[1:]), t.dtype) for t in arrays)

    def step(*arrays):
        return jax.grad(
            lambda *a: function(*a, implementation="pallas_tpu")[0].astype(jnp.float32).sum(),
            argnums=(0, 1, 2, 3),
        )(*arrays)

    text = aot.compile_for_tpu(step, *arrays, mesh=mesh, specs=(spec,) * 4).as_text()
    assert "recurrence_backward" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_caller_can_ask_why():
    q, k, v, g, _ = gla_arrays("channel")
    told = kernels_pallas.dispatch.explain(gla, q, k, v, g)
    assert "tpu: xla, because the table" in told and "cuda: xla, because" in told
    told = kernels_pallas.dispatch.explain(gla, q, k, v, g, implementation="pallas_tpu")
    assert told.startswith("tpu: pallas_tpu (asked for)")
    with pytest.raises(ValueError, match="float16"):
        low = (t.astype(jnp.float16) for t in (q, k, v))
        gla(*low, g, implementation="pallas_tpu")


def test_kernels_run_under_vmap_remat_and_scan():
    q, k, v, g, s = gla_arrays("head")

    def loss(q, implementation):
        @jax.checkpoint
        def one(state, g):
            out, state = gla(q, k, v, g, state, chunk=32, implementation=implementation)
            return state, out.sum()

        state, outs = jax.lax.scan(one, s, jnp.stack([g, 2 * g]))
        return state.sum() + outs.sum()

    several = jnp.stack([q, -q])
    got, want = (
        jax.jit(jax.vmap(jax.grad(lambda q, i=i: loss(q, i))))(several)
        for i in ("pallas_tpu", "xla")
    )
    near(got, want)
    assert np.abs(want).max() > 0
