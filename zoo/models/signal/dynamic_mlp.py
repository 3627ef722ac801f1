"""The dynamic range activator, and multilayer perceptrons with it.

Hashemi, Corominas and Giacchetto, "Can Transformers Do Enumerative Geometry?", ICLR 2025, arXiv
2408.14915. Official code: github.com/Baran-phys/DynamicFormer (MIT), which we follow, and its
package torch-dra; no weights are published. A network that is to continue a recursion, such as
r(n) = n + (n AND r(n - 1)), meets values of any size; this activation is the identity for large
numbers, with waves and a step on top. Its four scalars a, b, c, d are learnt, one set a layer.

    dra(x)          = x + a/b sin^2(a x) + c cos(b x) + d tanh(b x)     the code that trained
    package_dra(x)  = x + b/a sin^2(a x) + c cos(a x) + d tanh(b x)     the package
    DraMlp          x = dra(W x + b), for each hidden layer; then W x + b
    DynamicMlp      h = W x + b, changed by a second input z:  h + V z;  h * V z;
                    h * sigmoid(V z) + U z
                    y = W' norm(dra(h) + x) + b' + h           x and h only where the widths agree

The paper writes sin^2(x / b) without a factor a. The code starts b anywhere; here a and b start at
least 0.1 from 0, where the quotient has no value. `MLP_dra` of the code declares `nb_layers - 2`
further maps that it never applies: loading drops them.

    features    dra_mlp_recursion
    layer0      64
    layer1      32
    logits      1
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, batch_norm_rules, dense_rules
from zoo.layers.dense import Dense
from zoo.layers.model import Model
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init
from zoo.system import System, Variant


def dra(x: Float[Array, "*shape"], a: Array, b: Array, c: Array, d: Array) -> Array:
    """Dynamic range activator: identity, two waves and a step."""
    return x + a / b * jnp.sin(a * x) ** 2 + c * jnp.cos(b * x) + d * jnp.tanh(b * x)


def package_dra(x: Float[Array, "*shape"], a: Array, b: Array, c: Array, d: Array) -> Array:
    """The same in the authors' package torch-dra."""
    return x + b / a * jnp.sin(a * x) ** 2 + c * jnp.cos(a * x) + d * jnp.tanh(b * x)


def away_from_zero(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Normal numbers whose absolute values are at least 0.1."""
    x = jax.random.normal(key, shape, dtype)
    return jnp.where(x < 0, -1, 1) * jnp.maximum(jnp.abs(x), 0.1)


class DynamicRange(nn.Module):
    """`activation` with its four scalars; computed in float32, for waves of large numbers."""

    activation: Callable = dra
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        normal = nn.initializers.normal(1.0)
        starts = {"a": away_from_zero, "b": away_from_zero, "c": normal, "d": normal}
        scalars = [self.param(name, f, (1,), self.param_dtype) for name, f in starts.items()]
        scalars = [s.astype(jnp.float32) for s in scalars]
        return self.activation(x.astype(jnp.float32), *scalars).astype(self.dtype)


def linear(use_bias: bool, channels: int, name: str, x: Array, **types: Any) -> Array:
    """A dense layer that starts as PyTorch's Linear does."""
    start = {"kernel_init": torch_default_init, "bias_init": bias_init(x.shape[-1])}
    return Dense(channels, use_bias=use_bias, name=name, **start, **types)(x)


def batch_norm(name: str, train: bool, **fields: Any) -> nn.BatchNorm:
    """A BatchNorm as PyTorch has it."""
    fields = {"momentum": 0.9, "epsilon": 1e-5, **fields}
    return nn.BatchNorm(use_running_average=not train, name=name, **fields)


MODULATIONS = ("+", "*", "film")


class DynamicMlp(nn.Module):
    """A map, the activation, and a map back; a second input may change what is activated.

    Attributes:
      hidden: width of the middle.
      channels: width of the output.
      modulation: how the second input changes the middle, one of `MODULATIONS`.
      batch_norm: whether a BatchNorm is behind the activation.
    """

    hidden: int
    channels: int
    activation: Callable = dra
    use_bias: bool = True
    batch_norm: bool = False
    dropout: float = 0.0
    modulation: str = "+"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rows inputs"], z: Array | None = None, train: bool = False
    ) -> Float[Array, "batch *rows channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        names = ("batch", *["length"] * (x.ndim - 2), "mlp")
        dense = partial(linear, self.use_bias, **types)
        h = dense(self.hidden, "up", x)
        if z is not None:
            h = self._modulate(h, z)
        y = constrain(DynamicRange(self.activation, name="activation", **types)(h), *names)
        y = y + x.astype(y.dtype) if x.shape[-1] == self.hidden else y
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        if self.batch_norm:
            y = batch_norm("norm", train, **types)(y)
        y = dense(self.channels, "down", y)
        return y + h if self.channels == self.hidden else y

    def _modulate(self, h: Array, z: Array) -> Array:
        if self.modulation not in MODULATIONS:
            raise ValueError(
                f"modulation={self.modulation!r}; choose one of {', '.join(MODULATIONS)}."
            )
        dense = partial(linear, True, dtype=self.dtype, param_dtype=self.param_dtype)
        by = dense(self.hidden, "modulation", z)
        if self.modulation == "+":
            return h + by
        if self.modulation == "*":
            return h * by
        return h * nn.sigmoid(by) + dense(self.hidden, "shift", z)


class DynamicNetwork(Model):
    """A `DynamicMlp` as a model of vectors; fields as there.

    Attributes:
      inputs: width of the input.
      conditions: width of the second input; 0: there is none.
    """

    inputs: int = 2
    channels: int = 64
    hidden: int = 128
    conditions: int = 0
    modulation: str = "+"
    use_bias: bool = True
    batch_norm: bool = False
    activation: Callable = dra
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        sizes = {"x": self.inputs} | ({"z": self.conditions} if self.conditions else {})
        return {k: jax.ShapeDtypeStruct((batch_size, n), jnp.float32) for k, n in sizes.items()}

    def __call__(
        self,
        x: Float[Array, "batch inputs"],
        z: Float[Array, "batch conditions"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch channels"]:
        """What the network gives."""
        return self.features(x, z, train)["logits"]

    @nn.compact
    def features(
        self,
        x: Float[Array, "batch inputs"],
        z: Float[Array, "batch conditions"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """`logits` alone."""
        check_vectors(self, x, self.inputs)
        if (None if z is None else z.shape[-1]) != (self.conditions or None):
            raise ValueError(
                f"This DynamicNetwork takes conditions={self.conditions} numbers of z, not "
                f"{None if z is None else z.shape}; give those, or create it with others."
            )
        mlp = DynamicMlp(
            self.hidden, self.channels, self.activation, self.use_bias, self.batch_norm,
            self.dropout, self.modulation, self.dtype, self.param_dtype, name="mlp",
        )  # fmt: skip
        return {"logits": mlp(x.astype(self.dtype), z, train)}


class DraMlp(Model):
    """A multilayer perceptron with the activation behind each hidden layer.

    Attributes:
      inputs: width of the input.
      widths: of the hidden layers.
      outputs: width of the output.
    """

    inputs: int = 1
    widths: tuple[int, ...] = (64, 32)
    outputs: int = 1
    use_bias: bool = True
    activation: Callable = package_dra
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"x": jax.ShapeDtypeStruct((batch_size, self.inputs), jnp.float32)}

    def __call__(
        self, x: Float[Array, "batch inputs"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """What the network gives."""
        return self.features(x, train)["logits"]

    @nn.compact
    def features(self, x: Float[Array, "batch inputs"], train: bool = False) -> dict[str, Array]:
        """What each hidden layer gives, and `logits`; nothing depends on `train`."""
        check_vectors(self, x, self.inputs)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out = {}
        for i, width in enumerate(self.widths):
            x = linear(self.use_bias, width, f"layers_{i}", x, **types)
            x = out[f"layer{i}"] = DynamicRange(self.activation, name=f"activation_{i}", **types)(x)
        return out | {"logits": linear(self.use_bias, self.outputs, "head", x, **types)}


def check_vectors(model: nn.Module, x: Array, width: int) -> None:
    """Refuse what are no vectors of this width.

    Raises:
      ValueError: naming the shape and what to change.
    """
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(
            f"This {type(model).__name__} takes x of shape (batch, {width}), not {x.shape}; give "
            "such vectors, or create it with other inputs."
        )


# ---------------------------------------------------------------------------- checkpoints


def activation_rules(theirs: str, ours: str) -> list[Rule]:
    """Those of the four scalars."""
    return [Rule(f"{theirs}.{name}", f"{ours}/{name}") for name in "abcd"]


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Those of a `DynamicMlp`; the first prefix is empty or ends in a dot."""
    return [
        *dense_rules(f"{theirs}lin1", f"{ours}/up"),
        *dense_rules(f"{theirs}lin2", f"{ours}/modulation"),
        *dense_rules(f"{theirs}lin3", f"{ours}/shift"),
        *dense_rules(f"{theirs}lin_final", f"{ours}/down"),
        *activation_rules(f"{theirs}dra_1", f"{ours}/activation"),
        *batch_norm_rules(f"{theirs}last_norm", f"{ours}/norm"),
    ]


_DEPTH = 8  # hidden layers of a DraMlp that names are written out for


def _sequential(prefix: str) -> dict[str, Rules]:
    """A layout for each depth: only the last map of a chain is our head."""
    layouts = {}
    for depth in range(1, _DEPTH + 1):
        rules = dense_rules(f"{prefix}{2 * depth}", "head")
        for i in range(depth):
            rules += dense_rules(f"{prefix}{2 * i}", f"layers_{i}")
            rules += activation_rules(f"{prefix}{2 * i + 1}", f"activation_{i}")
        layouts[f"{prefix or 'sequential.'}{depth}"] = Rules(rules)
    return layouts


def _counter(model: nn.Module) -> Any:
    """BatchNorm's counter, which nothing uses."""
    return np.zeros((), np.int64) if model.batch_norm else None


LAYOUTS = {
    "official": Rules(
        mlp_rules("", "mlp"),
        unused=("hidden.*",),
        derived={"last_norm.num_batches_tracked": _counter},
    ),
    **_sequential("layers."),
    **_sequential(""),
}
"""`zoo.export` of a `DraMlp` of two hidden layers wants `layout="layers.2"`."""

_COMMON = dict(
    task="regression",
    paper="Can Transformers Do Enumerative Geometry?, arXiv 2408.14915",
    code="github.com/Baran-phys/DynamicFormer",
    licence="MIT",
)

VARIANTS = {
    "dra_mlp_recursion": Variant(module=DraMlp, fields={}, params=2_249, **_COMMON),
    "dra_mlp_test": Variant(
        module=DynamicNetwork, fields=dict(inputs=6, channels=4, hidden=8, conditions=3), **_COMMON
    ),
}

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
