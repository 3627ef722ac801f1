"""Agents that are asked for a return: what counts in the loss, and how they are played."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data import Data, eval_batches
from zoo.data.episodes import AtRandom, Episodes
from zoo.environments import SwitchCorridor
from zoo.evaluators import AskedReturns
from zoo.tasks import ReturnConditioned
from zoo.training import train
from zoo.training.config import load_file

CONFIG = Path(__file__).parents[2] / "configs" / "control" / "decision_transformer_cart_pole.py"
WORLD = SwitchCorridor(4, 10)


class Scripted(nn.Module):
    """Goes to the switch and then to the door, if it is asked for more than nothing."""

    def example_inputs(self, batch_size=1):
        shapes = {"states": (5, 3), "actions": (5, 2), "returns": (5, 1), "times": (5,)}
        return {k: jax.ShapeDtypeStruct((batch_size, *s), jnp.float32) for k, s in shapes.items()}

    def __call__(self, states, actions, returns, times, mask, train=False):
        pressed = jnp.cumsum(states[..., 0] * mask, axis=1) > 0
        right = jnp.where(pressed & (returns[..., 0] > 0), 50.0, -50.0)
        return jnp.stack([-right, right], -1)


@pytest.fixture(scope="module")
def batch():
    source = Episodes(WORLD, AtRandom(2), count=4, steps=6)
    return next(eval_batches(Data(source, source, eval_batch_size=8)))


def test_padding_and_what_it_holds_do_not_count(batch):
    task = ReturnConditioned(WORLD, context=6)
    other = {**batch, "chosen": np.where(batch["mask"] > 0, batch["chosen"], 1)}
    assert (other["chosen"] != batch["chosen"]).any()
    got, same = (task.metrics(Scripted(), {}, b)["loss"] for b in (batch, other))
    assert float(got.count) == batch["mask"].sum()
    assert float(got.compute()) == float(same.compute()) > 1


def test_an_episode_is_won_by_who_is_asked_to_and_told_so():
    task = ReturnConditioned(WORLD, context=10)
    asked = jnp.array([0.9] * 6 + [-0.3] * 6)
    play = jax.jit(lambda told: task.play(Scripted(), {}, asked, jax.random.key(0), told),
                   static_argnums=0)  # fmt: skip
    told, untold = play(True), play(False)
    assert (told[:6] > 0.9).all()  # at most three steps to the switch and four to the door
    np.testing.assert_allclose(told[6:], -0.1, atol=1e-6)
    np.testing.assert_allclose(untold, -0.1, atol=1e-6)


def test_what_is_asked_becomes_less_by_what_was_got():
    """A step of -0.01 leaves 0.01 more to come: behind three of them -0.02 has become 0.01."""
    task = ReturnConditioned(WORLD, context=10)
    short = jnp.full(4, -0.02)
    got = task.play(Scripted(), {}, short, jax.random.key(0), True)
    assert (got > 0.8).all()


@pytest.mark.slow
def test_a_decision_transformer_gets_what_it_is_asked_for(tmp_path):
    config = load_file(CONFIG)
    few = AskedReturns((0.2, 0.5, 0.8), worlds=16)
    config = dataclasses.replace(config, num_steps=800, evaluators=(few,))
    found = train(config, tmp_path).metrics
    assert found["told_asked_error"] < 0.5 * found["cloning_asked_error"]
    assert found["told_got_0.2"] < found["told_got_0.5"] < found["told_got_0.8"]
    assert (tmp_path / "returns.png").stat().st_size > 0
