"""How the next token is chosen: `Sampler = (rng, logits) -> tokens`, and what is done to logits.

    sampler = Draw(Temperature(0.8), TopK(40), TopP(0.95))      from left to right, then a draw

Filters are frozen dataclasses `logits -> logits`, so that equal ones compile once; any function of
the same kind will do. Definitions as in transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Sampler = Callable[[PRNGKeyArray | None, Float[Array, "batch vocab"]], Int[Array, "batch"]]
Filter = Callable[[Float[Array, "batch vocab"]], Float[Array, "batch vocab"]]


def greedy(rng: PRNGKeyArray | None, logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """The most likely token, the first of equals; needs no random numbers."""
    return logits.argmax(-1).astype(jnp.int32)


@dataclass(frozen=True, init=False)
class Draw:
    """A draw from the distribution that filtered logits give.

    Attributes:
      filters: applied from left to right.
    """

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)

    def __call__(
        self, rng: PRNGKeyArray | None, logits: Float[Array, "batch vocab"]
    ) -> Int[Array, "batch"]:
        """One token for each row."""
        if rng is None:
            raise ValueError("Drawing tokens needs rng=, a key of jax.random; greedy needs none.")
        return jax.random.categorical(rng, self.filtered(logits)).astype(jnp.int32)

    def filtered(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """What the tokens are drawn from, as logits."""
        for change in self.filters:
            logits = change(logits)
        return logits


@dataclass(frozen=True)
class Temperature:
    """Logits are divided by `value`: below one the likely becomes likelier."""

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"Temperature({self.value}) should be above 0; greedy is its limit.")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """The scaled logits."""
        return logits / self.value


@dataclass(frozen=True)
class TopK:
    """Only the `count` most likely tokens remain, and those as likely as the last of them."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"TopK({self.count}) should leave at least 1 token.")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """The logits, -inf at the tokens that are left out."""
        if self.count >= logits.shape[-1]:
            return logits
        least = jax.lax.top_k(logits, self.count)[0][..., -1:]
        return jnp.where(logits < least, -jnp.inf, logits)


@dataclass(frozen=True)
class TopP:
    """Only the fewest tokens remain that have the probability `mass` together (nucleus)."""

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"TopP({self.mass}) should be a probability above 0.")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """The logits, -inf at the tokens that are left out."""
        order = jnp.argsort(-logits, axis=-1)
        ordered = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        keep = jnp.take_along_axis(before < self.mass, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(keep, logits, -jnp.inf)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens that a text already has become less likely (CTRL, arXiv 1909.05858).

    Attributes:
      factor: positive logits are divided by it, negative ones multiplied; above 1.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"RepetitionPenalty({self.factor}) should be above 0.")

    def __call__(
        self, logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"]
    ) -> Float[Array, "batch vocab"]:
        """The logits; `seen` says which tokens the prompt or its continuation has."""
        less = jnp.where(logits > 0, logits / self.factor, logits * self.factor)
        return jnp.where(seen, less, logits)
