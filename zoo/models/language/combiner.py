"""Combiner: attention to every token, to some of them through summaries of their spans.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai, "Combiner: Full Attention Transformer with Sparse
Computation Cost", NeurIPS 2021, arXiv 2107.05768; official code
github.com/google-research/google-research/tree/master/combiner (Apache-2.0), whose Flax layers we
follow. Attention is an expectation; the tokens are cut into a set D that a query sees itself and
regions R that it sees as a whole, with queries divided by sqrt(d) once:

    out_i = sum_(j in D) p_j v_j + sum_R p_R v_R;   p = softmax over (q_i . k_j, q_i . k_R) together
    k_R, q_R = largest keys and queries of R, channel by channel
    v_R = sum_(j in R) softmax_j(q_R . k_j) v_j

    fixed        D: the own span of s tokens; R: the other spans (those before, if causal)
    logsparse    D: the token; R: the spans of 1, 2, 4, ... tokens that i is the binary sum of
    axial        the text as rows of s tokens. D: the own row, and the column above; R: what stands
                 above in each other column, and the left and right parts of each row above
    axial_rows   D: the own row; R: each row above, with a learned key, as the token of the same
                 column sees that row

A summary says nothing of how many tokens it stands for: of equal keys, a span weighs as much as one
token. `size_bias=True` adds log|R|, which makes that case exact (not in the official code).

    x = x + attention(LN(x));   x = x + W2 relu(W1 LN(x) + b1) + b2;   logits = W LN(x)

    features            combiner_base
    embed               256  512    for 256 tokens
    layer0              256  512    up to layer5
    last_hidden_state   256  512    behind the last LayerNorm
    logits              256  32000
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.layers.causal import check_tokens
from zoo.layers.decoder import WholeTexts
from zoo.layers.dense import Dense
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.residual import ResidualLayer, mlp_rules
from zoo.layers.rotary import sines_and_cosines
from zoo.system import System, Variant

init = nn.initializers.xavier_uniform()

HIDDEN = -1e10
"""The score of what a query does not see; a finite number, as some queries have no region."""

Heads = Float[Array, "batch length heads head_dim"]


def scaled(query: Heads) -> Heads:
    """Queries divided by the root of their width."""
    return query * query.shape[-1] ** -0.5


def summaries(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Key and value of each span, of `[batch spans tokens heads head_dim]`."""
    weights = jax.nn.softmax(jnp.einsum("bnhd,bnshd->bnsh", q.max(2), k), axis=2)
    return k.max(2), jnp.einsum("bnsh,bnshd->bnhd", weights, v)


def prefix_summaries(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Key and value of the tokens before each one, of `[... tokens heads head_dim]`.

    The first token has none: what stands there must be hidden.
    """
    length = q.shape[-3]

    def before(t: Array) -> Array:
        largest = jax.lax.cummax(t, axis=t.ndim - 3)
        return jnp.concatenate([t[..., :1, :, :], largest[..., :-1, :, :]], axis=-3)

    scores = jnp.einsum("...qhd,...khd->...hqk", before(q), k)
    at = jnp.arange(length)
    inside = at < at[:, None]
    weights = jax.nn.softmax(jnp.where(inside, scores, HIDDEN), -1)
    return before(k), jnp.einsum("...hqk,...khd->...qhd", weights, v)


def together(*scores: Float[Array, "... some"]) -> list[Float[Array, "... some"]]:
    """One softmax over several groups of scores, cut into the groups again."""
    weights, start, parts = jax.nn.softmax(jnp.concatenate(scores, -1), -1), 0, []
    for part in scores:
        end = start + part.shape[-1]
        parts.append(jax.lax.slice_in_dim(weights, start, end, axis=-1))
        start = end
    return parts


def fixed_attention(
    q: Heads, k: Heads, v: Heads, span: int, *, causal: bool, size_bias: bool = False
) -> Heads:
    """The own span, and every other one as a whole.

    Raises:
      ValueError: if the spans do not divide the length.
    """
    shape = q.shape
    q, k, v = (_rows(t, span) for t in (scaled(q), k, v))
    keys, values = summaries(q, k, v)
    direct = jnp.einsum("bnshd,bnthd->bhnst", q, k)
    region = jnp.einsum("bnshd,bmhd->bhnsm", q, keys) + (math.log(span) if size_bias else 0.0)
    at = jnp.arange(q.shape[1])
    if causal:
        direct = jnp.where(np.tri(span, dtype=bool), direct, HIDDEN)
        others = at[None] < at[:, None]
    else:
        others = at[None] != at[:, None]
    region = jnp.where(others[:, None], region, HIDDEN)
    near, far = together(direct, region)
    y = jnp.einsum("bhnst,bnthd->bnshd", near, v) + jnp.einsum("bhnsm,bmhd->bnshd", far, values)
    return y.reshape(shape)


def logsparse_sets(length: int) -> tuple[Int[np.ndarray, "length levels"], np.ndarray]:
    """For each token and level l: which span of 2^l tokens it sees, and whether it sees one."""
    at = np.arange(length)[:, None]
    span = at >> np.arange(max(1, (length - 1).bit_length()))
    return span - 1, span % 2 == 1


def logsparse_attention(q: Heads, k: Heads, v: Heads, *, size_bias: bool = False) -> Heads:
    """Itself, and the spans that the binary digits of its place name; causal."""
    length = q.shape[1]
    q = scaled(q)
    span, there = logsparse_sets(length)
    direct = jnp.einsum("blhd,blhd->blh", q, k)[..., None]
    scores, values = [], []
    for level in range(span.shape[1]):
        size = 1 << level
        keys, mixed = summaries(*(_rows(_fill(t, size), size) for t in (q, k, v)))
        at = np.maximum(span[:, level], 0)
        score = jnp.einsum("blhd,blhd->blh", q, keys[:, at]) + (level * math.log(2) * size_bias)
        scores.append(jnp.where(there[:, level, None], score, HIDDEN))
        values.append(mixed[:, at])
    near, far = together(direct, jnp.stack(scores, -1))
    return near * v + jnp.einsum("blhn,nblhd->blhd", far, jnp.stack(values))


def axial_attention(q: Heads, k: Heads, v: Heads, span: int) -> Heads:
    """Own row and the column above; columns above, and both parts of rows above; causal.

    Raises:
      ValueError: if the rows do not divide the length.
    """
    shape = q.shape
    q, k, v = (_rows(t, span) for t in (scaled(q), k, v))
    rows, columns = jnp.arange(q.shape[1]), np.arange(span)
    turn = lambda t: t.swapaxes(1, 2)  # noqa: E731
    flip = lambda t: jnp.flip(t, 2)  # noqa: E731
    column_key, column_value = map(turn, prefix_summaries(turn(q), turn(k), turn(v)))
    left_key, left_value = prefix_summaries(q, k, v)
    right_key, right_value = map(flip, prefix_summaries(flip(q), flip(k), flip(v)))
    above = rows[:, None, None] > rows  # row, column of the query, row of the key
    others = (columns[:, None] != columns) & (rows[:, None, None] > 0)
    parts = (
        # seen, product, values' product, keys, values
        (np.tri(span, dtype=bool), "brchd,brthd->bhrct", "bhrct,brthd->brchd", k, v),
        (above, "brchd,buchd->bhrcu", "bhrcu,buchd->brchd", k, v),
        (others, "brchd,brthd->bhrct", "bhrct,brthd->brchd", column_key, column_value),
        (above & (columns[:, None] > 0), "brchd,buchd->bhrcu", "bhrcu,buchd->brchd", left_key,
         left_value),
        (above & (columns[:, None] < span - 1), "brchd,buchd->bhrcu", "bhrcu,buchd->brchd",
         right_key, right_value),
    )  # fmt: skip
    scores = [jnp.where(s, jnp.einsum(form, q, key), HIDDEN) for s, form, _, key, _ in parts]
    weights = together(*scores)
    y = sum(jnp.einsum(p[2], w, p[4]) for w, p in zip(weights, parts, strict=True))
    return y.reshape(shape)


def row_outputs(q: Heads, k: Heads, v: Heads, span: int) -> Heads:
    """Attention of each token to all of its own row."""
    shape = q.shape
    q, k, v = (_rows(t, span) for t in (scaled(q), k, v))
    weights = jax.nn.softmax(jnp.einsum("bnshd,bnthd->bhnst", q, k), -1)
    return jnp.einsum("bhnst,bnthd->bnshd", weights, v).reshape(shape)


def axial_rows_attention(
    q: Heads, k: Heads, v: Heads, row_key: Heads, row_value: Heads, span: int
) -> Heads:
    """The own row, and each row above as the token of the same column sees it; causal."""
    shape = q.shape
    q, k, v, row_key, row_value = (_rows(t, span) for t in (scaled(q), k, v, row_key, row_value))
    rows = jnp.arange(q.shape[1])
    direct = jnp.einsum("brchd,brthd->bhrct", q, k)
    direct = jnp.where(np.tri(span, dtype=bool), direct, HIDDEN)
    region = jnp.einsum("brchd,buchd->bhrcu", q, row_key)
    region = jnp.where(rows[:, None, None] > rows, region, HIDDEN)
    near, far = together(direct, region)
    y = jnp.einsum("bhrct,brthd->brchd", near, v)
    return (y + jnp.einsum("bhrcu,buchd->brchd", far, row_value)).reshape(shape)


def _rows(t: Array, span: int) -> Array:
    """`[batch rows span ...]`."""
    if t.shape[1] % span:
        raise ValueError(
            f"Spans of {span} do not divide {t.shape[1]} tokens; choose a divisor, or cut or fill "
            "up the text."
        )
    return t.reshape(t.shape[0], -1, span, *t.shape[2:])


def _fill(t: Array, size: int) -> Array:
    """Zeros behind the text, up to whole spans: no query sees a span that holds any."""
    return jnp.pad(t, ((0, 0), (0, -t.shape[1] % size), (0, 0), (0, 0)))


class CombinerAttention(nn.Module):
    """Attention of one kind, and its maps, which have no biases.

    Attributes are those of `Combiner`.
    """

    num_heads: int
    kind: str = "fixed"
    span: int | None = None
    causal: bool = True
    size_bias: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], context: dict, train: bool = False
    ) -> Float[Array, "batch length channels"]:
        """Attend."""
        channels, length = x.shape[-1], x.shape[1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (*x.shape[:2], self.num_heads, channels // self.num_heads)

        def project(name: str, x: Array) -> Heads:
            y = Dense(channels, use_bias=False, kernel_init=init, name=name, **types)(x)
            return constrain(y.reshape(heads), "batch", "length", "heads", "head_dim")

        q, k, v = (project(name, x) for name in ("query", "key", "value"))
        span = self.span or span_for(length)
        if self.kind == "fixed":
            y = fixed_attention(q, k, v, span, causal=self.causal, size_bias=self.size_bias)
        elif self.kind == "logsparse":
            y = logsparse_attention(q, k, v, size_bias=self.size_bias)
        elif self.kind == "axial":
            y = axial_attention(q, k, v, span)
        else:
            seen = row_outputs(q, k, v, span)
            mixed = Dense(channels, kernel_init=init, name="row_mix", **types)(
                seen.reshape(x.shape)
            )
            mixed = x + nn.Dropout(self.dropout, deterministic=not train)(mixed)
            mixed = LayerNorm(epsilon=1e-6, name="row_norm", **types)(mixed)
            y = axial_rows_attention(q, k, v, project("row_key", mixed), seen, span)
        y = y.astype(self.dtype).reshape(x.shape)
        y = Dense(channels, use_bias=False, kernel_init=init, name="out", **types)(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def span_for(length: int) -> int:
    """The divisor of a length that is nearest to its root."""
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d * d / length)))


class Combiner(WholeTexts):
    """A transformer with Combiner's attention.

    `init_state(batch, length)` and `step(state, tokens)` run the whole text at every step; without
    `span`, `length` says what the spans are.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      mlp_ratio: width of the MLPs' middle over the channels.
      kind: "fixed", "logsparse", "axial" or "axial_rows".
      span: tokens of a span or row, a divisor of the length; None: the one nearest its root.
      causal: whether tokens see only those before them; otherwise `kind` is "fixed".
      size_bias: whether the score of a span counts its tokens ("fixed" and "logsparse").
      dropout: rate on the embedding and both branches.
    """

    vocab_size: int = 32000
    embed_dim: int = 512
    depth: int = 6
    num_heads: int = 8
    mlp_ratio: int = 4
    kind: str = "fixed"
    span: int | None = None
    causal: bool = True
    size_bias: bool = False
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 256
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        return {"tokens": jax.ShapeDtypeStruct((batch_size, length), jnp.int32)}

    def any_length(self) -> tuple[int, int]:
        """The size of the blocks, and how few of them, that one exported program takes.

        Raises:
          ValueError: if the operations depend on the length.
        """
        if self.kind == "logsparse":
            raise ValueError(
                "A Combiner with kind='logsparse' has a step for each digit of the length, so that "
                "one program takes one length: give it (--length N), or take another kind."
            )
        if self.span is None:
            raise ValueError(
                "This Combiner takes its spans from the length; create it with span=N to export "
                "it for all multiples of N, or give the length (--length N)."
            )
        return self.span, 2

    def __call__(
        self, tokens: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits at every token.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        return self.features(tokens, train)["logits"]

    def whole(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of whole texts with padding at the right, which no token of a text sees."""
        del mask
        length = tokens.shape[1]
        tokens = jnp.pad(tokens, ((0, 0), (0, -length % (self.span or 1))))
        return self.features(tokens)["logits"][:, :length]

    @nn.compact
    def features(self, tokens: Int[Array, "batch length"], train: bool = False) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        tokens, _ = check_tokens(self, tokens)
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        start = nn.initializers.normal(self.embed_dim**-0.5)
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=start, name="embed", **types
        )
        x = embed(tokens)
        x = drop(x + sines_and_cosines(tokens.shape[1], self.embed_dim).astype(self.dtype))
        out = {"embed": constrain(x, "batch", "length", "channels")}
        mixer = CombinerAttention(
            self.num_heads, self.kind, self.span, self.causal, self.size_bias, self.dropout,
            parent=None, **types,
        )  # fmt: skip
        norm = partial(LayerNorm, epsilon=1e-6)
        for i in range(self.depth):
            layer = ResidualLayer(
                mixer, self.embed_dim, self.mlp_ratio, activation=jax.nn.relu, norm=norm,
                dropout=self.dropout, name=f"layers_{i}", **types,
            )  # fmt: skip
            x = out[f"layer{i}"] = layer(x, {}, train)
        x = out["last_hidden_state"] = norm(name="norm", **types)(x)
        x = Dense(self.vocab_size, kernel_init=init, name="head", **types)(x)
        return out | {"logits": constrain(x, "batch", "length", "vocab")}

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is none of {', '.join(map(repr, KINDS))}.")
        if not self.causal and self.kind != "fixed":
            raise ValueError(f"kind={self.kind!r} is causal; causal=False needs kind='fixed'.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {self.embed_dim} channels; choose a "
                "divisor."
            )


KINDS = ("fixed", "logsparse", "axial", "axial_rows")

_OURS, _THEIRS = "layers_{i}", "layers.{i}.attention"

LAYOUTS = {
    # Nobody published a file: these names are ours.
    "zoo": Rules(
        [
            Rule("embed.weight", "embed/embedding"),
            *norm_rules("layers.{i}.norm1", f"{_OURS}/norm1"),
            *(
                rule
                for name in ("query", "key", "value", "out", "row_mix", "row_key")
                for rule in dense_rules(f"{_THEIRS}.{name}", f"{_OURS}/attention/{name}")
            ),
            *norm_rules(f"{_THEIRS}.row_norm", f"{_OURS}/attention/row_norm"),
            *norm_rules("layers.{i}.norm2", f"{_OURS}/norm2"),
            *mlp_rules("layers.{i}.mlp", f"{_OURS}/mlp"),
            *norm_rules("norm", "norm"),
            *dense_rules("head", "head"),
        ],
        fresh=("head/*",),
    )
}  # fmt: skip

PARTITION = {r".*attention/row_key/kernel": ("channels", "heads")}

_COMMON = dict(
    module=Combiner,
    task="language_modelling",
    paper="Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv 2107.05768",
    code="github.com/google-research/google-research/tree/master/combiner",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "combiner_base": Variant(fields={}, **_COMMON),
    "combiner_base_logsparse": Variant(fields=dict(kind="logsparse"), **_COMMON),
    "combiner_base_axial": Variant(fields=dict(kind="axial"), **_COMMON),
    "combiner_base_axial_rows": Variant(fields=dict(kind="axial_rows"), **_COMMON),
    "combiner_test": Variant(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, num_heads=4, dropout=0.0), **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
