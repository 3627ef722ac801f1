import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data.sources import Digits
from zoo.evaluators import ClassifierFeatures
from zoo.evaluators.pictures import frechet_distance
from zoo.layers.dense import Dense
from zoo.models.imaging.styleswin import ScaledConv
from zoo.tasks import Adversarial
from zoo.tasks.task import of_network


class Generator(nn.Module):
    def example_inputs(self, batch_size=1):
        return {"latents": jax.ShapeDtypeStruct((batch_size, 3), jnp.float32)}

    @nn.compact
    def __call__(self, latents, train=False):
        x = Dense(5, name="layers_0")(latents)
        x = nn.BatchNorm(not train, momentum=0.5, name="norm")(x)
        return Dense(2, name="head")(x)


class Discriminator(nn.Module):
    """Two matrices with StyleSwin's spectral normalization."""

    def example_inputs(self, batch_size=1):
        return {"points": jax.ShapeDtypeStruct((batch_size, 2), jnp.float32)}

    @nn.compact
    def __call__(self, points, train=False):
        x = ScaledConv(6, 0, spectral=True, name="layers_0")(points, train)
        return ScaledConv(1, 0, spectral=True, activate=False, name="head")(x, train)


NETWORKS = {"generator": Generator(), "discriminator": Discriminator()}
BATCH = {"points": jnp.arange(8.0).reshape(4, 2), "valid": jnp.ones(4, bool)}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda key: Adversarial().init(NETWORKS, key))(jax.random.key(0))


def loss(task, variables, phase):
    run = jax.jit(lambda v: task.loss(NETWORKS, v, {}, BATCH, jax.random.key(1), phase))
    return run(variables)


@pytest.mark.parametrize("phase, calls", [("discriminator", 2), ("generator", 1)])
def test_what_networks_keep_takes_a_step_with_every_call(variables, phase, calls):
    """Singular vectors of the first matrix: as many steps of the power method as calls."""
    kept = loss(Adversarial(r1=0.5), variables, phase)[1].collections["batch_stats"]
    assert jax.tree.structure(kept) == jax.tree.structure(dict(variables["batch_stats"]))
    matrix = np.asarray(variables["params"]["discriminator"]["layers_0"]["raw_kernel"]).T
    u = np.asarray(variables["batch_stats"]["discriminator"]["layers_0"]["u"])
    for _ in range(calls):
        u = matrix @ (matrix.T @ u)
        u = u / np.linalg.norm(u)
    np.testing.assert_allclose(kept["discriminator"]["layers_0"]["u"], u, atol=1e-5)
    mean = kept["generator"]["norm"]["mean"]
    assert not np.allclose(mean, variables["batch_stats"]["generator"]["norm"]["mean"])


def test_the_penalty_is_the_slope_where_the_real_examples_were_judged(variables):
    _, aux = loss(Adversarial(r1=2.0), variables, "discriminator")
    own = of_network(variables, "discriminator")
    run = NETWORKS["discriminator"].apply
    _, between = run(own, BATCH["points"], train=True, mutable=["batch_stats"])
    _, last = run({**own, **between}, BATCH["points"], train=True, mutable=["batch_stats"])
    slope = jax.grad(lambda x: run({**own, **last}, x).sum())(BATCH["points"])
    expected = (slope**2).sum(-1).mean()
    np.testing.assert_allclose(aux.metrics["r1"].compute(), expected, rtol=1e-5)


def test_no_gradient_goes_through_what_is_kept(variables):
    """The discriminator's phase leaves the generator alone, whatever it keeps."""

    def value(params):
        return loss(Adversarial(r1=0.5), {**variables, "params": params}, "discriminator")[0]

    gradient = jax.grad(value)(variables["params"])
    assert all(not x.any() for x in jax.tree.leaves(gradient["generator"]))
    assert any(x.any() for x in jax.tree.leaves(gradient["discriminator"]))


def test_the_distance_of_images_is_that_of_their_means_and_covariances():
    points = np.random.default_rng(0).standard_normal((500, 6))
    assert abs(frechet_distance(points, points[::-1])) < 1e-9
    np.testing.assert_allclose(frechet_distance(points, points + 2.0), 6 * 4.0, rtol=1e-9)
    wider = points.mean(0) + 3 * (points - points.mean(0))
    spread = points.var(0, ddof=1).sum()
    np.testing.assert_allclose(frechet_distance(points, wider), (3 - 1) ** 2 * spread, rtol=1e-9)


def test_features_of_a_classifier_tell_digits_from_noise():
    digits = Digits("train")
    examples = [
        {"images": x["image"].astype("f") / 127.5 - 1, "label": x["label"]}
        for x in (digits[i] for i in range(400))
    ]
    fields = {"image_size": (8, 8), "patch_size": 4, "in_channels": 1, "num_classes": 10}
    features = ClassifierFeatures("vit_test", fields, examples, steps=60).fitted()
    images = np.stack([x["images"] for x in examples])
    labels = np.stack([x["label"] for x in examples])
    seen = features(images)
    centres = np.stack([seen[:200][labels[:200] == c].mean(0) for c in range(10)])
    nearest = np.square(seen[200:, None] - centres).sum(-1).argmin(1)
    assert (nearest == labels[200:]).mean() > 0.7
    noise = np.random.default_rng(0).uniform(-1, 1, images.shape).astype("f")
    halves, far = (frechet_distance(seen[:200], x) for x in (seen[200:], features(noise)))
    assert far > 3 * halves
