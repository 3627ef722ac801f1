"""What foundation models learn from, as functions of arrays: contrast, masks, preferences, noise.

Named after where they come from; surveyed in Zhou et al., arXiv 2302.09419. Each gives the mean
over its examples, unless it says otherwise. Rows that are compared by their angle have unit length
already.
"""

import jax
import jax.numpy as jnp
import numpy as np
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


def contrast_in_time(
    context: Float[Array, "batch time d"],
    latents: Float[Array, "batch time d"],
    negatives: Int[Array, "batch time count"],
    chosen: Bool[Array, "batch time"],
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """wav2vec 2.0, arXiv 2006.11477: at masked times, which quantised latent is the hidden one.

    Args:
      context: what the network says.
      latents: quantised.
      negatives: other times of the same sound.
      chosen: which times were masked.
      temperature: of the cosines.
    """
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)  # noqa: E731
    context, latents = unit(context), unit(latents)
    others = jax.vmap(lambda rows, places: rows[places])(latents, negatives)
    every = jnp.concatenate([latents[:, :, None], others], axis=2)
    logits = jnp.einsum("btd,btkd->btk", context, every) / temperature
    # a distractor that is the hidden latent itself is none
    same = jnp.all(others == latents[:, :, None], axis=-1)
    logits = logits.at[:, :, 1:].add(jnp.where(same, -jnp.inf, 0))
    each = _cross_entropy(logits, jnp.zeros(logits.shape[:2], jnp.int32))
    return jnp.sum(each * chosen) / jnp.sum(chosen)


# ---------------------------------------------------------------------- sets of objects


def corners(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Centre and size to the corners (left, top, right, bottom)."""
    center, size = jnp.split(boxes, 2, axis=-1)
    return jnp.concatenate([center - size / 2, center + size / 2], -1)


def generalised_iou(first: Float[Array, "... 4"], second: Float[Array, "... 4"]) -> Array:
    """Rezatofighi et al., arXiv 1902.09630, of boxes given by their corners; from -1 to 1."""

    def area(low: Array, high: Array) -> Array:
        return jnp.prod(jnp.maximum(high - low, 0), -1)

    (a, b), (c, d) = jnp.split(first, 2, -1), jnp.split(second, 2, -1)
    inside = area(jnp.maximum(a, c), jnp.minimum(b, d))
    union = area(a, b) + area(c, d) - inside
    hull = area(jnp.minimum(a, c), jnp.maximum(b, d))
    return inside / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)


def set_prediction(
    logits: Float[Array, "queries classes"],
    boxes: Float[Array, "queries 4"],
    labels: Int[Array, "objects"],
    targets: Float[Array, "objects 4"],
    *,
    nothing: float = 0.1,
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
) -> Float[Array, ""]:
    """DETR, arXiv 2005.12872: each object is matched with one query, the others say "nothing".

    Args:
      logits: the last class is "nothing".
      boxes: centre and size, in shares of the image.
      labels: of the objects, at most as many as there are queries.
      targets: their boxes.
      nothing: weight of the class "nothing".
      weights: of class, L1 distance and generalised IoU, in the match and in the loss.
    """
    chance = jax.nn.softmax(logits, -1)[:, labels]
    distance = jnp.abs(boxes[:, None] - targets).sum(-1)
    overlap = generalised_iou(corners(boxes)[:, None], corners(targets))
    cost = -weights[0] * chance + weights[1] * distance - weights[2] * overlap
    query, thing = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    classes = jnp.full(len(logits), logits.shape[-1] - 1).at[query].set(labels[thing])
    weight = jnp.where(classes == logits.shape[-1] - 1, nothing, 1.0)
    named = jnp.sum(_cross_entropy(logits, classes) * weight) / weight.sum()
    count = len(labels)
    far = distance[query, thing].sum() / count
    apart = (1 - overlap[query, thing]).sum() / count
    return weights[0] * named + weights[1] * far + weights[2] * apart


# ----------------------------------------------------- texts with holes (NumPy, for data)


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `count` parts, none empty, that make up `total`."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    sentinel: int,
    rate: float = 0.15,
    length: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """T5, arXiv 1910.10683: spans are hidden behind sentinels, and the target names them.

    Args:
      tokens: one text.
      rng: chooses the spans.
      sentinel: number of the first sentinel; the next ones count down.
      rate: share of tokens that are hidden.
      length: mean length of a span.

    Returns:
      Input and target: `a <s0> d`, `<s0> b c <s1>` for `a b c d`.
    """
    hidden = min(max(round(len(tokens) * rate), 1), len(tokens) - 1)
    count = max(min(round(hidden / length), hidden, len(tokens) - hidden), 1)
    shown, holes = _parts(len(tokens) - hidden, count, rng), _parts(hidden, count, rng)
    given, target, at = [], [], 0
    for i, (keep, hole) in enumerate(zip(shown, holes, strict=True)):
        given += [*tokens[at : at + keep], sentinel - i]
        target += [sentinel - i, *tokens[at + keep : at + keep + hole]]
        at += keep + hole
    return np.array(given), np.array([*target, sentinel - count])


def infilling(
    tokens: np.ndarray,
    rng: np.random.Generator,
    mask: int,
    rate: float = 0.3,
    length: float = 3.0,
) -> np.ndarray:
    """BART, arXiv 1910.13461: spans of Poisson length become one mask each; an empty one adds one.

    The target is the text itself.
    """
    left, out = round(len(tokens) * rate), list(tokens)
    while left > 0:
        span = min(int(rng.poisson(length)), left, len(out))
        start = int(rng.integers(len(out) - span + 1))
        out[start : start + span] = [mask]
        left -= max(span, 1)
    return np.array(out)


def swapped(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """ALBERT's sentence order, arXiv 1909.11942: two segments, swapped (label 0) or not (1)."""
    kept = int(rng.integers(2))
    return (first, second, 1) if kept else (second, first, 0)
