"""`zoo.layers.materialize`: the identity to JAX, one computation to XLA for CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.layers.materialize import materialized


def wave(x):
    """Something with a second derivative."""
    return jnp.sin(materialized(jnp.exp(materialized(x)) * x)).sum()


def plain(x):
    """`wave` without a word on where it is computed."""
    return jnp.sin(jnp.exp(x) * x).sum()


def test_it_is_the_identity_under_every_transformation():
    x = jnp.linspace(-1.0, 1.0, 6)
    for transform in (jax.grad, jax.hessian, jax.jacfwd, lambda f: jax.vmap(f, axis_size=6)):
        got, wanted = (jax.jit(transform(f))(x) for f in (wave, plain))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_shapes_may_be_symbolic_and_programs_for_tpus_are_unchanged():
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), jnp.float32)
    exported = jax.export.export(jax.jit(wave))(shape)
    x = jnp.linspace(-1.0, 1.0, 6)
    np.testing.assert_allclose(exported.call(x), wave(x), rtol=1e-5)
    texts = [
        jax.jit(f).trace(x).lower(lowering_platforms=("tpu",)).as_text() for f in (wave, plain)
    ]
    assert "call" not in texts[0].replace("private", "")
    assert texts[0].count("stablehlo") == texts[1].count("stablehlo")


def test_a_gradient_grows_in_proportion_to_its_depth():
    def operands(depth):
        """Of all fusions of a ViT's compiled gradient."""
        model = zoo.create("vit_test", depth=depth)
        images = jnp.zeros(model.example_inputs(1)["images"].shape)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        loss = jax.grad(lambda v, x: jnp.sum(model.apply(v, x) ** 2))
        text = jax.jit(loss).lower(variables, images).compile().as_text()
        return sum(line.count("%") for line in re.findall(r".* fusion\(.*\), kind", text))

    two, four, six = (operands(depth) for depth in (2, 4, 6))
    assert six - four <= 1.1 * (four - two)
