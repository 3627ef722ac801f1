"""SlimFit: fine-tuning that freezes what moves least, and keeps little for the backward pass.

Ardakani et al., "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training
Dynamics", arXiv 2305.18513; official code github.com/arashardakani/SlimFit (MIT).

Scheduling: each matrix (and each norm's scale) has a distance d, at first random and huge, so that
every layer is visited. Each step freezes the share F with the smallest d (`frozen_layers`); after
it the others get d = mean |(W before - W after) / W before| (`distance`).

Storage: forward passes are exact, and backward ones read what was kept of the inputs:

    gelu             4 bits: multiples of 1/2 from -4 to 3.5, two to a byte
    matmul           8 bits of both: multiples of 1/16 from -8 to 7.9375
    softmax_matmul   probabilities as 8 bits without sign (multiples of 1/256), values as above
    layer_norm       trained: the input; frozen: a tenth of the normalised input, the largest
    dense            trained: the input; frozen: nothing

A compiled step has one set of frozen layers, as what is kept depends on it: `frozen` is a static
argument.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8

from zoo.layers import mlp
from zoo.methods.attention import Heads, is_attention, rewritten
from zoo.methods.linear import is_target, kernel_of, refuse_added
from zoo.methods.method import Method, Variables, intercepted, outermost

MATRIX_STEP = 16
GELU_STEP = 2
PROBABILITY_STEP = 256
KEPT = 0.1
"""Share of the normalised input that a frozen norm keeps."""


def codes(x: Float[Array, "..."], step: int, low: int, high: int) -> Float[Array, "..."]:
    """The nearest multiples of `1 / step`, as whole numbers from `low` to `high`."""
    return jnp.clip(jnp.round(x * step), low, high)


def pack(x: Float[Array, "..."]) -> UInt8[Array, "half"]:
    """Numbers from -8 to 7, two to a byte: those of the first half are the high bits."""
    flat = (x.reshape(-1) + 8).astype(jnp.uint8)
    flat = jnp.pad(flat, (0, flat.size % 2))
    high, low = jnp.split(flat, 2)
    return high * 16 + low


def unpack(packed: UInt8[Array, "half"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The inverse of `pack`."""
    flat = jnp.concatenate([packed // 16, packed % 16])[: int(np.prod(shape))]
    return flat.reshape(shape).astype(jnp.float32) - 8


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU; 4 bits of each input are kept."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, tuple]:
    return gelu(x), (pack(codes(x, GELU_STEP, -8, 7)),)


def _gelu_backward(kept: tuple, g: Array) -> tuple[Array]:
    x = unpack(kept[0], g.shape) / GELU_STEP
    density = jnp.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
    return ((jax.scipy.stats.norm.cdf(x) + x * density).astype(g.dtype) * g,)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _eight_bits(x: Array) -> Array:
    return codes(x, MATRIX_STEP, -128, 127).astype(jnp.int8)


def _from_bits(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) / MATRIX_STEP


@jax.custom_vjp
def matmul(x: Float[Array, "... n k"], y: Float[Array, "... k m"]) -> Float[Array, "... n m"]:
    """The product; 8 bits of each operand's numbers are kept."""
    return x @ y


def _matmul_forward(x: Array, y: Array) -> tuple[Array, tuple]:
    return x @ y, (_eight_bits(x), _eight_bits(y))


def _matmul_backward(kept: tuple, g: Array) -> tuple[Array, Array]:
    x, y = (_from_bits(each, g.dtype) for each in kept)
    return g @ y.swapaxes(-1, -2), x.swapaxes(-1, -2) @ g


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def softmax_matmul(
    scores: Float[Array, "... n k"], value: Float[Array, "... k d"]
) -> Float[Array, "... n d"]:
    """`softmax(scores) value`; 8 bits of the probabilities and of the values are kept."""
    return jax.nn.softmax(scores, -1) @ value


def _softmax_forward(scores: Array, value: Array) -> tuple[Array, tuple]:
    weights = jax.nn.softmax(scores, -1)
    kept = codes(weights, PROBABILITY_STEP, 0, 255).astype(jnp.uint8)
    return weights @ value, (kept, _eight_bits(value))


def _softmax_backward(kept: tuple, g: Array) -> tuple[Array, Array]:
    weights = kept[0].astype(g.dtype) / PROBABILITY_STEP
    value = _from_bits(kept[1], g.dtype)
    of_weights = g @ value.swapaxes(-1, -2)
    inner = (of_weights * weights).sum(-1, keepdims=True)
    return weights * (of_weights - inner), weights.swapaxes(-1, -2) @ g


softmax_matmul.defvjp(_softmax_forward, _softmax_backward)


def _standardise(x: Array, epsilon: float) -> tuple[Array, Array]:
    mean = x.mean(-1, keepdims=True)
    std = jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
    return (x - mean) / std, std


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "... channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    epsilon: float = 1e-12,
    frozen: bool = False,
) -> Float[Array, "... channels"]:
    """LayerNorm; with `frozen`, the scale has no gradient and little is kept."""
    return _standardise(x, epsilon)[0] * scale + bias


def _norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, frozen: bool
) -> tuple[Array, tuple]:
    y, std = _standardise(x, epsilon)
    out = y * scale + bias
    if not frozen:
        return out, (x, scale)
    flat = y.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), int(flat.size * KEPT))
    return out, (flat[places], places, std, scale)


def _norm_backward(epsilon: float, frozen: bool, kept: tuple, g: Array) -> tuple:
    axes = tuple(range(g.ndim - 1))
    if frozen:
        values, places, std, scale = kept
        y = jnp.zeros(g.size, g.dtype).at[places].set(values).reshape(g.shape)
    else:
        x, scale = kept
        # The official code computes the root with 1e-12 here, whatever the norm's epsilon is.
        y, std = _standardise(x, 1e-12)
    h = g * scale / std
    mean = h.mean(-1, keepdims=True)
    of_x = h - mean - (h * y).mean(-1, keepdims=True) * y
    of_scale = jnp.zeros_like(scale) if frozen else (g * y).sum(axes)
    return of_x, of_scale, g.sum(axes)


layer_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(
    x: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"],
    frozen: bool = False,
    eight_bits: bool = False,
) -> Float[Array, "... outputs"]:
    """`x kernel`; frozen, the kernel has no gradient and no input is kept.

    Args:
      x: the input.
      kernel: of the map.
      frozen: whether the kernel stays as it is.
      eight_bits: keep 8 bits of each number of the input (the MLP's second map).
    """
    return x @ kernel


def _dense_forward(x: Array, kernel: Array, frozen: bool, eight_bits: bool) -> tuple[Array, tuple]:
    kept = None if frozen else _eight_bits(x) if eight_bits else x
    return x @ kernel, (kept, kernel)


def _dense_backward(frozen: bool, eight_bits: bool, kept: tuple, g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    if frozen:
        return g @ kernel.T, jnp.zeros_like(kernel)
    x = _from_bits(x, g.dtype) if eight_bits else x
    rows = x.reshape(-1, x.shape[-1])
    return g @ kernel.T, rows.T @ g.reshape(-1, g.shape[-1])


dense.defvjp(_dense_forward, _dense_backward)


# -------------------------------------------------------------------------- scheduling


def distance(before: Float[Array, "..."], after: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean change of a layer's numbers, relative to what they were."""
    return jnp.abs((before - after) / before).mean()


def frozen_layers(distances: Float[Array, "layers"], rate: float) -> Int[Array, "layers"]:
    """Layers by distance, the smallest first: the first `int(rate * layers)` are frozen.

    Raises:
      ValueError: if `rate` is not a share.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} is the share of layers to freeze; give 0 to 1.")
    return jnp.argsort(distances, stable=True)


def layers_of(variables: Variables, head: str = r"(.*/)?head/.*") -> tuple[str, ...]:
    """Paths of what the schedule freezes: leaves of several axes, and scales of norms.

    Vectors are always trained, and so is the head.
    """
    flat = flatten_dict(dict(variables["params"]), sep="/")
    return tuple(
        path
        for path, leaf in sorted(flat.items())
        if (leaf.ndim > 1 or re.fullmatch(r"(.*/)?\w*norm\w*/scale", path))
        and not re.fullmatch(head, path)
    )


def frozen_paths(distances: Mapping[str, Float[Array, ""]], rate: float) -> tuple[str, ...]:
    """The layers of the next step's `SlimFit(frozen=...)`."""
    paths = sorted(distances)
    order = frozen_layers(jnp.stack([jnp.asarray(distances[path]) for path in paths]), rate)
    return tuple(sorted(paths[i] for i in np.asarray(order)[: int(rate * len(paths))]))


# -------------------------------------------------------------------------------- method


@dataclass(frozen=True)
class SlimFit(Method):
    """Frozen layers, and little kept of the others: what the file describes, on a whole model.

    One value is one set of frozen layers, as a compiled step has one; `frozen_paths` gives the
    next. Forward passes stay exact.

    Attributes:
      frozen: paths of leaves that are not trained, see `layers_of`.
      compress: keep fewer bits of GELUs, attention, second maps of MLPs, and of frozen norms.
    """

    frozen: tuple[str, ...] = ()
    compress: bool = True

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that keeps little for the backward pass."""
        refuse_added(module, self)
        return intercepted(module, self)

    def trains(self, path: str) -> bool | None:
        """Frozen layers are not; of the rest another method decides."""
        return False if path in self.frozen else None

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The same output, of which less is kept."""
        module = context.module
        if context.method_name != "__call__" or not self.compress:
            return call(*args, **kwargs)
        if is_attention(module):
            return rewritten(call, args, kwargs, module, _slim_attention)
        if isinstance(module, mlp.Mlp) and module.activation is mlp.gelu and not module.dropout:
            return _slim_mlp(call, args, kwargs, module)
        if is_target(context, ".*"):
            return self._dense(module, call, args, kwargs)
        if isinstance(module, nn.LayerNorm) and module.has_variable("params", "bias"):
            return self._norm(module, call, args, kwargs)
        return call(*args, **kwargs)

    def _dense(self, layer: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Array:
        kernel, path = kernel_of(layer), "/".join((*layer.path, "kernel"))
        if kernel is None or args[0].ndim < 2:
            return call(*args, **kwargs)
        bias = layer.get_variable("params", "bias") if layer.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(args[0], kernel, bias, dtype=layer.dtype)
        y = dense(x, kernel, path in self.frozen, layer.name == "down")
        return y if bias is None else y + bias

    def _norm(self, norm: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Array:
        path = "/".join((*norm.path, "scale"))
        if path not in self.frozen:
            return call(*args, **kwargs)
        scale, bias = (norm.get_variable("params", name) for name in ("scale", "bias"))
        return layer_norm(args[0], scale, bias, norm.epsilon, True).astype(args[0].dtype)


def _slim_attention(heads: Heads) -> Float[Array, "batch length heads head_dim"]:
    query, key, value = (x.swapaxes(1, 2) for x in (heads.query, heads.key, heads.value))
    scores = matmul(query * heads.scale, key.swapaxes(-1, -2))
    scores = scores if heads.visible is None else jnp.where(heads.visible, scores, -1e30)
    return softmax_matmul(scores, value).swapaxes(1, 2)


def _slim_mlp(call: Callable, args: tuple, kwargs: dict, module: nn.Module) -> Any:
    """The MLP with a GELU of which 4 bits are kept; the module's own is dead code."""
    given: dict[str, Array] = {}

    def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        child = context.module
        if child.parent is module and child.name == "down":
            args = (gelu(given["up"]).astype(args[0].dtype), *args[1:])
        y = call(*args, **kwargs)
        if child.parent is module and child.name == "up":
            given["up"] = y
        return y

    with outermost(listen):
        return call(*args, **kwargs)
