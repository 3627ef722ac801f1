"""What was seen at the start decides at the end: a chain, and a maze in the form of a T."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zoo.environments.environment import Environment, Transition


class ChainState(NamedTuple):
    """A cue, and steps taken."""

    cue: Int[Array, ""]
    time: Int[Array, ""]


@dataclass(frozen=True)
class MemoryChain(Environment):
    """A cue is shown in the first of `length` steps; the action of the last must repeat it.

    Rewards are 1 for the right action at the end, -1 for another one, and 0 before.

    Attributes:
      length: steps of an episode.
      cues: different ones; as many actions.
    """

    length: int = 20
    cues: int = 2

    @property
    def observation_dim(self) -> int:
        """The cue (shown first only), whether this is the last step, and a constant."""
        return self.cues + 2

    @property
    def num_actions(self) -> int:
        """One for each cue."""
        return self.cues

    @property
    def horizon(self) -> int:
        """The length."""
        return self.length

    def _seen(self, state: ChainState) -> Float[Array, "dims"]:
        cue = jax.nn.one_hot(state.cue, self.cues) * (state.time == 0)
        return jnp.concatenate([cue, jnp.stack([state.time == self.length - 1, True])])

    def reset(self, rng: PRNGKeyArray) -> tuple[ChainState, Float[Array, "dims"]]:
        """A random cue."""
        cue = jax.random.randint(rng, (), 0, self.cues)
        state = ChainState(cue, jnp.zeros((), jnp.int32))
        return state, self._seen(state)

    def step(
        self, state: ChainState, action: Int[Array, ""], rng: PRNGKeyArray
    ) -> tuple[ChainState, Transition]:
        """One step on."""
        last = state.time == self.length - 1
        reward = jnp.where(last, jnp.where(action == state.cue, 1.0, -1.0), 0.0)
        state = ChainState(state.cue, state.time + 1)
        return state, Transition(self._seen(state), reward, last)


class MazeState(NamedTuple):
    """On which side the goal is, where the agent is, and steps taken."""

    side: Int[Array, ""]
    place: Int[Array, ""]
    time: Int[Array, ""]


@dataclass(frozen=True)
class TMaze(Environment):
    """A corridor with a sign at its start, and a goal left or right of its end, as the sign says.

    Actions: 0 go on, 1 turn left, 2 turn right. Turning before the end is bumping into a wall. The
    goal gives 1, the other side -1, each step -0.01; behind `patience` steps an episode ends.

    Attributes:
      length: of the corridor.
      patience: steps of an episode at most.
    """

    length: int = 10
    patience: int = 30
    observation_dim: int = 4
    num_actions: int = 3

    @property
    def horizon(self) -> int:
        """The patience."""
        return self.patience

    def _seen(self, state: MazeState) -> Float[Array, "4"]:
        """The sign (at the start), whether this is the end, and a constant."""
        sign = jax.nn.one_hot(state.side, 2) * (state.place == 0)
        return jnp.concatenate([sign, jnp.stack([state.place == self.length, True])])

    def reset(self, rng: PRNGKeyArray) -> tuple[MazeState, Float[Array, "4"]]:
        """A random side."""
        zero = jnp.zeros((), jnp.int32)
        state = MazeState(jax.random.randint(rng, (), 0, 2), zero, zero)
        return state, self._seen(state)

    def step(
        self, state: MazeState, action: Int[Array, ""], rng: PRNGKeyArray
    ) -> tuple[MazeState, Transition]:
        """One step."""
        at_end = state.place == self.length
        turned = at_end & (action > 0)
        reward = jnp.where(turned, jnp.where(action - 1 == state.side, 1.0, -1.0), -0.01)
        place = jnp.minimum(state.place + (action == 0), self.length)
        state = MazeState(state.side, place, state.time + 1)
        done = turned | (state.time >= self.patience)
        return state, Transition(self._seen(state), reward, done)
