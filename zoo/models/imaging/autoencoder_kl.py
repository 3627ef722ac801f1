"""AutoencoderKL: the autoencoder of Stable Diffusion, between images and their latents.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, arXiv
2112.10752. Official code: github.com/CompVis/latent-diffusion (MIT). We follow `AutoencoderKL` of
github.com/huggingface/diffusers (Apache-2.0). Files in its naming are read and written, and those
in the official one, alone or inside a whole Stable Diffusion (`first_stage_model.`).

An image `[B, H, W, 3]` from -1 to 1 becomes a normal distribution of latents, an eighth as high and
as wide, and latents become an image. Both ways are residual blocks of convolutions,

    x = shortcut(x) + conv2(silu(GN(conv1(silu(GN(x))))))          GN: 32 groups of channels

with one attention of a single head over all places at the smallest size. The encoder halves by
convolutions of stride 2 with zeros at the right and below; the decoder doubles by copying, then a
convolution.

    mean, log_variance = quant(encoder(image));  log_variance is kept within -30 ... 20
    latents = scale (mean + deviation noise - shift)
    image = decoder(post_quant(latents / scale + shift))

`scale` and `shift` give latents about unit deviation and zero mean; they are no parameters of the
published files but settings beside them. Diffusion models of the zoo take what `encode` gives:

    latents = model.apply(variables, images, method="encode")
    images = model.apply(variables, latents, method="decode")

Where paper and code differ: the paper has this with several factors and with a codebook instead;
Stable Diffusion has the factor 8 and the normal distribution.

    features         sd_vae_ft_mse
    down1             128  128  128
    down2              64   64  256
    down3              32   32  512
    down4              32   32  512
    down_middle        32   32  512    two residual blocks around attention
    moments            32   32  8      mean and log variance
    latents            32   32  4      the scaled mean
    up_middle          32   32  512
    up1                64   64  512
    up2               128  128  512
    up3               256  256  256
    up4               256  256  128
    image             256  256  3
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    squeeze,
)
from zoo.layers.attention import Attention
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.system import File, System, Variant

Conv = partial(nn.Conv, kernel_init=torch_default_init)
GroupNorm = partial(nn.GroupNorm, epsilon=1e-6, use_fast_variance=False)
LOG_VARIANCE = (-30.0, 20.0)  # the code's limits, between which the deviation is a finite float


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU; a matrix on the way past where widths differ.

    Attributes:
      channels: of the output.
      norm_groups: of channels that are normalised together.
    """

    channels: int
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.silu(GroupNorm(self.norm_groups, name="norm1", **types)(x))
        y = Conv(self.channels, (3, 3), name="conv1", **types)(y)
        y = nn.silu(GroupNorm(self.norm_groups, name="norm2", **types)(y))
        y = Conv(self.channels, (3, 3), name="conv2", **types)(y)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), name="shortcut", **types)(x)
        return constrain(x + y, "batch", "height", "width", "channels")


class Middle(nn.Module):
    """Two residual blocks, between them attention of one head over all places.

    Attributes:
      norm_groups: of channels that are normalised together.
      attend: False leaves the attention out.
    """

    norm_groups: int = 32
    attend: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        batch, _, _, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ResidualBlock(channels, self.norm_groups, name="layers_0", **types)(x)
        if self.attend:
            y = GroupNorm(self.norm_groups, name="norm", **types)(x).reshape(batch, -1, channels)
            attention = Attention(
                1, fused=False, kernel_init=torch_default_init, name="attention", **types
            )
            x = x + attention(y).reshape(x.shape)
        return ResidualBlock(channels, self.norm_groups, name="layers_1", **types)(x)


def halve(
    x: Float[Array, "batch height width channels"], conv: Callable[..., nn.Module]
) -> Float[Array, "batch height/2 width/2 channels"]:
    """A map of half the size; zeros stand at the right and below only."""
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    return conv(x.shape[-1], (3, 3), strides=(2, 2), padding="VALID", name="downsample")(x)


def double(
    x: Float[Array, "batch height width channels"], conv: Callable[..., nn.Module]
) -> Float[Array, "batch 2*height 2*width channels"]:
    """A map of twice the size: every place is copied to four."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return conv(x.shape[-1], (3, 3), name="upsample")(x)


class Stage(nn.Module):
    """Residual blocks of one width, then perhaps another size.

    Attributes:
      channels: of the output.
      depth: residual blocks.
      resize: `halve` or `double`; None: neither.
    """

    channels: int
    depth: int
    resize: Callable[..., Array] | None
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in_channels"]) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i in range(self.depth):
            x = ResidualBlock(self.channels, self.norm_groups, name=f"layers_{i}", **types)(x)
        return x if self.resize is None else self.resize(x, partial(Conv, **types))


class Encoder(nn.Module):
    """Images to what the moments of their latents are made of; see `AutoencoderKL` for the fields.

    Gives a dict of maps, `out` among them.
    """

    channels: tuple[int, ...]
    out_channels: int
    depth: int = 2
    norm_groups: int = 32
    attend: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> dict[str, Array]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps, last = {}, len(self.channels) - 1
        x = Conv(self.channels[0], (3, 3), name="conv_in", **types)(images)
        for i, width in enumerate(self.channels):
            resize = halve if i < last else None
            stage = Stage(width, self.depth, resize, self.norm_groups, name=f"stages_{i}", **types)
            x = maps[f"down{i + 1}"] = stage(x)
        x = maps["down_middle"] = Middle(self.norm_groups, self.attend, name="middle", **types)(x)
        x = nn.silu(GroupNorm(self.norm_groups, name="norm", **types)(x))
        maps["out"] = Conv(self.out_channels, (3, 3), name="conv_out", **types)(x)
        return maps


class Decoder(nn.Module):
    """Latents to images, with one more residual block a stage; see `AutoencoderKL` for the fields.

    Gives a dict of maps, `image` among them.
    """

    channels: tuple[int, ...]
    out_channels: int
    depth: int = 2
    norm_groups: int = 32
    attend: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "batch rows columns latents"]) -> dict[str, Array]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps, last = {}, len(self.channels) - 1
        x = Conv(self.channels[-1], (3, 3), name="conv_in", **types)(latents)
        x = maps["up_middle"] = Middle(self.norm_groups, self.attend, name="middle", **types)(x)
        for i, width in enumerate(reversed(self.channels)):
            resize = double if i < last else None
            stage = Stage(
                width, self.depth + 1, resize, self.norm_groups, name=f"stages_{i}", **types
            )
            x = maps[f"up{i + 1}"] = stage(x)
        x = nn.silu(GroupNorm(self.norm_groups, name="norm", **types)(x))
        maps["image"] = Conv(self.out_channels, (3, 3), name="conv_out", **types)(x)
        return maps


class AutoencoderKL(Model):
    """Stable Diffusion's autoencoder. Images are from -1 to 1.

    Attributes:
      image_size: of the example; any multiple of `factor` is taken.
      in_channels: of the images.
      latent_channels: of the latents.
      channels: of each stage of the encoder, and backwards of the decoder; all but one change size.
      depth: residual blocks of a stage of the encoder; the decoder's have one more.
      norm_groups: of channels that are normalised together; divides every one of `channels`.
      attend: whether there is attention at the smallest size.
      quant: 1x1 convolutions behind the encoder and before the decoder (not in SD 3).
      scale: latents are multiplied by it.
      shift: is taken from latents before.
    """

    image_size: tuple[int, int] = (256, 256)
    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2
    norm_groups: int = 32
    attend: bool = True
    quant: bool = True
    scale: float = 0.18215
    shift: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def factor(self) -> int:
        """How many pixels high and wide a latent is."""
        return 2 ** (len(self.channels) - 1)

    def setup(self) -> None:
        """Both networks and the maps between them."""
        odd = [width for width in self.channels if width % self.norm_groups]
        if odd:
            raise ValueError(
                f"norm_groups={self.norm_groups} does not divide channels={self.channels}; choose "
                "a divisor of them all."
            )
        alike = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        moments = 2 * self.latent_channels
        if self.quant:
            self.quant_conv = Conv(moments, (1, 1), **alike)
            self.post_quant_conv = Conv(self.latent_channels, (1, 1), **alike)
        alike |= {"depth": self.depth, "norm_groups": self.norm_groups, "attend": self.attend}
        self.encoder = Encoder(self.channels, moments, **alike)
        self.decoder = Decoder(self.channels, self.in_channels, **alike)

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.image_size, self.in_channels)
        return {"images": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        """The image that the mean of its latents is decoded to."""
        return self.features(images, train)["image"]

    def features(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map there and back (see the table above); nothing is drawn."""
        maps = self._moments(images)
        mean, _ = jnp.split(maps["moments"], 2, -1)
        latents = self.scale * (mean - self.shift)
        return maps | {"latents": latents} | self._image(latents)

    def encode(
        self,
        images: Float[Array, "batch height width channels"],
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch rows columns latents"]:
        """Scaled latents: the mean of their distribution, or with a key drawn from it."""
        mean, log_variance = jnp.split(self._moments(images)["moments"], 2, -1)
        if rng is not None:
            deviation = jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))
            mean = mean + deviation * jax.random.normal(rng, mean.shape, mean.dtype)
        return self.scale * (mean - self.shift)

    def decode(
        self, latents: Float[Array, "batch rows columns latents"]
    ) -> Float[Array, "batch height width channels"]:
        """The image of scaled latents."""
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
            raise ValueError(
                "This AutoencoderKL decodes latents of shape (batch, rows, columns, "
                f"{self.latent_channels}), not {latents.shape}."
            )
        return self._image(latents)["image"]

    def _moments(self, images: Array) -> dict[str, Array]:
        if images.ndim != 4 or images.shape[-1] != self.in_channels:
            raise ValueError(
                "This AutoencoderKL takes images of shape (batch, height, width, "
                f"{self.in_channels}), not {images.shape}."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"This AutoencoderKL takes images of floats from -1 to 1, not {images.dtype}; "
                "divide by 127.5 and subtract 1."
            )
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise ValueError(
                f"An image of {images.shape[1]}x{images.shape[2]} is no whole number of latents of "
                f"{self.factor}x{self.factor} pixels; resize or pad it to multiples of that."
            )
        maps = self.encoder(images.astype(self.dtype))
        moments = maps.pop("out")
        return maps | {"moments": self.quant_conv(moments) if self.quant else moments}

    def _image(self, latents: Array) -> dict[str, Array]:
        x = latents.astype(self.dtype) / self.scale + self.shift
        return self.decoder(self.post_quant_conv(x) if self.quant else x)


# ---------------------------------------------------------------------------- checkpoints


def _block_rules(theirs: str, ours: str, shortcut: str = "conv_shortcut") -> list[Rule]:
    return [
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *conv_rules(f"{theirs}.conv1", f"{ours}/conv1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *conv_rules(f"{theirs}.conv2", f"{ours}/conv2"),
        *conv_rules(f"{theirs}.{shortcut}", f"{ours}/shortcut"),
    ]


def _attention_rules(names: tuple[str, ...], ours: str, kernel: Transform) -> list[Rule]:
    return [
        rule
        for theirs, part in zip(names, ("query", "key", "value", "out"), strict=True)
        for rule in dense_rules(theirs, f"{ours}/{part}", kernel)
    ]


def _half_rules(half: str, way: str, projections: tuple[str, ...]) -> list[Rule]:
    """Of the encoder (way "down") or the decoder ("up")."""
    stage, attention = f"{half}.{way}_blocks.{{s}}", f"{half}.mid_block.attentions.0"
    names = tuple(f"{attention}.{name}" for name in projections)
    return [
        *conv_rules(f"{half}.conv_in", f"{half}/conv_in"),
        *_block_rules(f"{stage}.resnets.{{i}}", f"{half}/stages_{{s}}/layers_{{i}}"),
        *conv_rules(f"{stage}.{way}samplers.0.conv", f"{half}/stages_{{s}}/{way}sample"),
        *_block_rules(f"{half}.mid_block.resnets.{{i}}", f"{half}/middle/layers_{{i}}"),
        *norm_rules(f"{attention}.group_norm", f"{half}/middle/norm"),
        *_attention_rules(names, f"{half}/middle/attention", linear),
        *norm_rules(f"{half}.conv_norm_out", f"{half}/norm"),
        *conv_rules(f"{half}.conv_out", f"{half}/conv_out"),
    ]  # fmt: skip


def _official_stage(theirs: str, ours: str, way: str) -> list[Rule]:
    return [
        *_block_rules(f"{theirs}.block.{{i}}", f"{ours}/layers_{{i}}", "nin_shortcut"),
        *conv_rules(f"{theirs}.{way}sample.conv", f"{ours}/{way}sample"),
    ]


def _official_half(half: str) -> list[Rule]:
    """All but the stages; the projections of attention are convolutions of 1x1."""
    middle, attention = f"{half}/middle", f"{half}.mid.attn_1"
    names = tuple(f"{attention}.{name}" for name in ("q", "k", "v", "proj_out"))
    return [
        *conv_rules(f"{half}.conv_in", f"{half}/conv_in"),
        *_block_rules(f"{half}.mid.block_{{i+1}}", f"{middle}/layers_{{i}}", "nin_shortcut"),
        *norm_rules(f"{attention}.norm", f"{middle}/norm"),
        *_attention_rules(names, f"{middle}/attention", chain(squeeze((2, 3)), linear)),
        *norm_rules(f"{half}.norm_out", f"{half}/norm"),
        *conv_rules(f"{half}.conv_out", f"{half}/conv_out"),
    ]


def _decoder_stages(count: int) -> list[Rule]:
    """Of a decoder of `count` stages, which the official code numbers from the last one back."""
    return [
        replace(rule, when=lambda model: len(model.channels) == count)
        for stage in range(count)
        for rule in _official_stage(
            f"decoder.up.{count - 1 - stage}", f"decoder/stages_{stage}", "up"
        )
    ]


QUANT_RULES = (
    *conv_rules("quant_conv", "quant_conv"),
    *conv_rules("post_quant_conv", "post_quant_conv"),
)


def _layout(*projections: str) -> Rules:
    return Rules(
        (
            *_half_rules("encoder", "down", projections),
            *_half_rules("decoder", "up", projections),
            *QUANT_RULES,
        )
    )


LAYOUTS = {
    "diffusers": _layout("to_q", "to_k", "to_v", "to_out.0"),
    "hub": _layout("query", "key", "value", "proj_attn"),  # files of before diffusers renamed them
    "official": Rules(
        (
            *_official_half("encoder"),
            *_official_stage("encoder.down.{s}", "encoder/stages_{s}", "down"),
            *_official_half("decoder"),
            *(rule for count in range(1, 7) for rule in _decoder_stages(count)),
            *QUANT_RULES,
        ),
        unused=("loss.*",),
    ),
}

# ------------------------------------------------------------------------------- variants

_PAPER = "High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752"


def _variant(licence: str, params: int, code: str, metric: str = "", **fields: object) -> Variant:
    return Variant(
        module=AutoencoderKL,
        fields=fields,
        task="image_autoencoding",
        params=params,
        metric=metric,
        paper=_PAPER,
        code=code,
        licence=licence,
        files=(File("diffusion_pytorch_model.safetensors"),),
    )


_FOUR, _SIXTEEN = 83_653_863, 83_819_683
_HUB = "huggingface.co/"

VARIANTS = {
    "sd_vae": _variant("CreativeML OpenRAIL-M", _FOUR, "github.com/CompVis/stable-diffusion"),
    "sd_vae_ft_ema": _variant("MIT", _FOUR, _HUB + "stabilityai/sd-vae-ft-ema"),
    "sd_vae_ft_mse": _variant("MIT", _FOUR, _HUB + "stabilityai/sd-vae-ft-mse"),
    "sdxl_vae": _variant("MIT", _FOUR, _HUB + "stabilityai/sdxl-vae", scale=0.13025),
    "sd3_vae": _variant(
        "Stability AI Community License",
        _SIXTEEN,
        _HUB + "stabilityai/stable-diffusion-3-medium",
        latent_channels=16, quant=False, scale=1.5305, shift=0.0609,
    ),
    "flux_vae": _variant(
        "Apache-2.0",
        _SIXTEEN,
        "github.com/black-forest-labs/flux",
        latent_channels=16, quant=False, scale=0.3611, shift=0.1159,
    ),
    "autoencoder_kl_test": Variant(
        module=AutoencoderKL,
        fields=dict(image_size=(8, 8), channels=(8, 16), depth=1, norm_groups=4, scale=0.5),
        task="image_autoencoding",
        paper=_PAPER,
        code="github.com/huggingface/diffusers",
        licence="none: no published weights",
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
