"""What a student learns from a teacher, as functions: logits, hidden states, attention, relations.

Hinton et al., arXiv 1503.02531 (logits); TinyBERT, arXiv 1909.10351 (hidden states, attention);
MiniLM, arXiv 2002.10957 (relations of values). `zoo.tasks.distillation` trains with the first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def softened(
    student: Float[Array, "... classes"], teacher: Float[Array, "... classes"], temperature: float
) -> Float[Array, "..."]:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of each example."""
    ours = jax.nn.log_softmax(student / temperature, -1)
    theirs = jax.nn.log_softmax(teacher / temperature, -1)
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)


def soft_cross_entropy(
    student: Float[Array, "... classes"], teacher: Float[Array, "... classes"]
) -> Float[Array, "..."]:
    """`-sum softmax(teacher) log softmax(student)` of each example."""
    return -jnp.sum(jax.nn.softmax(teacher, -1) * jax.nn.log_softmax(student, -1), -1)


def mean_square(ours: Float[Array, "..."], theirs: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean squared difference, of hidden states (behind a projection) or attention outputs."""
    return jnp.mean(jnp.square(ours - theirs))


def score_square(
    ours: Float[Array, "..."], theirs: Float[Array, "..."], hidden: float = -100.0
) -> Float[Array, ""]:
    """The mean squared difference of attention scores; masked ones (`<= hidden`) count as 0."""
    ours, theirs = (jnp.where(x <= hidden, 0.0, x) for x in (ours, theirs))
    return mean_square(ours, theirs)


def value_relation(
    ours: Float[Array, "batch heads length d"],
    theirs: Float[Array, "batch heads length e"],
    valid: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    """MiniLM: the KL between `softmax(V V^T / sqrt(d))` of the teacher and of the student."""

    def relation(value: Array) -> Array:
        scores = value @ value.swapaxes(-1, -2) * value.shape[-1] ** -0.5
        return scores if valid is None else jnp.where(valid[:, None, None], scores, -1e30)

    each = softened(relation(ours), relation(theirs), 1.0)  # batch heads length
    if valid is None:
        return each.mean()
    keep = jnp.broadcast_to(valid[:, None], each.shape)
    return jnp.sum(each * keep) / keep.sum()
