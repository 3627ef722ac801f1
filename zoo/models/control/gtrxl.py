"""GTrXL: a Transformer-XL with gates in place of residual sums, the memory of an agent.

Parisotto et al., "Stabilizing Transformers for Reinforcement Learning", ICML 2020, arXiv
1910.06764. The authors published no code; checkpoints and arithmetic are those of DI-engine
(github.com/opendilab/DI-engine, Apache-2.0), ding/torch_utils/network/gtrxl.py.

    x = relu(W observation)
    X = (memory of this layer, x)                          what it was given in the segments before
    a = relu(W_o attention(W_q x, LN(X)));  o = gate(x, a);  y = gate(o, mlp(LN(o)))
    score(i, j) = ((q_i + u) . k_j + (q_i + v) . W_r P(distance)) / sqrt(d)     j not after i
    gate(x, y) = (1 - z) x + z tanh(W_g y + U_g (r x))
    r = sigmoid(W_r y + U_r x);  z = sigmoid(W_z y + U_z x - b)

With b = 2 at first a layer begins near the identity: the agent is Markovian until it learns to
remember. The perceptron is as wide as the channels, with ReLU behind every map, the last one too.
The paper makes queries of LN(x), too (`norm_query`); the code makes them of x. A memory of zeros is
attended to like any other. No gradient goes into the memory. What the paper compares with is here,
too: sums in place of gates (`gated`, TrXL-I), and with each LayerNorm behind its sum, and no ReLU
before it, the Transformer-XL that it began with (`reordered`).

    features            gtrxl_di_engine
    embed               16 256              for 16 observations
    layer0              16 256              up to layer2
    memory              4 64 256            what the next segment is given
    logits              16 256
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, chain, dense_rules, linear, norm_rules, split
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import torch_linear
from zoo.system import System, Variant

MASKED = -1e30


def inverse_frequencies(channels: int) -> Float[np.ndarray, "half"]:
    """`10000^(-2i / channels)`."""
    return (10000.0 ** (-np.arange(0, channels, 2) / channels)).astype(np.float32)


def distances(length: int, channels: int) -> Float[Array, "length channels"]:
    """Sinusoids of the distances `length - 1` down to 0: all sines, then all cosines."""
    angle = jnp.arange(length - 1, -1, -1, dtype=jnp.float32)[:, None]
    angle = angle * inverse_frequencies(channels)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Gate(nn.Module):
    """How a branch y is joined to x: by a gated recurrent unit."""

    bias: float = 2.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"], y: Float[Array, "*batch channels"]
    ) -> Float[Array, "*batch channels"]:
        channels = x.shape[-1]
        dense = partial(
            Dense,
            channels,
            use_bias=False,
            kernel_init=torch_default_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        start = nn.initializers.constant(self.bias)
        bias = self.param("bias", start, (channels,), self.param_dtype).astype(self.dtype)
        r = nn.sigmoid(dense(name="reset_y")(y) + dense(name="reset_x")(x))
        z = nn.sigmoid(dense(name="update_y")(y) + dense(name="update_x")(x) - bias)
        h = jnp.tanh(dense(name="new_y")(y) + dense(name="new_x")(r * x))
        return (1 - z) * x + z * h


class RelativeAttention(nn.Module):
    """Attention to memory and segment, with distances and two biases that all layers share."""

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        full: Float[Array, "batch full channels"],
        table: Float[Array, "full channels"],
        biases: tuple[Float[Array, "heads head_dim"], Float[Array, "heads head_dim"]],
        train: bool = False,
        same: Bool[Array, "batch length full"] | None = None,
    ) -> Float[Array, "batch length channels"]:
        """The last `length` of `full` are queries, made of `x`; they see what is not after them.

        Of that they see, where `same` is given, what is of their own episode.
        """
        heads, channels, (length, size) = self.num_heads, x.shape[-1], (x.shape[1], full.shape[1])

        def project(name: str, t: Array) -> Array:
            y = torch_linear(self, heads * self.head_dim, channels, name)(t)
            return y.reshape(*t.shape[:-1], heads, self.head_dim)

        names = ("batch", "length", "heads", "head_dim")
        query, key, value = (
            constrain(project(name, t), *names)
            for name, t in (("query", x), ("key", full), ("value", full))
        )
        relative = project("relative", table.astype(self.dtype))
        content, position = (b.astype(self.dtype) for b in biases)
        scale = self.head_dim**-0.5
        by_row = jnp.einsum("bind,rnd->bnir", query + position, relative)
        # the row of the table for the distance of j from i: distances end at 0
        rows = jnp.arange(size) + length - 1 - jnp.arange(length)[:, None]
        visible = rows < size
        if same is not None:
            visible = visible & same[:, None]
        rows = jnp.broadcast_to(jnp.minimum(rows, size - 1), (*by_row.shape[:2], length, size))
        bias = jnp.take_along_axis(by_row, rows, axis=-1).astype(jnp.float32) * scale
        dropping = train and self.dropout > 0
        y = kernels_pallas.attention(
            query + content,
            key,
            value,
            bias=jnp.where(visible, bias, MASKED),
            scale=scale,
            dropout=self.dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        return torch_linear(self, channels, heads * self.head_dim, "out")(
            y.reshape(*x.shape[:2], -1)
        )


class GTrXLBlock(nn.Module):
    """Relative attention and a perceptron, each behind a LayerNorm and joined by a gate."""

    num_heads: int
    head_dim: int
    mlp_depth: int = 2
    activation: Callable[[Array], Array] = nn.relu
    gated: bool = True
    gate_bias: float = 2.0
    norm_query: bool = False
    reordered: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        memory: Float[Array, "batch kept channels"],
        table: Float[Array, "full channels"],
        biases: tuple[Array, Array],
        train: bool = False,
        same: Bool[Array, "batch length full"] | None = None,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        gate = partial(Gate, self.gate_bias, **types)

        def join(name: str, x: Array, y: Array) -> Array:
            return gate(name=name)(x, y) if self.gated else x + y

        norms = norm(name="norm1"), norm(name="norm2")
        before, behind = (norms, (_same, _same)) if self.reordered else ((_same, _same), norms)
        last = self.activation if self.reordered else _same
        full = before[0](jnp.concatenate([memory.astype(x.dtype), x], axis=1))
        attention = RelativeAttention(
            self.num_heads, self.head_dim, self.dropout, name="attention", **types
        )
        queries = full[:, memory.shape[1] :] if self.norm_query else x
        a = drop(attention(queries, full, table, biases, train, same))
        x = behind[0](join("gate1", x, last(a)))
        y = before[1](x)
        for i in range(self.mlp_depth):
            y = torch_linear(self, x.shape[-1], x.shape[-1], f"mlp_{i}")(y)
            y = drop((self.activation if i + 1 < self.mlp_depth else last)(y))
        y = behind[1](join("gate2", x, y))
        return constrain(y, "batch", "length", "channels")


def _same(x: Array) -> Array:
    return x


class GTrXL(Model):
    """Observations of an agent to what it knows at each of them.

    `init_state(batch, length)` is an empty memory; `step(state, observations, reset)` (through
    `apply(..., method="step")`) goes on with a segment of any length, and a row whose `reset` is
    True begins with an empty memory: a new episode.

    Attributes:
      observation_dim: size of an observation; of the channels, without `embedded`.
      embed_dim: channels; even.
      depth: layers.
      num_heads: of attention.
      head_dim: channels of each; any number.
      memory_length: tokens that each layer remembers.
      mlp_depth: maps of the perceptron.
      activation: a key of `zoo.layers.mlp.ACTIVATIONS`.
      gated: gates, or plain residual sums.
      gate_bias: where the gates' bias starts.
      norm_query: make queries of normalised tokens, as the paper does.
      reordered: a LayerNorm before each branch and an activation behind it; else a LayerNorm behind
        each sum.
      embedded: whether there is a map of the observations.
      outputs: width of a head; None: the channels are the output.
      dropout: rate on the embedding, distances, attention weights and all branches.
    """

    observation_dim: int = 20
    embed_dim: int = 256
    depth: int = 3
    num_heads: int = 2
    head_dim: int = 128
    memory_length: int = 64
    mlp_depth: int = 2
    activation: str = "relu"
    gated: bool = True
    gate_bias: float = 2.0
    norm_query: bool = False
    reordered: bool = True
    embedded: bool = True
    outputs: int | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, length: int = 16
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for segments of `length` observations."""
        shape = (batch_size, length, self.observation_dim)
        return {"observations": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def init_state(self, batch: int, length: int = 0) -> Float[Array, "batch levels kept channels"]:
        """An empty memory; it is of one size, whatever `length` is."""
        return jnp.zeros((batch, self.depth + 1, self.memory_length, self.embed_dim))

    def __call__(
        self, observations: Float[Array, "batch length dims"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        """The output at each observation of a first segment."""
        return self.features(observations, train)["logits"]

    def features(
        self, observations: Float[Array, "batch length dims"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        return self._run(self.init_state(observations.shape[0]), observations, train)

    def step(
        self,
        state: Float[Array, "batch levels kept channels"],
        observations: Float[Array, "batch length dims"],
        reset: Bool[Array, "batch"] | Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> tuple[Array, Float[Array, "batch length channels"]]:
        """Go on with a segment: the next memory, and the output at each observation.

        Args:
          state: the memory.
          observations: of the segment.
          reset: whether a row begins with an empty memory; or, of each observation, whether an
            episode begins there. Then nothing of other episodes is seen, and no empty slot, so that
            a segment gives what its observations give one by one, if the memory holds an episode.
          train: whether to drop out.
        """
        episode = None
        if reset is not None and reset.ndim == 2:
            episode = jnp.cumsum(reset, axis=1)
        elif reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        out = self._run(state, observations, train, episode)
        return out["memory"], out["logits"]

    @nn.compact
    def _run(
        self, memory: Array, observations: Array, train: bool, episode: Array | None = None
    ) -> dict[str, Array]:
        self._check(memory, observations)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        activation = ACTIVATIONS[self.activation]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        memory = jax.lax.stop_gradient(memory)
        x = observations.astype(self.dtype)
        if self.embedded:
            embed = torch_linear(self, self.embed_dim, self.observation_dim, "embed")
            x = drop(activation(embed(x)))
        x = constrain(x, "batch", "length", "channels")
        shape = (self.num_heads, self.head_dim)
        zeros = nn.initializers.zeros
        biases = tuple(
            self.param(name, zeros, shape, self.param_dtype)
            for name in ("content_bias", "position_bias")
        )
        table = drop(distances(self.memory_length + x.shape[1], self.embed_dim))
        every, same = [x], None
        if episode is not None:
            filled = (memory[:, 0] != 0).any(-1)
            of_keys = jnp.concatenate([jnp.where(filled, 0, -1), episode], axis=1)
            same = of_keys[:, None] == episode[:, :, None]
        for i in range(self.depth):
            block = GTrXLBlock(
                self.num_heads,
                self.head_dim,
                self.mlp_depth,
                activation,
                self.gated,
                self.gate_bias,
                self.norm_query,
                self.reordered,
                self.dropout,
                name=f"layers_{i}",
                **types,
            )
            x = block(x, memory[:, i], table, biases, train, same)
            every.append(x)
        seen = jnp.concatenate([memory, jnp.stack(every, 1).astype(memory.dtype)], axis=2)
        if same is not None:
            seen = jnp.where(same[:, -1][:, None, :, None], seen, 0)
        y = drop(x)
        if self.outputs is not None:
            y = torch_linear(self, self.outputs, self.embed_dim, "head")(y)
        return {
            "embed": every[0],
            **{f"layer{i}": x for i, x in enumerate(every[1:])},
            "memory": jax.lax.stop_gradient(seen[:, :, x.shape[1] :]),
            "logits": y,
        }

    def _check(self, memory: Array, observations: Array) -> None:
        if observations.ndim != 3 or observations.shape[2] != self.observation_dim:
            raise ValueError(
                f"This GTrXL takes observations of shape (batch, length, {self.observation_dim}), "
                f"not {observations.shape}; create it with another observation_dim."
            )
        if self.embed_dim % 2 or not (self.embedded or self.observation_dim == self.embed_dim):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be even and, with embedded=False, equal to "
                f"observation_dim={self.observation_dim}."
            )
        wanted = (observations.shape[0], self.depth + 1, self.memory_length, self.embed_dim)
        if memory.shape != wanted:
            raise ValueError(
                f"The memory has shape {memory.shape}, not {wanted}: batch, levels, tokens, "
                "channels. Begin with init_state(batch, length)."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}.")


# ---------------------------------------------------------------------------- checkpoints


def _rules() -> Rules:
    theirs, ours = "layers.{i}", "layers_{i}"
    attention = f"{ours}/attention"
    gates = (("Wr", "reset_y"), ("Ur", "reset_x"), ("Wz", "update_y"), ("Uz", "update_x"),
             ("Wg", "new_y"), ("Ug", "new_x"))  # fmt: skip
    rules = [
        Rule("u", "content_bias"),
        Rule("v", "position_bias"),
        *dense_rules("embedding.0", "embed"),
        *dense_rules("head", "head"),
        *norm_rules(f"{theirs}.layernorm1", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.layernorm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.attention.attention_q.0", f"{attention}/query"),
        *dense_rules(f"{theirs}.attention.project.0", f"{attention}/out"),
        *dense_rules(f"{theirs}.attention.project_pos.0", f"{attention}/relative"),
        Rule(
            f"{theirs}.attention.attention_kv.0.weight",
            (f"{attention}/key/kernel", f"{attention}/value/kernel"),
            chain(linear, split(-1)),
        ),
        Rule(
            f"{theirs}.attention.attention_kv.0.bias",
            (f"{attention}/key/bias", f"{attention}/value/bias"),
            split(-1),
        ),
        *dense_rules(f"{theirs}.mlp.{{2*j}}.0", f"{ours}/mlp_{{j}}"),
    ]
    for gate in ("gate1", "gate2"):
        rules += [
            Rule(f"{theirs}.{gate}.{a}.weight", f"{ours}/{gate}/{b}/kernel", linear)
            for a, b in gates
        ]
        rules.append(Rule(f"{theirs}.{gate}.bg", f"{ours}/{gate}/bias"))
    frequencies = lambda model: inverse_frequencies(model.embed_dim)  # noqa: E731
    return Rules(rules, derived={"pos_embedding.inv_freq": frequencies})


LAYOUTS = {"di_engine": _rules()}

_COMMON = dict(
    module=GTrXL,
    task="control",
    paper="Stabilizing Transformers for Reinforcement Learning, arXiv 1910.06764",
    code="github.com/opendilab/DI-engine",
    licence="Apache-2.0",
)

VARIANTS: dict[str, Variant] = {
    "gtrxl_di_engine": Variant(fields={}, params=3_751_424, **_COMMON),
    "gtrxl_dmlab30": Variant(
        fields=dict(depth=12, num_heads=8, head_dim=64, memory_length=512, norm_query=True),
        metric="DMLab-30, human-normalised: 117 (LSTM 100)", **_COMMON,
    ),
    "gtrxl_test": Variant(
        fields=dict(observation_dim=5, embed_dim=32, depth=2, num_heads=2, head_dim=16,
                    memory_length=6),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    partition={
        r".*attention/relative/kernel": ("channels", "heads"),
        r".*attention/relative/bias": ("heads",),
        r"(content|position)_bias": ("heads", "head_dim"),
    },
    no_decay=(r"(content|position)_bias",),
)
