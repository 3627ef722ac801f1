"""Masked language modelling: say which tokens were hidden."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.apply import check_numbers
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


@dataclass(frozen=True)
class MaskedLanguageModelling(OneNetwork):
    """Cross-entropy at the positions whose label is not negative (`zoo.data.text.MaskTokens`).

    Devlin et al., arXiv 1810.04805, section 3.1. The model gives logits over the vocabulary (of a
    model that also predicts the next sentence, the first of its outputs is used). Every predicted
    token counts the same, also over batches; metrics are loss and accuracy.
    """

    def check(
        self, networks: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse labels outside the vocabulary; negative ones are not asked for.

        Raises:
          ValueError: naming a label and how many are so.
        """
        super().check(networks, batch, outputs)
        size = getattr(networks, "vocab_size", None)
        if size and "labels" in batch:
            labels = np.asarray(batch["labels"])
            check_numbers("labels", labels, int(size), "vocab_size", labels < 0)

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Loss and accuracy of the predicted tokens."""
        return _metrics(output, batch)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Int[Array, "batch length"]]:
        """The most likely token at every position."""
        output, _ = self.run(networks, variables, batch)
        return {"tokens": _words(output).argmax(-1)}


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
