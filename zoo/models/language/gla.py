"""GLA: a transformer whose attention is linear, with a forget gate for every key channel.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", ICML 2024,
arXiv 2312.06635; official code github.com/fla-org/flash-linear-attention (MIT), which published
the weights. For each head, with state S of shape key_dim x value_dim:

    g_t = log sigmoid(W2 (W1 x_t) + b) / 16              forget gate, in logarithms, W1 of rank 16
    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t / sqrt(key_dim)
    y_t = W_o [ RMSNorm(o_t) * silu(W_g x_t) ]           one norm weight for all heads

There are no positions and no softmax; the state is all that a step needs. Listed layers can be
softmax attention instead (hybrids). The paper writes LayerNorm and a gate with a bias; the code has
RMSNorm and none, and we follow it.

    features            gla_340m
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
from zoo.checkpoints.rules import Rule, Rules, chain, conv, linear, split, tied
from zoo.layers.causal import Context, init
from zoo.layers.decoder import Decoder, ShortConv
from zoo.layers.dense import Dense
from zoo.layers.partition import constrain
from zoo.system import File, System, Variant

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "logsigmoid": jax.nn.log_sigmoid,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""What may be applied to queries and keys."""


class GatedLinearAttention(nn.Module):
    """The mixer of GLA; see the module.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key, value and gate heads; None: as many.
      expand_key: width of all keys over that of the model.
      expand_value: width of all values over that of the model.
      feature_map: of queries and keys, a key of `FEATURE_MAPS`.
      conv_size: tokens of the short convolutions on query, key and value; 0: none.
      output_gate: whether the output is gated.
      gate_rank: width between the two matrices of the forget gate.
      gate_normalizer: temperature of the forget gate.
      lowest_gate: log gates are not below this; None: no limit.
      norm_scale: whether the RMSNorm has gains.
      epsilon: of the RMSNorm.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_key: float = 0.5
    expand_value: float = 1.0
    feature_map: str = "identity"
    conv_size: int = 0
    output_gate: bool = True
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    lowest_gate: float | None = None
    norm_scale: bool = True
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def widths(self, channels: int) -> tuple[int, int]:
        """Channels of one key and of one value."""
        widths = int(channels * self.expand_key), int(channels * self.expand_value)
        for width in widths:
            if width % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide {width} channels of keys or "
                    "values; choose a divisor."
                )
        return tuple(width // self.num_heads for width in widths)

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """S, and the last inputs of the convolutions; `length` does not matter."""
        key_dim, value_dim = self.widths(channels)
        kv_heads = self.num_kv_heads or self.num_heads
        state = {"memory": jnp.zeros((batch, self.num_heads, key_dim, value_dim), jnp.float32)}
        if self.conv_size:
            for name, width in (
                ("query", self.num_heads * key_dim),
                ("key", kv_heads * key_dim),
                ("value", kv_heads * value_dim),
            ):
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
        channels = x.shape[-1]
        key_dim, value_dim = self.widths(channels)
        kv_heads = self.num_kv_heads or self.num_heads
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        after = {}

        def heads(y, count):
            y = y.reshape(*y.shape[:2], count, -1)
            y = y if count == self.num_heads else jnp.repeat(y, self.num_heads // count, axis=2)
            return constrain(y, "batch", "length", "heads", "head_dim")

        def project(name, count, width):
            y = dense(count * width, use_bias=False, name=name)(x)
            if self.conv_size:
                convolve = ShortConv(self.conv_size, name=f"{name}_conv", **types)
                y, after[name] = convolve(y, None if state is None else state[name], context)
            return heads(y, count)

        feature_map = FEATURE_MAPS[self.feature_map]
        query = feature_map(project("query", self.num_heads, key_dim))
        key = context.hide(feature_map(project("key", kv_heads, key_dim)))
        value = project("value", kv_heads, value_dim)
        gate = dense(self.gate_rank, use_bias=False, name="decay_down")(x)
        gate = heads(dense(kv_heads * key_dim, name="decay_up")(gate), kv_heads)
        gate = nn.log_sigmoid(gate.astype(jnp.float32)) / self.gate_normalizer
        if self.lowest_gate is not None:
            gate = jnp.maximum(gate, self.lowest_gate)
        gate = context.hide(gate)
        out, after["memory"] = kernels_pallas.gated_linear_attention(
            query, key, value, gate, initial_state=None if state is None else state["memory"]
        )
        norm = {"epsilon": self.epsilon, "use_scale": self.norm_scale}
        out = nn.RMSNorm(name="norm", **norm, **types)(context.hide(out))
        out = out.reshape(*x.shape[:2], -1)
        if self.output_gate:
            width = self.num_heads * value_dim
            out = out * nn.silu(dense(width, use_bias=False, name="output_gate")(x))
        return dense(channels, use_bias=False, name="out")(out), after if state else None


class GLA(Decoder):
    """GLA language model; fields of the mixer as in `GatedLinearAttention`.

    States and steps are those of `zoo.layers.decoder.CausalLM`.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_key: float = 0.5
    expand_value: float = 1.0
    feature_map: str = "identity"
    conv_size: int = 0
    output_gate: bool = True
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    lowest_gate: float | None = None
    norm_scale: bool = True

    def mixer(self) -> nn.Module:
        """The mixer of all layers but `attention_layers`."""
        return GatedLinearAttention(
            self.num_heads,
            self.num_kv_heads,
            self.expand_key,
            self.expand_value,
            self.feature_map,
            self.conv_size,
            self.output_gate,
            self.gate_rank,
            self.gate_normalizer,
            self.lowest_gate,
            self.norm_scale,
            self.epsilon,
            self.dtype,
            self.param_dtype,
            parent=None,
        )


# ---------------------------------------------------------------------------- checkpoints


def decoder_rules(mixer: dict[str, str], *, tie: bool = False) -> Rules:
    """Rules of fla's language models.

    Args:
      mixer: names of the mixer's modules of fla -> ours.
      tie: the file repeats the embedding as `lm_head`.
    """
    theirs, ours = "model.layers.{i}", "layers_{i}"
    rules = [Rule("lm_head.weight", "head/kernel", linear)]
    if tie:
        both = ("model.embeddings.weight", "lm_head.weight")
        rules = [Rule(both, "embed/embedding", tied)]
    rules.append(Rule("model.embeddings.weight", "embed/embedding"))
    for a, b in (("attn_norm", "norm1"), ("mlp_norm", "norm2")):
        rules.append(Rule(f"{theirs}.{a}.weight", f"{ours}/{b}/scale"))
    rules.append(Rule("model.norm.weight", "norm/scale"))
    for a, b in mixer.items():
        a, b = f"{theirs}.attn.{a}", f"{ours}/attention/{b}"
        if b.endswith("norm"):
            rules.append(Rule(f"{a}.weight", f"{b}/scale"))
        else:
            rules.append(Rule(f"{a}.weight", f"{b}/kernel", conv if "conv" in b else linear))
            rules.append(Rule(f"{a}.bias", f"{b}/bias"))
    gate, up, down = (f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    two = f"{ours}/mlp/gate/kernel", f"{ours}/mlp/up/kernel"
    rules.append(Rule((gate, up), two, linear))
    rules.append(Rule(gate, two, chain(linear, split(1))))  # early files: both in one matrix
    rules.append(Rule(down, f"{ours}/mlp/down/kernel", linear))
    return Rules(rules, fresh=("head/kernel", "embed/embedding"))


def fla_layouts(mixer: dict[str, str]) -> dict[str, Rules]:
    """The layouts of one of fla's language models."""
    return {"fla": decoder_rules(mixer), "fla_tied": decoder_rules(mixer, tie=True)}


PROJECTIONS = {
    **{f"{a}_proj": b for a, b in zip("qkvo", ("query", "key", "value", "out"), strict=True)},
    **{f"{a}_conv1d": f"{b}_conv" for a, b in zip("qkv", ("query", "key", "value"), strict=True)},
    "g_proj": "output_gate",
}
"""fla's names of what its mixers share."""

_OWN = PROJECTIONS | {"gk_proj.0": "decay_down", "gk_proj.1": "decay_up"}

# The norm has another name where it is not one kernel with the gate, or there is no gate.
LAYOUTS = {
    **fla_layouts(_OWN | {"g_norm_swish_gate": "norm"}),
    **{f"{name}_unfused": r for name, r in fla_layouts(_OWN | {"g_norm": "norm"}).items()},
}

PARTITION = {r".*attention/output_gate/kernel": ("channels", "heads")}

_PAPER = "Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635"
_COMMON = dict(
    module=GLA,
    task="language_modelling",
    paper=_PAPER,
    code="github.com/fla-org/flash-linear-attention",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "gla_340m": Variant(
        fields=dict(embed_dim=1024, num_heads=4), params=374_475_776,
        metric="the paper's 340M class (24 layers, width 1024), embeddings untied", **_COMMON,
    ),
    "gla_1.3b": Variant(
        fields=dict(embed_dim=2048, num_heads=4),
        metric="fla-hub/gla-1.3B-100B, 100B tokens of SlimPajama",
        files=(File("model.safetensors"),), **_COMMON,
    ),
    "gla_test": Variant(
        fields=dict(
            vocab_size=97, embed_dim=32, depth=2, num_heads=2, mlp_dim=64, conv_size=4,
            attention_heads=4, attention_kv_heads=2, window=5,
        ),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
