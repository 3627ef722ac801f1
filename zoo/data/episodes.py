"""Episodes that someone has played, to learn from without an environment, cut into windows.

    Episodes(SwitchCorridor(), AtRandom(2), count=2000, steps=20)

Who plays is a function of the state of the world, of a key of the episode and of one of the step:
`behaviour(state, episode, rng) -> action`. It may see what an agent does not (speeds, say).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from zoo.environments.cart_pole import CartPoleState
from zoo.environments.environment import Environment

Behaviour = Callable[[Any, PRNGKeyArray, PRNGKeyArray], Int[Array, ""]]


@dataclass(frozen=True)
class AtRandom:
    """Any action, as likely as another.

    Attributes:
      num_actions: that there are.
    """

    num_actions: int

    def __call__(self, state: Any, episode: PRNGKeyArray, rng: PRNGKeyArray) -> Int[Array, ""]:
        """The action of a step."""
        return jax.random.randint(rng, (), 0, self.num_actions)


@dataclass(frozen=True)
class GivesUp:
    """Balances the pole of `CartPole`, seen or hidden, until it does the opposite.

    Attributes:
      latest: step at which it gives up at the latest; each before is as likely.
      noise: part of the steps in which it pushes anywhere.
    """

    latest: int = 100
    noise: float = 0.1

    def __call__(
        self, state: CartPoleState, episode: PRNGKeyArray, rng: PRNGKeyArray
    ) -> Int[Array, ""]:
        """The action of a step."""
        place, speed, angle, turning = state.physics
        right = place + 1.7 * speed + 30 * angle + 6 * turning > 0
        over = state.time >= jax.random.randint(episode, (), 0, self.latest + 1)
        which, anywhere = jax.random.split(rng)
        push = jax.random.bernoulli(anywhere)
        wild = jax.random.bernoulli(which, self.noise)
        return jnp.where(wild, push, right != over).astype(jnp.int32)


def played(
    environment: Environment, behaviour: Behaviour, rng: PRNGKeyArray, count: int
) -> dict[str, Array]:
    """So many episodes, to their ends: `states`, `actions`, `rewards` and `alive`.

    Each is `[count, horizon, ...]`; `alive` is False behind an episode's end, where rewards are 0.
    """

    def one(rng: PRNGKeyArray) -> dict[str, Array]:
        begin, episode, steps = jax.random.split(rng, 3)
        state, seen = environment.reset(begin)

        def step(carry: Any, key: PRNGKeyArray) -> Any:
            state, seen, alive = carry
            act, world = jax.random.split(key)
            action = behaviour(state, episode, act)
            state, got = environment.step(state, action, world)
            row = {"states": seen, "actions": action, "alive": alive,
                   "rewards": jnp.where(alive, got.reward, 0.0)}  # fmt: skip
            return (state, got.observation, alive & ~got.done), row

        keys = jax.random.split(steps, environment.horizon)
        return jax.lax.scan(step, (state, seen, jnp.asarray(True)), keys)[1]

    return jax.vmap(one)(jax.random.split(rng, count))


@functools.lru_cache(maxsize=8)
def _episodes(
    environment: Environment, behaviour: Behaviour, count: int, seed: int
) -> dict[str, np.ndarray]:
    run = jax.jit(lambda rng: played(environment, behaviour, rng, count))
    return jax.device_get(run(jax.random.key(seed)))


@dataclass(frozen=True)
class Episodes:
    """Windows of the episodes of a behaviour, at every step of each.

    Examples are `states`, `actions` (1 for the one that was taken), `returns` (what was still to
    come), `times` (in the episode), `chosen` (numbers of the actions) and `mask`. A window that an
    episode does not fill is padded at the left, where `mask` and all else is 0.

    Attributes:
      environment: that is played.
      behaviour: who plays.
      count: episodes; they are played when an example is first asked for.
      steps: of a window.
      seed: other seeds give other episodes.
    """

    environment: Environment
    behaviour: Behaviour
    count: int
    steps: int = 20
    seed: int = 0

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """What `played` gives."""
        return _episodes(self.environment, self.behaviour, self.count, self.seed)

    @functools.cached_property
    def returns(self) -> np.ndarray:
        """Of the episodes."""
        return self.rows["rewards"].sum(1)

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return np.nonzero(self.rows["alive"])

    def __len__(self) -> int:
        return len(self._places[0])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        episode, first = (int(place[index]) for place in self._places)
        rows = {name: x[episode] for name, x in self.rows.items()}
        inside = slice(first, min(first + self.steps, int(rows["alive"].sum())))
        times = np.arange(inside.start, inside.stop, dtype=np.int32)
        left = np.cumsum(rows["rewards"][::-1])[::-1].astype(np.float32)
        chosen = rows["actions"][inside].astype(np.int32)
        window = {
            "states": rows["states"][inside].astype(np.float32),
            "actions": np.eye(self.environment.num_actions, dtype=np.float32)[chosen],
            "returns": left[inside, None],
            "times": times,
            "chosen": chosen,
            "mask": np.ones(len(times), np.float32),
        }
        return {name: self._padded(x) for name, x in window.items()}

    def _padded(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(self.steps - len(x), 0), *[(0, 0)] * (x.ndim - 1)])

    def example(self) -> dict[str, np.ndarray]:
        """What examples look like; nothing is played for it."""
        numbers = lambda *shape: np.zeros((self.steps, *shape), np.float32)  # noqa: E731
        whole = np.zeros(self.steps, np.int32)
        world = self.environment
        return {
            "states": numbers(world.observation_dim),
            "actions": numbers(world.num_actions),
            "returns": numbers(1),
            "times": whole,
            "chosen": whole,
            "mask": numbers(),
        }
