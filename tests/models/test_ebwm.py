"""Energy-based transformers: who sees whom, and that steps go downhill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.models.control.ebwm import EnergyTransformer, refinement_loss


@pytest.fixture(scope="module", params=["default", "time_embed"])
def body(request):
    model = EnergyTransformer(32, 2, 4, conditioning=request.param, length=5)
    tokens, candidates = jax.random.normal(jax.random.key(0), (2, 3, 5, 32))
    variables = jax.jit(model.init)(jax.random.key(1), tokens, candidates)
    return jax.jit(lambda o, p: model.apply(variables, o, p)), tokens, candidates


def test_a_candidate_changes_its_own_energy_alone(body):
    energy, tokens, candidates = body
    before = energy(tokens, candidates)
    after = energy(tokens, candidates.at[:, 2].add(1.0))
    changed = np.abs(after - before).max(0) > 1e-5
    assert changed.tolist() == [False, False, True, False, False]


def test_a_token_changes_no_energy_before_it(body):
    energy, tokens, candidates = body
    before = energy(tokens, candidates)
    after = energy(tokens.at[:, 2].add(1.0), candidates)
    changed = np.abs(after - before).max(0) > 1e-5
    assert changed.tolist() == [False, False, True, True, True]


def test_energies_in_parallel_are_those_one_by_one(body):
    energy, tokens, candidates = body
    together = energy(tokens, candidates)
    for i in (1, 3):
        alone = energy(tokens[:, : i + 1], candidates[:, : i + 1])
        np.testing.assert_allclose(alone[:, i], together[:, i], atol=1e-5)


@pytest.mark.slow
def test_small_steps_lower_the_energy():
    model = zoo.create("ebt_test", alpha=0.05, steps=3, conditioning="default", normalise="never")
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)
    rngs = {"params": jax.random.key(1), "sample": jax.random.key(2)}
    variables = jax.jit(model.init)(rngs, tokens)
    run = jax.jit(lambda v: model.apply(
        v, tokens, rngs={"sample": jax.random.key(3)}, method="features"))  # fmt: skip
    energy = run(variables)["energy"]
    falls = energy[:, 1:] < energy[:, :-1]
    assert falls.mean() > 0.95


@pytest.mark.slow
def test_the_loss_is_differentiated_through_the_steps():
    model = zoo.create("ebt_test", detach=False)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 1, 11)
    variables = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])

    def loss(params, targets):
        out = model.apply({"params": params}, tokens[:, :-1], method="features")
        return refinement_loss(out["refined"], targets)[0]

    grads = jax.jit(jax.grad(loss))(variables["params"], tokens[:, 1:])
    assert float(jnp.abs(grads["alpha"])) > 0
    wq = grads["transformer"]["layers_0"]["attention"]["query"]["kernel"]
    assert np.isfinite(wq).all() and np.abs(wq).max() > 0
    padded = jax.jit(loss)(variables["params"], jnp.zeros((2, 6), int))
    assert float(padded) == 0.0
