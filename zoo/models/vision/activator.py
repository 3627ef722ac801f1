"""ACTIVATOR: gated linear units in place of attention, and no other mixing of tokens.

Abdullah and Aydin, "Activator: GLU Activations as The Core Functions of a Vision Transformer",
2024, arXiv 2405.15953. Official code: github.com/Abdullah-88/Activator (BSD-3-Clause), which we
follow; it publishes no weights.

    gated_mlp(x) = W3 (LN(GELU(W1 x + b1)) * LN(W2 x + b2)) + b3     one LayerNorm for both factors
    x = x + gated_mlp(LN(x));   x = x + MLP(LN(x))                   one LayerNorm for both lines
    logits = W mean(x) + b                                           no norm in front

`activator_only_geglu_*` have the first line alone. There is neither attention, nor a position, nor
a class token: each patch is worked on by itself, and patches meet only in the mean, so that their
order does not change the logits. The paper speaks of replacing what mixes tokens; the code, which
decides, has nothing in its place.

    features         activator_cifar10
    patch_embed       8   8  256    4x4 patches, linear; stride 4
    block0            8   8  256    up to block3, all of stride 4
    pooled                   256    mean over the map
    logits                    10

Any image of whole patches works, and its size changes no parameter.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rules, conv_rules, dense_rules, norm_rules
from zoo.layers.classifier import ImageClassifier
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.norm import LayerNorm as _LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed, torch_default_init
from zoo.layers.stack import remat_block
from zoo.system import Preprocessing, System, Variant

LayerNorm = partial(_LayerNorm, epsilon=1e-5)


class GatedMlp(nn.Module):
    """`down(norm(gelu(gate(x))) * norm(up(x)))` of width `hidden`, with the same norm twice."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(nn.Dense, kernel_init=torch_default_init, **types)
        norm = LayerNorm(name="norm", **types)
        gate = norm(gelu(dense(self.hidden, name="gate")(x)))
        y = gate * norm(dense(self.hidden, name="up")(x))
        y = constrain(y, "batch", *["length"] * (y.ndim - 2), "mlp")
        return dense(x.shape[-1], name="down")(y)


class Block(nn.Module):
    """The gated unit and, unless it stands alone, an MLP, with residuals and one LayerNorm."""

    hidden: int
    has_mlp: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = LayerNorm(name="norm", **types)
        x = x + GatedMlp(self.hidden, name="gated_mlp", **types)(norm(x))
        if self.has_mlp:
            init = torch_default_init
            mlp = Mlp(self.hidden, dropout=self.dropout, kernel_init=init, name="mlp", **types)
            x = x + mlp(norm(x), train)
        return constrain(x, "batch", "height", "width", "channels")


class Activator(ImageClassifier):
    """ACTIVATOR classifier.

    Attributes:
      image_size: height and width in pixels that `example_inputs` states; others work as well.
      hidden: width of the gated units and of the MLPs.
      has_mlp: an MLP after each gated unit.
      dropout: in the MLPs; the gated units have none.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 4
    num_classes: int = 10
    embed_dim: int = 256
    hidden: int = 512
    depth: int = 4
    has_mlp: bool = True
    dropout: float = 0.5

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        self.check_images(images)
        self.check_channels(images.shape)
        types = self.types
        out = {}
        p = self.patch_size  # what is no whole patch is cut off, as a convolution does
        rows, columns = (side // p * p for side in images.shape[1:3])
        whole = images[:, :rows, :columns]
        x = PatchEmbed(self.embed_dim, p, name="embed", **types)(whole)
        out["patch_embed"] = x
        block = remat_block(Block, self.remat, static_argnums=(2,))
        for i in range(self.depth):
            layer = block(self.hidden, self.has_mlp, self.dropout, name=f"layers_{i}", **types)
            x = out[f"block{i}"] = layer(x, train)
        x = out["pooled"] = x.mean((1, 2))
        out["logits"] = self.classify(x, torch_default_init)
        return out


LAYOUTS = {
    "official": Rules(
        (
            *conv_rules("patcher", "embed"),
            *norm_rules("model.{i}.norm", "layers_{i}/norm"),
            *dense_rules("model.{i}.actgu.proj_1", "layers_{i}/gated_mlp/gate"),
            *dense_rules("model.{i}.actgu.proj_2", "layers_{i}/gated_mlp/up"),
            *dense_rules("model.{i}.actgu.proj_3", "layers_{i}/gated_mlp/down"),
            *norm_rules("model.{i}.actgu.norm", "layers_{i}/gated_mlp/norm"),
            *dense_rules("model.{i}.ffn.net.0", "layers_{i}/mlp/up"),
            *dense_rules("model.{i}.ffn.net.3", "layers_{i}/mlp/down"),
            *dense_rules("classifier", "head"),
        ),
        fresh=("head/kernel", "head/bias"),
    )
}


def _variant(params: int | None, **fields) -> Variant:
    return Variant(
        module=Activator,
        fields=fields,
        task="image_classification",
        params=params,
        paper="Activator: GLU Activations as The Core Functions of a Vision Transformer, "
        "arXiv 2405.15953",
        code="github.com/Abdullah-88/Activator",
        licence="none: no published weights",
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0),
    )


VARIANTS = {
    "activator_cifar10": _variant(2_650_890),
    "activator_only_geglu_cifar10": _variant(1_599_242, has_mlp=False),
    "activator_test": _variant(None, embed_dim=64, hidden=128, depth=2, dropout=0.0),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
