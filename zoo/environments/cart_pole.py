"""The pole on a cart of Barto, Sutton and Anderson (1983), with and without its speeds."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zoo.environments.environment import Environment, Transition

GRAVITY, CART, POLE, HALF, FORCE, STEP = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
"""Metres, kilograms, seconds: as in Gym's CartPole."""
WIDEST, STEEPEST = 2.4, 12 * jnp.pi / 180


class CartPoleState(NamedTuple):
    """Place and speed of the cart, angle and speed of the pole, and steps taken."""

    physics: Float[Array, "4"]
    time: Int[Array, ""]


@dataclass(frozen=True)
class CartPole(Environment):
    """Keep the pole up by pushing the cart left (0) or right (1).

    Seen are place and speed of the cart, angle and speed of the pole, all of about 1 at most.

    Each step gives 1 over `patience`, so that an episode's return is at most 1.

    Attributes:
      patience: steps of an episode at most.
    """

    patience: int = 200
    observation_dim: int = 4
    num_actions: int = 2

    @property
    def horizon(self) -> int:
        """The patience."""
        return self.patience

    def _seen(self, state: CartPoleState) -> Float[Array, "dims"]:
        return state.physics / jnp.array([WIDEST, 1.0, STEEPEST, 1.0])

    def reset(self, rng: PRNGKeyArray) -> tuple[CartPoleState, Float[Array, "dims"]]:
        """Nearly at rest."""
        physics = jax.random.uniform(rng, (4,), minval=-0.05, maxval=0.05)
        state = CartPoleState(physics, jnp.zeros((), jnp.int32))
        return state, self._seen(state)

    def step(
        self, state: CartPoleState, action: Int[Array, ""], rng: PRNGKeyArray
    ) -> tuple[CartPoleState, Transition]:
        """One fiftieth of a second, by Euler's method."""
        _, speed, angle, turning = state.physics
        force = jnp.where(action == 1, FORCE, -FORCE)
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        mass = CART + POLE
        push = (force + POLE * HALF * turning**2 * sine) / mass
        twist = GRAVITY * sine - cosine * push
        twist = twist / (HALF * (4 / 3 - POLE * cosine**2 / mass))
        pull = push - POLE * HALF * twist * cosine / mass
        physics = state.physics + STEP * jnp.stack([speed, pull, turning, twist])
        state = CartPoleState(physics, state.time + 1)
        fallen = (jnp.abs(physics[0]) > WIDEST) | (jnp.abs(physics[2]) > STEEPEST)
        done = fallen | (state.time >= self.patience)
        return state, Transition(self._seen(state), jnp.float32(1 / self.patience), done)


@dataclass(frozen=True)
class HiddenCartPole(CartPole):
    """The same, of which no speeds are seen: an agent must remember where things were."""

    observation_dim: int = 2

    def _seen(self, state: CartPoleState) -> Float[Array, "dims"]:
        return super()._seen(state)[jnp.array([0, 2])]
