"""GLA, and what it shares with DeltaNet: decoder, states, hybrids, fla's files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, documented_shapes, filled, filled_state_dict, sin_loss

import zoo
from zoo.layers.stack import stack_layers
from zoo.models.language import deltanet, gla

NAMES = ("gla_test", "deltanet_test")


def tokens(batch=2, length=70, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module", params=NAMES)
def system(request):
    """A small hybrid with unit-scale weights, and its compiled call."""
    model = zoo.create(request.param, attention_layers=(1,))
    return model, filled(model), jax.jit(model.apply)


@pytest.mark.parametrize("module", [gla, deltanet])
def test_shapes_are_those_of_the_docstring(module):
    name, table = documented_shapes(module.__doc__)
    model = zoo.create(name)
    spec = model.example_inputs()["tokens"]
    out = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, method="features")[0],
        jax.ShapeDtypeStruct(spec.shape, spec.dtype),
    )
    assert {k: out[k].shape[1:] for k in table} == table


def test_steps_and_pieces_equal_the_whole_sequence(system):
    model, variables, call = system
    x = tokens()
    whole = call(variables, x)
    step = jax.jit(lambda v, state, x: model.apply(v, state, x, method="step"))
    state = model.init_state(2, x.shape[1])
    shapes = jax.tree.map(jnp.shape, state)
    pieces = []
    for start, end in ((0, 33), (33, 66), (66, 67), (67, 68), (68, 69)):
        state, out = step(variables, state, x[:, start:end])
        pieces.append(out)
    assert jax.tree.map(jnp.shape, state) == shapes
    assert_trees_close(jnp.concatenate(pieces, axis=1), whole[:, :69], 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_state(system, side):
    """A padded text, then two more tokens, are what the text is alone."""
    model, variables, call = system
    x, more, count = tokens(2, 20), tokens(2, 2, seed=1), np.array([[20], [9]])
    mask = np.arange(20) < count if side == "right" else np.arange(20) >= 20 - count
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, out = step(variables, model.init_state(2, 22), x, mask)
    _, after = step(variables, state, more)
    alone = call(variables, np.concatenate([x[1][mask[1]], more[1]])[None])[0]
    assert_trees_close(np.concatenate([out[1][mask[1]], after[1]]), alone, 1e-5)
    assert_trees_close(call(variables, x, mask)[1][mask[1]], alone[:9], 1e-5)


def test_logits_do_not_depend_on_later_tokens(system):
    _, variables, call = system
    x = tokens()
    changed = x.copy()
    changed[:, 40:] = (changed[:, 40:] + 1) % 97
    a, b = call(variables, x), call(variables, changed)
    np.testing.assert_array_equal(a[:, :40], b[:, :40])
    assert np.abs(a[:, 40:] - b[:, 40:]).min(-1).max() > 0


def test_a_window_forgets_what_the_state_remembers():
    """Softmax layers alone see 2 layers x 4 tokens back; the recurrent ones everything."""
    each = dict(window=(4, 6), attention_heads=(4, 2), attention_kv_heads=(2, 1))  # 3 + 5 back
    for layers, more, sees in (((0, 1), {}, False), ((0, 1), each, False), ((1,), {}, True)):
        model = zoo.create("gla_test", attention_layers=layers, **more)
        x = tokens(1, 20)
        changed = x.copy()
        changed[0, 5] += 1
        call = jax.jit(lambda v, x, model=model: model.apply(v, x))
        variables = filled(model)
        difference = np.abs(call(variables, x) - call(variables, changed)).max((0, 2))
        assert difference[13] > 0
        assert (difference[14:].max() > 0) == sees


@pytest.mark.slow
def test_remat_and_scan_give_the_same_gradients():
    options = dict(depth=3)
    model = zoo.create("gla_test", **options)
    variables = filled(model)
    x = tokens(2, 20)

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, x))))(variables)

    want = gradient(model, variables)
    rounding = 400 * np.finfo("f").eps  # each program sums in its own order
    assert_trees_close(gradient(model.clone(remat=True), variables), want, rounding)
    stacked = {"params": stack_layers(variables["params"])}
    for remat in (False, True):
        got = gradient(model.clone(scan_layers=True, remat=remat), stacked)
        assert_trees_close(got, {"params": stack_layers(want["params"])}, rounding)


def test_files_with_one_matrix_for_gate_and_up_load(system):
    model, variables, _ = system
    state = filled_state_dict(model)
    for i in range(model.depth):
        name = f"model.layers.{i}.mlp.{{}}_proj.weight"
        both = [state.pop(name.format(part)) for part in ("gate", "up")]
        state[name.format("gate")] = np.concatenate(both)
    assert_trees_close(zoo.convert(model, state), variables, 0)


def test_tied_files_load_with_and_without_the_second_copy(system):
    model, _, call = system
    state = filled_state_dict(model)
    tied = model.clone(tie_embeddings=True)
    del state["lm_head.weight"]
    loaded = zoo.convert(tied, state)
    assert "head" not in loaded["params"]
    state["lm_head.weight"] = state["model.embeddings.weight"]
    assert_trees_close(zoo.convert(tied, state), loaded, 0)
    got = jax.jit(tied.apply)(loaded, tokens())
    assert_trees_close(got, call(zoo.convert(model, state), tokens()), 1e-5)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="tied tensors differ"):
        zoo.convert(tied, state)


def test_the_unfused_norm_of_gla_has_another_name():
    model = zoo.create("gla_test")
    state = filled_state_dict(model)
    renamed = {k.replace("g_norm_swish_gate", "g_norm"): v for k, v in state.items()}
    assert renamed.keys() != state.keys()
    loaded = zoo.convert(model, renamed)
    assert_trees_close(loaded, zoo.convert(model, state), 0)
    assert zoo.export(model, loaded, "fla_unfused").keys() == renamed.keys()


def test_grouped_keys_equal_repeated_ones():
    model = zoo.create("gla_test", num_kv_heads=1, conv_size=0)
    variables = filled(model)
    wide = model.clone(num_kv_heads=2)

    def widen(path, leaf):
        names = [p.key for p in path]
        if "attention" in names and names[-2] in ("key", "value", "decay_up"):
            return np.concatenate([leaf, leaf], axis=-1)
        return leaf

    repeated = jax.tree_util.tree_map_with_path(widen, variables)
    x = tokens(2, 20)
    want = jax.jit(model.apply)(variables, x)
    assert_trees_close(jax.jit(wide.apply)(repeated, x), want, 1e-5)


BAD = {
    "floats": (dict(), jnp.zeros((1, 4)), "integers"),
    "heads": (dict(num_heads=5), None, "does not divide"),
    "hybrid": (dict(attention_layers=(7,)), None, "layers are 0 to 1"),
    "each": (dict(attention_layers=(1,), window=(3, 4)), None, "2 values for 1 attention_layers"),
    "scan": (dict(scan_layers=True, attention_layers=(1,)), None, "needs equal layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_sentence(case):
    fields, x, message = BAD[case]
    model = zoo.create("gla_test", **fields)
    x = tokens(1, 4) if x is None else x
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x))
