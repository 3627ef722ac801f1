"""SReT, the Sliced Recursive Transformer: blocks applied twice, attention inside slices of tokens.

Shen, Liu and Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv 2111.05297. Official code:
github.com/szq0214/SReT (MIT), which we follow.

A stage of depth d has r blocks T and d layers N without attention ("non-projection"); each block
runs d / r times with the same weights, and behind every run stands a layer of its own:

    T1 N1 T1 N2 T2 N3 T2 N4 ...
    T: x = c1 x + c2 DropPath(attention(LN(x)));   x = c3 x + c4 DropPath(MLP(LN(x)))
    N: x = c1 x + c2 MLP(LN(x))                              c: learned numbers, 1 at the start

Attention is sliced: tokens, row by row, are cut into groups of equal length which see only
themselves. In the odd runs (counted from 0, over the stage) there are fewer groups, and if there
are several the tokens are put in random order first and back after. The authors draw that order
anew in every forward pass, in evaluation too; here evaluation takes the fixed order `permutation`,
unless it is given a key: `rngs={"sample": key}`.

    features         SReT_T
    patch_embed      28  28   64    three 3x3 convolutions of stride 2, BatchNorm, ReLU
    stage1           28  28   64    2 blocks, 4 runs, 8 and 2 slices; stride 8
    downsample1      14  14  128    3x3 convolution of stride 2, two filters a channel
    stage2           14  14  128    5 blocks, 10 runs, 4 slices and 1; stride 16
    downsample2       7   7  256
    stage3            7   7  256    3 blocks, 6 runs; stride 32
    pooled                   256    mean over the map, LayerNorm
    logits                  1000
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
    chain,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    squeeze,
    tied,
    transpose,
)
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import DepthwiseConv
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.position import resize_grid
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import DropPath
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-6)


def fixed_permutation(length: int) -> Int[np.ndarray, "length"]:
    """An order of tokens that looks random and is always the same."""
    return np.random.RandomState(0).permutation(length)  # a stream that NumPy keeps frozen


class SlicedAttention(nn.Module):
    """Attention inside `groups` runs of neighbouring tokens.

    Raises:
      ValueError: if the tokens are not a whole number of groups.
    """

    num_heads: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        groups: int,
        order: Int[Array, "length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        """With an `order`, groups are cut from the tokens in that order."""
        batch, length, channels = x.shape
        if length % groups:
            raise ValueError(
                f"{length} tokens cannot be cut into {groups} slices; choose another image size, "
                "or groups1 and groups2 that divide the tokens of their stage."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, kernel_init=torch_default_init, **types)
        x = x if order is None else x[:, order]
        qkv = constrain(dense(3 * channels, name="qkv")(x), "batch", "length", "channels")
        heads = (batch * groups, length // groups, 3, self.num_heads, channels // self.num_heads)
        query, key, value = jnp.unstack(qkv.reshape(heads), axis=2)
        dropping = train and self.attention_dropout > 0
        x = kernels_pallas.attention(
            query,
            key,
            value,
            dropout=self.attention_dropout if dropping else 0.0,
            rng=self.make_rng("dropout") if dropping else None,
        )
        x = x.reshape(batch, length, channels)
        x = x if order is None else x[:, jnp.argsort(order)]
        x = dense(channels, name="out")(x)
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class Coefficient(nn.Module):
    """A learned number."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x * self.param("scale", nn.initializers.ones, (1,), self.param_dtype).astype(x.dtype)


class Block(nn.Module):
    """Sliced attention and MLP; called several times, it is the same function of its arguments."""

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        groups: int,
        order: Int[Array, "length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        times = [Coefficient(self.param_dtype, name=f"coefficient{i}") for i in range(1, 5)]
        attention = SlicedAttention(
            self.num_heads, self.dropout, self.attention_dropout, name="attention", **types
        )
        y = attention(LayerNorm(name="norm1", **types)(x), groups, order, train)
        x = times[0](x) + times[1](DropPath(self.drop_path)(y, train))
        mlp = _mlp(self, x.shape[-1])
        y = mlp(LayerNorm(name="norm2", **types)(x), train)
        x = times[2](x) + times[3](DropPath(self.drop_path)(y, train))
        return constrain(x, "batch", "length", "channels")


class Bridge(nn.Module):
    """The layer without attention that follows every run of a block."""

    mlp_ratio: float = 1.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        times = [Coefficient(self.param_dtype, name=f"coefficient{i}") for i in (1, 2)]
        y = _mlp(self, x.shape[-1])(LayerNorm(name="norm1", **types)(x), train)
        return constrain(times[0](x) + times[1](y), "batch", "length", "channels")


def _mlp(layer: Block | Bridge, channels: int) -> Mlp:
    return Mlp(
        int(channels * layer.mlp_ratio),
        dropout=layer.dropout,
        kernel_init=torch_default_init,
        name="mlp",
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
    )


class RecursiveStage(nn.Module):
    """`recursive_num` blocks in `depth` runs, each run followed by a `Bridge`.

    Attributes:
      groups: number of slices in even and in odd runs.
      drop_path: rate of each block, the same in all its runs.
    """

    depth: int
    recursive_num: int
    num_heads: int
    groups: tuple[int, int] = (1, 1)
    permutation: Callable[[int], np.ndarray] = fixed_permutation
    mlp_ratio: float = 4.0
    bridge_ratio: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: tuple[float, ...] | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch length channels"]:
        if self.depth % self.recursive_num:
            raise ValueError(
                f"depth={self.depth} runs cannot be shared among recursive_num="
                f"{self.recursive_num} blocks; choose a divisor."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        make = partial(
            remat_block(Block, self.remat, static_argnums=(2, 4)),
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.attention_dropout,
            **types,
        )
        rates = self.drop_path or (0.0,) * self.recursive_num
        blocks = [make(rate, name=f"layers_{i}") for i, rate in enumerate(rates)]
        for run in range(self.depth):
            groups = self.groups[run % 2]
            order = self._order(x.shape[1], train) if run % 2 and groups > 1 else None
            x = blocks[run * self.recursive_num // self.depth](x, groups, order, train)
            bridge = Bridge(self.bridge_ratio, self.dropout, name=f"bridges_{run}", **types)
            x = bridge(x, train)
        return x

    def _order(self, length: int, train: bool) -> Array:
        if train or self.has_rng("sample"):
            rng = self.make_rng("sample" if self.has_rng("sample") else "dropout")
            return jax.random.permutation(rng, length)
        return jnp.asarray(self.permutation(length))


class SReT(ImageClassifier):
    """SReT classifier.

    Attributes:
      image_size: height and width in pixels, multiples of 8 (the table of positions is as large as
        the first map); the tokens of each stage must be whole numbers of its groups.
      head_dim: width of a head; a stage is num_heads times as wide.
      depths: runs of each stage.
      recursive_num: blocks of each stage, which share its runs.
      bridge_ratio: MLP ratio of the layers between runs.
      groups1: slices in even runs.
      groups2: slices in odd runs; the tokens are permuted if there are several.
      permutation: number of tokens -> their order, in evaluation.
      drop_path: stochastic depth; block i of a stage that follows n runs has drop_path (n + i) /
        (all runs), as in the code.
    """

    head_dim: int = 32
    depths: tuple[int, ...] = (4, 10, 6)
    recursive_num: tuple[int, ...] = (2, 5, 3)
    num_heads: tuple[int, ...] = (2, 4, 8)
    groups1: tuple[int, ...] = (8, 4, 1)
    groups2: tuple[int, ...] = (2, 1, 1)
    mlp_ratio: float = 4.0
    bridge_ratio: float = 1.0
    permutation: Callable[[int], np.ndarray] = fixed_permutation
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid."""
        self.check_images(images)
        size, channels = self.image_size, self.head_dim * self.num_heads[0]
        if images.shape[1:] != (*size, self.in_channels) or size[0] % 8 or size[1] % 8:
            raise ValueError(
                f"This SReT takes images of shape (batch, {size[0]}, {size[1]}, "
                f"{self.in_channels}), not {images.shape}; resize them, or create the model with "
                "another image_size, of multiples of 8."
            )
        types = self.types
        out = {}
        x = images.astype(self.dtype)
        for i, width in enumerate((channels // 2, channels, channels), 1):
            x = nn.Conv(
                width,
                (3, 3),
                strides=2,
                padding=1,
                kernel_init=torch_default_init,
                name=f"stem_conv{i}",
                **types,
            )(x)
            norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=f"stem_norm{i}", **types)
            x = nn.relu(norm(x, use_running_average=not train))
        out["patch_embed"] = x
        table = self.param(
            "position_embedding", nn.initializers.normal(0.02), x.shape[1:], self.param_dtype
        )
        x = nn.Dropout(self.dropout)(x + table.astype(self.dtype), deterministic=not train)

        of_stages = (self.depths, self.recursive_num, self.num_heads, self.groups1, self.groups2)
        for i, (depth, blocks, heads, *groups) in enumerate(zip(*of_stages, strict=True)):
            if i:  # channel c makes the channels 2c and 2c + 1
                x = jnp.repeat(x, self.head_dim * heads // x.shape[-1], -1)
                x = DepthwiseConv(stride=2, name=f"downsample_{i - 1}", **types)(x)
                out[f"downsample{i}"] = x
            first, runs = sum(self.depths[:i]), sum(self.depths)
            stage = RecursiveStage(
                depth,
                blocks,
                heads,
                tuple(groups),
                self.permutation,
                self.mlp_ratio,
                self.bridge_ratio,
                self.dropout,
                self.attention_dropout,
                tuple(self.drop_path * (first + k) / runs for k in range(blocks)),
                self.remat,
                name=f"stages_{i}",
                **types,
            )
            tokens = stage(x.reshape(x.shape[0], -1, x.shape[-1]), train)
            x = out[f"stage{i + 1}"] = tokens.reshape(x.shape)
        x = out["pooled"] = LayerNorm(name="norm", **types)(x.mean((1, 2)))
        out["logits"] = self.classify(x, torch_default_init)
        return out


# SReT_T's MLPs are 230, 460 and 921 wide, which `tensor` does not divide: `fsdp` alone cuts them.
# (Cutting the rows of `up` over `tensor` and its columns over `fsdp` is no way out: with JAX 0.10
# XLA then multiplies examples that lie on other devices.)
PARTITION = {
    r".*mlp/up/kernel": ("channels", None),
    r".*mlp/up/bias": (None,),
    r".*mlp/down/kernel": (None, "channels"),
}

# ---------------------------------------------------------------------------- checkpoints


def _resize_position(
    table: np.ndarray, shape: tuple[int, ...], model: SReT, *_: object
) -> np.ndarray:
    flat = table.reshape(-1, table.shape[-1])
    return resize_grid(flat, table.shape[:2], shape[:2]).reshape(shape)


def _rules() -> list[Rule]:
    position = chain(transpose(0, 2, 3, 1), squeeze(0))
    rules = [
        Rule("pos_embed", "position_embedding", position),
        *conv_rules("patch_embed.conv{i}", "stem_conv{i}"),
        *norm_rules("patch_embed.bn{i}", "stem_norm{i}"),
        Rule("patch_embed.bn{i}.running_mean", "batch_stats/stem_norm{i}/mean"),
        Rule("patch_embed.bn{i}.running_var", "batch_stats/stem_norm{i}/var"),
        *conv_rules("pools.{s}.conv", "downsample_{s}"),
        *norm_rules("norm", "norm"),
        *dense_rules("head", "head"),
    ]
    bridge, our_bridge = "transformers.{s}.blocks.{2*i+1}", "stages_{s}/bridges_{i}"
    rules += [
        *norm_rules(f"{bridge}.norm1", f"{our_bridge}/norm1"),
        *dense_rules(f"{bridge}.mlp.fc1", f"{our_bridge}/mlp/up"),
        *dense_rules(f"{bridge}.mlp.fc2", f"{our_bridge}/mlp/down"),
        *(
            Rule(f"{bridge}.coefficient{c}.bias", f"{our_bridge}/coefficient{c}/scale")
            for c in (1, 2)
        ),
    ]
    # A block stands under the names of both its runs.
    runs, ours = ("transformers.{s}.blocks.{4*k}", "transformers.{s}.blocks.{4*k+2}"), "layers_{k}"
    for theirs, place in (
        ("norm1", "norm1"),
        ("attn.qkv", "attention/qkv"),
        ("attn.proj", "attention/out"),
        ("norm2", "norm2"),
        ("mlp.fc1", "mlp/up"),
        ("mlp.fc2", "mlp/down"),
    ):
        path, is_norm = f"stages_{{s}}/{ours}/{place}", theirs.startswith("norm")
        weight = f"{path}/scale" if is_norm else f"{path}/kernel"
        names = tuple(f"{run}.{theirs}" for run in runs)
        rules += [
            Rule(
                tuple(f"{name}.weight" for name in names),
                weight,
                tied if is_norm else chain(tied, linear),
            ),
            Rule(tuple(f"{name}.bias" for name in names), f"{path}/bias", tied),
        ]
    rules += [
        Rule(
            tuple(f"{run}.coefficient{c}.bias" for run in runs),
            f"stages_{{s}}/{ours}/coefficient{c}/scale",
            tied,
        )
        for c in range(1, 5)
    ]
    return rules


LAYOUTS = {
    "official": Rules(
        tuple(_rules()),
        derived={
            f"patch_embed.bn{i}.num_batches_tracked": lambda model: np.zeros((), np.int64)
            for i in (1, 2, 3)
        },
        fresh=("head/kernel", "head/bias"),
        resize={"position_embedding": _resize_position},
    )
}

# ------------------------------------------------------------------------------- variants

_SOURCE = {
    "paper": "Sliced Recursive Transformer, arXiv 2111.05297",
    "code": "github.com/szq0214/SReT",
}
_SIZES = {
    "T": {"mlp_ratio": 3.6},
    "LT": {"mlp_ratio": 4.0},
    "S": {"head_dim": 42, "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "bridge_ratio": 2.0,
          "drop_path": 0.2},
}  # fmt: skip
_PARAMS = {"T": 4_755_979, "LT": 4_988_024, "S": 20_899_692}
_WHOLE = {"groups1": (1, 1, 1), "groups2": (1, 1, 1)}


def _variant(
    name: str, gflops: float, top1: float | None, resolution: int = 224, **fields
) -> tuple[str, Variant]:
    """A model under its official name; without slices if that says so."""
    size = name.split("_")[1]
    fields = _SIZES[size] | (_WHOLE if "wo_slice" in name else {}) | fields
    return name, Variant(
        module=SReT,
        fields=fields | {"image_size": (resolution, resolution)},
        task="image_classification",
        params=_PARAMS[size] if resolution == 224 else None,
        flops=gflops * 1e9,
        metric=f"ImageNet-1K top-1 {top1} %" if top1 else "",
        licence="MIT",
        files=(File(f"{name}.pth"),),
        preprocessing=Preprocessing(crop=0.875 if resolution == 224 else 1.0),
        **_SOURCE,
    )


VARIANTS = dict(
    (
        _variant("SReT_T", 1.1, 76.0),
        _variant("SReT_LT", 1.2, 76.7),
        _variant("SReT_LT_16_14_1", 1.2, 76.6, groups1=(16, 14, 1), groups2=(1, 1, 1)),
        _variant("SReT_S", 4.2, 81.9),
        _variant("SReT_T_wo_slice", 1.4, 76.1),
        _variant("SReT_LT_wo_slice", 1.4, 76.8),
        _variant("SReT_S_wo_slice", 4.7, 82.0),
        _variant("SReT_T_distill", 1.1, 77.6),
        _variant("SReT_LT_distill", 1.2, 77.7),
        _variant("SReT_LT_wo_slice_distill", 1.4, 77.9),
        _variant("SReT_S_wo_slice_finetune_384", 18.5, 83.8, 384),
    )
) | {
    "sret_test": Variant(
        module=SReT,
        fields={
            "image_size": (64, 64),
            "num_classes": 10,
            "head_dim": 16,
            "depths": (4, 4),
            "recursive_num": (2, 2),
            "num_heads": (2, 4),
            "groups1": (4, 2),
            "groups2": (2, 1),
            "mlp_ratio": 2.0,
            "drop_path": 0.0,
        },
        task="image_classification",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
        **_SOURCE,
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION)
