"""Swin Transformer (V1): windows of attention, shifted in every second block, in a pyramid.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
arXiv 2103.14030. Official code: github.com/microsoft/Swin-Transformer (MIT), which we follow.

A block works on a map `x [B, H, W, C]` in windows of M x M tokens:

    x = x + DropPath(window_attention(LN(x)));   x = x + DropPath(MLP(LN(x)))
    window_attention = softmax(q k^T / sqrt(32) + B[h] + mask) v          B learned per offset

Odd blocks roll the map by (-s, -s), s = M // 2, before cutting windows and back after; the mask
(-100, as in the code) parts tokens that were not neighbours before the roll. A stage whose map is
not larger than a window has one window of the map's size and no shift, so the shape of its bias
table depends on `image_size`.

    features         swin_tiny_patch4_window7_224
    patch_embed      56  56   96    4x4 patches, linear, LayerNorm
    stage1           56  56   96    2 blocks
    downsample1      28  28  192    2x2 neighbours concatenated, LayerNorm, linear
    stage2           28  28  192    2 blocks
    downsample2      14  14  384
    stage3           14  14  384    6 blocks
    downsample3       7   7  768
    stage4            7   7  768    2 blocks
    norm              7   7  768
    pooled                   768    mean over the map
    logits                  1000
"""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    concat,
    conv_rules,
    dense_rules,
    elementwise,
    identity,
    linear,
    norm_rules,
)
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.hierarchy import PatchMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.patch import PatchEmbed
from zoo.layers.position import relative_position_index, resize_grid, resize_table
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.layers.window import (
    ShiftedWindowAttention,
    fit_window,
    pad_to_multiple,
    shifted_window_mask,
)
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts


class Swin(ImageClassifier):
    """Swin Transformer classifier.

    Attributes:
      image_size: height and width in pixels; windows must tile every stage's map.
      window_size: M, in tokens, of all stages, or one for each.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      absolute_position: add a learned table after the patch embedding (`ape` in the code).
      patch_norm: LayerNorm in the patch embedding.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
      pad: take images of any size, with zeros to whole patches, windows and merged maps, as code
        for detection and torchvision do; a map of one window is not shifted.
    """

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    absolute_position: bool = False
    patch_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.1
    pad: bool = False

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        if self.pad:
            self.check_channels(images.shape)
            images = pad_to_multiple(images, self.patch_size, self.patch_size)
            if self.absolute_position:
                raise ValueError("A table of absolute positions has one size: it excludes pad.")
        else:
            self.check_size(images.shape)
        types = self.types
        out = {}
        x = PatchEmbed(self.embed_dim, self.patch_size, name="embed", **types)(images)
        if self.patch_norm:
            x = LayerNorm(name="embed_norm", **types)(x)
        out["patch_embed"] = x
        if self.absolute_position:
            shape = (1, x.shape[1] * x.shape[2], self.embed_dim)
            table = self.param("position_embedding", init, shape, self.param_dtype)
            x = x + table.astype(self.dtype).reshape(1, *x.shape[1:])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)

        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        for i, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            last, channels, size = i == len(self.depths) - 1, x.shape[3], x.shape[1:3]
            mlp = partial(
                Mlp, int(channels * self.mlp_ratio), dropout=self.dropout, name="mlp", **types
            )
            blocks = []
            for b in range(depth):
                window, shift = fit_window(size, _window_size(self, i), b % 2 == 1)
                shifts = (shift, shift)
                if self.pad:
                    window = _window_size(self, i)
                    shifts = tuple(window // 2 * (b % 2 and length > window) for length in size)
                elif size[0] % window or size[1] % window:
                    raise ValueError(
                        f"A map of {size[0]}x{size[1]} tokens cannot be cut into {window}x{window} "
                        "windows; choose an image size or window size that fits every stage, or "
                        "pad=True."
                    )
                attention = partial(
                    ShiftedWindowAttention,
                    num_heads,
                    (window, window),
                    self.qkv_bias,
                    self.scale,
                    self.attention_dropout,
                    self.dropout,
                    shift=shifts,
                    name="attention",
                    **types,
                )
                blocks.append(partial(block, attention, mlp, drop_path=rates[i][b], **types))
            merge = None if last else partial(PatchMerging, self.pad, **types)
            out[f"stage{i + 1}"], merged = Stage(tuple(blocks), merge, name=f"stages_{i}")(x, train)
            if not last:
                x = out[f"downsample{i + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, init)
        return out


def _window_size(model: Swin, stage: int) -> int:
    size = model.window_size
    return size if isinstance(size, int) else size[stage]


# ---------------------------------------------------------------------------- checkpoints


def _block(model: Swin, stage: int, layer: int) -> tuple[tuple[int, int], int, int]:
    """Map size, window and shift of a block."""
    size = tuple(s // (model.patch_size * 2**stage) for s in model.image_size)
    return size, *fit_window(size, _window_size(model, stage), layer % 2 == 1)


def _index(model: Swin, b: int, *, s: int) -> np.ndarray:
    window = _block(model, s, b)[1]
    return relative_position_index((window, window))


def _mask(model: Swin, b: int, *, s: int) -> np.ndarray | None:
    size, window, shift = _block(model, s, b)
    return shifted_window_mask(size, (window, window), (shift, shift)) if shift else None


def _resize_bias(table: np.ndarray, shape: tuple[int, ...], *_) -> np.ndarray:
    old, new = (round(rows**0.5) for rows in (table.shape[0], shape[0]))
    return resize_grid(table, (old, old), (new, new))


def _resize_position(table: np.ndarray, shape: tuple[int, ...], model: Swin, *_) -> np.ndarray:
    return resize_table(table, tuple(s // model.patch_size for s in model.image_size))


_OFFICIAL = {
    "table": "attn.relative_position_bias_table",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_HUGGING_FACE = {
    "table": "attention.self.relative_position_bias_table",
    "qkv": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    "out": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_TRANSFORMERS5 = {
    **_HUGGING_FACE,
    "table": "attention.relative_position_bias.relative_position_bias_table",
    "qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
    "out": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_OPENMMLAB = {
    **_OFFICIAL,
    "table": "attn.w_msa.relative_position_bias_table",
    "qkv": "attn.w_msa.qkv",
    "out": "attn.w_msa.proj",
    "up": "ffn.layers.0.0",
    "down": "ffn.layers.1",
}


def _naming(
    embed: str,
    embed_norm: str,
    stage: Callable[[int], str],
    merge: Callable[[int], str],
    head: str,
    names: Mapping[str, str | tuple[str, ...]] = _OFFICIAL,
    norm: str = "norm",
    table: str = "absolute_pos_embed",
    merged: Transform = identity,
    unused: tuple[str, ...] = (),
    **derived: Callable[..., np.ndarray | None],
) -> Rules:
    """Rules of one published naming: `stage(s)` has a `{b}`, `merge(s)` ends stage s.

    `merged` puts the last axis of what the merging reads into the official order.
    """
    rules = [
        *conv_rules(f"{embed}", "embed"),
        *norm_rules(embed_norm, "embed_norm"),
        Rule(table, "position_embedding"),
        *norm_rules(norm, "norm"),
        *dense_rules(head, "head"),
    ]
    recomputed = {}
    for s in range(8):  # more stages than any model has: a rule without a match is not used
        theirs, ours = stage(s), f"stages_{s}/layers_{{b}}"
        qkv = (names["qkv"],) if isinstance(names["qkv"], str) else names["qkv"]
        join = concat if len(qkv) > 1 else lambda axis: identity
        rules += [
            Rule(f"{theirs}.{names['table']}", f"{ours}/attention/relative_position_bias"),
            Rule(
                tuple(f"{theirs}.{name}.weight" for name in qkv),
                f"{ours}/attention/qkv/kernel",
                chain(linear, join(1)),
            ),
            Rule(
                tuple(f"{theirs}.{name}.bias" for name in qkv),
                f"{ours}/attention/qkv/bias",
                join(0),
            ),
            *dense_rules(f"{theirs}.{names['out']}", f"{ours}/attention/out"),
            *dense_rules(f"{theirs}.{names['up']}", f"{ours}/mlp/up"),
            *dense_rules(f"{theirs}.{names['down']}", f"{ours}/mlp/down"),
            *norm_rules(f"{theirs}.{names['norm1']}", f"{ours}/norm1"),
            *norm_rules(f"{theirs}.{names['norm2']}", f"{ours}/norm2"),
            Rule(f"{merge(s)}.norm.weight", f"stages_{s}/downsample/norm/scale", merged),
            Rule(f"{merge(s)}.norm.bias", f"stages_{s}/downsample/norm/bias", merged),
            Rule(
                f"{merge(s)}.reduction.weight",
                f"stages_{s}/downsample/reduction/kernel",
                chain(merged, linear),
            ),
        ]
        place = str(names["table"]).rpartition("relative_position_bias_table")[0]
        for name, make in derived.items():
            where = f"{theirs}.attn_mask" if name == "attn_mask" else f"{theirs}.{place}{name}"
            recomputed[where] = partial(make, s=s)
        recomputed.setdefault(f"{theirs}.{place}relative_position_index", None)
    return Rules(
        tuple(rules),
        derived=recomputed,
        unused=unused,
        fresh=("head/kernel", "head/bias", "norm/scale", "norm/bias"),
        resize={
            "stages_{s}/layers_{b}/attention/relative_position_bias": _resize_bias,
            "position_embedding": _resize_position,
        },
    )


def _from_unfold(x: np.ndarray) -> np.ndarray:
    """OpenMMLab's merging reads `[channels, row, column]`, the official one `[column, row, c]`."""
    return x.reshape(*x.shape[:-1], -1, 2, 2).swapaxes(-3, -1).reshape(x.shape)


def _to_unfold(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 2, 2, -1).swapaxes(-3, -1).reshape(x.shape)


def _blocks(s: int) -> str:
    return f"layers.{s}.blocks.{{b}}"


def _hugging_face(prefix: str, names: Mapping) -> Rules:
    return _naming(
        f"{prefix}embeddings.patch_embeddings.projection",
        f"{prefix}embeddings.norm",
        lambda s: f"{prefix}encoder.{_blocks(s)}",
        lambda s: f"{prefix}encoder.layers.{s}.downsample",
        "classifier",
        names,
        f"{prefix}layernorm",
        f"{prefix}embeddings.position_embeddings",
        unused=(f"{prefix}embeddings.mask_token", "decoder.*", "hidden_states_norms.*"),
    )


LAYOUTS = {
    "official": _naming(
        "patch_embed.proj",
        "patch_embed.norm",
        _blocks,
        lambda s: f"layers.{s}.downsample",
        "head",
        relative_position_index=_index,
        attn_mask=_mask,
    ),
    "timm": _naming(
        "patch_embed.proj",
        "patch_embed.norm",
        _blocks,
        lambda s: f"layers.{s + 1}.downsample",
        "head.fc",
    ),
    "torchvision": _naming(
        "features.0.0",
        "features.0.2",
        lambda s: f"features.{2 * s + 1}.{{b}}",
        lambda s: f"features.{2 * s + 2}",
        "head",
        {**_OFFICIAL, "up": "mlp.0", "down": "mlp.3"},
        relative_position_index=lambda model, b, *, s: _index(model, b, s=s).reshape(-1),
    ),
    "huggingface": _hugging_face("swin.", _HUGGING_FACE),
    "huggingface_encoder": _hugging_face("", _HUGGING_FACE),
    "transformers5": _hugging_face("swin.", _TRANSFORMERS5),
    "transformers5_encoder": _hugging_face("", _TRANSFORMERS5),
    "detection": _naming(  # a norm for each stage's map; the last one's is the classifier's
        "patch_embed.proj",
        "patch_embed.norm",
        _blocks,
        lambda s: f"layers.{s}.downsample",
        "head",
        norm="norm3",
        unused=("norm0.*", "norm1.*", "norm2.*"),
        relative_position_index=_index,
    ),
    "openmmlab": _naming(
        "patch_embed.projection",
        "patch_embed.norm",
        lambda s: f"stages.{s}.blocks.{{b}}",
        lambda s: f"stages.{s}.downsample",
        "head.fc",
        _OPENMMLAB,
        norm="norm3",
        merged=elementwise(_from_unfold, _to_unfold),
        unused=("norm0.*", "norm1.*", "norm2.*"),
    ),
}

# ------------------------------------------------------------------------------- variants


def _variant(
    size: str,
    resolution: int = 224,
    pretrain: str = "",
    top1: float | None = None,
    params: int | None = None,
    flops: float | None = None,
) -> tuple[str, Variant]:
    """`pretrain`: "" (ImageNet-1K), "22k" (its 21,841 classes) or "22kto1k" (fine-tuned)."""
    dim, depths, heads, drop_path = {
        "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
        "tiny_c24": (96, (2, 2, 6, 2), (4, 8, 16, 32), 0.2),  # heads of 24 channels
        "small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
        "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
        "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 0.2),
    }[size]
    window = {224: 7, 256: 8, 384: 12}[resolution]
    finetune = pretrain == "22kto1k" and size in ("tiny", "small")  # a suffix of later files
    name = "_".join(filter(None, ("swin", size, f"patch4_window{window}_{resolution}", pretrain)))
    return name, Variant(
        module=Swin,
        fields={
            "image_size": (resolution, resolution),
            "num_classes": 21841 if pretrain == "22k" else 1000,
            "embed_dim": dim,
            "depths": depths,
            "num_heads": heads,
            "window_size": window,
            "drop_path": drop_path,
        },
        task="image_classification",
        params=params,
        flops=flops,
        metric=f"{top1} % top-1, ImageNet-1K" if top1 else "",
        paper="Swin Transformer, arXiv 2103.14030",
        code="github.com/microsoft/Swin-Transformer",
        licence="MIT",
        files=(File(f"{name}_finetune.pth" if finetune else f"{name}.pth"),),
        preprocessing=Preprocessing(crop=1.0 if resolution == 384 else 0.875),
    )


VARIANTS = dict(
    (
        _variant("tiny", top1=81.2, params=28_288_354, flops=4.49e9),
        _variant("tiny", pretrain="22k", params=44_315_083, flops=4.49e9),
        _variant("tiny", pretrain="22kto1k", top1=80.9, params=28_288_354, flops=4.49e9),
        _variant("small", top1=83.2, params=49_606_258, flops=8.75e9),
        _variant("small", pretrain="22k", params=65_632_987, flops=8.75e9),
        _variant("small", pretrain="22kto1k", top1=83.2, params=49_606_258, flops=8.75e9),
        _variant("tiny_c24", 256, top1=81.6, params=28_306_432, flops=5.9e9),
        _variant("base", top1=83.5, params=87_768_224, flops=15.44e9),
        _variant("base", 384, top1=84.5, params=87_903_584, flops=47.1e9),
        _variant("base", pretrain="22k", params=109_130_249, flops=15.44e9),
        _variant("base", 384, pretrain="22k", params=109_265_609, flops=47.1e9),
        _variant("base", pretrain="22kto1k", top1=85.2, params=87_768_224, flops=15.44e9),
        _variant("base", 384, "22kto1k", 86.4, 87_903_584, 47.1e9),
        _variant("large", pretrain="22k", params=228_565_093, flops=34.5e9),
        _variant("large", 384, pretrain="22k", params=228_768_133, flops=103.9e9),
        _variant("large", pretrain="22kto1k", top1=86.3, params=196_532_476, flops=34.5e9),
        _variant("large", 384, "22kto1k", 87.3, 196_735_516, 103.9e9),
    )
) | {
    "swin_test": Variant(
        module=Swin,
        fields={
            "image_size": (32, 32),
            "patch_size": 2,
            "num_classes": 10,
            "embed_dim": 24,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 4,
            "drop_path": 0.0,
        },
        task="image_classification",
        paper="Swin Transformer, arXiv 2103.14030",
        code="github.com/microsoft/Swin-Transformer",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
