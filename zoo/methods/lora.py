"""LoRA: a trained product of two thin matrices beside matrices that stay as they are.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; official code
github.com/microsoft/LoRA (MIT).

    y = W x + b + (alpha / r) B A dropout(x)        A: Kaiming uniform, as `nn.Linear`; B: zero

so that at first nothing changes. In our layout, where a matrix is `[in, out]`, `lora_a` is
`[in, r]` and `lora_b` is `[r, out]`. Variants: rsLoRA scales by `alpha / sqrt(r)` (Kalajdzievski,
arXiv 2312.03732).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.methods.method import Method, Variables, intercepted, unwrap

LEAVES = r".*(^|/)lora_[ab]"


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of dense maps.

    Attributes:
      rank: columns of A.
      alpha: what the product is scaled by is `alpha / rank`.
      targets: dense maps (path of the submodule, regex of the whole) that are adapted.
      dropout: rate on the input of A, in training.
      rank_stabilised: scale by `alpha / sqrt(rank)`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r".*(^|/)(qkv|query|key|value|out)"
    dropout: float = 0.0
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the product beside each target."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with both matrices at each target.

        Raises:
          ValueError: if no dense map matches `targets`.
        """
        adapted = super().adapt(module, variables, rng, batches)
        if not any(path[-1] == "lora_a" for path in flatten_dict(adapted["params"])):
            raise ValueError(
                f"LoRA's targets {self.targets!r} match no dense map of {type(module).__name__}; "
                "give a regular expression of whole paths, such as r'.*attention/qkv'."
            )
        return adapted

    def trains(self, path: str) -> bool:
        """Only the two matrices are."""
        return re.fullmatch(LEAVES, path) is not None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, modules that are called have it: for an architecture that consists of it."""
        with nn.intercept_methods(self.intercept):
            yield

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A target's output plus the product's."""
        dense = context.module
        wanted = isinstance(dense, nn.Dense) and context.method_name == "__call__"
        if not wanted or not re.fullmatch(self.targets, "/".join(dense.path)):
            return call(*args, **kwargs)
        (x,) = args
        y = call(x, **kwargs)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        shapes = (x.shape[-1], self.rank), (self.rank, dense.features)
        a = dense.param("lora_a", uniform, shapes[0], dense.param_dtype)
        b = dense.param("lora_b", nn.initializers.zeros_init(), shapes[1], dense.param_dtype)
        if self.dropout and dense.has_rng("dropout"):
            keep = jax.random.bernoulli(dense.make_rng("dropout"), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=dense.dtype)
        return y + self.scale * ((x @ a) @ b)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The product is added to each matrix."""
        return unwrap(module, self), merged(variables, self.scale, self.targets)


def merged(variables: Variables, scale: float, targets: str = ".*") -> dict[str, Any]:
    """Variables in which the pair of thin matrices of each target is added to its matrix."""
    flat = flatten_dict(dict(variables))
    for path in [p for p in flat if p[-1] == "lora_a"]:
        if not re.fullmatch(targets, "/".join(path[1:-1])):
            continue
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        kernel = (*path[:-1], "kernel")
        flat[kernel] = flat[kernel] + (scale * (a @ b)).astype(flat[kernel].dtype)
    return unflatten_dict(flat)
