"""BigBird's layer: blocks of tokens see their neighbours, both ends and a few blocks drawn by lot.

Zaheer et al., "Big Bird: Transformers for Longer Sequences", NeurIPS 2020, arXiv 2007.14062, as the
official GraphGPS (github.com/rampasek/GraphGPS, MIT) has it after transformers.

    first and last block    see every token
    block i between them    sees blocks 0, i - 1, i, i + 1 and the last, and `random_blocks` others
    y = norm1(x + out(attention(x)));   y = norm2(y + mlp(y))    mlp as wide as the channels

The lots may fall on blocks that are seen anyway, which then count twice. They depend on the number
of blocks alone, so padding to another length gives another network.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, dense_rules, norm_rules
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.norm import LayerNorm


def random_blocks(count: int, wanted: int, heads: int) -> Int[np.ndarray, "heads rows wanted"]:
    """The blocks drawn for each block but the first and the last, with the generator's seed 0.

    Where there are many blocks, all are drawn from the first `2 * wanted + 5`; where there are more
    than `wanted + 5`, the first half of them from as many, and the others from those behind.

    Raises:
      ValueError: where there are fewer blocks to draw from than wanted.
    """
    if 2 * wanted + 5 < count:
        ends, numbers = (2 * wanted + 5, count), (wanted, 0)
    elif wanted + 5 < count:
        ends, numbers = (wanted + 5, count), (wanted // 2, wanted - wanted // 2)
    else:
        ends, numbers = (count,), (wanted,)
    generator = np.random.RandomState(0)
    found = np.zeros((heads, count, wanted), np.int32)

    def draw(rows: range, part: int) -> None:
        start, column = (ends[part - 1], numbers[part - 1]) if part else (0, 0)
        there = np.arange(start, ends[part])
        if 1 < len(there) < numbers[part]:  # of a single block, every lot is that one
            raise ValueError(
                f"BigBird draws {numbers[part]} of {len(there)} blocks here; choose fewer "
                f"random_blocks than {wanted} or a smaller block_size."
            )
        for row in rows:
            for head in range(heads):
                drawn = generator.permutation(there)[: numbers[part]]
                found[head, row, column : column + numbers[part]] = drawn

    near, far = range(1, ends[0]), range(ends[0], count)
    order = [(near, 0)] if len(ends) == 1 else [(near, 0), (near, 1), (far, 0), (far, 1)]
    for rows, part in order:
        if numbers[part]:
            draw(rows, part)
    return found[:, 1:-1]


def seen_blocks(count: int, wanted: int, heads: int) -> Int[np.ndarray, "heads rows seen"]:
    """The blocks that each block but the first and the last sees; -1 is none."""
    row = np.arange(1, count - 1)
    before, after = np.where(row > 1, row - 1, -1), np.where(row < count - 2, row + 1, -1)
    fixed = np.stack([0 * row, before, row, after, 0 * row + count - 1], -1)
    fixed = np.broadcast_to(fixed, (heads, *fixed.shape))
    return np.concatenate([fixed, random_blocks(count, wanted, heads)], -1)


class BigBirdLayer(nn.Module):
    """Block-sparse attention and an MLP, each with a norm behind it.

    Attributes:
      num_heads: must divide the channels.
      block_size: tokens of a block; there must be at least four.
      random_blocks: drawn for each block.
      qkv_bias: whether queries, keys and values have biases.
      activation: of the MLP.
      dropout: rate behind attention and MLP.
      epsilon: of the norms.
    """

    num_heads: int
    block_size: int = 3
    random_blocks: int = 3
    qkv_bias: bool = False
    activation: str = "relu"
    dropout: float = 0.0
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        visible: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """The tokens; `visible` is False at padding, which nothing sees.

        Raises:
          ValueError: if there are fewer than four blocks.
        """
        batch, length, channels = x.shape
        size, heads = self.block_size, self.num_heads
        blocks = -(-length // size)
        if blocks < 4:
            raise ValueError(
                f"BigBird needs four blocks, and {length} tokens are {blocks} of {size}; pad to "
                f"at least {3 * size + 1} or choose a smaller block_size."
            )
        if channels % heads:
            raise ValueError(
                f"num_heads={heads} does not divide {channels} channels; choose a divisor."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        padding = ((0, 0), (0, blocks * size - length))
        real = jnp.pad(visible, padding)
        shape = (batch, blocks, size, heads, channels // heads)
        query, key, value = (
            jnp.pad(y, (*padding, (0, 0))).reshape(shape)
            for y in (
                Dense(channels, use_bias=self.qkv_bias, name=name, **types)(x)
                for name in ("query", "key", "value")
            )
        )
        flat = (batch, blocks * size, *shape[3:])
        ends = kernels_pallas.attention(
            query[:, (0, -1)].reshape(batch, 2 * size, *shape[3:]),
            key.reshape(flat),
            value.reshape(flat),
            bias=real[:, None, None],
        ).reshape(batch, 2, size, *shape[3:])
        seen = seen_blocks(blocks, self.random_blocks, heads)

        def gathered(y: Array) -> Array:  # batch heads rows keys 1 head_dim
            parts = [y[:, :, :, head][:, seen[head]] for head in range(heads)]
            return jnp.stack(parts, 1).reshape(batch, heads, blocks - 2, -1, 1, shape[-1])

        there = real.reshape(batch, blocks, size)[:, seen] & (seen >= 0)[..., None]
        middle = kernels_pallas.attention(
            query[:, 1:-1].transpose(0, 3, 1, 2, 4)[..., None, :],
            gathered(key),
            gathered(value),
            bias=there.reshape(batch, heads, blocks - 2, 1, 1, -1),
        )
        middle = middle[..., 0, :].transpose(0, 2, 3, 1, 4)
        y = jnp.concatenate([ends[:, :1], middle, ends[:, 1:]], 1)
        y = y.reshape(batch, blocks * size, channels)[:, :length]
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = norm(name="norm1")(x + drop(Dense(channels, name="out", **types)(y)))
        y = Mlp(channels, ACTIVATIONS[self.activation], name="mlp", **types)(x)
        return norm(name="norm2")(x + drop(y))


def bigbird_rules(theirs: str, ours: str) -> list[Rule]:
    """Of such a layer in transformers' names."""
    return [
        *(
            rule
            for name in ("query", "key", "value")
            for rule in dense_rules(f"{theirs}.attention.self.{name}", f"{ours}/{name}")
        ),
        *dense_rules(f"{theirs}.attention.output.dense", f"{ours}/out"),
        *norm_rules(f"{theirs}.attention.output.LayerNorm", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.output.dense", f"{ours}/mlp/down"),
        *norm_rules(f"{theirs}.output.LayerNorm", f"{ours}/norm2"),
    ]
