"""Video Swin Transformer: Swin's shifted windows in space and time.

Liu et al., "Video Swin Transformer", CVPR 2022, arXiv 2106.13230. Official code:
github.com/SwinTransformer/Video-Swin-Transformer (Apache-2.0), which we follow. Its use for drivers
("Applying Spatiotemporal Attention to Identify Distracted and Drowsy Driving with Vision
Transformers", 2022) has no published code and its abstract leaves variant and clip length open:
the `driver` variant, nine classes on the smallest model, is unverified.

The block is Swin's (see `zoo.models.vision.swin`) on `x [B, T, H, W, C]` with windows of 8 x 7 x 7
tokens, shifted by half a window on each axis in odd blocks. An axis that is not larger than the
window has one window of its own length and no shift. Maps are padded with zeros at the end of each
axis behind the norm; padded tokens take part as keys that hold the biases. Patches are merged in
space only.

Two things that the code does and the paper does not say: a window that shrank to N tokens uses
the first N rows and columns of the full window's index, which is right if only time shrinks and
gives other offsets if height or width do; and there is no position of a clip's tokens but the bias.

    features         swin_tiny_patch244_window877_kinetics400_1k
    patch_embed      16  56  56   96    patches of 2x4x4, linear, LayerNorm
    stage1           16  56  56   96    2 blocks
    downsample1      16  28  28  192    2x2 neighbours concatenated, LayerNorm, linear
    stage2           16  28  28  192    2 blocks, stride 8
    downsample2      16  14  14  384
    stage3           16  14  14  384    6 blocks, stride 16
    downsample3      16   7   7  768
    stage4           16   7   7  768    2 blocks, stride 32
    norm             16   7   7  768
    pooled                       768    mean over the clip
    logits                       400
"""

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, conv_rules, dense_rules, linear, norm_rules
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import check_pixels
from zoo.layers.hierarchy import PatchMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.patch import torch_default_init
from zoo.layers.position import relative_position_index, resize_grid
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.layers.window import ShiftedWindowAttention
from zoo.system import File, Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)
Size = tuple[int, int, int]


def fit_window(size: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
    """Window and shift that a block really uses on a clip of `size`, axis by axis."""
    fitted = tuple(min(length, w) for length, w in zip(size, window, strict=True))
    shift = tuple(
        w // 2 if shifted and length > w else 0 for length, w in zip(size, window, strict=True)
    )
    return fitted, shift


def pad_clip(x: Float[Array, "batch t h w channels"], multiples: Size) -> Array:
    """A clip with zeros at the end of each axis, up to the next multiples."""
    extra = [-length % m for length, m in zip(x.shape[1:4], multiples, strict=True)]
    return jnp.pad(x, ((0, 0), *((0, e) for e in extra), (0, 0))) if any(extra) else x


class ClipEmbed(nn.Module):
    """A linear map of each patch of `patch_size` pixels; clips are padded to whole patches.

    One matrix product, with the parameters of a convolution, `kernel [t, h, w, in, channels]`.
    """

    channels: int
    patch_size: Size
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, clips: Float[Array, "batch frames height width in_channels"]
    ) -> Float[Array, "batch time rows columns channels"]:
        p, q, r = self.patch_size
        x = pad_clip(clips.astype(self.dtype), self.patch_size)
        shape = (p, q, r, clips.shape[-1], self.channels)
        kernel = self.param("kernel", torch_default_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), self.param_dtype)
        x = rearrange(x, "b (t p) (h q) (w r) c -> b t h w (p q r c)", p=p, q=q, r=r)
        return x @ kernel.astype(self.dtype).reshape(-1, self.channels) + bias.astype(self.dtype)


class VideoSwin(Model):
    """Video Swin classifier.

    Attributes:
      clip_size: frames, height and width of `example_inputs`; clips of every other size are taken.
      num_classes: 0 leaves out the head (logits are then the pooled features).
      window_size: tokens along time, height and width.
      patch_norm: LayerNorm in the patch embedding.
      scale: factor on q k^T; None is 1 / sqrt(head width).
      dropout: after projections and in MLPs.
      head_dropout: before the head.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
      remat: recompute blocks in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
    """

    clip_size: Size = (32, 224, 224)
    patch_size: Size = (2, 4, 4)
    in_channels: int = 3
    num_classes: int = 400
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: Size = (8, 7, 7)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    patch_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.5
    drop_path: float = 0.1
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.clip_size, self.in_channels)
        return {"clips": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, clips: Float[Array, "batch frames height width in_channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(clips, train)["logits"]

    @nn.compact
    def features(
        self, clips: Float[Array, "batch frames height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        if clips.ndim != 5 or clips.shape[4] != self.in_channels or 0 in clips.shape:
            raise ValueError(
                f"This model takes clips of shape (batch, frames, height, width, "
                f"{self.in_channels}), not {clips.shape}."
            )
        check_pixels(self, clips, "clips")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out = {}
        x = ClipEmbed(self.embed_dim, self.patch_size, name="embed", **types)(clips)
        x = LayerNorm(name="embed_norm", **types)(x) if self.patch_norm else x
        out["patch_embed"] = x
        x = nn.Dropout(self.dropout)(x, deterministic=not train)

        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        rates = drop_path_rates(self.drop_path, self.depths)
        for i, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            last, channels = i == len(self.depths) - 1, x.shape[4]
            mlp = partial(
                Mlp, int(channels * self.mlp_ratio), dropout=self.dropout, name="mlp", **types
            )
            blocks = []
            for b in range(depth):
                window, shift = fit_window(x.shape[1:4], self.window_size, b % 2 == 1)
                attention = partial(
                    ShiftedWindowAttention,
                    num_heads,
                    self.window_size,
                    self.qkv_bias,
                    self.scale,
                    self.attention_dropout,
                    self.dropout,
                    shift=shift,
                    cut=window,
                    name="attention",
                    **types,
                )
                blocks.append(partial(block, attention, mlp, drop_path=rates[i][b], **types))
            merge = None if last else partial(PatchMerging, True, **types)
            out[f"stage{i + 1}"], merged = Stage(tuple(blocks), merge, name=f"stages_{i}")(x, train)
            if not last:
                x = out[f"downsample{i + 1}"] = merged
        x = out["norm"] = LayerNorm(name="norm", **types)(out[f"stage{len(self.depths)}"])
        x = out["pooled"] = x.mean((1, 2, 3))
        x = nn.Dropout(self.head_dropout)(x, deterministic=not train)
        if self.num_classes:
            init = nn.initializers.normal(0.01)
            x = nn.Dense(self.num_classes, kernel_init=init, name="head", **types)(x)
        out["logits"] = x
        return out


def inflate(
    state_dict: Mapping[str, np.ndarray], model: VideoSwin, prefix: str = "backbone."
) -> dict[str, np.ndarray]:
    """The state dict of a 2-D Swin as a start for a clip model, as the official code inflates it.

    Kernels of patches are repeated over time and divided by its length, so that a clip of equal
    frames gives the image's tokens; bias tables are repeated for every offset in time (resized
    first if the window differs in space). The head and what is recomputed are left out: load with
    `zoo.convert(model, inflate(state, model), adapt=True)`, which starts a fresh head.

    Args:
      state_dict: official names and arrays of a Swin (`layers.0.blocks.0...`).
      model: the clip model.
      prefix: of the names that come out.
    """
    time, (_, height, width) = model.patch_size[0], model.window_size
    steps = 2 * model.window_size[0] - 1
    out = {}
    for name, value in state_dict.items():
        value = np.asarray(value)
        if name.startswith("head.") or name.endswith(("relative_position_index", "attn_mask")):
            continue
        if name == "patch_embed.proj.weight":
            value = np.repeat(value[:, :, None], time, 2) / np.asarray(time, value.dtype)
        elif name.endswith("relative_position_bias_table"):
            side = round(len(value) ** 0.5)
            grid = (2 * height - 1, 2 * width - 1)
            value = value if (side, side) == grid else resize_grid(value, (side, side), grid)
            value = np.tile(value, (steps, 1))
        out[f"{prefix}{name}"] = value
    return out


# ---------------------------------------------------------------------------- checkpoints


def _index(model: VideoSwin, **_: int) -> np.ndarray:
    return relative_position_index(model.window_size)


def _resize_bias(
    table: np.ndarray, shape: tuple[int, ...], model: VideoSwin, *_: object
) -> np.ndarray:
    """The bias of an image model, the same for every offset in time (see `inflate`)."""
    _, height, width = model.window_size
    side, grid = round(len(table) ** 0.5), (2 * height - 1, 2 * width - 1)
    table = table if (side, side) == grid else resize_grid(table, (side, side), grid)
    return np.tile(table, (2 * model.window_size[0] - 1, 1))


def _naming(backbone: str, head: str, stage: str, merge: str, mlp: tuple[str, str]) -> Rules:
    """Rules of one published naming; `stage` and `merge` hold `{s}`."""
    ours = "stages_{s}/layers_{b}"
    theirs = f"{backbone}{stage}"
    return Rules(
        (
            *conv_rules(f"{backbone}patch_embed.proj", "embed"),
            *norm_rules(f"{backbone}patch_embed.norm", "embed_norm"),
            Rule(
                f"{theirs}.attn.relative_position_bias_table",
                f"{ours}/attention/relative_position_bias",
            ),
            *dense_rules(f"{theirs}.attn.qkv", f"{ours}/attention/qkv"),
            *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
            *dense_rules(f"{theirs}.{mlp[0]}", f"{ours}/mlp/up"),
            *dense_rules(f"{theirs}.{mlp[1]}", f"{ours}/mlp/down"),
            *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
            *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
            *norm_rules(f"{backbone}{merge}.norm", "stages_{s}/downsample/norm"),
            Rule(
                f"{backbone}{merge}.reduction.weight",
                "stages_{s}/downsample/reduction/kernel",
                linear,
            ),
            *norm_rules(f"{backbone}norm", "norm"),
            *dense_rules(head, "head"),
        ),
        derived={f"{theirs}.attn.relative_position_index": _index, f"{theirs}.attn_mask": None},
        fresh=("head/kernel", "head/bias"),
        resize={f"{ours}/attention/relative_position_bias": _resize_bias},
    )


LAYOUTS = {
    "official": _naming(
        "backbone.",
        "cls_head.fc_cls",
        "layers.{s}.blocks.{b}",
        "layers.{s}.downsample",
        ("mlp.fc1", "mlp.fc2"),
    ),
    "backbone": _naming(
        "",
        "head",
        "layers.{s}.blocks.{b}",
        "layers.{s}.downsample",
        ("mlp.fc1", "mlp.fc2"),
    ),
    "torchvision": _naming(
        "",
        "head",
        "features.{2*s}.{b}",
        "features.{2*s+1}",
        ("mlp.0", "mlp.3"),
    ),
}

# ------------------------------------------------------------------------------- variants


def _variant(
    size: str,
    data: str = "kinetics400",
    pretrain: str = "1k",
    num_classes: int = 400,
    window: Size = (8, 7, 7),
    drop_path: float = 0.1,
    params: int | None = None,
    flops: float | None = None,
    metric: str = "",
) -> tuple[str, Variant]:
    dim, depths, heads = {
        "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
        "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    }[size]
    name = f"swin_{size}_patch244_window{''.join(map(str, window))}_{data}"
    name = f"{name}_{pretrain}" if pretrain else name
    return name, Variant(
        module=VideoSwin,
        fields={
            "num_classes": num_classes,
            "embed_dim": dim,
            "depths": depths,
            "num_heads": heads,
            "window_size": window,
            "drop_path": drop_path,
        },
        task="video_classification",
        params=params,
        flops=flops,
        metric=metric,
        paper="Video Swin Transformer, arXiv 2106.13230",
        code="github.com/SwinTransformer/Video-Swin-Transformer",
        licence="Apache-2.0",
        files=(File(f"{name}.pth"),),
        preprocessing=Preprocessing(crop=1.0, interpolation="bilinear"),
    )


_K400 = "top-1, Kinetics-400, 4x3 views"
VARIANTS = dict(
    (
        _variant("tiny", params=28_158_070, flops=87.9e9, metric=f"78.8 % {_K400}"),
        _variant("small", params=49_816_678, flops=165.9e9, metric=f"80.6 % {_K400}"),
        _variant(
            "base", drop_path=0.3, params=88_048_984, flops=281.6e9, metric=f"80.6 % {_K400}"
        ),
        _variant(
            "base", pretrain="22k", drop_path=0.2, params=88_048_984, flops=281.6e9,
            metric=f"82.7 % {_K400}",
        ),
        _variant(
            "base", "kinetics600", "22k", 600, drop_path=0.2, flops=281.6e9,
            metric="84.0 % top-1, Kinetics-600, 4x3 views",
        ),
        _variant(
            "base", "sthv2", "", 174, (16, 7, 7), drop_path=0.4, flops=320.6e9,
            metric="69.6 % top-1, Something-Something v2",
        ),
    )
) | {
    "video_swin_driver": Variant(
        module=VideoSwin,
        fields={"num_classes": 9},
        task="video_classification",
        params=27_857_391,
        paper="Applying Spatiotemporal Attention to Identify Distracted and Drowsy Driving, 2022",
        code="none published; variant and clip length are unverified",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0, interpolation="bilinear"),
    ),
    "video_swin_test": Variant(
        module=VideoSwin,
        fields={
            "clip_size": (8, 32, 32),
            "num_classes": 4,
            "embed_dim": 24,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": (2, 4, 4),
            "head_dropout": 0.0,
            "drop_path": 0.0,
        },
        task="video_classification",
        paper="Video Swin Transformer, arXiv 2106.13230",
        code="github.com/SwinTransformer/Video-Swin-Transformer",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0, interpolation="bilinear"),
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
