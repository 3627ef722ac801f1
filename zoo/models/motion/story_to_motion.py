"""Story-to-Motion: a transformer that fills in the frames between two clips of human motion.

Qing et al., "Story-to-Motion: Synthesizing Infinite and Controllable Character Animation from Long
Text", SIGGRAPH Asia 2023 technical communications, arXiv 2311.07446. No code and no weights are
published, and of the paper only the abstract was at hand: this file is a reconstruction, whose
concrete choices are our own. The stages are

    a scheduler        a story to (text, place, seconds)                      zoo.motion.scheduler
    motion matching    the frame of a clip that fits text, path and pose      zoo.motion.matching
    transitions        the last frames of one clip | gap | the next clip      this file
    playing            one after the other, without an end                    zoo.motion.stream

The gap is filled progressively, in R passes. In pass r (1 to R) the network sees the known frames
and, in place of each unknown one, a line between those beside the gap, marked by a learned token.
Behind it, the outer unknown frames are kept from what it said and count as known:

    n = e - s unknown frames [s, e);   c = ceil(n r / 2R);   m = (s + e) // 2
    the next pass has [min(s + c, m), max(e - c, m)); the last pass keeps the rest

    x = W_in line (+ the token, where a frame is unknown) + P(frames from the gap's two ends)
    x = x + attention(LN(x));   x = x + W2 gelu(W1 LN(x))                              depth times
    f = line + W_out LN(x)   where a frame is unknown;   W_out is 0 at first

A known frame comes back as it is. Frames are rows of `zoo.motion.skeleton`. That the network sees a
line and adds to it, and that places are counted from the gap (half of the channels from its first
frame, half from its last; P are sinusoids), is our choice, too.

    features            story_to_motion_base
    embed               64  512
    layer0              64  512    up to layer5
    norm                64  512
    prediction          64  138    6 numbers of 22 joints, 3 speeds, a height, 2 contacts
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, norm_rules
from zoo.layers.block import Block
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.position import sinusoids
from zoo.motion.skeleton import CONTACTS, MOVES
from zoo.system import System, Variant


def shrunk(
    start: Int[Array, "..."], stop: Int[Array, "..."], done: int, passes: int
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """The frames `[start, stop)` that are still unknown when `done` of all passes are done."""
    if done >= passes:
        return stop, stop
    kept = -((start - stop) * done // (2 * passes))
    middle = (start + stop) // 2
    low, high = jnp.minimum(start + kept, middle), jnp.maximum(stop - kept, middle)
    return (low, high) if done else (start, stop)


def progressive_masks(
    length: int, start: int, stop: int, passes: int
) -> Bool[np.ndarray, "passes_and_one frames"]:
    """Which frames are unknown before each pass, and behind the last."""
    frames, rows = np.arange(length), []
    for done in range(passes + 1):
        low, high = shrunk(np.asarray(start), np.asarray(stop), done, passes)
        rows.append((frames >= low) & (frames < high))
    return np.stack(rows)


def line(
    motion: Float[Array, "batch frames numbers"], known: Bool[Array, "batch frames"]
) -> Float[Array, "batch frames numbers"]:
    """Unknown frames on the line between the known ones on both sides, or as the one side's."""
    length = motion.shape[1]
    frame = jnp.arange(length)
    before = jax.lax.cummax(jnp.where(known, frame, -1), axis=1)
    after = jax.lax.cummin(jnp.where(known, frame, length), axis=1, reverse=True)
    first = jnp.where(before < 0, after, before)
    last = jnp.where(after >= length, before, after)
    part = (frame - first) / jnp.maximum(last - first, 1)
    at = partial(jnp.take_along_axis, motion, axis=1, mode="clip")
    a, b = at(first[..., None]), at(last[..., None])
    filled = a + part[..., None].astype(motion.dtype) * (b - a)
    filled = jnp.where(known.any(1)[:, None, None], filled, 0)
    return jnp.where(known[..., None], motion, filled)


def from_gap(
    known: Bool[Array, "batch frames"], channels: int
) -> Float[Array, "batch frames channels"]:
    """Sinusoids of how far each frame is from the first and from the last unknown one."""
    length = known.shape[1]
    frame, half = jnp.arange(length), channels // 2
    first = jnp.argmin(known, axis=1)[:, None]
    last = length - 1 - jnp.argmin(known[:, ::-1], axis=1)[:, None]
    table = sinusoids(2 * length, half), sinusoids(2 * length, channels - half)
    ends = [
        jnp.asarray(t)[frame - end + length] for t, end in zip(table, (first, last), strict=True)
    ]
    return jnp.concatenate(ends, axis=-1)


class ProgressiveTransformer(Model):
    """Frames in a gap, from those around it.

    `__call__` is one pass; `complete` (through `apply(..., method="complete")`) is all of them.

    Attributes:
      joints: of the skeleton.
      embed_dim: channels.
      depth: layers.
      num_heads: of attention.
      mlp_ratio: width of the MLPs over the channels.
      passes: in which `complete` fills a gap.
      max_length: frames of `example_inputs`; any number can be given.
      dropout: rate behind each branch.
    """

    joints: int = 22
    embed_dim: int = 512
    depth: int = 6
    num_heads: int = 8
    mlp_ratio: float = 4.0
    passes: int = 3
    max_length: int = 64
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return 6 * self.joints + MOVES + CONTACTS

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        frames = (batch_size, self.max_length)
        return {
            "motion": jax.ShapeDtypeStruct((*frames, self.width), jnp.float32),
            "known": jax.ShapeDtypeStruct(frames, jnp.int32),
        }

    def __call__(
        self,
        motion: Float[Array, "batch frames numbers"],
        known: Int[Array, "batch frames"],
        train: bool = False,
    ) -> Float[Array, "batch frames numbers"]:
        """All frames after one pass; those that are known are the ones given."""
        return self.features(motion, known, train)["prediction"]

    @nn.compact
    def features(
        self,
        motion: Float[Array, "batch frames numbers"],
        known: Int[Array, "batch frames"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Args:
          motion: rows of a motion; what stands in unknown frames is not read.
          known: 0 where a frame is unknown.
          train: whether to drop out.
        """
        if motion.shape[-1] != self.width:
            raise ValueError(
                f"Frames have {motion.shape[-1]} numbers, not {self.width}, which {self.joints} "
                "joints have; create the model with the joints of the skeleton."
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        known = known != 0
        motion = motion.astype(self.dtype)
        start = nn.initializers.normal(0.02)
        token = self.param("mask_token", start, (1, 1, self.embed_dim), self.param_dtype)
        straight = line(motion, known)
        x = Dense(self.embed_dim, name="embed", **types)(straight)
        x = jnp.where(known[..., None], x, x + token.astype(self.dtype))
        x = x + from_gap(known, self.embed_dim).astype(self.dtype)
        x = constrain(x, "batch", "length", "channels")
        out = {"embed": x}
        for i in range(self.depth):
            block = Block(
                self.num_heads, self.mlp_ratio, epsilon=1e-5, dropout=self.dropout,
                name=f"layers_{i}", **types,
            )  # fmt: skip
            x = out[f"layer{i}"] = block(x, train=train)
        x = out["norm"] = LayerNorm(epsilon=1e-5, name="norm", **types)(x)
        zeros = nn.initializers.zeros
        said = straight + Dense(self.width, kernel_init=zeros, name="head", **types)(x)
        return out | {"prediction": jnp.where(known[..., None], motion, said)}

    def complete(
        self,
        motion: Float[Array, "batch frames numbers"],
        start: Int[Array, "batch"],
        stop: Int[Array, "batch"],
    ) -> Float[Array, "batch frames numbers"]:
        """The frames `[start, stop)` of each row filled in, from its ends to its middle."""
        frame = jnp.arange(motion.shape[1])
        for done in range(self.passes):
            low, high = (edge[:, None] for edge in shrunk(start, stop, done, self.passes))
            motion = self(motion, ((frame < low) | (frame >= high)).astype(jnp.int32))
        return motion


# ---------------------------------------------------------------------------- checkpoints


def _rules() -> Rules:
    """Names of our own, as PyTorch would have them: there is no published file."""
    layer = "layers.{i}"
    maps = [
        (f"{layer}.attention.out", "layers_{i}/attention/out"),
        (f"{layer}.mlp.up", "layers_{i}/mlp/up"),
        (f"{layer}.mlp.down", "layers_{i}/mlp/down"),
    ]
    return Rules(
        [
            Rule("mask_token", "mask_token"),
            *dense_rules("embed", "embed"),
            *dense_rules("head", "head"),
            *norm_rules("norm", "norm"),
            *norm_rules(f"{layer}.norm1", "layers_{i}/norm1"),
            *norm_rules(f"{layer}.norm2", "layers_{i}/norm2"),
            Rule(f"{layer}.attention.qkv.weight", "layers_{i}/attention/qkv/kernel", linear),
            Rule(f"{layer}.attention.qkv.bias", "layers_{i}/attention/qkv/bias"),
            *(rule for theirs, ours in maps for rule in dense_rules(theirs, ours)),
        ]
    )


LAYOUTS = {"zoo": _rules()}

_COMMON = dict(
    module=ProgressiveTransformer,
    task="motion_completion",
    paper="Story-to-Motion: Synthesizing Infinite and Controllable Character Animation from Long "
    "Text, arXiv 2311.07446",
    licence="none: no published weights",
)

VARIANTS: dict[str, Variant] = {
    "story_to_motion_base": Variant(fields={}, **_COMMON),
    "story_to_motion_tiny": Variant(
        fields=dict(joints=10, embed_dim=64, depth=2, num_heads=4, max_length=40), **_COMMON
    ),
    "story_to_motion_test": Variant(
        fields=dict(joints=2, embed_dim=32, depth=2, num_heads=2, max_length=8), **_COMMON
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, no_decay=("mask_token",))
