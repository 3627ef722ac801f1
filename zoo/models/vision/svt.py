"""SVT, the Scattering Vision Transformer: a learned filter in wavelet space, then attention.

Patro and Agneeswaran, "Scattering Vision Transformer: Spectral Mixing Matters", NeurIPS 2023, arXiv
2311.01310. Official code: github.com/badripatro/svt (no licence file), which we follow, with the
transform of github.com/fbcotter/pytorch_wavelets (MIT): level 1 of the dual-tree complex wavelet
transform with the filters near_sym_b.

    x = x + DropPath(mix(LN(x)));   x = x + DropPath(down(GELU(dwconv(up(LN(x))))))
    mix in stage 1:        (l, g) = DTCWT(x);   x = DTCWT^-1(W * l,  A2 ReLU(A1 g + b1) + b2)
    mix in stages 2 to 4:  softmax(q k^T / sqrt(d)) v
    class token = mean of the last tokens, then one block in which it alone attends to all of them
    logits = head(LN(class)) + max over tokens of aux_head(LN(token)) / 2

l is the undecimated lowpass, W one number for each of its entries, so that the weights belong to
one size of image. g are six complex bands at half the resolution, of orientations 15, 45, 75, 105,
135 and 165 degrees; A1 and A2 are complex matrices on four blocks of channels, shared by all bands
and positions, and the ReLU acts on real and imaginary parts apart.

The paper draws several scattering stages, and a layer that mixes tokens in wavelet space as well;
the code has one such stage, without it. In training the authors' model returns the class's and the
tokens' logits apart and exchanges boxes between images, for labels of every token (NFNet's); here
training returns what evaluation does, and `features` has both parts.

    features         svt_s
    patch_embed      56  56   64    stem of four convolutions, LayerNorm
    stage1           56  56   64    3 scattering blocks, stride 4
    downsample1      28  28  128    LayerNorm, 3x3 convolution of stride 2, LayerNorm
    stage2           28  28  128    4 attention blocks, stride 8
    downsample2      14  14  320
    stage3           14  14  320    6 blocks, stride 16
    downsample3       7   7  448
    stage4            7   7  448    3 blocks, stride 32
    class_block          50  448    class token, tokens
    pooled                   448    class token, LayerNorm
    class_logits            1000
    token_logits         49 1000
    logits                  1000
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
    batch_norm_rules,
    chain,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    split,
    transpose,
)
from zoo.layers.attention import Attention
from zoo.layers.block import ResidualBlock
from zoo.layers.classifier import ImageClassifier
from zoo.layers.conv import ConvMlp
from zoo.layers.hierarchy import ConvMerging, Stage
from zoo.layers.mlp import Mlp
from zoo.layers.norm import LayerNorm
from zoo.layers.stack import remat_block
from zoo.layers.stochastic import drop_path_rates
from zoo.system import Preprocessing, System, Variant

init = nn.initializers.normal(0.02)  # the official truncation, at 100 deviations, never acts
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # fan out / groups

# ---------------------------------------------------------------------------- the transform

# Halves of near_sym_b from the centre outwards; qshift_b serves deeper levels, which SVT has not,
# but its numbers stand in the published files.
_H0 = (0.55546875, 0.296875, -0.0482421875, -0.046875, 0.022265625, 0.0, -0.0017578125)
_H1 = (
    0.5594308035714286, -0.29975760323660716, -0.05168805803571428, 0.05564313616071428,
    0.023856026785714284, -0.007156808035714285, -0.0018833705357142855, 0.0013419015066964285,
    0.0, -7.062639508928571e-05,
)  # fmt: skip
_QSHIFT = (
    0.003253142763653182, -0.00388321199915849, 0.03466034684485349, -0.03887280126882779,
    -0.11720388769911527, 0.27529538466888204, 0.7561456438925225, 0.5688104207121227,
    0.011866092033797, -0.1067118046866654, 0.023825384794920298, 0.01702522388155399,
    -0.005439475937274115, -0.004556895628475491,
)  # fmt: skip


def filters() -> dict[str, np.ndarray]:
    """Taps by the library's names: h analyses, g synthesises; 0 low, 1 high; o level 1, a b else.

    `g0o[n] = (-1)^n h1o[n]` and `g1o[n] = (-1)^n h0o[n]`, with n counted from the centre.
    """

    def both_halves(half: tuple[float, ...], sign: int) -> np.ndarray:
        half = np.array(half) * float(sign) ** np.arange(len(half))
        return np.concatenate([half[:0:-1], half])

    q = np.array(_QSHIFT)
    alternating = q[::-1] * (-1.0) ** np.arange(len(q))
    return {
        "h0o": both_halves(_H0, 1),
        "h1o": both_halves(_H1, 1),
        "g0o": both_halves(_H1, -1),
        "g1o": both_halves(_H0, -1),
        "h0a": q,
        "h0b": q[::-1],
        "h1a": alternating,
        "h1b": alternating[::-1],
        "g0a": q[::-1],
        "g0b": q,
        "g1a": alternating[::-1],
        "g1b": alternating,
    }


def filter_bank(low: str, high: str, length: int) -> Float[np.ndarray, "2 length length"]:
    """Two filters as matrices on `length` samples, which are mirrored at their ends, edge included.

    Banded, but small: as a matrix product each filter is one operation of the compiler's best kind.
    """
    bank = np.zeros((2, length, length))
    for matrix, name in zip(bank, (low, high), strict=True):
        taps = filters()[name]
        sample = np.pad(np.arange(length), len(taps) // 2, "symmetric")
        for i in range(length):
            np.add.at(matrix[i], sample[i : i + len(taps)], taps)
    return bank


def dtcwt(
    x: Float[Array, "batch height width channels"],
) -> tuple[
    Float[Array, "batch height width channels"],
    Float[Array, "batch 6 2 height/2 width/2 channels"],
]:
    """Level 1 of the dual-tree complex wavelet transform, of maps with even sides.

    Returns:
      The lowpass, undecimated, and the complex bands: orientation, then real and imaginary part.
    """
    _, height, width, _ = x.shape
    product = partial(jnp.einsum, precision="highest")
    rows, columns = (jnp.asarray(filter_bank("h0o", "h1o", n), x.dtype) for n in (height, width))
    y = product("qjw,bhwc->bqhjc", columns, x)
    y = product("pih,bqhjc->bpqijc", rows, y)
    high = jnp.stack([y[:, 1, 0], y[:, 1, 1], y[:, 0, 1]], 1)  # 15/165, 45/135, 75/105 degrees
    high = high.reshape(x.shape[0], 3, height // 2, 2, width // 2, 2, -1) * np.sqrt(0.5).astype(
        x.dtype
    )
    a, b, c, d = (high[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))
    first = jnp.stack([a - d, b + c], 2)
    second = jnp.stack([a + d, b - c], 2)
    return y[:, 0, 0], jnp.concatenate([first, second[:, ::-1]], 1)


def inverse_dtcwt(
    low: Float[Array, "batch height width channels"],
    high: Float[Array, "batch 6 2 height/2 width/2 channels"],
) -> Float[Array, "batch height width channels"]:
    """The inverse of `dtcwt`, exact but for rounding."""
    _, height, width, _ = low.shape
    product = partial(jnp.einsum, precision="highest")
    first, second = high[:, :3] * np.sqrt(0.5), high[:, :2:-1] * np.sqrt(0.5)
    a, d = first[:, :, 0] + second[:, :, 0], second[:, :, 0] - first[:, :, 0]
    b, c = first[:, :, 1] + second[:, :, 1], first[:, :, 1] - second[:, :, 1]
    y = jnp.stack([jnp.stack([a, b], 4), jnp.stack([c, d], 4)], 3)  # batch 3 h 2 w 2 channels
    y = y.reshape(low.shape[0], 3, height, width, -1)
    y = jnp.stack([jnp.stack([low, y[:, 2]], 1), jnp.stack([y[:, 0], y[:, 1]], 1)], 1)
    rows, columns = (jnp.asarray(filter_bank("g0o", "g1o", n), low.dtype) for n in (height, width))
    y = product("pih,bpqhjc->bqijc", rows, y)
    return product("qjw,bqiwc->bijc", columns, y)


# -------------------------------------------------------------------------------- the model


class ComplexDense(nn.Module):
    """A complex matrix for each block of channels; axis 2 of the input is real and imaginary part.

    The kernel is [2, blocks, channels, channels], the bias [2, blocks, channels].
    """

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch 6 2 height width blocks channels"]
    ) -> Float[Array, "batch 6 2 height width blocks channels"]:
        blocks, width = z.shape[-2:]
        shape = (2, blocks, width, width)
        real, imaginary = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", init, shape[:-1], self.param_dtype)
        product = jnp.stack([jnp.stack([real, imaginary]), jnp.stack([-imaginary, real])])
        z = jnp.einsum("bophwkd,pqkde->boqhwke", z, product.astype(jnp.float32))
        return z + bias.astype(jnp.float32)[:, None, None]


class Scatter(nn.Module):
    """A learned filter in wavelet space, in float32.

    Attributes:
      blocks: of channels, within which the matrices on the bands act.
    """

    blocks: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        _, height, width, channels = x.shape
        if height % 2 or width % 2 or channels % self.blocks:
            raise ValueError(
                f"The wavelet transform needs a map of even sides and a multiple of {self.blocks} "
                f"channels, not {height}x{width}x{channels}; choose an image size that is a "
                "multiple of 8."
            )
        low, high = dtcwt(x.astype(jnp.float32))
        weight = self.param("lowpass", init, (height, width, channels), self.param_dtype)
        high = high.reshape(*high.shape[:-1], self.blocks, -1)
        dense = partial(ComplexDense, param_dtype=self.param_dtype)
        high = dense(name="bands2")(nn.relu(dense(name="bands1")(high)))
        x = inverse_dtcwt(low * weight.astype(jnp.float32), high.reshape(*high.shape[:-2], -1))
        return x.astype(self.dtype)


class MapAttention(Attention):
    """Attention among all positions of a map."""

    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        """Attend."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return super().__call__(tokens, train=train).reshape(x.shape)


class ClassAttention(nn.Module):
    """Attention of the first token to all of them."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"]
    ) -> Float[Array, "batch 1 channels"]:
        batch, _, channels = x.shape
        dense = partial(
            nn.Dense, channels, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        query, key, value = (
            dense(name=name)(t).reshape(batch, -1, self.num_heads, channels // self.num_heads)
            for name, t in (("query", x[:, :1]), ("key", x), ("value", x))
        )
        y = kernels_pallas.attention(query, key, value)
        return dense(name="out")(y.reshape(batch, 1, channels))


class ClassBlock(nn.Module):
    """A block that changes the first token alone."""

    num_heads: int
    mlp_ratio: float
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"]
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        token, rest = x[:, :1], x[:, 1:]
        token = token + ClassAttention(self.num_heads, name="attention", **types)(
            norm(name="norm1")(x)
        )
        y = norm(name="norm2")(token)
        token = token + Mlp(int(x.shape[-1] * self.mlp_ratio), name="mlp", **types)(y)
        return jnp.concatenate([token, rest], 1)


class Stem(nn.Module):
    """A quarter of the resolution by four convolutions, LayerNorm at the end."""

    hidden: int
    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch rows columns channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.astype(self.dtype)
        for i, (size, stride) in enumerate(((7, 2), (3, 1), (3, 1)), 1):
            x = nn.Conv(
                self.hidden,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=False,
                kernel_init=conv_init,
                name=f"conv{i}",
                **types,
            )(x)
            norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name=f"norm{i}", **types)
            x = nn.relu(norm(x, use_running_average=not train))
        return ConvMerging(self.channels, name="downsample", **types)(x)


class SVT(ImageClassifier):
    """SVT classifier.

    Attributes:
      image_size: height and width in pixels; stage 1 has parameters for every position of its map.
      num_classes: 0 leaves out the heads; logits are then the pooled features, with `token_label`
        plus half of the largest over the tokens, as the official code has it.
      stem_dim: width of the stem's first convolutions.
      scattering: how many stages scatter; the others attend.
      token_label: a second head, on the tokens, whose maximum is added to the logits.
      epsilon: of the norms in blocks and behind stages.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    stem_dim: int = 32
    embed_dims: tuple[int, ...] = (64, 128, 320, 448)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    num_heads: tuple[int, ...] = (2, 4, 10, 14)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    scattering: int = 1
    token_label: bool = True
    epsilon: float = 1e-6
    drop_path: float = 0.1

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above): `stage1 ...` is the pyramid, before merging."""
        self.check_images(images)
        self.check_size(images.shape)
        types = self.types
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        out = {}
        x = Stem(self.stem_dim, self.embed_dims[0], name="embed", **types)(images, train)
        out["patch_embed"] = x
        block = remat_block(ResidualBlock, self.remat, static_argnums=(2,))
        for i, rates in enumerate(drop_path_rates(self.drop_path, self.depths)):
            if i < self.scattering:
                mixer = partial(Scatter, name="scatter", **types)
            else:
                mixer = partial(
                    MapAttention, self.num_heads[i], fused=False, name="attention", **types
                )
            hidden = int(self.embed_dims[i] * self.mlp_ratios[i])
            mlp = partial(ConvMlp, hidden, conv_init=depthwise_init, name="mlp", **types)
            make = partial(block, mixer, mlp, epsilon=self.epsilon, **types)
            blocks = tuple(partial(make, drop_path=rate) for rate in rates)
            x, _ = Stage(blocks, name=f"stages_{i}")(x, train)
            out[f"stage{i + 1}"] = x
            if i + 1 < len(self.depths):
                merge = ConvMerging(self.embed_dims[i + 1], name=f"downsample_{i}", **types)
                x = out[f"downsample{i + 1}"] = merge(norm(name=f"norm_{i}")(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)
        layer = ClassBlock(
            self.num_heads[-1], self.mlp_ratios[-1], self.epsilon, name="class_block", **types
        )
        x = out["class_block"] = layer(x)
        x = norm(name="norm")(x)
        logits = out["pooled"] = x[:, 0]
        tokens = x[:, 1:]
        if self.num_classes:
            dense = partial(nn.Dense, self.num_classes, kernel_init=init, **types)
            logits = out["class_logits"] = dense(name="head")(logits)
            if self.token_label:
                tokens = out["token_logits"] = dense(name="token_head")(tokens)
        if self.token_label:
            logits = logits + 0.5 * tokens.max(1)
        out["logits"] = logits
        return out


# ---------------------------------------------------------------------------- checkpoints


def _attention(theirs: str, ours: str) -> list[Rule]:
    both = (f"{ours}/key", f"{ours}/value")
    return [
        *dense_rules(f"{theirs}.q", f"{ours}/query"),
        Rule(f"{theirs}.kv.weight", tuple(f"{o}/kernel" for o in both), chain(linear, split(1))),
        Rule(f"{theirs}.kv.bias", tuple(f"{o}/bias" for o in both), split(0)),
        *dense_rules(f"{theirs}.proj", f"{ours}/out"),
    ]


def _stem() -> list[Rule]:
    rules = []
    for i in range(3):
        rules += conv_rules(f"patch_embed1.conv.{3 * i}", f"embed/conv{i + 1}")
        rules += batch_norm_rules(f"patch_embed1.conv.{3 * i + 1}", f"embed/norm{i + 1}")
    return rules


def _stages() -> list[Rule]:
    rules = []
    for s in range(4):
        theirs, ours = f"block{s + 1}.{{b}}", f"stages_{s}/layers_{{b}}"
        scatter = f"{ours}/scatter"
        rules += [
            *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
            Rule(f"{theirs}.attn.complex_weight_ll", f"{scatter}/lowpass", transpose(1, 2, 0)),
            Rule(f"{theirs}.attn.complex_weight_lh_1", f"{scatter}/bands1/kernel"),
            Rule(f"{theirs}.attn.complex_weight_lh_b1", f"{scatter}/bands1/bias"),
            Rule(f"{theirs}.attn.complex_weight_lh_2", f"{scatter}/bands2/kernel"),
            Rule(f"{theirs}.attn.complex_weight_lh_b2", f"{scatter}/bands2/bias"),
            *_attention(f"{theirs}.attn", f"{ours}/attention"),
            *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
            *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
            *conv_rules(f"{theirs}.mlp.dwconv.dwconv", f"{ours}/mlp/conv"),
            *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
            *norm_rules(f"norm{s + 1}", f"norm_{s}" if s < 3 else "norm"),
            *conv_rules(f"patch_embed{s + 2}.proj", f"downsample_{s}/conv"),
            *norm_rules(f"patch_embed{s + 2}.norm", f"downsample_{s}/norm"),
        ]
    return rules


def _filter(model: SVT, b: int, *, s: int, name: str) -> np.ndarray | None:
    if s >= model.scattering:
        return None
    return filters()[name][::-1].reshape(1, 1, -1, 1).astype(np.float32)


LAYOUTS = {
    "official": Rules(
        (
            *_stem(),
            *conv_rules("patch_embed1.proj", "embed/downsample/conv"),
            *norm_rules("patch_embed1.norm", "embed/downsample/norm"),
            *_stages(),
            *norm_rules("post_network.0.norm1", "class_block/norm1"),
            *_attention("post_network.0.attn", "class_block/attention"),
            *norm_rules("post_network.0.norm2", "class_block/norm2"),
            *dense_rules("post_network.0.mlp.fc1", "class_block/mlp/up"),
            *dense_rules("post_network.0.mlp.fc2", "class_block/mlp/down"),
            *dense_rules("head", "head"),
            *dense_rules("aux_head", "token_head"),
        ),
        derived={
            f"patch_embed1.conv.{i}.num_batches_tracked": lambda model: np.zeros((), np.int64)
            for i in (1, 4, 7)
        }
        | {
            f"block{s + 1}.{{b}}.attn.{'xfm' if name[0] == 'h' else 'ifm'}.{name}": partial(
                _filter, s=s, name=name
            )
            for s in range(4)
            for name in filters()
        },
        fresh=("head/kernel", "head/bias", "token_head/kernel", "token_head/bias"),
    )
}

# ------------------------------------------------------------------------------- variants


def _variant(params: int | None, gflops: float | None, top1: float | None, **fields) -> Variant:
    return Variant(
        module=SVT,
        fields=fields,
        task="image_classification",
        params=params,
        flops=gflops and gflops * 1e9,
        metric=f"ImageNet-1K top-1 {top1} %" if top1 else "",
        paper="Scattering Vision Transformer: Spectral Mixing Matters, arXiv 2311.01310",
        code="github.com/badripatro/svt",
        licence="not stated" if top1 else "none: no published weights",
        preprocessing=Preprocessing(crop=0.875 if top1 else 1.0),
    )


VARIANTS = {
    "svt_s": _variant(22_052_592, 3.9, 84.2),
    "svt_b": _variant(
        32_878_544,
        6.3,
        85.2,
        stem_dim=64,
        embed_dims=(64, 128, 320, 512),
        num_heads=(2, 4, 10, 16),
        depths=(3, 4, 12, 3),
    ),
    "svt_l": _variant(
        54_594_000,
        12.7,
        85.7,
        stem_dim=64,
        embed_dims=(96, 192, 384, 512),
        num_heads=(3, 6, 12, 16),
        depths=(3, 6, 18, 3),
    ),
    "svt_test": _variant(
        None,
        None,
        None,
        image_size=(32, 32),
        num_classes=10,
        stem_dim=16,
        embed_dims=(32, 48),
        num_heads=(2, 4),
        depths=(1, 2),
        mlp_ratios=(2.0, 2.0),
        drop_path=0.0,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, decay=(r".*lowpass", r".*bands\d/bias"))
