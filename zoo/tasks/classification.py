"""Classification of images, texts or anything else a model gives class logits for."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.metrics import Mean
from zoo.tasks.task import Batch, OneNetwork, Variables


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
class Classification(OneNetwork):
    """Cross-entropy; metrics are loss and accuracy (and top-5 with more than ten classes).

    Batches: the model's inputs (`images`, `tokens` ...), `labels` as class numbers `[batch]` or
    distributions `[batch, classes]`, and `valid [batch]`. A distilled model's pair of logits is
    trained with the mean of both losses.

    Attributes:
      label_smoothing: in training, of class numbers.
    """

    label_smoothing: float = 0.0

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Loss, accuracy and, with more than ten classes, top-5 accuracy."""
        if train:
            heads = output if isinstance(output, tuple) else (output,)
            smoothing = self.label_smoothing
            each = sum(cross_entropy(h, batch["labels"], smoothing) for h in heads) / len(heads)
            return class_metrics(sum(heads) / len(heads), each, batch)
        return class_metrics(output, cross_entropy(output, batch["labels"]), batch)

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch classes"]]:
        """Class probabilities."""
        logits, _ = self.run(networks, variables, batch)
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}


def class_metrics(
    logits: Float[Array, "batch classes"], loss: Float[Array, "batch"], batch: Batch
) -> dict[str, Mean]:
    """Metrics of class logits, with the loss of each example that they gave."""
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
