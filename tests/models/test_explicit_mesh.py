"""Models under a mesh with Explicit axes, which `jax.make_mesh` makes by default."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np, zoo
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4, 2), ("data", "tensor"))
rng = np.random.default_rng(0)

def value(t):
    if jnp.issubdtype(t.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=t.shape), t.dtype)
    return jnp.asarray(rng.integers(0, 9, t.shape), t.dtype)

for name in sys.argv[1:]:
    model = zoo.create(name)
    inputs = {k: value(t) for k, t in model.example_inputs(4).items()}
    params = jax.jit(model.init)(jax.random.key(0), **inputs)

    def loss(params, inputs):
        out = model.apply(params, **inputs)
        return (out.astype(jnp.float32) ** 2).mean(), out

    step = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(step)(params, inputs)
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(t, NamedSharding(mesh, P("data"))) for k, t in inputs.items()}
        got = jax.jit(step)(jax.device_put(params, NamedSharding(mesh, P())), placed)
        assert jax.tree.structure(jax.jit(model.init)(jax.random.key(0), **placed)) == (
            jax.tree.structure(params))
    assert jax.typeof(got[0][1]).sharding.spec[0] == "data"
    for a, b in zip(got[0], want[0]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(abs(b).max()))
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(want[1]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1])):  # some are only rounding
        atol = max(1e-5 * float(abs(b).max()), 1e-6 * largest)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", ["vit_test gpt2_test", "swin_test gla_test patchtst_test"])
def test_models_train_under_a_mesh_with_explicit_axes(names):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names.split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip().endswith("equal"), run.stderr[-2000:]
