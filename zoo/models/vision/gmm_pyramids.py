"""Gaussian-mixture masks (see `gmm_vit`) in hosts that have ever fewer tokens: PiT and T2T.

From the same paper and code, github.com/CatworldLee/Gaussian-Mixture-Mask-Attention.

PiT (Heo et al., arXiv 2103.16302) halves the map between stages with a strided convolution of each
channel, and takes the class token to twice the width by a linear map. A multiplies scores between
patches; those with the class token stay as they are.

T2T (Yuan et al., arXiv 2101.11986) reads overlapping 3x3 neighbourhoods, one every two, as tokens,
twice (three times for images of 64x64), with a layer between, whose skip connection is of the
values. There is no class token here: the mean over patches is read. As the authors wrote it, an
attention of several heads adds its normed input to its output, and the block adds its own input to
that; the width is 256 whatever else is set. The class token and the norm of their token module are
in their files and are never read.

    features         gmm_pit
    patch_embed      16  16   96    2x2 patches
    stage1           16  16   96
    stage2            8   8  192
    stage3            4   4  384
    pooled                   384    the class token
    logits                    10
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, conv_rules, dense_rules, norm_rules
from zoo.layers.classifier import ImageClassifier
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.position import sinusoids
from zoo.layers.stochastic import DropPath, drop_path_rates
from zoo.models.vision.gmm_vit import (
    LayerNorm,
    MaskedAttention,
    block_mlp,
    end_rules,
    gaussian_table,
    gmm_variant,
    grid_distances,
    init,
    mask_of,
    mask_rules,
    masked_attention,
    mlp_rules,
    unit_init,
)
from zoo.models.vision.t2t_vit import unfold
from zoo.system import System

# ------------------------------------------------------------------------------------ PiT


class PoolTokens(nn.Module):
    """Half the sides and twice the width."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        token: Float[Array, "batch 1 channels"],
        x: Float[Array, "batch height width channels"],
    ) -> tuple[Float[Array, "batch 1 wider"], Float[Array, "batch rows columns wider"]]:
        """The class token and the patches."""
        channels = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        settings = dict(strides=2, padding=1, feature_group_count=channels, kernel_init=init)
        x = nn.Conv(2 * channels, (3, 3), name="depthwise", **settings, **types)(x)
        x = nn.Conv(2 * channels, (1, 1), kernel_init=init, name="pointwise", **types)(x)
        return Dense(2 * channels, kernel_init=init, name="token", **types)(token), x


class PiTBlock(nn.Module):
    """Attention and MLP behind LayerNorms."""

    attention: Callable[..., MaskedAttention]
    mlp: Callable[[], Mlp]
    drop_path: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool
    ) -> Float[Array, "batch tokens channels"]:
        norm = partial(LayerNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        drop = DropPath(self.drop_path)
        attention = self.attention(name="attention")
        y = attention(norm(name="norm1")(x), grid_distances(grid), train=train)
        x = x + drop(y, train)
        return x + drop(self.mlp()(norm(name="norm2")(x), train), train)


class GmmPiT(ImageClassifier):
    """PiT with masked attention.

    Attributes:
      depths: blocks of each stage.
      head_dim: of all stages.
      drop_path: stochastic depth, the same for all blocks.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 2
    num_classes: int = 10
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 6, 4)
    num_heads: tuple[int, ...] = (2, 4, 8)
    head_dim: int = 48
    mlp_ratio: float = 2.0
    mask: str | None = "gaussian"
    kernels: int = 5
    underflow: bool = False
    dropout: float = 0.0
    drop_path: float = 0.1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above), without the class token."""
        self.check_images(images)
        self.check_size(images.shape)
        types, patch = self.types, (self.patch_size,) * 2
        embed = nn.Conv(
            self.embed_dim, patch, patch, "VALID", kernel_init=init, name="embed", **types
        )
        x = embed(images.astype(self.dtype))
        out, batch = {"patch_embed": x}, x.shape[0]
        token = self.param("class_token", unit_init, (1, 1, self.embed_dim), self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype), (batch, 1, self.embed_dim))
        shape = (1, 1 + x.shape[1] * x.shape[2], self.embed_dim)
        table = self.param("position_embedding", unit_init, shape, self.param_dtype)
        table = table.astype(self.dtype)
        token, x = token + table[:, :1], x + table[:, 1:].reshape(1, *x.shape[1:])
        drop = partial(nn.Dropout(self.dropout), deterministic=not train)
        for s, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            if s:
                token, x = PoolTokens(name=f"pool_{s - 1}", **types)(token, x)
            grid, channels = x.shape[1:3], x.shape[3]
            attention = partial(
                MaskedAttention, num_heads, self.head_dim, self.mask, self.kernels, self.underflow,
                class_token=True, dropout=self.dropout, **types,
            )  # fmt: skip
            mlp = block_mlp(self, channels, self.mlp_ratio)
            tokens = jnp.concatenate([token, x.reshape(batch, -1, channels)], 1)
            tokens = tokens if s else drop(tokens)
            for i in range(depth):
                block = PiTBlock(
                    attention, mlp, self.drop_path, name=f"stages_{s}_layers_{i}", **types
                )
                tokens = block(tokens, grid, train)
            token, x = tokens[:, :1], tokens[:, 1:].reshape(batch, *grid, channels)
            out[f"stage{s + 1}"] = x
        x = out["pooled"] = LayerNorm(name="norm", **types)(token[:, 0])
        out["logits"] = self.classify(x, init)
        return out


# ------------------------------------------------------------------------------------ T2T


class SkippingAttention(nn.Module):
    """Masked attention that adds to its output: its input, or the values where it has one head."""

    width: int
    num_heads: int
    mask: str | None
    kernels: int
    underflow: bool
    qkv_bias: bool = False
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int]
    ) -> Float[Array, "batch tokens width"]:
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = dense(3 * self.width, use_bias=self.qkv_bias, name="qkv")(x)
        heads = (*x.shape[:2], 3, self.num_heads, self.width // self.num_heads)
        query, key, value = jnp.unstack(qkv.reshape(heads), axis=2)
        multiplier = None
        if self.mask is not None:
            sizes = (self.mask, self.kernels, self.underflow, grid_distances(grid))
            multiplier = mask_of(*sizes, self.num_heads, self.param_dtype)
        scale = self.scale or (x.shape[-1] // self.num_heads) ** -0.5
        y, scores = masked_attention(query, key, value, multiplier, scale=scale)
        self.sow("intermediates", "scores", scores)
        y = dense(self.width, name="out")(y.reshape(*x.shape[:2], self.width))
        return y + (value[:, :, 0] if self.num_heads == 1 else x)


class T2TBlock(nn.Module):
    """Attention with its skip connection, and MLP; `outer`: the block's input is added, too."""

    attention: Callable[..., SkippingAttention]
    mlp: Callable[[], Mlp]
    outer: bool
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool
    ) -> Float[Array, "batch tokens width"]:
        norm = partial(LayerNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        drop = DropPath(self.drop_path)
        y = self.attention(name="attention")(norm(name="norm1")(x), grid)
        x = x + drop(y, train) if self.outer else y
        return x + drop(self.mlp()(norm(name="norm2")(x), train), train)


class GmmT2T(ImageClassifier):
    """T2T with masked attention, in the layers between tokens, too.

    Attributes:
      token_dim: width of the layers between tokens.
      scale: factor on q k^T in the blocks; None is 1 / sqrt(head width).
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    image_size: tuple[int, int] = (32, 32)
    num_classes: int = 10
    token_dim: int = 64
    embed_dim: int = 256
    depth: int = 12
    num_heads: int = 4
    mlp_ratio: float = 2.0
    qkv_bias: bool = False
    scale: float | None = None
    mask: str | None = "gaussian"
    kernels: int = 5
    underflow: bool = False
    dropout: float = 0.0
    drop_path: float = 0.1

    @property
    def token_layers(self) -> int:
        """Layers between tokens."""
        return 2 if self.image_size == (64, 64) else 1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate: `token_layer1 ...`, `embed`, `block0 ...`, `norm`, `pooled`."""
        self.check_images(images)
        self.check_size(images.shape)
        types, out = self.types, {}
        sizes = (self.mask, self.kernels, self.underflow)
        x = unfold(images.astype(self.dtype), 3, 2, 1)
        for i in range(1, self.token_layers + 1):
            attention = partial(SkippingAttention, self.token_dim, 1, *sizes, **types)
            block = T2TBlock(attention, block_mlp(self, self.token_dim, 1.0), False,
                             name=f"tokens_{i}", **types)  # fmt: skip
            grid = x.shape[1:3]
            x = block(x.reshape(x.shape[0], -1, x.shape[-1]), grid, train)
            out[f"token_layer{i}"] = x
            x = unfold(x.reshape(x.shape[0], *grid, -1), 3, 2, 1)
        grid = x.shape[1:3]
        x = Dense(self.embed_dim, kernel_init=init, name="embed", **types)(
            x.reshape(x.shape[0], -1, x.shape[-1])
        )
        for name, start, shape in (
            ("unused_class_token", nn.initializers.zeros, (1, 1, self.embed_dim)),
            ("unused_norm_scale", nn.initializers.ones, (9 * self.token_dim,)),
            ("unused_norm_bias", nn.initializers.zeros, (9 * self.token_dim,)),
        ):
            self.param(name, start, shape, self.param_dtype)
        fixed = lambda _, shape, dtype: jnp.asarray(sinusoids(*shape[1:])[None], dtype)  # noqa: E731
        shape = (1, *x.shape[1:])
        table = self.param("fixed_position_embedding", fixed, shape, self.param_dtype)
        x = out["embed"] = x + jax.lax.stop_gradient(table).astype(self.dtype)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        attention = partial(
            SkippingAttention, self.embed_dim, self.num_heads, *sizes, self.qkv_bias, self.scale,
            **types,
        )  # fmt: skip
        mlp = block_mlp(self, self.embed_dim, self.mlp_ratio)
        for i, rate in enumerate(drop_path_rates(self.drop_path, (self.depth,))[0]):
            block = T2TBlock(attention, mlp, True, rate, name=f"layers_{i}", **types)
            x = out[f"block{i}"] = block(x, grid, train)
        x = out["norm"] = LayerNorm(name="norm", **types)(x)
        x = out["pooled"] = x.mean(1)
        out["logits"] = self.classify(x, init)
        return out


# ---------------------------------------------------------------------------- checkpoints


def _tokens(model: GmmPiT | GmmT2T, halvings: int) -> int:
    """Patches after so many halvings of the sides."""
    first = getattr(model, "patch_size", 1)
    rows, columns = (-(-(side // first) // 2**halvings) for side in model.image_size)
    return rows * columns


def _pit() -> Rules:
    rules = [
        *conv_rules("to_patch_embedding.0", "embed"),
        Rule("cls_token", "class_token"),
        Rule("pos_embedding", "position_embedding"),
        *end_rules("mlp_head.0", "mlp_head.1"),
    ]
    derived = {}
    for s in range(_STAGES):
        theirs, ours = f"layers.{2 * s}.layers.{{i}}", f"stages_{s}_layers_{{i}}"
        rules += [
            *norm_rules(f"{theirs}.0.norm", f"{ours}/norm1"),
            *dense_rules(f"{theirs}.0.fn.to_qkv", f"{ours}/attention/qkv"),
            *mask_rules(f"{theirs}.0.fn.mask", f"{ours}/attention/mask"),
            *dense_rules(f"{theirs}.0.fn.to_out.0", f"{ours}/attention/out"),
            *norm_rules(f"{theirs}.1.norm", f"{ours}/norm2"),
            *mlp_rules(f"{theirs}.1.fn", ours, ("net.0", "net.3")),
            *conv_rules(f"layers.{2 * s + 1}.downsample.net.0", f"pool_{s}/depthwise"),
            *conv_rules(f"layers.{2 * s + 1}.downsample.net.1", f"pool_{s}/pointwise"),
            *dense_rules(f"layers.{2 * s + 1}.cls_ff", f"pool_{s}/token"),
        ]
        derived |= {
            f"layers.{2 * s}.mask": partial(_pit_table, s),
            f"{theirs}.0.fn.mask.mask": partial(_pit_alias, s),
        }
    return Rules(rules, derived=derived, fresh=("head/kernel", "head/bias"))


_STAGES = 4  # that the rules know; the authors have three


def _pit_table(s: int, model: GmmPiT) -> np.ndarray | None:
    return gaussian_table(_tokens(model, s)) if s < len(model.depths) else None


def _pit_alias(s: int, model: GmmPiT, i: int) -> np.ndarray | None:
    there = s < len(model.depths) and i < model.depths[s] and model.mask == "gaussian"
    return _pit_table(s, model) if there else None


def _t2t() -> Rules:
    module = "tokens_to_token"
    rules = [
        Rule("cls_token", "unused_class_token"),
        Rule(f"{module}.norm.weight", "unused_norm_scale"),
        Rule(f"{module}.norm.bias", "unused_norm_bias"),
        Rule("pos_embed", "fixed_position_embedding"),
        *dense_rules(f"{module}.project", "embed"),
        *end_rules("norm", "head"),
    ]
    for theirs, ours in ((f"{module}.attention{{i}}", "tokens_{i}"), ("blocks.{i}", "layers_{i}")):
        rules += [
            *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
            *dense_rules(f"{theirs}.attn.qkv", f"{ours}/attention/qkv"),
            *mask_rules(f"{theirs}.attn.mask", f"{ours}/attention/mask"),
            *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
            *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
            *mlp_rules(f"{theirs}.mlp", ours, ("fc1", "fc2")),
        ]
    derived = {
        "mask": lambda model: gaussian_table(_tokens(model, model.token_layers + 1)),
        "blocks.{i}.attn.mask.mask": _block_alias,
        f"{module}.attention{{i}}.mask": _token_table,
        f"{module}.attention{{i}}.attn.mask.mask": _token_alias,
    }
    return Rules(rules, derived=derived, fresh=("head/kernel", "head/bias"))


def _block_alias(model: GmmT2T, i: int) -> np.ndarray | None:
    there = i < model.depth and model.mask == "gaussian"
    return gaussian_table(_tokens(model, model.token_layers + 1)) if there else None


def _token_table(model: GmmT2T, i: int) -> np.ndarray | None:
    return gaussian_table(_tokens(model, i)) if 1 <= i <= model.token_layers else None


def _token_alias(model: GmmT2T, i: int) -> np.ndarray | None:
    return _token_table(model, i) if model.mask == "gaussian" else None


LAYOUTS = {"pit": _pit(), "t2t": _t2t()}

# ------------------------------------------------------------------------------- variants

VARIANTS = {
    "gmm_pit": gmm_variant(GmmPiT, "CIFAR-10 top-1 94.41 %"),
    "gmm_t2t": gmm_variant(GmmT2T, "CIFAR-10 top-1 96.16 %"),
    "gmm_pit_test": gmm_variant(
        GmmPiT, image_size=(16, 16), embed_dim=16, depths=(1, 1), num_heads=(2, 4), head_dim=8,
        drop_path=0.0,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=("fixed_position_embedding",),
    decay=(r".*mask/(alpha|sigma)",),
)
