"""Less depth: layers that are left out, and classifiers that let easy examples leave early.

Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout" (LayerDrop), ICLR
2020, arXiv 1909.11556; Xin et al., "DeeBERT", ACL 2020, arXiv 2004.12993 (entropy); Zhou et al.,
"BERT Loses Patience" (PABEE), NeurIPS 2020, arXiv 2006.04152.

    LayerDrop    in training a block is left out with probability p, for the whole batch;
                 for inference the blocks `drop` are
    EarlyExit    a classifier behind each block. An example's answer is that of the first one whose
                 entropy is below S, or that agrees with `patience` before it; else the last one's

A batch runs through all layers, and examples choose their answer: what an exit saves is told as
`features["exit_layer"]`, not as time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from zoo.methods.compress import entropy_exit, patience_exit
from zoo.methods.method import Method, Variables, intercepted, outermost, unwrap
from zoo.tasks.apply import zeros_like_inputs

BLOCK = r"layers_(\d+)"
"""Path of a block of a model without stages."""


def blocks_of(module: nn.Module, variables: Variables, targets: str) -> dict[str, bool]:
    """Path of each module that matches -> whether it gives what has the shape of its input."""
    found: dict[str, bool] = {}

    class Listen:
        def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            y = call(*args, **kwargs)
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and re.fullmatch(targets, path):
                found[path] = getattr(_first(y), "shape", None) == getattr(args[0], "shape", 0)
            return y

    listening = intercepted(module, Listen())
    jax.eval_shape(lambda v: listening.apply(v, **zeros_like_inputs(module)), dict(variables))
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


# ------------------------------------------------------------------------------ layer drop


@dataclass(frozen=True)
class LayerDrop(Method):
    """Blocks that are left out: at random in training, or for good.

    Attributes:
      rate: probability that a block is left out in a step of training.
      drop: numbers of blocks, counted over all, that are always left out.
      targets: blocks (path, regex of the whole) with outputs of the shape of their inputs.
    """

    rate: float = 0.1
    drop: tuple[int, ...] = ()
    targets: str = r"(.*/)?(layers|blocks)_\d+"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that leaves blocks out."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The same variables.

        Raises:
          ValueError: if there is no block that can be left out, or none of a number in `drop`.
        """
        blocks = blocks_of(module, variables, self.targets)
        count = sum(blocks.values())
        if not count:
            raise ValueError(
                f"{type(module).__name__} has no block among {self.targets!r} whose output has the "
                "shape of its input; stacked layers need scan_layers=False."
            )
        if any(not 0 <= number < count for number in self.drop):
            raise ValueError(f"drop={self.drop}: the blocks are 0 to {count - 1}.")
        return dict(variables)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A block's output, or its input; a whole model's call counts its blocks."""
        if context.module.path or context.method_name != "features":
            return call(*args, **kwargs)
        return self._counted(call, args, kwargs)

    def _counted(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        seen: dict[str, int] = {}

        def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            module, path = context.module, "/".join(context.module.path)
            y = call(*args, **kwargs)
            wanted = context.method_name == "__call__" and re.fullmatch(self.targets, path)
            x = args[0] if args else None
            if not wanted or getattr(_first(y), "shape", None) != getattr(x, "shape", 0):
                return y
            number = seen.setdefault(path, len(seen))
            if number in self.drop:
                kept = x
            elif self.rate and module.has_rng("dropout"):
                keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - self.rate)
                kept = jnp.where(keep, _first(y), x)
            else:
                return y
            return (kept, *y[1:]) if isinstance(y, tuple) else kept

        with outermost(listen):
            return call(*args, **kwargs)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """A plain model; with `drop`, one of less depth.

        Raises:
          ValueError: if the model has no `depth` that could be less.
        """
        plain = unwrap(module, self)
        if not self.drop:
            return plain, dict(variables)
        flat = flatten_dict(dict(variables))
        numbers = sorted({int(m[1]) for p in flat if (m := re.fullmatch(BLOCK, p[1]))})
        if getattr(plain, "depth", None) != len(numbers) or self.targets != LayerDrop.targets:
            raise ValueError(
                f"{type(plain).__name__} has no depth of {len(numbers)} equal blocks to make less; "
                "keep the wrapped model."
            )
        left = [number for number in numbers if number not in self.drop]
        new = {f"layers_{number}": f"layers_{i}" for i, number in enumerate(left)}
        flat = {
            (kind, new.get(name, name), *rest): leaf
            for (kind, name, *rest), leaf in flat.items()
            if not re.fullmatch(BLOCK, name) or name in new
        }
        return plain.clone(depth=len(left)), unflatten_dict(flat)


# ------------------------------------------------------------------------------ early exit


@dataclass(frozen=True)
class EarlyExit(Method):
    """Classifiers behind each block `layers_i`, and a rule that says whose answer counts.

    In training the output is all logits, the model's own last, so that `Classification` learns from
    every one. `features` has `exits [layers, batch, classes]` and, in evaluation, `exit_layer`.

    Attributes:
      limit: the entropy below which an answer counts, in nats.
      patience: how often in a row the answer must stay; None: the entropy decides.
      pool: what a classifier reads of a block's tokens.
    """

    limit: float = 0.1
    patience: int | None = None
    pool: Literal["first", "mean"] = "first"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with exits."""
        return intercepted(module, self)

    def trains(self, path: str) -> bool | None:
        """The classifiers are; of the rest another method decides."""
        return True if re.fullmatch(r"exit_\d+_(kernel|bias)", path) else None

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with classifiers.

        Raises:
          ValueError: if there are no blocks, or no classes of a whole example.
        """
        blocks = blocks_of(module, variables, BLOCK)
        if len(blocks) < 2:
            raise ValueError(
                f"{type(module).__name__} has no blocks layers_0, layers_1 and so on to leave "
                "after; stacked layers need scan_layers=False."
            )
        return super().adapt(module, variables, rng, batches)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The model's features, with the answer that counts as `logits`."""
        if context.module.path or context.method_name != "features":
            return call(*args, **kwargs)
        model, outputs = context.module, {}

        def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            y = call(*args, **kwargs)
            found = re.fullmatch(BLOCK, "/".join(context.module.path))
            if found and context.method_name == "__call__":
                outputs[int(found[1])] = _first(y)
            return y

        with outermost(listen):
            out = call(*args, **kwargs)
        last = out.get("logits") if isinstance(out, dict) else None
        if getattr(last, "ndim", 0) != 2:
            raise ValueError(
                f"{type(model).__name__} gives no classes of a whole example: its exits would have "
                "nothing to decide."
            )
        each = [self._classify(model, i, outputs[i], last) for i in sorted(outputs)[:-1]]
        exits = jnp.stack([*each, last])
        if model.has_rng("dropout"):
            return {**out, "exits": exits, "logits": tuple(exits)}
        if self.patience is None:
            layer = entropy_exit(exits, self.limit)
        else:
            layer = patience_exit(exits, self.patience)
        logits = jnp.take_along_axis(exits, layer[None, :, None], axis=0)[0]
        return {**out, "exits": exits, "exit_layer": layer, "logits": logits}

    def _classify(
        self, model: nn.Module, i: int, x: Float[Array, "batch ..."], last: Array
    ) -> Float[Array, "batch classes"]:
        first = self.pool == "first" and x.ndim == 3
        x = x[:, 0] if first else x.mean(tuple(range(1, x.ndim - 1)))
        shape = (x.shape[-1], last.shape[-1])
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()
        kernel = model.scope.param(f"exit_{i}_kernel", normal, shape, jnp.float32)
        bias = model.scope.param(f"exit_{i}_bias", zeros, shape[-1:], jnp.float32)
        return (x @ kernel.astype(x.dtype) + bias.astype(x.dtype)).astype(last.dtype)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The plain model, if no example leaves early.

        Raises:
          ValueError: if some may.
        """
        plain = unwrap(module, self)
        if self.limit > 0 or self.patience is not None:
            raise ValueError(
                "A plain model's examples do not leave early: keep the wrapped model, or merge "
                "with EarlyExit(limit=0)."
            )
        flat = flatten_dict(dict(variables))
        return plain, unflatten_dict({p: x for p, x in flat.items() if not self.trains(p[-1])})
