"""Attention that can do nothing: clipped softmax and gates, so that activations have no outliers.

Bondarenko, Nagel, Blankevoort, "Quantizable Transformers: Removing Outliers by Helping Attention
Heads Do Nothing", NeurIPS 2023, arXiv 2306.12929; official code
github.com/Qualcomm-AI-research/outlier-free-transformers (BSD-3-Clause-Clear).

    clipped softmax   clip((zeta - gamma) softmax(x) + gamma, 0, 1)     gamma = -alpha / length
    gated attention   sigmoid(G(x)) softmax(x) V, a number for each head and token, before `out`

G reads the input of attention: its h-th slice for head h (`linear`, one map a head; `mlp`, with a
hidden layer; `mlp_wide`, with a wider one), or all of it (`all`); `constant` is a number per head.
`per_head` averages G over the tokens. A head that wants to do nothing otherwise needs a huge
logit, and so activations with outliers, which a grid of 8 bits cannot hold. `kurtosis` and
`infinity_norm` measure them, `quantised` is the grid.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.methods.attention import Heads, is_attention, rewritten
from zoo.methods.method import Method, Variables, intercepted, unwrap


def clipped_softmax(
    scores: Float[Array, "... keys"], gamma: float = -0.1, zeta: float = 1.1
) -> Float[Array, "... keys"]:
    """The stretched and clipped softmax; where it is clipped the gradient is zero."""
    return jnp.clip(jax.nn.softmax(scores, -1) * (zeta - gamma) + gamma, 0, 1)


@dataclass(frozen=True)
class QuietAttention(Method):
    """Clipped softmax, gates, or both, in every attention that `zoo.methods.attention` knows.

    Attributes:
      gamma: lowest value before clipping; 0 (with `zeta=1`) is the softmax itself.
      zeta: highest value before clipping.
      alpha: gives `gamma = -alpha / length` with the length of `span`, in place of `gamma`.
      span: what `alpha` is divided by.
      gate: what the gate is computed from, see above; None: no gate.
      per_head: average the gate's logit over the tokens.
      initial: the gate's value at first (of `linear`); None: the bias is 0.
      factor: on the gate of the input; the authors multiply by `1 / initial` in fine-tuning.
      targets: attention modules (path, regex of the whole) that have it.
    """

    gamma: float = 0.0
    zeta: float = 1.0
    alpha: float | None = None
    span: int | None = None
    gate: Literal["linear", "mlp", "mlp_wide", "all", "constant"] | None = None
    per_head: bool = False
    initial: float | None = None
    factor: float = 1.0
    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose attention can do nothing."""
        if self.alpha is not None and self.span is None:
            raise ValueError("alpha is divided by a length: give `span`, such as 512.")
        return intercepted(module, self)

    def trains(self, path: str) -> bool | None:
        """The gates are; of the rest another method decides."""
        return True if re.fullmatch(r"(.*/)?gate_\w+", path) else None

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The attention with another softmax and its gate."""
        module = context.module
        wanted = is_attention(module) and context.method_name == "__call__"
        if not wanted or not re.fullmatch(self.targets, "/".join(module.path)):
            return call(*args, **kwargs)
        return rewritten(call, args, kwargs, module, self._mix)

    def _mix(self, heads: Heads) -> Array:
        gamma = self.gamma if self.alpha is None else -self.alpha / self.span
        weights = clipped_softmax(heads.scores(), gamma, self.zeta)
        if heads.module.is_mutable_collection("intermediates"):
            heads.module.sow("intermediates", "probabilities", weights)
        context = jnp.einsum("bnqk,bknd->bqnd", weights, heads.value.astype(jnp.float32))
        return context if self.gate is None else context * self._gate(heads)

    def _gate(self, heads: Heads) -> Float[Array, "batch length heads 1"]:
        module, x = heads.module, heads.x
        count, width = heads.query.shape[2:]

        def leaf(name: str, shape: tuple[int, ...], fan: int | None = None) -> Array:
            bound = 0 if fan is None else fan**-0.5  # as torch's Linear starts

            def start(key: Array) -> Array:
                if fan is None:
                    at = self.initial if self.gate == "linear" else None
                    return jnp.full(shape, 0 if at is None else np.log(at / (1 - at)), jnp.float32)
                return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

            return module.param(name, start)

        bias = leaf("gate_bias", (count,))
        if self.gate == "constant":
            return jax.nn.sigmoid(bias)[:, None]
        if self.gate == "all":
            logits = x @ leaf("gate_kernel", (x.shape[-1], count), x.shape[-1]) + bias
        else:
            hidden = x.reshape(*x.shape[:2], count, width)
            if self.gate in ("mlp", "mlp_wide"):
                size = width // 4 if self.gate == "mlp" else width
                kernel = leaf("gate_hidden_kernel", (count, width, size), width)
                shift = leaf("gate_hidden_bias", (count, size))
                hidden = nn.relu(jnp.einsum("blnd,ndh->blnh", hidden, kernel) + shift)
            kernel = leaf("gate_kernel", (count, hidden.shape[-1]), hidden.shape[-1])
            logits = jnp.einsum("blnh,nh->bln", hidden, kernel) + bias
        if self.per_head and self.gate != "all":
            logits = logits.mean(1, keepdims=True)
        return self.factor * jax.nn.sigmoid(logits)[..., None]

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model with this attention.

        Raises:
          ValueError: always.
        """
        unwrap(module, self)
        raise ValueError(
            "No plain model has clipped or gated attention: it cannot be merged. Keep the wrapped "
            "model."
        )


# ------------------------------------------------------------------------- outliers


def kurtosis(x: Float[Array, "samples ..."], epsilon: float = 1e-6) -> Float[Array, "samples"]:
    """Of all numbers of each sample, `mean((x - mu)^4) / (s^4 + epsilon)`, s without bias."""
    x = x.reshape(x.shape[0], -1).astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    deviation = x.std(-1, ddof=1)
    return jnp.mean((x - mean) ** 4, -1) / (deviation**4 + epsilon)


def infinity_norm(x: Float[Array, "samples ..."]) -> Float[Array, "samples"]:
    """The largest absolute number of each sample."""
    return jnp.abs(x.reshape(x.shape[0], -1)).max(-1)


def quantised(
    x: Float[Array, "..."],
    low: Float[Array, ""],
    high: Float[Array, ""],
    bits: int = 8,
    symmetric: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, ""], Float[Array, ""]]:
    """Numbers on a uniform grid over a range, which always holds zero.

    Args:
      x: the numbers.
      low: end of the range.
      high: end of the range.
      bits: of a code.
      symmetric: zero at the middle of the codes: signed, but where no number is below zero.

    Returns:
      The numbers, their codes, the grid's step and the code of zero.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 1e-8)
    if symmetric:
        signed = low < 0
        top = jnp.where(signed, 2.0 ** (bits - 1) - 1, 2.0**bits - 1)
        bottom = jnp.where(signed, -(2.0 ** (bits - 1)), 0.0)
        step, zero = jnp.maximum(jnp.abs(low), high) / top, jnp.zeros(())
    else:
        bottom, top = 0.0, 2.0**bits - 1
        step = (high - low) / top
        zero = jnp.clip(jnp.round(-low / step), bottom, top)
    step = jnp.maximum(step, 1e-8)
    codes = jnp.clip(jnp.round(x / step) + zero, bottom, top)
    return step * (codes - zero), codes, step, zero
