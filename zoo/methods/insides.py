"""What a student can be taught by: hidden states, attention scores and values of any transformer.

TinyBERT (Jiao et al., arXiv 1909.10351) compares hidden states, behind a learned map where widths
differ, and attention scores; MiniLM (Wang et al., arXiv 2002.10957) relations of the last layer's
values. `zoo.tasks.LayerDistillation` is the task. `features` has more entries with this method:

    hidden    what each block `layers_i` gives, times a learned matrix if there is one
    scores    query . key / sqrt(d), before masks                    [batch, heads, queries, keys]
    values    values of all heads                                    [batch, heads, keys, d]
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from zoo.methods.depth import BLOCK, blocks_of
from zoo.methods.method import Method, Variables, intercepted, outermost, unwrap

LEAF = "teacher_map"


@dataclass(frozen=True)
class Insides(Method):
    """`hidden`, `scores` and `values` among the features.

    Attributes:
      width: channels of the teacher, to which a learned matrix maps hidden states; None: no matrix.
    """

    width: int | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that tells more."""
        return intercepted(module, self)

    def trains(self, path: str) -> bool | None:
        """The matrix is; of the rest another method decides."""
        return True if path == LEAF else None

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with the matrix.

        Raises:
          ValueError: if there are no blocks.
        """
        if not blocks_of(module, variables, BLOCK):
            raise ValueError(
                f"{type(module).__name__} has no blocks layers_0, layers_1 and so on that could be "
                "compared; stacked layers need scan_layers=False."
            )
        return super().adapt(module, variables, rng, batches)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The features, with what was seen on the way."""
        if context.module.path or context.method_name != "features":
            return call(*args, **kwargs)
        model, hidden = context.module, []
        maps: dict[str, dict[str, Array]] = {}
        heads: dict[str, int] = {}

        def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            y = call(*args, **kwargs)
            child, path = context.module, "/".join(context.module.path)
            if context.method_name != "__call__":
                return y
            if re.fullmatch(BLOCK, path):
                hidden.append(y[0] if isinstance(y, tuple) else y)
            count = getattr(child.parent, "num_heads", None)
            if isinstance(child, nn.Dense) and isinstance(count, int):
                place = path.rpartition("/")[0]
                maps.setdefault(place, {})[child.name] = y
                heads[place] = count
            return y

        with outermost(listen):
            out = call(*args, **kwargs)
        if self.width is not None:
            shape, start = (hidden[0].shape[-1], self.width), nn.initializers.lecun_normal()
            matrix = model.scope.param(LEAF, start, shape, jnp.float32)
            hidden = [x @ matrix.astype(x.dtype) for x in hidden]
        each = [_split(made, heads[place]) for place, made in maps.items()]
        each = [parts for parts in each if parts is not None]
        return {
            **out,
            "hidden": tuple(hidden),
            "scores": tuple(_scores(query, key) for query, key, _ in each),
            "values": tuple(value for *_, value in each),
        }

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The plain model, without the matrix."""
        params = {name: x for name, x in variables["params"].items() if name != LEAF}
        return unwrap(module, self), {**variables, "params": params}


def _split(maps: dict[str, Array], heads: int) -> list[Array] | None:
    """Query, key and value as `[batch, heads, length, d]`, if they are of one sequence."""
    if "qkv" in maps and maps["qkv"].ndim == 3 and maps["qkv"].shape[-1] % (3 * heads) == 0:
        parts = jnp.split(maps["qkv"], 3, axis=-1)
    elif {"query", "key", "value"} <= set(maps):
        parts = [maps[name] for name in ("query", "key", "value")]
    else:
        return None
    if any(x.ndim != 3 or x.shape[-1] % heads for x in parts):
        return None
    return [x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in parts]


def _scores(query: Array, key: Array) -> Array:
    return query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
