"""A GPT-2 that learns functions from the examples in its prompt, sequential functions among them.

Campbell et al., "Can Transformers Learn Sequential Function Classes In Context?", arXiv 2312.12655,
who published no code that we know of. The model is that of Garg et al., "What Can Transformers
Learn In-Context?", arXiv 2208.01066, code github.com/dtsip/in-context-learning (MIT), which we
follow. github.com/satwik77/incontext-bool (MIT) uses it for Boolean functions, and there may
replace both linear ends by multilayer perceptrons (`read_hidden`), around a frozen backbone.

    z_2i = x_i;  z_2i+1 = (y_i, 0, ..., 0)                             two tokens a point
    h = W_in z + b_in + P                                              learned positions
    h = h + attention(LN(h));  h = h + W2 gelu(W1 LN(h) + b1) + b2     causal; `depth` times
    prediction_i = w_out . LN(h)_2i + b_out                            read at the token of x_i

The last y is in the sequence, but no prediction sees it. Published files also hold the table of
50,257 words of GPT-2, which nothing reads: it is dropped. The parameters are counted without it,
as the paper does. The window functions are in `zoo.data.functions`.

    features            icl_sequential_standard
    tokens              40 20       of 20 points
    embed               40 256
    layer0              40 256      up to layer11
    last_hidden_state   40 256      behind the last LayerNorm
    prediction          20
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, norm_rules
from zoo.models.incontext.prompt import (
    InContextLearner,
    Read,
    Trunk,
    check_prompt,
    interleave,
    read_rules,
)
from zoo.models.language.gpt2 import conv1d_rules
from zoo.system import System, Variant


class InContextGPT2(InContextLearner):
    """Predicts each label of a prompt from the points before it.

    A call gives `[batch, points]`; with several `outputs`, these on a last axis.

    Attributes:
      dims: size of an x.
      max_points: longest prompt.
      embed_dim: channels.
      depth: blocks.
      num_heads: must divide the channels.
      outputs: numbers that are read out at each point.
      read_hidden: width of both ends' hidden layers; None: they are linear.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once.
      remat: recompute layers in the backward pass; see `zoo.layers.stack.remat_block`.
    """

    dims: int = 20
    max_points: int = 101
    embed_dim: int = 256
    depth: int = 12
    num_heads: int = 8
    outputs: int = 1
    read_hidden: int | None = None
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
        check_prompt(self, xs, ys, self.max_points)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = interleave(xs, ys)
        embed = Read(self.embed_dim, self.read_hidden, name="read_in", **types)(tokens)
        out = {"tokens": tokens, "embed": embed}
        *every, last = Trunk(
            self.depth,
            self.num_heads,
            2 * self.max_points,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="backbone",
            **types,
        )(embed, train)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        out["last_hidden_state"] = last
        y = Read(self.outputs, self.read_hidden, name="read_out", **types)(last[:, ::2])
        return out | {"prediction": y[..., 0] if self.outputs == 1 else y}


# ---------------------------------------------------------------------------- checkpoints


def gpt2_rules() -> Rules:
    """Rules of the official files: both ends, and GPT-2 as transformers names it."""
    theirs, ours = "_backbone.h.{i}", "backbone/layers_{i}"
    return Rules(
        [
            *read_rules(),
            Rule("_backbone.wpe.weight", "backbone/position_embedding"),
            Rule("_backbone.wpe.weight", "backbone/idle_position_embedding"),
            *norm_rules(f"{theirs}.ln_1", f"{ours}/norm1"),
            *conv1d_rules(f"{theirs}.attn.c_attn", f"{ours}/attention/qkv"),
            *conv1d_rules(f"{theirs}.attn.c_proj", f"{ours}/attention/out"),
            *norm_rules(f"{theirs}.ln_2", f"{ours}/norm2"),
            *conv1d_rules(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up"),
            *conv1d_rules(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down"),
            *norm_rules("_backbone.ln_f", "backbone/norm"),
        ],
        # Files of transformers before 4.27, the released ones among them, hold causal masks.
        derived={f"{theirs}.attn.bias": None, f"{theirs}.attn.masked_bias": None},
        unused=("_backbone.wte.weight",),
    )


LAYOUTS = {"official": gpt2_rules()}

_GARG = dict(
    module=InContextGPT2,
    task="in_context_regression",
    paper="What Can Transformers Learn In-Context?, arXiv 2208.01066; sequential: 2312.12655",
    code="github.com/dtsip/in-context-learning",
    licence="MIT",
)  # fmt: skip
_BOOLEAN = _GARG | dict(
    task="in_context_classification",
    paper="Understanding In-Context Learning ... Discrete Functions, arXiv 2310.03016",
    code="github.com/satwik77/incontext-bool",
)

VARIANTS: dict[str, Variant] = {
    "icl_sequential_standard": Variant(
        fields={}, params=9_534_977, metric="as least squares on noiseless linear functions",
        **_GARG,
    ),
    "icl_sequential_small": Variant(fields=dict(embed_dim=128, depth=6, num_heads=4), **_GARG),
    "icl_sequential_tiny": Variant(fields=dict(embed_dim=64, depth=3, num_heads=2), **_GARG),
    "icl_sequential_toy": Variant(fields=dict(dims=5, max_points=11), **_GARG),
    "icl_sequential_san": Variant(fields=dict(dims=28, max_points=150), **_BOOLEAN),
    "icl_sequential_san_frozen": Variant(
        fields=dict(dims=28, max_points=150, read_hidden=256), **_BOOLEAN
    ),
    "icl_sequential_test": Variant(
        fields=dict(dims=3, max_points=9, embed_dim=32, depth=2, num_heads=4), **_GARG
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
