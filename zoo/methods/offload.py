"""AdamW whose states live in the host's memory, updated by subgroups on host and device by turns.

Maurya et al., "Deep Optimizer States: Towards Scalable Training of Transformer Models Using
Interleaved Offloading", Middleware 2024, arXiv 2410.21316; official code
github.com/DataStates/DeepSpeed, branch deep-optimizer-states (Apache-2.0). The parameters are cut
into subgroups. Of every k, the last is updated on the device, whose states travel there and back
while the host updates the others:

    subgroup x:  x mod k = 0: on the host, and a round of transfers starts: the device's group
                 before x goes back to the host, the one after x comes to the device
                 (x + 1) mod k = 0: on the device;   else: on the host

All ways of updating give the same numbers. The published loop leaves the last device group (n
divisible by k) and the host groups behind the last device group unfinished (`Schedule.left_device`,
`left_host`); `update` finishes them.

The host is JAX's CPU device here, and the other the device of the gradients: transfers and updates
overlap as far as dispatch is asynchronous. `times` is a performance model of ours (the paper's own
equation was not read), whose smallest k with a device path that is hidden is `Speeds.stride`.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HOST, ROUND, DEVICE = -1, 0, 1
BYTES = 12
"""Master copy and both moments of a parameter, in float32."""


def bounds(size: int, count: int) -> tuple[int, ...]:
    """Where `count` subgroups of `size` numbers begin and end, as equal as they can be.

    Raises:
      ValueError: if there are more subgroups than numbers.
    """
    if not 0 < count <= size:
        raise ValueError(f"{size} numbers cannot be cut into {count} subgroups; give 1 to {size}.")
    return tuple(i * size // count for i in range(count + 1))


class Schedule(NamedTuple):
    """What happens to each subgroup.

    Attributes:
      decisions: per subgroup HOST, ROUND (host, and transfers start) or DEVICE.
      rounds: per ROUND its subgroup, the device group to bring back and the one to fetch, or -1.
      casts: at each device group, the last host group before it and how many are sent with it as
        16-bit copies.
      left_host: host groups behind the last device group.
      left_device: the device group at the very end, or -1.
    """

    decisions: tuple[int, ...]
    rounds: tuple[tuple[int, int, int], ...]
    casts: tuple[tuple[int, int], ...]
    left_host: tuple[int, ...]
    left_device: int


def schedule(count: int, stride: int) -> Schedule:
    """The published schedule of `count` subgroups, every `stride`-th of which is the device's.

    Raises:
      ValueError: if `stride` is below 2.
    """
    if stride < 2:
        raise ValueError(f"stride={stride}: one host group goes before each device group; give 2.")
    decisions = tuple(
        ROUND if x % stride == 0 else DEVICE if (x + 1) % stride == 0 else HOST
        for x in range(count)
    )
    device = [x for x in range(count) if decisions[x] == DEVICE]
    rounds = tuple(
        (
            x,
            max((d for d in device if d < x), default=-1),
            min((d for d in device if d > x), default=-1),
        )
        for x in range(count)
        if decisions[x] == ROUND
    )
    last = device[-1] if device else -1
    casts = tuple((d - 1, stride - 1) for d in device)
    left = tuple(range(last + 1, count))
    return Schedule(decisions, rounds, casts, left, last if last == count - 1 else -1)


# ------------------------------------------------------------------------------- updates


@dataclass(frozen=True)
class AdamW:
    """`p -= lr (m' / (sqrt(v') + eps) + decay p)`, with m' and v' free of the bias of the start."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.0


class State(NamedTuple):
    """Of each subgroup: parameters and both moments; and how many steps were made."""

    params: tuple[Float[Array, "n"], ...]
    first: tuple[Float[Array, "n"], ...]
    second: tuple[Float[Array, "n"], ...]
    steps: int


def init(params: Float[Array, "size"], count: int) -> State:
    """The state before the first step, on the host."""
    edges = bounds(params.size, count)
    groups = [params[a:b].astype(jnp.float32) for a, b in itertools.pairwise(edges)]
    groups = jax.device_put(groups, _host())
    zeros = jax.device_put([jnp.zeros(g.shape, jnp.float32) for g in groups], _host())
    return State(tuple(groups), tuple(zeros), tuple(zeros), 0)


def update(
    optimizer: AdamW,
    gradients: Float[Array, "size"],
    state: State,
    stride: int | None = None,
) -> State:
    """One step.

    Args:
      optimizer: its settings.
      gradients: of all parameters; where they live is the device.
      state: of the step before.
      stride: every how many subgroups one is the device's; None: none is.
    """
    count = len(state.params)
    edges = [0]
    for group in state.params:
        edges.append(edges[-1] + group.size)
    (device,) = gradients.devices() if hasattr(gradients, "devices") else (_host(),)
    plan = None if stride is None else schedule(count, stride)
    rounds = {} if plan is None else {x: (back, fetch) for x, back, fetch in plan.rounds}
    groups = list(zip(state.params, state.first, state.second, strict=True))

    def step(x: int, where: jax.Device) -> None:
        gradient = jax.device_put(gradients[edges[x] : edges[x + 1]], where)
        number = jax.device_put(jnp.float32(state.steps + 1), where)
        groups[x] = _adamw(optimizer, *groups[x], gradient, number)

    for x in range(count):
        back, fetch = rounds.get(x, (-1, -1))
        if back >= 0:
            groups[back] = jax.device_put(groups[back], _host())
        if fetch >= 0:
            groups[fetch] = jax.device_put(groups[fetch], device)
        on_device = plan is not None and plan.decisions[x] == DEVICE
        step(x, device if on_device else _host())
    if plan is not None and plan.left_device >= 0:
        groups[plan.left_device] = jax.device_put(groups[plan.left_device], _host())
    params, first, second = (tuple(each) for each in zip(*groups, strict=True))
    return State(params, first, second, state.steps + 1)


@partial(jax.jit, static_argnums=0)
def _adamw(
    o: AdamW, p: Array, first: Array, second: Array, g: Array, step: Array
) -> tuple[Array, Array, Array]:
    g = g.astype(jnp.float32)
    first = o.b1 * first + (1 - o.b1) * g
    second = o.b2 * second + (1 - o.b2) * g * g
    mean, square = first / (1 - o.b1**step), second / (1 - o.b2**step)
    p = p - o.learning_rate * (mean / (jnp.sqrt(square) + o.epsilon) + o.decay * p)
    return p, first, second


def _host() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


# ----------------------------------------------------------------------- what it takes


@dataclass(frozen=True)
class Speeds:
    """What a machine does in a second.

    Attributes:
      device: parameters updated by the device.
      host: parameters updated by the host.
      link: bytes between them, in each direction.
      cast: parameters that the host casts to 16 bits.
      group: parameters of a subgroup.
      count: of subgroups.
    """

    device: float
    host: float
    link: float
    cast: float
    group: float
    count: int

    @property
    def device_time(self) -> float:
        """Seconds of a subgroup on the device: there, update, back."""
        return 2 * BYTES * self.group / self.link + self.group / self.device

    @property
    def host_time(self) -> float:
        """Seconds of a subgroup on the host: update, cast, and its 16-bit copy on its way."""
        return self.group / self.host + self.group / self.cast + 2 * self.group / self.link

    @property
    def stride(self) -> int:
        """The smallest of which the host's groups take as long as the device's."""
        stride = 2
        while (stride - 1) * self.host_time < self.device_time:
            stride += 1
        return stride

    def time(self, stride: int | None = None) -> float:
        """Seconds of a whole update; None: all on the host."""
        there = 0 if stride is None else self.count // stride
        return max((self.count - there) * self.host_time, there * self.device_time)
