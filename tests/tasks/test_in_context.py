"""Learning in context as a task, and its curves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.data.functions import Prompts, baselines, prompt_data
from zoo.data.functions.continuous import Linear
from zoo.data.functions.known import Bayes
from zoo.data.functions.prompts import batch
from zoo.evaluators import LearningCurves
from zoo.tasks import InContext
from zoo.training import Model, Optimizer, TrainConfig, train

SIZE = {"dims": 2, "max_points": 6, "embed_dim": 16, "num_heads": 2}


def prompts():
    examples = batch(Prompts(Linear(noise=0.5), 4, points=6, dims=2), 0, 4)
    return {**examples, "valid": np.array([True, True, True, False])}


@pytest.mark.parametrize("against, skip", [("ys", 0), ("targets", 2)])
def test_the_loss_is_the_mean_over_points_that_count(against, skip):
    model = zoo.create("icl_sequential_test", **SIZE)
    task, examples = InContext(against=against, skip=skip), prompts()
    examples["weights"][:, -1] = 0
    variables = task.init(model, jax.random.key(0))
    loss, aux = task.loss(model, variables, {}, examples, jax.random.key(0), "train")
    said = model.apply(variables, examples["xs"], examples["ys"])
    want = ((said - examples[against]) ** 2)[:3, skip:-1].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    held_out = task.metrics(model, variables, examples)
    np.testing.assert_allclose(held_out["mse"].compute(), want, rtol=1e-5)
    assert aux.metrics["loss"].count == 3 * (5 - skip)


@pytest.mark.slow
def test_losses_of_all_loops_are_averaged_and_the_last_one_predicts():
    model = zoo.create("looped_linear", **SIZE, loops=3, window=2)
    task, examples = InContext(), prompts()
    variables = task.init(model, jax.random.key(0))
    said = model.apply(variables, examples["xs"], examples["ys"])
    loss, _ = task.loss(model, variables, {}, examples, jax.random.key(0), "train")
    want = ((said - examples["ys"][:, None]) ** 2)[:3].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    predicted = task.predict(model, variables, examples)["prediction"]
    np.testing.assert_allclose(predicted, said[:, -1], rtol=0, atol=1e-5 * np.abs(said).max())


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
def test_other_losses(kind):
    name = {"logistic": "icl_boolean_test", "gaussian": "icl_uncertainty_test"}[kind]
    size = SIZE | ({"max_tokens": 12} if kind == "logistic" else {})
    if kind == "logistic":
        del size["max_points"]
    model, task, examples = zoo.create(name, **size), InContext(kind), prompts()
    examples["ys"] = np.sign(examples["ys"]) if kind == "logistic" else examples["ys"]
    variables = task.init(model, jax.random.key(0))
    said = model.apply(variables, examples["xs"], examples["ys"])
    if kind == "logistic":
        each = jnp.log1p(jnp.exp(-examples["ys"] * said))
    else:
        mean, spread = said[..., 0], said[..., 1]
        each = spread + (examples["ys"] - mean) ** 2 / (2 * jnp.exp(2 * spread))
    loss = task.metrics(model, variables, examples)["loss"].compute()
    np.testing.assert_allclose(loss, each[:3].mean(), rtol=1e-5)


@pytest.mark.slow
def test_several_learners_train_side_by_side_and_leave_their_curves(tmp_path):
    models = {
        "standard": Model("looped_standard", {**SIZE, "depth": 1}),
        "algoformer": Model("algoformer_111", {**SIZE, "loops": 2, "window": 1}),
    }
    references = {"least_squares": baselines.least_squares, "far/averaging": baselines.averaging}
    far = Prompts(Linear(scale=3.0), 8, 6, 2)
    config = TrainConfig(
        model=models,
        task=InContext(networks=tuple(models)),
        data=prompt_data(Linear(), points=6, dims=2, steps=2, batch_size=8, held_out=8),
        optimizer=Optimizer("adam", 1e-3),
        evaluators=(LearningCurves({"far": far}, references, prompts=4, after=4),),
        num_steps=2,
        checkpoint=dataclasses.replace(TrainConfig.checkpoint, metric="standard_loss", mode="min"),
    )
    result = train(config, tmp_path)
    curves = json.loads((tmp_path / "learning_curves.json").read_text())
    assert set(curves["standard"]) == {"standard", "algoformer", "least_squares"}
    assert set(curves["far"]) == set(curves["standard"]) | {"averaging"}
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000
    line = curves["far"]["algoformer"]
    assert len(line) == 6 and np.isfinite(line).all()
    np.testing.assert_allclose(result.metrics["far/algoformer"], np.mean(line[4:]))
    assert result.metrics["standard/least_squares"] < 1e-6


def test_beliefs_are_compared_by_their_likelihood():
    evaluator = LearningCurves(references={"bayes": Bayes((0.5,))}, kind="gaussian", against="ys")
    source = Prompts(Linear(noise=0.5), 200, 6, 2)
    examples = batch(source, 0, 200)
    nothing = np.stack([np.zeros((200, 6)), np.full((200, 6), 0.5 * np.log(2.25))], -1)
    curves = evaluator._curves("standard", examples, {"prior": nothing})
    assert np.mean(curves["bayes"]) < np.mean(curves["prior"])
    np.testing.assert_allclose(curves["bayes"][0], curves["prior"][0], atol=0.3)
