"""Varied-size window attention (VSA), and ViTAEv2 with it: windows that move and scale, per head.

Zhang et al., "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022, arXiv
2204.08446; the network is that of "ViTAEv2", arXiv 2202.10108. Official code:
github.com/ViTAE-Transformer/ViTAE-VSA (no licence file; the links to its weights are empty), which
we follow. Its Swin with VSA was never published: see `vsa_swin`.

A map is cut into w x w windows, completed with zeros below and on the right. The queries of a
window are its own tokens; its keys and values are read, per head, at w x w points between pixels:

    (o, s) = linear(LeakyReLU(mean of x over the window))                 o, s: [heads, (x, y)]
    point of column j:  centre + (j - (w-1)/2) (1 + s_x) + o_x / floor(W/w) * (W'-1)/2   (pixels)
    VSA = softmax(q k(points)^T * scale + B[h]) v(points)

and rows alike; W is the width of the map and W' the completed one. Points are bilinear, zeros lie
outside. With o = s = 0 this is attention in plain windows. The code's scale is (C_in / heads)^-1/2,
also where C_in is not the width of queries and keys, and so is ours.

    reduction:  t = [GELU(dilated convolutions of x)];  t = t + dwconv7x7(t)
                x = VSA(LN(t)) + local(x);                    x = x + MLP(LN(x))
    normal:     x = x + VSA(LN(x + dwconv7x7(x))) + local(x);  x = x + MLP(LN(x))
    local:      three 3x3 convolutions, BatchNorm and SiLU between

As in the code, reductions have no stochastic depth, the rates of stage i start at the rate of the
block number (depth of stage i - 1), and there is no norm before the head. Its third window size
(`ViTAEv2_VSA_widePCM_B_ws12`) cannot be built there and is left out.

    features         ViTAEv2_VSA_S
    reduce1          56  56   64    four dilations of 7x7 convolutions, stride 4
    stage1           56  56   64    2 normal cells
    reduce2          28  28  128    three dilations of 3x3 convolutions, stride 2
    stage2           28  28  128    2 normal cells; stride 8
    reduce3          14  14  256    two dilations
    stage3           14  14  256    8 normal cells; stride 16
    reduce4           7   7  512    two dilations
    stage4            7   7  512    2 normal cells; stride 32
    pooled                   512    mean over the map
    logits                  1000
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
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
    squeeze,
)
from zoo.layers.attention import attention_weights
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import DepthwiseConv
from zoo.layers.dense import Dense
from zoo.layers.hierarchy import Stage
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.position import relative_position_index
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.layers.window import pad_to_multiple, position_bias, window_merge, window_partition
from zoo.system import Preprocessing, System, Variant

init = nn.initializers.truncated_normal(0.02)


# ------------------------------------------------------------------------------ attention


def sample_points(
    regressed: Float[Array, "batch rows columns heads 2"],
    scales: Float[Array, "batch rows columns heads 2"],
    size: tuple[int, int],
    window: int,
) -> tuple[
    Float[Array, "batch heads rows columns window"], Float[Array, "batch heads rows columns window"]
]:
    """Where each window of each head reads a map of `size`: its rows and its columns, in pixels.

    Args:
      regressed: offsets as regressed, x before y; they are divided by the windows across the map.
      scales: added to 1, x before y.
      size: of the map, before it is completed to whole windows.
      window: its side in tokens.
    """
    steps = jnp.arange(window) - (window - 1) / 2
    points = []
    for axis, component in ((0, 1), (1, 0)):
        count = regressed.shape[1 + axis]
        shift = regressed[..., component] / (size[axis] // window) * (count * window - 1) / 2
        where = jnp.arange(count) * window + (window - 1) / 2
        centre = where[:, None, None] if axis == 0 else where[:, None]
        stretch = 1 + scales[..., component]
        at = (centre + shift)[..., None] + stretch[..., None] * steps
        points.append(rearrange(at, "b m n h j -> b h m n j"))
    return points[0], points[1]


def sample_windows(
    maps: Float[Array, "batch height width heads channels"],
    rows: Float[Array, "batch heads rows columns window"],
    columns: Float[Array, "batch heads rows columns window"],
) -> Float[Array, "batch heads rows columns window window channels"]:
    """Bilinear values of the maps at `rows` x `columns` of each window; zeros outside."""
    _, height, width, _, _ = maps.shape
    flat = rearrange(maps, "b y x h c -> b h (y x) c")

    def taps(at: Array, length: int) -> list[tuple[Array, Array]]:
        """The two pixels around each point and their weights."""
        first = jnp.floor(at)
        part = at - first
        pixels = first.astype(jnp.int32)
        return [
            (jnp.clip(p, 0, length - 1), jnp.where((p >= 0) & (p < length), weight, 0.0))
            for p, weight in ((pixels, 1 - part), (pixels + 1, part))
        ]

    total = jnp.zeros((), jnp.float32)
    for y, of_y in taps(rows, height):
        for x, of_x in taps(columns, width):
            index = y[..., :, None] * width + x[..., None, :]
            here = jnp.take_along_axis(
                flat, index.reshape(*index.shape[:2], -1, 1), axis=2, mode="clip"
            )
            weight = of_y[..., :, None] * of_x[..., None, :]
            total = total + here.reshape(*index.shape, -1) * weight[..., None]
    return total.astype(maps.dtype)


class VariedSizeWindowAttention(Model):
    """Attention of windows to keys and values sampled where the window regresses (see above).

    When the `intermediates` collection is mutable it sows `attention`, and `regressed_offsets` and
    `regressed_scales`, both `[batch, rows, columns, heads, 2]`, x before y.

    Attributes:
      in_channels: of the map that comes in.
      channels: of the map that goes out.
      window_size: w, in tokens.
      zero_init: start from plain windows. The code has such a method and never calls it.
      scale: factor on q k^T; None is 1 / sqrt(in_channels / num_heads).

    Raises:
      ValueError: if the map has other channels, or is smaller than a window.
    """

    in_channels: int
    channels: int
    num_heads: int
    window_size: int = 7
    zero_init: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    qkv_bias: bool = True
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """A map of one window."""
        shape = (batch_size, self.window_size, self.window_size, self.in_channels)
        return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        (height, width), w, heads = x.shape[1:3], self.window_size, self.num_heads
        if min(height, width) < w or x.shape[3] != self.in_channels:
            raise ValueError(
                f"This attention takes maps of {self.in_channels} channels, not smaller than a "
                f"{w}x{w} window; got {height}x{width} with {x.shape[3]}. Choose larger images or "
                "a smaller window_size."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=torch_default_init, **types)
        qkv = dense(3 * self.channels, use_bias=self.qkv_bias, name="qkv")(x)
        qkv = pad_to_multiple(qkv, w, w)
        size = qkv.shape[1:3]
        query, keys_and_values = qkv[..., : self.channels], qkv[..., self.channels :]

        rows, columns = sample_points(*self._regress(x), (height, width), w)
        maps = rearrange(keys_and_values, "b y x (k h d) -> b y x h (k d)", k=2, h=heads)
        sampled = sample_windows(maps, rows, columns)
        sampled = rearrange(sampled, "b h m n i j (k d) -> k (b m n) (i j) h d", k=2)
        query = window_partition(query, (w, w)).reshape(-1, w * w, heads, self.channels // heads)

        shape = ((2 * w - 1) ** 2, heads)
        table = self.param("relative_position_bias", init, shape, self.param_dtype)
        bias = position_bias(table, (w, w))
        y = self._attend(query, sampled[0], sampled[1], bias, train)
        y = window_merge(y.reshape(-1, w * w, self.channels), size, (w, w))[:, :height, :width]
        y = dense(self.channels, name="out")(y)
        return nn.Dropout(self.dropout)(y, deterministic=not train)

    def _regress(self, x: Array) -> tuple[Array, Array]:
        """Offsets and scales of each window and head, in float32: they count pixels."""
        w = self.window_size
        x = pad_to_multiple(x.astype(jnp.float32), w, w)
        pooled = rearrange(x, "b (m i) (n j) c -> b m n (i j) c", i=w, j=w).mean(3)
        pooled = nn.leaky_relu(pooled, 0.01)
        start = nn.initializers.zeros if self.zero_init else torch_default_init
        both = []
        for name in ("offsets", "scales"):
            layer = Dense(
                2 * self.num_heads, kernel_init=start, param_dtype=self.param_dtype, name=name
            )
            value = layer(pooled).reshape(*pooled.shape[:3], self.num_heads, 2)
            self.sow("intermediates", f"regressed_{name}", value)
            both.append(value)
        return both[0], both[1]

    def _attend(self, query: Array, key: Array, value: Array, bias: Array, train: bool) -> Array:
        scale = self.scale or (self.in_channels // self.num_heads) ** -0.5
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, bias=bias[None], scale=scale)
            self.sow("intermediates", "attention", weights)
        if train and self.attention_dropout > 0:
            return kernels_pallas.attention(
                query,
                key,
                value,
                bias=bias[None],
                scale=scale,
                dropout=self.attention_dropout,
                rng=self.make_rng("dropout"),
            )
        return kernels_pallas.window_attention(query, key, value, bias=bias, scale=scale)


# ---------------------------------------------------------------------------------- cells


class LocalBranch(nn.Module):
    """Three 3x3 convolutions, BatchNorm and SiLU between (the code's PCM).

    Attributes:
      widths: channels after each.
      strides: of each.
      groups: of each.
    """

    widths: tuple[int, int, int]
    strides: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch rows columns channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True), 1):
            x = nn.Conv(
                width,
                (3, 3),
                strides=stride,
                padding=1,
                feature_group_count=self.groups,
                kernel_init=torch_default_init,
                name=f"conv{i}",
                **types,
            )(x)
            if i < 3:
                norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=f"norm{i}", **types)
                x = nn.silu(norm(x, use_running_average=not train))
        return x


class ReductionCell(nn.Module):
    """Dilated convolutions that shrink the map, attention among them, and a local branch.

    Attributes:
      channels: of the map that goes out.
      width: channels of each dilated convolution.
      ratio: the map shrinks by it, 2 or 4.
      size: of the dilated kernels.
      local_width: channels inside the local branch.
    """

    channels: int
    width: int
    ratio: int
    size: int
    dilations: tuple[int, ...]
    num_heads: int
    groups: int
    local_width: int
    has_pos_conv: bool = True
    window_size: int = 7
    zero_init: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch height/ratio width/ratio channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        branches = []
        for i, dilation in enumerate(self.dilations):
            edge = math.ceil(((self.size - 1) * dilation + 1 - self.ratio) / 2)
            branches.append(
                nn.Conv(
                    self.width,
                    (self.size, self.size),
                    strides=self.ratio,
                    padding=edge,
                    kernel_dilation=dilation,
                    kernel_init=torch_default_init,
                    name=f"branches_{i}",
                    **types,
                )(x)
            )
        t = gelu(jnp.concatenate(branches, -1))
        t = t + DepthwiseConv(7, name="pos_conv", **types)(t) if self.has_pos_conv else t
        t = LayerNorm(epsilon=1e-5, name="norm1", **types)(t)
        widths = (self.local_width, self.local_width, self.channels)
        strides = (2, 2 if self.ratio == 4 else 1, 1)
        local = LocalBranch(widths, strides, self.groups, name="local", **types)(x, train)
        x = _attention(self, t.shape[-1], self.channels)(t, train) + local
        y = LayerNorm(epsilon=1e-5, name="norm2", **types)(x)
        mlp = Mlp(self.channels, dropout=self.dropout, kernel_init=init, name="mlp", **types)
        return constrain(x + mlp(y, train), "batch", "height", "width", "channels")


class NormalCell(nn.Module):
    """Attention and a local branch side by side, then an MLP."""

    num_heads: int
    groups: int
    has_pos_conv: bool = True
    window_size: int = 7
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        hidden = int(channels * self.mlp_ratio)
        t = x + DepthwiseConv(7, name="pos_conv", **types)(x) if self.has_pos_conv else x
        t = LayerNorm(epsilon=1e-6, name="norm1", **types)(t)
        t = _attention(self, channels, channels)(t, train)
        widths = (hidden, channels, channels)
        local = LocalBranch(widths, groups=self.groups, name="local", **types)(x, train)
        x = x + DropPath(self.drop_path)(t, train) + DropPath(self.drop_path)(local, train)
        y = LayerNorm(epsilon=1e-6, name="norm2", **types)(x)
        mlp = Mlp(hidden, dropout=self.dropout, kernel_init=init, name="mlp", **types)
        x = x + DropPath(self.drop_path)(mlp(y, train), train)
        return constrain(x, "batch", "height", "width", "channels")


def _attention(
    cell: ReductionCell | NormalCell, in_channels: int, channels: int
) -> VariedSizeWindowAttention:
    return VariedSizeWindowAttention(
        in_channels,
        channels,
        cell.num_heads,
        cell.window_size,
        cell.zero_init,
        cell.dropout,
        cell.attention_dropout,
        name="attention",
        dtype=cell.dtype,
        param_dtype=cell.param_dtype,
    )


class ViTAEv2VSA(ImageClassifier):
    """ViTAEv2 classifier with varied-size windows in every cell.

    Attributes:
      image_size: height and width in pixels, multiples of the product of `ratios`; the last map
        must not be smaller than a window. Windows need not tile the maps.
      embed_dims: channels of each dilated convolution, per stage.
      token_dims: channels of each stage.
      ratios: by which reductions shrink the map.
      sizes: of the kernels of dilated convolutions.
      dilations: of each stage.
      depths: normal cells of each stage.
      num_heads: of normal cells.
      reduction_heads: of reductions.
      groups: of the local branches of normal cells.
      reduction_groups: of the local branches of reductions.
      wide_local: local branches of reductions are 2 token_dims wide inside, not embed_dims.
      has_pos_conv: a convolution of each channel alone before attention.
      zero_init: windows start as plain ones.
      drop_path: stochastic depth of the last block, were the rates not reused (see above).
      remat: recompute normal cells in the backward pass instead of keeping their activations; True,
        or what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    embed_dims: tuple[int, ...] = (64, 64, 128, 256)
    token_dims: tuple[int, ...] = (64, 128, 256, 512)
    ratios: tuple[int, ...] = (4, 2, 2, 2)
    sizes: tuple[int, ...] = (7, 3, 3, 3)
    dilations: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    reduction_heads: tuple[int, ...] = (2, 4, 8, 16)
    groups: tuple[int, ...] = (1, 32, 64, 128)
    reduction_groups: tuple[int, ...] = (1, 16, 32, 64)
    wide_local: bool = True
    has_pos_conv: bool = True
    window_size: int = 7
    mlp_ratio: float = 4.0
    zero_init: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid."""
        self.check_images(images)
        size, stride = self.image_size, math.prod(self.ratios)
        if images.shape[1:] != (*size, self.in_channels) or size[0] % stride or size[1] % stride:
            raise ValueError(
                f"This ViTAEv2 takes images of shape (batch, {size[0]}, {size[1]}, "
                f"{self.in_channels}), not {images.shape}; resize them, or create the model with "
                f"another image_size, of multiples of {stride}."
            )
        types = self.types
        shared = {
            "has_pos_conv": self.has_pos_conv,
            "window_size": self.window_size,
            "zero_init": self.zero_init,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            **types,
        }
        cell = remat_block(NormalCell, self.remat, static_argnums=(2,))
        rates = np.linspace(0.0, self.drop_path, sum(self.depths)).tolist()
        out = {}
        x = images.astype(self.dtype)
        for i, (channels, depth) in enumerate(zip(self.token_dims, self.depths, strict=True)):
            x = out[f"reduce{i + 1}"] = ReductionCell(
                channels,
                self.embed_dims[i],
                self.ratios[i],
                self.sizes[i],
                self.dilations[i],
                self.reduction_heads[i],
                self.reduction_groups[i],
                2 * channels if self.wide_local else self.embed_dims[i],
                name=f"reduce_{i}",
                **shared,
            )(x, train)
            first = self.depths[i - 1] if i else 0
            normal = partial(
                cell, self.num_heads[i], self.groups[i], mlp_ratio=self.mlp_ratio, **shared
            )
            cells = tuple(partial(normal, drop_path=r) for r in rates[first : first + depth])
            x, _ = Stage(cells, name=f"stages_{i}")(x, train)
            out[f"stage{i + 1}"] = x
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out


# ---------------------------------------------------------------------------- checkpoints


def index_table(model: nn.Module, **_: int) -> np.ndarray:
    """What files hold as `relative_position_index`."""
    return relative_position_index((model.window_size,) * 2)


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Of one attention; both prefixes are empty or end like a path."""
    rules = [Rule(f"{theirs}relative_position_bias_table", f"{ours}relative_position_bias")]
    for a, b in (
        ("sampling_offsets.2", "offsets"),
        ("sampling_scales.2", "scales"),
        ("qkv", "qkv"),
        ("proj", "out"),
    ):
        matrix = chain(squeeze((2, 3)), linear)
        rules += [
            Rule(f"{theirs}{a}.weight", f"{ours}{b}/kernel", matrix),
            Rule(f"{theirs}{a}.bias", f"{ours}{b}/bias"),
        ]
    return rules


def _cell_rules(theirs: str, ours: str) -> list[Rule]:
    rules = [
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *conv_rules(f"{theirs}.pos", f"{ours}/pos_conv"),
        *attention_rules(f"{theirs}.attn.", f"{ours}/attention/"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
    ]
    for number, name in ((0, "conv1"), (3, "conv2"), (6, "conv3")):
        rules += [
            *conv_rules(f"{theirs}.PCM.{number}", f"{ours}/local/{name}"),
        ]
    for number, name in ((1, "norm1"), (4, "norm2")):
        statistics = f"batch_stats/{ours}/local/{name}"
        rules += [
            *norm_rules(f"{theirs}.PCM.{number}", f"{ours}/local/{name}"),
            Rule(f"{theirs}.PCM.{number}.running_mean", f"{statistics}/mean"),
            Rule(f"{theirs}.PCM.{number}.running_var", f"{statistics}/var"),
        ]
    return rules


def _no_batches(model: nn.Module, **_: int) -> np.ndarray:
    return np.zeros((), np.int64)


_REDUCTION, _NORMAL = "layers.{s}.RC", "layers.{s}.NC.{b}"

LAYOUTS = {
    "official": Rules(
        (
            *conv_rules(f"{_REDUCTION}.PRM.convs.{{k}}.0", "reduce_{s}/branches_{k}"),
            *_cell_rules(_REDUCTION, "reduce_{s}"),
            *_cell_rules(_NORMAL, "stages_{s}/layers_{b}"),
            *dense_rules("head", "head"),
        ),
        derived={
            f"{cell}.{name}": make
            for cell in (_REDUCTION, _NORMAL)
            for name, make in (
                ("attn.relative_position_index", index_table),
                ("PCM.1.num_batches_tracked", _no_batches),
                ("PCM.4.num_batches_tracked", _no_batches),
            )
        },
        fresh=("head/kernel", "head/bias"),
    ),
    "attention": Rules(
        tuple(attention_rules("", "")), derived={"relative_position_index": index_table}
    ),
}

# ------------------------------------------------------------------------------- variants

_SOURCE = {
    "task": "image_classification",
    "paper": "VSA: Learning Varied-Size Window Attention, arXiv 2204.08446",
    "code": "github.com/ViTAE-Transformer/ViTAE-VSA",
    "licence": "none: no published weights",
}


def _wide(width: int, depth: int, drop_path: float, **about) -> Variant:
    """A size by its first width and the depth of its third stage; heads are 32 wide."""
    fields = {
        "embed_dims": (width, width, 2 * width, 4 * width),
        "token_dims": (width, 2 * width, 4 * width, 8 * width),
        "depths": (2, 2, depth, 2),
        "num_heads": (heads := tuple(width * 2**i // 32 for i in range(4))),
        "reduction_heads": heads,
        "drop_path": drop_path,
    }
    return Variant(
        module=ViTAEv2VSA, fields=fields, preprocessing=Preprocessing(crop=0.9), **about, **_SOURCE
    )


VARIANTS = {
    "ViTAEv2_VSA_S": Variant(
        module=ViTAEv2VSA,
        fields={"wide_local": False, "reduction_heads": (2, 2, 4, 8)},
        params=19_773_300,
        metric="82.7 % top-1, ImageNet-1K",
        preprocessing=Preprocessing(crop=0.9),
        **_SOURCE,
    ),
    "ViTAEv2_VSA_widePCM_S": _wide(64, 8, 0.1, params=20_342_442),
    "ViTAEv2_VSA_widePCM_48M": _wide(
        96, 11, 0.25, params=51_089_119, metric="83.9 % top-1, ImageNet-1K"
    ),
    "ViTAEv2_VSA_widePCM_B": _wide(
        128, 12, 0.1, metric="86.2 % top-1, ImageNet-1K, after ImageNet-22K"
    ),
    "vitaev2_vsa_test": Variant(
        module=ViTAEv2VSA,
        fields={
            "image_size": (32, 32),
            "num_classes": 10,
            "embed_dims": (8, 8),
            "token_dims": (16, 32),
            "ratios": (4, 2),
            "sizes": (7, 3),
            "dilations": ((1, 2), (1, 2)),
            "depths": (1, 1),
            "num_heads": (2, 4),
            "reduction_heads": (2, 4),
            "groups": (1, 4),
            "reduction_groups": (1, 2),
            "window_size": 3,
            "mlp_ratio": 2.0,
            "drop_path": 0.0,
        },
        preprocessing=Preprocessing(crop=1.0),
        **_SOURCE,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
