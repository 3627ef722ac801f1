import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes, filled

import zoo
from zoo.models.language import opt


def tokens(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module", params=[True, False], ids=["pre_norm", "post_norm"])
def small(request):
    """A small OPT with unit-scale weights, and its compiled call."""
    model = zoo.create("opt_test", pre_norm=request.param)
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(opt.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_padding_at_the_left_moves_nothing(small):
    _, variables, call = small
    x, mask = tokens(), np.arange(20) >= np.array([[0], [8]])
    out = call(variables, x, mask)
    assert_trees_close(out[1:, 8:], call(variables, x[1:, 8:]), 1e-5)


def test_steps_and_pieces_equal_the_whole_sequence(small):
    model, variables, call = small
    x, mask = tokens(), np.arange(20) >= np.array([[0], [8]])
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, first = step(variables, model.init_state(2, 20), x[:, :18], mask[:, :18])
    state, second = step(variables, state, x[:, 18:19])
    _, third = step(variables, state, x[:, 19:])
    got = jnp.concatenate([first, second, third], axis=1)
    want = call(variables, x, mask)
    assert_trees_close(got[mask], want[mask], 1e-5)


def test_logits_do_not_depend_on_later_tokens(small):
    _, variables, call = small
    x = tokens()
    changed = x.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    a, b = call(variables, x), call(variables, changed)
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12:] - b[:, 12:]).max(-1).min() > 0


def test_norms_stand_where_they_should(small):
    """Behind every sum in post-norm, where each layer's output has unit scale."""
    model, variables, _ = small
    plain = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full_like(p, path[-1].key == "scale") if "norm" in str(path) else p,
        variables,
    )
    out = jax.jit(lambda v, x: model.apply(v, x, method="features"))(plain, tokens())
    spread = np.asarray(out["layer1"].std(-1))
    assert np.allclose(spread, 1, atol=1e-3) != model.pre_norm
    assert ("norm" in variables["params"]) == model.pre_norm
    assert out["last_hidden_state"].shape[-1] == 24  # that of the words


def test_the_first_token_reads_the_third_row(small):
    _, variables, call = small
    params = variables["params"]
    table = params["position_embedding"]
    for row, matters in ((0, False), (1, False), (2, True), (21, True), (22, False)):
        moved = {"params": params | {"position_embedding": table.at[row].add(1.0)}}
        assert (np.abs(call(moved, tokens()) - call(variables, tokens())).max() > 0) == matters


def test_metaseq_stacks_key_value_query(small):
    model, variables, _ = small
    state = zoo.export(model, variables, "metaseq")
    fused = state["decoder.layers.1.self_attn.qkv_proj.weight"]
    attention = variables["params"]["layers_1"]["attention"]
    parts = [attention[name]["kernel"].T for name in ("key", "value", "query")]
    np.testing.assert_array_equal(fused, np.concatenate(parts))
    state["decoder.version"] = np.zeros(1, np.float32)
    assert_trees_close(zoo.convert(model, state), variables, 0)


def test_too_long_a_text_is_one_sentence():
    model = zoo.create("opt_test")
    with pytest.raises(ValueError, match="This OPT has 64 positions, too few for 65"):
        model.init_state(1, 65)
