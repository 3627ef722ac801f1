"""What an environment is: a reset and a step, both pure, of one world at a time.

    state, observation = environment.reset(rng)
    state, transition = environment.step(state, action, rng)

That is gymnax's form with the state in front. `jax.vmap` makes many worlds of one, `jax.lax.scan`
a rollout; `continued` begins a new episode where one has ended.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Transition(NamedTuple):
    """What a step gives.

    Attributes:
      observation: behind the step; of the next episode where `continued` has begun one.
      reward: of the step.
      done: whether the episode has ended.
    """

    observation: Float[Array, "dims"]
    reward: Float[Array, ""]
    done: Bool[Array, ""]


class Environment:
    """The contract; environments are frozen dataclasses.

    Attributes:
      observation_dim: numbers of an observation.
      num_actions: actions are 0 to one less.
      horizon: steps after which every episode has ended.
    """

    observation_dim: int
    num_actions: int
    horizon: int

    def reset(self, rng: PRNGKeyArray) -> tuple[Any, Float[Array, "dims"]]:
        """A first state and what is seen of it."""
        raise NotImplementedError(f"{type(self).__name__} has no reset")

    def step(self, state: Any, action: Int[Array, ""], rng: PRNGKeyArray) -> tuple[Any, Transition]:
        """The next state, and what is seen of it."""
        raise NotImplementedError(f"{type(self).__name__} has no step")


def continued(
    environment: Environment, state: Any, action: Int[Array, ""], rng: PRNGKeyArray
) -> tuple[Any, Transition]:
    """A step; where it ends an episode, the state and observation are those of a new one."""
    step_rng, reset_rng = jax.random.split(rng)
    after, transition = environment.step(state, action, step_rng)
    fresh, first = environment.reset(reset_rng)
    done = transition.done

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(done, new, old)

    observation = choose(first, transition.observation)
    return jax.tree.map(choose, fresh, after), transition._replace(observation=observation)


Policy = Callable[[Any, Float[Array, "batch dims"], Bool[Array, "batch"], Array], tuple[Any, Any]]
"""`(memory, observations, first, rng) -> (memory, actions)` of many worlds; `first` is True where
an episode begins."""


def rollout(
    environment: Environment,
    policy: Policy,
    begin: tuple[Any, Float[Array, "batch dims"], Bool[Array, "batch"], Any],
    rng: PRNGKeyArray,
    steps: int,
) -> tuple[tuple[Any, Array, Array, Any], dict[str, Array]]:
    """Steps of many worlds, in one scan.

    Args:
      environment: of all of them.
      policy: what is done.
      begin: states, observations, whether an episode begins, and the policy's memory.
      rng: for policy and worlds.
      steps: of each world.

    Returns:
      where the next rollout begins, and `observations`, `first`, `actions`, `rewards` and `dones`,
      each `[batch, steps, ...]`.
    """

    def one(carry: Any, key: Array) -> Any:
        state, observation, first, memory = carry
        act, world = jax.random.split(key)
        memory, action = policy(memory, observation, first, act)
        keys = jax.random.split(world, len(observation))
        state, seen = jax.vmap(lambda s, a, k: continued(environment, s, a, k))(state, action, keys)
        row = {"observations": observation, "first": first, "actions": action,
               "rewards": seen.reward, "dones": seen.done}  # fmt: skip
        return (state, seen.observation, seen.done, memory), row

    end, rows = jax.lax.scan(one, begin, jax.random.split(rng, steps))
    return end, jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
