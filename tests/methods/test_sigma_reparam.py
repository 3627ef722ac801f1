"""Sigma-reparametrisation: nothing at first, a spectral norm that is learned, scale invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.test_lora import random_inputs
from model_helpers import assert_trees_close

import zoo
from zoo.methods import SigmaReparam, WithoutNorms, adapt_all, wrap_all
from zoo.methods.sigma_reparam import attention_entropy, power_iteration


def reparametrised(*methods):
    model, methods = zoo.create("vit_test"), methods or (SigmaReparam(),)
    inputs = random_inputs(model)
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    adapted = adapt_all(model, variables, methods, jax.random.key(1))
    run = jax.jit(lambda m, v: m.apply(v, **inputs), static_argnums=0)
    return model, variables, wrap_all(model, methods), adapted, run, inputs


def test_it_is_nothing_at_first_and_merges_into_the_matrices():
    model, variables, wrapped, adapted, run, _ = reparametrised()
    assert_trees_close(run(wrapped, adapted), run(model, variables), 1e-5)
    plain, merged = SigmaReparam().merge(wrapped, adapted)
    assert plain == model
    assert_trees_close(run(plain, merged), run(model, variables), 1e-5)


@pytest.mark.slow
def test_outputs_do_not_depend_on_the_size_of_matrices():
    _, _, wrapped, adapted, run, _ = reparametrised()
    larger = jax.tree_util.tree_map_with_path(
        lambda keys, x: 3 * x if "kernel" in jax.tree_util.keystr(keys) else x, adapted
    )
    assert_trees_close(run(wrapped, larger), run(wrapped, adapted), 1e-5)


def test_the_vector_follows_the_matrix_in_training_only():
    _, _, wrapped, adapted, _, inputs = reparametrised()
    moved = jax.tree_util.tree_map_with_path(
        lambda keys, x: x + jax.random.normal(jax.random.key(3), x.shape) * x.std()
        if "kernel" in jax.tree_util.keystr(keys) else x, adapted
    )  # fmt: skip
    _, changed = jax.jit(lambda v: wrapped.apply(v, **inputs, train=True, mutable=["batch_stats"]))(
        moved
    )
    for old, new in zip(*map(jax.tree.leaves, (moved["batch_stats"], changed["batch_stats"])),
                        strict=True):  # fmt: skip
        assert np.abs(old - new).max() > 1e-4
        np.testing.assert_allclose(np.linalg.norm(new), 1, rtol=1e-5)


def test_fifty_iterations_give_the_spectral_norm():
    kernel = jax.random.normal(jax.random.key(0), (12, 7))
    u = jnp.ones(12) / 12**0.5
    for _ in range(50):
        norm, u = power_iteration(kernel, u)
    np.testing.assert_allclose(norm, np.linalg.norm(kernel, 2), rtol=1e-4)
    # the gradient is that of the norm, though the vectors are constants
    slope = jax.grad(lambda kernel: power_iteration(kernel, u)[0])(kernel)
    left, _, right = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(slope, np.outer(left[:, 0], right[0]), atol=1e-3)


def test_entropy_is_the_log_of_the_keys_for_even_weights_and_falls():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    even = attention_entropy(jax.nn.softmax(0 * scores))
    np.testing.assert_allclose(even, np.log(8), rtol=1e-6)
    sharp = attention_entropy(jax.nn.softmax(1000 * scores))
    assert sharp.max() < 0.1 and np.isfinite(sharp).all()


def test_norms_are_taken_out_with_their_leaves():
    _, _, wrapped, adapted, run, _ = reparametrised(WithoutNorms(), SigmaReparam())
    paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(adapted)]
    assert not any("norm" in path for path in paths) and any("gamma" in p for p in paths)
    assert np.isfinite(run(wrapped, adapted)).all()
