import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    sin_loss,
)

import zoo
from zoo.models.incontext import algoformer
from zoo.models.incontext.prompt import Trunk, interleave

SMALL = dict(dims=3, max_points=9, embed_dim=16, num_heads=2)


def prompts(batch=2, points=5, dims=3, seed=0):
    rng = np.random.default_rng(seed)
    xs, ys = rng.standard_normal((batch, points, dims)), rng.standard_normal((batch, points))
    return xs.astype("f"), ys.astype("f")


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(algoformer.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


def by_hand(model, variables, xs, ys):
    """Loops as explicit calls of one stack; the first ones behind a stopped gradient."""
    dense = variables["params"]["read_in"]["dense"]
    embed = interleave(xs, ys) @ dense["kernel"] + dense["bias"]
    trunk = Trunk(model.depth, model.num_heads, 2 * model.max_points + 1)
    start, combine = algoformer.INJECT[model.inject]
    state, predictions = start(embed), []
    dense = variables["params"]["read_out"]["dense"]
    for i in range(model.loops):
        own = {"params": variables["params"]["backbone"]}
        state = trunk.apply(own, combine(state, embed))[-1]
        if i < model.loops - model.window:
            state = jax.lax.stop_gradient(state)
        else:
            predictions.append((state[:, ::2] @ dense["kernel"] + dense["bias"])[..., 0])
    return jnp.stack(predictions, 1)


@pytest.mark.slow
@pytest.mark.parametrize("inject", ["add", "multiply"])
def test_loops_are_calls_of_one_stack_and_early_ones_have_no_gradient(inject):
    fields = SMALL | dict(loops=4, window=2, inject=inject)
    model = zoo.create("looped_linear", **fields)
    variables = filled(model)
    xs, ys = prompts()

    def run(apply):
        def loss(variables):
            out = apply(variables)
            return sin_loss(out), out

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    got = run(lambda v: model.apply(v, xs, ys))
    want = run(lambda v: by_hand(model, v, xs, ys))
    assert_trees_close(got, want, 2e-5)


def test_loops_cost_no_parameters():
    few, many = (zoo.create("algoformer_test", loops=n) for n in (1, 50))
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(m.init, jax.random.key(0), *prompts()))
        for m in (few, many)
    ]
    assert shapes[0] == shapes[1]


def test_four_times_the_loops_are_finite():
    model = zoo.create("algoformer_test")
    out = jax.jit(model.clone(loops=4 * model.loops).apply)(filled(model), *prompts())
    assert np.isfinite(out).all()


def test_the_input_is_injected_and_positions_are_added_where_asked():
    xs, ys = prompts()
    model = zoo.create("algoformer_test")
    models = [model, model.clone(inject="none"), model.clone(loop_positions=True)]
    weights = [filled(m) for m in models]
    run = jax.jit(lambda ws: [m.apply(w, xs, ys) for m, w in zip(models, ws, strict=True)])
    first, *others = run(weights)
    assert min(np.abs(first - other).max() for other in others) > 1e-3


def test_one_loop_without_injection_is_the_standard_decoder():
    fields = SMALL | dict(depth=2, inject="none", loops=1, window=1)
    model = zoo.create("looped_standard", **fields)
    variables, (xs, ys) = filled(model), prompts()
    want = jax.jit(lambda v: by_hand(model, v, xs, ys))(variables)
    assert_trees_close(jax.jit(model.apply)(variables, xs, ys), want, 1e-5)
    state = zoo.export(model, variables)
    assert {name.split(".")[3] for name in state if ".h." in name} == {"0", "1"}


def test_no_prediction_sees_its_label():
    model = zoo.create("algoformer_test")
    variables, call, (xs, ys) = filled(model), jax.jit(model.apply), prompts()
    before = np.asarray(call(variables, xs, ys))  # done before its inputs change
    ys[:, 2] += 1
    after = call(variables, xs, ys)
    np.testing.assert_array_equal(before[..., :3], after[..., :3])
    assert np.abs(before[..., 3:] - after[..., 3:]).max((0, 1)).min() > 0


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"inject": "concat"}, "inject='concat' is none of 'add', 'multiply', 'none'"),
        ({"loops": 0}, "loops=0 and window=2 must both be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    model = zoo.create("algoformer_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(model.init, jax.random.key(0), *prompts())


def test_files_of_compiled_models_are_the_same():
    model = zoo.create("algoformer_test")
    state = zoo.export(model, filled(model))
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    assert_trees_close(zoo.convert(model, compiled), filled(model), 0)
    assert "loop.transformer.wpe.weight" in state
