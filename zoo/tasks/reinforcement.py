"""Proximal policy optimisation of agents with a memory, rollouts included.

Schulman et al., arXiv 1707.06347, with generalised advantages (arXiv 1506.02438):

    delta_t = r_t + gamma (1 - done_t) V_(t+1) - V_t
    A_t = delta_t + gamma lambda (1 - done_t) A_(t+1)
    loss = -mean min(rho A, clip(rho, 1 - e, 1 + e) A) + c_V mean (V - R)^2 - c_H mean entropy

A step is a rollout of `unroll` steps of every world, on the device, and `1 + reuse` updates from
it. Worlds, memories and the rollout stand in the training state's carry, a row a world, so that a
run continues bit for bit where it was stopped. The first update of a step plays the rollout with
the parameters that it then differentiates; the others use what it left in the carry.

The network has `init_state(batch, length)` and `step(state, observations, reset)`, as GTrXL has
them (`reset [batch, length]`: an episode begins), and gives `num_actions + 1` numbers, the last of
which is the value.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from zoo.environments.environment import Environment, Policy, rollout
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Phase, Task, Variables


class Carry(NamedTuple):
    """What a step is handed, a row a world.

    Attributes:
      state: of the worlds.
      observation: what is seen of them.
      first: whether an episode begins.
      memory: of the network.
      before: the memory that the last rollout began with.
      rows: the last rollout, with log probabilities, advantages and returns.
    """

    state: Any
    observation: Float[Array, "batch dims"]
    first: Bool[Array, "batch"]
    memory: Any
    before: Any
    rows: dict[str, Array]


def advantages(
    rewards: Float[Array, "batch steps"],
    values: Float[Array, "batch steps_and_one"],
    dones: Bool[Array, "batch steps"],
    gamma: float,
    trace: float,
) -> Float[Array, "batch steps"]:
    """Generalised advantages.

    Args:
      rewards: of each step.
      values: before each step, and behind the last.
      dones: whether an episode ends with the step.
      gamma: discount.
      trace: lambda.
    """
    goes_on = 1.0 - dones
    delta = rewards + gamma * goes_on * values[:, 1:] - values[:, :-1]

    def back(after: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        now = step[0] + gamma * trace * step[1] * after
        return now, now

    _, found = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), (delta.T, goes_on.T), reverse=True)
    return found.T


@dataclass(frozen=True)
class Reinforcement(Task):
    """Batches hold `world`, a number a row (`zoo.environments.Seeds`); worlds are in the carry.

    Attributes:
      environment: what is played.
      unroll: steps of a rollout.
      reuse: updates from a rollout behind the first.
      gamma, trace: discount, and lambda of the advantages.
      clip: how far the ratio of probabilities may go from 1.
      value_weight, entropy_weight: of these terms of the loss.
    """

    environment: Environment
    unroll: int = 20
    reuse: int = 3
    gamma: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01

    @property
    def phases(self) -> tuple[Phase, ...]:
        """A rollout with its update, then updates from it."""
        collect = Phase("collect")
        return (collect, Phase("reuse", repeats=self.reuse)) if self.reuse else (collect,)

    def init_carry(self, networks: nn.Module, rngs: PRNGKeyArray) -> Carry:
        """A first episode of each world, and room for a rollout."""
        state, observation = jax.vmap(self.environment.reset)(rngs)
        count, steps = len(rngs), self.unroll
        memory = networks.init_state(count, steps)
        numbers = jnp.zeros((count, steps))
        rows = {
            "observations": jnp.zeros((count, steps, *observation.shape[1:])),
            "first": jnp.zeros((count, steps), bool),
            "actions": jnp.zeros((count, steps), jnp.int32),
            **dict.fromkeys(("chance", "advantages", "returns"), numbers),
        }
        return Carry(state, observation, jnp.ones(count, bool), memory, memory, rows)

    def loss(
        self,
        networks: nn.Module,
        variables: Variables,
        carry: Carry,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss above."""
        metrics = {}
        if phase == "collect":
            carry, metrics = self._collect(networks, jax.lax.stop_gradient(variables), carry, rng)
        rows = carry.rows
        logits, values = self._said(networks, variables, carry.before, rows)
        log = jax.nn.log_softmax(logits)
        chance = jnp.take_along_axis(log, rows["actions"][..., None], -1)[..., 0]
        gain = rows["advantages"]
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        ratio = jnp.exp(chance - rows["chance"])
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        policy = -jnp.minimum(ratio * gain, clipped * gain).mean(1)
        value = ((values - rows["returns"]) ** 2).mean(1)
        entropy = -(jnp.exp(log) * log).sum(-1).mean(1)
        each = policy + self.value_weight * value - self.entropy_weight * entropy
        parts = {"loss": each, "value_loss": value, "entropy": entropy}
        metrics |= {name: Mean.of(x, batch.get("valid")) for name, x in parts.items()}
        return metrics["loss"].compute(), Aux(metrics, carry=carry)

    def _collect(
        self, networks: nn.Module, variables: Variables, carry: Carry, rng: Array
    ) -> tuple[Carry, dict[str, Mean]]:
        """Play, and say of each step what its action was worth."""
        begin = (carry.state, carry.observation, carry.first, carry.memory)
        end, rows = rollout(
            self.environment, self._policy(networks, variables), begin, rng, self.unroll
        )
        state, observation, first, memory = end
        logits, values = self._said(networks, variables, carry.memory, rows)
        log = jax.nn.log_softmax(logits)
        chance = jnp.take_along_axis(log, rows["actions"][..., None], -1)[..., 0]
        _, last = networks.apply(
            variables, memory, observation[:, None], first[:, None], method="step"
        )
        all_values = jnp.concatenate([values, last[:, :, -1].astype(jnp.float32)], axis=1)
        gain = advantages(rows["rewards"], all_values, rows["dones"], self.gamma, self.trace)
        kept = {name: rows[name] for name in ("observations", "first", "actions")}
        kept |= {"chance": chance, "advantages": gain, "returns": gain + values}
        ended = rows["dones"].sum()
        won = (rows["dones"] & (rows["rewards"] > 0)).sum()
        metrics = {
            "reward": Mean.of(rows["rewards"].sum(1)),
            "won": Mean(won.astype(jnp.float32), ended.astype(jnp.float32)),
        }
        return Carry(state, observation, first, memory, carry.memory, kept), metrics

    def _said(
        self, networks: nn.Module, variables: Variables, memory: Any, rows: dict[str, Array]
    ) -> tuple[Float[Array, "batch steps actions"], Float[Array, "batch steps"]]:
        """Logits and values of a rollout, in one segment."""
        _, said = networks.apply(
            variables, memory, rows["observations"], rows["first"], method="step"
        )
        said = said.astype(jnp.float32)
        return said[..., :-1], said[..., -1]

    def _policy(self, networks: nn.Module, variables: Variables, greedy: bool = False) -> Any:
        def act(memory: Any, observation: Array, first: Array, rng: Array) -> tuple[Any, Array]:
            memory, said = networks.apply(
                variables, memory, observation[:, None], first[:, None], method="step"
            )
            logits = said[:, 0, :-1].astype(jnp.float32)
            if greedy:
                return memory, jnp.argmax(logits, -1).astype(jnp.int32)
            return memory, jax.random.categorical(rng, logits).astype(jnp.int32)

        return act

    def metrics(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """An episode of each world by the likeliest actions: its return, and whether it is won."""
        played = self.predict(networks, variables, batch)
        total, valid = played["return"], batch.get("valid")
        return {
            "loss": Mean.of(-total, valid),
            "return": Mean.of(total, valid),
            "success": Mean.of(played["won"].astype(jnp.float32), valid),
        }

    def predict(self, networks: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Returns of one episode of each world, whether it ended in a reward, and its steps."""
        return self.play(networks, batch["world"], self._policy(networks, variables, greedy=True))

    def play(
        self, networks: nn.Module, worlds: Int[Array, "batch"], policy: Policy
    ) -> dict[str, Array]:
        """An episode of each world by a policy that has the network's memory.

        Gives `return`, `won`, and of every step `observations`, `actions` and `mine`, which is
        False behind the episode's end.
        """
        steps = self.environment.horizon + 1
        keys = jax.vmap(lambda world: jax.random.fold_in(jax.random.key(0), world))(worlds)
        state, observation = jax.vmap(self.environment.reset)(keys)
        begin = (state, observation, jnp.ones(len(worlds), bool),
                 networks.init_state(len(worlds), 1))  # fmt: skip
        _, rows = rollout(self.environment, policy, begin, jax.random.key(1), steps)
        before = jnp.cumsum(rows["dones"], axis=1) - rows["dones"]
        mine = before == 0
        won = (rows["dones"] & (rows["rewards"] > 0) & mine).any(1)
        shown = {name: rows[name] for name in ("observations", "actions")}
        return {"return": (rows["rewards"] * mine).sum(1), "won": won, "mine": mine, **shown}

    def at_random(self, memory: Any, seen: Array, first: Array, rng: Array) -> tuple[Any, Array]:
        """The policy that does anything: what an agent is measured beside."""
        actions = jax.random.randint(rng, first.shape, 0, self.environment.num_actions)
        return memory, actions
