"""Language modelling: say each token from those before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class LanguageModelling(OneNetwork):
    """Cross-entropy of every token but the first of a sequence, given those before it.

    The model gives logits over the vocabulary at each of `tokens`; a batch may have `mask` (True is
    text, False padding), or `segments` of packed documents (0 is padding), whose first tokens are
    not predicted. Every predicted token counts the same, also over batches; metrics are loss (in
    nats; its exponential is the perplexity) and accuracy.
    """

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Loss and accuracy of the predicted tokens."""
        return _metrics(output, batch)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Int[Array, "batch length"]]:
        """The most likely next token at every position."""
        logits, _ = self.run(networks, variables, batch)
        return {"tokens": logits.argmax(-1)}


def _metrics(
    logits: Float[Array, "batch length vocabulary"], batch: Mapping[str, Array]
) -> dict[str, Mean]:
    # labels are moved, not logits, so that the length of these stays what a mesh can cut
    tokens = batch["tokens"]
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counted = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    counted = counted[None] & batch["valid"][:, None]
    if "segments" in batch:  # the next token is of the same document, and no padding
        segments = batch["segments"]
        after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
        counted &= (segments == after) & (after > 0)
    if "mask" in batch:
        counted &= jnp.pad(batch["mask"][:, 1:], ((0, 0), (0, 1)))
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(-1) == labels
    return {
        "loss": Mean.of(loss.reshape(-1), counted.reshape(-1)),
        "accuracy": Mean.of(right.reshape(-1), counted.reshape(-1)),
    }
