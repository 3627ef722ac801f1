"""Methods on systems: by default some cells by tracing, all by running with `-m variants`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from methods.test_lora import random_inputs
from model_helpers import assert_trees_close, sin_loss

import zoo
from zoo.cli import main
from zoo.methods import matrix

SMALL = zoo.list_models("*_test")
REQUIRED = {
    "vit_test": set(matrix.COLUMNS),
    "gpt2_test": set(matrix.COLUMNS) - {"prompts", "early_exit", "token_pruning"},
}
"""Where a method has to work, whatever it says of itself."""

traced = functools.cache(matrix.Traced.of)


@pytest.mark.variants
@pytest.mark.parametrize("name", REQUIRED)
def test_methods_apply_where_they_must_and_say_why_not(name):
    cells = {column: matrix.cell(column, traced(name)) for column in matrix.COLUMNS}
    assert {column for column, cell in cells.items() if cell.works} >= REQUIRED[name]
    assert all(len(cell.reason) > 10 for cell in cells.values() if not cell.works)
    assert cells["int8"].size < 0.6 and cells["prune_heads"].size < 1
    assert cells["LoRA"].trained < 0.2 < cells["prune_neurons"].work < 1


def test_the_command_prints_the_cells(capsys):
    wanted = {"int8_weights": "yes", "prune_heads": "yes", "LoRA": "yes", "early_exit": "no"}
    chosen = [part for name in wanted for part in ("--method", name)]
    assert main(["methods", "gpt2_test", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["system", "method", "applies", "effect"]
    cells = [line.split(maxsplit=3) for line in lines[1:]]
    assert [cell[:3] for cell in cells] == [["gpt2", *item] for item in wanted.items()]
    assert "bytes" in cells[0][3] and "trained" in cells[2][3]
    assert cells[3][3] == "GPT2 gives no classes of a whole example"
    assert main(["methods", "vit_test", "--method", "lora"]) == 2
    assert "there are LoRA, DoRA" in capsys.readouterr().err


@pytest.mark.variants
@pytest.mark.parametrize("name", SMALL)
def test_no_cell_fails_for_an_unforeseen_reason(name):
    for column in matrix.COLUMNS:
        matrix.cell(column, traced(name))


@functools.cache
def initialised(name):
    model = zoo.create(name)
    inputs = random_inputs(model)
    bounded = {k: x % 2 for k, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.integer)}
    inputs |= bounded
    return model, inputs, jax.jit(model.init)(jax.random.key(0), **inputs)


@pytest.mark.variants
@pytest.mark.parametrize("column", matrix.COLUMNS)
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_trains_what_it_says_and_merges(name, column):
    if not matrix.cell(column, traced(name)).works:
        pytest.skip("does not apply")
    model, inputs, variables = initialised(name)
    entry = matrix.COLUMNS[column]
    method = entry.method
    adapted = method.adapt(model, variables, jax.random.key(1), [inputs] * method.calibration)
    wrapped = method.wrap(model)
    run = jax.jit(lambda m, v: m.apply(v, **inputs), static_argnums=0)
    got = run(wrapped, adapted)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    if entry.same:
        assert_trees_close(got, run(model, variables), 2e-5)
    if entry.merges:
        plain, merged = method.merge(wrapped, adapted)
        assert_trees_close(run(plain, merged), got, 2e-5)
        zoo.export(plain, merged)

    flat = flatten_dict(adapted["params"], sep="/")
    chosen = {p: x for p, x in flat.items() if method.trains(p) is not False}
    chosen = {p: x for p, x in chosen.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if chosen:

        def loss(chosen):
            params = unflatten_dict({**flat, **chosen}, sep="/")
            return sin_loss(wrapped.apply({**adapted, "params": params}, **inputs))

        slopes = jax.jit(jax.grad(loss))(chosen)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
