"""LMUFormer: a memory with one scalar input, convolutions around it, and a spiking version.

Liu et al., "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units", ICLR
2024, arXiv 2402.04882. Official code: github.com/zeyuliu1037/LMUFormer (MIT), which we follow.
With x_t the frame at time t:

    u_t = relu(w x_t + b)              one number a frame
    m_t = A m_{t-1} + B u_t            Legendre memory: d polynomials of the last theta frames of u
    h_t = relu(W [m_t; x_t] + c)
    block:  x = x + norm(out(h));  x = x + mlp(x);  every norm is a BatchNorm

A and B are fixed. In training m is a causal convolution of u with A^t B, by FFT; in streaming it is
the recurrence. `spiking` puts BatchNorm and leaky integrate-and-fire neurons (`lif`) in place of
the activations, in front of the maps; their time is that of the series, and d is twice the width.
The rate-coded network ends its MLP in a ReLU behind the norm, as the official code does.

The official code stores A^t B for 128 frames and fails for other lengths; here any length will do.
Its recurrent form of the spiking network runs the whole prefix again at each frame and leaves out
the spikes of m; ours is a step of constant memory that equals the parallel form. Convolutions look
one frame ahead, so that `stream` is late by `DELAY` = 5 frames. Memory, neurons and what else its
parts are made of is in `zoo.models.signal.lmu`; two other spiking networks of the repository, of
which no figures are published, are in `zoo.models.signal.spiking`.

    features       lmuformer_gsc
    embed          128  256
    memory1        128  256    output of the first block's memory
    block1         128  256
    prefix_logits  128  35     had the series ended here
    logits         35
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, conv, dense_rules
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init
from zoo.models.signal.lmu import (
    DELAY,
    Embed,
    Fire,
    Mlp,
    State,
    batch_norm,
    entry,
    frames_at,
    init,
    memory_size,
    pointwise_rules,
    read_out,
    remember,
    remember_step,
    stored_system,
    types_of,
)
from zoo.system import System, Variant

# --------------------------------------------------------------------------------- blocks


class Memory(nn.Module):
    """The Legendre memory and the map of it and the input; then `out` and BatchNorm."""

    theta: float
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, valid: Array | None,
        train: bool,
    ) -> tuple[Float[Array, "batch length channels"], dict[str, Array]]:  # fmt: skip
        channels, kept = x.shape[-1], {}
        dense = partial(nn.Dense, kernel_init=init, **types_of(self))

        def fire(name: str, x: Array, otherwise: Any, threshold: float = 1.0) -> Array:
            if not self.spiking:
                return otherwise(x)
            layer = Fire(threshold, name=name, **types_of(self))
            x, kept[name] = layer(x, entry(state, name), valid, train)
            return x

        x = fire("fire_x", x, lambda x: x, 0.5)
        u = fire("fire_u", dense(1, name="write")(x), nn.relu)[..., 0]
        if state is None:
            memory = remember(u, memory_size(channels, self.spiking), self.theta)
        else:
            memory, kept["memory"] = self.recur(state["memory"], u, valid)
        memory = fire("fire_m", memory.astype(self.dtype), lambda m: m)
        h = dense(channels, name="read")(jnp.concatenate([memory, x], -1))
        h = fire("fire_h", h, nn.relu)
        conv = partial(nn.Dense, kernel_init=torch_default_init, bias_init=bias_init(channels))
        x = batch_norm(self)("norm", conv(channels, name="out", **types_of(self))(h), train)
        return constrain(x, "batch", "length", "channels"), kept

    def recur(self, memory: Array, u: Array, valid: Array) -> tuple[Array, Array]:
        """The memory after each frame, and at the end."""

        def step(memory: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            after = remember_step(memory, now[0], self.theta)
            memory = jnp.where(now[1], after, memory)
            return memory, memory

        last, memories = jax.lax.scan(step, memory, (u.T, valid))
        return memories.swapaxes(0, 1), last


class Block(nn.Module):
    """Memory, then MLP, each added to its input."""

    mlp_ratio: float
    theta: float
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length channels"], state: State, valid: Array | None,
        train: bool,
    ) -> tuple[tuple[Array, Array], dict[str, dict[str, Array]]]:  # fmt: skip
        fields = {"spiking": self.spiking, **types_of(self)}
        memory = Memory(self.theta, name="memory", **fields)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), name="mlp", **fields)
        y, kept_memory = memory(x, entry(state, "memory"), valid, train)
        x = x + y
        z, kept_mlp = mlp(x, entry(state, "mlp"), valid, train)
        return (y, x + z), {"memory": kept_memory, "mlp": kept_mlp}


# ---------------------------------------------------------------------------------- model


class LMUFormer(Model):
    """LMUFormer classifier of series.

    Attributes:
      context_length: frames of a series; others may come, this is what published files store
        A^t B for.
      variates: numbers of a frame (mel bands).
      theta: frames that the memory holds.
      spiking: neurons in place of activations.
    """

    context_length: int = 128
    variates: int = 128
    num_classes: int = 35
    embed_dim: int = 256
    depth: int = 1
    mlp_ratio: float = 4.0
    theta: float = 128.0
    spiking: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(series, train)["logits"]

    def features(
        self, series: Float[Array, "batch length variates"], train: bool = False
    ) -> dict[str, Array]:
        """Every named map (see the table above)."""
        return self.run(series, None, None, train)[0]

    def init_state(self, batch: int, length: int = 0) -> dict[str, Any]:
        """What `stream` starts from: no frame seen; `length` does not matter."""
        c, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        d = memory_size(c, self.spiking)
        channels = [self.variates, c, c, c, c]
        embed = {f"past{i}": (2, width) for i, width in enumerate(channels)} | {"late": (1, c)}
        memory, mlp = {"memory": (d,)}, {}
        if self.spiking:
            embed |= {f"fire{i}": (c,) for i in range(4)}
            memory |= {"fire_x": (c,), "fire_u": (1,), "fire_m": (d,), "fire_h": (c,)}
            mlp |= {"fire1": (c,), "fire2": (hidden,)}
        shapes = {
            "embed": embed,
            "layers": [{"memory": memory, "mlp": mlp} for _ in range(self.depth)],
            "total": (c,),
        } | ({"fire": (c,)} if self.spiking else {})
        is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
        state = jax.tree.map(lambda s: jnp.zeros((batch, *s)), shapes, is_leaf=is_shape)
        return state | {"valid": jnp.zeros(DELAY, bool), "count": jnp.zeros((), jnp.int32)}

    def stream(
        self,
        state: dict[str, Any],
        frames: Float[Array, "batch length variates"],
        valid: bool | Bool[Array, "length"] = True,
    ) -> tuple[dict[str, Any], Float[Array, "batch classes"]]:
        """Goes on with a series; any number of frames at once.

        Args:
          state: of `init_state`, or what `stream` gave.
          frames: the next ones.
          valid: False for frames behind the end: `DELAY` of them get the last valid ones out.

        Returns:
          The new state; logits of all frames but the last `DELAY` given. In the beginning, when
          there are none, those of a series of zeros.
        """
        out, state = self.run(frames, state, jnp.broadcast_to(valid, frames.shape[1:2]), False)
        return state, out["logits"]

    def step(
        self,
        state: dict[str, Any],
        frame: Float[Array, "batch variates"],
        valid: bool | Array = True,
    ) -> tuple[dict[str, Any], Float[Array, "batch classes"]]:
        """`stream` with one frame."""
        return self.stream(state, frame[:, None], valid)

    @nn.compact
    def run(
        self, series: Array, state: dict[str, Any] | None, valid: Array | None, train: bool
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """The parallel form, or the streaming form from a state: features and the new state."""
        if series.ndim != 3 or series.shape[2] != self.variates:
            raise ValueError(
                f"This LMUFormer takes series of shape (batch, length, {self.variates}), not "
                f"{series.shape}; give frames of that width, or create it with another variates."
            )
        fields = {"spiking": self.spiking, **types_of(self)}
        length = series.shape[1]
        if valid is not None:
            valid = jnp.concatenate([state["valid"], valid])
        embed = Embed(self.embed_dim, name="embed", **fields)
        x, kept = embed(series, entry(state, "embed"), valid, train)
        new, out = {"embed": kept, "layers": []}, {"embed": x}
        frames = frames_at(valid, DELAY, length)
        for i in range(self.depth):
            block = Block(self.mlp_ratio, self.theta, name=f"layers_{i}", **fields)
            past = None if state is None else state["layers"][i]
            (out[f"memory{i + 1}"], x), kept = block(x, past, frames, train)
            out[f"block{i + 1}"] = x
            new["layers"].append(kept)
        if self.spiking:
            fire = Fire(name="fire", **types_of(self))
            x, new["fire"] = fire(x, entry(state, "fire"), frames, train)
        head = nn.Dense(self.num_classes, kernel_init=init, name="head", **types_of(self))
        if state is None:
            return out | read_out(head, x), new
        x = x.astype(jnp.float32)
        new["valid"] = valid[-DELAY:]
        new["count"] = state["count"] + frames.sum()
        new["total"] = state["total"] + jnp.where(frames[:, None], x, 0).sum(1)
        out["logits"] = head(new["total"] / jnp.maximum(new["count"], 1))
        return out, new


# ---------------------------------------------------------------------------- checkpoints

# (norm of the official code, ours), of the rate-coded and of the spiking network
_NORMS = (
    [(f"patch_embed.conv_layers.{i}.3", f"embed/norm{i}") for i in range(4)]
    + [
        ("block.{i}.mlp.fc1_bn", "layers_{i}/mlp/norm1"),
        ("block.{i}.mlp.fc2_bn", "layers_{i}/mlp/norm2"),
    ],
    [(f"patch_embed.proj_bn{i or ''}", f"embed/fire{i}/norm") for i in range(4)]
    + [
        ("block.{i}.attn.prev_bn", "layers_{i}/memory/fire_x/norm"),
        ("block.{i}.attn.lmu.bn_u", "layers_{i}/memory/fire_u/norm"),
        ("block.{i}.attn.lmu.bn_m", "layers_{i}/memory/fire_m/norm"),
        ("block.{i}.attn.lmu.bn_h", "layers_{i}/memory/fire_h/norm"),
        ("block.{i}.mlp.fc1_bn", "layers_{i}/mlp/fire1/norm"),
        ("block.{i}.mlp.fc2_bn", "layers_{i}/mlp/fire2/norm"),
        ("head_bn", "fire/norm"),
    ],
)
_MEMORY_NORM = ("block.{i}.attn.proj_bn", "layers_{i}/memory/norm")


def _system(name: str, model: LMUFormer, i: int) -> np.ndarray:
    order = memory_size(model.embed_dim, model.spiking)
    return stored_system(name, order, model.theta, model.context_length)


def _rules(spiking: bool, prefix: str = "") -> Rules:
    norms = [*_NORMS[spiking], _MEMORY_NORM]
    rules = [rule for theirs, ours in norms for rule in batch_norm_rules(prefix + theirs, ours)]
    for i in range(4):
        theirs = f"proj_conv{i or ''}" if spiking else f"conv_layers.{i}.0"
        source = f"{prefix}patch_embed.{theirs}.weight"
        rules.append(Rule(source, f"embed/conv{i}/kernel", conv))
    rules.append(Rule(f"{prefix}patch_embed.rpe_conv.weight", "embed/conv4/kernel", conv))
    block, layer = f"{prefix}block.{{i}}", "layers_{i}"
    rules += [
        *dense_rules(f"{block}.attn.lmu.W_u", f"{layer}/memory/write"),
        *dense_rules(f"{block}.attn.lmu.W_h", f"{layer}/memory/read"),
        *pointwise_rules(f"{block}.attn.proj_conv", f"{layer}/memory/out"),
        *pointwise_rules(f"{block}.mlp.fc1_conv", f"{layer}/mlp/up"),
        *pointwise_rules(f"{block}.mlp.fc2_conv", f"{layer}/mlp/down"),
        *dense_rules(f"{prefix}head", "head"),
    ]
    counter = lambda model, **_: np.zeros((), np.int64)  # noqa: E731
    derived = {f"{prefix}{theirs}.num_batches_tracked": counter for theirs, _ in norms}
    derived |= {f"{block}.attn.lmu.{n}": partial(_system, n) for n in ("A", "B", "H", "fft_H")}
    return Rules(rules, derived=derived, fresh=("head/kernel", "head/bias"))


LAYOUTS = {
    "official": _rules(False),
    "spiking": _rules(True),
    "data_parallel": _rules(False, "module."),
    "spiking_data_parallel": _rules(True, "module."),
}

# ------------------------------------------------------------------------------- variants


def _variant(params: int | None, accuracy: float | None, **fields: Any) -> Variant:
    return Variant(
        module=LMUFormer,
        fields=fields,
        task="series_classification",
        params=params,
        metric=f"Speech Commands v2 (35 words) {accuracy} %" if accuracy else "",
        paper="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, "
        "arXiv 2402.04882",
        code="github.com/zeyuliu1037/LMUFormer",
        licence="MIT",
    )


VARIANTS = {
    "lmuformer_gsc": _variant(1_621_796, 96.53),
    "lmuformer_spiking_gsc": _variant(1_689_894, 96.12, spiking=True),
    "lmuformer_test": _variant(
        None, None, context_length=32, variates=6, num_classes=5, embed_dim=24, theta=32.0
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
