"""Swin with varied-size windows, built from the VSA paper: not verified against official code.

Zhang et al. (see `vsa`) give Swin-T and Swin-S with VSA in every block in place of plain and
shifted windows, and a residual 7x7 convolution of each channel before it. Code and weights were
announced and never published, so there is nothing to compare with: the attention is the one of
`vsa`, which is verified; that blocks shift nothing, the convolution and its place are the paper's;
the rest is Swin. One thing neither settles: whether the skip carries the convolution. It does not,
as in the code's ViTAEv2 (`position_in_skip`).

    t = x + dwconv7x7(x);   x = x + DropPath(VSA(LN(t)));   x = x + DropPath(MLP(LN(x)))

    features         swin_vsa_tiny_window7_224
    patch_embed      56  56   96    4x4 patches, linear, LayerNorm
    stage1           56  56   96    2 blocks; stride 4
    downsample1      28  28  192    2x2 neighbours concatenated, LayerNorm, linear
    stage2           28  28  192    2 blocks; stride 8
    downsample2      14  14  384
    stage3           14  14  384    6 blocks; stride 16
    downsample3       7   7  768
    stage4            7   7  768    2 blocks; stride 32
    norm              7   7  768
    pooled                   768    mean over the map
    logits                  1000
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, conv_rules, dense_rules, linear, norm_rules
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import DepthwiseConv
from zoo.layers.hierarchy import PatchMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.models.vision.vsa import VariedSizeWindowAttention, attention_rules, index_table
from zoo.system import Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.truncated_normal(0.02)


class SwinVSABlock(nn.Module):
    """Convolution, varied-size window attention and MLP."""

    num_heads: int
    window_size: int
    position_in_skip: bool = False
    mlp_ratio: float = 4.0
    zero_init: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        channels = x.shape[3]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = x + DepthwiseConv(7, name="pos_conv", **types)(x)
        x = y if self.position_in_skip else x
        y = VariedSizeWindowAttention(
            channels,
            channels,
            self.num_heads,
            self.window_size,
            self.zero_init,
            self.dropout,
            self.attention_dropout,
            name="attention",
            **types,
        )(LayerNorm(name="norm1", **types)(y), train)
        x = x + DropPath(self.drop_path)(y, train)
        y = LayerNorm(name="norm2", **types)(x)
        hidden = int(channels * self.mlp_ratio)
        y = Mlp(hidden, dropout=self.dropout, kernel_init=init, name="mlp", **types)(y, train)
        x = x + DropPath(self.drop_path)(y, train)
        return constrain(x, "batch", "height", "width", "channels")


class SwinVSA(ImageClassifier):
    """Swin classifier with varied-size windows.

    Attributes:
      image_size: height and width in pixels, multiples of patch_size * 2 ** (stages - 1); the last
        map must not be smaller than a window. Windows need not tile the maps.
      position_in_skip: the skip around attention carries the convolution, too.
      zero_init: windows start as plain ones.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    position_in_skip: bool = False
    mlp_ratio: float = 4.0
    zero_init: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.2

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        self.check_size(images.shape)
        types = self.types
        out = {}
        x = PatchEmbed(self.embed_dim, self.patch_size, name="embed", **types)(images)
        x = out["patch_embed"] = LayerNorm(name="embed_norm", **types)(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        rates = iter(np.linspace(0.0, self.drop_path, sum(self.depths)).tolist())
        block = remat_block(SwinVSABlock, self.remat, static_argnums=(2,))
        for i, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            last = i == len(self.depths) - 1
            make = partial(
                block,
                num_heads,
                self.window_size,
                self.position_in_skip,
                self.mlp_ratio,
                self.zero_init,
                self.dropout,
                self.attention_dropout,
                **types,
            )
            stage = Stage(
                tuple(partial(make, drop_path=next(rates)) for _ in range(depth)),
                None if last else partial(PatchMerging, **types),
                name=f"stages_{i}",
            )
            out[f"stage{i + 1}"], merged = stage(x, train)
            if not last:
                x = out[f"downsample{i + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out


# ---------------------------------------------------------------------------- checkpoints

_THEIRS, _OURS = "layers.{s}.blocks.{b}", "stages_{s}/layers_{b}"

# No file of this model is published: names are those of official Swin, and of ViTAE-VSA inside.
LAYOUTS = {
    "swin": Rules(
        (
            *conv_rules("patch_embed.proj", "embed"),
            *norm_rules("patch_embed.norm", "embed_norm"),
            *conv_rules(f"{_THEIRS}.pos", f"{_OURS}/pos_conv"),
            *norm_rules(f"{_THEIRS}.norm1", f"{_OURS}/norm1"),
            *attention_rules(f"{_THEIRS}.attn.", f"{_OURS}/attention/"),
            *norm_rules(f"{_THEIRS}.norm2", f"{_OURS}/norm2"),
            *dense_rules(f"{_THEIRS}.mlp.fc1", f"{_OURS}/mlp/up"),
            *dense_rules(f"{_THEIRS}.mlp.fc2", f"{_OURS}/mlp/down"),
            *norm_rules("layers.{s}.downsample.norm", "stages_{s}/downsample/norm"),
            Rule(
                "layers.{s}.downsample.reduction.weight",
                "stages_{s}/downsample/reduction/kernel",
                linear,
            ),
            *norm_rules("norm", "norm"),
            *dense_rules("head", "head"),
        ),
        derived={f"{_THEIRS}.attn.relative_position_index": index_table},
        fresh=("head/kernel", "head/bias"),
    )
}

# ------------------------------------------------------------------------------- variants

_SOURCE = {
    "task": "image_classification",
    "paper": "VSA: Learning Varied-Size Window Attention, arXiv 2204.08446",
    "licence": "none: no published weights",
}

VARIANTS = {
    "swin_vsa_tiny_window7_224": Variant(
        module=SwinVSA, fields={}, **_SOURCE, preprocessing=Preprocessing()
    ),
    "swin_vsa_small_window7_224": Variant(
        module=SwinVSA,
        fields={"depths": (2, 2, 18, 2), "drop_path": 0.3},
        **_SOURCE,
        preprocessing=Preprocessing(),
    ),
    "swin_vsa_test": Variant(
        module=SwinVSA,
        fields={
            "image_size": (32, 32),
            "patch_size": 4,
            "num_classes": 10,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 4),
            "window_size": 3,
            "drop_path": 0.0,
        },
        preprocessing=Preprocessing(crop=1.0),
        **_SOURCE,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
