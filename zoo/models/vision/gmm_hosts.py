"""Gaussian-mixture masks (see `gmm_vit`) in hosts with windows, talking heads and neighbourhoods.

From the same paper and code. Swin: A is that of a window, and multiplies the scores before Swin's
bias and mask are added. CaiT: A multiplies before the heads are mixed, in the blocks of patches;
the class token's attention has none. `gmm_dinat` is ours: neighbourhood attention in Swin's
skeleton, as in DiNAT_s, computed densely and meant for small maps. PiT and T2T are in
`gmm_pyramids`. Swin has the published 7.1 M parameters; of CaiT it is `gmm_cait_tiny`, 108
wide as their `cait-tiny`, that has the published 5.1 M.

    features         gmm_swin
    patch_embed      16  16   96    2x2 patches, linear, LayerNorm; stride 2
    stage1           16  16   96
    downsample1       8   8  192
    stage2            8   8  192    stride 4
    downsample2       4   4  384
    stage3            4   4  384    stride 8
    norm              4   4  384
    pooled                   384
    logits                    10
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    concat,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    split,
    squeeze,
)
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.dense import Dense
from zoo.layers.hierarchy import PatchMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.patch import PatchEmbed
from zoo.layers.position import relative_position_index
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.layers.window import (
    fit_window,
    pad_map,
    position_bias,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from zoo.models.vision.gmm_vit import (
    GridAttention,
    LayerNorm,
    MaskedAttention,
    block_mlp,
    end_rules,
    gmm_variant,
    grid_distances,
    init,
    layout,
    mask_rules,
    masked_attention,
    mlp_rules,
    num_patches,
    patch_rules,
    unit_init,
)
from zoo.system import System

table_init = nn.initializers.normal(0.02)


class ShiftedWindows(nn.Module):
    """Swin's: attention inside windows, with a bias for each offset, and a mask where shifted."""

    attention: Callable[..., MaskedAttention]
    window_size: int
    shifted: bool
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        size = x.shape[1:3]
        side, shift = fit_window(size, self.window_size, self.shifted)
        if size[0] % side or size[1] % side:
            raise ValueError(
                f"A map of {size[0]}x{size[1]} tokens cannot be cut into {side}x{side} windows; "
                "choose an image size or window size that fits every stage."
            )
        window = (side, side)
        attention = self.attention(name="attention")
        shape = ((2 * side - 1) ** 2, attention.num_heads)
        table = self.param("relative_position_bias", table_init, shape, self.param_dtype)
        bias = position_bias(table, window)[None]
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
            bias = bias + shifted_window_mask(size, window, (shift, shift))[:, None]
        x = attention(window_partition(x, window), grid_distances(window), bias, train)
        x = window_merge(x, size, window)
        return jnp.roll(x, (shift, shift), (1, 2)) if shift else x


class Neighborhoods(nn.Module):
    """DiNAT's: each position attends to its neighbours, with a bias for each offset."""

    attention: Callable[..., MaskedAttention]
    kernel_size: int
    dilation: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        _, *size, channels = x.shape
        reach, span = self.kernel_size - 1, self.kernel_size * self.dilation
        padded = pad_map(x, span, span)
        grid = padded.shape[1:3]
        tokens = np.arange(grid[0] * grid[1])
        sees = kernels_pallas.Neighborhood(grid, self.kernel_size, self.dilation)
        visible = np.asarray(sees(tokens[:, None], tokens))
        attention = self.attention(name="attention")
        shape = (attention.num_heads, 2 * reach + 1, 2 * reach + 1)
        table = self.param("relative_position_bias", table_init, shape, self.param_dtype)
        at = np.stack(np.unravel_index(tokens, grid), -1)
        offset = (at - at[:, None]) // self.dilation * visible[..., None] + reach
        bias = jnp.where(visible, table[:, offset[..., 0], offset[..., 1]], -1e30)[None]
        x = attention(padded.reshape(x.shape[0], -1, channels), grid_distances(grid), bias, train)
        return x.reshape(padded.shape)[:, : size[0], : size[1]]


# --------------------------------------------------------------------------------- models


class ClassBlock(nn.Module):
    """CaiT's: the class token alone attends to the patches; heads are mixed, nothing is masked."""

    num_heads: int
    head_dim: int
    hidden: int
    layer_scale: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        token: Float[Array, "batch 1 channels"],
        patches: Float[Array, "batch patches channels"],
    ) -> Float[Array, "batch 1 channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        inner, channels = self.num_heads * self.head_dim, token.shape[-1]
        y = LayerNorm(name="norm1", **types)(token)
        query, key, value = (
            dense(inner, use_bias=False, name=name)(t).reshape(
                t.shape[0], -1, self.num_heads, self.head_dim
            )
            for name, t in (("query", y), ("key", patches), ("value", patches))
        )
        square = (self.num_heads,) * 2
        mix = tuple(
            self.param(name, unit_init, square, self.param_dtype)
            for name in ("mix_before", "mix_after")
        )
        y = masked_attention(query, key, value, mix=mix)[0].reshape(token.shape[0], 1, inner)
        y = dense(channels, name="out")(y)
        start = nn.initializers.constant(self.layer_scale)
        scales = (
            self.param(name, start, (channels,), self.param_dtype).astype(self.dtype)
            for name in ("layer_scale1", "layer_scale2")
        )
        token = token + y * next(scales)
        y = LayerNorm(name="norm2", **types)(token)
        return token + Mlp(self.hidden, kernel_init=init, name="mlp", **types)(y) * next(scales)


class GmmCaiT(ImageClassifier):
    """CaiT with masked attention of patches: talking heads, layer scale, class attention behind.

    Attributes:
      class_depth: blocks in which the class token reads the patches.
      hidden: width of the MLPs.
      drop_path: stochastic depth of the blocks of patches, the same for all.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 4
    num_classes: int = 10
    embed_dim: int = 192
    depth: int = 24
    class_depth: int = 2
    num_heads: int = 4
    head_dim: int = 64
    hidden: int = 384
    mask: str | None = "gaussian"
    kernels: int = 5
    underflow: bool = False
    dropout: float = 0.0
    drop_path: float = 0.1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate: those of `GmmViT`, and `class_block0 ...`."""
        self.check_images(images)
        self.check_size(images.shape)
        types = self.types
        out = {}
        x = PatchEmbed(self.embed_dim, self.patch_size, name="embed", **types)(images)
        out["patch_embed"] = x
        shape = (1, x.shape[1] * x.shape[2], self.embed_dim)
        table = self.param("position_embedding", unit_init, shape, self.param_dtype)
        x = x + table.astype(self.dtype).reshape(1, *x.shape[1:])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        attention = partial(
            MaskedAttention,
            self.num_heads,
            self.head_dim,
            self.mask,
            self.kernels,
            self.underflow,
            talking=True,
            dropout=self.dropout,
            **types,
        )
        mixer = partial(GridAttention, attention, name="mixer")
        mlp = block_mlp(self, self.hidden, 1.0)
        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        for i in range(self.depth):
            layer = partial(block, mixer, mlp, _layer_scale(i), drop_path=self.drop_path)
            x = out[f"block{i}"] = layer(name=f"layers_{i}", **types)(x, train)
        patches = x.reshape(x.shape[0], -1, self.embed_dim)
        token = self.param("class_token", unit_init, (1, 1, self.embed_dim), self.param_dtype)
        x = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.embed_dim))
        for i in range(self.class_depth):
            sizes = (self.num_heads, self.head_dim, self.hidden, _layer_scale(i))
            x = ClassBlock(*sizes, name=f"class_layers_{i}", **types)(x, patches)
            out[f"class_block{i}"] = x
        x = out["norm"] = LayerNorm(name="norm", **types)(x[:, 0])
        out["logits"] = self.classify(x, init)
        return out


class GmmSwin(ImageClassifier):
    """Swin's pyramid with masked attention, in shifted windows or in neighbourhoods.

    Attributes:
      window_size: of windows; of neighbourhoods, odd.
      dilations: of each block's neighbourhoods, stage by stage; None: shifted windows.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      patch_norm: LayerNorm in the patch embedding.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 2
    num_classes: int = 10
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 6, 4)
    num_heads: tuple[int, ...] = (3, 6, 12)
    window_size: int = 4
    dilations: tuple[tuple[int, ...], ...] | None = None
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    scale: float | None = None
    patch_norm: bool = True
    mask: str | None = "gaussian"
    kernels: int = 5
    dropout: float = 0.0
    drop_path: float = 0.1

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
        x = LayerNorm(name="embed_norm", **types)(x) if self.patch_norm else x
        out["patch_embed"] = x
        shape = (1, x.shape[1] * x.shape[2], self.embed_dim)
        table = self.param("position_embedding", table_init, shape, self.param_dtype)
        x = x + table.astype(self.dtype).reshape(1, *x.shape[1:])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        for s, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            attention = partial(
                MaskedAttention,
                num_heads,
                x.shape[-1] // num_heads,
                self.mask,
                self.kernels,
                qkv_bias=self.qkv_bias,
                scale=self.scale,
                dropout=self.dropout,
                **types,
            )
            if self.dilations is None:
                kind, choices = ShiftedWindows, [{"shifted": b % 2 == 1} for b in range(depth)]
            else:
                kind, choices = Neighborhoods, [{"dilation": d} for d in self.dilations[s]]
            mixer = partial(
                kind, attention, self.window_size, param_dtype=self.param_dtype, name="mixer"
            )
            layer = partial(block, mlp=block_mlp(self, x.shape[-1], self.mlp_ratio), **types)
            blocks = tuple(
                partial(layer, partial(mixer, **choice), drop_path=rate)
                for choice, rate in zip(choices, rates[s], strict=True)
            )
            last = s == len(self.depths) - 1
            merge = None if last else partial(PatchMerging, **types)
            out[f"stage{s + 1}"], merged = Stage(blocks, merge, name=f"stages_{s}")(x, train)
            if not last:
                x = out[f"downsample{s + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, table_init)
        return out


def _layer_scale(layer: int) -> float:
    """Where CaiT's scales start, by the depth of the layer."""
    return 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6


# ---------------------------------------------------------------------------- checkpoints


def _joined(model: nn.Module) -> Transform:
    inner = model.num_heads * model.head_dim
    return chain(linear, concat(1, (inner, 2 * inner)))


def _cait_block(theirs: str, ours: str, attention: str) -> list[Rule]:
    inside = f"{theirs}.0.fn.fn"
    return [
        Rule(f"{theirs}.0.scale", f"{ours}/layer_scale1", squeeze((0, 1))),
        *norm_rules(f"{theirs}.0.fn.norm", f"{ours}/norm1"),
        Rule(f"{inside}.mix_heads_pre_attn", f"{attention}mix_before"),
        Rule(f"{inside}.mix_heads_post_attn", f"{attention}mix_after"),
        *dense_rules(f"{inside}.to_out.0", f"{attention}out"),
        Rule(f"{theirs}.1.scale", f"{ours}/layer_scale2", squeeze((0, 1))),
        *norm_rules(f"{theirs}.1.fn.norm", f"{ours}/norm2"),
        *mlp_rules(f"{theirs}.1.fn.fn", ours, ("net.0", "net.3")),
    ]


def _cait() -> Rules:
    patch, classes = "patch_transformer.layers.{i}", "cls_transformer.layers.{i}"
    attention, inside = "layers_{i}/mixer/attention", f"{patch}.0.fn.fn"
    both = tuple(f"class_layers_{{i}}/{name}/kernel" for name in ("key", "value"))
    return layout(
        *patch_rules(),
        Rule("cls_token", "class_token"),
        *_cait_block(patch, "layers_{i}", f"{attention}/"),
        Rule(
            (f"{inside}.to_q.weight", f"{inside}.to_kv.weight"), f"{attention}/qkv/kernel", _joined
        ),
        *mask_rules(f"{inside}.mask", f"{attention}/mask"),
        *_cait_block(classes, "class_layers_{i}", "class_layers_{i}/"),
        Rule(f"{classes}.0.fn.fn.to_q.weight", "class_layers_{i}/query/kernel", linear),
        Rule(f"{classes}.0.fn.fn.to_kv.weight", both, chain(linear, split(1))),
        *end_rules("mlp_head.0", "mlp_head.1"),
        tokens=num_patches,
        aliases=f"{inside}.mask.mask",
    )


def _swin() -> Rules:
    theirs, ours = "layers.{s}.blocks.{b}", "stages_{s}/layers_{b}"
    return layout(
        *conv_rules("patch_embed.proj", "embed"),
        *norm_rules("patch_embed.norm", "embed_norm"),
        Rule("absolute_pos_embed", "position_embedding"),
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        Rule(f"{theirs}.attn.relative_position_bias_table", f"{ours}/mixer/relative_position_bias"),
        *dense_rules(f"{theirs}.attn.qkv", f"{ours}/mixer/attention/qkv"),
        *mask_rules(f"{theirs}.attn.mask", f"{ours}/mixer/attention/mask"),
        *dense_rules(f"{theirs}.attn.proj", f"{ours}/mixer/attention/out"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *mlp_rules(f"{theirs}.mlp", ours, ("fc1", "fc2")),
        *norm_rules("layers.{s}.downsample.norm", "stages_{s}/downsample/norm"),
        Rule(
            "layers.{s}.downsample.reduction.weight",
            "stages_{s}/downsample/reduction/kernel",
            linear,
        ),
        *end_rules("norm", "head"),
        tokens=lambda model: model.window_size**2,
        aliases=f"{theirs}.attn.mask.mask",
        **{f"{theirs}.attn.relative_position_index": _index, f"{theirs}.attn_mask": _shift_mask},
    )


def _window(model: GmmSwin, stage: int, shifted: bool) -> tuple[tuple[int, int], int, int]:
    size = tuple(side // (model.patch_size * 2**stage) for side in model.image_size)
    return size, *fit_window(size, model.window_size, shifted)


def _index(model: GmmSwin, s: int, b: int) -> np.ndarray | None:
    if model.dilations is not None:
        return None
    return relative_position_index((_window(model, s, False)[1],) * 2)


def _shift_mask(model: GmmSwin, s: int, b: int) -> np.ndarray | None:
    size, window, shift = _window(model, s, b % 2 == 1)
    if model.dilations is not None or not shift:
        return None
    return shifted_window_mask(size, (window,) * 2, (shift,) * 2)


LAYOUTS = {"cait": _cait(), "swin": _swin()}

# ------------------------------------------------------------------------------- variants

VARIANTS = {
    "gmm_swin": gmm_variant(GmmSwin, "CIFAR-10 top-1 95.39 %"),
    "gmm_cait": gmm_variant(GmmCaiT),
    "gmm_cait_tiny": gmm_variant(GmmCaiT, "CIFAR-10 top-1 95.15 %", embed_dim=108),
    "gmm_dinat": gmm_variant(GmmSwin, window_size=3, dilations=((1, 5), (1, 2) * 3, (1,) * 4)),
    "gmm_hosts_test": gmm_variant(
        GmmSwin, embed_dim=24, depths=(1, 1), num_heads=(2, 4), drop_path=0.0, patch_size=4
    ),
}

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, decay=(r".*mask/(alpha|sigma)", r".*mix_(before|after)")
)
