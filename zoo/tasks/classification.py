"""Classification of images, texts or anything else a model gives class logits for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.metrics import Mean


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Array,
    label_smoothing: float = 0.0,
) -> Float[Array, "batch"]:
    """Cross-entropy of each example, in float32, with labels `[batch]` or distributions.

    Smoothing is applied to class numbers only; a distribution (`MixPairs`) is smoothed already.
    """
    logits = logits.astype(jnp.float32)
    if labels.ndim == 1:
        if not label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        labels = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, labels)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; metrics are loss and accuracy (and top-5 with more than ten classes).

    Batches: the model's inputs (`images`, `tokens` ...), `labels` as class numbers `[batch]` or
    distributions `[batch, classes]`, and `valid [batch]`. A distilled model's pair of logits is
    trained with the mean of both losses.

    Attributes:
      label_smoothing: in training, of class numbers.
    """

    label_smoothing: float = 0.0

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
        """The mean loss of the valid examples; aux has `metrics` and updated `collections`."""
        output, collections = apply_model(model, variables, batch, rng, train)
        heads = output if isinstance(output, tuple) else (output,)
        smoothing = self.label_smoothing if train else 0.0
        each = sum(cross_entropy(h, batch["labels"], smoothing) for h in heads) / len(heads)
        metrics = self._metrics(sum(heads) / len(heads), each, batch)
        return metrics["loss"].compute(), {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        logits, _ = apply_model(model, variables, batch, None, train=False)
        return self._metrics(logits, cross_entropy(logits, batch["labels"]), batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Float[Array, "batch classes"]:
        """Class probabilities."""
        logits, _ = apply_model(model, variables, batch, None, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    def _metrics(self, logits: Array, loss: Array, batch: Mapping[str, Array]) -> dict[str, Mean]:
        labels, valid = batch["labels"], batch.get("valid")
        labels = labels if labels.ndim == 1 else labels.argmax(-1)
        metrics = {
            "loss": Mean.of(loss, valid),
            "accuracy": Mean.of(logits.argmax(-1) == labels, valid),
        }
        if logits.shape[-1] > 10:
            metrics["top5"] = Mean.of(_rank(logits, labels) < 5, valid)
        return metrics


def _rank(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]
) -> Int[Array, "batch"]:
    """How many classes stand before the label's; of equal ones, those of a smaller number.

    `lax.top_k` tells the same, but sends the logits of the whole batch to every chip of a mesh.
    """
    classes = jnp.arange(logits.shape[-1])
    own = jnp.where(classes == labels[:, None], logits, 0).sum(-1, keepdims=True)
    tied = (logits == own) & (classes < labels[:, None])
    return (~(logits <= own) | tied).sum(-1)  # a NaN stands before numbers and is never right
