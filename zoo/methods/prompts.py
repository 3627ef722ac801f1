"""Prompts: learned tokens between the class token and the patches of a vision transformer.

Jia et al., "Visual Prompt Tuning", arXiv 2203.12119 (code github.com/KMnP/vpt, CC BY-NC 4.0, read
for the mechanism alone); pre-training them on a source task before the target: Song et al., "PVP:
Pre-trained Visual Parameter-Efficient Tuning", arXiv 2304.13639 (no code found). With n prompts,

    x = [prefix tokens + E, P, patches + E]          prompts have no position
    deep: before block i >= 1 the n tokens behind the prefix are replaced by P_i

P is uniform in +-sqrt(6 / (3 p^2 + D)) at first, p being the patch size. The backbone is frozen;
the head is trained beside the prompts. For PVP, train once on the source with `Prompts`, then start
the target's training from `prompts_of(variables)` with a new head.

Leaves: `prompt [n, D]` and, deep, `deep_prompts [L - 1, n, D]`; in files `prompt_embeddings
[1, n, D]` and `deep_prompt_embeddings [L - 1, n, D]`. Prompts of another width go through one
linear map, `prompt_proj` in files, before they are put in.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from zoo.checkpoints.ruleset import Rule, Rules
from zoo.checkpoints.transforms import linear, squeeze
from zoo.methods.method import Intercepted, Method, Variables, intercepted, unwrap

MAP = ("prompt_map_kernel", "prompt_map_bias")
LEAVES = ("prompt", "deep_prompts", *MAP)


@dataclass(frozen=True)
class Prompts(Method):
    """Prompts for models whose blocks are `layers_0 ...` and take and give `[batch, length, D]`.

    The model's head reads a prefix token, or a pooling that skips them: prompts stand behind the
    prefix from the first block on and are taken out behind the last one.

    Attributes:
      count: n.
      deep: a set of prompts for every block, instead of one at the first.
      head: leaves that are trained beside the prompts (regex of the whole path).
      width: of the prompts, which a learned linear map takes to D; None: D itself.
    """

    count: int = 5
    deep: bool = True
    head: str = r"head/.*"
    width: int | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with prompts in front of its blocks.

        Raises:
          ValueError: if it is no such model.
        """
        inner = module.inner if isinstance(module, Intercepted) else module
        if not hasattr(inner, "num_prefix") or not hasattr(inner, "depth"):
            raise ValueError(
                f"Prompts stand between the prefix tokens and the patches of one sequence; "
                f"{type(inner).__name__} has no such sequence (no `num_prefix` and `depth`)."
            )
        if getattr(inner, "scan_layers", False):
            raise ValueError("Prompts need blocks of their own: use scan_layers=False.")
        return intercepted(module, self)

    def trains(self, path: str) -> bool:
        """The prompts and the head are."""
        return path in LEAVES or re.fullmatch(self.head, path) is not None

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A block's output: with prompts before its first, without them behind its last."""
        block = context.module
        found = re.fullmatch(r"(?:.*/)?layers_(\d+)", "/".join(block.path))
        if found is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        i, model = int(found[1]), block.parent
        prefix, end = model.num_prefix, model.num_prefix + self.count
        x, *rest = args
        shape = (self.count, self.width or x.shape[-1])

        def mapped(prompt: Array) -> Array:
            if self.width is None:
                return prompt
            kernel, bias = (model.get_variable("params", name) for name in MAP)
            return prompt @ kernel + bias

        if i == 0:
            prompt = model.param("prompt", self._start(model), shape, model.param_dtype)
            if self.deep and model.depth > 1:
                shape = (model.depth - 1, *shape)
                model.param("deep_prompts", self._start(model), shape, model.param_dtype)
            if self.width is not None:
                start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
                model.param(MAP[0], start, (self.width, x.shape[-1]), model.param_dtype)
                model.param(MAP[1], nn.initializers.zeros_init(), x.shape[-1:], model.param_dtype)
            x = _inserted(x, mapped(prompt), prefix, prefix)
        elif self.deep:
            prompt = model.get_variable("params", "deep_prompts")[i - 1]
            x = _inserted(x, mapped(prompt), prefix, end)
        x = call(x, *rest, **kwargs)
        return jnp.delete(x, slice(prefix, end), axis=1) if i == model.depth - 1 else x

    @staticmethod
    def _start(model: nn.Module) -> Callable:
        fan = 3 * getattr(model, "patch_size", 16) ** 2

        def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            bound = (6 / (fan + shape[-1])) ** 0.5
            return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

        return init

    def layouts(self, layouts: Mapping[str, Rules]) -> dict[str, Rules]:
        """VPT's names (without the prefix `enc.transformer.`) beside those of the model."""
        added = [
            Rule("prompt_embeddings", "prompt", squeeze(0)),
            Rule("deep_prompt_embeddings", "deep_prompts"),
        ]
        if self.width is not None:
            added += [Rule("prompt_proj.weight", MAP[0], linear), Rule("prompt_proj.bias", MAP[1])]
        return {
            name: Rules(
                [*rules.rules, *added], rules.derived, rules.unused, rules.fresh, rules.resize
            )
            for name, rules in layouts.items()
        }

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model with prompts.

        Raises:
          ValueError: always.
        """
        unwrap(module, self)
        raise ValueError(
            "Prompts lengthen the sequence: no plain model gives the same outputs. Keep the "
            "wrapped model, or write the prompts by themselves (`prompts_of`)."
        )


def prompts_of(variables: Variables) -> dict[str, Any]:
    """The prompts alone: what PVP carries from the source task to the target's."""
    flat = flatten_dict(dict(variables["params"]))
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] in LEAVES})


def with_prompts(variables: Variables, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with other prompts of the same shapes.

    Raises:
      ValueError: if they do not fit.
    """
    flat, given = flatten_dict(dict(variables["params"])), flatten_dict(dict(prompts))
    ours = {path: leaf.shape for path, leaf in flat.items() if path[-1] in LEAVES}
    theirs = {path: leaf.shape for path, leaf in given.items()}
    if ours != theirs:
        raise ValueError(
            f"The prompts have {sorted(set(theirs.values()))} at {len(theirs)} places, and the "
            f"model {sorted(set(ours.values()))} at {len(ours)}; give the same count and depth."
        )
    return {**variables, "params": unflatten_dict({**flat, **given})}


def _inserted(x: Array, prompt: Array, start: int, end: int) -> Array:
    """The sequence with a prompt in place of the tokens from `start` to `end`."""
    prompt = jnp.broadcast_to(prompt.astype(x.dtype), (x.shape[0], *prompt.shape))
    return jnp.concatenate([x[:, :start], prompt, x[:, end:]], axis=1)
