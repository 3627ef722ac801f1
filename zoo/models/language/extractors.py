"""Extractors: learned weighted sums of all tokens so far, in place of self-attention.

Chen, "Attention Is Not All You Need Anymore", arXiv 2308.07661. No official code was found, and
this file is a reconstruction: of the four extractors the abstract describes, only the SHE with
absolute slots (and its scaling) agrees with public code, a JAX module by another author. The
formulas of HE, WE and ME, the relative slots and where the weights start are ours. For tokens
x_1 ... x_T of d channels, one head, no biases, no softmax, and a slot for each of L places:

    e_t = sum_(i <= t) x_i (*) W_slot(t, i);   out_t = (x_t W_adj) * e_t        ME: out_t = e_t

    SHE  super high   W: d x d matrices     (L + 1) d^2 weights
    HE   higher       w: d numbers          d^2 + L d
    WE   worthwhile   s: one number         d^2 + L
    ME   minimalist   s: one number         L

slot(t, i) is the distance t - i ("relative", which commutes with shifts), or the place i
("absolute", a running sum). `scale=True` divides e_t by sqrt(t), as that module does for the
sequel's improvement. Relative sums are convolutions: one of the matrices for SHE, through the fast
Fourier transform for the others. A text longer than L is an error.

    x = x + extractor(LN(x));   x = x + W2 gelu(W1 LN(x));   logits = W LN(x)

    features            extractors_she
    embed               256  128    for 256 tokens
    layer0              256  128    up to layer3
    last_hidden_state   256  128    behind the last LayerNorm
    logits              256  256
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.layers import decoder
from zoo.layers.causal import Context, check_tokens, last
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.residual import ResidualLayer, init, mlp_rules
from zoo.system import System, Variant

KINDS = ("she", "he", "we", "me")
INDICES = ("relative", "absolute")

Tokens = Float[Array, "batch length channels"]


def extract(
    x: Tokens,
    weights: Float[Array, "slots *rest"],
    *,
    index: str = "relative",
    scale: bool = False,
) -> Tokens:
    """E of the module, in float32.

    Args:
      x: the tokens.
      weights: of each slot a matrix `[slots, channels, channels]`, numbers `[slots, channels]`, or
        one number `[slots]`.
      index: "relative" or "absolute".
      scale: whether e_t is divided by the root of t, counted from 1.

    Raises:
      ValueError: if there are more tokens than slots.
    """
    length = x.shape[1]
    if length > weights.shape[0]:
        raise ValueError(
            f"There are {weights.shape[0]} slots, too few for {length} tokens; cut the text, or "
            "create the model with more max_length."
        )
    x, w = x.astype(jnp.float32), weights[:length].astype(jnp.float32)
    if index == "absolute":
        each = jnp.einsum("bld,lde->ble", x, w) if w.ndim == 3 else x * w.reshape(length, -1)
        y = jnp.cumsum(each, axis=1)
    elif w.ndim == 3:
        y = jax.lax.conv_general_dilated(
            jnp.pad(x, ((0, 0), (length - 1, 0), (0, 0))),
            w[::-1],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    else:
        size = 2 * length
        product = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(w.reshape(length, -1), size, axis=0)
        y = jnp.fft.irfft(product, size, axis=1)[:, :length]
    if scale:
        y = y * (jnp.arange(1, length + 1, dtype=jnp.float32) ** -0.5)[:, None]
    return y


class Extractor(nn.Module):
    """One extractor; attributes are those of `Extractors`.

    Its state is the running sum of the absolute slots, or the tokens of the relative ones.
    """

    kind: str = "she"
    max_length: int = 256
    index: str = "relative"
    scale: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def init_state(self, batch: int, channels: int) -> dict[str, Array]:
        """The state before the first token."""
        if self.index == "absolute":
            return {"sum": jnp.zeros((batch, channels), jnp.float32)}
        return {"inputs": jnp.zeros((batch, self.max_length - 1, channels), jnp.float32)}

    @nn.compact
    def __call__(
        self, x: Tokens, context: dict | None = None, train: bool = False
    ) -> Tokens | tuple[dict, Tokens]:
        """The mixed tokens; with `context["state"]` the next state comes first."""
        channels = x.shape[-1]
        rest = {"she": (channels, channels), "he": (channels,), "we": (), "me": ()}[self.kind]
        start = nn.initializers.normal(self.max_length**-0.5)
        if self.kind == "she":
            start = nn.initializers.lecun_normal(batch_axis=(0,))
        weights = self.param("extract", start, (self.max_length, *rest), self.param_dtype)
        state = (context or {}).get("state")
        if state is None:
            y = extract(x, weights, index=self.index, scale=self.scale)
        else:
            state, y = self._step(state, x, weights.astype(jnp.float32), context["tokens"])
        y = y.astype(self.dtype)
        if self.kind != "me":
            adjust = Dense(
                channels, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
                kernel_init=nn.initializers.lecun_normal(), name="adjust",
            )  # fmt: skip
            y = adjust(x) * y
        return y if state is None else (state, y)

    def _step(
        self, state: dict, x: Tokens, weights: Array, context: Context
    ) -> tuple[dict, Tokens]:
        """What a few more tokens give; those at padding count as zeros."""
        x = context.hide(x.astype(jnp.float32))
        at = context.positions
        if self.index == "absolute":
            w = jnp.take(weights, at, axis=0, mode="fill", fill_value=jnp.nan)
            if weights.ndim == 3:
                each = jnp.einsum("bld,blde->ble", x, w)
            else:
                each = x * w.reshape(*at.shape, -1)
            y = state["sum"][:, None] + jnp.cumsum(context.hide(each), axis=1)
            state = {"sum": y[:, -1]}
        else:
            both = jnp.concatenate([state["inputs"], x], axis=1)
            w = weights[::-1]
            if weights.ndim < 3:  # each channel by itself
                w = jnp.broadcast_to(w.reshape(len(w), 1, -1), (len(w), 1, x.shape[-1]))
            y = jax.lax.conv_general_dilated(
                both, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=1 if weights.ndim == 3 else x.shape[-1],
            )  # fmt: skip
            y = jnp.where((at < self.max_length)[..., None], y, jnp.nan)
            state = {"inputs": last(both, context.mask, self.max_length - 1)}
        if self.scale:
            y = y * jax.lax.rsqrt(at + 1.0)[..., None]
        return state, y


class Extractors(Model):
    """A language model with an extractor in place of attention.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`) give
    the same logits token by token, or piece by piece, as a call on the whole sequence.

    Attributes:
      vocab_size: words.
      embed_dim: channels.
      max_length: L, the slots.
      kind: "she", "he", "we" or "me".
      index: "relative" or "absolute".
      scale: whether sums are divided by the root of the number of tokens so far.
      dropout: rate in the MLPs.
    """

    vocab_size: int = 256
    embed_dim: int = 128
    depth: int = 4
    max_length: int = 256
    kind: str = "she"
    index: str = "relative"
    scale: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 256
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = (batch_size, min(length, self.max_length))
        return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token.

        Raises:
          ValueError: if `length` is more than there are slots.
        """
        self._check(length)
        layers = (self._mixer().init_state(batch, self.embed_dim),) * self.depth
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def __call__(
        self, tokens: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of the next token at each position.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        return self.features(tokens, train)["logits"]

    def features(self, tokens: Int[Array, "batch length"], train: bool = False) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        tokens, _ = check_tokens(self, tokens)
        return self._run(tokens, None, train, Context())[0]

    def step(
        self, state: dict[str, Any], tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict[str, Any], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state, and their logits (NaN past the last slot).

        `mask` is 0 or False for padding, which changes nothing.
        """
        return decoder.step(self, state, tokens, mask)

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
        for i in range(self.depth):
            layer = ResidualLayer(
                self._mixer(), self.embed_dim, dropout=self.dropout, name=f"layers_{i}", **types
            )
            if state is None:
                x = layer(x, {}, train)
            else:
                now, y = layer.attend(x, {"state": state[i], "tokens": context}, train)
                x = x + y
                x = x + layer.feed(x, {}, train)
                after.append(now)
            out[f"layer{i}"] = x
        x = out["last_hidden_state"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        x = Dense(self.vocab_size, use_bias=False, kernel_init=init, name="head", **types)(x)
        out["logits"] = constrain(x, "batch", "length", "vocab")
        return out, None if state is None else tuple(after)

    def _mixer(self) -> Extractor:
        return Extractor(
            self.kind, self.max_length, self.index, self.scale, self.dtype, self.param_dtype,
            parent=None,
        )  # fmt: skip

    def _check(self, length: int) -> None:
        for field, known in (("kind", KINDS), ("index", INDICES)):
            if getattr(self, field) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{field}={getattr(self, field)!r} is none of {names}.")
        if length > self.max_length:
            raise ValueError(
                f"There are {self.max_length} slots, too few for {length} tokens; cut the text, or "
                "create the model with more max_length."
            )


_OURS = "layers_{i}"

LAYOUTS = {
    # Nobody published a file: these names are ours.
    "zoo": Rules(
        [
            Rule("embed.weight", "embed/embedding"),
            *norm_rules("layers.{i}.norm1", f"{_OURS}/norm1"),
            Rule("layers.{i}.extractor.weight", f"{_OURS}/attention/extract"),
            *dense_rules("layers.{i}.extractor.adjust", f"{_OURS}/attention/adjust"),
            *norm_rules("layers.{i}.norm2", f"{_OURS}/norm2"),
            *mlp_rules("layers.{i}.mlp", f"{_OURS}/mlp"),
            *norm_rules("norm", "norm"),
            *dense_rules("head", "head"),
        ],
        fresh=("head/*",),
    )
}

_COMMON = partial(
    Variant,
    module=Extractors,
    task="language_modelling",
    paper="Attention Is Not All You Need Anymore, arXiv 2308.07661",
    code="none found; a reconstruction from the abstract",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    **{f"extractors_{kind}": _COMMON(fields=dict(kind=kind)) for kind in KINDS},
    "extractors_test": _COMMON(
        fields=dict(vocab_size=97, embed_dim=32, depth=2, max_length=64, scale=True)
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, decay=(r".*extract",))
