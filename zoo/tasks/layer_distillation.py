"""Distillation of what is inside: logits, hidden states, attention scores, relations of values.

Hinton et al., arXiv 1503.02531; TinyBERT, arXiv 1909.10351; MiniLM, arXiv 2002.10957. With student
layer i and teacher layer m(i), evenly spread, and the weights of the fields,

    w_c CE(z, y) + w_l T^2 KL(teacher / T || student / T)
    + w_h mean_i |h_i M - h'_m(i)|^2 + w_a mean_i |s_i - s'_m(i)|^2 + w_r relation(v_last, v'_last)

The student has the method `Insides`, with the teacher's width where hidden states are compared and
widths differ: `TrainConfig(methods=(Insides(width=...),))`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.tasks import imitation
from zoo.tasks.apply import apply_model
from zoo.tasks.classification import class_metrics, cross_entropy
from zoo.tasks.distillation import StudentClassifier
from zoo.tasks.metrics import Mean
from zoo.tasks.task import Aux, Batch, Networks, Phase, Variables, of_network


@dataclass(frozen=True)
class LayerDistillation(StudentClassifier):
    """Classification with a teacher whose insides the student learns from.

    Attributes:
      labels: weight of the labels' cross-entropy, w_c.
      logits: weight of the teacher's logits, w_l.
      hidden: weight of hidden states, w_h.
      attention: weight of attention scores, w_a; both need the same number of heads.
      relations: weight of relations of values, w_r.
      temperature: T.
    """

    labels: float = 1.0
    logits: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    temperature: float = 2.0
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
        """The weighted sum; the teacher is in evaluation mode.

        Raises:
          ValueError: if the student lacks `Insides`, or shapes cannot be compared.
        """
        from zoo.methods.insides import Insides  # it imports tasks, too

        told = Insides().wrap(networks["teacher"])
        theirs, _ = apply_model(
            told, of_network(variables, "teacher"), batch, None, False, method="features"
        )
        theirs = jax.lax.stop_gradient(theirs)
        own = of_network(variables, "student")
        ours, changed = apply_model(networks["student"], own, batch, rng, True, method="features")
        if "hidden" not in ours:
            raise ValueError("The student needs the method Insides: methods=(Insides(...),).")
        base = cross_entropy(ours["logits"], batch["labels"])
        soft = imitation.softened(ours["logits"], theirs["logits"], self.temperature)
        metrics = class_metrics(ours["logits"], self.labels * base + self.logits * soft, batch)
        total = metrics["loss"].compute()
        parts = {"teacher": Mean.of(soft, batch.get("valid"))}
        for name, weight, key in (
            ("hidden", self.hidden, "hidden"),
            ("attention", self.attention, "scores"),
        ):
            if weight:
                value = _compared(name, ours[key], theirs[key])
                total, parts[name] = total + weight * value, Mean.of(value[None])
        if self.relations:
            value = imitation.value_relation(ours["values"][-1], theirs["values"][-1])
            total, parts["relations"] = total + self.relations * value, Mean.of(value[None])
        count = metrics["loss"].count
        metrics = {**metrics, **parts, "loss": Mean(total * count, count)}
        collections = {name: {**variables[name], "student": tree} for name, tree in changed.items()}
        return total, Aux(metrics, collections)


def _compared(name: str, ours: tuple[Array, ...], theirs: tuple[Array, ...]) -> Float[Array, ""]:
    """The mean squared difference, student layer by student layer."""
    if not ours or not theirs:
        raise ValueError(f"There is no {name} to compare: the models' {name} cannot be seen.")
    total = 0.0
    for i, x in enumerate(ours):
        y = theirs[(i + 1) * len(theirs) // len(ours) - 1]
        if x.shape != y.shape:
            raise ValueError(
                f"{name} has shape {x.shape} in the student and {y.shape} in the teacher; give "
                "Insides the teacher's width, or compare relations, which need no equal shapes."
            )
        total += imitation.mean_square(x, y)
    return total / len(ours)
