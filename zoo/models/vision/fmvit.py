"""FMViT, a reconstruction from its abstract: not verified against official code.

Tan, Geng and Xie, "FMViT: A multiple-frequency mixing Vision Transformer", 2023, arXiv 2311.05707.
The official repository, github.com/tany0699/FMViT, holds a licence and no code; the body of the
paper was not at hand either. Sourced is this much: a hybrid of convolutions and attention whose
blocks blend features of high and low frequencies, with gMLP (convolutional multi-group
reparameterization), RLMHSA (lightweight multi-head self-attention, reparameterized) and CFB
(convolutional fusion block). Widths, depths, names of sizes, the order of layers and everything
else are ours, in the manner of such hybrids; no number of parameters and no accuracy of the paper
is claimed.

    layer   sum over g of BN(conv of g groups, x) + BN(x)   =   one convolution once trained
    gMLP    layer(ReLU(layer(x)))
    CFB     x = x + layer(ReLU(BN(grouped 3x3 convolution, x)));   x = x + gMLP(x)
    FMViT   y = ReLU(layer(x));   y = low + bands              low: y averaged over 4 x 4 positions
            x = x + layer([RLMHSA(y) | ReLU(BN(grouped 3x3 convolution, bands))]);  x = x + gMLP(x)

RLMHSA is softmax attention whose keys and values come from a map averaged over p x p positions,
with p = 4, 2, 1 in stages 2 to 4. The bands are y - A2 y and A2 y - A4 y, of averages A over
squares of 2 and 4, and concatenated; with A4 y they sum to y. Normalisation is BatchNorm, there is
no position table, and any image size works: maps round up.

`deploy` gives the form without branches and BatchNorm, whose outputs are the same: a model built
with `deploy=True` and its variables.

    features         fmvit_small
    patch_embed      56  56   64    three 3x3 convolutions; stride 4
    stage1           56  56   64    2 CFB
    downsample1      28  28  128    3x3 convolution of stride 2
    stage2           28  28  128    2 CFB, 1 FMViT block; stride 8
    downsample2      14  14  256
    stage3           14  14  256    4 CFB, 2 FMViT blocks; stride 16
    downsample3       7   7  384
    stage4            7   7  384    1 CFB, 2 FMViT blocks; stride 32
    pooled                   384    mean over the map
    logits                  1000
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, chain, conv, dense_rules, norm_rules, squeeze
from zoo.layers.classifier import ImageClassifier
from zoo.layers.hierarchy import Stage
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.layers.window import pad_to_multiple
from zoo.system import Preprocessing, System, Variant

EPSILON = 1e-5
GROUPS = (1, 2, 4)
FREQUENCIES = (2, 4)  # sides of the squares whose averages part the bands
init = nn.initializers.he_normal()


# ------------------------------------------------------------------------ reparameterization


def grouped_conv(
    x: Float[Array, "batch height width in_channels"], kernel: Array, groups: int, stride: int = 1
) -> Float[Array, "batch rows columns channels"]:
    """Convolution without bias by a kernel `[size, size, in / groups, out]`, or `[in / g, out]`.

    Groups are contiguous blocks of channels; outside the map are zeros.
    """
    if kernel.ndim == 2:
        x = x.reshape(*x.shape[:-1], groups, -1)
        kernel = kernel.reshape(kernel.shape[0], groups, -1)
        y = jnp.einsum("bhwgc,cgd->bhwgd", x, kernel)
        return y.reshape(*y.shape[:3], -1)
    edge = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(edge, edge)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


class RepConv(Model):
    """A sum of convolutions with different groups, each with BatchNorm, that is one convolution.

    Attributes:
      channels: that it gives.
      size: of the kernel, odd; a size of 1 has kernels `[in / groups, channels]`.
      groups: of each branch; the deployed convolution has their greatest common divisor.
      identity: a branch of BatchNorm alone, where as many channels come in as go out.
      deploy: one `kernel` and `bias` instead of branches.
    """

    channels: int
    size: int = 1
    stride: int = 1
    groups: tuple[int, ...] = GROUPS
    identity: bool = True
    deploy: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """A map of as many channels as it gives."""
        return {"x": jax.ShapeDtypeStruct((batch_size, 8, 8, self.channels), jnp.float32)}

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch rows columns channels"]:
        x = x.astype(self.dtype)
        incoming = x.shape[-1]
        for groups in self.groups:
            if incoming % groups or self.channels % groups:
                raise ValueError(
                    f"{incoming} channels to {self.channels} cannot be cut into {groups} groups; "
                    "choose multiples."
                )

        def convolve(name: str, groups: int) -> Array:
            window = (self.size,) * 2 if self.size > 1 else ()
            shape = (*window, incoming // groups, self.channels)
            kernel = self.param(name, init, shape, self.param_dtype)
            return grouped_conv(x, kernel.astype(self.dtype), groups, self.stride)

        if self.deploy:
            y = convolve("kernel", math.gcd(*self.groups))
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), self.param_dtype)
            return y + bias.astype(self.dtype)

        def norm(name: str, x: Array) -> Array:
            layer = nn.BatchNorm(
                momentum=0.9,
                epsilon=EPSILON,
                use_fast_variance=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )
            return layer(x, use_running_average=not train)

        y = sum(norm(f"branch{g}_norm", convolve(f"branch{g}_kernel", g)) for g in self.groups)
        if self.identity and self.stride == 1 and incoming == self.channels:
            y = y + norm("identity_norm", x)
        return y


def merge(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Array]:
    """Kernel and bias of the one convolution that a `RepConv` is in evaluation."""
    kernels = {
        int(found[1]): kernel
        for name, kernel in params.items()
        if (found := re.fullmatch(r"branch(\d+)_kernel", name))
    }
    groups, total, bias = math.gcd(*kernels), 0.0, 0.0

    def scale_and_shift(name: str) -> tuple[Array, Array]:
        norm, known = params[name], statistics[name]
        scale = norm["scale"] / jnp.sqrt(known["var"] + EPSILON)
        return scale, norm["bias"] - known["mean"] * scale

    for g, kernel in kernels.items():
        scale, shift = scale_and_shift(f"branch{g}_norm")
        total, bias = total + scale * regroup(kernel, g, groups), bias + shift
    if "identity_norm" in params:
        scale, shift = scale_and_shift("identity_norm")
        unit = jnp.eye(scale.shape[0], dtype=scale.dtype)
        if total.ndim == 4:
            middle = total.shape[0] // 2
            unit = jnp.zeros((*total.shape[:2], *unit.shape)).at[middle, middle].set(unit)
        total, bias = total + scale * regroup(unit, 1, groups), bias + shift
    return {"kernel": total, "bias": bias}


def regroup(kernel: Float[Array, "*window ins outs"], groups: int, wanted: int) -> Array:
    """A kernel of `groups` groups as one of `wanted`; what lies between these is dropped."""
    *window, ins, outs = kernel.shape
    blocks = kernel.reshape(*window, ins, groups, outs // groups)
    full = jnp.einsum("...igo,gh->...higo", blocks, jnp.eye(groups, dtype=kernel.dtype))
    full = full.reshape(*window, wanted, groups * ins // wanted, wanted, outs // wanted)
    same = jnp.einsum("...giho,gh->...igo", full, jnp.eye(wanted, dtype=kernel.dtype))
    return same.reshape(*window, groups * ins // wanted, outs)


def deploy(model: "FMViT", variables: Mapping[str, Any]) -> tuple["FMViT", dict[str, Any]]:
    """The model without branches and BatchNorm, and its variables; outputs stay the same."""

    def walk(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
        if any(name.startswith("branch") for name in params):
            return merge(params, statistics)
        return {
            name: walk(part, statistics.get(name, {})) if isinstance(part, Mapping) else part
            for name, part in params.items()
        }

    params = walk(variables["params"], variables["batch_stats"])
    return model.clone(deploy=True), {"params": params}


# -------------------------------------------------------------------------------- frequencies


def average(
    x: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch rows columns channels"]:
    """Means over squares; those cut off by the border are means of what is inside."""
    if side == 1:
        return x
    _, height, width, _ = x.shape
    squares = rearrange(
        pad_to_multiple(x, side, side), "b (h p) (w q) c -> b h w (p q) c", p=side, q=side
    )
    inside = [np.minimum(side, n - np.arange(0, n, side)) for n in (height, width)]
    count = inside[0][:, None, None] * inside[1][:, None]
    return (squares.astype(jnp.float32).sum(3) / count).astype(x.dtype)


def frequency_bands(
    x: Float[Array, "batch height width channels"], sides: tuple[int, ...] = FREQUENCIES
) -> list[Float[Array, "batch height width channels"]]:
    """From high to low: what averages over squares of each side take away, then what is left."""
    bands = []
    for side in sides:
        low = average(x, side)
        for axis in (1, 2):
            low = jnp.repeat(low, side, axis)
        low = low[:, : x.shape[1], : x.shape[2]]
        bands, x = [*bands, x - low], low
    return [*bands, x]


# -------------------------------------------------------------------------------- the model


class GroupMlp(nn.Module):
    """Two reparameterized layers with a ReLU between."""

    hidden: int
    deploy: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        how = {"deploy": self.deploy, "dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.relu(RepConv(self.hidden, name="up", **how)(x, train))
        y = constrain(y, "batch", "height", "width", "mlp")
        return RepConv(x.shape[-1], name="down", **how)(y, train)


class LightAttention(nn.Module):
    """RLMHSA: attention to keys and values of a map averaged over `pool` x `pool` positions."""

    num_heads: int
    pool: int
    deploy: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        how = {"deploy": self.deploy, "dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        few = average(x, self.pool)
        query, key, value = (
            RepConv(channels, name=name, **how)(t, train).reshape(
                x.shape[0], -1, self.num_heads, channels // self.num_heads
            )
            for name, t in (("query", x), ("key", few), ("value", few))
        )
        y = kernels_pallas.attention(query, key, value)
        return RepConv(channels, name="out", **how)(y.reshape(x.shape), train)


class FusionBlock(nn.Module):
    """CFB: a grouped convolution and an MLP, each with a residual connection."""

    num_heads: int
    mlp_ratio: float
    drop_path: float = 0.0
    deploy: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        how = {"deploy": self.deploy, "dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        groups = (self.num_heads,)
        local = RepConv(channels, 3, groups=groups, identity=False, name="local", **how)
        y = RepConv(channels, name="out", **how)(nn.relu(local(x, train)), train)
        x = x + DropPath(self.drop_path)(y, train)
        y = GroupMlp(int(channels * self.mlp_ratio), name="mlp", **how)(x, train)
        x = x + DropPath(self.drop_path)(y, train)
        return constrain(x, "batch", "height", "width", "channels")


class FrequencyBlock(nn.Module):
    """FMViT's block: attention on all frequencies, convolution of the bands, and an MLP."""

    num_heads: int
    mlp_ratio: float
    pool: int
    drop_path: float = 0.0
    deploy: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        how = {"deploy": self.deploy, "dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        y = nn.relu(RepConv(channels, name="project", **how)(x, train))
        attention = LightAttention(self.num_heads, self.pool, name="attention", **how)
        groups = (self.num_heads,)
        bands = RepConv(channels, 3, groups=groups, identity=False, name="bands", **how)
        high = nn.relu(bands(jnp.concatenate(frequency_bands(y)[:-1], -1), train))
        y = jnp.concatenate([attention(y, train), high], -1)
        y = RepConv(channels, name="out", **how)(y, train)
        x = x + DropPath(self.drop_path)(y, train)
        y = GroupMlp(int(channels * self.mlp_ratio), name="mlp", **how)(x, train)
        x = x + DropPath(self.drop_path)(y, train)
        return constrain(x, "batch", "height", "width", "channels")


class FMViT(ImageClassifier):
    """FMViT classifier (a reconstruction, see above).

    Attributes:
      image_size: height and width in pixels that `example_inputs` states; others work as well.
      depths: convolutional fusion blocks of each stage.
      mixers: FMViT blocks behind them.
      num_heads: of attention, and groups of the 3x3 convolutions.
      pools: sides of the squares over which keys and values are averaged.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
      deploy: the form for inference; `deploy` of this file makes its variables.
    """

    embed_dims: tuple[int, ...] = (64, 128, 256, 384)
    depths: tuple[int, ...] = (2, 2, 4, 1)
    mixers: tuple[int, ...] = (0, 1, 2, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 12)
    pools: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: float = 3.0
    dropout: float = 0.0
    drop_path: float = 0.1
    deploy: bool = False

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        self._check(images.shape)
        types = self.types
        how = {"deploy": self.deploy, **types}
        whole = partial(RepConv, size=3, groups=(1,), identity=False, **how)
        out, x, width = {}, images, self.embed_dims[0]
        for i, (channels, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 2))):
            x = nn.relu(whole(channels, stride=stride, name=f"embed_{i}")(x, train))
        out["patch_embed"] = x
        total = sum(self.depths) + sum(self.mixers)
        rates = iter(np.linspace(0.0, self.drop_path, total).tolist())
        fusion = remat_block(FusionBlock, self.remat, static_argnums=(2,))
        frequency = remat_block(FrequencyBlock, self.remat, static_argnums=(2,))
        for s, (depth, mixers) in enumerate(zip(self.depths, self.mixers, strict=True)):
            if s:
                step = whole(self.embed_dims[s], stride=2, name=f"downsample_{s - 1}")
                x = out[f"downsample{s}"] = nn.relu(step(x, train))
            both = (self.num_heads[s], self.mlp_ratio)
            makers = [partial(fusion, *both, **how)] * depth
            makers += [partial(frequency, *both, self.pools[s], **how)] * mixers
            blocks = tuple(partial(maker, drop_path=next(rates)) for maker in makers)
            x, _ = Stage(blocks, name=f"stages_{s}")(x, train)
            out[f"stage{s + 1}"] = x
        x = out["pooled"] = x.mean((1, 2))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        if self.num_classes:
            start = nn.initializers.normal(0.02)
            x = nn.Dense(self.num_classes, kernel_init=start, name="head", **types)(x)
        out["logits"] = x
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.in_channels or 0 in shape:
            raise ValueError(
                f"This FMViT takes images of shape (batch, height, width, {self.in_channels}), "
                f"not {shape}."
            )
        per_stage = ("embed_dims", "depths", "mixers", "num_heads", "pools")
        lengths = [len(getattr(self, field)) for field in per_stage]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{', '.join(per_stage)} have {lengths} entries; give one for each stage."
            )


PARTITION = {r".*(query|key|value|up)/branch\d+_kernel": ("channels", "mlp")}

# ---------------------------------------------------------------------------- checkpoints


def _rep(theirs: str, ours: str, size: int) -> list[Rule]:
    """A `RepConv` under names of the kind that such PyTorch code has."""
    kernel = conv if size > 1 else chain(conv, squeeze((0, 1)))
    rules = [
        Rule(f"{theirs}branch{{g}}.conv.weight", f"{ours}branch{{g}}_kernel", kernel),
        Rule(f"{theirs}conv.weight", f"{ours}kernel", kernel),
        Rule(f"{theirs}conv.bias", f"{ours}bias"),
    ]
    for name in ("branch{g}", "identity"):
        norm = f"{theirs}{name}.bn"
        rules += [
            *norm_rules(norm, f"{ours}{name}_norm"),
            Rule(f"{norm}.running_mean", f"batch_stats/{ours}{name}_norm/mean"),
            Rule(f"{norm}.running_var", f"batch_stats/{ours}{name}_norm/var"),
        ]
    return rules


def _model() -> Rules:
    """Names of our own: no file of FMViT is published."""
    rules = [*dense_rules("head", "head")]
    for theirs, ours in (("embed", "embed"), ("merge", "downsample")):
        rules += _rep(f"{theirs}.{{i}}.", f"{ours}_{{i}}/", 3)
    theirs, ours = "stages.{s}.{i}.", "stages_{s}/layers_{i}/"
    for name in ("local", "bands"):
        rules += _rep(f"{theirs}{name}.", f"{ours}{name}/", 3)
    for name in ("project", "out", "mlp.up", "mlp.down"):
        rules += _rep(f"{theirs}{name}.", f"{ours}{name.replace('.', '/')}/", 1)
    for name in ("query", "key", "value", "out"):
        rules += _rep(f"{theirs}attention.{name}.", f"{ours}attention/{name}/", 1)
    return Rules(tuple(rules), fresh=("head/kernel", "head/bias"))


LAYOUTS = {"ours": _model(), "layer": Rules(tuple(_rep("", "", 1)))}

# ------------------------------------------------------------------------------- variants


def _variant(**fields) -> Variant:
    return Variant(
        module=FMViT,
        fields=fields,
        task="image_classification",
        paper="FMViT: A multiple-frequency mixing Vision Transformer, arXiv 2311.05707 "
        "(reconstructed from the abstract)",
        code="none: not verified against official code",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=0.875 if "depths" not in fields else 1.0),
    )


VARIANTS = {
    "fmvit_small": _variant(),
    "fmvit_base": _variant(embed_dims=(96, 192, 384, 512), num_heads=(3, 6, 12, 16)),
    "fmvit_large": _variant(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24)),
    "fmvit_test": _variant(
        image_size=(32, 32),
        num_classes=10,
        embed_dims=(32, 48),
        depths=(1, 0),
        mixers=(0, 1),
        num_heads=(2, 4),
        pools=(4, 2),
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
