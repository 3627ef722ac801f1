"""What foundation models learn from, as functions of arrays: contrast, masks, preferences, noise.

Named after where they come from; surveyed in Zhou et al., arXiv 2302.09419. Each gives the mean
over its examples, unless it says otherwise. Rows that are compared by their angle have unit length
already.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def _cross_entropy(logits: Float[Array, "... classes"], labels: Int[Array, "..."]) -> Array:
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    return -jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]


# ----------------------------------------------------------------------------- contrast


def clip(
    images: Float[Array, "batch d"], texts: Float[Array, "batch d"], scale: float | Array = 1 / 0.07
) -> Float[Array, ""]:
    """CLIP, arXiv 2103.00020: which text is whose image's, and the other way, halved."""
    logits = scale * images @ texts.T
    labels = jnp.arange(len(logits))
    return (_cross_entropy(logits, labels).mean() + _cross_entropy(logits.T, labels).mean()) / 2


def simclr(
    first: Float[Array, "batch d"], second: Float[Array, "batch d"], temperature: float = 0.1
) -> Float[Array, ""]:
    """SimCLR, arXiv 2002.05709: each view finds the other among all `2 batch - 1`."""
    views = jnp.concatenate([first, second])
    logits = views @ views.T / temperature
    logits = jnp.where(jnp.eye(len(views), dtype=bool), -jnp.inf, logits)
    return _cross_entropy(logits, jnp.roll(jnp.arange(len(views)), len(first))).mean()


def moco(
    query: Float[Array, "batch d"],
    key: Float[Array, "batch d"],
    queue: Float[Array, "keys d"],
    temperature: float = 0.07,
) -> Float[Array, ""]:
    """MoCo, arXiv 1911.05722: each query finds its key among those of a queue."""
    logits = jnp.concatenate([jnp.sum(query * key, -1, keepdims=True), query @ queue.T], -1)
    return _cross_entropy(logits / temperature, jnp.zeros(len(query), jnp.int32)).mean()


def dino(
    student: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    center: Float[Array, "classes"],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    momentum: float = 0.9,
) -> tuple[Float[Array, ""], Float[Array, "classes"]]:
    """DINO, arXiv 2104.14294: the teacher's sharpened distribution, and the next centre."""
    wanted = jax.lax.stop_gradient(jax.nn.softmax((teacher - center) / teacher_temperature, -1))
    loss = -jnp.sum(wanted * jax.nn.log_softmax(student / student_temperature, -1), -1).mean()
    return loss, momentum * center + (1 - momentum) * teacher.mean(0)


# -------------------------------------------------------------------------------- masks


def mae(
    patches: Float[Array, "batch length d"],
    output: Float[Array, "batch length d"],
    removed: Bool[Array, "batch length"],
    *,
    normalise: bool = True,
) -> Float[Array, ""]:
    """MAE, arXiv 2111.06377: squared error of the pixels of the patches that were removed.

    With `normalise` a patch's pixels have mean 0 and (unbiased) variance 1, as in the official
    code.
    """
    if normalise:
        mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
        patches = (patches - mean) / jnp.sqrt(var + 1e-6)
    each = jnp.square(output - patches).mean(-1)
    return jnp.sum(each * removed) / jnp.sum(removed)


def random_mask(
    noise: Float[Array, "batch length"], share: float = 0.75
) -> tuple[Bool[Array, "batch length"], Int[Array, "batch kept"], Int[Array, "batch length"]]:
    """MAE's mask from noise: which patches are removed, which are kept, and where each goes back.

    The `int(length * (1 - share))` patches with the smallest noise are kept, in that order.
    """
    order = jnp.argsort(noise, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1, stable=True)
    kept = int(noise.shape[-1] * (1 - share))
    return back >= kept, order[:, :kept], back


def causal(
    logits: Float[Array, "batch length vocab"], tokens: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """GPT: nats per token of what follows each token; perplexity is its exponential."""
    return _cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


def masked(
    logits: Float[Array, "batch length vocab"],
    tokens: Int[Array, "batch length"],
    chosen: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    """BERT: nats per chosen token."""
    return jnp.sum(_cross_entropy(logits, tokens) * chosen) / jnp.sum(chosen)


def replaced(
    logits: Float[Array, "batch length"],
    is_replaced: Bool[Array, "batch length"],
    valid: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    """ELECTRA's discriminator, arXiv 2003.10555: whether each token was replaced."""
    each = optax.sigmoid_binary_cross_entropy(logits, is_replaced.astype(jnp.float32))
    return each.mean() if valid is None else jnp.sum(each * valid) / jnp.sum(valid)


def electra(
    generator: Float[Array, ""], discriminator: Float[Array, ""], weight: float = 50.0
) -> Float[Array, ""]:
    """The sum that ELECTRA trains with."""
    return generator + weight * discriminator


# --------------------------------------------------------------------- labels and choices


def smoothed(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.1
) -> Float[Array, ""]:
    """Cross-entropy with a share of every label spread over all classes."""
    logs = jax.nn.log_softmax(logits, -1)
    plain = _cross_entropy(logits, labels)
    return jnp.mean((1 - smoothing) * plain - smoothing * logs.mean(-1))


def reward(better: Float[Array, "batch"], worse: Float[Array, "batch"]) -> Float[Array, ""]:
    """A reward model's loss, arXiv 2203.02155: `-log sigmoid(better - worse)`."""
    return jax.nn.softplus(worse - better).mean()


def dpo(
    better: Float[Array, "batch"],
    worse: Float[Array, "batch"],
    reference_better: Float[Array, "batch"],
    reference_worse: Float[Array, "batch"],
    beta: float = 0.1,
) -> Float[Array, ""]:
    """DPO, arXiv 2305.18290, from the log-probabilities of both answers in model and reference."""
    margin = (better - reference_better) - (worse - reference_worse)
    return jax.nn.softplus(-beta * margin).mean()


# ------------------------------------------------------------------------ noise and sound


def noised(
    x: Float[Array, "..."], noise: Float[Array, "..."], alpha_bar: float | Array
) -> Float[Array, "..."]:
    """DDPM, arXiv 2006.11239: `sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise`."""
    alpha_bar = jnp.asarray(alpha_bar, x.dtype)
    return jnp.sqrt(alpha_bar) * x + jnp.sqrt(1 - alpha_bar) * noise


def denoising(predicted: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, ""]:
    """The squared error of the noise."""
    return jnp.mean(jnp.square(predicted - noise))


def ctc(
    logits: Float[Array, "batch time classes"],
    labels: Int[Array, "batch length"],
    *,
    time_padding: Bool[Array, "batch time"] | None = None,
    label_padding: Bool[Array, "batch length"] | None = None,
    blank: int = 0,
) -> Float[Array, "batch"]:
    """Connectionist temporal classification of each sequence (optax's)."""
    time_padding = jnp.zeros(logits.shape[:2]) if time_padding is None else time_padding
    label_padding = jnp.zeros(labels.shape) if label_padding is None else label_padding
    return optax.ctc_loss(
        logits,
        time_padding.astype(jnp.float32),
        labels,
        label_padding.astype(jnp.float32),
        blank_id=blank,
    )
