"""PT-DiT: a diffusion transformer in which a few proxy tokens carry what is global.

Wang et al., "Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task",
ICLR 2025, arXiv 2409.04005. The authors' repository (github.com/360CVGroup/Qihoo-T2X) has no code;
it was released inside github.com/Ascend/MindSpeed-MM (pt_dit_diffusers.py, Apache-2.0 header),
which we follow.

Latents `[B, F, H, W, C]` are cut into patches of each frame; the map of tokens is cut into windows.
A block, where [b, s, g, b', s', g'] are a learned table plus a linear map of the noise level:

    z = proxies(x);  z = z + attention(LN(z))                 a few tokens of each window
    x = x + W1 cross_attention(LN(x), LN(z))                  what they found, to all tokens
    x = x + g window_attention(LN(x) (1 + s) + b)
    x = x + W2 (g shifted_window_attention(LN(x) (1 + s) + b))      with a table of its own
    x = x + cross_attention(x, text)
    x = x + g' MLP(LN(x) (1 + s') + b')

W1 and W2 start at zero. Proxies are means: with a window of c and a density of r = c / proxy_window
on each axis, a window has prod(r) proxies, each the mean of the tokens that lie r apart.

Where paper and code differ: the paper draws a proxy of each window at random, the code takes means;
the code gives the examples of a batch each other's noise levels if these differ and there are
several windows, which we do not copy. Its frames always have a density of one. Positions of maps
that are no squares are those of the exchanged shape (see `positions`), which is kept.

    features         PT-DiT_T2I
    embed              1   16   16  1152    patches of 2x2, positions of frames, columns, rows
    prediction         1   32   32     8    noise, then the numbers of its variance
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    chain,
    conv,
    dense_rules,
    linear,
    split,
)
from zoo.layers.decoder import GatedMlp
from zoo.layers.dense import Dense as _Dense
from zoo.layers.diffusion import TimeEmbed, grid_positions, modulate, sincos
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed, torch_default_init
from zoo.layers.stack import remat_block
from zoo.layers.window import shifted_window_mask, window_merge, window_partition
from zoo.system import System, Variant

Dense = partial(_Dense, kernel_init=torch_default_init)
Size = tuple[int, int, int]
ACTIVATIONS = {
    "gelu-approximate": nn.gelu,
    "gelu": gelu,
    "geglu": gelu,  # gated
    "geglu-approximate": lambda x: x * nn.sigmoid(1.702 * x),  # not gated, whatever its name says
}
HIDDEN = -10000.0  # added to the scores of what may not be seen, as in the code


def proxy_density(window: Size, proxy_window: Size) -> Size:
    """Proxies of a window on each axis."""
    return (1, window[1] // proxy_window[1], window[2] // proxy_window[2])


def proxy_tokens(
    x: Float[Array, "batch frames height width channels"], window: Size, density: Size
) -> Float[Array, "batch proxies channels"]:
    """Means of the tokens of a window that lie `density` apart, window by window."""
    (cf, ch, cw), (rf, rh, rw) = window, density
    cut = "b (f x rf) (h y rh) (w z rw) c -> b (f h w) (x y z) (rf rh rw) c"
    parts = {"x": cf // rf, "y": ch // rh, "z": cw // rw, "rf": rf, "rh": rh, "rw": rw}
    return rearrange(rearrange(x, cut, **parts).mean(2), "b p n c -> b (p n) c")


class Attend(nn.Module):
    """Attention with separate projections, to other tokens or within windows."""

    num_heads: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch keys channels"] | None = None,
        bias: Float[Array, "batch 1 queries keys"] | None = None,
        windows: bool = False,
        mask: Float[np.ndarray, "masks queries keys"] | None = None,
    ) -> Float[Array, "batch queries channels"]:
        """With `windows`, the batch is of windows, and `mask` is added to their scores in turn."""
        channels = x.shape[-1]
        context = x if context is None else context
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(Dense, channels, use_bias=self.use_bias, **types)
        query, key, value = (
            rearrange(dense(name=name)(y), "b l (n d) -> b l n d", n=self.num_heads)
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        if windows:
            y = kernels_pallas.window_attention(query, key, value, mask=mask)
        else:
            y = kernels_pallas.attention(query, key, value, bias=bias)
        y = rearrange(y, "b l n d -> b l (n d)")
        return Dense(channels, name="out", **types)(y)


class Block(nn.Module):
    """Proxies, windows, shifted windows, text and MLP.

    Attributes:
      norm_affine: norms have scales and shifts of their own.
    """

    num_heads: int
    window: Size
    proxy_window: Size
    shift: bool
    activation: str
    qkv_bias: bool
    norm_affine: bool
    epsilon: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames height width channels"],
        level: Float[Array, "batch 6 channels"],
        text: Float[Array, "batch length channels"],
        text_bias: Float[Array, "batch 1 tokens length"] | None = None,
    ) -> Float[Array, "batch frames height width channels"]:
        size, channels = x.shape[1:4], x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        affine = {"use_scale": self.norm_affine, "use_bias": self.norm_affine}
        norm = partial(LayerNorm, epsilon=self.epsilon, **affine, **types)
        attend = partial(Attend, self.num_heads, self.qkv_bias, **types)
        zero = partial(Dense, channels, kernel_init=nn.initializers.zeros, **types)
        table = self._table("scale_shift_table", 6, channels)
        shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(table + level)

        z = proxy_tokens(x, self.window, proxy_density(self.window, self.proxy_window))
        z = z + attend(name="proxy_attention")(norm(name="proxy_norm")(z))
        flat = rearrange(norm(name="norm_before")(x), "b f h w c -> b (f h w) c")
        y = attend(name="inject_attention")(flat, norm(name="proxy_cross_norm")(z))
        x = x + zero(name="inject")(y).reshape(x.shape)

        y = modulate(norm(name="norm1")(x), shift1, scale1)
        y = attend(name="attention")(window_partition(y, self.window), windows=True)
        x = x + gate1 * window_merge(y, size, self.window)
        if self.shift:
            table = self._table("proxy_scale_shift_table", 3, channels)
            shift, scale, gate = _chunks(table + level[:, :3])
            by = tuple(w // 2 for w in self.window)
            y = jnp.roll(x, [-s for s in by], (1, 2, 3))
            y = modulate(norm(name="shift_norm")(y), shift, scale)
            mask = shifted_window_mask(size, self.window, by) * (HIDDEN / -100.0)
            y = attend(name="shift_attention")(
                window_partition(y, self.window), windows=True, mask=mask
            )
            y = jnp.roll(window_merge(y, size, self.window), by, (1, 2, 3))
            x = x + zero(name="shift_out")(gate * y)

        flat = rearrange(x, "b f h w c -> b (f h w) c")
        x = x + attend(name="text_attention")(flat, text, text_bias).reshape(x.shape)
        y = modulate(norm(name="norm2")(x), shift2, scale2)
        y = self._mlp(4 * channels, types)(y)
        x = x + gate2 * y
        return constrain(x, "batch", "time", "height", "width", "channels")

    def _mlp(self, hidden: int, types: dict) -> nn.Module:
        act = ACTIVATIONS[self.activation]
        if self.activation == "geglu":
            return GatedMlp(hidden, activation=act, use_bias=True, name="mlp", **types)
        return Mlp(hidden, act, kernel_init=torch_default_init, name="mlp", **types)

    def _table(self, name: str, rows: int, channels: int) -> Array:
        init = nn.initializers.normal(channels**-0.5)
        return self.param(name, init, (rows, channels), self.param_dtype).astype(self.dtype)


def _chunks(x: Float[Array, "batch parts channels"]) -> list[Array]:
    """Each part, to stand beside `[batch, frames, height, width, channels]`."""
    return [part[:, None, None, None] for part in jnp.unstack(x, axis=1)]


class PTDiT(Model):
    """PT-DiT: noisy latents, their level and a text to the noise in them.

    Attributes:
      clip_size: frames, height and width of the latents for `example_inputs`; other sizes work if
        windows tile the patches.
      sample_size: of the published training; positions are divided by sample_size // 64 if that
        is more than one, and a model of 128 is also told the image's size and aspect.
      text_channels: width of the text features; None: they come in the width of the model.
      window: frames, rows and columns of a window, in patches.
      proxy_window: see the module's text; equal to the window, there is one proxy a window.
      shift_window: whether there are shifted windows, too.
      activation: of the MLP, a name of `ACTIVATIONS`.
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    clip_size: Size = (1, 32, 32)
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    depth: int = 28
    num_heads: int = 16
    head_dim: int = 72
    sample_size: int = 32
    text_channels: int | None = 4096
    text_length: int = 120
    window: Size = (1, 8, 8)
    proxy_window: Size = (1, 8, 8)
    shift_window: bool = True
    activation: str = "gelu-approximate"
    qkv_bias: bool = True
    norm_affine: bool = False
    epsilon: float = 1e-6
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        width = self.text_channels or self.num_heads * self.head_dim
        shapes = {
            "latents": (*self.clip_size, self.in_channels),
            "times": (),
            "text": (self.text_length, width),
            "text_mask": (self.text_length,),
        }
        if self.sample_size == 128:
            shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, *shape), jnp.int32 if name == "text_mask" else jnp.float32
            )
            for name, shape in shapes.items()
        }

    def __call__(
        self,
        latents: Float[Array, "batch frames height width channels"],
        times: Float[Array, "batch"],
        text: Float[Array, "batch length text_channels"],
        text_mask: Int[Array, "batch length"] | None = None,
        resolution: Float[Array, "batch 2"] | None = None,
        aspect_ratio: Float[Array, "batch 1"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch frames height width out_channels"]:
        """The predicted noise, and behind it what else the output has channels for."""
        return self.features(latents, times, text, text_mask, resolution, aspect_ratio, train)[
            "prediction"
        ]

    @nn.compact
    def features(
        self,
        latents: Float[Array, "batch frames height width channels"],
        times: Float[Array, "batch"],
        text: Float[Array, "batch length text_channels"],
        text_mask: Int[Array, "batch length"] | None = None,
        resolution: Float[Array, "batch 2"] | None = None,
        aspect_ratio: Float[Array, "batch 1"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """The embedded tokens, the map after each block (`block1 ...`) and the prediction."""
        self._check(latents.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels, p = self.num_heads * self.head_dim, self.patch_size
        batch, frames, height, width, _ = latents.shape
        size = (frames, height // p, width // p)
        x = PatchEmbed(channels, p, name="embed", **types)(
            latents.reshape(-1, height, width, self.in_channels)
        )
        table = positions(size, channels, max(self.sample_size // 64, 1))
        x = x.reshape(batch, *size, channels) + jnp.asarray(table, self.dtype)
        out = {"embed": x}

        level = TimeEmbed(channels, name="time_embed", **types)(times)
        if self.sample_size == 128:
            level = level + self._sizes(resolution, aspect_ratio, channels // 3)
        modulation = Dense(6 * channels, name="modulation", **types)(nn.silu(level))
        modulation = modulation.reshape(batch, 6, channels)
        text = text.astype(self.dtype)
        if self.text_channels is not None:
            text = nn.gelu(Dense(channels, name="text_in", **types)(text))
            text = Dense(channels, name="text_out", **types)(text)
        bias = None
        if text_mask is not None:
            bias = (1.0 - text_mask.astype(jnp.float32)) * HIDDEN
            tokens = math.prod(size)
            bias = jnp.broadcast_to(bias[:, None, None], (batch, 1, tokens, text.shape[1]))

        block = remat_block(Block, self.remat, static_argnums=())
        for i in range(self.depth):
            x = out[f"block{i + 1}"] = block(
                self.num_heads,
                self.window,
                self.proxy_window,
                self.shift_window,
                self.activation,
                self.qkv_bias,
                self.norm_affine,
                self.epsilon,
                name=f"layers_{i}",
                **types,
            )(x, modulation, text, bias)
        init = nn.initializers.normal(channels**-0.5)
        table = self.param("scale_shift_table", init, (2, channels), self.param_dtype)
        shift, scale = _chunks(table.astype(self.dtype) + level[:, None])
        norm = LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, name="norm", **types)
        x = Dense(p * p * self.out_channels, name="head", **types)(modulate(norm(x), shift, scale))
        out["prediction"] = rearrange(x, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)
        return out

    def _sizes(self, resolution: Array | None, aspect_ratio: Array | None, channels: int) -> Array:
        """The embedded height, width and aspect of the image, side by side."""
        if resolution is None or aspect_ratio is None:
            raise ValueError(
                "A PT-DiT of sample_size 128 is told the image's size: give resolution=[batch, 2] "
                "and aspect_ratio=[batch, 1]."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        parts = []
        for name, values in (("resolution", resolution), ("aspect_ratio", aspect_ratio)):
            embedded = TimeEmbed(channels, name=f"{name}_embed", **types)(values.reshape(-1))
            parts.append(embedded.reshape(values.shape[0], -1))
        return jnp.concatenate(parts, -1)

    def _check(self, shape: tuple[int, ...]) -> None:
        p, w = self.patch_size, self.window
        whole = len(shape) == 5 and shape[4] == self.in_channels
        steps = (w[0], w[1] * p, w[2] * p)
        if not whole or any(n % step for n, step in zip(shape[1:4], steps, strict=True)):
            raise ValueError(
                f"This PT-DiT takes latents of shape (batch, frames, height, width, "
                f"{self.in_channels}) whose sides are multiples of {steps} (windows of patches), "
                f"not {shape}."
            )
        if self.num_heads * self.head_dim % 16:
            raise ValueError(
                f"num_heads * head_dim={self.num_heads * self.head_dim} is no multiple of 16, as "
                "the sines and cosines of three axes need."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}.")


def positions(size: Size, channels: int, scale: int) -> Float[np.ndarray, "frames height width c"]:
    """Fixed positions: a quarter of the channels for the frame, then columns, then rows.

    As in the code, places of a map that is no square are numbered as if its height and width were
    exchanged: token k is at row k // height and column k % height.
    """
    quarter = channels // 4
    time = sincos(np.arange(size[0]) / scale, quarter)[:, None, None]
    place = grid_positions((size[2], size[1]), 3 * quarter, scale).reshape(1, *size[1:], -1)
    parts = (np.broadcast_to(x, (*size, x.shape[-1])) for x in (time, place))
    return np.concatenate(list(parts), -1).astype(np.float32)


def score_entries(model: PTDiT, size: Size, text_length: int) -> dict[str, int]:
    """How many scores a head of one block computes, by part, and what full attention would.

    Args:
      model: the model.
      size: frames, rows and columns of patches.
      text_length: tokens of the text.
    """
    tokens = math.prod(size)
    windows = tokens // math.prod(model.window)
    proxies = windows * math.prod(proxy_density(model.window, model.proxy_window))
    local = tokens * math.prod(model.window)
    return {
        "proxies": proxies**2,
        "inject": tokens * proxies,
        "windows": local * (2 if model.shift_window else 1),
        "text": tokens * text_length,
        "dense": tokens**2 + tokens * text_length,
    }


# ---------------------------------------------------------------------------- checkpoints


def _attention_rules(theirs: str, ours: str) -> list[Rule]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}
    return [r for a, b in names.items() for r in dense_rules(f"{theirs}.{a}", f"{ours}/{b}")]


def _norm_rules(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _official_positions(model: PTDiT) -> np.ndarray:
    """The table for the size that a model was built with."""
    side = model.sample_size // model.patch_size
    channels = model.num_heads * model.head_dim
    table = positions((model.clip_size[0], side, side), channels, max(model.sample_size // 64, 1))
    return table.reshape(1, model.clip_size[0], side * side, channels)


_BLOCK, _LAYER = "transformer_blocks.{i}", "layers_{i}"
_ATTENTIONS = {
    "proxy_attn1": "proxy_attention",
    "pvisual_attn2": "inject_attention",
    "attn1": "attention",
    "attn2": "text_attention",
    "attn3": "shift_attention",
}
_NORMS = {
    "proxy_norm1": "proxy_norm",
    "proxy_cross_norm": "proxy_cross_norm",
    "norm_before": "norm_before",
    "norm1": "norm1",
    "norm2": "norm2",
    "shift_window_norm": "shift_norm",
}
_GATED = f"{_LAYER}/mlp/up", f"{_LAYER}/mlp/gate"
_EMBEDDERS = {
    "timestep_embedder": "time_embed",
    "resolution_embedder": "resolution_embed",
    "aspect_ratio_embedder": "aspect_ratio_embed",
}

LAYOUTS = {
    "official": Rules(
        (
            Rule("pos_embed.proj.weight", "embed/kernel", conv),
            Rule("pos_embed.proj.bias", "embed/bias"),
            *(
                rule
                for a, b in _EMBEDDERS.items()
                for n in (1, 2)
                for rule in dense_rules(f"adaln_single.emb.{a}.linear_{n}", f"{b}/linear{n}")
            ),
            *dense_rules("adaln_single.linear", "modulation"),
            *dense_rules("caption_projection.linear_1", "text_in"),
            *dense_rules("caption_projection.linear_2", "text_out"),
            *(
                rule
                for a, b in _ATTENTIONS.items()
                for rule in _attention_rules(f"{_BLOCK}.{a}", f"{_LAYER}/{b}")
            ),
            *(
                rule
                for a, b in _NORMS.items()
                for rule in _norm_rules(f"{_BLOCK}.{a}", f"{_LAYER}/{b}")
            ),
            *dense_rules(f"{_BLOCK}.linear_1_visual", f"{_LAYER}/inject"),
            *dense_rules(f"{_BLOCK}.linear_2", f"{_LAYER}/shift_out"),
            Rule(  # value and gate of a gated MLP are one matrix
                f"{_BLOCK}.ff.net.0.proj.weight",
                tuple(f"{name}/kernel" for name in _GATED),
                chain(linear, split(1)),
            ),
            Rule(f"{_BLOCK}.ff.net.0.proj.bias", tuple(f"{n}/bias" for n in _GATED), split(0)),
            *dense_rules(f"{_BLOCK}.ff.net.0.proj", f"{_LAYER}/mlp/up"),
            *dense_rules(f"{_BLOCK}.ff.net.2", f"{_LAYER}/mlp/down"),
            Rule(f"{_BLOCK}.scale_shift_table", f"{_LAYER}/scale_shift_table"),
            Rule(f"{_BLOCK}.proxy_scale_shift_table", f"{_LAYER}/proxy_scale_shift_table"),
            Rule("scale_shift_table", "scale_shift_table"),
            *dense_rules("proj_out", "head"),
        ),
        derived={"pos_embed.pos_embed": _official_positions},
    )
}

# ------------------------------------------------------------------------------- variants

_ABOUT = {
    "task": "text_to_image",
    "paper": "Qihoo-T2X (PT-DiT), arXiv 2409.04005",
    "code": "github.com/Ascend/MindSpeed-MM",
}

VARIANTS = {
    "PT-DiT_T2I": Variant(
        module=PTDiT,
        fields={},
        params=1_131_629_216,
        licence="none: no published weights",
        **_ABOUT,
    ),
    "pt_dit_test": Variant(
        module=PTDiT,
        fields={
            "clip_size": (1, 8, 8),
            "in_channels": 2,
            "out_channels": 4,
            "depth": 1,
            "num_heads": 2,
            "head_dim": 8,
            "sample_size": 8,
            "text_channels": 6,
            "text_length": 3,
            "window": (1, 2, 2),
            "proxy_window": (1, 2, 2),
        },
        licence="none: no published weights",
        **_ABOUT,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, no_decay=(r".*scale_shift_table",))
