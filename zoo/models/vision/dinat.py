"""DiNAT, NAT and DiNAT_s: every position attends to its nearest neighbours, near and dilated.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; Hassani and Shi,
"Dilated Neighborhood Attention Transformer", 2022, arXiv 2209.15001. Official code:
github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT), which we follow, with the operation
of github.com/SHI-Labs/NATTEN as of 0.14 (later versions have no position bias).

    x = x + DropPath(g1 * NA(LN(x)));   x = x + DropPath(g2 * MLP(LN(x)))      g1, g2: optional
    NA(x)[i] = sum over j in N(i) of softmax_j(q_i k_j / sqrt(d) + B[h, (j - i) / dilation]) v_j

N(i) are the K x K nearest positions that equal i modulo the dilation on both axes; at a border the
window is moved inwards, never cut, so B (key minus query, the opposite of Swin's sign) is read off
centre there. A map smaller than K * dilation is padded with zeros below and on the right behind the
norm and before `qkv`: padded tokens take part as keys that hold the biases.

NAT has dilation 1 throughout; DiNAT alternates 1 and the largest dilation that the map at 224
pixels holds; both embed and merge with overlapping convolutions. DiNAT_s has Swin's patches and
widths; its isotropic variants have patches of 16 pixels and one stage. `vitrpb_*`, to compare those
with, attend to the whole map (`kernel_size=None`), with a bias for each offset.

    features         dinat_mini
    patch_embed      56  56   64    stride 4: two 3x3 convolutions, LayerNorm
    stage1           56  56   64    3 blocks
    downsample1      28  28  128    3x3 convolution of stride 2, LayerNorm
    stage2           28  28  128    4 blocks, stride 8
    downsample2      14  14  256
    stage3           14  14  256    6 blocks, stride 16
    downsample3       7   7  512
    stage4            7   7  512    5 blocks, stride 32
    norm              7   7  512
    pooled                   512    mean over the map
    logits                  1000

Any image size works: maps round up, and their sizes change no parameter.
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
    Transform,
    chain,
    concat,
    conv,
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
from zoo.layers.hierarchy import ConvMerging, PatchMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed, torch_default_init
from zoo.layers.position import relative_position_index, resize_grid
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.layers.window import pad_map, pad_to_multiple
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of each position to its neighbourhood.

    Attributes:
      kernel_size: neighbours along each axis; None: the whole map, which then has to be a square.
    """

    num_heads: int
    kernel_size: int | None
    dilation: int = 1
    qkv_bias: bool = True
    scale: float | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        _, height, width, channels = x.shape
        if self.kernel_size is None and height != width:
            raise ValueError(
                f"kernel_size=None attends to a whole square map, not to one of {height}x{width}; "
                "choose square images or a kernel size."
            )
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} has no centre; choose an odd number.")
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {channels} channels; choose a divisor."
            )
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        reach = (self.kernel_size or 0) * self.dilation
        x = pad_map(x, reach, reach)
        qkv = dense(3 * channels, use_bias=self.qkv_bias, name="qkv")(x)
        heads = (*x.shape[:3], self.num_heads, channels // self.num_heads)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "height", "width", "heads", "head_dim")
            for t in jnp.split(qkv, 3, axis=-1)
        )
        rows = 2 * (self.kernel_size or height) - 1
        table = self.param(
            "relative_position_bias", init, (self.num_heads, rows, rows), self.param_dtype
        )
        if self.kernel_size is None:
            index = relative_position_index((height, width)).T  # key minus query
            bias = table.reshape(self.num_heads, -1)[:, index][None]
            flat = (t.reshape(x.shape[0], height * width, *heads[3:]) for t in (query, key, value))
            x = kernels_pallas.attention(*flat, bias=bias, scale=self.scale).reshape(heads)
        else:
            x = kernels_pallas.neighborhood_attention(
                query,
                key,
                value,
                kernel_size=self.kernel_size,
                dilation=self.dilation,
                bias=table,
                scale=self.scale,
            )
        x = x[:, :height, :width].reshape(x.shape[0], height, width, channels)
        x = dense(channels, name="out")(x)
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class ConvEmbed(nn.Module):
    """Two 3x3 convolutions of stride 2, with nothing between them."""

    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        halve = partial(
            nn.Conv,
            kernel_size=(3, 3),
            strides=2,
            padding=1,
            kernel_init=torch_default_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        x = halve(self.channels // 2, name="conv1")(images)
        return halve(self.channels, name="conv2")(x)


class DiNAT(ImageClassifier):
    """NAT, DiNAT or DiNAT_s classifier.

    Attributes:
      image_size: of `example_inputs`; images of every other size are taken too.
      overlapping: embed and merge with overlapping convolutions (NAT, DiNAT), or cut patches and
        merge them as Swin does, padded with zeros where they do not fit (DiNAT_s).
      patch_size: of the patches; overlapping ones have stride 4.
      patch_norm: LayerNorm behind the embedding.
      kernel_size: neighbours along each axis, odd; None: all positions of a square map.
      dilations: of each block, stage by stage; None: 1 everywhere.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      layer_scale: initial value of a learned scale per channel on every branch; None: no scales.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    overlapping: bool = True
    patch_size: int = 4
    embed_dim: int = 64
    patch_norm: bool = True
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int | None = 7
    dilations: tuple[tuple[int, ...], ...] | None = None
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    scale: float | None = None
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.2

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        self._check(images.shape)
        types = self.types
        out = {}
        if self.overlapping:
            x = ConvEmbed(self.embed_dim, name="embed", **types)(images)
        else:
            whole = pad_to_multiple(images, self.patch_size, self.patch_size)
            x = PatchEmbed(self.embed_dim, self.patch_size, name="embed", **types)(whole)
        x = LayerNorm(name="embed_norm", **types)(x) if self.patch_norm else x
        out["patch_embed"] = x
        x = nn.Dropout(self.dropout)(x, deterministic=not train)

        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        dilations = self.dilations or tuple((1,) * depth for depth in self.depths)
        for i, num_heads in enumerate(self.num_heads):
            attention = partial(
                NeighborhoodAttention,
                num_heads,
                self.kernel_size,
                qkv_bias=self.qkv_bias,
                scale=self.scale,
                dropout=self.dropout,
                name="attention",
                **types,
            )
            hidden = int(x.shape[-1] * self.mlp_ratio)
            mlp = partial(Mlp, hidden, dropout=self.dropout, name="mlp", **types)
            make = partial(block, mlp=mlp, layer_scale=self.layer_scale, **types)
            last = i == len(self.depths) - 1
            if self.overlapping:
                merge = partial(ConvMerging, 2 * x.shape[-1], use_bias=False, **types)
            else:
                merge = partial(PatchMerging, pad=True, **types)
            blocks = tuple(
                partial(make, partial(attention, dilation=dilation), drop_path=rate)
                for dilation, rate in zip(dilations[i], rates[i], strict=True)
            )
            stage = Stage(blocks, None if last else merge, name=f"stages_{i}")
            out[f"stage{i + 1}"], merged = stage(x, train)
            if not last:
                x = out[f"downsample{i + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.in_channels or 0 in shape:
            raise ValueError(
                f"This model takes images of shape (batch, height, width, {self.in_channels}), "
                f"not {shape}."
            )
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads={self.num_heads} and depths={self.depths} need one number a stage."
            )
        if self.dilations and tuple(map(len, self.dilations)) != tuple(self.depths):
            raise ValueError(
                f"dilations={self.dilations} do not fit depths={self.depths}; give one number for "
                "each block, stage by stage."
            )


# ---------------------------------------------------------------------------- checkpoints


def _resize_bias(table: np.ndarray, shape: tuple[int, ...], *_) -> np.ndarray:
    heads, rows, _ = table.shape
    flat = table.reshape(heads, -1).T
    return resize_grid(flat, (rows, rows), shape[1:]).T.reshape(shape)


def _block(theirs: str, ours: str) -> list[Rule]:
    """Official names of a block."""
    return [
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        Rule(f"{theirs}.attn.rpb", f"{ours}/attention/relative_position_bias"),
        *dense_rules(f"{theirs}.attn.qkv", f"{ours}/attention/qkv"),
        *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
        Rule(f"{theirs}.gamma1", f"{ours}/layer_scale1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
        Rule(f"{theirs}.gamma2", f"{ours}/layer_scale2"),
    ]


def _hugging_face_block(theirs: str, ours: str) -> list[Rule]:
    """Names of a block in transformers, which splits the projection and stacks the scales."""
    parts = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
    return [
        *norm_rules(f"{theirs}.layernorm_before", f"{ours}/norm1"),
        Rule(f"{theirs}.attention.self.rpb", f"{ours}/attention/relative_position_bias"),
        Rule(
            tuple(f"{part}.weight" for part in parts),
            f"{ours}/attention/qkv/kernel",
            chain(linear, concat(1)),
        ),
        Rule(tuple(f"{part}.bias" for part in parts), f"{ours}/attention/qkv/bias", concat(0)),
        *dense_rules(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
        Rule(
            f"{theirs}.layer_scale_parameters",
            (f"{ours}/layer_scale1", f"{ours}/layer_scale2"),
            chain(split(0), squeeze(0)),
        ),
        *norm_rules(f"{theirs}.layernorm_after", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.output.dense", f"{ours}/mlp/down"),
    ]


def _index(model: DiNAT, **_: int) -> np.ndarray | None:
    """What the layers that attend to a whole map have in their files."""
    side = -(-model.image_size[0] // model.patch_size)
    return None if model.kernel_size else relative_position_index((side, side)).T


def _layout(
    embed: str, embed_norm: str, norm: str, head: str, *rules: Rule, unused: tuple[str, ...] = ()
) -> Rules:
    return Rules(
        (
            *conv_rules(f"{embed}.0", "embed/conv1"),
            *conv_rules(f"{embed}.1", "embed/conv2"),
            *conv_rules(f"{embed}", "embed"),
            *norm_rules(embed_norm, "embed_norm"),
            *rules,
            *norm_rules(norm, "norm"),
            *dense_rules(head, "head"),
        ),
        derived={"layers.{b}.attn.relative_position_index": _index},
        unused=unused,
        fresh=("head/kernel", "head/bias"),
        resize={"stages_{s}/layers_{b}/attention/relative_position_bias": _resize_bias},
    )


def _official(levels: str, reduction: str, transform: Transform, dense: bool = False) -> Rules:
    """The authors' names; `dense`: of detectors, where each stage's map has a norm of its own."""
    return _layout(
        "patch_embed.proj",
        "patch_embed.norm",
        "norm3" if dense else "norm",
        "head",
        *_block(f"{levels}.{{s}}.blocks.{{b}}", "stages_{s}/layers_{b}"),
        Rule(
            f"{levels}.{{s}}.downsample.reduction.weight",
            f"stages_{{s}}/downsample/{reduction}/kernel",
            transform,
        ),
        *norm_rules(f"{levels}.{{s}}.downsample.norm", "stages_{s}/downsample/norm"),
        unused=("norm0.*", "norm1.*", "norm2.*") if dense else (),
    )


def _hugging_face(prefix: str, norm: str = "layernorm") -> Rules:
    """Transformers' names; its backbones have a norm of each stage's map (`norm`: the last)."""
    encoder = f"{prefix}encoder.levels.{{s}}"
    return _layout(
        f"{prefix}embeddings.patch_embeddings.projection",
        f"{prefix}embeddings.norm",
        f"{prefix}{norm}",
        "classifier",
        *_hugging_face_block(f"{encoder}.layers.{{b}}", "stages_{s}/layers_{b}"),
        Rule(f"{encoder}.downsample.reduction.weight", "stages_{s}/downsample/conv/kernel", conv),
        *norm_rules(f"{encoder}.downsample.norm", "stages_{s}/downsample/norm"),
        unused=() if norm == "layernorm" else ("hidden_states_norms.*",),
    )


LAYOUTS = {
    "isotropic": _layout(
        "patch_embed.proj",
        "patch_embed.norm",
        "norm",
        "head",
        *_block("layers.{b}", "stages_0/layers_{b}"),
    ),
    "dinat": _official("levels", "conv", conv),
    "dinat_s": _official("layers", "reduction", linear),
    "huggingface": _hugging_face("dinat."),
    "huggingface_nat": _hugging_face("nat."),
    "huggingface_encoder": _hugging_face(""),
    "huggingface_backbone": _hugging_face("", "hidden_states_norms.stage4"),
    "detection": _official("levels", "conv", conv, dense=True),
    "detection_s": _official("layers", "reduction", linear, dense=True),
}

# ------------------------------------------------------------------------------- variants

_SIZES = {  # width, depths, heads, MLP ratio, drop path
    "isotropic_small": (384, (12,), (12,), 4.0, 0.1),
    "isotropic_base": (768, (12,), (24,), 4.0, 0.4),
    "s_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 4.0, 0.2),
    "s_small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 4.0, 0.3),
    "s_base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 4.0, 0.5),
    "s_large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 4.0, 0.35),
    "mini": (64, (3, 4, 6, 5), (2, 4, 8, 16), 3.0, 0.2),
    "tiny": (64, (3, 4, 18, 5), (2, 4, 8, 16), 3.0, 0.2),
    "small": (96, (3, 4, 18, 5), (3, 6, 12, 24), 2.0, 0.3),
    "base": (128, (3, 4, 18, 5), (4, 8, 16, 32), 2.0, 0.5),
    "large": (192, (3, 4, 18, 5), (6, 12, 24, 48), 2.0, 0.35),
}


def _variant(
    name: str,
    file: str,
    top1: float | None,
    params: int,
    gflops: float | None,
    wide: tuple[int, ...] | None = (8, 4, 2, 1),
    resolution: int = 224,
    **fields,
) -> tuple[str, Variant]:
    """A model under its official name; dilations are 1, w, 1, w ... by `wide`, None for NAT."""
    size = next(size for size in _SIZES if size in name.replace("vitrpb", "isotropic"))
    width, depths, heads, mlp_ratio, drop_path = _SIZES[size]
    if wide:
        wide = tuple(
            tuple(w if b % 2 else 1 for b in range(depth))
            for depth, w in zip(depths, wide, strict=True)
        )
    dilated = name.startswith("dinat") or size.startswith("isotropic")
    return name, Variant(
        module=DiNAT,
        fields={
            "image_size": (resolution, resolution),
            "overlapping": not size.startswith(("s_", "isotropic_")),
            "patch_size": 16 if size.startswith("isotropic_") else 4,
            "embed_dim": width,
            "depths": depths,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio,
            "dilations": wide,
            "drop_path": drop_path,
            **fields,
        },
        task="image_classification",
        params=params,
        flops=gflops and gflops * 1e9,
        metric=f"ImageNet-1K top-1 {top1} %" if top1 else "",
        paper="Dilated Neighborhood Attention Transformer, arXiv 2209.15001"
        if dilated
        else "Neighborhood Attention Transformer, arXiv 2204.07143",
        code="github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        licence="MIT",
        files=(File(f"{file}.pth"),),
        preprocessing=Preprocessing(crop=1.0 if resolution == 384 else 0.875),
    )


_NAT = {"wide": None}
_ISO = {"wide": (2,)}
_SCALED = {"layer_scale": 1e-5}
_384 = {"resolution": 384}
_384_WIDE = {"resolution": 384, "wide": (13, 6, 3, 1)}
_22K = {"num_classes": 21841, "drop_path": 0.2}
_K11 = {"kernel_size": 11}
_WHOLE = {"kernel_size": None}

VARIANTS = dict(
    _variant(name, file, top1, params, gflops, **fields)
    for name, file, top1, params, gflops, fields in (
        ("nat_mini", "nat_mini", 81.8, 19_984_174, 2.7, _NAT),
        ("nat_tiny", "nat_tiny", 83.2, 27_901_582, 4.3, _NAT),
        ("nat_small", "nat_small", 83.7, 50_743_297, 7.8, _NAT | _SCALED),
        ("nat_base", "nat_base", 84.3, 89_769_652, 13.7, _NAT | _SCALED),
        ("dinat_mini", "dinat_mini_in1k_224", 81.8, 19_984_174, 2.7, {}),
        ("dinat_tiny", "dinat_tiny_in1k_224", 82.7, 27_901_582, 4.3, {}),
        ("dinat_small", "dinat_small_in1k_224", 83.8, 50_719_681, 7.8, {}),
        ("dinat_base", "dinat_base_in1k_224", 84.4, 89_769_652, 13.7, _SCALED),
        ("dinat_large", "dinat_large_in22k_in1k_224", 86.6, 200_943_514, 30.6, {}),
        ("dinat_large_384", "dinat_large_in22k_in1k_384", 87.4, 200_943_514, 89.7, _384_WIDE),
        (
            "dinat_large_384_11x11",
            "dinat_large_in22k_in1k_384_11x11",
            87.5,
            201_144_250,
            92.4,
            _384 | _K11,
        ),
        ("dinat_large_21k", "dinat_large_in22k_224", None, 232_976_131, None, _22K),
        (
            "dinat_large_21k_11x11",
            "dinat_large_in22k_224_11x11interp",
            None,
            233_176_867,
            None,
            _22K | _K11,
        ),
        ("dinat_s_tiny", "dinat_s_tiny_in1k_224", 81.8, 28_288_354, 4.5, {}),
        ("dinat_s_small", "dinat_s_small_in1k_224", 83.5, 49_606_258, 8.7, {}),
        ("dinat_s_base", "dinat_s_base_in1k_224", 83.8, 87_768_224, 15.4, {}),
        ("dinat_s_large", "dinat_s_large_in1k_224", 86.5, 196_532_476, 34.5, {}),
        ("dinat_s_large_384", "dinat_s_large_in1k_384", 87.4, 196_532_476, 101.5, _384_WIDE),
        ("dinat_s_large_21k", "dinat_s_large_in22k_224", None, 228_565_093, None, _22K),
        ("nat_isotropic_small", "nat_isotropic_small_in1k_224", 80.0, 21_999_736, 4.3, _NAT),
        ("nat_isotropic_base", "nat_isotropic_base_in1k_224", 81.6, 86_465_800, 16.9, _NAT),
        ("vitrpb_small", "vitrpb_small_in1k_224", 81.2, 22_080_376, 4.6, _NAT | _WHOLE),
        ("vitrpb_base", "vitrpb_base_in1k_224", 82.5, 86_627_080, 17.5, _NAT | _WHOLE),
        ("dinat_isotropic_small", "dinat_isotropic_small_in1k_224", 80.8, 21_999_736, 4.3, _ISO),
        ("dinat_isotropic_base", "dinat_isotropic_base_in1k_224", 82.1, 86_465_800, 16.9, _ISO),
    )
) | {
    "dinat_test": Variant(
        module=DiNAT,
        fields={
            "image_size": (32, 32),
            "num_classes": 10,
            "embed_dim": 24,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "kernel_size": 3,
            "dilations": ((1, 2), (1, 1)),
            "mlp_ratio": 2.0,
            "drop_path": 0.0,
        },
        task="image_classification",
        paper="Dilated Neighborhood Attention Transformer, arXiv 2209.15001",
        code="github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
