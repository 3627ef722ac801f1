"""What in-context learners share: the prompt as a sequence, its two ends, GPT-2's blocks between.

A prompt is n pairs (x_i, y_i), and a learner predicts y_i at the token of x_i, from what stands
before it. The sequence has two tokens a pair:

    z_2i = x_i,   z_2i+1 = (y_i, 0, ..., 0)

as in Garg et al., arXiv 2208.01066, whose code (github.com/dtsip/in-context-learning, MIT) the
later papers start from.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, dense_rules
from zoo.layers.causal import init
from zoo.layers.decoder import run_blocks
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.series import torch_linear
from zoo.layers.stack import remat_block
from zoo.models.language.gpt2 import GPT2Block, residual_init


def interleave(
    xs: Float[Array, "batch points dims"], ys: Float[Array, "batch points"]
) -> Float[Array, "batch tokens dims"]:
    """The tokens of a prompt: `x_1, (y_1, 0, ...), x_2, ...`."""
    wide = jnp.pad(ys.astype(xs.dtype)[..., None], ((0, 0), (0, 0), (0, xs.shape[-1] - 1)))
    return jnp.stack([xs, wide], axis=2).reshape(xs.shape[0], -1, xs.shape[-1])


def prompt_shapes(batch_size: int, points: int, dims: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arguments of a learner."""
    return {
        "xs": jax.ShapeDtypeStruct((batch_size, points, dims), jnp.float32),
        "ys": jax.ShapeDtypeStruct((batch_size, points), jnp.float32),
    }


def check_prompt(model: nn.Module, xs: Array, ys: Array, max_points: int | None) -> None:
    """Refuse what is no prompt of this learner; `max_points` None: of any length.

    Raises:
      ValueError: naming the shapes, or the number of points.
    """
    name = type(model).__name__
    if xs.ndim != 3 or xs.shape[2] != model.dims or ys.shape != xs.shape[:2]:
        raise ValueError(
            f"This {name} takes xs of shape (batch, points, {model.dims}) and ys of shape (batch, "
            f"points), not {xs.shape} and {ys.shape}; give one label a point, or create it with "
            "another dims."
        )
    if max_points is not None and xs.shape[1] > max_points:
        raise ValueError(
            f"This {name} reads at most {max_points} points, not {xs.shape[1]}; shorten the "
            "prompt, or create it with more max_points."
        )


class InContextLearner(Model):
    """Base of learners from prompts: subclasses have `dims` and `max_points`, and `features`."""

    def example_inputs(
        self, batch_size: int = 1, points: int = 20
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for prompts of so many points."""
        return prompt_shapes(batch_size, min(points, self.max_points), self.dims)

    def __call__(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> Float[Array, "batch ..."]:
        """The prediction of each label, as the class's own docstring describes it."""
        return self.features(xs, ys, train)["prediction"]


class Read(nn.Module):
    """A map into or out of the backbone: linear, or two hidden layers of `hidden` with ReLU."""

    width: int
    hidden: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch width"]:
        if self.hidden is None:
            return torch_linear(self, self.width, x.shape[-1], "dense")(x)
        for i, width in enumerate((self.hidden, self.hidden, self.width)):
            x = nn.relu(x) if i else x
            x = torch_linear(self, width, x.shape[-1], f"dense_{i}")(x)
        return x


def read_rules() -> list[Rule]:
    """Rules of both ends, linear or not."""
    return [
        rule
        for end in ("read_in", "read_out")
        for rule in (
            *dense_rules(f"_{end}", f"{end}/dense"),
            *dense_rules(f"_{end}.net.{{2*i}}", f"{end}/dense_{{i}}"),
        )
    ]


class Trunk(nn.Module):
    """Learned positions, GPT-2's blocks and its last LayerNorm, over tokens that are vectors.

    Attributes:
      depth: blocks.
      num_heads: must divide the channels.
      max_tokens: rows of the table of positions.
      positions: whether they are added. Without, the table is kept as `idle_position_embedding`,
        for published files have it.
      add_inputs: add the tokens again before each block.
      scan_layers: one stacked `layers` instead of `layers_0 ...`.
      remat: see `zoo.layers.stack.remat_block`.
    """

    depth: int
    num_heads: int
    max_tokens: int
    positions: bool = True
    add_inputs: bool = False
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], train: bool = False
    ) -> list[Float[Array, "batch tokens channels"]]:
        """What each block gives, and last the output of the LayerNorm."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table = self.param(
            "position_embedding" if self.positions else "idle_position_embedding",
            init,
            (self.max_tokens, x.shape[-1]),
            self.param_dtype,
        )
        inputs = x
        if self.positions:
            x = x + table[: x.shape[1]].astype(self.dtype)
        x = constrain(x, "batch", "length", "channels")
        block = partial(
            remat_block(GPT2Block, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            self.num_heads,
            0.0,
            residual_init(self.depth),
            **types,
        )
        if self.add_inputs:
            every = []
            for i in range(self.depth):
                x, _ = block(name=f"layers_{i}")(x + inputs, None, train)
                every.append(x)
        else:
            scan = self.depth if self.scan_layers else 0
            every, _ = run_blocks([block] * self.depth, x, None, train, scan=scan)
        norm = LayerNorm(epsilon=1e-5, name="norm", **types)
        return [*every, norm(every[-1] if every else x)]
