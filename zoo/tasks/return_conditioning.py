"""Actions from the return that is asked for, learnt from episodes that someone else has played.

Chen et al., arXiv 2106.01345, with numbered actions as in its Atari part:

    loss = cross-entropy of the action at each step, given returns to come, states and actions
    playing: R_1 is the return asked for;  a_t is drawn from what the network says;
             R_(t+1) = R_t - r_t;  the last `context` steps are seen, padded at the left

A network that is told no return (zeros in its place) clones the behaviour: the baseline.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.environments.environment import Environment
from zoo.tasks.apply import check_inputs
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Task, Variables, of_network

INPUTS = ("states", "actions", "returns", "times", "mask")


@dataclass(frozen=True)
class ReturnConditioned(Task):
    """Batches are those of `zoo.data.episodes.Episodes`.

    Several networks are trained by the sum of their losses, which share no parameter.

    Attributes:
      environment: that is played.
      context: steps that are seen in playing.
      networks: names of the networks, where there are several.
      untold: names of those that are told no return.
    """

    environment: Environment
    context: int = 20
    networks: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    metric: ClassVar[str] = "loss"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One, of all networks."""
        return (Phase("train", self.networks or ("train",)),)

    def check(self, networks: Networks, batch: Any, outputs: Any) -> None:
        """Refuse inputs of another kind than the networks'.

        Raises:
          ValueError: one sentence that names what does not fit.
        """
        for _, network, _ in self.each(networks, {}):
            check_inputs(network, batch)

    def each(
        self, networks: Networks, variables: Variables
    ) -> list[tuple[str, nn.Module, dict[str, Any]]]:
        """Name, module and variables of every network; the name of an only one is ""."""
        if isinstance(networks, nn.Module):
            return [("", networks, dict(variables))]
        return [(name, net, of_network(variables, name)) for name, net in networks.items()]

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss above, summed over the networks."""
        metrics = self._measured(networks, variables, batch, rng)
        losses = [mean for name, mean in metrics.items() if name.endswith("loss")]
        total = Mean(sum(mean.total for mean in losses), losses[0].count)
        return total.compute(), Aux({**metrics, "loss": total})

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy, and how often the likeliest action is the one that was taken."""
        return self._measured(networks, variables, batch, None)

    def _measured(
        self, networks: Networks, variables: Variables, batch: Batch, rng: Array | None
    ) -> dict[str, Mean]:
        counts = batch["mask"]
        if "valid" in batch:
            counts = counts * batch["valid"][:, None]
        found = {}
        for name, network, own in self.each(networks, variables):
            logits = self._logits(network, own, batch, name not in self.untold, rng)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["chosen"])
            right = jnp.argmax(logits, -1) == batch["chosen"]
            front = f"{name}_" if name else ""
            for what, x in (("loss", loss), ("accuracy", right)):
                found[f"{front}{what}"] = Mean.of(x.reshape(-1), counts.reshape(-1))
        return found

    def predict(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Logits of the actions of every step, by the network's name, or as `logits`."""
        return {
            name or "logits": self._logits(network, own, batch, name not in self.untold)
            for name, network, own in self.each(networks, variables)
        }

    def _logits(
        self, network: nn.Module, variables: Variables, batch: Batch, told: bool,
        rng: Array | None = None,
    ) -> Float[Array, "batch steps actions"]:  # fmt: skip
        given = {name: batch[name] for name in INPUTS}
        given["returns"] = given["returns"] if told else jnp.zeros_like(given["returns"])
        rngs = {} if rng is None else {"dropout": rng}
        said = network.apply(variables, **given, train=rng is not None, rngs=rngs)
        return said.astype(jnp.float32)

    def play(
        self,
        network: nn.Module,
        variables: Variables,
        asked: Float[Array, "worlds"],
        rng: PRNGKeyArray,
        told: bool = True,
    ) -> Float[Array, "worlds"]:
        """The return of an episode of each world.

        Args:
          network: that plays.
          variables: of it.
          asked: returns that it is asked for.
          rng: of worlds and actions.
          told: whether it is told them.
        """
        world, count = self.environment, len(asked)
        begin, rest = jax.random.split(rng)
        state, seen = jax.vmap(world.reset)(jax.random.split(begin, count))
        empty = jnp.zeros((count, self.context))
        window = {
            "states": jnp.zeros((count, self.context, *seen.shape[1:])),
            "actions": jnp.zeros((count, self.context, world.num_actions)),
            "returns": empty[..., None],
            "times": empty.astype(jnp.int32),
            "mask": empty,
        }

        def one(carry: Any, inputs: tuple[Array, Array]) -> Any:
            (state, seen, window, left, alive), (time, key) = carry, inputs
            now = {
                "states": seen,
                "actions": jnp.zeros((count, world.num_actions)),
                "returns": left[:, None],
                "times": jnp.full(count, time),
                "mask": jnp.ones(count),
            }
            window = {name: jnp.concatenate([x[:, 1:], now[name][:, None]], 1)
                      for name, x in window.items()}  # fmt: skip
            act, keys = jax.random.split(key)
            logits = self._logits(network, variables, window, told)[:, -1]
            action = jax.random.categorical(act, logits)
            taken = jax.nn.one_hot(action, world.num_actions)
            window["actions"] = window["actions"].at[:, -1].set(taken)
            state, got = jax.vmap(world.step)(state, action, jax.random.split(keys, count))
            reward = jnp.where(alive, got.reward, 0.0)
            return (state, got.observation, window, left - reward, alive & ~got.done), reward

        steps = jnp.arange(world.horizon), jax.random.split(rest, world.horizon)
        carry = (state, seen, window, asked.astype(jnp.float32), jnp.ones(count, bool))
        return jax.lax.scan(one, carry, steps)[1].sum(0)
