import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, feature_shapes

import kernels_pallas
import zoo
from zoo.models.incontext import icl_linear as theory


def prompts(rng, batch, points, covariance):
    dims = len(covariance)
    root = np.linalg.cholesky(covariance)
    xs = rng.standard_normal((batch, points, dims)) @ root.T
    weights = rng.standard_normal((batch, dims))
    return xs.astype("f"), np.einsum("bpd,bd->bp", xs, weights).astype("f")


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(theory.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


@pytest.fixture(scope="module")
def generic():
    """A layer with weights everywhere, and prompts."""
    rng = np.random.default_rng(0)
    model = zoo.create("icl_linear_d5", dims=3)
    shapes = {"kq": (4, 4), "pv": (4, 4)}
    params = {k: rng.standard_normal(s).astype("f") for k, s in shapes.items()}
    return model, {"params": params}, prompts(rng, 2, 6, np.eye(3))


def test_every_prediction_is_the_last_entry_of_the_layer_on_its_prefix(generic):
    model, variables, (xs, ys) = generic
    got = model.apply(variables, xs, ys)
    for i in range(1, 6):
        labels = np.where(np.arange(i + 1) < i, ys[:, : i + 1], 0)
        tokens = np.concatenate([xs[:, : i + 1], labels[..., None]], -1)
        want = theory.attend(tokens, *variables["params"].values(), i)[:, -1, -1]
        assert_trees_close(got[:, i], want, 1e-5)


def test_the_layer_is_linear_attention_of_all_to_all(generic):
    _, variables, (xs, ys) = generic
    tokens = np.concatenate([xs, ys[..., None]], -1)
    kq, pv = variables["params"].values()
    query, key, value = ((tokens @ m)[:, :, None] for m in (kq.T, np.eye(4, dtype="f"), pv.T))
    _, total = kernels_pallas.gated_linear_attention(query, key, value, None, scale=1.0)
    attended = jnp.einsum("blhd,bhde->blhe", query, total)[:, :, 0]
    assert_trees_close(theory.attend(tokens, kq, pv, 5), tokens + attended / 5, 1e-5)


def test_only_the_last_row_and_the_first_columns_have_gradients(generic):
    model, variables, (xs, ys) = generic
    grads = jax.grad(lambda v: jnp.sin(model.apply(v, xs, ys)).sum())(variables)["params"]
    assert not np.any(grads["pv"][:-1]) and np.all(grads["pv"][-1])
    assert not np.any(grads["kq"][:, -1]) and np.all(grads["kq"][:, :-1])


ANISOTROPIC = np.diag([2.0, 1.0, 0.5, 0.25])


@pytest.mark.parametrize("covariance", [np.eye(3), ANISOTROPIC], ids=["round", "long"])
def test_gradient_flow_ends_at_the_minimum(covariance):
    """The paper's theorem: both blocks within 1 % of the closed form, from a small start."""
    u, matrix = theory.gradient_flow(covariance, 20, steps=6000)[-1]
    kq, pv = theory.minimum(covariance, 20)
    np.testing.assert_allclose(u, pv[-1, -1], rtol=0.01)
    np.testing.assert_allclose(matrix, kq[:-1, :-1], atol=0.01 * np.abs(kq).max())
    best = theory.reduced_loss(pv[-1, -1], kq[:-1, :-1], covariance, 20)
    assert best <= theory.reduced_loss(u, matrix, covariance, 20) < best + 0.01 * abs(best)


def test_the_flow_conserves_the_balance_of_its_blocks():
    u, matrix = theory.gradient_flow(ANISOTROPIC, 20, steps=4000)[-1]
    assert abs(u**2 - np.sum(matrix**2)) < 0.01 * u**2


def test_the_layer_itself_flows_there_on_drawn_prompts():
    """Stochastic gradients of the module end within 5 % of the least population loss."""
    covariance, examples = np.diag([1.0, 0.5]), 12
    model = zoo.create("icl_linear_d5", dims=2, start=0.3)
    xs, ys = prompts(np.random.default_rng(0), 256 * 300, examples + 1, covariance)
    xs, ys = xs.reshape(300, 256, -1, 2), ys.reshape(300, 256, -1)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 300))

    def loss(variables, x, y):
        return 0.5 * ((model.apply(variables, x, y)[:, -1] - y[:, -1]) ** 2).mean()

    @jax.jit
    def train(variables):
        def step(carry, batch):
            variables, state = carry
            grads = jax.grad(loss)(variables, *batch)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, optimizer.init(variables)), (xs, ys))[0][0]

    params = train(model.init(jax.random.key(0), xs[0, :1], ys[0, :1]))["params"]
    kq, pv = theory.minimum(covariance, examples)
    constant = np.trace(covariance) / 2
    least = constant + theory.reduced_loss(pv[-1, -1], kq[:-1, :-1], covariance, examples)
    u, matrix = float(params["pv"][-1, -1]), np.asarray(params["kq"], float)[:-1, :-1]
    reached = constant + theory.reduced_loss(u, matrix, covariance, examples)
    assert least <= reached < 1.05 * least


def measured(covariance, weights, trained_on, examples, length, count):
    """The squared error of the trained layer on drawn prompts, and its standard error.

    The layer is linear in the query, so that unit queries tell the mean over all queries.
    """
    dims = len(covariance)
    rng = np.random.default_rng(1)
    xs = rng.standard_normal((count, length, dims)) @ np.linalg.cholesky(covariance).T
    ys = xs @ weights
    ys = np.concatenate([ys, np.zeros((count, 1))], 1).astype("f")
    kq, pv = (m.astype("f") for m in theory.minimum(trained_on, examples))
    model = zoo.create("icl_linear_d5", dims=dims)
    call = jax.jit(lambda x, y: model.apply({"params": {"kq": kq, "pv": pv}}, x, y)[:, -1])
    said = [
        call(np.concatenate([xs, np.tile(unit, (count, 1, 1))], 1).astype("f"), ys)
        for unit in np.eye(dims)
    ]
    missed = np.stack(said, 1) - weights
    errors = np.einsum("bi,ij,bj->b", missed, covariance, missed)
    return errors.mean(), errors.std() / count**0.5


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_error_under_covariate_shift_is_the_formula(factor):
    """Within 2 %, which is four standard errors or more of what is measured."""
    fixed = dict(trained_on=np.eye(2), examples=20, length=20)
    weights = np.array([1.0, 0.5])
    got, deviation = measured(factor * np.eye(2), weights, count=120_000, **fixed)
    want = theory.expected_error(factor * np.eye(2), weights, **fixed)
    assert 4 * deviation < 0.02 * want
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_long_prompts_help_unless_the_covariance_has_changed():
    """The paper's brittleness: noise and new tasks are tolerated, other covariances are not."""
    error = lambda factor, length, noise=0.0: theory.expected_error(  # noqa: E731
        factor * np.eye(3), None, trained_on=np.eye(3), examples=10_000, length=length, noise=noise
    )
    assert error(1, 10_000) < 0.01 * error(1, 20)
    np.testing.assert_allclose(error(1, 10_000, noise=0.5), 0.25, rtol=0.02)
    zero = 4 * 3  # the error of saying 0
    assert error(4, 10_000) > zero  # it says four times too much: worse than nothing
    np.testing.assert_allclose(error(4, 10_000), (4 - 1) ** 2 * zero, rtol=0.02)


def test_a_random_covariance_leaves_an_error_that_prompts_do_not_remove():
    rng = np.random.default_rng(0)
    drawn = rng.exponential(1.0, (100_000, 2))
    preconditioner = theory.random_covariance_minimum(drawn, 10**6)
    np.testing.assert_allclose(preconditioner, 2 / 6, rtol=0.05)  # E L^2 / E L^3 = 2 / 6
    left = ((drawn * preconditioner - 1) ** 2 * drawn).sum(1).mean()
    assert left > 0.2 * drawn.sum(1).mean()
    fixed = theory.random_covariance_minimum(np.ones((10, 2)), 20)
    np.testing.assert_allclose(fixed, np.diag(np.linalg.inv(theory.gamma(np.eye(2), 20))))
