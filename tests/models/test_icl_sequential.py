import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    filled_state_dict,
    sin_loss,
)

import zoo
from zoo.layers.stack import stack_layers
from zoo.models.incontext import icl_sequential
from zoo.models.incontext.prompt import interleave


def prompts(batch=2, points=9, dims=3, seed=0):
    rng = np.random.default_rng(seed)
    xs, ys = rng.standard_normal((batch, points, dims)), rng.standard_normal((batch, points))
    return xs.astype("f"), ys.astype("f")


@pytest.fixture(scope="module")
def small():
    """A small learner with unit-scale weights, and its compiled call."""
    model = zoo.create("icl_sequential_test")
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(icl_sequential.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


def test_a_prompt_is_x_then_y_then_the_next_x():
    xs, ys = prompts(1, 2)
    tokens = interleave(xs, ys)[0]
    np.testing.assert_array_equal(tokens[::2], xs[0])
    np.testing.assert_array_equal(tokens[1::2], np.stack([ys[0], 0 * ys[0], 0 * ys[0]], 1))


def test_the_last_label_changes_nothing(small):
    _, variables, call = small
    xs, ys = prompts()
    changed = ys.copy()
    changed[:, -1] += 1
    np.testing.assert_array_equal(call(variables, xs, ys), call(variables, xs, changed))


@pytest.mark.parametrize("what, first", [("label", 5), ("point", 4)])
def test_a_change_reaches_only_what_comes_after(small, what, first):
    _, variables, call = small
    xs, ys = prompts()
    before = call(variables, xs, ys)
    more = np.zeros_like(ys)
    more[:, 4] = 1  # not in place: a running program may read the array itself
    after = call(variables, *((xs, ys + more) if what == "label" else (xs + more[..., None], ys)))
    np.testing.assert_array_equal(before[:, :first], after[:, :first])
    assert np.abs(before[:, first:] - after[:, first:]).max(0).min() > 0


def test_a_shorter_prompt_has_the_same_predictions(small):
    _, variables, call = small
    xs, ys = prompts()
    whole = call(variables, xs, ys)
    assert_trees_close(call(variables, xs[:, :4], ys[:, :4]), whole[:, :4], 1e-5)


def test_scan_and_loop_and_remat_are_one_model(small):
    model, variables, _ = small
    xs, ys = prompts(2, 4)

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, xs, ys))))(variables)

    want = {"params": stack_layers(gradient(model, variables)["params"])}
    stacked = {"params": stack_layers(variables["params"])}
    assert_trees_close(gradient(model.clone(scan_layers=True, remat=True), stacked), want, 1e-5)


def test_old_files_with_words_and_masks_give_the_same_model(small):
    model, variables, _ = small
    state = filled_state_dict(model)
    state["_backbone.wte.weight"] = np.ones((50257, 32), "f")
    for i in range(model.depth):
        state[f"_backbone.h.{i}.attn.bias"] = np.tri(18, dtype=np.uint8)[None, None]
        state[f"_backbone.h.{i}.attn.masked_bias"] = np.float32(-1e4)
    assert_trees_close(zoo.convert(model, state), variables, 0)
    kernel = variables["params"]["backbone"]["layers_1"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(state["_backbone.h.1.attn.c_attn.weight"], kernel)
    read_in = variables["params"]["read_in"]["dense"]["kernel"]
    np.testing.assert_array_equal(state["_read_in.weight"].T, read_in)


def test_ends_may_be_perceptrons():
    model = zoo.create("icl_sequential_test", read_hidden=16)
    names = set(filled_state_dict(model))
    assert {f"_read_in.net.{i}.weight" for i in (0, 2, 4)} < names
    assert "_read_out.weight" not in names


@pytest.mark.parametrize(
    "points, dims, sentence",
    [
        (10, 3, "reads at most 9 points, not 10; shorten the prompt"),
        (4, 2, r"takes xs of shape \(batch, points, 3\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(points, dims, sentence):
    model = zoo.create("icl_sequential_test")
    xs, ys = jnp.zeros((1, points, dims)), jnp.zeros((1, points))
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), xs, ys))
