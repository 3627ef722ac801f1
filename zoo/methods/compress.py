"""Making inference cheaper: pruning, INT8, and when to leave early, as functions of arrays.

Definitions as in Chitty-Venkata et al., "A Survey of Techniques for Optimizing Transformer
Inference", arXiv 2307.07982, and the papers named with each function. What learns from a teacher is
in `zoo.tasks.imitation`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Int32

# ----------------------------------------------------------------------------- pruning


def nm_mask(
    weight: Float[Array, "outputs inputs"], keep: int, group: int
) -> Bool[Array, "outputs inputs"]:
    """N:M sparsity: the `keep` largest of each `group` consecutive inputs.

    Raises:
      ValueError: if the inputs are no whole number of groups.
    """
    outputs, inputs = weight.shape
    if inputs % group or not 0 < keep <= group:
        raise ValueError(
            f"{keep}:{group} sparsity needs inputs in whole groups of {group}, not {inputs}; "
            "choose a group that divides them and keeps at most its size."
        )
    size = jnp.abs(weight).reshape(outputs, inputs // group, group)
    rank = jnp.argsort(jnp.argsort(-size, axis=-1, stable=True), axis=-1, stable=True)
    return (rank < keep).reshape(outputs, inputs)


def magnitude_mask(weight: Float[Array, "..."], sparsity: float) -> Bool[Array, "..."]:
    """All but the share `sparsity` of weights that is smallest."""
    size = jnp.abs(weight).reshape(-1)
    rank = jnp.argsort(jnp.argsort(size, stable=True), stable=True)
    return (rank >= round(sparsity * size.size)).reshape(weight.shape)


def movement_score(
    weight: Float[Array, "..."], gradient: Float[Array, "..."], score: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Movement pruning's score (Sanh et al., arXiv 2005.07683): `score - weight * gradient`."""
    return score - weight * gradient


def head_importance(
    loss: Callable[[Float[Array, "heads"], Any], Float[Array, ""]], heads: int, examples: Any
) -> tuple[Float[Array, "heads"], Float[Array, "heads"]]:
    """The mean over examples of |d loss / d gate| at open gates (Michel et al., arXiv 1905.10650).

    Args:
      loss: of an example, from a gate on each head's output.
      heads: how many there are.
      examples: arrays whose first axis counts the examples.

    Returns:
      The importance of each head, and the same divided by its length.
    """
    gates = jnp.ones(heads)
    each = jax.vmap(lambda example: jax.grad(loss)(gates, example))(examples)
    importance = jnp.abs(each).mean(0)
    return importance, importance / jnp.linalg.norm(importance)


def keep_heads(
    kernel: Float[Array, "inputs outputs"], heads: Int[np.ndarray, "kept"], count: int, axis: int
) -> Float[Array, "..."]:
    """The columns (axis 1: query, key, value) or rows (axis 0: out) of the heads that are kept."""
    width = kernel.shape[axis] // count
    places = (np.asarray(heads)[:, None] * width + np.arange(width)).reshape(-1)
    return jnp.take(kernel, places, axis=axis)


# -------------------------------------------------------------------------------- INT8


def quantise(
    x: Float[Array, "..."], axis: int | None = -1, bits: int = 8
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Symmetric codes and their scale `max |x| / (2^(bits-1) - 1)`.

    Args:
      x: what is quantised.
      axis: along which numbers share a scale; None: all of them.
      bits: at most 8.
    """
    top = 2 ** (bits - 1) - 1
    scale = jnp.abs(x).max(axis, keepdims=axis is not None) / top
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.clip(jnp.round(x / scale), -top, top).astype(jnp.int8), scale


def int8_matmul(
    x: Float[Array, "batch inputs"], weight: Float[Array, "outputs inputs"], bits: int = 8
) -> tuple[Float[Array, "batch outputs"], Int32[Array, "batch outputs"]]:
    """The product of codes, summed in int32 and scaled per row and per output; and that sum."""
    qx, sx = quantise(x, bits=bits)
    qw, sw = quantise(weight, bits=bits)
    total = jax.lax.dot_general(
        qx, qw, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return total.astype(jnp.float32) * sx * sw[:, 0], total


def smoothing(
    activation: Float[Array, "inputs"], weight: Float[Array, "inputs"], alpha: float = 0.5
) -> Float[Array, "inputs"]:
    """SmoothQuant's scale (Xiao et al., arXiv 2211.10438) from the largest values per channel.

    Activations are divided by it, and the weights of the channel multiplied.
    """
    return activation**alpha / weight ** (1 - alpha)


# --------------------------------------------------------------------------- early exit


def entropy(logits: Float[Array, "... classes"]) -> Float[Array, "..."]:
    """`-sum p ln p`."""
    logs = jax.nn.log_softmax(logits, -1)
    return -jnp.sum(jnp.exp(logs) * logs, -1)


def entropy_exit(logits: Float[Array, "layers batch classes"], limit: float) -> Int[Array, "batch"]:
    """The first layer whose entropy is below the limit, else the last (DeeBERT)."""
    sure = entropy(logits) < limit
    return jnp.where(sure.any(0), sure.argmax(0), len(logits) - 1)


def patience_exit(
    logits: Float[Array, "layers batch classes"], patience: int
) -> Int[Array, "batch"]:
    """The first layer that agrees with the one before for the `patience`-th time in a row (PABEE).

    Else the last.
    """
    decisions = logits.argmax(-1)
    run, runs = jnp.zeros(logits.shape[1], jnp.int32), [jnp.zeros(logits.shape[1], jnp.int32)]
    for same in decisions[1:] == decisions[:-1]:
        run = jnp.where(same, run + 1, 0)
        runs.append(run)
    done = jnp.stack(runs) >= patience
    return jnp.where(done.any(0), done.argmax(0), len(logits) - 1)


# ------------------------------------------------------------------ speculative decoding


def acceptance(
    target: Float[Array, "vocab"], draft: Float[Array, "vocab"]
) -> tuple[Float[Array, "vocab"], Float[Array, "vocab"], Float[Array, ""]]:
    """Of each drafted word, the chance to be kept; what a refused one is redrawn from; the rate.

    Leviathan et al., arXiv 2211.17192: `min(1, p / q)`, `max(0, p - q)` made to sum to 1, and
    `sum min(p, q)`.
    """
    rest = jnp.maximum(target - draft, 0)
    rate = jnp.minimum(target, draft).sum()
    return jnp.minimum(1.0, target / draft), rest / rest.sum(), rate
