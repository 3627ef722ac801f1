"""Distillation of guidance and of steps, on networks whose answers are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.evaluators.modes import sliced_wasserstein
from zoo.inference import Flow, Renoise, sample
from zoo.tasks import Denoising, GuidanceDistillation, StepDistillation

BATCH = {
    "latents": jnp.zeros((6, 2)),
    "corner": jnp.tile(jnp.array([[1.0, 2.0, 0.5]]), (6, 1)),
    "valid": jnp.ones(6, bool),
}


class Point(nn.Module):
    """The clean sample is a point of its own plus a matrix times the condition, always."""

    def example_inputs(self, batch_size=1):
        shapes = {"latents": (batch_size, 2), "times": (batch_size,), "corner": (batch_size, 3)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    @nn.compact
    def __call__(self, latents, times, corner, train=False):
        at = self.param("at", nn.initializers.normal(1.0), (2,))
        matrix = self.param("matrix", nn.initializers.normal(1.0), (3, 2))
        return at + corner @ matrix + 0.0 * latents


def variables(**points):
    """Of networks by name: `at`, or `(at, matrix)`."""
    params = {}
    for name, value in points.items():
        at, matrix = value if isinstance(value, tuple) else (value, jnp.zeros((3, 2)))
        params[name] = {"at": jnp.asarray(at, jnp.float32), "matrix": matrix}
    return {"params": params}


def gradient(task, networks, given, phase, batch=BATCH):
    def value(params):
        return task.loss(networks, {"params": params}, {}, batch, jax.random.key(1), phase)[0]

    return jax.jit(jax.grad(value))(given["params"])


def measured(task, networks, given):
    return jax.jit(lambda v: task.metrics(networks, v, BATCH))(given)


def test_the_student_is_asked_for_what_guidance_makes_of_two_calls():
    task = GuidanceDistillation(Denoising("clean", conditions=("corner",), guidance=3.0))
    networks = {"student": Point(), "teacher": Point()}
    at, matrix = jnp.array([0.5, -1.0]), jnp.arange(6.0).reshape(3, 2) / 4
    same = variables(student=(at, 3 * matrix), teacher=(at, matrix))
    metrics = measured(task, networks, same)
    assert metrics["error"].compute() < 1e-9 < metrics["unguided_error"].compute()
    other = variables(student=(at + jnp.array([2.0, 0.0]), 3 * matrix), teacher=(at, matrix))
    np.testing.assert_allclose(measured(task, networks, other)["error"].compute(), 2.0,
                               rtol=1e-5)  # fmt: skip
    slope = gradient(task, networks, other, "train")
    assert slope["student"]["at"][0] > 0 and not slope["teacher"]["at"].any()


NETWORKS = {name: Point() for name in ("student", "teacher", "fake")}


def test_the_student_is_pushed_from_the_fakes_samples_to_the_teachers():
    task = StepDistillation(Denoising("clean"), steps=3)
    given = variables(student=[1.0, 1.0], teacher=[3.0, 1.0], fake=[1.0, 1.0])
    slope = gradient(task, NETWORKS, given, "student")
    # (fake - teacher) / mean|x0 - teacher| = (-2, 0) / 1, halved by the mean over two numbers
    np.testing.assert_allclose(slope["student"]["at"], [-1.0, 0.0], atol=1e-5)
    assert not slope["teacher"]["at"].any() and not slope["fake"]["at"].any()
    there = variables(student=[3.0, 1.0], teacher=[3.0, 1.0], fake=[3.0, 1.0])
    assert not gradient(task, NETWORKS, there, "student")["student"]["at"].any()
    assert measured(task, NETWORKS, there)["score_distance"].compute() == 0


class Stepwise(Point):
    """A velocity of its own at each of three levels."""

    @nn.compact
    def __call__(self, latents, times, corner, train=False):
        at = self.param("at", nn.initializers.normal(1.0), (3, 2))
        return at[jnp.round(3 - 3 * times / 1000).astype(int)]


@pytest.mark.parametrize("judged, learns", [("last", [2]), ("every", [0, 1, 2])])
def test_the_step_that_is_judged_learns(judged, learns):
    """The last alone, whose outputs are the samples, or all of them."""
    task = StepDistillation(Denoising("flow"), steps=3, judged=judged)
    networks = {name: Stepwise() for name in NETWORKS}
    tables = {
        name: {"at": jnp.full((3, 2), x)} for name, x in zip(NETWORKS, (1.0, 3.0, 2.0), strict=True)
    }
    batch = {name: jnp.repeat(x, 4, 0) for name, x in BATCH.items()}
    slope = gradient(task, networks, {"params": tables}, "student", batch)["student"]["at"]
    assert np.nonzero(np.asarray(slope).any(-1))[0].tolist() == learns


def test_the_fake_learns_what_the_student_makes_and_nothing_else_does():
    task = StepDistillation(Denoising("clean"), steps=3)
    given = variables(student=[1.0, -1.0], teacher=[3.0, 1.0], fake=[2.0, -1.0])
    slope = gradient(task, NETWORKS, given, "fake")
    np.testing.assert_allclose(slope["fake"]["at"], [1.0, 0.0], atol=1e-5)
    assert not slope["student"]["at"].any() and not slope["teacher"]["at"].any()


def test_a_student_that_is_right_gives_its_point_in_few_steps():
    task = StepDistillation(Denoising("clean", sampling_steps=5), steps=2)
    given = variables(student=[1.0, -1.0], teacher=[3.0, 1.0], fake=[0.0, 0.0])
    said = jax.jit(lambda v: task.predict(NETWORKS, v, BATCH))(given)
    np.testing.assert_allclose(said["samples"], np.tile([1.0, -1.0], (6, 1)), atol=1e-5)
    np.testing.assert_allclose(said["teacher_samples"], np.tile([3.0, 1.0], (6, 1)), atol=1e-5)


def test_samples_noised_anew_keep_the_distribution_of_the_data():
    """A perfect student draws from the posterior; then each level has the data's distribution."""
    shape = (4000, 1)

    def posterior(x, times):  # of x0 ~ N(2, 1)
        sigma = times[:, None] / 1000
        alpha = 1 - sigma
        variance = alpha**2 + sigma**2
        mean = 2 + alpha / variance * (x - 2 * alpha)
        key = jax.random.fold_in(jax.random.key(7), times[0].astype(int))
        return mean + sigma / jnp.sqrt(variance) * jax.random.normal(key, shape)

    x = sample(posterior, shape, schedule=Flow(3), solver=Renoise("clean"), rng=jax.random.key(0))
    assert abs(x.mean() - 2) < 0.08 and abs(x.std() - 1) < 0.06


def test_levels_of_a_flow_are_about_their_mean():
    level, _ = Denoising("flow", level_mean=-2.0).levels(jax.random.key(0), 4000)
    logit = np.log(np.asarray(level.sigma, np.float64) / np.asarray(level.alpha, np.float64))
    assert abs(logit.mean() + 2) < 5 / np.sqrt(4000) and abs(logit.std() - 1) < 0.06


def test_guidance_needs_conditions_that_the_batch_has():
    with pytest.raises(ValueError, match="ask for conditions to leave out"):
        Denoising(guidance=2.0)
    task = Denoising("clean", conditions=("text",), guidance=2.0)
    with pytest.raises(ValueError, match="leaves out text, but the batch has only latents"):
        task.predict(Point(), {"params": variables(x=[0.0, 0.0])["params"]["x"]}, BATCH)


def test_dropped_examples_see_zeros_in_training_alone():
    task = Denoising("clean", conditions=("corner",), dropped=1.0)
    own = {"params": variables(x=([0.0, 0.0], jnp.ones((3, 2))))["params"]["x"]}
    keys = jax.random.key(0), jax.random.key(1)
    assert task.losses(Point(), own, BATCH, *keys)[0]["error"].compute() == 0
    assert task.losses(Point(), own, BATCH, keys[0], None)[0]["error"].compute() > 1


def test_the_sliced_distance_is_that_of_a_shift():
    points = np.random.default_rng(0).standard_normal((200, 2))
    assert sliced_wasserstein(points, points[::-1]) < 1e-12
    # the mean over directions of |cos| is 2 / pi
    moved = sliced_wasserstein(points, points + [3.0, 0.0], count=4096)
    assert abs(moved - 3 * 2 / np.pi) < 0.05
    with pytest.raises(ValueError, match="as many points"):
        sliced_wasserstein(points, points[:5])
