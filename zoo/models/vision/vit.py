"""Vision Transformer and DeiT: an image as a sequence of patches through a plain transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929; official code
github.com/google-research/vision_transformer (Apache-2.0). Touvron et al., "Training data-efficient
image transformers & distillation through attention", 2021, arXiv 2012.12877; official code
github.com/facebookresearch/deit (Apache-2.0). Names and options are those of timm, which both sets
of published weights are usually loaded with.

    x = [class | distillation | registers | patches P] + E        prefix tokens, row-major patches
    x = x + DropPath(g1 * attention(LN(x)));   x = x + DropPath(g2 * MLP(LN(x)))    g: optional
    logits = head(LN(x)[class])

Options that published models use: `pool="avg"` averages the patches and normalises after it;
`pool="token_avg"` reads the class token beside the patches' mean (DINOv2's linear classifiers);
`pool="map"` lets one learned query attend to the patches, and an MLP follow (SigLIP);
`distilled` reads a second head off the distillation token: the logits are the mean of both heads in
evaluation, and the pair `(class, distillation)` in training, as DeiT's code returns them.

    features         vit_small_patch16_224
    patch_embed      196  384    16x16 patches, linear; no prefix, no position
    embed            197  384    with prefix and position table
    block0           197  384    up to block11
    blocks           197  384    the last of them
    norm             197  384    LayerNorm (the identity where it stands behind the pooling)
    pooled                384    class token, or mean over patches
    logits               1000
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    concat,
    conv_rules,
    dense_rules,
    linear,
    norm_rules,
    reshape,
    split,
)
from zoo.layers.attention import Attention
from zoo.layers.block import Block
from zoo.layers.classifier import ImageClassifier
from zoo.layers.mlp import Mlp, gelu
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import PatchEmbed
from zoo.layers.position import resize_table
from zoo.layers.stack import remat_block
from zoo.system import File, Preprocessing, System, Variant

init = nn.initializers.normal(0.02)  # timm's truncation, at 100 deviations, never acts
tiny_init = nn.initializers.normal(1e-6)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
"""Of the MLPs: the exact GELU, and what SigLIP's and OpenAI's CLIP models have in its place."""

POOLS: dict[str, Callable[[Array, int], Array]] = {
    "token": lambda x, prefix: x[:, 0],
    "avg": lambda x, prefix: x[:, prefix:].mean(1),
    "max": lambda x, prefix: x[:, prefix:].max(1),
    "avgmax": lambda x, prefix: (x[:, prefix:].mean(1) + x[:, prefix:].max(1)) / 2,
    "token_avg": lambda x, prefix: jnp.concatenate([x[:, 0], x[:, prefix:].mean(1)], -1),
    "none": lambda x, prefix: x,
}
"""Sequence `[batch, length, channels]` and number of prefix tokens -> what the head reads."""


class LatentPool(nn.Module):
    """One learned query attends to all tokens, then an MLP: the head of SigLIP."""

    num_heads: int
    mlp_ratio: float = 4.0
    activation: Callable[[Array], Array] = gelu
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], train: bool = False
    ) -> Float[Array, "batch channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        start = nn.initializers.normal(width**-0.5)
        latent = self.param("latent", start, (1, 1, width), self.param_dtype)
        latent = jnp.broadcast_to(latent.astype(self.dtype), (len(x), 1, width))
        attention = Attention(self.num_heads, fused=False, name="attention", **types)
        y = attention(latent, None, train, x)
        z = LayerNorm(epsilon=self.epsilon, name="norm", **types)(y)
        z = Mlp(int(width * self.mlp_ratio), self.activation, name="mlp", **types)(z, train)
        return (y + z)[:, 0]


class VisionTransformer(ImageClassifier):
    """ViT or DeiT classifier.

    Attributes:
      image_size: height and width in pixels, multiples of `patch_size`.
      activation: of the MLPs, a key of `ACTIVATIONS`.
      class_token: start the sequence with a learned token.
      distilled: a second learned token and head for a teacher's labels (DeiT); needs
        `pool="token"`.
      distilled_head: whether the second token has its head; without it, as in
        DeiTForImageClassification of transformers, the class token alone is read.
      num_registers: further learned tokens behind them.
      position: which tokens the learned table adds to: "all", "patches", "class" (all but the
        registers, as in DINOv2) or "none".
      pool: what the head reads, a key of `POOLS`, or "map" (see the text above).
      pool_prefix: whether means, maxima and "map" see the tokens before the patches, too.
      head_norm: where the last LayerNorm stands: "tokens" (before pooling), "pooled" (after) or
        "none"; None is "tokens" where there is no mean or maximum, else "pooled", as in timm.
      pre_logits: width of a tanh layer before the head; older files of Google have one (0: none).
      pre_norm: LayerNorm before the first block, and a patch embedding without bias (CLIP).
      layer_scale: initial value of a learned scale per channel on every branch; None: no scales.
      out_bias: biases of `attention/out` and of the MLP.
      drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
      scan_layers: one stacked `layers` instead of `layers_0 ...`, compiled once
        (`zoo.layers.stack` converts the parameters).
    """

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    out_bias: bool = True
    query_key_norm: bool = False
    activation: str = "gelu"
    class_token: bool = True
    distilled: bool = False
    distilled_head: bool = True
    num_registers: int = 0
    position: str = "all"
    pool: str = "token"
    pool_prefix: bool = False
    head_norm: str | None = None
    pre_logits: int = 0
    pre_norm: bool = False
    layer_scale: float | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    scan_layers: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(size // self.patch_size for size in self.image_size)

    @property
    def num_prefix(self) -> int:
        """How many tokens stand before the patches."""
        return self.class_token + self.distilled + self.num_registers

    @property
    def num_positions_before(self) -> int:
        """How many rows of the position table are for tokens before the patches."""
        without = self.num_prefix - self.num_registers
        return {"all": self.num_prefix, "class": without}.get(self.position, 0)

    @nn.compact
    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); distilled models also give both heads."""
        self.check_images(images)
        self._check(images.shape)
        types = self.types
        norm = partial(LayerNorm, epsilon=self.epsilon, **types)
        out = {}
        x = PatchEmbed(
            self.embed_dim, self.patch_size, use_bias=not self.pre_norm, name="embed", **types
        )(images)
        x = out["patch_embed"] = rearrange(x, "b h w c -> b (h w) c")
        x = out["embed"] = self._embed(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = norm(name="pre_norm")(x) if self.pre_norm else x

        every = self._blocks(x, train)
        out |= {f"block{i}": x for i, x in enumerate(every)}
        x = out["blocks"] = every[-1] if every else x

        tokens_first = self.pool in ("token", "token_avg", "none", "map")
        where = self.head_norm or ("tokens" if tokens_first else "pooled")
        x = out["norm"] = norm(name="norm")(x) if where == "tokens" else x
        prefix = 0 if self.pool_prefix else self.num_prefix
        if self.pool == "map":
            sizes = (self.num_heads, self.mlp_ratio, ACTIVATIONS[self.activation], self.epsilon)
            pooled = LatentPool(*sizes, name="pool", **types)(x[:, prefix:], train)
        else:
            pooled = POOLS[self.pool](x, prefix)
        pooled = norm(name="pool_norm")(pooled) if where == "pooled" else pooled
        if self.pre_logits:
            dense = nn.Dense(self.pre_logits, kernel_init=init, name="pre_logits", **types)
            pooled = jnp.tanh(dense(pooled))
        out["pooled"] = pooled
        head = partial(nn.Dense, self.num_classes, kernel_init=init, **types)
        if not (self.distilled and self.distilled_head):
            out["logits"] = head(name="head")(pooled) if self.num_classes else pooled
            return out
        distilled = x[:, 1]
        if self.num_classes:
            pooled = head(name="head")(pooled)
            distilled = head(name="head_distillation")(distilled)
        out["logits_class"], out["logits_distillation"] = pooled, distilled
        out["logits"] = (pooled, distilled) if train else (pooled + distilled) / 2
        return out

    def _embed(
        self, x: Float[Array, "batch patches channels"]
    ) -> Float[Array, "batch length channels"]:
        """Prefix tokens and positions."""
        prefix = [
            self.param(name, start, (1, count, self.embed_dim), self.param_dtype)
            for name, start, count in (
                ("class_token", tiny_init, int(self.class_token)),
                ("distillation_token", init, int(self.distilled)),
                ("register_tokens", tiny_init, self.num_registers),
            )
            if count
        ]
        tokens = x.shape[1] + self.num_positions_before
        table = None
        if self.position != "none":
            shape = (1, tokens, self.embed_dim)
            table = self.param("position_embedding", init, shape, self.param_dtype)
            table = table.astype(self.dtype)
        x = x + table if self.position == "patches" else x
        prefix = [
            jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], *token.shape[1:]))
            for token in prefix
        ]
        behind = prefix[-1:] if self.position == "class" and self.num_registers else []
        before = prefix[: len(prefix) - len(behind)]
        x = jnp.concatenate([*before, x], axis=1)
        x = x + table if self.position in ("all", "class") else x
        if behind:
            count = self.num_positions_before
            x = jnp.concatenate([x[:, :count], *behind, x[:, count:]], axis=1)
        return constrain(x, "batch", "length", "channels")

    def _blocks(self, x: Float[Array, "batch length channels"], train: bool) -> list[Array]:
        """What each block gives."""
        rates = np.linspace(0.0, self.drop_path, self.depth)
        block = partial(
            remat_block(Block, self.remat, static_argnums=(3,), scanned=self.scan_layers),
            self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            query_key_norm=self.query_key_norm,
            activation=ACTIVATIONS[self.activation],
            layer_scale=self.layer_scale,
            epsilon=self.epsilon,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if not self.scan_layers:
            every = []
            for i, rate in enumerate(rates.tolist()):
                x = block(name=f"layers_{i}")(x, rate, train)
                every.append(x)
            return every

        def body(layer: nn.Module, x: Array, rate: Array) -> tuple[Array, Array]:
            x = layer(x, rate if self.drop_path else 0.0, train)
            return x, x

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        last, stacked = scan(block(name="layers"), x, jnp.asarray(rates, jnp.float32))
        return [*list(stacked)[:-1], last]  # training reads, and so keeps, the last alone

    def _check(self, shape: tuple[int, ...]) -> None:
        self.check_size(shape)
        for field, value, known in (
            ("pool", self.pool, (*POOLS, "map")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("position", self.position, ("all", "patches", "class", "none")),
            ("head_norm", self.head_norm, (None, "tokens", "pooled", "none")),
        ):
            if value not in known:
                raise ValueError(f"{field}={value!r} is none of {', '.join(map(repr, known))}.")
        if self.pool in ("token", "token_avg") and not self.class_token:
            raise ValueError(
                f'pool="{self.pool}" reads the class token; use class_token or pool="avg".'
            )
        if self.distilled and not (self.pool == "token" and self.head_norm in (None, "tokens")):
            raise ValueError(
                'distilled=True reads the class and the distillation token: it needs pool="token" '
                f"and the norm before it, not pool={self.pool!r}, head_norm={self.head_norm!r}."
            )


# ---------------------------------------------------------------------------- checkpoints


def _resize_position(
    table: np.ndarray, shape: tuple[int, ...], model: VisionTransformer, *_
) -> np.ndarray:
    """Prefix rows as they are, the grid as DeiT's code does it: bicubic, not antialiased.

    (timm antialiases here, and Google's code is bilinear.)
    """
    return resize_table(table, model.grid, model.num_positions_before)


def _layout(*rules: Rule, unused: tuple[str, ...] = ()) -> Rules:
    return Rules(
        rules,
        unused=unused,
        fresh=(
            "head/kernel",
            "head/bias",
            "head_distillation/kernel",
            "head_distillation/bias",
            "norm/scale",  # which timm's features_only leaves out
            "norm/bias",
        ),
        resize={"position_embedding": _resize_position},
    )


def _timm() -> Rules:
    """Files of timm and the official DeiT ones."""
    theirs, ours = "blocks.{i}", "layers_{i}"
    return _layout(
        Rule("cls_token", "class_token"),
        Rule("dist_token", "distillation_token"),
        Rule("reg_token", "register_tokens"),
        Rule("register_tokens", "register_tokens"),  # DINOv2's own name
        Rule("pos_embed", "position_embedding"),
        *conv_rules("patch_embed.proj", "embed"),
        *norm_rules("norm_pre", "pre_norm"),
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *dense_rules(f"{theirs}.attn.qkv", f"{ours}/attention/qkv"),
        *norm_rules(f"{theirs}.attn.q_norm", f"{ours}/attention/query_norm"),
        *norm_rules(f"{theirs}.attn.k_norm", f"{ours}/attention/key_norm"),
        *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
        Rule(f"{theirs}.ls1.gamma", f"{ours}/layer_scale1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
        Rule(f"{theirs}.ls2.gamma", f"{ours}/layer_scale2"),
        *norm_rules("norm", "norm"),
        *norm_rules("fc_norm", "pool_norm"),
        Rule("attn_pool.latent", "pool/latent"),
        *dense_rules("attn_pool.q", "pool/attention/query"),
        Rule(
            "attn_pool.kv.weight",
            ("pool/attention/key/kernel", "pool/attention/value/kernel"),
            chain(linear, split(1)),
        ),
        Rule(
            "attn_pool.kv.bias", ("pool/attention/key/bias", "pool/attention/value/bias"), split(0)
        ),
        *dense_rules("attn_pool.proj", "pool/attention/out"),
        *norm_rules("attn_pool.norm", "pool/norm"),
        *dense_rules("attn_pool.mlp.fc1", "pool/mlp/up"),
        *dense_rules("attn_pool.mlp.fc2", "pool/mlp/down"),
        *dense_rules("pre_logits.fc", "pre_logits"),
        *dense_rules("head", "head"),
        *dense_rules("head_dist", "head_distillation"),
        unused=("mask_token", "decoder*"),
    )


_JOIN = chain(linear, concat(1))
_HUGGING_FACE = {
    "layer": "encoder.layer.{i}",
    "qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "out": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_TRANSFORMERS5 = {
    **_HUGGING_FACE,
    "layer": "layers.{i}",
    "qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
    "out": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_DINO = {"norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}


def _hugging_face(prefix: str, names: dict, head: str = "classifier") -> Rules:
    """ViTModel (`prefix` is empty), its kin and its classifiers, with split projections.

    Since transformers 5 the modules have other names; its files still have the old ones.
    """
    ours, theirs = "layers_{i}", f"{prefix}{names['layer']}"
    return _layout(
        Rule(f"{prefix}embeddings.cls_token", "class_token"),
        Rule(f"{prefix}embeddings.distillation_token", "distillation_token"),
        Rule(f"{prefix}embeddings.register_tokens", "register_tokens"),
        Rule(f"{prefix}embeddings.position_embeddings", "position_embedding"),
        *conv_rules(f"{prefix}embeddings.patch_embeddings.projection", "embed"),
        *norm_rules(f"{theirs}.{names['norm1']}", f"{ours}/norm1"),
        Rule(
            tuple(f"{theirs}.{name}.weight" for name in names["qkv"]),
            f"{ours}/attention/qkv/kernel",
            _JOIN,
        ),
        Rule(
            tuple(f"{theirs}.{name}.bias" for name in names["qkv"]),
            f"{ours}/attention/qkv/bias",
            concat(0),
        ),
        *dense_rules(f"{theirs}.{names['out']}", f"{ours}/attention/out"),
        Rule(f"{theirs}.layer_scale1.lambda1", f"{ours}/layer_scale1"),
        *norm_rules(f"{theirs}.{names['norm2']}", f"{ours}/norm2"),
        *dense_rules(f"{theirs}.{names['up']}", f"{ours}/mlp/up"),
        *dense_rules(f"{theirs}.{names['down']}", f"{ours}/mlp/down"),
        Rule(f"{theirs}.layer_scale2.lambda1", f"{ours}/layer_scale2"),
        *norm_rules(f"{prefix}layernorm", "norm"),
        *dense_rules(f"{prefix}pooler.dense", "pre_logits"),
        *dense_rules(head, "head"),
        *dense_rules("distillation_classifier", "head_distillation"),
        unused=(f"{prefix}pooler.dense.*", f"{prefix}embeddings.mask_token", "decoder.*"),
    )


def _torchvision() -> Rules:
    theirs, ours = "encoder.layers.encoder_layer_{i}", "layers_{i}"
    layers = []
    for up, down in (("mlp.0", "mlp.3"), ("mlp.linear_1", "mlp.linear_2")):  # new and old files
        layers += dense_rules(f"{theirs}.{up}", f"{ours}/mlp/up")
        layers += dense_rules(f"{theirs}.{down}", f"{ours}/mlp/down")
    return _layout(
        Rule("class_token", "class_token"),
        Rule("encoder.pos_embedding", "position_embedding"),
        *conv_rules("conv_proj", "embed"),
        *norm_rules(f"{theirs}.ln_1", f"{ours}/norm1"),
        Rule(f"{theirs}.self_attention.in_proj_weight", f"{ours}/attention/qkv/kernel", linear),
        Rule(f"{theirs}.self_attention.in_proj_bias", f"{ours}/attention/qkv/bias"),
        *dense_rules(f"{theirs}.self_attention.out_proj", f"{ours}/attention/out"),
        *norm_rules(f"{theirs}.ln_2", f"{ours}/norm2"),
        *layers,
        *norm_rules("encoder.ln", "norm"),
        *dense_rules("heads.pre_logits", "pre_logits"),
        *dense_rules("heads.head", "head"),
    )


def _google(numbers: tuple[int, ...] = (0, 1, 2, 3), table: str = "") -> Rules:
    """Google's .npz files: Flax's own layouts, with heads as an axis of the attention's kernels.

    `numbers` are those of a block's norm, attention, second norm and MLP: vision_transformer counts
    them together, big_vision each kind by itself.
    """

    def both(theirs: str, ours: str, kernel: str = "kernel") -> tuple[Rule, Rule]:
        return Rule(f"{theirs}/{kernel}", f"{ours}/{kernel}"), Rule(
            f"{theirs}/bias", f"{ours}/bias"
        )

    def joined(model: VisionTransformer) -> Transform:
        width, heads = model.embed_dim, model.num_heads
        return chain(reshape((width, -1), (width, heads, -1)), concat(1))

    def joined_bias(model: VisionTransformer) -> Transform:
        return chain(reshape((-1,), (model.num_heads, -1)), concat(0))

    def out(model: VisionTransformer) -> Transform:
        width, heads = model.embed_dim, model.num_heads
        return reshape((-1, width), (heads, -1, width))

    theirs, ours = "Transformer/encoderblock_{i}", "layers_{i}"
    attention = f"{theirs}/MultiHeadDotProductAttention_{numbers[1]}"
    three = [f"{attention}/{n}" for n in ("query", "key", "value")]
    return _layout(
        Rule("cls", "class_token"),
        Rule(table or "Transformer/posembed_input/pos_embedding", "position_embedding"),
        *both("embedding", "embed"),
        *both(f"{theirs}/LayerNorm_{numbers[0]}", f"{ours}/norm1", "scale"),
        Rule(tuple(f"{t}/kernel" for t in three), f"{ours}/attention/qkv/kernel", joined),
        Rule(tuple(f"{t}/bias" for t in three), f"{ours}/attention/qkv/bias", joined_bias),
        Rule(f"{attention}/out/kernel", f"{ours}/attention/out/kernel", out),
        Rule(f"{attention}/out/bias", f"{ours}/attention/out/bias"),
        *both(f"{theirs}/LayerNorm_{numbers[2]}", f"{ours}/norm2", "scale"),
        *both(f"{theirs}/MlpBlock_{numbers[3]}/Dense_0", f"{ours}/mlp/up"),
        *both(f"{theirs}/MlpBlock_{numbers[3]}/Dense_1", f"{ours}/mlp/down"),
        *both("Transformer/encoder_norm", "norm", "scale"),
        *both("pre_logits", "pre_logits"),
        *both("head", "head"),
    )


LAYOUTS = {
    "timm": _timm(),
    "huggingface": _hugging_face("vit.", _HUGGING_FACE),
    "huggingface_encoder": _hugging_face("", _HUGGING_FACE),
    "huggingface_distilled": _hugging_face("deit.", _HUGGING_FACE, "cls_classifier"),
    "huggingface_deit": _hugging_face("deit.", _HUGGING_FACE),
    "huggingface_dinov2": _hugging_face("dinov2.", _HUGGING_FACE | _DINO),
    "huggingface_dinov2_registers": _hugging_face("dinov2_with_registers.", _HUGGING_FACE | _DINO),
    "huggingface_dinov2_encoder": _hugging_face("", _HUGGING_FACE | _DINO),
    "google": _google(),
    "big_vision": _google((0, 0, 1, 0), "pos_embedding"),
    "torchvision": _torchvision(),
    "transformers5": _hugging_face("vit.", _TRANSFORMERS5),
    "transformers5_encoder": _hugging_face("", _TRANSFORMERS5),
    "transformers5_distilled": _hugging_face("deit.", _TRANSFORMERS5, "cls_classifier"),
    "transformers5_deit": _hugging_face("deit.", _TRANSFORMERS5),
    "transformers5_dinov2": _hugging_face(
        "", _TRANSFORMERS5 | _DINO | {"layer": "encoder.layer.{i}"}
    ),
}

# ------------------------------------------------------------------------------- variants

_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def _fields(size: str, patch: int, resolution: int, **more) -> dict:
    width, depth, heads = _SIZES[size]
    return {
        "image_size": (resolution, resolution),
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        **more,
    }


def _flops(fields: dict) -> float:
    """Multiply-adds of one image: matrices of the blocks, the two attention products, patches."""
    width, depth = fields["embed_dim"], fields["depth"]
    patches = (fields["image_size"][0] // fields["patch_size"]) ** 2
    tokens = patches + fields.get("class_token", True) + fields.get("distilled", False)
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    heads = (1 + fields.get("distilled", False)) * fields.get("num_classes", 1000)
    return float(depth * block + patches * 3 * fields["patch_size"] ** 2 * width + heads * width)


def _augreg(
    model: str, regulariser: str, learning_rate: float | None = None, size: int = 224
) -> str:
    """Name of a file of arXiv 2106.10270; with a learning rate, of one tuned on ImageNet-1K."""
    tuned = f"--imagenet2012-steps_20k-lr_{learning_rate}-res_{size}" if learning_rate else ""
    return f"{model}-i21k-300ep-lr_0.001-aug_{regulariser}{tuned}.npz"


def _vit(size: str, patch: int, resolution: int, params: int, *files: str) -> tuple[str, Variant]:
    """A ViT under timm's name, with Google's files; a second file is the 21k model's."""
    fields = _fields(size, patch, resolution)
    return f"vit_{size}_patch{patch}_{resolution}", Variant(
        module=VisionTransformer,
        fields=fields,
        task="image_classification",
        params=params,
        flops=_flops(fields),
        paper="An Image is Worth 16x16 Words, arXiv 2010.11929; weights: arXiv 2106.10270",
        code="github.com/google-research/vision_transformer",
        licence="Apache-2.0",
        files=tuple(File(name) for name in files),
        preprocessing=Preprocessing(
            mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9 if resolution == 224 else 1.0
        ),
    )


def _in21k(size: str, patch: int, params: int, file: str) -> tuple[str, Variant]:
    """The model before fine-tuning: 21,843 classes of ImageNet-21k."""
    name, variant = _vit(size, patch, 224, params, file)
    fields = {**variant.fields, "num_classes": 21_843}
    return f"{name}_in21k", replace(variant, fields=fields, flops=_flops(fields))


def _deit(
    size: str, resolution: int, params: int, top1: float, digest: str, distilled: bool = False
) -> tuple[str, Variant]:
    """A DeiT under its authors' name; `digest` is the end of the official file's name."""
    fields = _fields(size, 16, resolution, drop_path=0.1, distilled=distilled)
    name = f"deit_{size}_{'distilled_' if distilled else ''}patch16_{resolution}"
    return name, Variant(
        module=VisionTransformer,
        fields=fields,
        task="image_classification",
        params=params,
        flops=_flops(fields),
        metric=f"ImageNet-1K top-1 {top1} %",
        paper="Training data-efficient image transformers, arXiv 2012.12877",
        code="github.com/facebookresearch/deit",
        licence="Apache-2.0",
        files=(File(f"{name}-{digest}.pth"),),
        preprocessing=Preprocessing(),
    )


_NONE = "none-wd_0.03-do_0.0-sd_0.0"
_LIGHT = "light1-wd_0.03-do_0.0-sd_0.0"
_LIGHT_DECAY = "light1-wd_0.1-do_0.0-sd_0.0"
_MEDIUM = "medium1-wd_0.03-do_0.0-sd_0.0"
_MEDIUM_DECAY = "medium1-wd_0.1-do_0.0-sd_0.0"
_MEDIUM_DROP = "medium1-wd_0.1-do_0.1-sd_0.1"

VARIANTS = dict(
    (
        _vit("tiny", 16, 224, 5_717_416, _augreg("Ti_16", _NONE, 0.03)),
        _vit("tiny", 16, 384, 5_790_376, _augreg("Ti_16", _NONE, 0.03, 384)),
        _vit("small", 32, 224, 22_878_952, _augreg("S_32", _LIGHT, 0.03)),
        _vit("small", 32, 384, 22_915_432, _augreg("S_32", _LIGHT, 0.03, 384)),
        _vit("small", 16, 224, 22_050_664, _augreg("S_16", _LIGHT, 0.03)),
        _vit("small", 16, 384, 22_196_584, _augreg("S_16", _LIGHT, 0.03, 384)),
        _vit("base", 32, 224, 88_224_232, _augreg("B_32", _MEDIUM, 0.03)),
        _vit("base", 32, 384, 88_297_192, _augreg("B_32", _LIGHT_DECAY, 0.03, 384)),
        _vit("base", 16, 224, 86_567_656, _augreg("B_16", _MEDIUM_DECAY, 0.01)),
        _vit("base", 16, 384, 86_859_496, _augreg("B_16", _MEDIUM_DECAY, 0.01, 384)),
        _vit("base", 8, 224, 86_576_872, _augreg("B_8", _MEDIUM_DECAY, 0.01)),
        _vit("large", 16, 224, 304_326_632, _augreg("L_16", _MEDIUM_DROP, 0.01)),
        _vit("large", 16, 384, 304_715_752, _augreg("L_16", _MEDIUM_DROP, 0.01, 384)),
        _vit("large", 32, 384, 306_632_680),
        _in21k("tiny", 16, 9_740_115, _augreg("Ti_16", _NONE)),
        _in21k("small", 32, 30_903_507, _augreg("S_32", _LIGHT)),
        _in21k("small", 16, 30_075_219, _augreg("S_16", _LIGHT)),
        _in21k("base", 32, 104_252_499, _augreg("B_32", _MEDIUM)),
        _in21k("base", 16, 102_595_923, _augreg("B_16", _MEDIUM_DECAY)),
        _in21k("large", 16, 325_690_707, _augreg("L_16", _MEDIUM_DROP)),
        _deit("tiny", 224, 5_717_416, 72.2, "a1311bcf"),
        _deit("small", 224, 22_050_664, 79.9, "cd65a155"),
        _deit("base", 224, 86_567_656, 81.8, "b5f2ef4d"),
        _deit("base", 384, 86_859_496, 82.9, "8de9b5d1"),
        _deit("tiny", 224, 5_910_800, 74.5, "b40b3cf7", distilled=True),
        _deit("small", 224, 22_436_432, 81.2, "649709d9", distilled=True),
        _deit("base", 224, 87_338_192, 83.4, "df68dfff", distilled=True),
        _deit("base", 384, 87_630_032, 85.2, "d0272ac0", distilled=True),
    )
) | {
    "vit_test": Variant(
        module=VisionTransformer,
        fields={
            "image_size": (32, 32),
            "patch_size": 8,
            "num_classes": 10,
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 3,
        },
        task="image_classification",
        paper="An Image is Worth 16x16 Words, arXiv 2010.11929",
        code="github.com/huggingface/pytorch-image-models",
        licence="none: no published weights",
        preprocessing=Preprocessing(crop=1.0),
    )
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
