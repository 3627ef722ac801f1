import jax
import jax.numpy as jnp
import numpy as np
from model_helpers import documented_shapes, feature_shapes, filled, random_images

import zoo
from zoo.models.vision import gmm_pyramids
from zoo.models.vision.gmm_pyramids import GmmT2T


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(gmm_pyramids.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_scores_with_the_class_token_are_not_multiplied():
    """Masks of zeros leave patches blind to each other's scores, but not to the class token."""
    model = zoo.create("gmm_pit_test")
    variables, images = filled(model), random_images(model)
    layer = variables["params"]["stages_0_layers_0"]["attention"]
    layer["mask"]["alpha"] = jnp.zeros_like(layer["mask"]["alpha"])
    _, seen = jax.jit(lambda v, x: model.apply(v, x, method="features", mutable=["intermediates"]))(
        variables, images
    )
    scores = seen["intermediates"]["stages_0_layers_0"]["attention"]["scores"][0]
    assert not np.any(scores[:, :, 1:, 1:])
    assert np.all(scores[:, :, 0] != 0) and np.all(scores[:, :, :, 0] != 0)


def test_tokens_are_halved_twice_and_the_unused_tensors_come_back():
    model = GmmT2T(image_size=(16, 16), depth=1, token_dim=8, kernels=2, drop_path=0.0)
    variables, images = filled(model), random_images(model)
    out = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, images)
    assert out["token_layer1"].shape == (2, 64, 8) and out["block0"].shape == (2, 16, 256)
    state = zoo.export(model, variables)
    assert state["tokens_to_token.attention1.mask"].shape == (1, 1, 64, 64)
    assert state["cls_token"].shape == (1, 1, 256)
    again = zoo.convert(model, state)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), again, variables)
    assert all(jax.tree.leaves(same))
