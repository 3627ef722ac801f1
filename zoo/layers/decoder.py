"""A decoder-only language model around any mixer of tokens; softmax layers with rotary positions.

    x = x + mixer(RMSNorm(x));   x = x + down(silu(gate(x')) * up(x')),  x' = RMSNorm(x)

A mixer is a module `(x, state, train) -> (y, state)`: without a state (None) it sees the whole
sequence and returns None, with one it continues where the state stands, by any number of tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.layers.dense import Dense
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block

init = nn.initializers.normal(0.02)


def multiple_of_256(channels: int, ratio: float = 4.0) -> int:
    """Width of a gated MLP that has the size of a plain one of `ratio * channels`."""
    return 256 * -(-int(channels * ratio * 2 / 3) // 256)


def rotate(
    x: Float[Array, "batch length heads head_dim"], position: Int[Array, "length"], theta: float
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary positions: channel i of the first half turns with channel i of the second half."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        dense = partial(
            Dense,
            use_bias=False,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        y = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
        y = constrain(y, "batch", *["length"] * (y.ndim - 2), "mlp")
        return dense(x.shape[-1], name="down")(y)


class ShortConv(nn.Module):
    """Causal convolution of each channel over `size` tokens, then SiLU if `activate`.

    Without `bias_init` it has no bias. Its state is the last `size - 1` inputs.
    """

    size: int = 4
    activate: bool = True
    kernel_init: Callable = init
    bias_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: Float[Array, "batch before channels"] | None = None,
    ) -> tuple[Float[Array, "batch length channels"], Array | None]:
        batch, length, channels = x.shape
        kernel = self.param("kernel", self.kernel_init, (self.size, 1, channels), self.param_dtype)
        before = jnp.zeros((batch, self.size - 1, channels), x.dtype) if state is None else state
        padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        taps = padded.astype(jnp.float32)
        y = sum(kernel[j].astype(jnp.float32) * taps[:, j : j + length] for j in range(self.size))
        if self.bias_init is not None:
            y = y + self.param("bias", self.bias_init, (channels,), self.param_dtype)
        y = (nn.silu(y) if self.activate else y).astype(self.dtype)
        return y, None if state is None else padded[:, length:]


def attention_state(
    batch: int, kept: int, heads: int, head_dim: int, dtype: jnp.dtype
) -> dict[str, Array]:
    """What causal attention knows before the first token: room for `kept` keys and values."""
    empty = jnp.zeros((batch, kept, heads, head_dim), dtype)
    return {"key": empty, "value": empty, "position": jnp.zeros((), jnp.int32)}


def continue_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    state: dict[str, Array],
    window: int | None = None,
) -> tuple[Float[Array, "batch length heads head_dim"], dict[str, Array]]:
    """Attend to what the state keeps and to the new tokens; the oldest fall out of the state."""
    kept, length = state["key"].shape[1], key.shape[1]
    key = jnp.concatenate([state["key"].astype(key.dtype), key], axis=1)
    value = jnp.concatenate([state["value"].astype(value.dtype), value], axis=1)
    at = state["position"] + jnp.arange(length)
    key_at = at[0] - kept + jnp.arange(kept + length)
    visible = (key_at >= 0) & (key_at <= at[:, None])
    if window is not None:
        visible &= key_at > at[:, None] - window
    y = kernels_pallas.attention(query, key, value, bias=visible[None, None])
    return y, {"key": key[:, length:], "value": value[:, length:], "position": at[-1] + 1}


def check_tokens(model: nn.Module, tokens: Array) -> None:
    """Refuse what are no sequences of token numbers.

    Raises:
      ValueError: naming type and shape.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{type(model).__name__} takes tokens as integers of shape (batch, length), not "
            f"{tokens.dtype} of shape {tokens.shape}; a tokenizer makes them from text."
        )


def run_blocks(
    blocks: Sequence[Callable[..., nn.Module]],
    x: Float[Array, "batch length channels"],
    state: tuple | None,
    train: bool,
    *,
    scan: int = 0,
) -> tuple[list[Float[Array, "batch length channels"]], tuple | None]:
    """What each block `(x, state, train) -> (x, state)` of a stack gives, and the states.

    Called in the compact method of a model, which gets `layers_0 ...`, or `layers` from a scan.

    Args:
      blocks: make the blocks when given a name; one, if `scan`.
      x: what goes into the first.
      state: one for each block, or None.
      train: whether to drop out.
      scan: how many equal blocks to scan over, without states; 0: a loop over `blocks`.
    """
    if not scan:
        every, after = [], []
        for i, block in enumerate(blocks):
            x, now = block(name=f"layers_{i}")(x, None if state is None else state[i], train)
            every.append(x)
            after.append(now)
        return every, None if state is None else tuple(after)

    def body(layer, x):
        x, _ = layer(x, None, train)
        return x, x

    stack = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=scan,
    )
    last, stacked = stack(blocks[0](name="layers"), x)
    return [*list(stacked)[:-1], last], None  # training reads, and so keeps, the last alone


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary positions, grouped keys and an optional window.

    Attributes:
      num_heads: query heads; must divide the channels.
      num_kv_heads: key and value heads; None: as many as query heads.
      window: tokens that a query sees, itself included; None: all.
      theta: base of the rotary frequencies.
    """

    num_heads: int
    num_kv_heads: int | None = None
    window: int | None = None
    theta: float = 10000.0
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def init_state(self, batch: int, channels: int, length: int) -> dict[str, Array]:
        """Room for the keys and values of `length` tokens, or of the window if that is less."""
        kept = length if self.window is None else min(length, self.window - 1)
        kv_heads = self.num_kv_heads or self.num_heads
        return attention_state(batch, kept, kv_heads, channels // self.num_heads, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        state: dict | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length channels"], dict | None]:
        batch, length, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide {channels} channels.")
        head_dim = channels // self.num_heads
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)

        def project(name, heads):
            y = dense(heads * head_dim, use_bias=self.qkv_bias, name=name)(x)
            y = y.reshape(batch, length, heads, head_dim)
            return constrain(y, "batch", "length", "heads", "head_dim")

        kv_heads = self.num_kv_heads or self.num_heads
        query, key = project("query", self.num_heads), project("key", kv_heads)
        value = project("value", kv_heads)
        start = 0 if state is None else state["position"]
        at = start + jnp.arange(length)
        query, key = rotate(query, at, self.theta), rotate(key, at, self.theta)
        if state is None:
            mask = kernels_pallas.Causal()
            if self.window is not None:
                mask = kernels_pallas.SlidingWindow(left=self.window - 1, right=0)
            y = kernels_pallas.attention(query, key, value, mask=mask)
        else:
            y, state = continue_attention(query, key, value, state, self.window)
        y = y.reshape(batch, length, -1)
        return dense(channels, use_bias=False, name="out")(y), state


class DecoderBlock(nn.Module):
    """A mixer and a gated MLP, each behind an RMSNorm and a residual connection."""

    mixer: nn.Module  # a template: its copy is the parameter group `attention`
    mlp_dim: int
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch length channels"], Any]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.RMSNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        mixer = self.mixer.clone(name="attention", parent=self)
        y, state = mixer(norm(name="norm1")(x), state, train)
        x = x + drop(y)
        x = x + drop(GatedMlp(self.mlp_dim, name="mlp", **types)(norm(name="norm2")(x)))
        return constrain(x, "batch", "length", "channels"), state


class Decoder(nn.Module):
    """Base of language models that differ in their mixer: subclasses define `mixer()`.

    Attributes:
      vocab_size: tokens.
      embed_dim: channels.
      depth: layers.
      mlp_dim: width of the gated MLP; None: `multiple_of_256(embed_dim)`.
      tie_embeddings: read the logits off the transposed embedding.
      attention_layers: numbers of the layers that are softmax attention instead (hybrids).
      attention_heads: query heads of those.
      attention_kv_heads: their key heads; None: as many.
      window: tokens that they see, the query included; None: all.
      rope_theta: base of their rotary frequencies.
      attention_bias: whether they have biases in query, key and value.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once
        (`zoo.layers.stack` converts the parameters); for models of equal layers, without states.
      remat: recompute layers in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    vocab_size: int = 32000
    embed_dim: int = 2048
    depth: int = 24
    mlp_dim: int | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    tie_embeddings: bool = False
    attention_layers: tuple[int, ...] = ()
    attention_heads: int = 16
    attention_kv_heads: int | None = None
    window: int | None = None
    rope_theta: float = 10000.0
    attention_bias: bool = False
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def mixer(self) -> nn.Module:
        """An unbound mixer; it has `init_state(batch, channels, length)`."""
        raise NotImplementedError

    def mixers(self) -> list[nn.Module]:
        """An unbound mixer for each layer."""
        softmax = RotaryAttention(
            self.attention_heads,
            self.attention_kv_heads,
            self.window,
            self.rope_theta,
            self.attention_bias,
            self.dtype,
            self.param_dtype,
            parent=None,
        )
        own = self.mixer()
        return [softmax if i in self.attention_layers else own for i in range(self.depth)]

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        return {"tokens": jax.ShapeDtypeStruct((batch_size, length), jnp.int32)}

    def init_state(self, batch: int, length: int) -> tuple:
        """The state before the first token; `length` is the most that softmax layers will see."""
        return tuple(m.init_state(batch, self.embed_dim, length) for m in self.mixers())

    def __call__(
        self, tokens: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of the next token at each position."""
        return self.features(tokens, train)["logits"]

    def step(
        self, state: tuple, tokens: Int[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length vocab_size"], tuple]:
        """Continue by one or more tokens: their logits, and the state after them."""
        out, state = self._run(tokens, state, False)
        return out["logits"], state

    def features(self, tokens: Int[Array, "batch length"], train: bool = False) -> dict[str, Array]:
        """Every named intermediate."""
        return self._run(tokens, None, train)[0]

    @nn.compact
    def _run(self, tokens, state, train):
        self._check(tokens, state)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        x = constrain(embed(tokens), "batch", "length", "channels")
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        out = {"embed": x}
        every, state = self._layers(x, state, train)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = every[-1] if every else x
        x = nn.RMSNorm(epsilon=self.epsilon, name="norm", **types)(x)
        out["last_hidden_state"] = x
        if self.tie_embeddings:
            x = embed.attend(x)
        else:
            head = Dense(self.vocab_size, use_bias=False, kernel_init=init, name="head", **types)
            x = head(x)
        out["logits"] = constrain(x, "batch", "length", "vocab")
        return out, state

    def _layers(self, x, state, train):
        """What each layer gives, and the states."""
        block = partial(
            remat_block(DecoderBlock, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            mlp_dim=self.mlp_dim or multiple_of_256(self.embed_dim),
            epsilon=self.epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        mixers = [self.mixer()] if self.scan_layers else self.mixers()
        blocks = [partial(block, mixer) for mixer in mixers]
        return run_blocks(blocks, x, state, train, scan=self.depth if self.scan_layers else 0)

    def _check(self, tokens, state):
        check_tokens(self, tokens)
        outside = [i for i in self.attention_layers if not 0 <= i < self.depth]
        if outside:
            raise ValueError(
                f"attention_layers has {outside}, but layers are 0 to {self.depth - 1}."
            )
        if self.scan_layers and (self.attention_layers or state is not None):
            raise ValueError(
                "scan_layers=True needs equal layers and gives no states: leave out "
                "attention_layers, and step with scan_layers=False and "
                "zoo.layers.stack.unstack_layers(params)."
            )
