"""Learners of Boolean functions from examples: attention, retention, Hyena, DSS, LSTM and GRU.

Bhattamishra, Patel, Blunsom, Kanade, "Understanding In-Context Learning in Transformers and LLMs
by Learning to Learn Discrete Functions", ICLR 2024, arXiv 2310.03016. Official code
github.com/satwik77/incontext-bool (MIT), whose names and arithmetic we follow.

    z_2i = x_i in {-1, 1}^d;  z_2i+1 = (y_i, 0, ..., 0)      a label is -1 or 1
    h = sqrt(e) (W_in z + b_in) + P                          DSS, LSTM, GRU: h = W_in z + b_in
    h = h + mixer(LN(h));  h = h + W2 gelu(W1 LN(h))         `depth` times, exact GELU
    logit_i = w_out . LN(h)_2i + b_out                       positive: y_i = 1

Attention and Hyena have learned positions P, 200 of them, so that a prompt has 100 points at most;
retention and DSS have none and read prompts of any length. An LSTM or GRU stands in place of all
blocks, without the last LayerNorm. The GPT-2 of this code ("san") is in `icl_sequential`; the
mixers are in `mixers`. Pretrained language models, which the authors also use, are not here.

    features            icl_boolean_mysan
    tokens              40 28           of 20 points
    embed               40 256
    layer0              40 256          up to layer11
    last_hidden_state   40 256          behind the last LayerNorm
    logits              20
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    dense_rules,
    identity,
    linear,
    norm_rules,
    split,
    squeeze,
    tied,
    transpose,
)
from zoo.layers.causal import Context
from zoo.layers.decoder import run_blocks
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init
from zoo.models.incontext.mixers import (
    DiagonalSSM,
    HyenaOperator,
    Retention,
    filter_decays,
    xavier,
)
from zoo.models.incontext.prompt import Read, check_prompt, interleave, prompt_shapes, read_rules
from zoo.models.language.gpt2 import CausalAttention
from zoo.system import System, Variant

MIXERS = ("attention", "retention", "hyena", "dss")
CELLS = ("lstm", "gru")


class Block(nn.Module):
    """A mixer and an MLP four times as wide, each behind a LayerNorm and with a residual sum."""

    template: nn.Module  # its copy is the parameter group `mixer`
    kernel_init: Callable = torch_default_init
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: Any = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], Any]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        mixer = self.template.clone(name="mixer", parent=self)
        y, state = mixer(norm(name="norm1")(x), state, train, context)
        x = x + y
        mlp = Mlp(4 * x.shape[-1], gelu, kernel_init=self.kernel_init, name="mlp", **types)
        x = x + mlp(norm(name="norm2")(x))
        return constrain(x, "batch", "length", "channels"), state


class RecurrentCell(nn.Module):
    """One layer of an LSTM or a GRU over a sequence, as PyTorch computes it."""

    kind: str
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: Any
    ) -> tuple[Float[Array, "batch length channels"], Any]:
        """What it gives at each token, and the state: h, with an LSTM's cell behind it."""
        channels, gates = x.shape[-1], 4 if self.kind == "lstm" else 3
        dense = partial(
            Dense,
            gates * channels,
            kernel_init=torch_default_init,
            bias_init=bias_init(channels),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        hidden = dense(name="hidden")
        given = dense(name="input")(x)

        def step(hidden: nn.Module, state: Any, given: Array) -> tuple[Any, Array]:
            own = hidden(state[0])
            if self.kind == "lstm":
                i, f, g, o = jnp.split(given + own, 4, axis=-1)
                cell = nn.sigmoid(f) * state[1] + nn.sigmoid(i) * jnp.tanh(g)
                h = nn.sigmoid(o) * jnp.tanh(cell)
                return (h, cell), h
            (r, z, n), (own_r, own_z, own_n) = (jnp.split(t, 3, axis=-1) for t in (given, own))
            r, z = nn.sigmoid(r + own_r), nn.sigmoid(z + own_z)
            h = (1 - z) * jnp.tanh(n + r * own_n) + z * state[0]
            return (h,), h

        scan = nn.scan(
            step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        state, y = scan(hidden, state, given)
        return y, state


class InContextBoolean(Model):
    """Classifies each point of a prompt from the points before it.

    With retention, LSTM and GRU, `init_state(batch, length)` and `step(state, tokens)` (through
    `apply(..., method="step")`) go on with a sequence of tokens, as `prompt.interleave` makes it.

    Attributes:
      mixer: "attention" (the authors' "mysan"), "retention", "hyena", "dss", "lstm" or "gru".
      dims: size of an x.
      embed_dim: channels.
      depth: blocks, or layers of an LSTM or GRU.
      num_heads: of attention and retention; must divide the channels.
      order: gates of Hyena.
      modes: of DSS.
      gated: whether retention has its gate.
      max_tokens: two a point, for attention and Hyena.
      read_hidden: width of both ends' hidden layers; None: they are linear.
    """

    mixer: str = "attention"
    dims: int = 28
    embed_dim: int = 256
    depth: int = 12
    num_heads: int = 8
    order: int = 3
    modes: int = 64
    gated: bool = True
    max_tokens: int = 200
    read_hidden: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, points: int = 20
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for prompts of so many points."""
        return prompt_shapes(batch_size, min(points, self.max_tokens // 2), self.dims)

    def __call__(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> Float[Array, "batch points"]:
        """The logit of each label being 1."""
        return self.features(xs, ys, train)["logits"]

    def features(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Raises:
          ValueError: for an unknown mixer, for what is no prompt, or one that is too long.
        """
        limited = self.mixer in ("attention", "hyena")
        check_prompt(self, xs, ys, self.max_tokens // 2 if limited else None)
        out, _ = self._run(interleave(xs, ys), None, train)
        return out | {"logits": out["logits"][:, ::2]}

    def init_state(self, batch: int, length: int) -> tuple:
        """The state before the first token; it is of one size, whatever `length` is.

        Raises:
          ValueError: for a mixer without one.
        """
        empty = jnp.zeros((batch, self.embed_dim))
        if self.mixer in CELLS:
            return ((empty,) * (2 if self.mixer == "lstm" else 1),) * self.depth
        if self.mixer == "retention":
            return (self._mixer().init_state(batch, self.embed_dim),) * self.depth
        raise ValueError(
            f"mixer={self.mixer!r} gives no states; retention, lstm and gru do. Call the model on "
            "the whole prompt."
        )

    def step(
        self, state: tuple, tokens: Float[Array, "batch length dims"]
    ) -> tuple[tuple, Float[Array, "batch length"]]:
        """Continue by one or more tokens: the state after them, and a logit at each."""
        out, state = self._run(tokens, state, False)
        return state, out["logits"]

    @nn.compact
    def _run(
        self, tokens: Array, state: tuple | None, train: bool
    ) -> tuple[dict[str, Array], tuple | None]:
        if self.mixer not in MIXERS + CELLS:
            known = ", ".join(map(repr, MIXERS + CELLS))
            raise ValueError(f"mixer={self.mixer!r} is none of {known}.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Read(self.embed_dim, self.read_hidden, name="read_in", **types)(tokens)
        x = x * self.embed_dim**0.5 if self.mixer in ("attention", "retention", "hyena") else x
        if self.mixer in ("attention", "hyena"):
            shape = (self.max_tokens, self.embed_dim)
            start = lambda key, *args: jax.random.uniform(  # noqa: E731
                key, *args, minval=-0.1, maxval=0.1
            )
            table = self.param("position_embedding", start, shape, self.param_dtype)
            x = x + table[: x.shape[1]].astype(self.dtype)
        x = constrain(x, "batch", "length", "channels")
        out = {"tokens": tokens, "embed": x}
        if self.mixer in CELLS:
            every, state = self._cells(x, state)
            last = every[-1] if every else x
        else:
            mixing = xavier if self.mixer == "retention" else torch_default_init
            block = partial(Block, self._mixer(), mixing, **types)
            every, state = run_blocks([block] * self.depth, x, state, train)
            last = LayerNorm(epsilon=1e-5, name="norm", **types)(every[-1] if every else x)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        out["last_hidden_state"] = last
        out["logits"] = Read(1, self.read_hidden, name="read_out", **types)(last)[..., 0]
        return out, state

    def _cells(self, x: Array, state: tuple | None) -> tuple[list[Array], tuple | None]:
        keep = state is not None
        state = state if keep else self.init_state(x.shape[0], x.shape[1])
        every, after = [], []
        for i, past in enumerate(jax.tree.map(lambda s: s.astype(self.dtype), state)):
            cell = RecurrentCell(self.mixer, self.dtype, self.param_dtype, name=f"layers_{i}")
            x, now = cell(x, past)
            every.append(x)
            after.append(now)
        return every, tuple(after) if keep else None

    def _mixer(self) -> nn.Module:
        """An unbound mixer."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "parent": None}
        if self.mixer == "attention":
            start = torch_default_init
            return CausalAttention(self.num_heads, kernel_init=start, out_init=start, **types)
        if self.mixer == "retention":
            return Retention(self.num_heads, self.gated, **types)
        if self.mixer == "hyena":
            return HyenaOperator(self.order, self.max_tokens, **types)
        return DiagonalSSM(self.modes, **types)


# ---------------------------------------------------------------------------- checkpoints

_BLOCK, _MIXER = "_backbone.blocks.{i}", "layers_{i}/mixer"
_FILTER = f"{_BLOCK}.hyena_operator.filter_fn"


def _layout(*rules: Rule, blocks: bool = True, derived: dict | None = None) -> Rules:
    """Both ends and what follows; `blocks`: with what the blocks of all mixers have."""
    layer = "layers_{i}"
    shared = [
        Rule("pos_encoder.pe", "position_embedding", squeeze(0)),
        *norm_rules(f"{_BLOCK}.ln_1", f"{layer}/norm1"),
        *norm_rules(f"{_BLOCK}.ln_2", f"{layer}/norm2"),
        *dense_rules(f"{_BLOCK}.ffn.0", f"{layer}/mlp/up"),
        *dense_rules(f"{_BLOCK}.ffn.2", f"{layer}/mlp/down"),
        *norm_rules("_backbone.layernorm", "norm"),
    ]
    return Rules([*read_rules(), *(shared if blocks else []), *rules], derived=derived or {})


def _halves(model: InContextBoolean) -> Transform:
    """The fused map of retention: query, key and value, and behind them the gate."""
    return split(-1, [3 * model.embed_dim, model.embed_dim])


def _hyena_rules() -> list[Rule]:
    theirs = f"{_BLOCK}.hyena_operator"
    frequencies = tuple(f"{_FILTER}.implicit_filter.{i}.freq" for i in (1, 3, 5, 7))
    maps = [
        rule
        for i in range(4)
        for rule in dense_rules(f"{_FILTER}.implicit_filter.{2 * i}", f"{_MIXER}/filter/dense_{i}")
    ]
    return [
        *dense_rules(f"{theirs}.in_proj", f"{_MIXER}/in_proj"),
        *dense_rules(f"{theirs}.out_proj", f"{_MIXER}/out"),
        Rule(f"{theirs}.short_filter.weight", f"{_MIXER}/short_conv/kernel", transpose(2, 1, 0)),
        Rule(f"{theirs}.short_filter.bias", f"{_MIXER}/short_conv/bias"),
        Rule(f"{_FILTER}.bias", f"{_MIXER}/skip"),
        Rule(f"{_FILTER}.pos_emb.z", f"{_MIXER}/filter/positions", squeeze(0)),
        Rule(frequencies, f"{_MIXER}/filter/frequency", chain(tied, squeeze(0))),
        *maps,
        Rule(f"{_FILTER}.implicit_filter.8.weight", f"{_MIXER}/filter/last/kernel", linear),
    ]


def _times(model: InContextBoolean, i: int) -> np.ndarray:
    return np.linspace(0, 1, model.max_tokens, dtype=np.float32)[None, :, None]


def _decays(model: InContextBoolean, i: int) -> np.ndarray:
    return filter_decays((model.order - 1) * model.embed_dim)[None, None]


LAYOUTS = {
    "mysan": _layout(
        *dense_rules(f"{_BLOCK}.proj", f"{_MIXER}/qkv"),
        *dense_rules(f"{_BLOCK}.attn_o", f"{_MIXER}/out"),
    ),
    "retnet": _layout(
        Rule(
            f"{_BLOCK}.proj.weight",
            (f"{_MIXER}/qkv/kernel", f"{_MIXER}/gate/kernel"),
            lambda model: chain(linear, _halves(model)),
        ),
        Rule(f"{_BLOCK}.proj.bias", (f"{_MIXER}/qkv/bias", f"{_MIXER}/gate/bias"), _halves),
        *dense_rules(f"{_BLOCK}.ret_o", f"{_MIXER}/out"),
        Rule(f"{_BLOCK}.grp_norm.weight", f"{_MIXER}/idle_norm_scale"),
        Rule(f"{_BLOCK}.grp_norm.bias", f"{_MIXER}/idle_norm_bias"),
    ),
    "hyena": _layout(
        *_hyena_rules(),
        derived={f"{_FILTER}.pos_emb.t": _times, f"{_FILTER}.modulation.deltas": _decays},
    ),
    "dss": _layout(
        Rule(f"{_BLOCK}.dss.D", f"{_MIXER}/skip", squeeze(0)),
        Rule(f"{_BLOCK}.dss.kernel.log_dt", f"{_MIXER}/log_dt"),
        Rule(f"{_BLOCK}.dss.kernel.Lambda", f"{_MIXER}/modes"),
        Rule(f"{_BLOCK}.dss.kernel.W", f"{_MIXER}/weight", squeeze(0)),
        *dense_rules(f"{_BLOCK}.dss.output_linear", f"{_MIXER}/out"),
    ),
    "rnn": _layout(
        *(
            Rule(f"_backbone.{kind}_{way}_l{{i}}", f"layers_{{i}}/{ours}/{leaf}", transform)
            for way, ours in (("ih", "input"), ("hh", "hidden"))
            for kind, leaf, transform in (("weight", "kernel", linear), ("bias", "bias", identity))
        ),
        blocks=False,
    ),
}

_COMMON = dict(
    module=InContextBoolean,
    task="in_context_classification",
    paper="Understanding In-Context Learning ... Discrete Functions, arXiv 2310.03016",
    code="github.com/satwik77/incontext-bool",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "icl_boolean_mysan": Variant(
        fields={}, params=9_536_513, metric="conjunctions near 100 % within 70 examples", **_COMMON
    ),
    "icl_boolean_retnet": Variant(
        fields=dict(mixer="retention"), params=10_280_961, **_COMMON
    ),
    "icl_boolean_hyena": Variant(fields=dict(mixer="hyena"), **_COMMON),
    "icl_boolean_dss": Variant(fields=dict(mixer="dss"), **_COMMON),
    "icl_boolean_lstm": Variant(fields=dict(mixer="lstm", depth=2), **_COMMON),
    "icl_boolean_gru": Variant(fields=dict(mixer="gru", depth=2), **_COMMON),
    "icl_boolean_test": Variant(
        fields=dict(dims=5, embed_dim=32, depth=2, num_heads=4, max_tokens=24), **_COMMON
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    partition={
        r".*mixer/gate/kernel": ("channels", "heads"),
        r".*mixer/gate/bias": ("heads",),
        r".*layers_\d+/(input|hidden)/kernel": ("channels", "heads"),
        r".*layers_\d+/(input|hidden)/bias": ("heads",),
    },
    frozen=(r".*idle_norm_(scale|bias)",),
    no_decay=(r".*/filter/positions", r".*/mixer/(log_dt|modes|weight)"),
)
