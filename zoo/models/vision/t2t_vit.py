"""T2T-ViT: overlapping patches are gathered into tokens step by step, then a narrow, deep ViT.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV
2021, arXiv 2101.11986. Official code: github.com/yitu-opensource/T2T-ViT (BSD-3-Clause-Clear),
which we follow.

    soft split     tokens of k x k pixels that overlap: 7x7 every 4, then twice 3x3 every 2
    between them   u = LN(t);  z = v + out(attention(q, k, v));  t = z + MLP(LN(z))      64 wide
    backbone       x = [class | tokens] + sinusoids, pre-norm blocks, LN, class token -> head

The residual of a token layer is v, since t is wider than z. Its attention is softmax with the
scale of its *input* width, (147 or 576)^-1/2 (`t2t_vit_t_*`), or Performer's:

    phi(z) = exp(z W^T - |z|^2 / 2) / sqrt(m)    W [m, 64] orthogonal rows times sqrt(m), frozen
    y_t = phi(q_t) . sum_s phi(k_s) v_s^T / (phi(q_t) . sum_s phi(k_s) + 1e-8)

W and the sinusoids are parameters of the published files that no gradient changes. The authors'
factories scale the backbone's q k^T by embed_dim^-1/2 with `pretrained=True`; the commands of their
README, and so the published accuracies, have the usual head width: set `scale` for the former.

    features         t2t_vit_7
    soft_split0      3136  147    channel-major, as the authors' unfold orders a patch
    token_layer1     3136   64    56 x 56
    token_layer2      784   64    28 x 28
    tokens            196  256    14 x 14
    embed             197  256    with class token and sinusoids
    block0            197  256    up to block6
    norm              197  256
    pooled                 256    class token
    logits               1000
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, chain, dense_rules, linear, norm_rules, split
from zoo.layers.block import Block
from zoo.layers.classifier import ImageClassifier
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import resize_table, sinusoids
from zoo.layers.stack import remat_block
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts


def unfold(
    x: Float[Array, "batch height width channels"], size: int, stride: int, padding: int
) -> Float[Array, "batch rows columns patch"]:
    """Overlapping patches, zeros outside, channel-major: entry c * size^2 + y * size + x."""
    return jax.lax.conv_general_dilated_patches(
        x, (size, size), (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def orthogonal_features(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Orthogonal rows of length sqrt(rows)."""
    return nn.initializers.orthogonal(shape[0] ** 0.5)(key, shape, dtype)


def random_features(
    x: Float[Array, "batch length channels"], features: Float[Array, "features channels"]
) -> Float[Array, "batch length features"]:
    """Positive features of the softmax kernel, float32: E[phi(x) . phi(y)] = exp(x . y)."""
    x = x.astype(jnp.float32)
    projected = jnp.einsum("blc,mc->blm", x, features.astype(jnp.float32))
    return jnp.exp(projected - (x * x).sum(-1, keepdims=True) / 2) / len(features) ** 0.5


def performer_attention(
    query: Float[Array, "batch length channels"],
    key: Float[Array, "batch length channels"],
    value: Float[Array, "batch length channels"],
    features: Float[Array, "features channels"],
) -> Float[Array, "batch length channels"]:
    """Attention in linear time and memory, in float32."""
    q, k = random_features(query, features), random_features(key, features)
    summed = jnp.einsum("blm,blc->bmc", k, value.astype(jnp.float32))
    total = jnp.einsum("blm,bm->bl", q, k.sum(1))[..., None]
    return (jnp.einsum("blm,bmc->blc", q, summed) / (total + 1e-8)).astype(value.dtype)


class TokenLayer(nn.Module):
    """Attention and MLP at `width` channels, whatever width comes in.

    Attributes:
      performer: linear attention by random features, half as many as channels; else softmax.
      dropout: behind the attention and the MLP.
    """

    width: int
    performer: bool
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length wide"], train: bool = False
    ) -> Float[Array, "batch length width"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=init, **types)
        y = LayerNorm(name="norm1", **types)(x)
        if self.performer:
            query, key, value = (dense(self.width, name=n)(y) for n in ("query", "key", "value"))
            shape = (self.width // 2, self.width)
            features = self.param("random_features", orthogonal_features, shape, self.param_dtype)
            y = performer_attention(query, key, value, jax.lax.stop_gradient(features))
        else:
            parts = dense(3 * self.width, use_bias=False, name="qkv")(y)
            query, key, value = jnp.split(parts, 3, axis=-1)
            y = kernels_pallas.attention(
                *(t[:, :, None] for t in (query, key, value)), scale=x.shape[-1] ** -0.5
            )[:, :, 0]
        y = dense(self.width, name="out")(y)
        x = value + nn.Dropout(self.dropout)(y, deterministic=not train)
        y = LayerNorm(name="norm2", **types)(x)
        y = Mlp(self.width, kernel_init=init, name="mlp", **types)(y, train)
        return x + nn.Dropout(self.dropout)(y, deterministic=not train)


class T2TViT(ImageClassifier):
    """T2T-ViT classifier.

    Attributes:
      image_size: height and width in pixels, multiples of 16.
      performer: linear attention in the token layers; else softmax.
      token_dim: width of the token layers; Performer's have half as many features, rounded down.
      scale: of the backbone's q k^T; None is 1 / sqrt(head width).
      token_dropout: in the token layers; the authors' Performer layers have 0.1, the others none.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    performer: bool = True
    token_dim: int = 64
    embed_dim: int = 384
    depth: int = 14
    num_heads: int = 6
    mlp_ratio: float = 3.0
    qkv_bias: bool = False
    scale: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    token_dropout: float = 0.1
    drop_path: float = 0.1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return tuple(size // 16 for size in self.image_size)

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        self.check_images(images)
        self._check(images.shape)
        types = self.types
        layer = partial(TokenLayer, self.token_dim, self.performer, self.token_dropout, **types)
        out = {}
        x = unfold(images.astype(self.dtype), 7, 4, 2)
        out["soft_split0"] = x.reshape(x.shape[0], -1, x.shape[-1])
        for i in (1, 2):
            batch, rows, columns, _ = x.shape
            tokens = layer(name=f"tokens_{i}")(x.reshape(batch, rows * columns, -1), train)
            out[f"token_layer{i}"] = constrain(tokens, "batch", "length", "channels")
            x = unfold(tokens.reshape(batch, rows, columns, -1), 3, 2, 1)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = out["tokens"] = nn.Dense(self.embed_dim, kernel_init=init, name="embed", **types)(x)

        token = self.param("class_token", init, (1, 1, self.embed_dim), self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.embed_dim))
        x = jnp.concatenate([token, x], 1)
        table = self.param(
            "position_embedding",
            lambda _, shape, dtype: jnp.asarray(sinusoids(*shape[1:])[None], dtype),
            (1, *x.shape[1:]),
            self.param_dtype,
        )
        x = x + jax.lax.stop_gradient(table).astype(self.dtype)
        x = out["embed"] = constrain(x, "batch", "length", "channels")
        x = nn.Dropout(self.dropout)(x, deterministic=not train)

        block = remat_block(Block, self.remat, static_argnums=(3,))
        for i, rate in enumerate(np.linspace(0.0, self.drop_path, self.depth).tolist()):
            x = out[f"block{i}"] = block(
                self.num_heads,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                scale=self.scale,
                epsilon=1e-5,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                name=f"layers_{i}",
                **types,
            )(x, rate, train)
        x = out["norm"] = LayerNorm(name="norm", **types)(x)
        x = out["pooled"] = x[:, 0]
        out["logits"] = self.classify(x, init)
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        self.check_size(shape)
        if any(size % 16 for size in self.image_size):
            raise ValueError(f"image_size={self.image_size} is no multiple of 16 on both sides.")


# ---------------------------------------------------------------------------- checkpoints


def _token_layer(i: int, out: str, mlp: tuple[str, str], norm: str) -> list[Rule]:
    theirs, ours = f"tokens_to_token.attention{i}", f"tokens_{i}"
    three = tuple(f"{ours}/{name}" for name in ("key", "query", "value"))
    return [
        *norm_rules(f"{theirs}.{norm}1", f"{ours}/norm1"),
        *norm_rules(f"{theirs}.{norm}2", f"{ours}/norm2"),
        Rule(f"{theirs}.w", f"{ours}/random_features"),
        Rule(f"{theirs}.kqv.weight", tuple(f"{o}/kernel" for o in three), chain(linear, split(1))),
        Rule(f"{theirs}.kqv.bias", tuple(f"{o}/bias" for o in three), split(0)),
        *dense_rules(f"{theirs}.attn.qkv", f"{ours}/qkv"),
        *dense_rules(f"{theirs}.{out}", f"{ours}/out"),
        *dense_rules(f"{theirs}.{mlp[0]}", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.{mlp[1]}", f"{ours}/mlp/down"),
    ]


def _resize_position(table: np.ndarray, shape: tuple[int, ...], model: T2TViT, *_) -> np.ndarray:
    return resize_table(table, model.grid, prefix=1)


def _naming(
    out: str,
    mlp: tuple[str, str],
    block: str = "blocks.{i}",
    block_mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2"),
    norm: str = "norm",
    head: str = "head",
) -> Rules:
    """Rules of one published naming.

    Args:
      out: projection behind the attention of a token layer.
      mlp: both maps of a token layer's MLP.
      block: of the transformer.
      block_mlp: both maps of its MLP.
      norm: of a block's and a token layer's norms, without their number.
      head: the classifier.
    """
    return Rules(
        (
            Rule("cls_token", "class_token"),
            Rule("pos_embed", "position_embedding"),
            *_token_layer(1, out, mlp, norm),
            *_token_layer(2, out, mlp, norm),
            *dense_rules("tokens_to_token.project", "embed"),
            *norm_rules(f"{block}.{norm}1", "layers_{i}/norm1"),
            *dense_rules(f"{block}.attn.qkv", "layers_{i}/attention/qkv"),
            *dense_rules(f"{block}.attn.proj", "layers_{i}/attention/out"),
            *norm_rules(f"{block}.{norm}2", "layers_{i}/norm2"),
            *dense_rules(f"{block}.{block_mlp[0]}", "layers_{i}/mlp/up"),
            *dense_rules(f"{block}.{block_mlp[1]}", "layers_{i}/mlp/down"),
            *norm_rules("norm", "norm"),
            *dense_rules(head, "head"),
        ),
        fresh=("head/kernel", "head/bias"),
        resize={"position_embedding": _resize_position},
    )


_FEED_FORWARD = "ffn.layers.0.0", "ffn.layers.1"

LAYOUTS = {
    "performer": _naming("proj", ("mlp.0", "mlp.2")),
    "transformer": _naming("attn.proj", ("mlp.fc1", "mlp.fc2")),
    "openmmlab": _naming(
        "attn.proj", _FEED_FORWARD, "encoder.{i}", _FEED_FORWARD, "ln", "head.layers.head"
    ),
}

# ------------------------------------------------------------------------------- variants


def _variant(
    name: str,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    params: int,
    flops: float | None = None,
    top1: float | None = None,
    resolution: int = 224,
    performer: bool = True,
) -> tuple[str, Variant]:
    official = f"T2T_ViT{name.removeprefix('t2t_vit').split('_384')[0]}".replace("ViT_t", "ViTt")
    return name, Variant(
        module=T2TViT,
        fields={
            "image_size": (resolution, resolution),
            "performer": performer,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "token_dropout": 0.1 if performer else 0.0,
        },
        task="image_classification",
        params=params,
        flops=flops,
        metric=f"{top1} % top-1, ImageNet-1K" if top1 else "",
        paper="Tokens-to-Token ViT, arXiv 2101.11986",
        code="github.com/yitu-opensource/T2T-ViT",
        licence="BSD-3-Clause-Clear",
        files=(File(f"{top1}_{official}.pth.tar"),) if top1 else (),
        preprocessing=Preprocessing(crop=0.9 if resolution == 224 else 1.0),
    )


VARIANTS = dict(
    (
        _variant("t2t_vit_7", 256, 7, 4, 2.0, 4_310_222, 1.1e9, 71.7),
        _variant("t2t_vit_10", 256, 10, 4, 2.0, 5_889_230, 1.5e9, 75.2),
        _variant("t2t_vit_12", 256, 12, 4, 2.0, 6_941_902, 1.8e9, 76.5),
        _variant("t2t_vit_14", 384, 14, 6, 3.0, 21_545_550, 4.8e9, 81.5),
        _variant("t2t_vit_14_384", 384, 14, 6, 3.0, 21_691_470, None, 83.3, 384),
        _variant("t2t_vit_19", 448, 19, 7, 3.0, 39_177_422, 8.5e9, 81.9),
        _variant("t2t_vit_24", 512, 24, 8, 3.0, 64_105_934, 13.8e9, 82.3),
        _variant("t2t_vit_t_14", 384, 14, 6, 3.0, 21_541_070, 6.1e9, 81.7, performer=False),
        _variant("t2t_vit_t_19", 448, 19, 7, 3.0, 39_172_942, 9.8e9, 82.4, performer=False),
        _variant("t2t_vit_t_24", 512, 24, 8, 3.0, 64_101_454, 15.0e9, 82.6, performer=False),
        _variant("t2t_vit_14_resnext", 384, 14, 32, 3.0, 21_545_550),
        _variant("t2t_vit_14_wide", 768, 4, 12, 3.0, 25_156_302),
    )
) | {
    "t2t_vit_test": Variant(
        module=T2TViT,
        fields={
            "image_size": (64, 64),
            "num_classes": 10,
            "token_dim": 16,
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 3,
            "mlp_ratio": 2.0,
            "drop_path": 0.0,
        },
        task="image_classification",
        paper="Tokens-to-Token ViT, arXiv 2101.11986",
        code="github.com/yitu-opensource/T2T-ViT",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )
}

SYSTEM = System(
    variants=VARIANTS, layouts=LAYOUTS, frozen=("position_embedding", r".*random_features")
)
