"""FaViT, the Factorization Vision Transformer: long range at the cost of local windows.

"Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost", arXiv
2312.08614 (number and authors unverified). Official code: github.com/q2479036243/FaViT (no licence
file, no published weights), which we follow.

A stage of PVT v2's skeleton works on a map `x [B, H, W, C]`; all tokens are queries:

    x = x + DropPath(factorized(LN(x)));   x = x + DropPath(down(GELU(dwconv(up(LN(x))))))
    factorized(x) = out([g | l1 | l2]),   q = query(x)
    g:  1/8 of the channels, one head. Keys and values from LN(convolution of stride r), so r^2
        times fewer tokens.
    l1: 7/16 of the channels. 49 keys and values: the positions of a 7x7 window, each pooled over
        all windows of the map.
    l2: 7/16, as l1 with windows dilated by r.
    Each is softmax(q k^T / sqrt(d)) (v + dwconv(v)).   r = 1 (last stage): g 1/8, l1 7/8, no l2.

Two things that the code does and the paper does not say are kept, because weights depend on them:
the pooling runs over consecutive numbers of (window, channel), so that it mixes channels
(`pool_windows`); and with several heads the queries of l1 are the first half of every head, its
keys the first half of the channels.

    features         favit_b0
    patch_embed1     56  56   32    7x7 convolution of stride 4, LayerNorm
    stage1           56  56   32    2 blocks, r = 8, LayerNorm; stride 4
    patch_embed2     28  28   64    3x3 convolution of stride 2, LayerNorm
    stage2           28  28   64    2 blocks, r = 4; stride 8
    patch_embed3     14  14  128
    stage3           14  14  128    6 blocks, r = 2; stride 16
    patch_embed4      7   7  256
    stage4            7   7  256    2 blocks, r = 1; stride 32
    pooled                   256    mean over the map
    logits                  1000

Images of every size are taken for which no map is mirrored more than once to fill its windows:
from 97 pixels a side with the published r.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    chain,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    split,
    squeeze,
)
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import ConvMlp, DepthwiseConv
from zoo.layers.dense import Dense
from zoo.layers.hierarchy import Stage
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.system import Preprocessing, System, Variant

WINDOW = 7

init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
depthwise_init = nn.initializers.normal(np.sqrt(2 / 9))  # the same, of a 3x3 group of one channel


def pool_windows(
    x: Float[Array, "batch height width channels"], num_heads: int, dilation: int
) -> Float[Array, "batch 49 heads head_dim"]:
    """One token for each position of a 7x7 window, pooled over the windows that tile the map.

    The map is mirrored below and on the right to whole windows. The n windows' vectors of a head
    are laid end to end and cut into head_dim pieces of n numbers; a piece gives its mean.

    Raises:
      ValueError: if the map is too small to be mirrored.
    """
    batch, height, width, channels = x.shape
    extent = (WINDOW - 1) * dilation + 1
    below, right = -height % extent, -width % extent
    if below >= height or right >= width:
        raise ValueError(
            f"A map of {height}x{width} is too small for windows of {extent}x{extent}: it would "
            "have to be mirrored more than once; choose a larger image or smaller sr_ratios."
        )
    x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")
    rows, columns = x.shape[1] // extent, x.shape[2] // extent
    x = x.reshape(batch, rows, extent, columns, extent, num_heads, channels // num_heads)
    x = x[:, :, ::dilation, :, ::dilation].transpose(0, 2, 4, 5, 1, 3, 6)
    x = x.reshape(batch, WINDOW**2, num_heads, channels // num_heads, rows * columns)
    return x.mean(-1)


class Group(nn.Module):
    """Attention of some channels to few tokens.

    Attributes:
      num_heads: of these channels.
      bias: of `mix`, `key` and `value`.
      mix: a linear map in front of both. All act on each head alike, so that they are small
        and whole on every device.
    """

    num_heads: int
    bias: bool
    mix: bool
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch height width heads head_dim"],
        tokens: Float[Array, "batch rows columns heads head_dim"],
        train: bool = False,
    ) -> Float[Array, "batch height width channels"]:
        batch, rows, columns, heads, width = tokens.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, use_bias=self.bias, kernel_init=init, **types)
        if self.mix:
            tokens = dense(width, name="mix")(tokens)
        key, value = dense(width, name="key")(tokens), dense(width, name="value")(tokens)
        pos_conv = DepthwiseConv(kernel_init=depthwise_init, name="pos_conv", **types)
        value = value + pos_conv(value.reshape(batch, rows, columns, -1)).reshape(value.shape)
        dropping = train and self.attention_dropout > 0
        x = kernels_pallas.attention(
            query.reshape(batch, -1, heads, width),
            key.reshape(batch, -1, heads, width),
            value.reshape(batch, -1, heads, width),
            dropout=self.attention_dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        return x.reshape(*query.shape[:3], heads * width)


class FactorizedAttention(nn.Module):
    """One global group of channels and one or two local ones (see above).

    Attributes:
      sr_ratio: r, the stride of the global group and the dilation of the second local one.
    """

    num_heads: int
    sr_ratio: int
    qkv_bias: bool = True
    attention_dropout: float = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        size, channels, r = x.shape[:3], x.shape[3], self.sr_ratio
        shares = (2, 7, 7) if r > 1 else (1, 7)
        thin, *widths = (channels // sum(shares) * share for share in shares)
        if channels % sum(shares) or widths[0] % self.num_heads:
            raise ValueError(
                f"{channels} channels in {self.num_heads} heads cannot be shared out as {shares}; "
                f"choose a multiple of {sum(shares)} and heads that divide {widths[0]}."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, channels, kernel_init=init, **types)
        group = partial(
            Group, bias=self.qkv_bias, attention_dropout=self.attention_dropout, **types
        )
        query = dense(use_bias=self.qkv_bias, name="query")(x)
        query = constrain(query, "batch", "height", "width", "channels")

        reduce = nn.Conv(
            thin, (r, r), strides=r, padding="VALID", kernel_init=conv_init, name="reduce", **types
        )
        tokens = LayerNorm(epsilon=1e-5, name="reduce_norm", **types)(reduce(x[..., :thin]))
        out = [
            group(1, mix=False, name="global")(query[..., None, :thin], tokens[..., None, :], train)
        ]
        local = DepthwiseConv(kernel_init=depthwise_init, name="local_conv", **types)(x[..., thin:])
        local = nn.Dense(channels - thin, kernel_init=conv_init, name="local_mix", **types)(local)
        queries = jnp.split(query[..., thin:].reshape(*size, self.num_heads, -1), len(widths), -1)
        for i, part in enumerate(jnp.split(local, len(widths), -1)):
            tokens = pool_windows(part, self.num_heads, r if i else 1)
            tokens = tokens.reshape(size[0], WINDOW, WINDOW, *tokens.shape[2:])
            out.append(
                group(self.num_heads, mix=True, name=f"local_{i}")(queries[i], tokens, train)
            )
        x = dense(name="out")(jnp.concatenate(out, -1))
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class FaViT(ImageClassifier):
    """FaViT classifier.

    Attributes:
      image_size: of `example_inputs`; images of other sizes are taken too (see above).
      sr_ratios: r of each stage.
      epsilon: of the norms in blocks and behind stages.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, ...] = (8.0, 6.0, 4.0, 4.0)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    qkv_bias: bool = True
    epsilon: float = 1e-6
    attention_dropout: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid."""
        self.check_images(images)
        self.check_channels(images.shape)
        types = self.types
        out = {}
        x = images
        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        of_stages = (self.embed_dims, rates, self.num_heads, self.sr_ratios, self.mlp_ratios)
        for i, (dim, stage_rates, heads, r, ratio) in enumerate(zip(*of_stages, strict=True)):
            size, stride = (3, 2) if i else (7, 4)
            x = nn.Conv(
                dim,
                (size, size),
                strides=stride,
                padding=size // 2,
                kernel_init=conv_init,
                name=f"embed_{i}",
                **types,
            )(x)
            x = LayerNorm(epsilon=1e-5, name=f"embed_norm_{i}", **types)(x)
            out[f"patch_embed{i + 1}"] = x
            attention = partial(
                FactorizedAttention,
                heads,
                r,
                self.qkv_bias,
                self.attention_dropout,
                self.dropout,
                name="attention",
                **types,
            )
            sizes = (int(dim * ratio), self.dropout, init, depthwise_init)
            make = partial(block, attention, partial(ConvMlp, *sizes, name="mlp", **types), **types)
            make = partial(make, epsilon=self.epsilon)
            blocks = tuple(partial(make, drop_path=rate) for rate in stage_rates)
            x, _ = Stage(blocks, name=f"stages_{i}")(x, train)
            x = out[f"stage{i + 1}"] = LayerNorm(self.epsilon, name=f"norm_{i}", **types)(x)
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out


# ---------------------------------------------------------------------------- checkpoints


def _key_value(theirs: str, ours: str) -> list[Rule]:
    """One linear map of theirs that gives keys, then values."""
    both = (f"{ours}/key", f"{ours}/value")
    return [
        Rule(f"{theirs}.weight", tuple(f"{o}/kernel" for o in both), chain(linear, split(1))),
        Rule(f"{theirs}.bias", tuple(f"{o}/bias" for o in both), split(0)),
    ]


def _rules() -> list[Rule]:
    theirs, ours = "block{s+1}.{b}.attn", "stages_{s}/layers_{b}/attention"
    mlp, our_mlp = "block{s+1}.{b}.mlp", "stages_{s}/layers_{b}/mlp"
    rules = [
        *conv_rules("patch_embed{s+1}.proj", "embed_{s}"),
        *norm_rules("patch_embed{s+1}.norm", "embed_norm_{s}"),
        *norm_rules("block{s+1}.{b}.norm1", "stages_{s}/layers_{b}/norm1"),
        *norm_rules("block{s+1}.{b}.norm2", "stages_{s}/layers_{b}/norm2"),
        *dense_rules(f"{theirs}.q", f"{ours}/query"),
        *conv_rules(f"{theirs}.sr", f"{ours}/reduce"),
        *norm_rules(f"{theirs}.norm", f"{ours}/reduce_norm"),
        *_key_value(f"{theirs}.kv_g", f"{ours}/global"),
        *conv_rules(f"{theirs}.local_conv_g", f"{ours}/global/pos_conv"),
        *conv_rules(f"{theirs}.kv_l.depth_conv", f"{ours}/local_conv"),
        Rule(
            f"{theirs}.kv_l.point_conv.weight",
            f"{ours}/local_mix/kernel",
            chain(squeeze((2, 3)), linear),
        ),
        Rule(f"{theirs}.kv_l.point_conv.bias", f"{ours}/local_mix/bias"),
        *dense_rules(f"{theirs}.fcs.{{i}}", f"{ours}/local_{{i}}/mix"),
        *_key_value(f"{theirs}.single_heads.{{i}}", f"{ours}/local_{{i}}"),
        *conv_rules(f"{theirs}.local_convs.{{i}}", f"{ours}/local_{{i}}/pos_conv"),
        *dense_rules(f"{theirs}.proj", f"{ours}/out"),
        *dense_rules(f"{mlp}.fc1", f"{our_mlp}/up"),
        *conv_rules(f"{mlp}.dwconv.dwconv", f"{our_mlp}/conv"),
        *dense_rules(f"{mlp}.fc2", f"{our_mlp}/down"),
        *norm_rules("norm{s+1}", "norm_{s}"),
        *dense_rules("head", "head"),
    ]
    return rules


LAYOUTS = {"official": Rules(tuple(_rules()), fresh=("head/kernel", "head/bias"))}

# ------------------------------------------------------------------------------- variants

_SOURCE = {
    "paper": "Factorization Vision Transformer, arXiv 2312.08614",
    "code": "github.com/q2479036243/FaViT",
    "licence": "none: no published weights",
}


def _variant(
    name: str,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    params: int,
    gflops: float,
    top1: float,
) -> tuple[str, Variant]:
    return f"favit_{name}", Variant(
        module=FaViT,
        fields={"embed_dims": dims, "depths": depths, "drop_path": 0.1},
        task="image_classification",
        params=params,
        flops=gflops * 1e9,
        metric=f"ImageNet-1K top-1 {top1} %",
        preprocessing=Preprocessing(),
        **_SOURCE,
    )


VARIANTS = dict(
    (
        _variant("b0", (32, 64, 128, 256), (2, 2, 6, 2), 3_427_704, 0.6, 71.5),
        _variant("b1", (64, 128, 256, 512), (2, 2, 6, 2), 12_958_568, 2.4, 79.4),
        _variant("b2", (64, 128, 256, 512), (2, 3, 18, 3), 24_919_896, 4.5, 82.3),
        _variant("b3", (96, 192, 384, 768), (2, 3, 14, 3), 48_746_440, 8.5, 83.4),
    )
) | {
    "favit_test": Variant(
        module=FaViT,
        fields={
            "image_size": (64, 64),
            "num_classes": 10,
            "embed_dims": (32, 32, 32),
            "depths": (1, 1, 1),
            "num_heads": (1, 2, 2),
            "mlp_ratios": (2.0, 2.0, 2.0),
            "sr_ratios": (2, 2, 1),
        },
        task="image_classification",
        preprocessing=Preprocessing(crop=1.0),
        **_SOURCE,
    )
}

# Of each head alike, so small: whole on every device.
PARTITION = {
    r".*/(global|local_\d)/(key|value)/kernel": (None, None),
    r".*/(global|local_\d)/(key|value)/bias": (None,),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
