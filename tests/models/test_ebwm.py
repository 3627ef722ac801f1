"""Energy-based transformers: who sees whom, and that steps go downhill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.models.control import ebwm
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


def test_the_contrastive_loss_is_the_cross_entropy_of_both_energies():
    true, refined = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[1, 2, 0, 3, 4]] * 3)
    each = jax.nn.log_softmax(-jnp.stack([true, refined], -1))[..., 0]
    wanted = -each[targets != 0].mean()
    got = ebwm.contrastive_loss(true, refined, targets)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_gradient_is_normed_on_its_way_back_and_the_output_is_not():
    x, scale = jnp.array([[3.0, 4.0]]), jnp.array([2.0, 2.0])
    y, back = jax.vjp(lambda x: ebwm.norm_of_gradient(x, scale, 0.0), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(back(jnp.array([[3.0, 4.0]]))[0], 2 * x / 12.5**0.5, rtol=1e-6)


def test_modulation_that_starts_at_zero_gives_no_energy_and_other_steps_other_energies():
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    energies = {}
    for kind in ("adaln", "adaln_zero"):
        model = ebwm.EnergyTransformer(8, 1, 2, conditioning=kind, max_steps=2)
        variables = model.init(jax.random.key(1), *x)
        energies[kind] = [model.apply(variables, *x, step) for step in range(2)]
    assert not np.any(energies["adaln_zero"])
    assert np.abs(energies["adaln"][0] - energies["adaln"][1]).max() > 1e-3
