"""Magic 1-For-1: video from an image and a text by a transformer of two streams that join.

Yi et al., "Magic 1-For-1: Generating One Minute Video Clips within One Minute", arXiv 2502.07701.
Official code: github.com/DA-Group-PKU/Magic-1-For-1, the transformer of HunyuanVideo (for
non-commercial use, so this is our own code of its mechanism; the weights are withheld).

A text becomes an image by any model of that kind, the image a clip by this one. It predicts the
velocity of a flow, noise - x0, of latents `[B, T, h, w, C]`. Beside them stand the latents of the
given first frames, zeros after, and a channel that is one where a frame is given. Image tokens and
text tokens first have weights of their own and share attention (double blocks), then all weights
(single blocks). All norms are modulated by v, the embedded time plus a pooled text:

    double:  a = attention over [image | text],  q k v = linear(LN(x) (1 + s) + b), q k normalised
             x = x + g out(a);   x = x + g' MLP(LN(x) (1 + s') + b')
    single:  [q k v | m] = linear(LN(x) (1 + s) + b);   x = x + g linear([attention | gelu(m)])

Rotary positions of frame, row and column turn pairs of channels of image tokens. Padded text is a
segment of its own: neither the image nor the real text sees it. The text is refined first by two
blocks of attention gated by time and its own mean.

Long videos are windows: each starts from the last frames of the one before (`extend`). Sampling is
`zoo.inference.sample` with `Flow(steps=4, shift=5)` and `Euler()`.

Where code and report differ: the guidance embedding exists in the code and is never used; here it
only keeps its place in published files.

    features         magic_1_for_1_small
    image_tokens     2048  192    8 frames of 16x16 patches, after the double blocks
    text_tokens        77  192
    prediction          8   32   32   16    velocity
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import Rule, Rules, conv, dense_rules, norm_rules
from zoo.layers.dense import Dense as _Dense
from zoo.layers.diffusion import PlainNorm, TimeEmbed, modulate
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.stack import remat_block
from zoo.system import System, Variant

Dense = partial(_Dense, kernel_init=nn.initializers.xavier_uniform())
ZeroDense = partial(_Dense, kernel_init=nn.initializers.zeros)
Size = tuple[int, int, int]
ACTIVATIONS = {"gelu_tanh": nn.gelu, "gelu": gelu, "relu": nn.relu, "silu": nn.silu}
HIDDEN = -1e30


def rotations(
    size: Size, dims: Size, theta: float
) -> tuple[Float[np.ndarray, "tokens pairs"], Float[np.ndarray, "tokens pairs"]]:
    """Cosines and sines of the angles of each token: `dims` channels for frame, row and column."""
    places = np.unravel_index(np.arange(math.prod(size)), size)
    angles = []
    for at, dim in zip(places, dims, strict=True):
        rates = (theta ** (np.arange(0, dim, 2, dtype="f") / dim)).astype("f")
        angles.append(np.outer(at.astype("f"), np.float32(1) / rates))
    angles = np.concatenate(angles, 1)
    return np.cos(angles), np.sin(angles)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], turn: tuple[np.ndarray, np.ndarray]
) -> Float[Array, "batch tokens heads head_dim"]:
    """Neighbouring channels turned as pairs; tokens beyond the angles stay as they are."""
    cosines, sines = (jnp.asarray(t, jnp.float32)[:, None] for t in turn)
    moved = x[:, : len(cosines)].astype(jnp.float32)
    first, second = moved[..., 0::2], moved[..., 1::2]
    pairs = first * cosines - second * sines, second * cosines + first * sines
    moved = jnp.stack(pairs, -1).reshape(moved.shape).astype(x.dtype)
    return jnp.concatenate([moved, x[:, len(cosines) :]], 1)


class HeadNorm(nn.Module):
    """The norm of each head's queries or keys: "rms", "layer", or None for none."""

    kind: str | None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.kind is None:
            return x
        if self.kind == "rms":
            return nn.RMSNorm(epsilon=1e-6, name="norm", **types)(x)
        if self.kind == "layer":
            return LayerNorm(epsilon=1e-6, name="norm", **types)(x)
        raise ValueError(f"qk_norm={self.kind!r} is none of 'rms', 'layer' and None.")


class RefinerBlock(nn.Module):
    """Gated attention over the text, and a gated MLP."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        condition: Float[Array, "batch channels"],
        bias: Float[Array, "batch 1 length length"] | None,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        gates = ZeroDense(2 * channels, name="modulation", **types)(nn.silu(condition))
        gate1, gate2 = jnp.split(gates[:, None], 2, -1)
        y = LayerNorm(epsilon=1e-6, name="norm1", **types)(x)
        qkv = Dense(3 * channels, name="qkv", **types)(y)
        query, key, value = rearrange(qkv, "b l (k n d) -> k b l n d", k=3, n=self.num_heads)
        y = kernels_pallas.attention(query, key, value, bias=bias)
        x = x + gate1 * Dense(channels, name="out", **types)(rearrange(y, "b l n d -> b l (n d)"))
        y = LayerNorm(epsilon=1e-6, name="norm2", **types)(x)
        return x + gate2 * Mlp(4 * channels, nn.silu, name="mlp", **types)(y)


class Refiner(nn.Module):
    """Text features in the model's width, after two blocks that know the time."""

    channels: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "batch length features"],
        times: Float[Array, "batch"],
        mask: Int[Array, "batch length"] | None,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        bias, mean = None, text.mean(1)
        if mask is not None:
            real = mask.astype(jnp.float32)[..., None]
            mean = (text * real).sum(1) / jnp.maximum(real.sum(1), 1.0)
            seen = mask.astype(bool)
            seen = (seen[:, :, None] & seen[:, None]).at[:, :, 0].set(True)
            bias = jnp.where(seen, 0.0, HIDDEN)[:, None]
        condition = TimeEmbed(self.channels, name="time_embed", **types)(times)
        y = nn.silu(Dense(self.channels, name="mean_1", **types)(mean.astype(self.dtype)))
        condition = condition + Dense(self.channels, name="mean_2", **types)(y)
        x = Dense(self.channels, name="text_in", **types)(text.astype(self.dtype))
        for i in range(2):
            x = RefinerBlock(self.num_heads, name=f"layers_{i}", **types)(x, condition, bias)
        return x


class DoubleBlock(nn.Module):
    """Image and text with weights of their own, joined in attention."""

    num_heads: int
    mlp_ratio: float
    activation: str
    qkv_bias: bool
    qk_norm: str | None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch tokens channels"],
        text: Float[Array, "batch length channels"],
        vector: Float[Array, "batch channels"],
        segments: Int[Array, "batch tokens+length"],
        turn: tuple[np.ndarray, np.ndarray],
    ) -> tuple[Array, Array]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = image.shape[-1]
        streams, parts, mods = {"image": image, "text": text}, [], {}
        for name, x in streams.items():
            mod = ZeroDense(6 * channels, name=f"{name}_modulation", **types)(nn.silu(vector))
            mods[name] = jnp.split(mod[:, None], 6, -1)
            y = modulate(PlainNorm(name=f"{name}_norm1", **types)(x), *mods[name][:2])
            qkv = Dense(3 * channels, use_bias=self.qkv_bias, name=f"{name}_qkv", **types)(y)
            query, key, value = rearrange(qkv, "b l (k n d) -> k b l n d", k=3, n=self.num_heads)
            query = HeadNorm(self.qk_norm, name=f"{name}_query", **types)(query)
            key = HeadNorm(self.qk_norm, name=f"{name}_key", **types)(key)
            parts.append((query, key, value))
        query, key, value = (jnp.concatenate(both, 1) for both in zip(*parts, strict=True))
        query, key = rotate(query, turn), rotate(key, turn)
        y = kernels_pallas.attention(
            query, key, value, query_segments=segments, key_segments=segments
        )
        y = rearrange(y, "b l n d -> b l (n d)")
        cut = image.shape[1]
        out = []
        for (name, x), seen in zip(streams.items(), (y[:, :cut], y[:, cut:]), strict=True):
            _, _, gate1, shift, scale, gate2 = mods[name]
            read = Dense(channels, use_bias=self.qkv_bias, name=f"{name}_out", **types)
            x = x + gate1 * read(seen)
            y = modulate(PlainNorm(name=f"{name}_norm2", **types)(x), shift, scale)
            hidden, act = int(channels * self.mlp_ratio), ACTIVATIONS[self.activation]
            x = x + gate2 * Mlp(hidden, act, name=f"{name}_mlp", **types)(y)
            out.append(constrain(x, "batch", "length", "channels"))
        return out[0], out[1]


class SingleBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side."""

    num_heads: int
    mlp_ratio: float
    activation: str
    qk_norm: str | None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        vector: Float[Array, "batch channels"],
        segments: Int[Array, "batch tokens"],
        turn: tuple[np.ndarray, np.ndarray],
    ) -> Float[Array, "batch tokens channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        hidden = int(channels * self.mlp_ratio)
        mod = ZeroDense(3 * channels, name="modulation", **types)(nn.silu(vector))
        shift, scale, gate = jnp.split(mod[:, None], 3, -1)
        y = modulate(PlainNorm(name="norm", **types)(x), shift, scale)
        y = Dense(3 * channels + hidden, name="linear1", **types)(y)
        qkv, y = y[..., : 3 * channels], y[..., 3 * channels :]
        query, key, value = rearrange(qkv, "b l (k n d) -> k b l n d", k=3, n=self.num_heads)
        query = rotate(HeadNorm(self.qk_norm, name="query", **types)(query), turn)
        key = rotate(HeadNorm(self.qk_norm, name="key", **types)(key), turn)
        seen = kernels_pallas.attention(
            query, key, value, query_segments=segments, key_segments=segments
        )
        both = [rearrange(seen, "b l n d -> b l (n d)"), ACTIVATIONS[self.activation](y)]
        x = x + gate * Dense(channels, name="linear2", **types)(jnp.concatenate(both, -1))
        return constrain(x, "batch", "length", "channels")


class Magic1For1(Model):
    """Noisy latents, given frames, a time and a text to the velocity of the flow.

    Attributes:
      clip_size: frames, height and width of the latents for `example_inputs`; others work.
      latent_channels: of the autoencoder.
      out_channels: of the prediction.
      text_channels, pooled_channels: widths of the token features and of the pooled text.
      text_length: tokens of the text for `example_inputs`.
      rope_dims: channels of a head that frame, row and column turn; together the head's width.
      activation: of the MLPs: "gelu_tanh", "gelu", "relu" or "silu".
      qk_norm: "rms", "layer" or None.
      refine_text: two refining blocks; False: two matrices (`text_projection` in the code).
      mask_text: whether the refiner knows which text is padding (`use_attention_mask`).
      guidance_embed: keep the unused embedding of the guidance that published files may hold.
      remat: recompute blocks in the backward pass; True, or a key of `zoo.layers.stack.REMAT`.
    """

    clip_size: Size = (21, 68, 120)
    latent_channels: int = 16
    out_channels: int = 16
    patch_size: Size = (1, 2, 2)
    embed_dim: int = 3072
    num_heads: int = 24
    mlp_ratio: float = 4.0
    double_depth: int = 20
    single_depth: int = 40
    rope_dims: Size = (16, 56, 56)
    rope_theta: float = 256.0
    text_channels: int = 4096
    pooled_channels: int = 768
    text_length: int = 256
    activation: str = "gelu_tanh"
    qkv_bias: bool = True
    qk_norm: str | None = "rms"
    refine_text: bool = True
    mask_text: bool = True
    guidance_embed: bool = False
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`: one frame is given."""
        _, height, width = self.clip_size
        shapes = {
            "latents": (*self.clip_size, self.latent_channels),
            "given": (1, height, width, self.latent_channels),
            "times": (),
            "text": (self.text_length, self.text_channels),
            "text_mask": (self.text_length,),
            "pooled": (self.pooled_channels,),
        }
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, *shape), jnp.int32 if name == "text_mask" else jnp.float32
            )
            for name, shape in shapes.items()
        }

    def __call__(
        self,
        latents: Float[Array, "batch time height width channels"],
        given: Float[Array, "batch frames height width channels"],
        times: Float[Array, "batch"],
        text: Float[Array, "batch length features"],
        text_mask: Int[Array, "batch length"],
        pooled: Float[Array, "batch pooled"],
        train: bool = False,
    ) -> Float[Array, "batch time height width out_channels"]:
        """The velocity `noise - x0`."""
        return self.features(latents, given, times, text, text_mask, pooled, train)["prediction"]

    @nn.compact
    def features(
        self,
        latents: Float[Array, "batch time height width channels"],
        given: Float[Array, "batch frames height width channels"],
        times: Float[Array, "batch"],
        text: Float[Array, "batch length features"],
        text_mask: Int[Array, "batch length"],
        pooled: Float[Array, "batch pooled"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Image and text tokens after the double blocks, and the velocity.

        Args:
          latents: noisy latents.
          given: clean latents of the first frames; of no frame (an empty axis), for text to image.
          times: 0 ... 1000.
          text: token features, the real ones first.
          text_mask: 1 for real tokens, 0 for padding.
          pooled: one feature vector of the text.
          train: not used; there is no dropout.
        """
        self._check(latents.shape)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        size = tuple(n // p for n, p in zip(latents.shape[1:4], self.patch_size, strict=True))
        turn = rotations(size, self.rope_dims, self.rope_theta)
        image = self._embed(latents, given)
        vector = TimeEmbed(self.embed_dim, name="time_embed", **types)(times)
        y = nn.silu(Dense(self.embed_dim, name="pooled_1", **types)(pooled.astype(self.dtype)))
        vector = vector + Dense(self.embed_dim, name="pooled_2", **types)(y)
        if self.guidance_embed:
            TimeEmbed(self.embed_dim, name="guidance_embed", **types)(times)
        text = self._text(text, times, text_mask)

        count = text_mask.sum(1)[:, None]
        padding = (jnp.arange(text.shape[1]) >= count).astype(jnp.int32)
        segments = jnp.pad(padding, ((0, 0), (image.shape[1], 0)))
        double = remat_block(DoubleBlock, self.remat, static_argnums=())
        for i in range(self.double_depth):
            image, text = double(
                self.num_heads,
                self.mlp_ratio,
                self.activation,
                self.qkv_bias,
                self.qk_norm,
                name=f"double_layers_{i}",
                **types,
            )(image, text, vector, segments, turn)
        out = {"image_tokens": image, "text_tokens": text}
        x = jnp.concatenate([image, text], 1)
        single = remat_block(SingleBlock, self.remat, static_argnums=())
        for i in range(self.single_depth):
            x = single(
                self.num_heads,
                self.mlp_ratio,
                self.activation,
                self.qk_norm,
                name=f"single_layers_{i}",
                **types,
            )(x, vector, segments, turn)
        x = x[:, : image.shape[1]]
        mod = ZeroDense(2 * self.embed_dim, name="modulation", **types)(nn.silu(vector))
        shift, scale = jnp.split(mod[:, None], 2, -1)
        x = modulate(PlainNorm(name="norm", **types)(x), shift, scale)
        x = ZeroDense(self.out_channels * math.prod(self.patch_size), name="head", **types)(x)
        (t, h, w), (p, q, r) = size, self.patch_size
        whole = "b (t h w) (c p q r) -> b (t p) (h q) (w r) c"
        out["prediction"] = rearrange(x, whole, t=t, h=h, w=w, p=p, q=q, r=r)
        return out

    def _embed(self, latents: Array, given: Array) -> Array:
        """Tokens of noisy latents, given frames and the channel that says which are given."""
        frames = given.shape[1]
        after = ((0, 0), (0, latents.shape[1] - frames), (0, 0), (0, 0), (0, 0))
        ones = jnp.ones((*given.shape[:4], 1), given.dtype)
        stack = [latents, jnp.pad(given, after), jnp.pad(ones, after)]
        x = jnp.concatenate(stack, -1).astype(self.dtype)
        p, q, r = self.patch_size
        x = rearrange(x, "b (t p) (h q) (w r) c -> b (t h w) (p q r c)", p=p, q=q, r=r)
        shape = (p, q, r, 2 * self.latent_channels + 1, self.embed_dim)
        init = nn.initializers.xavier_uniform(in_axis=(0, 1, 2, 3), out_axis=4)
        kernel = self.param("latent_in_kernel", init, shape, self.param_dtype)
        bias = self.param("latent_in_bias", nn.initializers.zeros, shape[-1:], self.param_dtype)
        x = x @ kernel.astype(self.dtype).reshape(-1, self.embed_dim)
        return x + bias.astype(self.dtype)

    def _text(self, text: Array, times: Array, mask: Array) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.refine_text:
            refiner = Refiner(self.embed_dim, self.num_heads, name="refiner", **types)
            return refiner(text, times, mask if self.mask_text else None)
        y = nn.silu(Dense(self.embed_dim, name="text_1", **types)(text.astype(self.dtype)))
        return Dense(self.embed_dim, name="text_2", **types)(y)

    def _check(self, shape: tuple[int, ...]) -> None:
        whole = len(shape) == 5 and shape[4] == self.latent_channels
        if not whole or any(n % p for n, p in zip(shape[1:4], self.patch_size, strict=True)):
            raise ValueError(
                f"This Magic1For1 takes latents of shape (batch, frames, height, width, "
                f"{self.latent_channels}) that are whole patches of {self.patch_size}, not {shape}."
            )
        if sum(self.rope_dims) != self.embed_dim // self.num_heads:
            raise ValueError(
                f"rope_dims={self.rope_dims} must sum to the head's width, "
                f"{self.embed_dim // self.num_heads}."
            )


def extend(
    window: Callable[[Array, Array], Array],
    first: Array,
    rng: Array,
    windows: int,
    overlap: int = 1,
) -> Float[Array, "batch frames height width channels"]:
    """A long video, window after window, with the memory of one (and of the result).

    Args:
      window: `(given frames, rng) -> frames`: a clip that begins with the given frames.
      first: the frames that the first window is given, `[batch, overlap, height, width, channels]`.
      rng: of all windows.
      windows: how many.
      overlap: each further window is given the last so many frames, which it repeats.

    Returns:
      `windows * (T - overlap) + overlap` frames.
    """

    def step(given: Array, rng: Array) -> tuple[Array, Array]:
        clip = window(given, rng)
        return clip[:, clip.shape[1] - overlap :], clip[:, overlap:]

    clip = window(first, jax.random.fold_in(rng, 0))
    rngs = jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(1, windows))
    _, rest = jax.lax.scan(step, clip[:, clip.shape[1] - overlap :], rngs)
    return jnp.concatenate([clip, rearrange(rest, "s b t h w c -> b (s t) h w c")], 1)


# ---------------------------------------------------------------------------- checkpoints


def _stream_rules(theirs: str, ours: str) -> list[Rule]:
    """One stream of a double block: `img` is `image`, `txt` is `text`."""
    block, here = f"double_blocks.{{i}}.{theirs}", f"double_layers_{{i}}/{ours}"
    rules = [
        *dense_rules(f"{block}_mod.linear", f"{here}_modulation"),
        *dense_rules(f"{block}_attn_qkv", f"{here}_qkv"),
        *dense_rules(f"{block}_attn_proj", f"{here}_out"),
        *dense_rules(f"{block}_mlp.fc1", f"{here}_mlp/up"),
        *dense_rules(f"{block}_mlp.fc2", f"{here}_mlp/down"),
    ]
    for a, b in (("q", "query"), ("k", "key")):
        rules += norm_rules(f"{block}_attn_{a}_norm", f"{here}_{b}/norm")
    return rules


_REFINER = "txt_in.individual_token_refiner.blocks.{i}", "refiner/layers_{i}"
_SINGLE = "single_blocks.{i}", "single_layers_{i}"

LAYOUTS = {
    "official": Rules(
        (
            Rule("img_in.proj.weight", "latent_in_kernel", conv),
            Rule("img_in.proj.bias", "latent_in_bias"),
            *dense_rules("txt_in.input_embedder", "refiner/text_in"),
            *dense_rules("txt_in.t_embedder.mlp.0", "refiner/time_embed/linear1"),
            *dense_rules("txt_in.t_embedder.mlp.2", "refiner/time_embed/linear2"),
            *dense_rules("txt_in.c_embedder.linear_1", "refiner/mean_1"),
            *dense_rules("txt_in.c_embedder.linear_2", "refiner/mean_2"),
            *norm_rules(f"{_REFINER[0]}.norm1", f"{_REFINER[1]}/norm1"),
            *norm_rules(f"{_REFINER[0]}.norm2", f"{_REFINER[1]}/norm2"),
            *dense_rules(f"{_REFINER[0]}.self_attn_qkv", f"{_REFINER[1]}/qkv"),
            *dense_rules(f"{_REFINER[0]}.self_attn_proj", f"{_REFINER[1]}/out"),
            *dense_rules(f"{_REFINER[0]}.mlp.fc1", f"{_REFINER[1]}/mlp/up"),
            *dense_rules(f"{_REFINER[0]}.mlp.fc2", f"{_REFINER[1]}/mlp/down"),
            *dense_rules(f"{_REFINER[0]}.adaLN_modulation.1", f"{_REFINER[1]}/modulation"),
            *dense_rules("txt_in.linear_1", "text_1"),
            *dense_rules("txt_in.linear_2", "text_2"),
            *dense_rules("time_in.mlp.0", "time_embed/linear1"),
            *dense_rules("time_in.mlp.2", "time_embed/linear2"),
            *dense_rules("text_guidance_in.mlp.0", "guidance_embed/linear1"),
            *dense_rules("text_guidance_in.mlp.2", "guidance_embed/linear2"),
            *dense_rules("vector_in.in_layer", "pooled_1"),
            *dense_rules("vector_in.out_layer", "pooled_2"),
            *_stream_rules("img", "image"),
            *_stream_rules("txt", "text"),
            *dense_rules(f"{_SINGLE[0]}.linear1", f"{_SINGLE[1]}/linear1"),
            *dense_rules(f"{_SINGLE[0]}.linear2", f"{_SINGLE[1]}/linear2"),
            *norm_rules(f"{_SINGLE[0]}.q_norm", f"{_SINGLE[1]}/query/norm"),
            *norm_rules(f"{_SINGLE[0]}.k_norm", f"{_SINGLE[1]}/key/norm"),
            *dense_rules(f"{_SINGLE[0]}.modulation.linear", f"{_SINGLE[1]}/modulation"),
            *dense_rules("final_layer.linear", "head"),
            *dense_rules("final_layer.adaLN_modulation.1", "modulation"),
        )
    )
}

# ------------------------------------------------------------------------------- variants

_ABOUT = {
    "task": "image_to_video",
    "paper": "Magic 1-For-1, arXiv 2502.07701",
    "code": "github.com/DA-Group-PKU/Magic-1-For-1",
}
_WITHHELD = "non-commercial code; the weights are withheld"

VARIANTS = {
    "Magic_141_Video-T/2": Variant(module=Magic1For1, fields={}, licence=_WITHHELD, **_ABOUT),
    "Magic_141_Video-T/2-cfgdistill": Variant(
        module=Magic1For1, fields={"guidance_embed": True}, licence=_WITHHELD, **_ABOUT
    ),
    "magic_1_for_1_small": Variant(
        module=Magic1For1,
        fields={
            "clip_size": (8, 32, 32),
            "embed_dim": 192,
            "num_heads": 3,
            "double_depth": 4,
            "single_depth": 8,
            "rope_dims": (16, 24, 24),
            "text_channels": 64,
            "pooled_channels": 32,
            "text_length": 77,
        },
        licence="none: no published weights",
        **_ABOUT,
    ),
    "magic_1_for_1_test": Variant(
        module=Magic1For1,
        fields={
            "clip_size": (2, 4, 4),
            "latent_channels": 2,
            "out_channels": 2,
            "embed_dim": 24,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "double_depth": 1,
            "single_depth": 1,
            "rope_dims": (4, 4, 4),
            "text_channels": 6,
            "pooled_channels": 5,
            "text_length": 3,
        },
        licence="none: no published weights",
        **_ABOUT,
    ),
}

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    partition={
        r".*_out/kernel": ("heads", "channels"),
        r".*_out/bias": ("channels",),
    },
    frozen=(r"guidance_embed/.*",),
    no_decay=("latent_in_bias",),
)
