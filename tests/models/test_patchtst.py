import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.layers.series import standardise
from zoo.models.timeseries import patchtst
from zoo.tasks import AnomalyDetection, Classification, Forecasting, Imputation


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def apply(model, variables, *inputs):
    return jax.jit(model.apply)(variables, *inputs)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(patchtst.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_patches_overlap_by_half_and_the_last_repeats_the_end():
    found = patchtst.patches(jnp.arange(96.0)[None, None], 16, 8)[0, 0]
    assert found.shape == (12, 16) == (patchtst.patch_count(96, 16, 8), 16)
    for i in range(11):
        np.testing.assert_array_equal(found[i], np.arange(8 * i, 8 * i + 16))
    np.testing.assert_array_equal(found[11], [*range(88, 96), *[95] * 8])
    assert patchtst.patches(jnp.zeros((1, 1, 29)), 16, 8).shape[2] == 3  # JapaneseVowels
    with pytest.raises(ValueError, match="series of 12 steps holds no patch of 16; choose"):
        zoo.create("patchtst_etth1_96_96", context_length=12).init(
            jax.random.key(0), series(1, 12, 7)
        )


def test_a_variate_is_read_alone_by_the_weights_of_all():
    model = zoo.create("patchtst_test")
    variables, x = filled(model), series(2, 24, 5)
    forecast = apply(model, variables, x)
    assert forecast.shape == (2, 12, 5)
    for v in (0, 3):
        alone = apply(model, variables, x[:, :, v : v + 1])
        np.testing.assert_allclose(forecast[:, :, v : v + 1], alone, atol=1e-5)
    assert np.abs(forecast[..., 0] - forecast[..., 1]).max() > 0.1


def test_the_forecast_follows_scale_and_shift_of_each_series():
    model = zoo.create("patchtst_test")
    variables, x = filled(model), series(2, 24, 3)
    scale, shift = jnp.array([0.5, 3, 10]), jnp.array([1.0, -5, 100])
    wanted = scale * apply(model, variables, x) + shift
    got = apply(model, variables, scale * x + shift)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_an_imputer_sees_neither_hidden_values_nor_counts_them():
    model = zoo.create("patchtst_test", horizon=24, masked=True)
    variables, x = filled(model), series(2, 24, 3) + 5
    mask = (series(2, 24, 3, key=1) > -0.5).at[1, :, 2].set(False)
    run = jax.jit(model.apply)
    got = run(variables, jnp.where(mask, x, 0), mask)
    np.testing.assert_array_equal(got, run(variables, jnp.where(mask, x, 99.0), mask))
    assert np.isfinite(got).all()  # of one series nothing was seen
    scaled, mean, deviation = standardise(x, mask)
    seen = np.asarray(x[0, :, 0])[np.asarray(mask[0, :, 0])]
    assert mean[0, 0, 0] == pytest.approx(seen.mean(), rel=1e-5)
    assert deviation[0, 0, 0] == pytest.approx(seen.std(), rel=1e-4)
    assert np.all(scaled[~mask] == 0)


def test_a_mask_that_does_not_fit_is_refused():
    x = series(1, 24, 3)
    with pytest.raises(ValueError, match=r"takes a mask of shape \(1, 24, 3\), not None; give"):
        zoo.create("patchtst_test", masked=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="takes no mask; create it with masked=True"):
        zoo.create("patchtst_test").init(jax.random.key(0), x, x > 0)


TASKS = {
    "forecasting": (Forecasting(), {}, {"target": (12, 3)}),
    "imputation": (Imputation(), {"horizon": 24, "masked": True}, {"target": (24, 3)}),
    "anomaly_detection": (AnomalyDetection(), {"horizon": 24}, {}),
    "classification": (Classification(), {"num_classes": 4}, {"labels": ()}),
}


@pytest.mark.parametrize("name", TASKS)
def test_one_backbone_learns_under_each_task(name):
    """The loss of one batch halves in forty steps, and only its head is another."""
    task, fields, shapes = TASKS[name]
    model = zoo.create("patchtst_test", dropout=0.0, depth=1, **fields)
    batch = {"series": series(16, 24, 3), "valid": np.ones(16, bool)}
    batch |= {key: series(16, *shape, key=1) for key, shape in shapes.items()}
    if "labels" in batch:
        batch["labels"] = jnp.arange(16) % 4
    if "mask" in model.example_inputs():
        batch["target"], batch["mask"] = batch["series"], series(16, 24, 3, key=2) > -0.5
    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(key):
        variables = model.init(key, **task.init_inputs(model))

        def step(carry, _):
            variables, state = carry

            def loss(params):
                return task.loss(model, {**variables, "params": params}, batch, key, train=True)

            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(variables["params"], updates)
            return ({"params": params, **aux["collections"]}, state), value

        start = (variables, optimizer.init(variables["params"]))
        (variables, _), losses = jax.lax.scan(step, start, length=40)
        return variables, losses

    variables, losses = run(jax.random.key(0))
    assert losses[-1] < losses[0] / 2
    assert np.abs(variables["batch_stats"]["norm"]["mean"]).max() > 0
    backbone = {k: jax.tree.map(jnp.shape, v) for k, v in variables["params"].items()}
    del backbone["head"]
    plain = zoo.create("patchtst_test", depth=1)
    wanted = jax.eval_shape(plain.init, jax.random.key(0), series(1, 24, 3))["params"]
    assert backbone == {k: jax.tree.map(jnp.shape, v) for k, v in wanted.items() if k != "head"}


def test_official_names_of_both_heads_come_back():
    classifier = zoo.create("patchtst_test", num_classes=4)
    variables = filled(classifier)
    state = zoo.export(classifier, variables, "classifier")
    assert state["projection.weight"].shape == (4, 3 * 32 * 6)
    again = zoo.convert(classifier, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert "head.linear.weight" in zoo.export("patchtst_test", filled(zoo.create("patchtst_test")))
