"""VDT: a diffusion transformer for video, which learns prediction and completion as masks.

Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling", ICLR 2024, arXiv
2305.13311. Official code: github.com/RERV/VDT (CC BY-NC 4.0, non-commercial, so this is our own
code of its mechanism).

Latents `[B, T, h, w, C]` of a frame-wise autoencoder are cut into patches of each frame; fixed
positions of the place and of the frame are added. c is the embedded noise level plus one learned
label. A block has attention over time without modulation, then DiT's attention over space and MLP:

    x = x + out'(attention_T(LN(x)))
    x = x + gate1 attention_N(LN(x) (1 + scale1) + shift1)
    x = x + gate2 MLP(LN(x) (1 + scale2) + shift2)          shift, scale, gate = linear(SiLU(c))

Mask modelling: M is 1 where a video is to be made and 0 where it is given, and the network sees
`x0 (1 - M) + x_t M`; nothing else tells it about M. `frame_mask` has the seven kinds of the code:
prediction, its reverse, interpolation, unconditional, one frame, random frames, and completion
of a part of each frame. One model thus learns all of them.

Where paper and code differ: the paper tries several ways of conditioning, the code has this one; it
keeps a table of class labels and always takes class 0. Where the code's completion ends "0 frames
before the end" it masks nothing (a slice that ends at -0); here it masks up to the end.

    features         VDT-S/2
    embed             16  256  384    patches of 2x2, positions of places and frames
    block1            16  256  384
    block2            16  256  384
    block3            16  256  384
    block4            16  256  384
    block5            16  256  384
    block6            16  256  384
    block7            16  256  384
    block8            16  256  384
    block9            16  256  384
    block10           16  256  384
    block11           16  256  384
    block12           16  256  384
    prediction        16   32   32  8    noise, then the numbers of its variance
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, conv, dense_rules, norm_rules
from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.layers.diffusion import PlainNorm, TimeEmbed, grid_positions, modulate, sincos
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed
from zoo.layers.stack import remat_block
from zoo.system import System, Variant

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros


class Block(nn.Module):
    """Attention over time, then modulated attention over space and MLP.

    Attributes:
      temporal: whether there is attention over time (mode "video" in the code).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    temporal: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time places channels"],
        condition: Float[Array, "batch channels"],
    ) -> Float[Array, "batch time places channels"]:
        batch, time, _, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = partial(Attention, self.num_heads, kernel_init=xavier, **types)
        c = Dense(6 * channels, kernel_init=zeros, name="modulation", **types)(nn.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(c[:, None, None], 6, -1)
        if self.temporal:
            y = LayerNorm(epsilon=1e-5, name="temporal_norm", **types)(x)
            y = attention(name="temporal_attention")(rearrange(y, "b t n c -> (b n) t c"))
            dense = Dense(channels, kernel_init=xavier, name="temporal_proj", **types)
            x = x + rearrange(dense(y), "(b n) t c -> b t n c", b=batch)
        y = modulate(PlainNorm(name="norm1", **types)(x), shift1, scale1)
        y = attention(name="attention")(rearrange(y, "b t n c -> (b t) n c"))
        x = x + gate1 * rearrange(y, "(b t) n c -> b t n c", t=time)
        y = modulate(PlainNorm(name="norm2", **types)(x), shift2, scale2)
        hidden = int(channels * self.mlp_ratio)
        mlp = Mlp(hidden, activation=nn.gelu, kernel_init=xavier, name="mlp", **types)
        x = x + gate2 * mlp(y)
        return constrain(x, "batch", "time", "length", "channels")


class VDT(Model):
    """Video Diffusion Transformer: noisy latents and their level to the noise in them.

    Attributes:
      clip_size: frames, height and width of the latents.
      learned_variance: twice the channels come out; the second half says how large the variance
        of a step is, between its two bounds.
      temporal: False: an image model, of one frame.
      num_classes: rows of the label table, of which the first is used; one more for a dropped label
        where `class_dropout` is not 0.
      class_dropout: how often, in training, the label is dropped.
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    clip_size: tuple[int, int, int] = (16, 32, 32)
    in_channels: int = 4
    patch_size: int = 2
    embed_dim: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    learned_variance: bool = True
    temporal: bool = True
    num_classes: int = 1000
    class_dropout: float = 0.1
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.clip_size, self.in_channels)
        return {
            "latents": jax.ShapeDtypeStruct(shape, jnp.float32),
            "times": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        }

    def __call__(
        self,
        latents: Float[Array, "batch time height width channels"],
        times: Float[Array, "batch"],
        train: bool = False,
    ) -> Float[Array, "batch time height width out_channels"]:
        """The predicted noise, and behind it the numbers of a learned variance."""
        return self.features(latents, times, train)["prediction"]

    @nn.compact
    def features(
        self,
        latents: Float[Array, "batch time height width channels"],
        times: Float[Array, "batch"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named map (see the table above); tokens are `[B, frames, places, channels]`."""
        self._check(latents.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (frames, height, width), p = self.clip_size, self.patch_size
        grid = (height // p, width // p)
        x = PatchEmbed(self.embed_dim, p, name="embed", **types)(
            latents.reshape(-1, height, width, self.in_channels)
        )
        x = x.reshape(-1, frames, grid[0] * grid[1], self.embed_dim)
        tables = fixed_tables(self)
        for name, table in tables.items():  # leaves, because published files hold them
            leaf = self.param(name, lambda _, t=table: jnp.asarray(t, self.param_dtype))
            leaf = jax.lax.stop_gradient(leaf).astype(self.dtype)
            x = x + (leaf if name == "position_embedding" else leaf[0, :, None])
        out = {"embed": x}

        c = TimeEmbed(self.embed_dim, name="time_embed", **types)(times)
        c = c + self._label(latents.shape[0], train)
        block = remat_block(Block, self.remat, static_argnums=())
        for i in range(self.depth):
            x = out[f"block{i + 1}"] = block(
                self.num_heads, self.mlp_ratio, self.temporal, name=f"layers_{i}", **types
            )(x, c)
        dense = partial(Dense, kernel_init=zeros, **types)
        modulation = dense(2 * self.embed_dim, name="modulation")(nn.silu(c))
        shift, scale = jnp.split(modulation[:, None, None], 2, -1)
        x = modulate(PlainNorm(name="norm", **types)(x), shift, scale)
        channels = self.in_channels * (2 if self.learned_variance else 1)
        x = dense(p * p * channels, name="head")(x)
        sizes = {"h": grid[0], "p": p, "q": p}
        out["prediction"] = rearrange(x, "b t (h w) (p q c) -> b t (h p) (w q) c", **sizes)
        return out

    def _label(self, batch: int, train: bool) -> Array:
        """The embedded label of each example: class 0, or dropped."""
        rows = self.num_classes + (self.class_dropout > 0)
        init = nn.initializers.normal(0.02)
        table = self.param("label_embedding", init, (rows, self.embed_dim), self.param_dtype)
        labels = jnp.zeros(batch, jnp.int32)
        if train and self.class_dropout > 0:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.class_dropout, (batch,))
            labels = jnp.where(dropped, self.num_classes, labels)
        return table[labels].astype(self.dtype)

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[1:] != (*self.clip_size, self.in_channels):
            frames, height, width = self.clip_size
            raise ValueError(
                f"This VDT takes latents of shape (batch, {frames}, {height}, {width}, "
                f"{self.in_channels}), not {shape}; create it with another clip_size."
            )
        if not self.temporal and self.clip_size[0] != 1:
            raise ValueError(
                f"Without attention over time a clip is one frame, not {self.clip_size[0]}; set "
                "clip_size=(1, height, width)."
            )


def fixed_tables(model: VDT) -> dict[str, np.ndarray]:
    """Positions of places `[1, places, D]`, and of frames `[1, frames, D]` if there are several."""
    frames, height, width = model.clip_size
    grid = (height // model.patch_size, width // model.patch_size)
    tables = {"position_embedding": grid_positions(grid, model.embed_dim)}
    if model.temporal:
        tables["frame_position_embedding"] = sincos(np.arange(frames), model.embed_dim)
    return {name: table[None].astype(np.float32) for name, table in tables.items()}


# ---------------------------------------------------------------------------------- masks

MASKS = (
    "predict", "backward", "interpolate", "unconditional", "one_frame", "random_frames", "complete",
)  # fmt: skip
"""What is to be made, in the official order."""


def frame_mask(
    kind: str,
    size: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    given: int = 8,
    every: int = 4,
    ratio: float = 0.8,
) -> Float[np.ndarray, "time height width"]:
    """A mask, 1 where a video is to be made and 0 where it is given.

    Args:
      kind: one of `MASKS`.
      size: frames, height and width.
      rng: for the kinds that draw.
      given: frames at the start ("predict") or end ("backward").
      every: of "interpolate": each so many-th frame is given, the first too.
      ratio: of "random_frames": how often a frame is to be made.

    Raises:
      ValueError: for an unknown kind.
    """
    frames = size[0]
    at = np.arange(frames)
    if kind == "complete":
        first, last = rng.integers(0, 4, 2)
        made = ((at >= first) & (at < frames - last))[:, None, None]
        return (made & (block_mask(size[1:], rng) > 0)).astype(np.float32)
    made = {
        "predict": lambda: at >= given,
        "backward": lambda: at < frames - given,
        "interpolate": lambda: at % every != 0,
        "unconditional": lambda: at >= 0,
        "one_frame": lambda: at != rng.integers(frames),
        "random_frames": lambda: rng.random(frames) < ratio,
    }
    if kind not in made:
        raise ValueError(f"A mask is one of {', '.join(MASKS)}, not {kind!r}.")
    return np.broadcast_to(made[kind]()[:, None, None], size).astype(np.float32)


def random_mask(
    size: tuple[int, int, int], rng: np.random.Generator, *, given: int = 8
) -> Float[np.ndarray, "time height width"]:
    """The mask of a training example: completion in 1 of 5, else one of the others alike."""
    kind = "complete" if rng.random() < 0.2 else MASKS[rng.integers(6)]
    return frame_mask(kind, size, rng, given=given)


def block_mask(
    size: tuple[int, int], rng: np.random.Generator, ratio: float = 0.5
) -> Float[np.ndarray, "height width"]:
    """Rectangles of at least 4 places and sides of 3:10 to 10:3 until `ratio` is covered (BEiT).

    Ends early where ten rectangles in a row add nothing.
    """
    mask = np.zeros(size, np.float32)
    wanted = ratio * size[0] * size[1]
    while mask.sum() < wanted:
        left = wanted - mask.sum()
        for _ in range(10):
            area = rng.uniform(min(4, left), max(4, left))
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= size[0] or columns >= size[1]:
                continue
            top = rng.integers(size[0] - rows + 1)
            start = rng.integers(size[1] - columns + 1)
            part = mask[top : top + rows, start : start + columns]
            if 0 < part.size - part.sum() <= left:
                part[:] = 1
                break
        else:
            break
    return mask


def given_and_noisy(
    x0: Float[Array, "batch time height width channels"],
    x: Float[Array, "batch time height width channels"],
    mask: Float[Array, "batch time height width"],
) -> Float[Array, "batch time height width channels"]:
    """What the network sees: clean where the mask is 0, noisy where it is 1."""
    mask = mask[..., None]
    return x0 * (1 - mask) + x * mask


# ---------------------------------------------------------------------------- checkpoints

_BLOCK = "blocks.{i}", "layers_{i}"


def _attention_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        *dense_rules(f"{theirs}.qkv", f"{ours}/qkv"),
        *dense_rules(f"{theirs}.proj", f"{ours}/out"),
    ]


LAYOUTS = {
    "official": Rules(
        (
            Rule("x_embedder.proj.weight", "embed/kernel", conv),
            Rule("x_embedder.proj.bias", "embed/bias"),
            Rule("pos_embed", "position_embedding"),
            Rule("time_embed", "frame_position_embedding"),
            *dense_rules("t_embedder.mlp.0", "time_embed/linear1"),
            *dense_rules("t_embedder.mlp.2", "time_embed/linear2"),
            Rule("y_embedder.embedding_table.weight", "label_embedding"),
            *_attention_rules(f"{_BLOCK[0]}.attn", f"{_BLOCK[1]}/attention"),
            *_attention_rules(f"{_BLOCK[0]}.temporal_attn", f"{_BLOCK[1]}/temporal_attention"),
            *norm_rules(f"{_BLOCK[0]}.temporal_norm1", f"{_BLOCK[1]}/temporal_norm"),
            *dense_rules(f"{_BLOCK[0]}.temporal_fc", f"{_BLOCK[1]}/temporal_proj"),
            *dense_rules(f"{_BLOCK[0]}.mlp.fc1", f"{_BLOCK[1]}/mlp/up"),
            *dense_rules(f"{_BLOCK[0]}.mlp.fc2", f"{_BLOCK[1]}/mlp/down"),
            *dense_rules(f"{_BLOCK[0]}.adaLN_modulation.1", f"{_BLOCK[1]}/modulation"),
            *dense_rules("final_layer.adaLN_modulation.1", "modulation"),
            *dense_rules("final_layer.linear", "head"),
        )
    )
}

# ------------------------------------------------------------------------------- variants

_ABOUT = {
    "task": "video_diffusion",
    "paper": "VDT: General-purpose Video Diffusion Transformers, arXiv 2305.13311",
    "code": "github.com/RERV/VDT",
}

VARIANTS = {
    "VDT-S/2": Variant(
        module=VDT,
        fields={"depth": 12, "embed_dim": 384, "num_heads": 6},
        params=41_849_120,  # 41,744,672 of them trained, the others fixed positions
        licence="CC BY-NC 4.0; no published weights",
        **_ABOUT,
    ),
    "VDT-L/2": Variant(
        module=VDT,
        fields={"depth": 28, "embed_dim": 1152, "num_heads": 16},
        params=861_168_416,  # 860,855,072 of them trained
        licence="CC BY-NC 4.0 (non-commercial)",
        **_ABOUT,
    ),
    "vdt_test": Variant(
        module=VDT,
        fields={
            "clip_size": (3, 4, 4),
            "in_channels": 2,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "num_classes": 1,
            "class_dropout": 0.0,
        },
        licence="none: no published weights",
        **_ABOUT,
    ),
}

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=("position_embedding", "frame_position_embedding"),
    no_decay=("label_embedding",),
)
