"""A corridor with a switch at one end that opens a door at the other; neither shows its state."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from zoo.environments.environment import Environment, Transition


class CorridorState(NamedTuple):
    """Where the agent is, whether the switch was pressed, and steps taken."""

    place: Int[Array, ""]
    pressed: Bool[Array, ""]
    time: Int[Array, ""]


@dataclass(frozen=True)
class SwitchCorridor(Environment):
    """Begin anywhere, go to the left end, and then out of the door at the right end.

    Actions: 0 left, 1 right. The agent sees only whether it is at an end, so it must remember
    whether it was at the switch. The open door gives 1; a closed one, and each step, -0.01.

    Attributes:
      length: places.
      patience: steps of an episode at most.
    """

    length: int = 6
    patience: int = 30
    observation_dim: int = 3
    num_actions: int = 2

    @property
    def horizon(self) -> int:
        """The patience."""
        return self.patience

    def _seen(self, state: CorridorState) -> Float[Array, "3"]:
        ends = jnp.stack([state.place == 0, state.place == self.length - 1, True])
        return ends.astype(jnp.float32)

    def reset(self, rng: PRNGKeyArray) -> tuple[CorridorState, Float[Array, "3"]]:
        """A random place between the ends."""
        place = jax.random.randint(rng, (), 1, self.length - 1)
        state = CorridorState(place, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
        return state, self._seen(state)

    def step(
        self, state: CorridorState, action: Int[Array, ""], rng: PRNGKeyArray
    ) -> tuple[CorridorState, Transition]:
        """One step to a side."""
        out = (state.place == self.length - 1) & (action == 1) & state.pressed
        place = jnp.clip(state.place + jnp.where(action == 1, 1, -1), 0, self.length - 1)
        state = CorridorState(place, state.pressed | (place == 0), state.time + 1)
        done = out | (state.time >= self.patience)
        return state, Transition(self._seen(state), jnp.where(out, 1.0, -0.01), done)
