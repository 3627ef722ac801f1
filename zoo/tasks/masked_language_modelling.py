"""Masked language modelling: say which tokens were hidden."""

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
class MaskedLanguageModelling:
    """Cross-entropy at the positions whose label is not negative (`zoo.data.text.MaskTokens`).

    Devlin et al., arXiv 1810.04805, section 3.1. The model gives logits over the vocabulary (of a
    model that also predicts the next sentence, the first of its outputs is used). Every predicted
    token counts the same, also over batches; metrics are loss and accuracy.
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
        output, collections = apply_model(model, variables, batch, rng, train)
        metrics = _metrics(output, batch)
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        output, _ = apply_model(model, variables, batch, None, train=False)
        return _metrics(output, batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Int[Array, "batch length"]:
        """The most likely token at every position."""
        output, _ = apply_model(model, variables, batch, None, train=False)
        return _words(output).argmax(-1)


def _words(output: Any) -> Float[Array, "batch length vocabulary"]:
    return output[0] if isinstance(output, tuple) else output


def _metrics(output: Any, batch: Mapping[str, Array]) -> dict[str, Mean]:
    logits, labels = _words(output).astype(jnp.float32), batch["labels"]
    asked = (labels >= 0) & batch["valid"][:, None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    right = logits.argmax(-1) == labels
    return {
        "loss": Mean.of(loss.reshape(-1), asked.reshape(-1)),
        "accuracy": Mean.of(right.reshape(-1), asked.reshape(-1)),
    }
