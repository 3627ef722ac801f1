"""Clipped softmax and gates on whole models."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from methods.test_lora import moved

import zoo
from zoo.methods import LoRA, QuietAttention, adapt_all, wrap_all
from zoo.methods.quiet_attention import quantised
from zoo.tasks.apply import zeros_like_inputs


def made(name):
    model = zoo.create(name)
    inputs = zeros_like_inputs(model, 2)
    inputs = {k: (x.at[:, ::2].set(1) if x.ndim == 2 else x + 1) for k, x in inputs.items()}
    return model, inputs, jax.jit(model.init)(jax.random.key(0), **inputs)


@pytest.mark.parametrize("name", ["bert_test", "opt_test"])
def test_without_clipping_it_is_the_softmax(name):
    model, inputs, variables = made(name)
    wrapped = QuietAttention().wrap(model)
    wanted = jax.jit(lambda v: model.apply(v, **inputs))(variables)
    got = jax.jit(lambda v: wrapped.apply(v, **inputs))(variables)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_an_open_gate_changes_nothing_and_a_linear_one_has_a_width_and_one_per_head():
    model, inputs, variables = made("bert_test")
    method = QuietAttention(gate="linear")
    adapted = method.adapt(model, variables, jax.random.key(1))
    before = flatten_dict(variables["params"], sep="/")
    after = flatten_dict(adapted["params"], sep="/")
    added = sum(after[path].size for path in set(after) - set(before))
    assert added == model.depth * model.num_heads * (model.embed_dim // model.num_heads + 1)
    opened = jax.tree_util.tree_map_with_path(
        lambda keys, x: x + 30 if "gate_bias" in jax.tree_util.keystr(keys) else x, adapted
    )
    wanted = jax.jit(lambda v: model.apply(v, **inputs))(variables)
    got = jax.jit(lambda v: method.wrap(model).apply(v, **inputs))(opened)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_keeps_its_own_numbers_and_errs_by_half_a_step(symmetric):
    x = jax.random.normal(jax.random.key(0), (50,))
    y, _, step, _ = quantised(x, x.min(), x.max(), symmetric=symmetric)
    assert np.abs(y - x).max() <= step * 0.5001
    again = quantised(y, x.min(), x.max(), symmetric=symmetric)[0]
    np.testing.assert_allclose(again, y, atol=1e-6)


@pytest.mark.slow
def test_lora_of_attention_is_seen_by_another_softmax_in_either_order():
    model, inputs, variables = made("bert_test")
    outputs = []
    for methods in ((LoRA(2), QuietAttention(gamma=-0.1)), (QuietAttention(gamma=-0.1), LoRA(2))):
        adapted = moved(adapt_all(model, variables, methods, jax.random.key(1)))
        wrapped = wrap_all(model, methods)
        outputs.append(jax.jit(lambda v, w=wrapped: w.apply(v, **inputs))(adapted))
    without = QuietAttention(gamma=-0.1).wrap(model)
    plain = jax.jit(lambda v: without.apply(v, **inputs))(variables)
    assert np.abs(outputs[0] - plain).max() > 1e-2
    assert np.abs(outputs[1] - plain).max() > 1e-2
