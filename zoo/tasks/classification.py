"""Classification of images, texts or anything else a model gives class logits for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from zoo.tasks.apply import check_numbers
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
      class_weights: in training, of each class (`zoo.data.class_weights`); none: all count alike.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    metric: ClassVar[str] = "accuracy"
    checks_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
          ValueError: if smoothing or a weight is senseless.
        """
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        if any(not 0 <= w < float("inf") for w in self.class_weights):
            raise ValueError("class_weights must be numbers from 0 on.")

    def check(
        self, networks: nn.Module, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Refuse labels that are no class numbers of the model, or inputs of another kind.

        Raises:
          ValueError: naming a label and how many are so.
        """
        super().check(networks, batch, outputs)
        if "labels" not in batch:
            has = ", ".join(name for name in batch if name != "valid")
            raise ValueError(f"Classification needs a label of each example; they have only {has}.")
        if "probabilities" in outputs:
            if outputs["probabilities"].shape[-1] == 1:
                raise ValueError(
                    "The model has one class, which every example is of, so that there is nothing "
                    "to learn; give it two (num_classes=2), or use zoo.tasks.Regression."
                )
            check_labels(batch["labels"], outputs["probabilities"].shape[-1])
        if self.class_weights and "probabilities" in outputs:
            count = outputs["probabilities"].shape[-1]
            if len(self.class_weights) != count:
                raise ValueError(
                    f"class_weights has {len(self.class_weights)} numbers, and the model has "
                    f"{count} classes."
                )

    def measure(
        self, network: nn.Module, output: Any, batch: Batch, train: bool
    ) -> dict[str, Mean]:
        """Loss, accuracy and, with more than ten classes, top-5 accuracy."""
        if train:
            heads = output if isinstance(output, tuple) else (output,)
            smoothing = self.label_smoothing
            each = sum(cross_entropy(h, batch["labels"], smoothing) for h in heads) / len(heads)
            metrics = class_metrics(sum(heads) / len(heads), each, batch)
            return metrics | self._weighted(each, batch)
        return class_metrics(output, cross_entropy(output, batch["labels"]), batch)

    def _weighted(self, each: Float[Array, "batch"], batch: Batch) -> dict[str, Mean]:
        """The loss by the weights of the classes: their weighted mean."""
        if not self.class_weights:
            return {}
        labels, weights = batch["labels"], jnp.asarray(self.class_weights, jnp.float32)
        weights = weights[labels] if labels.ndim == 1 else labels @ weights
        if "valid" in batch:
            weights = jnp.where(batch["valid"], weights, 0)
        return {"loss": Mean(jnp.where(weights > 0, each * weights, 0).sum(), weights.sum())}

    def predict(
        self, networks: nn.Module, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch classes"]]:
        """Class probabilities."""
        logits, _ = self.run(networks, variables, batch)
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}


def check_labels(labels: Any, classes: int) -> None:
    """Refuse labels that are neither class numbers `[batch]` nor distributions `[batch, classes]`.

    Raises:
      ValueError: naming a label and how many are so.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind in "OSU":
        raise ValueError(
            f"Labels are text such as {labels.reshape(-1)[0]!r}; number them, as "
            "numpy.unique(labels, return_inverse=True) does."
        )
    if labels.ndim == 2 and labels.shape[1] == classes:
        if labels.dtype.kind != "f":
            raise ValueError(f"Labels are {labels.dtype} [batch, {classes}]; distributions over "
                             "classes are floats: labels.astype('float32').")  # fmt: skip
        odd = ~(np.abs(labels.sum(1) - 1) < 1e-2) | (labels < -1e-6).any(1)
        if odd.any():
            raise ValueError(
                f"{int(odd.sum())} of {len(labels)} labels are no distributions over the {classes} "
                f"classes, such as one with the sum {labels[odd][0].sum():g}; each sums to 1 (an "
                "example of several classes is nothing that this task learns)."
            )
        return
    if labels.ndim != 1:
        raise ValueError(
            f"Labels have the shape {list(labels.shape)}; a label is one class number, so that a "
            f"batch has [{len(labels)}], or a distribution over the {classes} classes of the model."
        )
    if labels.dtype.kind not in "iub":
        raise ValueError(
            f"Labels are {labels.dtype} such as {labels[0]}; class numbers are integers: "
            "labels.astype(int), or use zoo.tasks.Regression for numbers."
        )
    check_numbers("labels", labels.astype(np.int64), classes, "num_classes")


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
