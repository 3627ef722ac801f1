"""The tasks of series: the same backbone under each, with a head of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.tasks import AnomalyDetection, Classification, Forecasting, Imputation
from zoo.tasks.apply import zeros_like_inputs

SIZES = {"dropout": 0.0, "depth": 1}
ENCODER = {"decoder_depth": 0, "time_features": 0, **SIZES}
SYSTEMS = {
    "patchtst_test": {
        "forecasting": SIZES,
        "imputation": {"horizon": 24, "masked": True, **SIZES},
        "anomaly_detection": {"horizon": 24, **SIZES},
        "classification": {"num_classes": 4, **SIZES},
    },
    "informer_test": {
        "imputation": {"horizon": 24, **ENCODER},
        "anomaly_detection": {"horizon": 24, **ENCODER},
        "classification": {"num_classes": 4, **ENCODER},
    },
    # weights for each variate, which can learn sixteen windows by heart
    "dlinear_test": {
        "forecasting": {"context_length": 24, "horizon": 24, "individual": True},
        "imputation": {"context_length": 24, "horizon": 24, "individual": True},
        "anomaly_detection": {"context_length": 24, "horizon": 24, "individual": True},
        "classification": {"context_length": 24, "num_classes": 4, "individual": True},
    },
}
TASKS = {
    "forecasting": Forecasting(),
    "imputation": Imputation(),
    "anomaly_detection": AnomalyDetection(),
    "classification": Classification(),
}


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def batch_of(name, model):
    """Sixteen windows of noise, and what the task asks of them."""
    batch = {"series": series(16, 24, 3), "valid": np.ones(16, bool)}
    match name:
        case "forecasting":
            batch["target"] = series(16, model.horizon, 3, key=1)
        case "imputation":
            mask = series(16, 24, 3, key=2) > -0.5
            target = batch["series"]
            batch |= {"target": target, "mask": mask, "series": jnp.where(mask, target, 0)}
        case "classification":
            batch["labels"] = jnp.arange(16) % 4
    return batch


@pytest.mark.parametrize(
    "system, name", [(system, task) for system, tasks in SYSTEMS.items() for task in tasks]
)
def test_one_backbone_learns_under_each_task(system, name):
    """The loss of one batch halves in forty steps, and only its head is another."""
    fields, task = SYSTEMS[system][name], TASKS[name]
    model = zoo.create(system, **fields)
    batch, optimizer = batch_of(name, model), optax.adam(2e-2)

    @jax.jit
    def run(key):
        variables = task.init(model, key)

        def step(carry, _):
            variables, state = carry

            def loss(params):
                return task.loss(model, {**variables, "params": params}, {}, batch, key, "train")

            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(variables["params"], updates)
            return ({"params": params, **aux.collections}, state), value

        start = (variables, optimizer.init(variables["params"]))
        (variables, _), losses = jax.lax.scan(step, start, length=40)
        return variables, losses

    variables, losses = run(jax.random.key(0))
    assert losses[-1] < losses[0] / 2, losses
    for statistics in jax.tree.leaves(variables.get("batch_stats", {})):
        assert np.abs(statistics).max() > 0
    plain = zoo.create(system, **{k: v for k, v in fields.items() if k in ("depth", "individual")},
                       context_length=24, horizon=24)  # fmt: skip
    wanted = shapes(jax.eval_shape(lambda: plain.init(jax.random.key(0), **zeros(plain))))
    backbone = {k: v for k, v in shapes(variables).items() if not k.startswith("head")}
    assert backbone.items() <= wanted.items()


def zeros(model):
    return zeros_like_inputs(model)


def shapes(variables):
    leaves = jax.tree.leaves_with_path(variables["params"])
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}
