import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.signal import dynamic_mlp
from zoo.models.signal.dynamic_mlp import MODULATIONS, DraMlp, DynamicNetwork, package_dra


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(dynamic_mlp.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_a_chain_is_what_the_equations_say_and_loads_with_and_without_a_prefix():
    model = DraMlp(3, (5, 4), 2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 3)))
    p, x = variables["params"], jax.random.normal(jax.random.key(1), (7, 3))
    y = x
    for i in range(2):
        y = y @ p[f"layers_{i}"]["kernel"] + p[f"layers_{i}"]["bias"]
        y = package_dra(y, *(p[f"activation_{i}"][n] for n in "abcd"))
    wanted = y @ p["head"]["kernel"] + p["head"]["bias"]
    assert_trees_close(jax.jit(model.apply)(variables, x), wanted, 1e-5)
    for layout, first in (("layers.2", "layers.0.weight"), ("sequential.2", "0.weight")):
        state = zoo.export(model, variables, layout)
        assert first in state and len(state) == 3 * 2 + 2 * 4
        jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_second_input_modulates_the_middle(modulation):
    model = DynamicNetwork(6, 4, 8, 3, modulation)
    variables, key = filled(model), jax.random.key(0)
    x, z = jax.random.normal(key, (2, 6)), jax.random.normal(key, (2, 3))
    run = jax.jit(lambda x, z: model.apply(variables, x, z))
    assert np.abs(run(x, z) - run(x, 2 * z)).max() > 1e-3
    assert ("shift" in variables["params"]["mlp"]) == (modulation == "film")
    with pytest.raises(ValueError, match="takes conditions=3 numbers of z, not None"):
        model.apply(variables, x)


def test_equal_widths_have_residual_connections():
    model = DynamicNetwork(8, 8, 8)
    zeros = jax.tree.map(jnp.zeros_like, filled(model))
    scalars = zeros["params"]["mlp"]["activation"]
    zeros["params"]["mlp"]["activation"] = {**scalars, "b": jnp.ones(1)}  # dra is the identity
    zeros["params"]["mlp"]["up"]["kernel"] = jnp.eye(8)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    np.testing.assert_array_equal(model.apply(zeros, x), x)  # h + 0 (dra(h) + x)
    with pytest.raises(ValueError, match=r"takes x of shape \(batch, 8\), not \(3, 7\)"):
        model.apply(zeros, x[:, :7])


@pytest.mark.slow
def test_it_learns_a_recursion_better_than_its_mean():
    """r(n) = n + (n AND r(n - 1)) up to 120, as in the official notebook."""
    values = [0]
    for n in range(1, 121):
        values.append(n + (n & values[-1]))
    x = jnp.arange(121.0)[:, None] / 60 - 1
    y = (jnp.array(values, jnp.float32)[:, None] - 100) / 60
    model, optimizer = DraMlp(), optax.adam(3e-3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    error = lambda v: ((model.apply(v, x) - y) ** 2).mean()  # noqa: E731

    def step(carry, _):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(error)(variables), state)
        return (optax.apply_updates(variables, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, 3000)[0])
    variables, _ = run((variables, optimizer.init(variables)))
    assert error(variables) < 0.5 * y.var()
