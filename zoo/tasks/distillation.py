"""Distillation: a student learns from labels and from what a teacher says of the same examples.

Touvron et al. (DeiT), arXiv 2012.12877, section 4; official code github.com/facebookresearch/deit,
`losses.py` (Apache-2.0). With the logits `z` of the student's class token and `z_d` of its
distillation token, `z_t` of the teacher and labels y:

    hard    (1 - a) CE(z, y) + a CE(z_d, argmax z_t)
    soft    (1 - a) CE(z, y) + a tau^2 KL(softmax(z_t / tau) || softmax(z_d / tau))

where the code divides the KL by the number of logits, which the mean over the batch here does too
(`KL` is summed over classes and averaged over examples, divided by the number of classes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks.apply import apply_model
from zoo.tasks.classification import Classification, class_metrics, cross_entropy
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Task, Variables, of_network


class StudentClassifier(Task):
    """Base of tasks whose network `student` is measured and asked as a classifier."""

    metric: ClassVar[str] = "accuracy"
    checks_outputs: ClassVar[bool] = True

    def check(
        self, networks: Networks, batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """As `Classification` does for the student."""
        Classification().check(networks["student"], batch, outputs)

    def metrics(self, networks: Networks, variables: Variables, batch: Batch) -> dict[str, Mean]:
        """Those of the student's logits as a classifier."""
        logits = self._logits(networks, variables, batch)
        return class_metrics(logits, cross_entropy(logits, batch["labels"]), batch)

    def predict(
        self, networks: Networks, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "batch classes"]]:
        """The student's class probabilities."""
        logits = self._logits(networks, variables, batch)
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

    def _logits(self, networks: Networks, variables: Variables, batch: Batch) -> Array:
        own = of_network(variables, "student")
        return apply_model(networks["student"], own, batch, None, False)[0]


@dataclass(frozen=True)
class Distillation(StudentClassifier):
    """Classification with a teacher: networks `student` and `teacher`, of which one is trained.

    Batches are those of `Classification`; both networks take the same inputs. A student without a
    distillation token learns both from its only logits.

    Attributes:
      kind: what the teacher is asked for, its decision or its distribution.
      alpha: weight of the teacher.
      temperature: of both distributions (`soft`).
      label_smoothing: of the labels, in training.
    """

    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 3.0
    label_smoothing: float = 0.0
    phases: ClassVar[tuple[Phase, ...]] = (Phase("train", ("student",)),)

    def loss(
        self,
        networks: Networks,
        variables: Variables,
        carry: Any,
        batch: Batch,
        rng: PRNGKeyArray,
        phase: str,
    ) -> tuple[Float[Array, ""], Aux]:
        """Both losses, weighted; the teacher is in evaluation mode."""
        teacher, _ = apply_model(
            networks["teacher"], of_network(variables, "teacher"), batch, None, False
        )
        own = of_network(variables, "student")
        output, changed = apply_model(networks["student"], own, batch, rng, True)
        classes, distilled = output if isinstance(output, tuple) else (output, output)
        base = cross_entropy(classes, batch["labels"], self.label_smoothing)
        extra = self.from_teacher(distilled, jax.lax.stop_gradient(teacher))
        each = (1 - self.alpha) * base + self.alpha * extra
        metrics = class_metrics((classes + distilled) / 2, each, batch)
        metrics["teacher"] = Mean.of(extra, batch.get("valid"))
        collections = {name: {**variables[name], "student": tree} for name, tree in changed.items()}
        return metrics["loss"].compute(), Aux(metrics, collections)

    def from_teacher(
        self, logits: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
    ) -> Float[Array, "batch"]:
        """The loss of each example that the teacher gives."""
        if self.kind == "hard":
            return cross_entropy(logits, teacher.argmax(-1))
        tau = self.temperature
        ours = jax.nn.log_softmax(logits.astype(jnp.float32) / tau, -1)
        theirs = jax.nn.log_softmax(teacher.astype(jnp.float32) / tau, -1)
        divergence = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
        return divergence * tau**2 / logits.shape[-1]
