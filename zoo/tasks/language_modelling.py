"""Language modelling: say each token from those before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.metrics import Mean


@dataclass(frozen=True)
class LanguageModelling:
    """Cross-entropy of every token but the first of a sequence, given those before it.

    The model gives logits over the vocabulary at each of `tokens`; a batch may have `mask` (True is
    text, False padding). Every predicted token counts the same, also over batches; metrics are loss
    (in nats; its exponential is the perplexity) and accuracy.
    """

    def init_inputs(self, model: nn.Module) -> dict[str, Array]:
        """Zeros to initialise the model with."""
        return zeros_like_inputs(model)

    def loss(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        rng: Array | None,
        train: bool,
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The mean loss of predicted tokens; aux has `metrics` and updated `collections`."""
        logits, collections = apply_model(model, variables, batch, rng, train)
        metrics = _metrics(logits, batch)
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        logits, _ = apply_model(model, variables, batch, None, train=False)
        return _metrics(logits, batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Int[Array, "batch length"]:
        """The most likely next token at every position."""
        logits, _ = apply_model(model, variables, batch, None, train=False)
        return logits.argmax(-1)


def _metrics(
    logits: Float[Array, "batch length vocabulary"], batch: Mapping[str, Array]
) -> dict[str, Mean]:
    # labels are moved, not logits, so that the length of these stays what a mesh can cut
    tokens = batch["tokens"]
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    counted = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    counted = counted[None] & batch["valid"][:, None]
    if "mask" in batch:
        counted &= jnp.pad(batch["mask"][:, 1:], ((0, 0), (0, 1)))
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(-1) == labels
    return {
        "loss": Mean.of(loss.reshape(-1), counted.reshape(-1)),
        "accuracy": Mean.of(right.reshape(-1), counted.reshape(-1)),
    }
