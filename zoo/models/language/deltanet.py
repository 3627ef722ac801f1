"""DeltaNet: linear attention that corrects what its state already says of a key.

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
NeurIPS 2024, arXiv 2406.06484; official code github.com/fla-org/flash-linear-attention (MIT), which
published the weights. For each head, with state S of shape key_dim x value_dim:

    q, k, v = silu(conv4(W x))            causal convolution of each channel over 4 tokens
    q, k = q / |q|, k / |k|               |x| = sqrt(sum x^2 + 1e-6)
    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,    beta_t = sigmoid(w x_t)
    y_t = W_o RMSNorm(S_t^T q_t / sqrt(key_dim))           one norm weight for all heads

There are no positions and no softmax. Listed layers can be softmax attention with rotary positions
instead: the paper's hybrids have a sliding window in every other layer, or global attention in the
second layer and in layer N/2 + 1.

    features            deltanet_340m
    embed               128  1024    for 128 tokens
    layer0              128  1024    up to layer23
    last_hidden_state   128  1024    behind the last RMSNorm
    logits              128  32000
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import kernels_pallas
from zoo.layers.causal import Context, init
from zoo.layers.decoder import Decoder, ShortConv
from zoo.layers.dense import Dense
from zoo.layers.partition import constrain
from zoo.models.language.gla import PROJECTIONS, fla_layouts
from zoo.system import File, System, Variant

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1.0,
    "identity": lambda x: x,
}
"""Of queries and keys."""


def unit_length(x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
    """`x / sqrt(sum x^2 + 1e-6)`, in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def unit_sum(x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
    """`x / sum x`, as the first fast weight programmers did."""
    return x / x.sum(-1, keepdims=True)


NORMS: dict[str, Callable[[Array], Array]] = {"l2": unit_length, "sum": unit_sum}


class DeltaRule(nn.Module):
    """The mixer of DeltaNet; see the module.

    Attributes:
      num_heads: heads.
      expand_key: width of all keys over that of the model.
      expand_value: width of all values over that of the model.
      activation: of queries and keys, a key of `ACTIVATIONS`.
      normalise: queries and keys: "l2" or "sum".
      conv_size: tokens of the short convolutions; 0: none.
      write_strength: whether beta is learned; otherwise it is 1.
      negative_eigenvalues: beta up to 2.
      output_gate: whether the output is gated with `silu(W x)`.
      epsilon: of the RMSNorm.
    """

    num_heads: int = 16
    expand_key: float = 1.0
    expand_value: float = 1.0
    activation: str = "silu"
    normalise: str = "l2"
    conv_size: int = 4
    write_strength: bool = True
    negative_eigenvalues: bool = False
    output_gate: bool = False
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def widths(self, channels: int) -> dict[str, int]:
        """Channels of all queries, keys and values."""
        key, value = int(channels * self.expand_key), int(channels * self.expand_value)
        if key % self.num_heads or value % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {key} channels of keys and {value} "
                "of values; choose a divisor of both."
            )
        return {"query": key, "key": key, "value": value}

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """S, and the last inputs of the convolutions; `length` does not matter."""
        widths = self.widths(channels)
        size = widths["key"] // self.num_heads, widths["value"] // self.num_heads
        state = {"memory": jnp.zeros((batch, self.num_heads, *size), jnp.float32)}
        if self.conv_size:
            for name, width in widths.items():
                state[name] = jnp.zeros((batch, self.conv_size - 1, width), self.dtype)
        return state

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        """The mixed tokens and, if there is a state, the next one; padding changes no state."""
        x = context.hide(x)
        batch, length, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=False, kernel_init=init, **types)
        widths = self.widths(channels)
        after = {}

        def project(name):
            y = dense(widths[name], name=name)(x)
            if self.conv_size:
                convolve = ShortConv(self.conv_size, False, name=f"{name}_conv", **types)
                y, after[name] = convolve(y, None if state is None else state[name], context)
            y = y.reshape(batch, length, self.num_heads, -1)
            return constrain(y, "batch", "length", "heads", "head_dim")

        activation, norm = ACTIVATIONS[self.activation], NORMS[self.normalise]
        query, key = (context.hide(norm(activation(project(name)))) for name in ("query", "key"))
        value = nn.silu(project("value"))
        beta = jnp.ones((batch, length, self.num_heads), jnp.float32)
        if self.write_strength:
            beta = nn.sigmoid(dense(self.num_heads, name="beta")(x).astype(jnp.float32))
        beta = context.hide(beta)
        out, after["memory"] = kernels_pallas.delta_rule(
            query,
            key,
            value,
            2.0 * beta if self.negative_eigenvalues else beta,
            initial_state=None if state is None else state["memory"],
        )
        out = nn.RMSNorm(epsilon=self.epsilon, name="norm", **types)(context.hide(out))
        out = out.reshape(batch, length, -1)
        if self.output_gate:
            out = out * nn.silu(dense(widths["value"], name="output_gate")(x))
        return dense(channels, name="out")(out), after if state else None


class DeltaNet(Decoder):
    """DeltaNet language model; fields of the mixer as in `DeltaRule`.

    States and steps are those of `zoo.layers.decoder.CausalLM`.
    """

    num_heads: int = 16
    expand_key: float = 1.0
    expand_value: float = 1.0
    activation: str = "silu"
    normalise: str = "l2"
    conv_size: int = 4
    write_strength: bool = True
    negative_eigenvalues: bool = False
    output_gate: bool = False

    def mixer(self) -> nn.Module:
        """The mixer of all layers but `attention_layers`."""
        return DeltaRule(
            self.num_heads,
            self.expand_key,
            self.expand_value,
            self.activation,
            self.normalise,
            self.conv_size,
            self.write_strength,
            self.negative_eigenvalues,
            self.output_gate,
            self.epsilon,
            self.dtype,
            self.param_dtype,
            parent=None,
        )


LAYOUTS = fla_layouts(PROJECTIONS | {"b_proj": "beta", "o_norm": "norm"})

PARTITION = {r".*attention/output_gate/kernel": ("channels", "heads")}

_COMMON = dict(
    module=DeltaNet,
    task="language_modelling",
    paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length, "
    "arXiv 2406.06484",
    code="github.com/fla-org/flash-linear-attention",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "deltanet_340m": Variant(
        fields=dict(embed_dim=1024, num_heads=8), params=374_362_112,
        metric="the paper's 340M class (24 layers, width 1024), embeddings untied", **_COMMON,
    ),
    "deltanet_1.3b": Variant(
        fields=dict(embed_dim=2048, num_heads=16),
        metric="fla-hub/delta_net-1.3B-100B, 100B tokens of SlimPajama",
        files=(File("model.safetensors"),), **_COMMON,
    ),
    "deltanet_test": Variant(
        fields=dict(
            vocab_size=97, embed_dim=64, depth=2, num_heads=2, mlp_dim=64,
            attention_heads=4, attention_kv_heads=2, window=5,
        ),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
