"""Decoder-only language models: the stack that they share, and what its layers are made of.

    x = x + mixer(RMSNorm(x));   x = x + down(silu(gate(x')) * up(x')),  x' = RMSNorm(x)

What a mixer is, and how it is told of padding and states, is in `zoo.layers.causal`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.layers import causal
from zoo.layers.causal import (
    Context,
    RotaryAttention,
    check_tokens,
    depths,
    init,
    last,
    positions_of,
)
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block


def multiple_of_256(channels: int, ratio: float = 4.0) -> int:
    """Width of a gated MLP that has the size of a plain one of `ratio * channels`."""
    return 256 * -(-int(channels * ratio * 2 / 3) // 256)


# ---------------------------------------------------------------------------- other layers


class GatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))`, with dropout after the product and at the end."""

    hidden: int
    activation: Callable[[Array], Array] = nn.silu
    use_bias: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"], train: bool = False
    ) -> Float[Array, "*batch channels"]:
        dense = partial(
            Dense,
            use_bias=self.use_bias,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        y = self.activation(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
        y = constrain(y, "batch", *["length"] * (y.ndim - 2), "mlp")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = dense(x.shape[-1], name="down")(y)
        return nn.Dropout(self.dropout)(y, deterministic=not train)


class ShortConv(nn.Module):
    """Causal convolution of each channel over `size` tokens, then SiLU if `activate`.

    Without `bias_init` it has no bias. Its state is the last `size - 1` inputs. Padding at the
    right of a text leaves the state alone, padding at its left counts as zeros, as if it were not
    there.
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
        context: Context = Context(),  # noqa: B008 (immutable)
    ) -> tuple[Float[Array, "batch length channels"], Array | None]:
        batch, length, channels = x.shape
        x = context.hide(x)
        kernel = self.param("kernel", self.kernel_init, (self.size, 1, channels), self.param_dtype)
        before = jnp.zeros((batch, self.size - 1, channels), x.dtype) if state is None else state
        padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        wide = padded.astype(jnp.float32)
        if context.parents is None:
            taps = [wide[:, j : j + length] for j in range(self.size)]
        else:
            rows = conv_rows(context.parents, self.size)
            taps = [wide[:, rows[:, j]] for j in range(self.size)]
        y = sum(kernel[j].astype(jnp.float32) * taps[j] for j in range(self.size))
        if self.bias_init is not None:
            y = y + self.param("bias", self.bias_init, (channels,), self.param_dtype)
        y = (nn.silu(y) if self.activate else y).astype(self.dtype)
        if state is None or context.parents is not None:
            return y, None if state is None else x
        return y, last(padded, context.mask, self.size - 1)


def keep_inputs(
    state: Float[Array, "batch size channels"],
    nodes: Float[Array, "batch nodes channels"],
    path: Int[Array, "batch depth"],
    accepted: Bool[Array, "batch depth"],
) -> Float[Array, "batch size channels"]:
    """The state of a `ShortConv` after those nodes of a tree that lie on a path."""
    taken = jnp.take_along_axis(nodes, path[..., None], axis=1)
    both = jnp.concatenate([state.astype(taken.dtype), taken], axis=1)
    return last(both, accepted, state.shape[1])


def conv_rows(parents: Int[Array, "nodes"], size: int) -> Int[Array, "nodes size"]:
    """Which inputs each node of a tree convolves, oldest first.

    Inputs are counted with the `size - 1` of the state in front: node i is `size - 1 + i`.
    """
    columns = [jnp.arange(len(parents))]
    for _ in range(size - 1):
        last = columns[-1]
        columns.append(jnp.where(last >= 0, parents[jnp.maximum(last, 0)], last - 1))
    return size - 1 + jnp.stack(columns[::-1], axis=1)


# ------------------------------------------------------------------------------- the stack


def run_blocks(
    blocks: Sequence[Callable[..., nn.Module]],
    x: Float[Array, "batch length channels"],
    state: tuple | None,
    train: bool,
    context: Context = Context(),  # noqa: B008 (immutable)
    *,
    scan: int = 0,
) -> tuple[list[Float[Array, "batch length channels"]], tuple | None]:
    """What each block `(x, state, train, context) -> (x, state)` gives, and the states.

    Called in the compact method of a model, which gets `layers_0 ...`, or `layers` from a scan.

    Args:
      blocks: make the blocks when given a name; one, if `scan`.
      x: what goes into the first.
      state: one for each block, or None.
      train: whether to drop out.
      context: of the tokens.
      scan: how many equal blocks to scan over, without states; 0: a loop over `blocks`.
    """
    if not scan:
        every, after = [], []
        for i, block in enumerate(blocks):
            before = None if state is None else state[i]
            x, now = block(name=f"layers_{i}")(x, before, train, context)
            every.append(x)
            after.append(now)
        return every, None if state is None else tuple(after)

    def body(layer, x, context):
        x, _ = layer(x, None, train, context)
        return x, x

    stack = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=scan,
    )
    last, stacked = stack(blocks[0](name="layers"), x, context)
    return [*list(stacked)[:-1], last], None  # training reads, and so keeps, the last alone


def read_out(
    model: nn.Module,
    embed: nn.Embed,
    x: Float[Array, "batch length channels"],
    context: Context,
) -> Float[Array, "batch length vocab_size"] | Float[Array, "batch classes"]:
    """Logits of the next token at each position, or of classes at the last token of each text.

    Called in the compact method of `model`, which gets `head` or `class_head` where it needs one.

    Raises:
      ValueError: for classes of packed texts.
    """
    dense = partial(
        Dense, use_bias=False, kernel_init=init, dtype=model.dtype, param_dtype=model.param_dtype
    )
    if model.num_classes:
        if context.segments is not None:
            raise ValueError("Packed texts have no class of their own; give one text a row.")
        if context.mask is None:
            x = x[:, -1]
        else:
            at = jnp.where(context.mask, jnp.arange(x.shape[1]), 0).max(1)
            x = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        return dense(model.num_classes, name="class_head")(x)
    x = embed.attend(x) if model.tie_embeddings else dense(model.vocab_size, name="head")(x)
    return constrain(x, "batch", "length", "vocab")


def check_speaks(model: nn.Module) -> None:
    """Raise ValueError for a model that tells classes of whole texts and says no tokens."""
    if getattr(model, "num_classes", 0):
        raise ValueError(
            f"This {type(model).__name__} has num_classes={model.num_classes} and says no tokens; "
            "create it with num_classes=0 to continue texts."
        )


class DecoderBlock(nn.Module):
    """A mixer and a gated MLP, each behind an RMSNorm and a residual connection.

    Attributes:
      mixer: a template; its copy is the parameter group `attention`.
      mlp_dim: width of the MLP; 0: no MLP and no second norm.
      activation: of the MLP.
      mlp_bias: whether the MLP has biases.
    """

    mixer: nn.Module
    mlp_dim: int
    epsilon: float = 1e-6
    dropout: float = 0.0
    activation: Callable[[Array], Array] = nn.silu
    mlp_bias: bool = False
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
        """The tokens after the block and, if there is a state, the next one."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.RMSNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        mixer = self.mixer.clone(name="attention", parent=self)
        y, state = mixer(norm(name="norm1")(x), state, train, context)
        x = constrain(x + drop(y), "batch", "length", "channels")
        if self.mlp_dim:
            mlp = GatedMlp(self.mlp_dim, self.activation, self.mlp_bias, name="mlp", **types)
            x = x + drop(mlp(norm(name="norm2")(x)))
        return constrain(x, "batch", "length", "channels"), state


class PositionDecoder(Model):
    """Base of decoders with softmax attention in every layer and a table of positions.

    Subclasses have the fields `depth`, `embed_dim`, `num_heads`, `max_positions`, `activation`,
    `scan_layers` and `dtype`, and define `features` and `_run`.

    Attributes:
      packed: whether tasks give `segments` beside the tokens (`zoo.data.packing`).
      num_classes: logits of so many classes of a text, read off its last token, in place of those
        of the next token; 0: a language model.
    """

    packed: bool = False
    num_classes: int = 0

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        shape = (batch_size, min(length, self.max_positions))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        inputs = {"tokens": tokens} | ({"segments": tokens} if self.packed else {})
        return inputs | ({"mask": tokens} if self.num_classes else {})

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token; `length` is the most that attention will see.

        Raises:
          ValueError: if that is more than there are positions.
        """
        self.check_length(length)
        shape = (batch, length, self.num_heads, self.embed_dim // self.num_heads)
        layers = tuple(causal.attention_state(*shape, self.dtype) for _ in range(self.depth))
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab_size"] | Float[Array, "batch classes"]:
        """Logits of the next token at each position, or of classes with `num_classes`.

        Args:
          tokens: token numbers.
          mask: 1 or True for text, 0 for padding at either side; None: all is text.
          positions: of the tokens in their texts; None: as the model's docstring says.
          train: whether to drop out.
          segments: of packed sequences: numbers of documents, which do not see each other, and
            whose positions begin anew; padding is a document, too. In place of a mask.
        """
        return self.features(tokens, mask, positions, train, segments)["logits"]

    def step(
        self, state: dict[str, Any], tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict[str, Any], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state, and their logits (NaN past the last position).

        Raises:
          ValueError: with `scan_layers`.
        """
        return step(self, state, tokens, mask)

    def branch(
        self, state: dict[str, Any], tokens: Int[Array, "batch nodes"], parents: Int[Array, "nodes"]
    ) -> tuple[tuple, Float[Array, "batch nodes vocab_size"]]:
        """Continue by a tree of tokens, as `CausalLM.branch`."""
        return branch(self, state, tokens, parents)

    def keep(self, state: dict, nodes: tuple, path: Array, accepted: Array) -> dict[str, Any]:
        """The state after some nodes of a tree, as `CausalLM.keep`."""
        layers = tuple(
            causal.keep_attention(before, node, path, accepted)
            for before, node in zip(state["layers"], nodes, strict=True)
        )
        return keep(state, layers, accepted)

    def check(self, state: tuple | None) -> None:
        """Raise ValueError for an unknown activation, or states of layers that are scanned."""
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={self.activation!r} is none of {known}.")
        if self.scan_layers and state is not None:
            raise ValueError(
                "scan_layers=True gives no states: step with scan_layers=False and "
                "zoo.layers.stack.unstack_layers(params)."
            )

    def check_length(self, length: int) -> None:
        """Raise ValueError if there are too few positions for so many tokens."""
        if length > self.max_positions:
            raise ValueError(
                f"This {type(self).__name__} has {self.max_positions} positions, too few for "
                f"{length} tokens; cut the text, or create the model with more max_positions."
            )


class WholeTexts(Model):
    """Base of causal models whose layers look at whole texts: a step runs the text once more.

    What is kept of a text is its tokens, as hashes, clusters or spans depend on all of them. Texts
    stand at the left of a room of `length` tokens, and what comes behind them is masked: logits are
    those of a call on the whole room. Subclasses have the fields `causal` and `vocab_size`, and
    define `features`.
    """

    def init_state(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token, with room for `length` tokens.

        Raises:
          ValueError: if the model is not causal.
        """
        check_causal(self)
        tokens = jnp.zeros((batch, length), jnp.int32)
        return {"position": jnp.zeros(batch, jnp.int32), "tokens": tokens}

    def step(
        self, state: dict[str, Array], tokens: Int[Array, "batch length"], mask: Array | None = None
    ) -> tuple[dict[str, Array], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state, and their logits (NaN beyond the room)."""
        tokens, mask = check_tokens(self, tokens, mask)
        text = jnp.ones(tokens.shape, bool) if mask is None else mask
        kept, room = state["tokens"], state["tokens"].shape[1]
        at = state["position"][:, None] + jnp.cumsum(text, axis=1, dtype=jnp.int32) - 1
        rows = jnp.arange(len(tokens))[:, None]
        kept = kept.at[rows, jnp.where(text, at, room)].set(tokens.astype(kept.dtype), mode="drop")
        position = state["position"] + text.sum(1, dtype=jnp.int32)
        logits = self.whole(kept, jnp.arange(room) < position[:, None])
        logits = jnp.take_along_axis(logits, jnp.clip(at, 0, room - 1)[..., None], axis=1)
        logits = jnp.where((at < room)[..., None], logits, jnp.nan)
        return {"position": position, "tokens": kept}, logits

    def whole(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length vocab_size"]:
        """Logits of whole texts with padding at the right."""
        return self.features(tokens, mask)["logits"]


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model that sees what comes behind a token."""
    if not model.causal:
        raise ValueError(
            f"This {type(model).__name__} has causal=False and cannot continue a text; create it "
            "with causal=True."
        )


class CausalLM(Model):
    """Base of language models out of `DecoderBlock`: subclasses define `mixers()`.

    `init_state(batch, length)` and `step(state, tokens)` (through `apply(..., method="step")`) give
    the same logits token by token, or piece by piece, as a call on the whole sequence. A mask of
    padding goes with each call; steps count positions without it.

    Attributes:
      vocab_size: tokens.
      embed_dim: channels.
      depth: layers.
      mlp_dim: width of the gated MLP; None: `multiple_of_256(embed_dim)`.
      tie_embeddings: read the logits off the transposed embedding.
      num_classes: logits of so many classes of a text, read off its last token, in place of those
        of the next token; 0: a language model.
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
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    num_classes: int = 0

    def mixers(self) -> list[nn.Module]:
        """An unbound mixer for each layer; it has `init_state(batch, channels, length)`."""
        raise NotImplementedError

    def residual_dtype(self) -> jnp.dtype:
        """The type of the residual stream."""
        return self.dtype

    def block(self, **options: Any) -> Callable[..., nn.Module]:
        """Makes a block of a mixer and a name; `options` are fields of `DecoderBlock`."""
        return partial(
            remat_block(DecoderBlock, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            mlp_dim=multiple_of_256(self.embed_dim) if self.mlp_dim is None else self.mlp_dim,
            epsilon=self.epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **options,
        )

    def example_inputs(
        self, batch_size: int = 1, length: int = 128
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for sequences of `length` tokens."""
        tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        return {"tokens": tokens} | ({"mask": tokens} if self.num_classes else {})

    def init_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state before the first token; `length` is the most that softmax layers will see."""
        layers = tuple(m.init_state(batch, self.embed_dim, length) for m in self.mixers())
        return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length vocab_size"] | Float[Array, "batch classes"]:
        """Logits of the next token at each position, or of classes with `num_classes`.

        Args:
          tokens: token numbers.
          mask: 1 or True for text, 0 for padding at either side; None: all is text.
          positions: of the tokens in their texts, for rotary positions; None: 0, 1, ... whether
            there is padding or not (`positions_of(mask)` leaves it out).
          train: whether to drop out.
        """
        return self.features(tokens, mask, positions, train)["logits"]

    def features(
        self,
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
        positions: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate; arguments as those of `__call__`."""
        tokens, mask = check_tokens(self, tokens, mask, positions)
        return self._run(tokens, None, train, Context(mask, positions))[0]

    def step(
        self,
        state: dict[str, Any],
        tokens: Int[Array, "batch length"],
        mask: Array | None = None,
    ) -> tuple[dict[str, Any], Float[Array, "batch length vocab_size"]]:
        """Continue by one or more tokens: the state after them, and their logits."""
        return step(self, state, tokens, mask)

    def branch(
        self,
        state: dict[str, Any],
        tokens: Int[Array, "batch nodes"],
        parents: Int[Array, "nodes"],
    ) -> tuple[tuple, Float[Array, "batch nodes vocab_size"]]:
        """Continue by a tree of tokens: what `keep` needs of its nodes, and their logits.

        Args:
          state: stays as it is.
          tokens: of the nodes; each comes behind the one that it continues.
          parents: which that is; -1: the state.
        """
        cannot = {type(m).__name__ for m in self.mixers() if not hasattr(m, "keep")}
        if cannot:
            names = ", ".join(sorted(cannot))
            raise ValueError(f"{names} cannot continue a state by a tree of tokens.")
        return branch(self, state, tokens, parents)

    def keep(
        self,
        state: dict[str, Any],
        nodes: tuple,
        path: Int[Array, "batch depth"],
        accepted: Bool[Array, "batch depth"],
    ) -> dict[str, Any]:
        """The state after some nodes of a tree.

        Args:
          state: before the tree.
          nodes: of `branch`.
          path: nodes from the root on.
          accepted: which of them count, the first ones of each row.
        """
        each = [mixer.keep for mixer in self.mixers()]
        layers = tuple(
            kept(before, node, path, accepted)
            for kept, before, node in zip(each, state["layers"], nodes, strict=True)
        )
        return keep(state, layers, accepted)

    @nn.compact
    def _run(self, tokens, state, train, context):
        self._check(state)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            self.vocab_size, self.embed_dim, embedding_init=init, name="embed", **types
        )
        x = embed(tokens).astype(self.residual_dtype())
        x = constrain(x, "batch", "length", "channels")
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        out = {"embed": x}
        mixers = self.mixers()
        blocks = [
            partial(self.block(), mixer) for mixer in mixers[: 1 if self.scan_layers else None]
        ]
        scan = self.depth if self.scan_layers else 0
        every, state = run_blocks(blocks, x, state, train, context, scan=scan)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = every[-1] if every else x
        x = nn.RMSNorm(epsilon=self.epsilon, name="norm", **types)(x)
        out["last_hidden_state"] = x
        out["logits"] = read_out(self, embed, x, context)
        return out, state

    def _check(self, state):
        if self.scan_layers and (len(set(self.mixers())) > 1 or state is not None):
            raise ValueError(
                "scan_layers=True needs equal layers and gives no states: leave out "
                "attention_layers, and step with scan_layers=False and "
                "zoo.layers.stack.unstack_layers(params)."
            )


class Decoder(CausalLM):
    """Base of language models of one mixer, `mixer()`, some of whose layers may be attention.

    The fields of the attention are one value for all its layers, or a tuple of one for each.

    Attributes:
      attention_layers: numbers of the layers that are softmax attention instead (hybrids).
      attention_heads: query heads of those.
      attention_kv_heads: their key heads; None: as many.
      window: tokens that they see, the query included; None: all.
      rope_theta: base of their rotary frequencies.
      attention_bias: whether they have biases in query, key and value.
    """

    attention_layers: tuple[int, ...] = ()
    attention_heads: int | tuple[int, ...] = 16
    attention_kv_heads: int | tuple[int | None, ...] | None = None
    window: int | tuple[int | None, ...] | None = None
    rope_theta: float | tuple[float, ...] = 10000.0
    attention_bias: bool | tuple[bool, ...] = False

    def mixer(self) -> nn.Module:
        """An unbound mixer; it has `init_state(batch, channels, length)`."""
        raise NotImplementedError

    def mixers(self) -> list[nn.Module]:
        """An unbound mixer for each layer."""
        count = len(self.attention_layers)
        names = "attention_heads", "attention_kv_heads", "window", "rope_theta", "attention_bias"
        columns = []
        for name in names:
            value = getattr(self, name)
            columns.append(value if isinstance(value, tuple) else (value,) * count)
            if len(columns[-1]) != count:
                raise ValueError(
                    f"{name}={value} has {len(value)} values for {count} attention_layers; give "
                    "one for each, or one number for all."
                )
        softmax = {
            i: RotaryAttention(*values, self.dtype, self.param_dtype, parent=None)
            for i, *values in zip(self.attention_layers, *columns, strict=True)
        }
        outside = [i for i in self.attention_layers if not 0 <= i < self.depth]
        if outside:
            raise ValueError(
                f"attention_layers has {outside}, but layers are 0 to {self.depth - 1}."
            )
        own = self.mixer()
        return [softmax.get(i, own) for i in range(self.depth)]


# ------------------------------------------------------------------------ step and branch
# For every model with `_run(tokens, state, train, context) -> (features, states of the layers)`.


def step(
    model: nn.Module, state: dict[str, Any], tokens: Array, mask: Array | None = None
) -> tuple[dict[str, Any], Array]:
    """The `step` of a model: see `CausalLM.step`."""
    check_speaks(model)
    tokens, mask = check_tokens(model, tokens, mask)
    position, length = state["position"], tokens.shape[1]
    if mask is None:
        positions, count = jnp.broadcast_to(jnp.arange(length), tokens.shape), length
    else:
        positions, count = positions_of(mask), mask.sum(1, dtype=jnp.int32)
    memory = {name: state[name] for name in ("memory", "memory_visible") if name in state}
    context = Context(mask, position[:, None] + positions, **memory)
    out, layers = model._run(tokens, state["layers"], False, context)
    return {"position": position + count, "layers": layers} | memory, out["logits"]


def branch(
    model: nn.Module, state: dict[str, Any], tokens: Array, parents: Array
) -> tuple[tuple, Array]:
    """The `branch` of a model: see `CausalLM.branch`."""
    check_speaks(model)
    tokens, _ = check_tokens(model, tokens)
    parents = jnp.asarray(parents)
    if parents.shape != tokens.shape[1:]:
        raise ValueError(
            f"parents has shape {parents.shape}; expected ({tokens.shape[1]},), one a node."
        )
    context = Context(None, state["position"][:, None] + depths(parents), parents)
    out, nodes = model._run(tokens, state["layers"], False, context)
    return nodes, out["logits"]


def keep(state: dict[str, Any], layers: tuple, accepted: Array) -> dict[str, Any]:
    """The state of a model after so many accepted nodes, from those of its layers."""
    position = state["position"] + accepted.sum(1, dtype=jnp.int32)
    return {"position": position, "layers": layers}
