"""The layer that the efficient language models share, whatever mixes their tokens.

    x = x + mixer(shift(norm1(x)));   x = x + mlp(shift(norm2(x)))

`attend` and `feed` give the two sums alone, for reversible stacks (`zoo.layers.reversible`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, chain, dense_rules, linear, split
from zoo.layers.dense import Dense
from zoo.layers.mlp import gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain

init = nn.initializers.normal(0.02)


class ScaleNorm(nn.Module):
    """`gain * x / max(|x|, epsilon)`, one learned number (arXiv 1910.05895)."""

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """The scaled vectors."""
        gain = self.param("gain", nn.initializers.ones, (1,), self.param_dtype)
        y = x.astype(jnp.float32)
        square = jnp.maximum(jnp.sum(y * y, -1, keepdims=True), self.epsilon**2)
        return (y / jnp.sqrt(square) * gain).astype(self.dtype)


def shift_tokens(
    x: Float[Array, "batch length channels"],
    shifts: Sequence[int],
    visible: Bool[Array, "batch length"] | None = None,
) -> Float[Array, "batch length channels"]:
    """Moves parts of the channels along the sequence: the first part by `shifts[0]` tokens, ...

    The channels are cut into as many parts as there are shifts; what remains stays with the last.
    Zeros come in at the ends, and from tokens that are not visible.
    """
    size = x.shape[-1] // len(shifts)
    parts = [x[..., i * size : (i + 1) * size] for i in range(len(shifts))]
    rest = x[..., len(shifts) * size :]
    moved = []
    for part, by in zip(parts, shifts, strict=True):
        if by and visible is not None:
            part = jnp.where(visible[:, :, None], part, 0)
        widths = ((0, 0), (max(by, 0), max(-by, 0)), (0, 0))
        padded = jnp.pad(part, widths)
        start = max(-by, 0)
        moved.append(padded[:, start : start + x.shape[1]])
    return jnp.concatenate([*moved, rest], axis=-1)


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` if `gated`; with biases.

    Attributes:
      hidden: width of the middle, in channels.
      dropout: rate in the middle.
    """

    hidden: int
    gated: bool = False
    activation: Callable[[Array], Array] = gelu
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"], train: bool = False) -> Array:
        """The tokens after the two maps."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        y = dense(self.hidden, name="up")(x)
        if self.gated:
            y = self.activation(dense(self.hidden, name="gate")(x)) * y
        else:
            y = self.activation(y)
        y = constrain(y, "batch", *["length"] * (y.ndim - 2), "mlp")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return dense(x.shape[-1], name="down")(y)


class ResidualLayer(nn.Module):
    """A mixer and an MLP, each behind a norm.

    Attributes:
      mixer: a template `(x, context, train) -> y`: its copy is the parameter group `attention`.
      embed_dim: channels.
      mlp_ratio: width of the MLP's middle over the channels.
      gated: whether the MLP is.
      activation: of the MLP.
      norm: makes `norm1` and `norm2`; None: no norms, but a learned factor on each sum
        (`gate1`, `gate2`; ReZero, arXiv 2003.04887).
      gate_init: where those factors start.
      shifts: see `shift_tokens`; none: no shift.
      masked_shift: whether `context["visible"]` zeroes what the mixer's shift moves.
      dropout: rate in the MLP.
    """

    mixer: nn.Module
    embed_dim: int
    mlp_ratio: int = 4
    gated: bool = False
    activation: Callable[[Array], Array] = gelu
    norm: Callable[..., nn.Module] | None = partial(LayerNorm, epsilon=1e-5)
    gate_init: float = 0.0
    gate_shape: tuple[int, ...] = ()
    shifts: tuple[int, ...] = ()
    masked_shift: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention = self.mixer.clone()
        self.mlp = FeedForward(
            self.mlp_ratio * self.embed_dim, self.gated, self.activation, self.dropout, **types
        )
        if self.norm is not None:
            self.norm1, self.norm2 = self.norm(**types), self.norm(**types)
        else:
            start = nn.initializers.constant(self.gate_init)
            self.gate1 = self.param("gate1", start, self.gate_shape, self.param_dtype)
            self.gate2 = self.param("gate2", start, self.gate_shape, self.param_dtype)

    def attend(self, x: Array, context: dict, train: bool = False) -> Array:
        """What the mixer adds."""
        y = x if self.norm is None else self.norm1(x)
        if self.shifts:
            y = shift_tokens(y, self.shifts, context["visible"] if self.masked_shift else None)
        y = self.attention(y, context, train)
        return y if self.norm is not None else y * self.gate1.astype(self.dtype)

    def feed(self, x: Array, context: dict, train: bool = False) -> Array:
        """What the MLP adds."""
        y = x if self.norm is None else self.norm2(x)
        y = self.mlp(shift_tokens(y, self.shifts) if self.shifts else y, train)
        return y if self.norm is not None else y * self.gate2.astype(self.dtype)

    def __call__(self, x: Array, context: dict, train: bool = False) -> Array:
        """The tokens after both."""
        x = constrain(x + self.attend(x, context, train), "batch", "length", "channels")
        return constrain(x + self.feed(x, context, train), "batch", "length", "channels")


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of an MLP `w1`, `w2`; where it is gated, the first half of w1 is the gate."""
    both = (f"{ours}/gate", f"{ours}/up")
    gated = [
        Rule(f"{theirs}.w1.weight", tuple(f"{o}/kernel" for o in both), chain(split(0), linear)),
        Rule(f"{theirs}.w1.bias", tuple(f"{o}/bias" for o in both), split(0)),
    ]
    return [
        *gated,
        *dense_rules(f"{theirs}.w1", f"{ours}/up"),
        *dense_rules(f"{theirs}.w2", f"{ours}/down"),
    ]
