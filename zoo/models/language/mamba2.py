"""Mamba-2: a state space model whose recurrence is masked attention (state space duality).

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", ICML 2024, arXiv 2405.21060; official code github.com/state-spaces/mamba
(Apache-2.0), which published the weights. For each head, with state S of shape state x width:

    [z, x, B, C, d] = W_in u;   [x, B, C] = silu(conv4([x, B, C]))    causal, channel by channel
    dt = clip(softplus(d + b), limits);   S_t = exp(-exp(A_log) dt) S_{t-1} + B_t (dt x_t)^T
    y_t = S_t^T C_t + D x_t;   out = W_out RMSNorm(y * silu(z))       one norm for a group of heads

B and C are shared by the heads of a group. A block is `u = u + mixer(RMSNorm(u))`, without an MLP
unless `mlp_dim` says so, and the residual stream is float32. There are no positions: the state is
all that a step needs. Listed layers can be softmax attention instead (hybrids), whose queries, keys
and values may go through a convolution, too, and turn in their first channels only. The official
code clips dt in the whole sequence but not in its step; we clip in both.

    features            mamba2_130m
    embed               128  768    for 128 tokens
    layer0              128  768    up to layer23
    last_hidden_state   128  768    behind the last RMSNorm
    logits              128  50288
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    conv,
    dense_rules,
    identity,
    linear,
    split,
    tied,
)
from zoo.layers.causal import (
    Context,
    attention_state,
    causal_attention,
    continue_attention,
    keep_attention,
)
from zoo.layers.decoder import Decoder, ShortConv, keep_inputs
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.rotary import Rotary
from zoo.system import File, System, Variant


def decay_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Logarithms of numbers from 1 to 16."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0)).astype(dtype)


def step_bias_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """What softplus turns into step sizes between 0.001 and 0.1, evenly in their logarithm."""
    size = jax.random.uniform(key, shape, jnp.float32, np.log(0.001), np.log(0.1))
    size = jnp.maximum(jnp.exp(size), 1e-4)
    return (size + jnp.log(-jnp.expm1(-size))).astype(dtype)


def tap_init(size: int) -> Callable:
    """How torch starts a convolution that sees `size` numbers for each output, and its bias."""

    def start(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jax.random.uniform(key, shape, dtype, -(size**-0.5), size**-0.5)

    return start


class GatedNorm(nn.Module):
    """RMSNorm of each of `groups` parts of the channels, gated with `silu(gate)`.

    Attributes:
      before_gate: whether the norm comes first; otherwise the gate does.
    """

    groups: int = 1
    epsilon: float = 1e-5
    before_gate: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        gate: Float[Array, "batch length channels"],
    ) -> Float[Array, "batch length channels"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x, gate = x.astype(jnp.float32), nn.silu(gate.astype(jnp.float32))
        if not self.before_gate:
            x = x * gate
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt((parts * parts).mean(-1, keepdims=True) + self.epsilon)
        x = parts.reshape(x.shape) * scale
        return (x * gate if self.before_gate else x).astype(self.dtype)


class StateSpace(nn.Module):
    """The mixer of Mamba-2; see the module.

    Attributes:
      state_size: length of B and C.
      head_dim: channels of a head.
      groups: of heads that share B and C.
      expand: inner channels over those of the model.
      ssm_dim: how many inner channels go through the state space; the rest is a gated MLP; None:
        all.
      conv_size: tokens of the convolution.
      dt_limit: step sizes are clipped to this range.
      activation: behind the convolution.
      conv_bias: whether the convolution has a bias.
      use_bias: whether the two linear maps have biases.
      use_norm: whether there is a norm before `out`; without, only the gate.
      norm_before_gate: see `GatedNorm`.
      wide_skip: whether D has one number a channel, not a head.
      epsilon: of the norm.
      residuals: branches that the residual stream sums; the matrix that writes starts smaller by
        its root.
    """

    state_size: int = 128
    head_dim: int = 64
    groups: int = 1
    expand: float = 2
    ssm_dim: int | None = None
    conv_size: int = 4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    activation: str = "silu"
    conv_bias: bool = True
    use_bias: bool = False
    use_norm: bool = True
    norm_before_gate: bool = False
    wide_skip: bool = False
    epsilon: float = 1e-5
    residuals: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def sizes(self, channels: int) -> tuple[int, int, int]:
        """Channels of the gated MLP, of the state space, and of all heads' B."""
        inner = int(self.expand * channels)
        ssm = inner if self.ssm_dim is None else self.ssm_dim
        heads = ssm // self.head_dim
        if ssm % self.head_dim or heads % self.groups or ssm > inner:
            raise ValueError(
                f"{ssm} of {inner} inner channels cannot be {self.groups} groups of heads of "
                f"head_dim={self.head_dim}; change expand, ssm_dim, head_dim or groups."
            )
        return inner - ssm, ssm, self.groups * self.state_size

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """S, and the last inputs of the convolution; `length` does not matter."""
        _, ssm, shared = self.sizes(channels)
        memory = (batch, ssm // self.head_dim, self.state_size, self.head_dim)
        return {
            "conv": jnp.zeros((batch, self.conv_size - 1, ssm + 2 * shared), self.dtype),
            "memory": jnp.zeros(memory, jnp.float32),
        }

    def keep(self, state: dict, nodes: dict, path: Array, accepted: Array) -> dict[str, Array]:
        """The state after those nodes of a tree that lie on a path, without their activations.

        STree's replay: of rejected nodes nothing is left, and no node's state is ever stored.
        """

        def take(t):
            return jnp.take_along_axis(t, path.reshape(*path.shape, *(1,) * (t.ndim - 2)), axis=1)

        decay = jnp.where(accepted[..., None], take(nodes["log_decay"]), 0.0)
        after = decay.sum(1, keepdims=True) - jnp.cumsum(decay, axis=1)  # behind each node
        weight = jnp.where(accepted[..., None], jnp.exp(after), 0.0)
        key, value = take(nodes["key"]), take(nodes["value"])
        key = jnp.repeat(key, value.shape[2] // key.shape[2], axis=2)
        memory = jnp.exp(decay.sum(1))[..., None, None] * state["memory"]
        memory += jnp.einsum("blh,blhn,blhp->bhnp", weight, key, value, precision="highest")
        conv = keep_inputs(state["conv"], nodes["inputs"], path, accepted)
        return {"conv": conv, "memory": memory}

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        """The mixed tokens and, if there is a state, the next one; padding changes no state."""
        batch, length, channels = u.shape
        mlp, ssm, shared = self.sizes(channels)
        heads = ssm // self.head_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=self.use_bias, **types)
        cuts = np.cumsum([mlp, mlp, ssm, ssm + 2 * shared])
        projected = dense(cuts[-1] + heads, kernel_init=torch_default_init, name="in_proj")(
            context.hide(u)
        )
        gate0, x0, gate, xBC, dt = jnp.split(projected, cuts, axis=-1)

        start = tap_init(self.conv_size)
        convolve = ShortConv(
            self.conv_size, False, start, start if self.conv_bias else None, name="conv", **types
        )
        xBC, last = convolve(xBC, None if state is None else state["conv"], context)
        xBC = context.hide(ACTIVATIONS[self.activation](xBC))
        x, B, C = jnp.split(xBC, [ssm, ssm + shared], axis=-1)
        x = x.reshape(batch, length, heads, self.head_dim)
        x = constrain(x, "batch", "length", "heads", "head_dim")
        B, C = (t.reshape(batch, length, self.groups, self.state_size) for t in (B, C))

        dt_bias = self.param("dt_bias", step_bias_init, (heads,), jnp.float32)
        dt = jnp.clip(nn.softplus(dt.astype(jnp.float32) + dt_bias), *self.dt_limit)
        dt = context.hide(dt)
        A = -jnp.exp(self.param("A_log", decay_init, (heads,), jnp.float32))
        memory = None if state is None else state["memory"]
        if context.parents is None:
            y, memory = kernels_pallas.ssd(x, dt, A, B, C, initial_state=memory)
            after = {"conv": last, "memory": memory}
        else:
            y, _ = kernels_pallas.tree_ssd(x, dt, A, B, C, context.parents, initial_state=memory)
            value = x.astype(jnp.float32) * dt[..., None]
            after = {"inputs": last, "key": B, "value": value, "log_decay": dt * A}
        skip = (heads, self.head_dim if self.wide_skip else 1)
        D = self.param("D", nn.initializers.ones, (np.prod(skip),), jnp.float32)
        y = (y + D.reshape(skip) * x).reshape(batch, length, ssm)

        if self.use_norm:
            norm = GatedNorm(self.groups, self.epsilon, self.norm_before_gate, name="norm", **types)
            y = norm(y, gate)
        else:
            y = y * nn.silu(gate)
        if mlp:
            y = jnp.concatenate([nn.silu(gate0) * x0, y], axis=-1)
        out_init = nn.initializers.variance_scaling(1 / 3 / self.residuals, "fan_in", "uniform")
        y = dense(channels, kernel_init=out_init, name="out")(y.astype(self.dtype))
        return y, None if state is None else after


class HybridAttention(nn.Module):
    """The attention of mamba_ssm's hybrids: a causal convolution before it, and rotary in part.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key heads; None: as many.
      head_dim: channels of a head; None: the channels over the heads.
      conv_size: tokens of the convolution of queries, keys and values; 0: none.
      rotary_dim: channels of a head that turn; None: all.
      theta: base of the rotary frequencies.
      qkv_bias: whether query, key and value have biases.
      out_bias: whether the output has a bias.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    conv_size: int = 0
    rotary_dim: int | None = None
    theta: float = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def widths(self, channels: int) -> tuple[int, int]:
        """Channels of all queries, and of all keys."""
        width = self.head_dim or channels // self.num_heads
        return self.num_heads * width, (self.num_kv_heads or self.num_heads) * width

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """Room for the keys and values of `length` tokens, and inputs of the convolution."""
        wide, shared = self.widths(channels)
        heads, width = self.num_kv_heads or self.num_heads, wide // self.num_heads
        state = attention_state(batch, length, heads, width, self.dtype)
        if self.conv_size:
            before = (batch, self.conv_size - 1, wide + 2 * shared)
            state["conv"] = jnp.zeros(before, self.dtype)
        return state

    def keep(self, state: dict, nodes: dict, path: Array, accepted: Array) -> dict[str, Array]:
        """See `zoo.layers.causal.keep_attention`."""
        after = keep_attention(_without_conv(state), nodes, path, accepted)
        if self.conv_size:
            after["conv"] = keep_inputs(state["conv"], nodes["inputs"], path, accepted)
        return after

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        """The attended tokens and, if there is a state, the next one."""
        batch, length, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=torch_default_init, **types)
        wide, shared = self.widths(channels)
        parts = [
            dense(size, use_bias=self.qkv_bias, name=name)(x)
            for name, size in (("query", wide), ("key", shared), ("value", shared))
        ]
        last = None
        if self.conv_size:
            start = tap_init(self.conv_size)
            convolve = ShortConv(self.conv_size, False, start, start, name="conv", **types)
            before = None if state is None else state["conv"]
            mixed, last = convolve(jnp.concatenate(parts, -1), before, context)
            parts = jnp.split(mixed, [wide, wide + shared], -1)
        shape = (batch, length, -1, wide // self.num_heads)
        query, key, value = (
            constrain(t.reshape(shape), "batch", "length", "heads", "head_dim") for t in parts
        )
        query, key = self._turn(query, context), self._turn(key, context)
        if state is None:
            y = causal_attention(query, key, value, context.mask)
        else:
            y, state = continue_attention(query, key, value, _without_conv(state), context)
            if self.conv_size:
                state["conv" if context.parents is None else "inputs"] = last
        return dense(channels, use_bias=self.out_bias, name="out")(
            y.reshape(batch, length, -1)
        ), state

    def _turn(self, x: Array, context: Context) -> Float[Array, "batch length heads head_dim"]:
        turned = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
        if not turned:
            return x
        positions = context.positions
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        first = Rotary(self.theta)(x[..., :turned], positions)
        return jnp.concatenate([first, x[..., turned:]], -1)


def _without_conv(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "conv"}


class Mamba2(Decoder):
    """Mamba-2 language model; fields of the mixer as in `StateSpace`.

    States and steps are those of `zoo.layers.decoder.CausalLM`.

    Attributes:
      residual_in_float32: whether blocks are summed in float32, whatever `dtype` they run in.
      attention_head_dim, attention_conv, attention_rotary, attention_out_bias: of hybrids, as
        `head_dim`, `conv_size`, `rotary_dim` and `out_bias` of `HybridAttention`.
    """

    vocab_size: int = 50288
    embed_dim: int = 768
    mlp_dim: int | None = 0
    epsilon: float = 1e-5
    tie_embeddings: bool = True
    state_size: int = 128
    head_dim: int = 64
    groups: int = 1
    expand: float = 2
    ssm_dim: int | None = None
    conv_size: int = 4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    activation: str = "silu"
    conv_bias: bool = True
    use_bias: bool = False
    use_norm: bool = True
    norm_before_gate: bool = False
    wide_skip: bool = False
    norm_epsilon: float | None = None
    residual_in_float32: bool = True
    attention_head_dim: int | None = None
    attention_conv: int = 0
    attention_rotary: int | None = None
    attention_out_bias: bool = False

    def mixers(self) -> list[nn.Module]:
        """An unbound mixer for each layer."""
        if self.window is not None:  # only of attention without what hybrids have more
            return super().mixers()
        attention = HybridAttention(
            self.attention_heads,
            self.attention_kv_heads,
            self.attention_head_dim,
            self.attention_conv,
            self.attention_rotary,
            self.rope_theta,
            self.attention_bias,
            self.attention_out_bias,
            self.dtype,
            self.param_dtype,
            parent=None,
        )
        layers = enumerate(super().mixers())
        return [attention if i in self.attention_layers else own for i, own in layers]

    def residual_dtype(self) -> jnp.dtype:
        """The type of the residual stream."""
        return jnp.float32 if self.residual_in_float32 else self.dtype

    def mixer(self) -> nn.Module:
        """The mixer of all layers but `attention_layers`."""
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={self.activation!r} is none of {known}.")
        return StateSpace(
            self.state_size,
            self.head_dim,
            self.groups,
            self.expand,
            self.ssm_dim,
            self.conv_size,
            self.dt_limit,
            self.activation,
            self.conv_bias,
            self.use_bias,
            self.use_norm,
            self.norm_before_gate,
            self.wide_skip,
            self.epsilon if self.norm_epsilon is None else self.norm_epsilon,
            self.depth * (2 if self.mlp_dim else 1),
            self.dtype,
            self.param_dtype,
            parent=None,
        )


# ---------------------------------------------------------------------------- checkpoints


def _swapped(rule: Transform) -> Transform:
    """The transform of a rule, with its two targets in the other order."""

    def bind(sources: int, targets: int) -> Transform:
        inner = rule.bound(sources, targets)
        return Transform(
            lambda xs: inner.forward(xs)[::-1], lambda xs: inner.inverse(list(xs)[::-1])
        )

    return Transform(rule.forward, rule.inverse, bind)


def _qkv(model: Mamba2) -> tuple[int, int, int]:
    """Channels of query, key and value in a layer of attention."""
    width = model.attention_head_dim or model.embed_dim // model.attention_heads
    shared = width * (model.attention_kv_heads or model.attention_heads)
    return width * model.attention_heads, shared, shared


def _layout(embed: str, *, head: bool, prefix: str = "backbone.") -> Rules:
    """Rules of one published naming.

    Args:
      embed: name of the embedding.
      head: whether the file repeats the embedding as `lm_head`.
      prefix: of all names but the head's.
    """
    theirs, ours = f"{prefix}layers.{{i}}", "layers_{i}"
    mixer, attention = f"{theirs}.mixer", f"{ours}/attention"
    table = f"{prefix}{embed}.weight"
    rules = [Rule("lm_head.weight", "head/kernel", linear)]
    if head:
        rules.append(Rule((table, "lm_head.weight"), "embed/embedding", tied))
    rules += [
        Rule(table, "embed/embedding"),
        Rule(f"{prefix}norm_f.weight", "norm/scale"),
        Rule(f"{theirs}.norm.weight", f"{ours}/norm1/scale"),
        Rule(f"{theirs}.norm2.weight", f"{ours}/norm2/scale"),
        *dense_rules(f"{mixer}.in_proj", f"{attention}/in_proj"),
        *(
            Rule(
                f"{mixer}.in_proj.{name}",  # of attention: query, key and value
                tuple(f"{attention}/{part}/{leaf}" for part in ("query", "key", "value")),
                lambda model, turn=turn, axis=axis: chain(turn, split(axis, _qkv(model))),
            )
            for name, leaf, turn, axis in (
                ("weight", "kernel", linear, 1),
                ("bias", "bias", identity, 0),
            )
        ),
        Rule(f"{mixer}.conv1d.weight", f"{attention}/conv/kernel", conv),
        Rule(f"{mixer}.conv1d.bias", f"{attention}/conv/bias"),
        *(Rule(f"{mixer}.{name}", f"{attention}/{name}") for name in ("dt_bias", "A_log", "D")),
        Rule(f"{mixer}.norm.weight", f"{attention}/norm/scale"),
        *dense_rules(f"{mixer}.out_proj", f"{attention}/out"),
        Rule(
            f"{theirs}.mlp.fc1.weight",  # first what is gated, then the gate
            (f"{ours}/mlp/gate/kernel", f"{ours}/mlp/up/kernel"),
            _swapped(chain(linear, split(1))),
        ),
        Rule(f"{theirs}.mlp.fc2.weight", f"{ours}/mlp/down/kernel", linear),
    ]
    return Rules(rules, fresh=("head/kernel",))


LAYOUTS = {
    "official": _layout("embedding", head=False),
    "official_torch": _layout("embedding", head=True),
    "huggingface": _layout("embeddings", head=False),
    "huggingface_torch": _layout("embeddings", head=True),
    "trunk": _layout("embeddings", head=False, prefix=""),
}

_MIXER = r".*attention"
PARTITION = {
    rf"{_MIXER}/in_proj/kernel": ("channels", "heads"),
    rf"{_MIXER}/in_proj/bias": ("heads",),
    rf"{_MIXER}/conv/kernel": (None, None, "heads"),
    rf"{_MIXER}/conv/bias": ("heads",),
    rf"{_MIXER}/norm/scale": ("heads",),
    rf"{_MIXER}/(dt_bias|A_log|D)": (None,),
}

_COMMON = dict(
    module=Mamba2,
    task="language_modelling",
    paper="Transformers are SSMs, arXiv 2405.21060",
    code="github.com/state-spaces/mamba",
    licence="Apache-2.0",
)
_PUBLISHED = _COMMON | dict(
    metric="300B tokens of the Pile", files=(File("pytorch_model.bin"), File("model.safetensors"))
)

VARIANTS: dict[str, Variant] = {
    "mamba2_130m": Variant(fields={}, params=128_989_632, **_PUBLISHED),
    "mamba2_370m": Variant(
        fields=dict(embed_dim=1024, depth=48), params=368_346_624, **_PUBLISHED
    ),
    "mamba2_780m": Variant(
        fields=dict(embed_dim=1536, depth=48), params=780_161_280, **_PUBLISHED
    ),
    "mamba2_1.3b": Variant(
        fields=dict(embed_dim=2048, depth=48), params=1_343_757_312, **_PUBLISHED
    ),
    "mamba2_2.7b": Variant(
        fields=dict(embed_dim=2560, depth=64), params=2_702_599_680, **_PUBLISHED
    ),
    "mamba2attn_2.7b": Variant(
        fields=dict(
            embed_dim=2560, depth=64, attention_layers=(9, 18, 27, 36, 45, 56), attention_heads=30,
            attention_head_dim=128, attention_conv=4, attention_rotary=64,
        ),
        **_PUBLISHED,
    ),
    "mamba2_codestral_7b": Variant(
        fields=dict(
            vocab_size=32768, embed_dim=4096, depth=64, groups=8, tie_embeddings=False,
        ),
        params=7_285_403_648, **_COMMON | dict(
            paper="Codestral Mamba, Mistral AI 2024", code="github.com/mistralai/mistral-inference",
            files=(File("consolidated.safetensors"),),
        ),
    ),
    "mamba2_test": Variant(
        fields=dict(
            vocab_size=97, embed_dim=32, depth=2, state_size=8, head_dim=16, groups=2,
            attention_heads=4, attention_kv_heads=2,
        ),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    partition=PARTITION,
    no_decay=(r".*/A_log", r".*/D", r".*/dt_bias"),
)
