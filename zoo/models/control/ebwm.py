"""Energy-based world model, as its successor's code has it: prediction by going downhill in energy.

Gladstone et al., "Cognitively Inspired Energy-Based World Models", arXiv 2406.08862, and
"Energy-Based Transformers are Scalable Learners and Thinkers", arXiv 2507.02092; official code
github.com/alexiglad/EBT (Apache-2.0), whose numbers we follow.

A transformer gives an energy E_i of a candidate for token i + 1, given tokens 0 to i, for all i at
once. Its sequence is [o_0 ... | p_0 ...]: embedded tokens, then embedded candidates.

    o_i sees o_0 ... o_i, at position i;   p_i sees o_0 ... o_i and itself, at position i + 1
    x = x + W_o attention(x');   x = x + W2 (silu(W1 x') * W3 x'),   x' = RMSNorm(x)
    E_i = w RMSNorm(p_i)

    y_0 = noise;   q = softmax(y_k);   y_(k+1) = q - alpha dE/dq       K steps; alpha is learned
    loss = mean over k of the cross-entropy of y_k                    differentiated through dE/dq

With time embeddings an embedding of the step k stands in front of the tokens, which it shifts by a
position. With `adaln` a linear map of silu(that embedding) gives each block six vectors: what comes
out of a norm is times 1 + s plus b, and what is added is times g; the last norm gets s and b, too.
With `adaln_zero` these maps and the head start at zero. Only with time embeddings has the code
other norms than RMSNorm (`NORMS`) and other activations. The heads for images are not here.

    features            ebt_xxs
    energy              2    255       of each step
    refined             2    255  50277    y behind each step
    logits              255  50277     y behind the last
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear
from zoo.layers.decoder import GatedMlp
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.patch import torch_default_init
from zoo.system import System, Variant

init = nn.initializers.xavier_normal()


def rotated(
    x: Float[Array, "batch length heads head_dim"], start: int, theta: float = 10_000.0
) -> Float[Array, "batch length heads head_dim"]:
    """Neighbouring channels turned by the position, which begins at `start`."""
    length, dim = x.shape[1], x.shape[-1]
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
    xp = np if isinstance(length, int) else jnp  # a symbolic length is known when it runs
    angle = xp.outer(xp.arange(start, start + length, dtype=np.float32), frequency)
    cos, sin = (jnp.asarray(f(angle), x.dtype)[:, None] for f in (xp.cos, xp.sin))
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pairs.reshape(x.shape)


class TwoStreamAttention(nn.Module):
    """Causal attention of the tokens, and of each candidate to its tokens and itself.

    Plain products and a masked softmax over finite numbers: the energy is differentiated twice.
    """

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens channels"],
        candidates: Float[Array, "batch candidates channels"],
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, "batch candidates channels"]]:
        """Both streams."""
        channels = tokens.shape[-1]
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        more = tokens.shape[1] - candidates.shape[1]  # tokens in front that stand for no word
        dense = partial(
            Dense, channels, use_bias=False, kernel_init=init, dtype=self.dtype,
            param_dtype=self.param_dtype,
        )  # fmt: skip
        maps = {name: dense(name=name) for name in ("query", "key", "value", "out")}

        def heads(name: str, x: Array, start: int | None) -> Array:
            y = maps[name](x).reshape(*x.shape[:2], self.num_heads, -1)
            return y if start is None else rotated(y, start)

        query, key = (heads(name, tokens, 0) for name in ("query", "key"))
        other, own = (heads(name, candidates, more + 1) for name in ("query", "key"))
        value, own_value = (heads("value", x, None) for x in (tokens, candidates))
        scale = query.shape[-1] ** -0.5
        at = jnp.arange(tokens.shape[1])
        seen = at <= at[:, None]
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key) * scale
        weights = _softmax(jnp.where(seen, scores, -1e30))
        tokens = jnp.einsum("bnqk,bknd->bqnd", weights, value)
        scores = jnp.einsum("bqnd,bknd->bnqk", other, key) * scale
        self_score = jnp.einsum("bqnd,bqnd->bnq", other, own)[..., None] * scale
        scores = jnp.concatenate([jnp.where(seen[more:], scores, -1e30), self_score], -1)
        weights = _softmax(scores)
        candidates = jnp.einsum("bnqk,bknd->bqnd", weights[..., :-1], value)
        candidates = candidates + jnp.moveaxis(weights[..., -1:], 1, 2) * own_value
        return tuple(maps["out"](x.reshape(*x.shape[:2], -1)) for x in (tokens, candidates))


def _softmax(scores: Array) -> Array:
    return jax.nn.softmax(scores.astype(jnp.float32), -1).astype(scores.dtype)


class DynamicTanh(nn.Module):
    """`scale * tanh(alpha x) + bias`, in place of a norm (arXiv 2503.10622)."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        alpha = self.param("alpha", nn.initializers.constant(0.5), (1,), self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        y = jnp.tanh(alpha.astype(self.dtype) * x.astype(self.dtype))
        return y * scale.astype(self.dtype) + bias.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def norm_of_gradient(x: Array, scale: Array, epsilon: float) -> Array:
    """`x`; its gradient is the RMSNorm, with this scale, of the gradient that comes back."""
    return x


def _gradient(epsilon: float, scale: Array, gradient: Array) -> tuple[Array, Array]:
    root = jax.lax.rsqrt(jnp.square(gradient).mean(-1, keepdims=True) + epsilon)
    normed = gradient * root
    return normed * scale, normed.reshape(-1, normed.shape[-1]).sum(0)


norm_of_gradient.defvjp(lambda x, scale, epsilon: (x, scale), _gradient)


class BothWaysNorm(nn.Module):
    """RMSNorm, and another one of the gradient on its way back."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.RMSNorm(epsilon=self.epsilon, name="forward", **types)(x)
        start = nn.initializers.constant(0.01)
        scale = self.param("gradient_scale", start, x.shape[-1:], self.param_dtype)
        return norm_of_gradient(x, scale.astype(x.dtype), self.epsilon)


def _no_norm(name: str) -> Any:
    return lambda x: x


NORMS = {
    "rms": lambda epsilon, types: partial(nn.RMSNorm, epsilon=epsilon, **types),
    "layer": lambda epsilon, types: partial(LayerNorm, epsilon=1e-5, **types),
    "dyt": lambda epsilon, types: partial(DynamicTanh, **types),
    "none": lambda epsilon, types: _no_norm,
    "both_ways": lambda epsilon, types: partial(BothWaysNorm, epsilon, **types),
}
"""Kinds of norms: what makes the maker of one. PyTorch's LayerNorm is not told the epsilon."""

Norm = Literal["rms", "layer", "dyt", "none", "both_ways"]
Conditioning = Literal["default", "time_embed", "adaln", "adaln_zero"]


def modulated(x: Array, shift: Array | None, scale: Array | None) -> Array:
    """`x (1 + scale) + shift`; without them `x`."""
    return x if shift is None else x * (1 + scale) + shift


class EnergyTransformer(Model):
    """The energy of each candidate.

    Attributes:
      embed_dim: channels.
      depth: blocks.
      num_heads: heads.
      mlp_ratio: width of the MLPs over the channels.
      conditioning: none, an embedding of the step in front of the tokens, or norms modulated by it.
      max_steps: steps that have an embedding.
      norm: kind of the norms, a key of `NORMS`.
      activation: of the MLPs.
      epsilon: of the norms.
      length: tokens of `example_inputs`.
    """

    embed_dim: int = 384
    depth: int = 6
    num_heads: int = 6
    mlp_ratio: float = 1.0
    conditioning: Conditioning = "default"
    max_steps: int = 2
    norm: Norm = "rms"
    activation: str = "silu"
    epsilon: float = 1e-5
    length: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = jax.ShapeDtypeStruct((batch_size, self.length, self.embed_dim), jnp.float32)
        return {"tokens": shape, "candidates": shape}

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch length channels"],
        candidates: Float[Array, "batch length channels"],
        step: int = 0,
    ) -> Float[Array, "batch length"]:
        """The energies, for the step of this number."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = NORMS[self.norm](self.epsilon, types)
        zero, embedding = self.conditioning == "adaln_zero", None
        if self.conditioning != "default":
            shape = (self.max_steps, self.embed_dim)
            table = self.param(
                "step_embedding", nn.initializers.normal(1.0), shape, self.param_dtype
            )
            embedding = table[step].astype(self.dtype)
        if self.conditioning == "time_embed":
            first = jnp.broadcast_to(embedding, (tokens.shape[0], 1, self.embed_dim))
            tokens = jnp.concatenate([first.astype(tokens.dtype), tokens], 1)
            embedding = None
        vectors = partial(Modulation, zero=zero, **types)
        streams = (tokens, candidates)
        for i in range(self.depth):
            block = EnergyBlock(
                self.num_heads, int(self.embed_dim * self.mlp_ratio), norm, self.activation,
                partial(vectors, 6), name=f"layers_{i}", **types,
            )  # fmt: skip
            streams = block(*streams, embedding)
        x = norm(name="norm")(streams[1])
        if embedding is not None:
            x = modulated(x, *vectors(2, name="modulation")(embedding))
        start = nn.initializers.zeros if zero else init
        head = Dense(1, use_bias=False, kernel_init=start, name="head", **types)
        return head(x)[..., 0]


class Modulation(nn.Module):
    """So many vectors of a step: a linear map of silu(its embedding)."""

    count: int
    zero: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding: Float[Array, "channels"]) -> list[Float[Array, "channels"]]:
        start = nn.initializers.zeros if self.zero else torch_default_init
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.count * embedding.shape[-1]
        y = Dense(width, kernel_init=start, name="map", **types)(nn.silu(embedding)[None])[0]
        return jnp.split(y, self.count)


class EnergyBlock(nn.Module):
    """Attention and a gated MLP, each behind a norm and with a residual sum, for both streams."""

    num_heads: int
    mlp_dim: int
    norm: Any
    activation: str
    modulation: Any
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, candidates: Array, embedding: Array | None
    ) -> tuple[Array, Array]:
        """Both streams after the block, modulated where there is an embedding of the step."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm1, norm2 = self.norm(name="norm1"), self.norm(name="norm2")
        attention = TwoStreamAttention(self.num_heads, name="attention", **types)
        activation = ACTIVATIONS[self.activation]
        mlp = GatedMlp(self.mlp_dim, activation=activation, name="mlp", **types)
        shift1, scale1, gate1, shift2, scale2, gate2 = (None, None, 1.0) * 2
        if embedding is not None:
            made = self.modulation(name="modulation")(embedding)
            shift1, scale1, gate1, shift2, scale2, gate2 = made
        streams = (tokens, candidates)
        added = attention(*(modulated(norm1(x), shift1, scale1) for x in streams))
        streams = tuple(x + gate1 * y for x, y in zip(streams, added, strict=True))
        return tuple(x + gate2 * mlp(modulated(norm2(x), shift2, scale2)) for x in streams)


class EBT(Model):
    """Energy-based transformer of language: next tokens by steps down the energy.

    Attributes:
      vocab_size: tokens.
      embed_dim, depth, num_heads, mlp_ratio, conditioning, norm, activation: of
        `EnergyTransformer`.
      max_steps: steps that have an embedding; None: as many as are taken.
      steps: gradient steps.
      last_repeats: times that the last step is repeated on its own energy.
      alpha: their first size.
      detach: take the gradient of the loss through one step, not through the ones before.
      truncate: let only the last step count, and differentiate through its gradient alone.
      normalise: turn numbers into a distribution in front of every step, the first, or none.
      embeds_by_table: a candidate's embedding is the mean of the tokens', not a map of its own.
      clamp_gradient: largest change of a number in a step; 0: any.
      clamp: largest number behind a step; 0: any.
      temperature: numbers behind a step are divided by it; 0: they are not.
      start: numbers of the first candidates.
      noise: deviation of what is added in front of each step, in training.
      length: tokens of `example_inputs`.
    """

    vocab_size: int = 50_277
    embed_dim: int = 384
    depth: int = 6
    num_heads: int = 6
    mlp_ratio: float = 1.0
    conditioning: Conditioning = "time_embed"
    norm: Norm = "rms"
    activation: str = "silu"
    max_steps: int | None = None
    steps: int = 2
    last_repeats: int = 0
    alpha: float = 500.0
    detach: bool = True
    truncate: bool = False
    normalise: Literal["every", "first", "never"] = "every"
    embeds_by_table: bool = False
    clamp_gradient: float = 0.0
    clamp: float = 0.0
    temperature: float = 0.0
    start: Literal["noise", "zeros"] = "noise"
    noise: float = 0.0
    length: int = 255
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, for texts of `length` tokens if it is given."""
        return {"tokens": jax.ShapeDtypeStruct((batch_size, length or self.length), jnp.int32)}

    def __call__(
        self, tokens: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length vocab"]:
        """Logits of the next token at every place."""
        return self.features(tokens, train)["logits"]

    @nn.compact
    def features(
        self,
        tokens: Int[Array, "batch length"],
        train: bool = False,
        first: Float[Array, "batch length vocab"] | None = None,
    ) -> dict[str, Array]:
        """Logits, and energies and numbers of every step (see the table above).

        Args:
          tokens: numbers of the tokens.
          train: whether noise is added.
          first: numbers of the first candidates; None: normal ones from the key `sample` where
            there is one and `start` asks for noise, else zeros.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (self.vocab_size, self.embed_dim)
        table = self.param("embedding", nn.initializers.normal(1.0), shape, self.param_dtype)
        table = table.astype(self.dtype)
        transformer = EnergyTransformer(
            self.embed_dim, self.depth, self.num_heads, self.mlp_ratio, self.conditioning,
            self.max_steps or self.steps, self.norm, self.activation, name="transformer", **types,
        )  # fmt: skip
        if not self.embeds_by_table:
            table_of = self.param("candidate_kernel", init, shape, self.param_dtype)
            table_of = table_of.astype(self.dtype)
        else:
            table_of = table
        alpha = self.param("alpha", nn.initializers.constant(self.alpha), (), self.param_dtype)
        start = nn.initializers.constant(self.noise)
        noise = jnp.maximum(self.param("noise_std", start, (), self.param_dtype), 1e-6)
        words = table[tokens]
        if self.is_initializing():
            transformer(words, words)
        weights = {"params": self.variables["params"]["transformer"]}
        pure = transformer.clone(parent=None, name=None)
        y = first
        if y is None:
            y = jnp.zeros((*tokens.shape, self.vocab_size), self.dtype)
            if self.start == "noise" and self.has_rng("sample"):
                y = jax.random.normal(self.make_rng("sample"), y.shape, self.dtype)

        def energy(q: Array, step: int) -> tuple[Array, Array]:
            found = pure.apply(weights, words, q @ table_of, step)
            return found.sum(), found

        taken = [*range(self.steps), *[self.steps - 1] * self.last_repeats]
        energies, refined = [], []
        for i, step in enumerate(taken):
            y = jax.lax.stop_gradient(y) if self.detach else y
            if self.noise and train:
                random = jax.random.normal(self.make_rng("sample"), y.shape, y.dtype)
                y = y + noise.astype(y.dtype) * random
            if self.normalise == "every" or (self.normalise == "first" and step == 0):
                y = jax.nn.softmax(y, -1)
            slope, found = jax.grad(energy, has_aux=True)(y, step)
            if self.truncate and i < len(taken) - 1:
                slope = jax.lax.stop_gradient(slope)
            if self.clamp_gradient:
                limit = self.clamp_gradient / alpha
                slope = jnp.clip(slope, -limit, limit)
            y = y - jnp.maximum(alpha, 1e-4).astype(y.dtype) * slope
            y = jnp.clip(y, -self.clamp, self.clamp) if self.clamp else y
            y = y / self.temperature if self.temperature else y
            energies.append(found)
            refined.append(y)
        return {
            "energy": jnp.stack(energies, 1),
            "refined": jnp.stack(refined, 1),
            "logits": y,
        }


def refinement_loss(
    refined: Float[Array, "batch steps length vocab"],
    targets: Int[Array, "batch length"],
    *,
    truncate: bool = False,
    soften: float = 0.0,
    padding: int | None = 0,
) -> tuple[Float[Array, ""], Float[Array, "steps"]]:
    """The loss of the steps and of each of them: the mean cross-entropy of targets that count.

    Args:
      refined: of `EBT.features`.
      targets: next tokens.
      truncate: only the last step counts.
      soften: label smoothing of the first step, which falls to zero at the last.
      padding: target that does not count; None: all do.
    """
    import optax  # a part of the time of `zoo list`, if it were imported with the file

    steps = refined.shape[1]
    counted = jnp.ones_like(targets, bool) if padding is None else targets != padding
    losses = []
    for k in range(steps):
        smooth = soften * (steps - 1 - k) / (steps - 1) if steps > 1 else 0.0
        labels = optax.smooth_labels(jax.nn.one_hot(targets, refined.shape[-1]), smooth)
        each = optax.softmax_cross_entropy(refined[:, k].astype(jnp.float32), labels)
        losses.append(jnp.where(counted, each, 0).sum() / jnp.maximum(counted.sum(), 1))
    losses = jnp.stack(losses)
    return (losses[-1] if truncate else losses.mean()), losses


def contrastive_loss(
    true: Float[Array, "batch length"],
    refined: Float[Array, "batch length"],
    targets: Int[Array, "batch length"],
    padding: int | None = 0,
) -> Float[Array, ""]:
    """Low energies for the true next tokens, high ones for what the steps began their last from.

    The mean over targets that count of `log(1 + exp(E_true - E_refined))`.

    Args:
      true: energies of the true next tokens.
      refined: energies of the last step.
      targets: next tokens.
      padding: target that does not count; None: all do.
    """
    counted = jnp.ones_like(targets, bool) if padding is None else targets != padding
    each = jax.nn.softplus((true - refined).astype(jnp.float32))
    return jnp.where(counted, each, 0).sum() / jnp.maximum(counted.sum(), 1)


# ---------------------------------------------------------------------------- checkpoints


def _body(theirs: str, ours: str, adaln: bool = False) -> list[Rule]:
    """`adaln`: with modulated norms, whose head has another name."""
    rules = []
    for a, b in (("attention.wq", "attention/query"), ("attention.wk", "attention/key"),
                 ("attention.wv", "attention/value"), ("attention.wo", "attention/out"),
                 ("feed_forward.w1", "mlp/gate"), ("feed_forward.w3", "mlp/up"),
                 ("feed_forward.w2", "mlp/down")):  # fmt: skip
        source = f"{theirs}layers.{{i}}.{a}.weight"
        rules.append(Rule(source, f"{ours}layers_{{i}}/{b}/kernel", linear))
    for a, b in (("attention_norm", "norm1"), ("ffn_norm", "norm2")):
        rules += _norm(f"{theirs}layers.{{i}}.{a}", f"{ours}layers_{{i}}/{b}")
    head = f"{theirs}final_layer"
    if adaln:
        rules += dense_rules(
            f"{theirs}layers.{{i}}.adaLN_modulation.1", f"{ours}layers_{{i}}/modulation/map"
        )
        rules += dense_rules(f"{head}.adaLN_modulation.1", f"{ours}modulation/map")
        head = f"{head}.linear"
    return [
        *rules,
        *_norm(f"{theirs}norm", f"{ours}norm"),
        Rule(f"{theirs}time_embeddings.weight", f"{ours}step_embedding"),
        Rule(f"{head}.weight", f"{ours}head/kernel", linear),
    ]


def _norm(theirs: str, ours: str) -> list[Rule]:
    """Any of `NORMS`."""
    names = {
        "weight": "scale",
        "bias": "bias",
        "alpha": "alpha",
        "forward_rms.weight": "forward/scale",
        "backward_rms.weight": "gradient_scale",
    }
    return [Rule(f"{theirs}.{a}", f"{ours}/{b}") for a, b in names.items()]


def _official(prefix: str = "", adaln: bool = False) -> Rules:
    return Rules(
        [
            Rule(f"{prefix}alpha", "alpha"),
            Rule(f"{prefix}langevin_dynamics_noise_std", "noise_std"),
            Rule(f"{prefix}embeddings.weight", "embedding"),
            Rule(f"{prefix}vocab_to_embed.weight", "candidate_kernel", linear),
            *_body(f"{prefix}transformer.", "transformer/", adaln),
        ],
    )


LAYOUTS = {
    "official": _official(),
    "lightning": _official("model."),
    "body": Rules(_body("", "")),
    "official_adaln": _official(adaln=True),
    "lightning_adaln": _official("model.", adaln=True),
    "body_adaln": Rules(_body("", "", adaln=True)),
}

_COMMON = dict(
    module=EBT,
    task="language_modelling",
    paper="Cognitively Inspired Energy-Based World Models, arXiv 2406.08862; Energy-Based "
    "Transformers are Scalable Learners and Thinkers, arXiv 2507.02092",
    code="github.com/alexiglad/EBT",
    licence="Apache-2.0",
)

_SIZES = {
    "4xs": (2, 2, 128), "3xs": (4, 4, 256), "xxs": (6, 6, 384), "xs": (12, 6, 384),
    "small": (12, 12, 768), "medium": (24, 16, 1024), "large": (24, 16, 1536),
    "xl": (24, 32, 2048),
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    **{
        f"ebt_{name}": Variant(fields=dict(depth=d, num_heads=h, embed_dim=c), **_COMMON)
        for name, (d, h, c) in _SIZES.items()
    },
    "ebt_test": Variant(
        fields=dict(vocab_size=11, embed_dim=32, depth=2, num_heads=4, length=6, alpha=5.0),
        **_COMMON,
    ),
}

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, frozen=("noise_std",), decay=(".*step_embedding",)
)
