import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    random_images,
)

import zoo
from zoo.models.vision import activator


@pytest.fixture(scope="module")
def small():
    model = zoo.create("activator_test", embed_dim=24, hidden=40, num_classes=7)
    return model, filled(model)


def features(small, images):
    model, variables = small
    return apply(model, variables, images, method="features")


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(activator.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert shapes == table | {f"block{i}": table["block0"] for i in range(4)}


def test_the_order_of_patches_does_not_matter(small):
    images = np.asarray(random_images(small[0]))
    patches = images.reshape(2, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 64, 4, 4, 3)
    patches = patches[:, np.random.default_rng(0).permutation(64)]
    shuffled = patches.reshape(2, 8, 8, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 3)
    logits = features(small, images)["logits"]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    assert_trees_close(features(small, shuffled)["logits"], logits, 1e-5)


def test_a_patch_changes_its_own_token_only(small):
    images = random_images(small[0])
    changed = features(small, images.at[0, 9, 21].add(1.0))["block1"]
    difference = np.abs(changed - features(small, images)["block1"]).max(-1)
    assert np.argwhere(difference).tolist() == [[0, 2, 5]]


def test_gradients_of_shared_norms_are_the_sum_over_their_uses(small):
    """Against the block written out with one set of parameters for each use."""
    params = small[1]["params"]["layers_0"]
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 24))

    def norm(x, p):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    dense = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731

    def apart(outer, inner):
        unit, mlp = params["gated_mlp"], params["mlp"]
        y = norm(x, outer[0])
        gate, up = (
            norm(gelu(dense(y, unit["gate"])), inner[0]),
            norm(dense(y, unit["up"]), inner[1]),
        )
        z = x + dense(gate * up, unit["down"])
        z = z + dense(gelu(dense(norm(z, outer[1]), mlp["up"])), mlp["down"])
        return jnp.sin(z).sum()

    outer, inner = params["norm"], params["gated_mlp"]["norm"]
    grads = jax.jit(jax.grad(apart, (0, 1)))([outer] * 2, [inner] * 2)
    block = activator.Block(40)
    shared = jax.jit(jax.grad(lambda p: jnp.sin(block.apply({"params": p}, x)).sum()))(params)
    for (first, second), got in zip(
        grads, (shared["norm"], shared["gated_mlp"]["norm"]), strict=True
    ):
        for key in ("scale", "bias"):
            assert np.abs(first[key]).max() > 0.1 and np.abs(second[key]).max() > 0.1
            np.testing.assert_allclose(got[key], first[key] + second[key], rtol=1e-4, atol=1e-4)


def test_images_of_other_sizes_work_without_other_parameters(small):
    model, variables = small
    images = jax.random.normal(jax.random.key(0), (1, 24, 40, 3))
    out = features(small, images)
    assert out["block1"].shape == (1, 6, 10, 24) and np.isfinite(out["logits"]).all()
    uneven = jnp.pad(images, ((0, 0), (0, 3), (0, 1), (0, 0)), constant_values=9.0)
    assert_trees_close(features(small, uneven)["logits"], out["logits"], 1e-5)
    with pytest.raises(ValueError, match=r"\(batch, height, width, 3\), not \(1, 32, 32, 1\)"):
        model.apply(variables, jnp.zeros((1, 32, 32, 1)))


def test_without_mlps_dropout_does_nothing():
    model = zoo.create("activator_test", has_mlp=False, dropout=0.5)
    variables, images = filled(model), random_images(model)
    trained = apply(model, variables, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert_trees_close(trained, apply(model, variables, images), 1e-5)
