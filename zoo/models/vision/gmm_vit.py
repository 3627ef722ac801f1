"""Gaussian-mixture masks: a learned kernel of distance multiplies the scores of attention.

"Toward a Deeper Understanding: RetNet Viewed through Convolution", 2023, arXiv 2309.05375. Official
code: github.com/CatworldLee/Gaussian-Mixture-Mask-Attention (no licence file), which we follow; it
publishes no weights.

    attention = softmax(A * (q k^T / sqrt(d)) + B) v
    A[h, i, j] = sum over k of alpha[k, h] exp(-|i - j|^2 / (2 (sigma[k, h]^2 + 1e-5)))

|i - j| is the distance of two patches in their grid: RetNet's decay of the distance in a sequence,
made two-dimensional, symmetric and learned, with 2 numbers for each head and Gaussian. A multiplies
logits: a key that it fades is not hidden, but gets the logit 0, and a negative alpha turns
likeness into its opposite. `mask="elementwise"` (ELM in the paper) has a free matrix A instead, one
for all heads, which starts at zero: uniform attention.

This file has the masks and their ViT, which averages the patches. `mask=None` is the authors' plain
ViT to compare with: it has a class token and reads that. `gmm_hosts` has the other hosts.

The authors take powers of a table exp(-|i - j|^2)^(1/2) in float32, which is zero from a squared
distance of 104 on: on their grid of 16 x 16 far patches have A = 0. `underflow=True` has that; on
8 x 8 there is no difference.

    features         gmm_vit
    patch_embed       8   8  192    4x4 patches, linear; stride 4
    block0            8   8  192    up to block8, all of stride 4
    pooled                   192    mean over the map
    norm                     192
    logits                    10
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    dense_rules,
    linear,
    norm_rules,
    reshape,
    squeeze,
)
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed
from zoo.layers.stack import remat_block
from zoo.system import Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.xavier_normal()
table_init = nn.initializers.normal(0.02)
unit_init = nn.initializers.normal(1.0)


# ---------------------------------------------------------------------------------- masks


def grid_distances(grid: tuple[int, int]) -> Int[np.ndarray, "tokens tokens"]:
    """Squared distances between the row-major positions of a grid."""
    at = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), -1)
    return np.square(at[:, None] - at).sum(-1)


def gaussian_mixture(
    sigma: Float[Array, "kernels heads"],
    alpha: Float[Array, "kernels heads"],
    distances: Int[np.ndarray, "queries keys"],
) -> Float[Array, "heads queries keys"]:
    """A, in float32, from squared distances: each different one is worked out once."""
    different, index = np.unique(distances, return_inverse=True)
    sigma, alpha = sigma.astype(jnp.float32), alpha.astype(jnp.float32)
    width = 2 * (jnp.square(sigma) + 1e-5)
    values = jnp.einsum("kh,khu->hu", alpha, jnp.exp(-different / width[..., None]))
    return values[:, index.reshape(distances.shape)]


class GaussianMask(nn.Module):
    """A mixture of Gaussians of the distance, `kernels` for each head."""

    kernels: int
    underflow: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, distances: Int[np.ndarray, "queries keys"], num_heads: int
    ) -> Float[Array, "heads queries keys"]:
        shape = (self.kernels, num_heads)
        sigma = self.param("sigma", lambda *a: 10 + 10 * unit_init(*a), shape, self.param_dtype)
        alpha = self.param("alpha", nn.initializers.normal(2.0), shape, self.param_dtype)
        mask = gaussian_mixture(sigma, alpha, distances)
        return jnp.where(distances < 104, mask, 0.0) if self.underflow else mask


class ElementwiseMask(nn.Module):
    """A free number for each pair of positions, the same for all heads."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, distances: Int[np.ndarray, "queries keys"], num_heads: int
    ) -> Float[Array, "1 queries keys"]:
        weight = self.param("weight", nn.initializers.zeros, distances.shape, self.param_dtype)
        return weight.astype(jnp.float32)[None]


MASKS = ("gaussian", "elementwise", None)


def mask_of(
    kind: str,
    kernels: int,
    underflow: bool,
    distances: Int[np.ndarray, "queries keys"],
    num_heads: int,
    param_dtype: jnp.dtype,
) -> Float[Array, "#heads queries keys"]:
    """The mask of a kind; called in the compact method of the attention, which gets `mask`."""
    maker = {"gaussian": partial(GaussianMask, kernels, underflow), "elementwise": ElementwiseMask}
    return maker[kind](param_dtype=param_dtype, name="mask")(distances, num_heads)


def masked_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    multiplier: Float[Array, "#heads queries keys"] | None = None,
    bias: Float[Array, "biases #heads queries keys"] | None = None,
    scale: float | None = None,
    mix: tuple[Float[Array, "heads heads"], Float[Array, "heads heads"]] | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries keys"]]:
    """Attention with a multiplier of the scores, for which the kernels have no place, in float32.

    Args:
      query: as in `kernels_pallas.attention`.
      key: the same.
      value: the same.
      multiplier: of the scaled scores.
      bias: added behind it; example b uses `bias[b % biases]`.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      mix: matrices over heads before and after the softmax (talking heads).

    Returns:
      The output, and the multiplied scores.
    """
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key) * scale
    scores = mixed = scores if multiplier is None else scores * multiplier
    if mix is not None:
        mixed = jnp.einsum("bnqk,nm->bmqk", mixed, mix[0].astype(jnp.float32))
    if bias is not None:
        grouped = mixed.reshape(-1, bias.shape[0], *mixed.shape[1:])
        mixed = (grouped + bias).reshape(mixed.shape)
    weights = jax.nn.softmax(mixed, -1)
    if mix is not None:
        weights = jnp.einsum("bnqk,nm->bmqk", weights, mix[1].astype(jnp.float32))
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(value.dtype), value)
    return out, scores


class MaskedAttention(nn.Module):
    """Self-attention of tokens with known distances. Sows its multiplied scores as `scores`.

    Attributes:
      head_dim: any; `out` is left out where one head has the width of the input, as the authors do.
      mask: one of `MASKS`; None: attention as it is.
      kernels: Gaussians for each head.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      talking: heads are mixed by a matrix before and after the softmax.
      class_token: the first token has no distances, and scores with it are not multiplied.
      dropout: rate at the end.
    """

    num_heads: int
    head_dim: int
    mask: str | None = "gaussian"
    kernels: int = 5
    underflow: bool = False
    qkv_bias: bool = False
    scale: float | None = None
    talking: bool = False
    class_token: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        distances: Int[np.ndarray, "patches patches"],
        bias: Float[Array, "biases #heads tokens tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens channels"]:
        batch, tokens, channels = x.shape
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r} is none of {', '.join(map(repr, MASKS))}.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        inner = self.num_heads * self.head_dim
        qkv = dense(3 * inner, use_bias=self.qkv_bias, name="qkv")(x)
        heads = (batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = (
            constrain(t, "batch", "length", "heads", "head_dim")
            for t in jnp.unstack(qkv.reshape(heads), axis=2)
        )
        looking = self.is_mutable_collection("intermediates")
        if self.mask is None and not self.talking and bias is None and not looking:
            y = kernels_pallas.attention(query, key, value, scale=self.scale)
        else:
            multiplier = None
            if self.mask is not None:
                sizes = (self.mask, self.kernels, self.underflow)
                multiplier = mask_of(*sizes, distances, self.num_heads, self.param_dtype)
                if self.class_token:
                    first = ((0, 0), (1, 0), (1, 0))
                    multiplier = jnp.pad(multiplier, first, constant_values=1.0)
            mix = self._mix() if self.talking else None
            y, scores = masked_attention(query, key, value, multiplier, bias, self.scale, mix)
            self.sow("intermediates", "scores", scores)
        y = y.reshape(batch, tokens, inner)
        if self.num_heads > 1 or self.head_dim != channels:
            y = dense(channels, name="out")(y)
        return nn.Dropout(self.dropout)(y, deterministic=not train)

    def _mix(self) -> tuple[Array, Array]:
        shape = (self.num_heads,) * 2
        names = ("mix_before", "mix_after")
        return tuple(self.param(name, unit_init, shape, self.param_dtype) for name in names)


# --------------------------------------------------------------------------------- blocks


class GridAttention(nn.Module):
    """Attention over the whole map."""

    attention: Callable[..., MaskedAttention]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        distances = grid_distances(x.shape[1:3])
        return self.attention(name="attention")(tokens, distances, train=train).reshape(x.shape)


# --------------------------------------------------------------------------------- models


def block_mlp(model: ImageClassifier, channels: int, ratio: float) -> Callable[[], Mlp]:
    """What makes the MLP of a block, for `ResidualBlock`."""
    hidden = int(channels * ratio)
    make = partial(Mlp, hidden, dropout=model.dropout, kernel_init=init, name="mlp")
    return partial(make, **model.types)


class GmmViT(ImageClassifier):
    """ViT with masked attention: no class token, the mean over patches is read.

    Attributes:
      image_size: height and width in pixels, multiples of `patch_size`.
      mask: "gaussian" or "elementwise"; None: plain attention with a class token, which is read. A
        block's map is then the sequence, as a single row.
      kernels: Gaussians for each head.
      underflow: far patches as in the authors' table (see above).
      drop_path: stochastic depth, the same for all blocks.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 4
    num_classes: int = 10
    embed_dim: int = 192
    depth: int = 9
    num_heads: int = 12
    head_dim: int = 16
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
        """Every named intermediate (see the table above)."""
        self.check_images(images)
        self.check_size(images.shape)
        types = self.types
        out = {}
        x = PatchEmbed(self.embed_dim, self.patch_size, name="embed", **types)(images)
        out["patch_embed"] = x
        if self.mask is None:
            shape = (1, 1, self.embed_dim)
            token = self.param("class_token", unit_init, shape, self.param_dtype)
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], *shape[1:]))
            x = jnp.concatenate([token, x.reshape(x.shape[0], -1, self.embed_dim)], 1)[:, None]
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
            dropout=self.dropout,
            **types,
        )
        mixer = partial(GridAttention, attention, name="mixer")
        mlp = block_mlp(self, self.embed_dim, self.mlp_ratio)
        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        for i in range(self.depth):
            layer = block(mixer, mlp, drop_path=self.drop_path, name=f"layers_{i}", **types)
            x = out[f"block{i}"] = layer(x, train)
        x = out["pooled"] = x[:, 0, 0] if self.mask is None else x.mean((1, 2))
        x = out["norm"] = LayerNorm(name="norm", **types)(x)
        out["logits"] = self.classify(x, init)
        return out


# ---------------------------------------------------------------------------- checkpoints


def num_patches(model: nn.Module) -> int:
    """Patches of an image."""
    rows, columns = (side // model.patch_size for side in model.image_size)
    return rows * columns


def _linear_patches(model: nn.Module) -> Transform:
    """A matrix over flattened patches (row, column, channel)."""
    patch, channels = model.patch_size, model.in_channels
    return chain(
        linear, reshape((patch, patch, channels, -1), (patch * patch * channels, model.embed_dim))
    )


def mask_rules(theirs: str, ours: str) -> list[Rule]:
    """Of either mask; the authors' `mask` of a Gaussian one is an alias of their table."""
    return [
        Rule(f"{theirs}.sigma", f"{ours}/sigma", squeeze((2, 3))),
        Rule(f"{theirs}.alpha", f"{ours}/alpha", squeeze((2, 3))),
        Rule(f"{theirs}.mask", f"{ours}/weight"),
    ]


def gaussian_table(tokens: int) -> Float[np.ndarray, "1 1 tokens tokens"]:
    """The authors', as float32 gives it; its grid is square, even if that has no whole side."""
    at = np.arange(tokens)
    side = len(at) ** 0.5
    at = np.stack([at // side, at % side], -1)
    squared = np.square(at[:, None] - at).sum(-1).astype(np.float32)
    return (np.exp(-squared) ** np.float32(0.5))[None, None]


def layout(*rules: Rule, tokens: Callable[[nn.Module], int], aliases: str, **derived) -> Rules:
    """Rules with the authors' table for so many tokens, and its names in the blocks."""

    def table(model: nn.Module) -> np.ndarray:
        return gaussian_table(tokens(model))

    def alias(model: nn.Module, **_) -> np.ndarray | None:
        return table(model) if model.mask == "gaussian" else None

    return Rules(
        rules,
        derived={"mask": table, aliases: alias, **derived},
        fresh=("head/kernel", "head/bias"),
    )


def end_rules(norm: str, head: str) -> list[Rule]:
    """The last norm and the head."""
    return [*norm_rules(norm, "norm"), *dense_rules(head, "head")]


def patch_rules() -> list[Rule]:
    """Patches by a linear map, and positions."""
    return [
        Rule("to_patch_embedding.1.weight", "embed/kernel", _linear_patches),
        Rule("to_patch_embedding.1.bias", "embed/bias"),
        Rule("pos_embedding", "position_embedding"),
    ]


def mlp_rules(theirs: str, ours: str, names: tuple[str, str]) -> list[Rule]:
    """An MLP, of two linear maps by these names."""
    up, down = (f"{theirs}.{name}" for name in names)
    return [*dense_rules(up, f"{ours}/mlp/up"), *dense_rules(down, f"{ours}/mlp/down")]


def _vit() -> Rules:
    theirs, ours = "transformer.layers.{i}", "layers_{i}"
    attention = f"{ours}/mixer/attention"
    return layout(
        *patch_rules(),
        Rule("cls_token", "class_token"),
        *norm_rules(f"{theirs}.0.norm", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.0.fn.to_qkv", f"{attention}/qkv"),
        *mask_rules(f"{theirs}.0.fn.mask", f"{attention}/mask"),
        *dense_rules(f"{theirs}.0.fn.to_out.0", f"{attention}/out"),
        *norm_rules(f"{theirs}.1.norm", f"{ours}/norm2"),
        *mlp_rules(f"{theirs}.1.fn", ours, ("net.0", "net.3")),
        *end_rules("mlp_head.0", "mlp_head.1"),
        tokens=num_patches,
        aliases=f"{theirs}.0.fn.mask.mask",
    )


LAYOUTS = {"official": _vit()}

# ------------------------------------------------------------------------------- variants


def gmm_variant(
    module: type[nn.Module], metric: str = "", params: int | None = None, **fields
) -> Variant:
    """A model of the paper."""
    return Variant(
        module=module,
        fields=fields,
        task="image_classification",
        params=params,
        metric=metric,
        paper="Toward a Deeper Understanding: RetNet Viewed through Convolution, arXiv 2309.05375",
        code="github.com/CatworldLee/Gaussian-Mixture-Mask-Attention",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )


VARIANTS = {
    "gmm_vit": gmm_variant(GmmViT, "CIFAR-10 top-1 95.06 %", 2_693_122),
    "gmm_vit_test": gmm_variant(
        GmmViT, embed_dim=48, depth=3, num_heads=4, head_dim=12, drop_path=0.0
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, decay=(r".*mask/(alpha|sigma)",))
