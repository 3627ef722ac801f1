"""A GPT-2 that tells from the examples in its prompt what comes next, and how sure it is.

Liu, Cai, Chen, Li, "Towards Better Understanding of In-Context Learning Ability from In-Context
Uncertainty Quantification", arXiv 2405.15115. No code could be found: the transformer is that of
`icl_sequential`, and how its two outputs become a mean and a deviation is our choice.

    (m_i, s_i) = W_out LN(h)_2i + b_out
    y_i given everything before ~ (mean m_i, deviation exp(clip(s_i, -7, 7)))
    loss = mean over i of  log sigma_i + (y_i - m_i)^2 / (2 sigma_i^2)

Over all functions and prompts the loss is least where m_i is the conditional mean and sigma_i^2
the conditional variance, given the points before and x_i. `zoo.data.functions.bayes` has both.

    features            icl_uncertainty_d8
    tokens              40 8            of 20 points
    embed               40 128
    layer0              40 128          up to layer5
    last_hidden_state   40 128          behind the last LayerNorm
    mean                20
    log_deviation       20
    prediction          20 2            the two side by side
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.models.incontext.icl_sequential import gpt2_rules
from zoo.models.incontext.prompt import InContextLearner, Read, Trunk, check_prompt, interleave
from zoo.system import System, Variant

LIMIT = 7.0  # of the logarithm of a deviation


def gaussian_loss(
    prediction: Float[Array, "*batch 2"], ys: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The negative logarithm of the density at y, without its constant, in float32."""
    mean, log_deviation = jnp.moveaxis(prediction.astype(jnp.float32), -1, 0)
    return log_deviation + 0.5 * ((ys - mean) * jnp.exp(-log_deviation)) ** 2


class InContextUncertainty(InContextLearner):
    """Predicts each label of a prompt from the points before it, with a deviation.

    A call gives `[batch, points, 2]`: mean and logarithm of the deviation of each label.

    Attributes:
      dims: size of an x.
      max_points: longest prompt.
      embed_dim: channels.
      depth: blocks.
      num_heads: must divide the channels.
      positions: whether tokens have positions; without, prompts may be longer than in training.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once.
      remat: recompute layers in the backward pass; see `zoo.layers.stack.remat_block`.
    """

    dims: int = 8
    max_points: int = 60
    embed_dim: int = 128
    depth: int = 6
    num_heads: int = 4
    positions: bool = True
    scan_layers: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def features(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Raises:
          ValueError: if they are no prompt, or a longer one than there are positions for.
        """
        check_prompt(self, xs, ys, self.max_points if self.positions else None)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = interleave(xs, ys)
        embed = Read(self.embed_dim, name="read_in", **types)(tokens)
        *every, last = Trunk(
            self.depth,
            self.num_heads,
            2 * self.max_points,
            self.positions,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="backbone",
            **types,
        )(embed, train)
        mean, spread = jnp.moveaxis(Read(2, name="read_out", **types)(last[:, ::2]), -1, 0)
        spread = jnp.clip(spread, -LIMIT, LIMIT)
        return {
            "tokens": tokens,
            "embed": embed,
            **{f"layer{i}": x for i, x in enumerate(every)},
            "last_hidden_state": last,
            "mean": mean,
            "log_deviation": spread,
            "prediction": jnp.stack([mean, spread], axis=-1),
        }


LAYOUTS = {"zoo": gpt2_rules()}

_COMMON = dict(
    module=InContextUncertainty,
    task="in_context_uncertainty",
    paper="In-Context Uncertainty Quantification, arXiv 2405.15115",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "icl_uncertainty_d8": Variant(fields={}, **_COMMON),
    "icl_uncertainty_d2": Variant(
        fields=dict(dims=2, max_points=20, embed_dim=64, depth=3, num_heads=2), **_COMMON
    ),
    "icl_uncertainty_test": Variant(
        fields=dict(dims=3, max_points=9, embed_dim=32, depth=2, num_heads=4), **_COMMON
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, frozen=(r".*idle_position_embedding",))
