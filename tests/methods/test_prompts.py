"""Prompts in a vision transformer: what they are at first, what is trained, how they move on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_helpers import random_images

import zoo
from zoo.methods import Prompts
from zoo.methods.prompts import prompts_of, with_prompts


@pytest.fixture(scope="module")
def prompted():
    model, method = zoo.create("vit_test"), Prompts(3)
    images = random_images(model)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return model, method, images, variables, method.adapt(model, variables, jax.random.key(1))


def test_they_add_n_d_l_numbers_and_are_trained_with_the_head_alone(prompted):
    model, method, _, variables, adapted = prompted
    before = flatten_dict(variables["params"], sep="/")
    after = flatten_dict(adapted["params"], sep="/")
    added = set(after) - set(before)
    assert added == {"prompt", "deep_prompts"}
    assert sum(after[path].size for path in added) == 3 * model.depth * model.embed_dim
    trained = {path for path in after if method.trains(path)}
    assert trained == added | {"head/kernel", "head/bias"}


def test_their_order_does_not_matter_and_they_do(prompted):
    model, method, images, variables, adapted = prompted
    run = jax.jit(lambda v: method.wrap(model).apply(v, images))
    logits = run(adapted)
    turned = {**adapted["params"], "prompt": adapted["params"]["prompt"][::-1]}
    turned["deep_prompts"] = adapted["params"]["deep_prompts"][:, ::-1]
    assert np.abs(run({"params": turned}) - logits).max() < 1e-4 * np.abs(logits).max()
    assert np.abs(jax.jit(model.apply)(variables, images) - logits).max() > 1e-4


def test_modules_move_to_a_model_with_other_classes(prompted):
    model, method, images, _, adapted = prompted
    other = model.clone(num_classes=3)
    fresh = jax.jit(other.init)(jax.random.key(2), images)
    target = method.adapt(other, fresh, jax.random.key(3))
    moved = with_prompts(target, prompts_of(adapted))
    np.testing.assert_array_equal(moved["params"]["prompt"], adapted["params"]["prompt"])
    logits = jax.eval_shape(lambda v: method.wrap(other).apply(v, images), moved)
    assert logits.shape == (len(images), 3)
    with pytest.raises(ValueError, match="the same count and depth"):
        with_prompts(target, {"prompt": jnp.zeros((1, 1))})


def test_a_model_without_one_sequence_is_refused():
    with pytest.raises(ValueError, match="no such sequence"):
        Prompts().wrap(zoo.create("swin_test"))


def test_narrow_prompts_go_through_one_map_and_are_written_with_it(prompted):
    model, _, images, variables, _ = prompted
    method = Prompts(3, width=5)
    adapted = method.adapt(model, variables, jax.random.key(1))
    shapes = {p: x.shape for p, x in flatten_dict(adapted["params"], sep="/").items()}
    assert shapes["prompt"] == (3, 5) and shapes["deep_prompts"] == (model.depth - 1, 3, 5)
    assert shapes["prompt_map_kernel"] == (5, model.embed_dim)
    assert method.trains("prompt_map_bias")
    state = zoo.export(method.wrap(model), adapted)
    assert state["prompt_proj.weight"].shape == (model.embed_dim, 5)
    assert jax.eval_shape(lambda v: method.wrap(model).apply(v, images), adapted).shape[0] == 2
