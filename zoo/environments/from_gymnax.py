"""Environments of gymnax (`pip install 'flax-zoo[gymnax]'`) as environments of the zoo."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zoo.environments.environment import Environment, Transition


@dataclass(frozen=True)
class FromGymnax(Environment):
    """An environment of gymnax with numbered actions; observations become flat.

    Attributes:
      name: as `gymnax.make` takes it, such as `MemoryChain-bsuite`.
      horizon: steps after which its episodes have ended.

    Raises:
      ModuleNotFoundError: if gymnax is not installed.
    """

    name: str
    horizon: int = 500

    def __post_init__(self):
        try:
            import gymnax  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{self.name} is an environment of gymnax, which is not installed: "
                "pip install 'flax-zoo[gymnax]'."
            ) from None

    def _made(self) -> tuple[Any, Any]:
        import gymnax

        return gymnax.make(self.name)

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation."""
        environment, params = self._made()
        shape = environment.observation_space(params).shape
        return int(jnp.prod(jnp.array(shape, int))) if shape else 1

    @property
    def num_actions(self) -> int:
        """Of its discrete space."""
        environment, params = self._made()
        return int(environment.action_space(params).n)

    def reset(self, rng: PRNGKeyArray) -> tuple[Any, Float[Array, "dims"]]:
        """The reset of gymnax, the state in front."""
        environment, params = self._made()
        observation, state = environment.reset_env(rng, params)
        return state, jnp.asarray(observation, jnp.float32).reshape(-1)

    def step(self, state: Any, action: Int[Array, ""], rng: PRNGKeyArray) -> tuple[Any, Transition]:
        """The step of gymnax, without its own reset."""
        environment, params = self._made()
        observation, state, reward, done, _ = environment.step_env(rng, state, action, params)
        observation = jnp.asarray(observation, jnp.float32).reshape(-1)
        return state, Transition(observation, jnp.float32(reward), jnp.asarray(done, bool))
