"""NPRF: kernelised attention with relative positions, through the fast Fourier transform.

Luo, Li, Cai, He, Peng, Zheng, Ke, Wang and Liu, "Stable, Fast and Accurate: Kernelized Attention
with Relative Positional Encoding", NeurIPS 2021, arXiv 2106.12566. No official code was found: this
follows the paper's equations, and the model around them is a plain pre-norm transformer of ours.
For one head with m fixed random rows w_r, a learned number b for each distance, and x^ = x / |x|:

    phi(x)_r = m^(-1/2) exp(w_r . x^ - |x^|^2 / 2)         E phi(q).phi(k) = exp(q^ . k^)
    out_i = phi(q_i) . sum_j e^(b_(j-i)) phi(k_j) v_j  /  phi(q_i) . sum_j e^(b_(j-i)) phi(k_j)

Both sums are a Toeplitz matrix times (phi(k_j) v_j, phi(k_j)): a convolution, L log L. Queries and
keys of length one keep every weight within a factor e^2, which makes the random features stable;
`normalised=False` scales by d^(-1/4) instead, as other kernelised attention does. On a grid, b has
one number for each offset of rows and columns, and the transform as many axes.

The largest b of a head, and the largest exponents of queries and keys, are subtracted: they cancel.
A float32 transform loses sums below 1e-7 of the largest, so the denominator is not let below 1e-6
of its largest value.

    features            nprf_base
    embed               128  512    for 128 tokens
    layer0              128  512    up to layer5
    last_hidden_state   128  512    behind the last LayerNorm
    logits              128  32000
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.layers import decoder
from zoo.layers.causal import Context, attention_state, check_tokens, tokens_first, write
from zoo.layers.decoder import check_causal
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.residual import ResidualLayer, init, mlp_rules
from zoo.system import System, Variant

Heads = Float[Array, "batch *grid heads head_dim"]
NEAR = 32
"""Offsets that a sequence sums directly."""


def positive_features(
    x: Heads, rows: Float[Array, "features head_dim"], *, is_query: bool
) -> Float[Array, "batch *grid heads features"]:
    """Phi of the module in float32, up to a factor that cancels: of a query, or of all keys."""
    x = x.astype(jnp.float32)
    exponent = jnp.einsum("...d,md->...m", x, rows.astype(jnp.float32))
    exponent = exponent - jnp.sum(x * x, -1, keepdims=True) / 2
    axes = (-1,) if is_query else (*range(1, x.ndim - 2), -1)
    return jnp.exp(exponent - jax.lax.stop_gradient(exponent.max(axes, keepdims=True)))


def toeplitz_product(
    table: Float[Array, "heads *offsets"],
    x: Float[Array, "batch *grid heads columns"],
    causal: bool = False,
) -> Float[Array, "batch *grid heads columns"]:
    """`y_i = sum_j table[j - i + L - 1] x_j` for each head, by a transform along each axis.

    In a sequence, offsets up to `NEAR` are summed directly: the first tokens of a causal model sum
    few terms, which a transform of the whole text would round away.

    Args:
      table: a number for each offset, key minus query, `2 L - 1` along an axis of L tokens.
      x: float32.
      causal: whether the table is zero for keys behind the query.
    """
    if len(x.shape) > 4:
        return _transformed(table, x)
    length = x.shape[1]
    size = min(length, NEAR)
    offset = np.arange(1 - length, length)
    near = _banded(jnp.where(np.abs(offset) <= size, table, 0), x, size, causal)
    if length <= size:
        return near
    far = _transformed(jnp.where(np.abs(offset) <= size, 0, table), x)
    if causal:  # exactly zero, and not what rounding leaves
        far = jnp.where((np.arange(length) > size)[:, None, None], far, 0)
    return near + far


def _banded(table: Array, x: Array, size: int, causal: bool) -> Array:
    """The product for a table of offsets up to `size`, in blocks of `size` and their neighbours."""
    batch, length, heads, columns = x.shape
    count = -(-length // size)
    blocks = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, count, size, heads, columns).transpose(3, 2, 0, 1, 4)
    around = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (1, 1), (0, 0)))
    at, total = np.arange(size), 0
    for shift in (-1, 0) if causal else (-1, 0, 1):
        offset = at[None] - at[:, None] + shift * size
        inside = (np.abs(offset) < length) & (np.abs(offset) <= size)
        matrix = jnp.where(inside, table[:, np.where(inside, offset, 0) + length - 1], 0)
        others = around[:, :, :, 1 + shift : 1 + shift + count]
        # One product of matrices for each head, which is what XLA for CPUs is fast at.
        total = total + jnp.matmul(matrix, others.reshape(heads, size, -1))
    total = total.reshape(heads, size, batch, count, columns).transpose(2, 3, 1, 0, 4)
    return total.reshape(batch, count * size, heads, columns)[:, :length]


def _transformed(table: Array, x: Array) -> Array:
    """The product by the fast Fourier transform along each axis."""
    grid = x.shape[1:-2]
    sizes = [_fast(2 * length - 1) for length in grid]
    for axis, (length, size) in enumerate(zip(grid, sizes, strict=True), 1):
        # Places of a ring: 0 .. -(L-1) first, then what wraps around, L-1 .. 1; zeros between.
        ring = np.arange(size)
        at = np.where(ring < length, length - 1 - ring, length - 1 + size - ring)
        inside = (ring < length) | (ring > size - length)
        table = jnp.take(table, jnp.asarray(np.where(inside, at, 0)), axis=axis)
        shape = [1] * table.ndim
        shape[axis] = size
        table = jnp.where(jnp.asarray(inside).reshape(shape), table, 0)
    axes = tuple(range(1, len(grid) + 1))
    ours = jnp.fft.rfftn(jnp.moveaxis(table, 0, -1), sizes, [a - 1 for a in axes])
    theirs = jnp.fft.rfftn(x, sizes, axes)
    y = jnp.fft.irfftn(theirs * ours[None, ..., None], sizes, axes)
    return y[(slice(None), *(slice(length) for length in grid))]


def _fast(size: int) -> int:
    """The next size whose only factors are 2, 3 and 5."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def nprf_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Float[Array, "heads *offsets"],
    rows: Float[Array, "features head_dim"],
    *,
    causal: bool = False,
    normalised: bool = True,
    visible: Bool[Array, "batch *grid"] | None = None,
) -> Heads:
    """The attention of the module, in float32.

    Args:
      query: of a sequence, or of a grid of any rank.
      key: of the same.
      value: of the same.
      bias: b of each offset, key minus query, `2 L - 1` along each axis.
      rows: the random rows.
      causal: keys behind the query do not count; sequences only.
      normalised: whether queries and keys are scaled to length one.
      visible: False at padding.
    """
    q, k = _features(query, key, rows, normalised)
    if visible is not None:
        k = jnp.where(visible[..., None, None], k, 0)
    axes = tuple(range(1, bias.ndim))
    table = jnp.exp(bias - jax.lax.stop_gradient(bias.max(axes, keepdims=True)))
    if causal:
        table = jnp.where(np.arange(table.shape[1]) <= table.shape[1] // 2, table, 0)
    ones = jnp.ones((*value.shape[:-1], 1), jnp.float32)
    wide = jnp.concatenate([value.astype(jnp.float32), ones], -1)
    features, columns = k.shape[-1], wide.shape[-1]
    both = (k[..., :, None] * wide[..., None, :]).reshape(*k.shape[:-1], -1)
    sums = toeplitz_product(table, both, causal).reshape(*k.shape[:-1], features, columns)
    y = jnp.einsum("...m,...md->...d", q, sums)
    below = y[..., -1:]
    space = tuple(range(1, below.ndim - 2))
    least = 1e-6 * jax.lax.stop_gradient(below.max(space, keepdims=True))
    return y[..., :-1] / jnp.maximum(below, jnp.maximum(least, 1e-30))


def _features(query: Heads, key: Heads, rows: Array, normalised: bool) -> tuple[Array, Array]:
    if normalised:
        query, key = (_unit(t.astype(jnp.float32)) for t in (query, key))
    else:
        query, key = (t.astype(jnp.float32) * t.shape[-1] ** -0.25 for t in (query, key))
    return (
        positive_features(query, rows, is_query=True),
        positive_features(key, rows, is_query=False),
    )


def continue_nprf(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch room heads head_dim"],
    value: Float[Array, "batch room heads head_dim"],
    bias: Float[Array, "heads length room"],
    rows: Float[Array, "features head_dim"],
    seen: Bool[Array, "batch length room"],
    *,
    normalised: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """The same attention of a few queries to all keys so far, in float32.

    Args:
      query: of the new tokens.
      key: of all tokens, and of the room behind them.
      value: of the same.
      bias: b of each query and key.
      rows: the random rows.
      seen: which keys a query sees.
      normalised: whether queries and keys are scaled to length one.
    """
    q, k = _features(query, key, rows, normalised)
    weights = jnp.einsum("bqnm,bknm->bnqk", q, k)
    weights = weights * jnp.exp(bias - bias.max((1, 2), keepdims=True))
    weights = jnp.where(seen[:, None], weights, 0)
    below = weights.sum(-1, keepdims=True)
    weights = weights / jnp.maximum(below, 1e-30)
    return jnp.einsum("bnqk,bknd->bqnd", weights, value.astype(jnp.float32))


def exact_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    bias: Float[Array, "heads offsets"],
    *,
    causal: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """What the features estimate: softmax of `q^ . k^ + b`, dense."""
    length = query.shape[1]
    at = np.arange(length)
    scores = jnp.einsum("bqnd,bknd->bnqk", _unit(query), _unit(key))
    scores = scores + bias[:, at[None] - at[:, None] + length - 1]
    if causal:
        scores = jnp.where(at[None] <= at[:, None], scores, -1e30)
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores, -1), value)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


class NprfAttention(nn.Module):
    """Kernelised attention with relative positions, and its maps.

    Attributes are those of `Nprf`. The random rows are in the collection `batch_stats`. The state
    is the keys and values so far: a table of offsets is no recurrence.
    """

    num_heads: int
    max_length: int
    features: int
    causal: bool = True
    normalised: bool = True
    max_distance: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: dict[str, Any],
        train: bool = False,
    ) -> Array | tuple[dict[str, Array], Array]:
        """Attend; `context["visible"]` is False at padding, or None.

        With `context["state"]` the next state comes first.
        """
        channels, length = x.shape[-1], x.shape[1]
        head_dim = channels // self.num_heads
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        query, key, value = (
            constrain(
                dense(channels, name=name)(x).reshape(*x.shape[:2], self.num_heads, head_dim),
                "batch", "length", "heads", "head_dim",
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        farthest = self.max_length - 1 if self.max_distance is None else self.max_distance
        shape = (2 * farthest + 1, self.num_heads)
        table = self.param("relative_bias", nn.initializers.zeros, shape, self.param_dtype)
        rows = self.variable(
            "batch_stats",
            "features",
            lambda: jax.random.normal(
                self.make_rng("params"), (self.features, head_dim), self.param_dtype
            ),
        ).value
        table, state, visible = table.astype(jnp.float32), context.get("state"), context["visible"]
        out = dense(channels, name="out")
        if state is None and not isinstance(length, int):
            # Exported for any length, where the transforms have no size: all pairs.
            at = jnp.arange(length)
            seen = (at <= at[:, None]) if self.causal else jnp.ones((length, length), bool)
            seen = seen[None] if visible is None else seen & visible[:, None]
            offset = jnp.clip(at - at[:, None], -farthest, farthest) + farthest
            y = continue_nprf(
                query, key, value, jnp.moveaxis(table[offset], -1, 0), rows, seen,
                normalised=self.normalised,
            )  # fmt: skip
            return out(y.astype(self.dtype).reshape(x.shape))
        if state is None:
            offset = np.clip(np.arange(1 - length, length), -farthest, farthest) + farthest
            y = nprf_attention(
                query, key, value, table[offset].T, rows, causal=self.causal,
                normalised=self.normalised, visible=visible,
            )  # fmt: skip
            return out(y.astype(self.dtype).reshape(x.shape))
        at = state["filled"] + jnp.arange(length)
        text = jnp.ones(x.shape[:2], bool) if visible is None else visible
        state = write(state, key, value, text)
        room = jnp.arange(state["text"].shape[1])
        seen = state["text"][:, None] & (room <= at[:, None])
        offset = jnp.clip(room - at[:, None], -farthest, farthest) + farthest
        y = continue_nprf(
            query, tokens_first(state, "key"), tokens_first(state, "value"),
            jnp.moveaxis(table[offset], -1, 0), rows, seen, normalised=self.normalised,
        )  # fmt: skip
        y = jnp.where(state["filled"] <= len(room), y, jnp.nan).astype(self.dtype)
        return state, out(y.reshape(x.shape))


class Nprf(Model):
    """A transformer with kernelised attention and relative positions.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`) give
    the same logits token by token, or piece by piece, as a call on the whole text; padding stands
    at the left.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      max_length: longest text.
      features: m, random features of a head; None: the width of a head.
      causal: whether tokens see only those before them.
      normalised: whether queries and keys are scaled to length one.
      max_distance: offsets beyond share one number; None: each has its own.
      dropout: rate in the MLPs.
    """

    vocab_size: int = 32000
    embed_dim: int = 512
    depth: int = 6
    num_heads: int = 8
    max_length: int = 512
    features_per_head: int | None = None
    causal: bool = True
    normalised: bool = True
    max_distance: int | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, min(length, self.max_length)), jnp.int32)
        return {"tokens": shape}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits at every token; `mask` is 0 or False for padding.

        Raises:
          ValueError: if shapes do not fit the model or each other.
        """
        return self.features(tokens, mask, train)["logits"]

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token, with room for `length` tokens.

        Raises:
          ValueError: if the model is not causal, or if `length` is more than it reads.
        """
        check_causal(self)
        self._check(length)
        heads, width = self.num_heads, self.embed_dim // self.num_heads
        shape = (batch, length, heads, width)
        layers = tuple(attention_state(*shape, self.dtype) for _ in range(self.depth))
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def step(
        self, state: dict[str, Any], tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict[str, Any], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state after them, and their logits."""
        return decoder.step(self, state, tokens, mask)

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        tokens, mask = check_tokens(self, tokens, mask)
        return self._run(tokens, None, train, Context(mask))[0]

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"This Nprf reads at most {self.max_length} tokens, not {length}; cut the text, or "
                "create the model with more max_length."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )

    @nn.compact
    def _run(
        self, tokens: Array, state: tuple | None, train: bool, context: Context
    ) -> tuple[dict[str, Array], tuple | None]:
        self._check(tokens.shape[1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types)(
            tokens
        )
        out, after = {"embed": constrain(x, "batch", "length", "channels")}, []
        mixer = NprfAttention(
            self.num_heads, self.max_length,
            self.features_per_head or self.embed_dim // self.num_heads, self.causal,
            self.normalised, self.max_distance, parent=None, **types,
        )  # fmt: skip
        for i in range(self.depth):
            layer = ResidualLayer(
                mixer, self.embed_dim, dropout=self.dropout, name=f"layers_{i}", **types
            )
            if state is None:
                x = layer(x, {"visible": context.mask}, train)
            else:
                now, y = layer.attend(x, {"visible": context.mask, "state": state[i]}, train)
                x = x + y
                x = x + layer.feed(x, {}, train)
                after.append(now)
            out[f"layer{i}"] = x
        x = out["last_hidden_state"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        x = Dense(self.vocab_size, kernel_init=init, name="head", **types)(x)
        out["logits"] = constrain(x, "batch", "length", "vocab")
        return out, None if state is None else tuple(after)


_OURS, _THEIRS = "layers_{i}", "layers.{i}.attention"

LAYOUTS = {
    # Nobody published a file: these names are ours.
    "zoo": Rules(
        [
            Rule("embed.weight", "embed/embedding"),
            *norm_rules("layers.{i}.norm1", f"{_OURS}/norm1"),
            *(
                rule
                for name in ("query", "key", "value", "out")
                for rule in dense_rules(f"{_THEIRS}.{name}", f"{_OURS}/attention/{name}")
            ),
            Rule("layers.{i}.attention.relative_bias", f"{_OURS}/attention/relative_bias"),
            Rule("layers.{i}.attention.features", f"batch_stats/{_OURS}/attention/features"),
            *norm_rules("layers.{i}.norm2", f"{_OURS}/norm2"),
            *mlp_rules("layers.{i}.mlp", f"{_OURS}/mlp"),
            *norm_rules("norm", "norm"),
            *dense_rules("head", "head"),
        ],
        fresh=("head/*",),
    )
}  # fmt: skip

PARTITION = {r".*attention/relative_bias": (None, "heads")}

_COMMON = dict(
    module=Nprf,
    task="language_modelling",
    paper="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, "
    "arXiv 2106.12566",
    code="none found; from the paper's equations",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "nprf_base": Variant(fields={}, **_COMMON),
    "nprf_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, max_length=64),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
