"""TopNet: where in a picture, and how large, an object should be placed.

Zhu et al., "TopNet: Transformer-based Object Placement Network for Image Compositing", CVPR 2023,
arXiv 2304.03372. The authors published no code; this is a reconstruction from the abstract and the
overview figure. Where these leave sizes open (depths, heads, widths of the decoder, the exact form
of the loss), the numbers are our choice.

One vision transformer reads the background, another the object. The object's class token and the
background's tokens pass a third transformer together, so that every place knows the object. A
decoder of convolutions enlarges the map of places to a heat map of S scales. Lower is better:
values are distances, and a box stands where the map has a minimum.

    heat map = decode(transformer([object token | background tokens] + positions)[places])

Of each picture one box g is known, so the loss is sparse. With d the value at g and j all values
but those near g (a neighbouring scale and up to two cells away, which are left alone):

    loss = relu(d) + mean_j relu(margin - (M_j - d)) + weight mean_j relu(|M_j| - range)

`best_boxes` gives minima one after the other, each with its neighbourhood left out; with a scale or
a place given, the search is over the rest.

    features         topnet_base
    background        197  768    class token and 14x14 places
    object            197  768
    joined            196  768    places that have seen the object
    image              16  224  224    the heat map
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, conv, dense_rules, norm_rules
from zoo.layers.block import Block
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.patch import torch_default_init
from zoo.models.vision.vit import VisionTransformer
from zoo.system import System, Variant

init = nn.initializers.normal(0.02)
EPSILON = 1e-6


class Enlarge(nn.Module):
    """Twice the map: bilinear, a 3x3 convolution, batch norm, ReLU."""

    channels: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns in_channels"], train: bool = False
    ) -> Float[Array, "batch 2*rows 2*columns channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, rows, columns, channels = x.shape
        x = jax.image.resize(x, (batch, 2 * rows, 2 * columns, channels), "bilinear")
        x = nn.Conv(self.channels, (3, 3), use_bias=False, kernel_init=torch_default_init,
                    name="conv", **types)(x)  # fmt: skip
        x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm", **types)(x)
        return nn.relu(x)


class TopNet(Model):
    """Background and object to a heat map of places and scales.

    Attributes:
      image_size: of both pictures.
      num_scales: S, sizes of a box (see `box_scales`).
      encoder_depth: blocks of each encoder.
      depth: blocks of the transformer that joins them.
      decoder: channels of the decoder's steps, each of which doubles the map.
      positions: learned positions of the joined tokens; False: none, and moving the background
        by a patch moves the heat map.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    in_channels: int = 3
    num_scales: int = 16
    embed_dim: int = 768
    encoder_depth: int = 12
    depth: int = 4
    num_heads: int = 12
    decoder: tuple[int, ...] = (256, 128, 64, 32)
    positions: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.image_size, self.in_channels)
        spec = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {"background": spec, "object_image": spec}

    def __call__(
        self,
        background: Float[Array, "batch height width channels"],
        object_image: Float[Array, "batch height width channels"],
        train: bool = False,
    ) -> Float[Array, "batch scales rows columns"]:
        """The heat map; lower is better."""
        return self.features(background, object_image, train)["image"]

    @nn.compact
    def features(
        self,
        background: Float[Array, "batch height width channels"],
        object_image: Float[Array, "batch height width channels"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Tokens of both encoders, the joined places and the heat map."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = partial(
            VisionTransformer,
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            num_classes=0,
            embed_dim=self.embed_dim,
            depth=self.encoder_depth,
            num_heads=self.num_heads,
            dropout=self.dropout,
            position="all" if self.positions else "none",
            **types,
        )
        places = encoder(name="background").features(background, train)["norm"]
        seen = encoder(name="object").features(object_image, train)["norm"]
        out = {"background": places, "object": seen}
        x = jnp.concatenate([seen[:, :1], places[:, 1:]], 1)
        if self.positions:
            table = self.param("position_embedding", init, (1, *x.shape[1:]), self.param_dtype)
            x = x + table.astype(self.dtype)
        for i in range(self.depth):
            block = Block(self.num_heads, dropout=self.dropout, name=f"layers_{i}", **types)
            x = block(x, 0.0, train)
        x = LayerNorm(epsilon=EPSILON, name="norm", **types)(x)
        x = out["joined"] = x[:, 1:]
        x = rearrange(x, "b (h w) c -> b h w c", h=self.image_size[0] // self.patch_size)
        for i, channels in enumerate(self.decoder):
            x = Enlarge(channels, name=f"decoder_{i}", **types)(x, train)
        x = nn.Dense(self.num_scales, kernel_init=torch_default_init, name="head", **types)(x)
        out["image"] = x.transpose(0, 3, 1, 2)
        return out


# ---------------------------------------------------------------------------- loss, boxes


def box_scales(count: int, smallest: float = 0.1, largest: float = 0.9) -> np.ndarray:
    """Sides of the boxes, as parts of the background's, growing by a constant factor."""
    return np.geomspace(smallest, largest, count)


def near(
    shape: tuple[int, int, int], at: Int[Array, "batch 3"], radius: int = 2
) -> Float[Array, "batch scales rows columns"]:
    """Which cells are at most one scale and `radius` cells away from (scale, row, column)."""
    apart = [jnp.abs(jnp.arange(n) - at[:, i, None]) for i, n in enumerate(shape)]
    close = [a <= limit for a, limit in zip(apart, (1, radius, radius), strict=True)]
    return close[0][:, :, None, None] & close[1][:, None, :, None] & close[2][:, None, None, :]


def sparse_contrastive_loss(
    heat_map: Float[Array, "batch scales rows columns"],
    box: Int[Array, "batch 3"],
    *,
    margin: float = 1.0,
    limit: float = 2.0,
    weight: float = 0.1,
    radius: int = 2,
) -> Float[Array, "batch"]:
    """The loss in this module's text, of each picture.

    Args:
      heat_map: lower is better.
      box: the known scale, row and column.
      margin: how far above the known value all others should be.
      limit: beyond which absolute values cost.
      weight: of that cost.
      radius: cells around the known one that are left alone.
    """
    example = jnp.arange(heat_map.shape[0])
    value = heat_map[example, box[:, 0], box[:, 1], box[:, 2]]
    others = ~near(heat_map.shape[1:], box, radius)
    apart = nn.relu(margin - (heat_map - value[:, None, None, None]))
    far = nn.relu(jnp.abs(heat_map) - limit)
    count = others.sum((1, 2, 3))
    cost = jnp.where(others, apart + weight * far, 0.0).sum((1, 2, 3)) / count
    return nn.relu(value) + cost


def best_boxes(
    heat_map: Float[Array, "batch scales rows columns"],
    count: int = 1,
    *,
    radius: int = 2,
    scale: Int[Array, "batch"] | None = None,
    place: Int[Array, "batch 2"] | None = None,
) -> Int[Array, "batch count 3"]:
    """The best scale, row and column, then the next best away from it, and so on.

    Args:
      heat_map: lower is better.
      count: how many boxes.
      radius: cells around a box where no other may stand, on its scale and the next ones.
      scale: search this scale only.
      place: search this row and column only.
    """
    shape = heat_map.shape[1:]
    blocked = jnp.zeros(heat_map.shape, bool)
    if scale is not None:
        blocked |= (jnp.arange(shape[0]) != scale[:, None])[:, :, None, None]
    if place is not None:
        blocked |= (jnp.arange(shape[1]) != place[:, :1])[:, None, :, None]
        blocked |= (jnp.arange(shape[2]) != place[:, 1:])[:, None, None, :]

    def step(blocked: Array, _: None) -> tuple[Array, Array]:
        flat = jnp.where(blocked, jnp.inf, heat_map).reshape(heat_map.shape[0], -1)
        at = jnp.stack(jnp.unravel_index(flat.argmin(-1), shape), -1)
        return blocked | near(shape, at, radius), at

    _, boxes = jax.lax.scan(step, blocked, None, length=count)
    return boxes.swapaxes(0, 1).astype(jnp.int32)


# ---------------------------------------------------------------------------- checkpoints


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    """The names that timm gives to a block."""
    return [
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.attn.qkv", f"{ours}/attention/qkv"),
        *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
    ]


def _encoder_rules(name: str) -> list[Rule]:
    """An encoder's part of a file: timm's names of a ViT behind the encoder's name."""
    return [
        Rule(f"{name}.patch_embed.proj.weight", f"{name}/embed/kernel", conv),
        Rule(f"{name}.patch_embed.proj.bias", f"{name}/embed/bias"),
        Rule(f"{name}.cls_token", f"{name}/class_token"),
        Rule(f"{name}.pos_embed", f"{name}/position_embedding"),
        *_block_rules(f"{name}.blocks.{{i}}", f"{name}/layers_{{i}}"),
        *norm_rules(f"{name}.norm", f"{name}/norm"),
    ]


_DECODER = "decoder.{i}", "decoder_{i}"

LAYOUTS = {
    "timm": Rules(  # there is no official file: encoders as timm names them, the rest alike
        (
            *_encoder_rules("background"),
            *_encoder_rules("object"),
            Rule("pos_embed", "position_embedding"),
            *_block_rules("blocks.{i}", "layers_{i}"),
            *norm_rules("norm", "norm"),
            Rule(f"{_DECODER[0]}.conv.weight", f"{_DECODER[1]}/conv/kernel", conv),
            *norm_rules(f"{_DECODER[0]}.norm", f"{_DECODER[1]}/norm"),
            Rule(f"{_DECODER[0]}.norm.running_mean", f"batch_stats/{_DECODER[1]}/norm/mean"),
            Rule(f"{_DECODER[0]}.norm.running_var", f"batch_stats/{_DECODER[1]}/norm/var"),
            *dense_rules("head", "head"),
        )
    )
}

# ------------------------------------------------------------------------------- variants

_ABOUT = {
    "task": "object_placement",
    "paper": "TopNet, arXiv 2304.03372",
    "code": "none: a reconstruction from the paper",
    "licence": "none: no published weights",
}

VARIANTS = {
    "topnet_base": Variant(module=TopNet, fields={}, **_ABOUT),
    "topnet_tiny": Variant(
        module=TopNet,
        fields={
            "image_size": (32, 32),
            "patch_size": 4,
            "num_scales": 4,
            "embed_dim": 64,
            "encoder_depth": 2,
            "depth": 2,
            "num_heads": 4,
            "decoder": (32,),
        },
        **_ABOUT,
    ),
    "topnet_test": Variant(
        module=TopNet,
        fields={
            "image_size": (8, 8),
            "patch_size": 4,
            "num_scales": 3,
            "embed_dim": 16,
            "encoder_depth": 1,
            "depth": 1,
            "num_heads": 2,
            "decoder": (8,),
        },
        **_ABOUT,
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
