"""Layers that are left out, early exits, and tokens that stay behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.test_prune import made, run
from model_helpers import assert_trees_close

import zoo
from zoo.methods import EarlyExit, LayerDrop, TokenPruning
from zoo.methods.compress import entropy

CLASSES = {"head": "classification", "num_classes": 4, "dropout": 0.0, "attention_dropout": 0.0}


def test_dropped_layers_are_gone_in_the_merged_model():
    model, inputs, variables = made("vit_test")
    method = LayerDrop(drop=(1,))
    wrapped = method.wrap(model)
    adapted = method.adapt(model, variables, jax.random.key(0))
    plain, merged = method.merge(wrapped, adapted)
    assert plain.depth == model.depth - 1
    got = run(wrapped, adapted, inputs)
    assert_trees_close(got, run(plain, merged, inputs), 1e-6)
    assert np.abs(got - run(model, variables, inputs)).max() > 1e-4
    with pytest.raises(ValueError, match="the blocks are 0 to 1"):
        LayerDrop(drop=(7,)).adapt(model, variables, jax.random.key(0))


@pytest.mark.slow
def test_layers_are_dropped_in_training_alone_and_the_rate_says_how_many():
    model, inputs, variables = made("vit_test")

    def trained(rate, train):
        rngs = {"dropout": jax.random.key(1)} if train else {}
        wrapped = LayerDrop(rate).wrap(model)
        return jax.jit(lambda v: wrapped.apply(v, **inputs, train=train, rngs=rngs))(variables)

    plain = run(model, variables, inputs)
    assert_trees_close(trained(0.5, False), plain, 1e-6)
    every = LayerDrop(drop=(0, 1)).wrap(model)
    assert_trees_close(trained(1.0, True), run(every, variables, inputs), 1e-6)


def exits(method, name="bert_test"):
    model, inputs, variables = made(name, **(CLASSES if name == "bert_test" else {}))
    adapted = method.adapt(model, variables, jax.random.key(1))
    wrapped = method.wrap(model)
    out = jax.jit(lambda v: wrapped.apply(v, **inputs, method="features"))(adapted)
    return out, run(model, variables, inputs), (wrapped, adapted, inputs)


@pytest.mark.slow
def test_no_limit_is_the_whole_model_and_an_endless_one_the_first_layer():
    out, whole, (wrapped, adapted, _) = exits(EarlyExit(0.0))
    np.testing.assert_array_equal(out["logits"], whole)
    assert (out["exit_layer"] == len(out["exits"]) - 1).all()
    _, merged = EarlyExit(0.0).merge(wrapped, adapted)
    assert "exit_0_kernel" not in merged["params"]
    first = exits(EarlyExit(float("inf")))[0]
    np.testing.assert_array_equal(first["logits"], first["exits"][0])
    depths = []
    for limit in np.quantile(np.asarray(entropy(out["exits"])), [0, 0.5, 1]):
        depths.append(float(exits(EarlyExit(float(limit) + 1e-6))[0]["exit_layer"].mean()))
    assert depths == sorted(depths, reverse=True)


@pytest.mark.slow
def test_training_learns_from_every_exit():
    _, _, (wrapped, adapted, inputs) = exits(EarlyExit(patience=1))
    rngs = {"dropout": jax.random.key(0)}

    def total(v):
        return sum(jnp.sum(y**2) for y in wrapped.apply(v, **inputs, train=True, rngs=rngs))

    slope = jax.jit(jax.grad(total))(adapted)["params"]
    assert all(np.abs(slope[f"exit_0_{leaf}"]).max() > 0 for leaf in ("kernel", "bias"))


def test_words_have_no_exit():
    model, _, variables = made("gpt2_test")
    with pytest.raises(ValueError, match="no classes of a whole example"):
        EarlyExit().adapt(model, variables, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, fields",
    [("vit_test", {}), pytest.param("bert_test", CLASSES, marks=pytest.mark.variants)],
)
def test_tokens_that_stay_are_those_that_are_seen(name, fields):
    model, inputs, variables = made(name, **fields)
    inputs |= {k: jnp.ones_like(x) for k, x in inputs.items() if k == "mask"}
    plain = run(model, variables, inputs)
    every = TokenPruning(((0, 1.0),))
    every.adapt(model, variables, jax.random.key(0))
    assert_trees_close(run(every.wrap(model), variables, inputs), plain, 1e-6)
    half = TokenPruning(((0, 0.5),)).wrap(model)
    out = jax.jit(lambda v: half.apply(v, **inputs, method="features"))(variables)
    lengths = {k: x.shape[1] for k, x in out.items() if k.startswith("layer") and x.ndim == 3}
    prefix = max(getattr(model, "num_prefix", 0), 1)
    whole = next(iter(run_features(model, variables, inputs).values())).shape[1]
    if lengths:
        assert lengths["layer0"] == prefix + round(0.5 * (whole - prefix))
    assert np.isfinite(out["logits"]).all() and np.abs(out["logits"] - plain).max() > 1e-6


def run_features(model, variables, inputs):
    out = jax.jit(lambda v: model.apply(v, **inputs, method="features"))(variables)
    return {k: x for k, x in out.items() if x.ndim == 3}


@pytest.mark.slow
def test_padding_goes_first():
    model, inputs, variables = made("bert_test", **CLASSES)
    mask = jnp.arange(inputs["mask"].shape[1]) < 20
    inputs = inputs | {"mask": jnp.broadcast_to(mask, inputs["mask"].shape).astype(jnp.int32)}
    some = TokenPruning(((0, 0.5),)).wrap(model)  # 33 of 64 tokens: all 20 that are text
    got = run(some, variables, inputs)
    assert_trees_close(got, run(model, variables, inputs), 1e-5)


def test_a_model_that_reads_every_token_is_refused():
    model, _, variables = made("gpt2_test")
    with pytest.raises(ValueError, match="reads off every token"):
        TokenPruning().adapt(model, variables, jax.random.key(0))
    assert zoo.create("gpt2_test") == model
