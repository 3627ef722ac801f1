"""Token pruning: behind some layers, only the tokens that attention looks at go on.

Goyal et al., "PoWER-BERT", ICML 2020, arXiv 2001.08950 (attention that a token receives); Liang et
al., "EViT: Not All Patches are What You Need", ICLR 2022, arXiv 2202.07800 (attention of the class
token). A token's significance, with the softmax weights a of the layer's attention, is

    models with prefix tokens   mean over heads of a[first token, token]
    other encoders              mean over heads and queries of a[query, token]

and the share `keep` of the most significant goes on, in their order; prefix tokens, and the first
token, always do. It is for models that read off a whole sequence: a class, not a word each.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.attention import Attention, attention_weights
from zoo.methods.method import Method, Variables, intercepted, outermost, unwrap
from zoo.tasks.apply import zeros_like_inputs

BLOCK = r"layers_(\d+)"


@dataclass(frozen=True)
class TokenPruning(Method):
    """Fewer tokens behind some of the blocks `layers_i`.

    Attributes:
      keep: (number of a block, share of the tokens in it that go on), for each that prunes.
    """

    keep: tuple[tuple[int, float], ...] = ((0, 0.7),)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose later blocks see fewer tokens."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The same variables.

        Raises:
          ValueError: if the model is none of those that it is for.
        """
        name, inputs = type(module).__name__, zeros_like_inputs(module)
        shape = jax.eval_shape(lambda v: module.apply(v, **inputs), dict(variables))
        if getattr(shape, "ndim", 0) != 2:
            raise ValueError(f"{name} reads off every token: none can be left out.")
        used: list[int] = []
        with outermost(lambda *each: self._seen(used, *each)):
            jax.eval_shape(lambda v: self.wrap(module).apply(v, **inputs), dict(variables))
        missing = sorted({number for number, _ in self.keep} - set(used))
        if missing:
            raise ValueError(
                f"{name} has no block {missing} with attention over one sequence whose weights "
                "could say which tokens matter."
            )
        return dict(variables)

    @staticmethod
    def _seen(used: list[int], call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        found = re.fullmatch(BLOCK + "/attention", "/".join(context.module.path))
        if found and isinstance(context.module, Attention):
            used.append(int(found[1]))
        return call(*args, **kwargs)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A whole model's call, whose blocks are watched."""
        if context.module.path or context.method_name != "features":
            return call(*args, **kwargs)
        return self._pruned(context.module, call, args, kwargs)

    def _pruned(self, model: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        keep, prefix = dict(self.keep), max(getattr(model, "num_prefix", 0), 1)
        maps: dict[str, Array] = {}
        visible: list[Array] = []
        heads: list[int] = []
        first = hasattr(model, "num_prefix")

        def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            module, path = context.module, "/".join(context.module.path)
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if isinstance(module, nn.Dense) and isinstance(module.parent, Attention):
                maps[module.name] = y = call(*args, **kwargs)
                heads.append(module.parent.num_heads)
                return y
            found = re.fullmatch(BLOCK, path)
            if found is None:
                return call(*args, **kwargs)
            masked = len(args) > 1 and getattr(args[1], "dtype", None) == jnp.bool_
            if masked and visible:
                args = (args[0], visible[-1], *args[2:])
            y = call(*args, **kwargs)
            share = keep.get(int(found[1]))
            if share is None:
                return y
            if not heads:
                raise ValueError(
                    f"{path} has no attention over one sequence whose weights could say which "
                    "tokens matter."
                )
            mask = args[1] if masked else None
            places = self._places(heads[-1], maps, y, mask, share, prefix, first)
            if masked:
                visible.append(jnp.take_along_axis(mask, places, axis=1))
            return jnp.take_along_axis(y, places[..., None], axis=1)

        with outermost(listen):
            return call(*args, **kwargs)

    def _places(
        self,
        heads: int,
        maps: dict[str, Array],
        x: Float[Array, "batch length channels"],
        mask: Array | None,
        share: float,
        prefix: int,
        first: bool,
    ) -> Array:
        if "qkv" in maps:
            query, key, _ = jnp.split(maps["qkv"], 3, axis=-1)
        else:
            query, key = maps["query"], maps["key"]
        query, key = (t.reshape(*t.shape[:2], heads, -1) for t in (query, key))
        weights = attention_weights(query, key, visible=mask)
        score = weights[:, :, 0].mean(1) if first else weights.mean((1, 2))
        length = x.shape[1]
        count = prefix + max(1, round(share * (length - prefix)))
        score = score.at[:, :prefix].set(jnp.inf)
        order = jnp.argsort(-score, axis=-1, stable=True)[:, :count]
        return jnp.sort(order, axis=-1)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model that leaves tokens out.

        Raises:
          ValueError: always.
        """
        unwrap(module, self)
        raise ValueError("A plain model keeps its tokens: it cannot be merged.")
