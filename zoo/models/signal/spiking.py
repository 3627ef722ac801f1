"""Two more spiking networks of LMUFormer's repository: neurons behind the maps, and attention.

Liu et al., "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units", ICLR
2024, arXiv 2402.04882. Official code: github.com/zeyuliu1037/LMUFormer (MIT), which we follow; no
weights of these two are published. Their parts are those of `zoo.models.signal.lmu`; F is BatchNorm
and then neurons:

    PostLMUFormer          `slmu_rnn_conv1d`: the spiking LMUFormer with each F behind its map
        embed              x = F(conv(x)) four times;  x + F(conv(x))
        block              x = x + F(out(memory(x)));  x = x + F(down(F(up(x))))
    SpikingTransformer     `attn_ms_conv1d`: embedding, MLP and head of the spiking LMUFormer
        block              x = x + norm(out(F'(q (k^T v) / 4)));  x = x + mlp(x)
                           q, k, v = F(W F(x)), zeros and ones; no softmax; F' without BatchNorm

The sum of spikes, and not spikes, is what goes from block to block of the first. q k^T v of the
second is the same in both orders, to the bit: its terms are whole numbers. Neurons and what feeds
them are float32 whatever `dtype` says: a rounded current fires other neurons, and these others
again. Time of the neurons is that of the series, but attention sees all of it, so that this network
cannot stream; the first could, and is here in its parallel form only. The official embedding of the
first drops its arguments and so has 128 mel bands and 256 channels whatever one asks for; ours has
what one asks. Both are a `SpikingNetwork`, the second where it has heads.

    features       attn_ms_conv1d
    embed          128  256
    block1         128  256
    prefix_logits  128  35     had the series ended here
    logits         35
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, conv, dense_rules
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, check_series, pointwise
from zoo.models.signal.lmu import (
    Embed,
    Fire,
    Mlp,
    TimeConv,
    init,
    lif,
    memory_size,
    pointwise_rules,
    read_out,
    remember,
    stored_system,
    types_of,
)
from zoo.system import System, Variant


def _fire(module: nn.Module, train: bool, name: str, x: Array) -> Array:
    """BatchNorm and neurons: the spikes."""
    return Fire(name=name, **types_of(module))(x, None, None, train)[0]


def _conv(module: nn.Module, channels: int, name: str, x: Array, use_bias: bool = True) -> Array:
    """A convolution of width 1."""
    start = {"kernel_init": torch_default_init, "bias_init": bias_init(x.shape[-1])}
    return nn.Dense(channels, use_bias=use_bias, name=name, **start, **types_of(module))(x)


# ------------------------------------------------------------------ neurons behind the maps


class PostEmbed(nn.Module):
    """Four convolutions over three frames, neurons behind each, then `x + F(conv(x))`."""

    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length variates"], train: bool
    ) -> Float[Array, "batch length channels"]:
        def layer(i: int, x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
            x = TimeConv(self.channels, name=f"conv{i}", **types_of(self))(x)
            return _fire(self, train, f"fire{i}", x)

        x = x.astype(self.dtype)
        for i in range(4):
            x = layer(i, x)
        return x + layer(4, x)


class PostMemory(nn.Module):
    """The Legendre memory of one spiking number a frame, its map, and `out`."""

    theta: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        channels, fire = x.shape[-1], partial(_fire, self, train)
        types = types_of(self)
        u = fire("fire_u", nn.Dense(1, kernel_init=init, name="write", **types)(x))[..., 0]
        memory = remember(u, memory_size(channels, True), self.theta).astype(self.dtype)
        both = jnp.concatenate([fire("fire_m", memory), x], -1)
        h = fire("fire_h", nn.Dense(channels, kernel_init=init, name="read", **types)(both))
        return fire("fire_out", _conv(self, channels, "out", h))


class PostMlp(nn.Module):
    """Two maps of each frame, neurons behind both."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        channels = x.shape[-1]
        x = _fire(self, train, "fire1", _conv(self, self.hidden, "up", x))
        x = constrain(x, "batch", "length", "mlp")
        return _fire(self, train, "fire2", _conv(self, channels, "down", x))


class PostBlock(nn.Module):
    """Memory, then MLP, each added to its input."""

    hidden: int
    theta: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        types = types_of(self)
        x = x + PostMemory(self.theta, name="memory", **types)(x, train)
        x = x + PostMlp(self.hidden, name="mlp", **types)(x, train)
        return constrain(x, "batch", "length", "channels")


# -------------------------------------------------------------------------------- attention


class SpikingAttention(nn.Module):
    """Attention of spikes, without a softmax: `q (k^T v) / 4`, whose neurons fire at 0.5."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        channels, fire = x.shape[-1], partial(_fire, self, train)
        x = fire("fire_x", x)
        query, key, value = (
            fire(f"fire_{name}", _conv(self, channels, name, x, use_bias=False))
            .astype(jnp.float32)
            .reshape(*x.shape[:2], self.num_heads, -1)
            for name in ("query", "key", "value")
        )
        together = jnp.einsum("bknd,bkne->bnde", key, value, precision="highest")
        y = jnp.einsum("bqnd,bnde->bqne", query, together, precision="highest") / 4
        y, _ = lif(y.reshape(x.shape), threshold=0.5)
        types = types_of(self)
        y = _conv(self, channels, "out", y.astype(self.dtype))
        norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name="norm", **types)
        return norm(y, use_running_average=not train)


class AttentionBlock(nn.Module):
    """Attention, then MLP, each added to its input."""

    hidden: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool
    ) -> Float[Array, "batch length channels"]:
        types = types_of(self)
        x = x + SpikingAttention(self.num_heads, name="attention", **types)(x, train)
        x = x + Mlp(self.hidden, True, name="mlp", **types)(x, None, None, train)[0]
        return constrain(x, "batch", "length", "channels")


# ----------------------------------------------------------------------------------- models


class SpikingNetwork(Model):
    """Either network.

    Attributes:
      context_length: frames of a series.
      variates: numbers of a frame (mel bands).
      num_heads: of the SpikingTransformer's attention; 0: the PostLMUFormer's memory.
      theta: frames that the memory holds.
    """

    context_length: int = 128
    variates: int = 128
    num_classes: int = 35
    embed_dim: int = 256
    depth: int = 1
    num_heads: int = 0
    mlp_ratio: float = 4.0
    theta: float = 128.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(series, train)["logits"]

    @nn.compact
    def features(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above)."""
        check_series(self, series, self.context_length, self.variates)
        types, attends = {"dtype": jnp.float32, "param_dtype": self.param_dtype}, self.num_heads > 0
        hidden = int(self.embed_dim * self.mlp_ratio)
        if attends:
            block = partial(AttentionBlock, hidden, self.num_heads, **types)
            x, _ = Embed(self.embed_dim, True, name="embed", **types)(series, None, None, train)
        else:
            block = partial(PostBlock, hidden, self.theta, **types)
            x = PostEmbed(self.embed_dim, name="embed", **types)(series, train)
        out = {"embed": x}
        for i in range(self.depth):
            x = out[f"block{i + 1}"] = block(name=f"layers_{i}")(x, train)
        x = Fire(name="fire", **types)(x, None, None, train)[0] if attends else x
        head = nn.Dense(self.num_classes, kernel_init=init, name="head", **types_of(self))
        return out | read_out(head, x)


# ---------------------------------------------------------------------------- checkpoints

_BLOCK, _LAYER = "block.{i}", "layers_{i}"
_POST_NORMS = [
    *((f"patch_embed.proj_bn{i or ''}", f"embed/fire{i}/norm") for i in range(4)),
    ("patch_embed.rpe_bn", "embed/fire4/norm"),
    *((f"{_BLOCK}.attn.lmu.bn_{x}", f"{_LAYER}/memory/fire_{x}/norm") for x in "umh"),
    (f"{_BLOCK}.attn.proj_bn", f"{_LAYER}/memory/fire_out/norm"),
    *((f"{_BLOCK}.mlp.fc{i}_bn", f"{_LAYER}/mlp/fire{i}/norm") for i in (1, 2)),
]
_QKV = (("q", "query"), ("k", "key"), ("v", "value"))
_ATTENTION_NORMS = [
    *((f"patch_embed.proj_bn{i or ''}", f"embed/fire{i}/norm") for i in range(4)),
    (f"{_BLOCK}.attn.pre_bn", f"{_LAYER}/attention/fire_x/norm"),
    *((f"{_BLOCK}.attn.{x}_bn", f"{_LAYER}/attention/fire_{name}/norm") for x, name in _QKV),
    (f"{_BLOCK}.attn.proj_bn", f"{_LAYER}/attention/norm"),
    *((f"{_BLOCK}.mlp.fc{i}_bn", f"{_LAYER}/mlp/fire{i}/norm") for i in (1, 2)),
    ("head_bn", "fire/norm"),
]
_SHARED = [
    *(
        Rule(f"patch_embed.proj_conv{i or ''}.weight", f"embed/conv{i}/kernel", conv)
        for i in range(4)
    ),
    Rule("patch_embed.rpe_conv.weight", "embed/conv4/kernel", conv),
    *pointwise_rules(f"{_BLOCK}.mlp.fc1_conv", f"{_LAYER}/mlp/up"),
    *pointwise_rules(f"{_BLOCK}.mlp.fc2_conv", f"{_LAYER}/mlp/down"),
    *dense_rules("head", "head"),
]


def _rules(rules: list[Rule], norms: list[tuple[str, str]], more: dict[str, Any]) -> Rules:
    rules = _SHARED + rules + [rule for pair in norms for rule in batch_norm_rules(*pair)]
    counter = lambda model, **_: np.zeros((), np.int64)  # noqa: E731
    derived = {f"{theirs}.num_batches_tracked": counter for theirs, _ in norms}
    return Rules(rules, derived=derived | more, fresh=("head/kernel", "head/bias"))


def _system(name: str, model: SpikingNetwork, i: int) -> np.ndarray:
    order = memory_size(model.embed_dim, True)
    return stored_system(name, order, model.theta, model.context_length)


LAYOUTS = {
    "memory": _rules(
        [
            *dense_rules(f"{_BLOCK}.attn.lmu.W_u", f"{_LAYER}/memory/write"),
            *dense_rules(f"{_BLOCK}.attn.lmu.W_h", f"{_LAYER}/memory/read"),
            *pointwise_rules(f"{_BLOCK}.attn.proj_conv", f"{_LAYER}/memory/out"),
        ],
        _POST_NORMS,
        {f"{_BLOCK}.attn.lmu.{n}": partial(_system, n) for n in ("A", "B", "H", "fft_H")},
    ),
    "attention": _rules(
        [
            *(
                Rule(f"{_BLOCK}.attn.{x}_conv.weight", f"{_LAYER}/attention/{n}/kernel", pointwise)
                for x, n in _QKV
            ),
            *pointwise_rules(f"{_BLOCK}.attn.proj_conv", f"{_LAYER}/attention/out"),
        ],
        _ATTENTION_NORMS,
        {},
    ),
}
"""`zoo.export` of the SpikingTransformer wants `layout="attention"`."""

# ------------------------------------------------------------------------------- variants

_COMMON = dict(
    module=SpikingNetwork,
    task="series_classification",
    paper="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, "
    "arXiv 2402.04882",
    code="github.com/zeyuliu1037/LMUFormer",
    licence="MIT",
)

VARIANTS = {
    "slmu_rnn_conv1d": Variant(fields={}, params=1_689_382, **_COMMON),
    "attn_ms_conv1d": Variant(fields=dict(num_heads=16), params=1_689_379, **_COMMON),
    "spiking_test": Variant(
        fields=dict(context_length=32, variates=6, num_classes=5, embed_dim=24, theta=32.0),
        **_COMMON,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
