"""Heads and neurons that are cut out: smaller kernels, smaller products.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019, arXiv 1905.10650,
for heads and their importance; Chitty-Venkata et al., arXiv 2307.07982, for neurons.

    neuron j of an MLP    column j of `up` (and `gate`), row j of `down`       |up_j| |down_j|
    head h of attention   its columns of query, key, value, its rows of `out`  |value_h| |out_h|

The sizes on the right say what is cut; `head_importances` measures `E |dL / d gate_h|` instead,
which `PruneHeads(heads=...)` takes. Each head that goes takes 4 d d_h weights along. What is left
has the kernels' smaller shapes; `merge` fills up with zeros, which changes no output, so that the
plain model exports.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

import kernels_pallas
from zoo.layers.attention import Attention
from zoo.layers.causal import causal_attention
from zoo.layers.dense import Dense
from zoo.methods.attention import is_attention
from zoo.methods.linear import is_target, kernel_of, linear, over_layers, refuse_added
from zoo.methods.method import Method, Variables, intercepted, unwrap
from zoo.tasks.apply import model_inputs, zeros_like_inputs

Path = tuple[str, ...]


def _best(score: Float[Array, "parts"], keep: float) -> Array:
    """Numbers of the parts with the largest scores, in order; at least one."""
    count = max(1, round(keep * score.shape[-1]))
    return jnp.sort(jnp.argsort(-score, stable=True)[:count])


def _norms(kernel: Array, axis: int) -> Array:
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=axis)


def _padded(module: nn.Module, flat: dict[Path, Array]) -> dict[Path, Array]:
    """Leaves with zeros at the end of each axis that is shorter than the plain module's."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **zeros_like_inputs(module))
    wanted = {path: leaf.shape for path, leaf in flatten_dict(dict(shapes)).items()}

    def fill(path: Path, leaf: Array) -> Array:
        shape = wanted.get(path, leaf.shape)
        return jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)])

    return {path: fill(path, leaf) for path, leaf in flat.items()}


# ------------------------------------------------------------------------------ neurons


@dataclass(frozen=True)
class PruneNeurons(Method):
    """Cuts neurons out of MLPs whose maps are `up`, `down` and perhaps `gate`.

    Attributes:
      keep: share of neurons that stay in each MLP.
      targets: MLPs (path of the module that holds the maps, regex of the whole).
    """

    keep: float = 0.5
    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose MLPs have the width of their kernels."""
        refuse_added(module, self)
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with narrower kernels.

        Raises:
          ValueError: if there is no such MLP, or one mixes its neurons between `up` and `down`.
        """
        flat = flatten_dict(dict(variables))
        found = 0
        for place in sorted({path[:-2] for path in flat if path[-2:] == ("down", "kernel")}):
            up, down = flat.get((*place, "up", "kernel")), flat[(*place, "down", "kernel")]
            wanted = re.fullmatch(self.targets, "/".join(place[1:]))
            if up is None or not wanted or up.shape[-1] != down.shape[-2]:
                continue
            found += 1
            best = over_layers(
                lambda u, d: _best(_norms(u, 0) * _norms(d, 1), self.keep), 2, up, down
            )
            for name, axis in (("up", -1), ("gate", -1), ("down", -2)):
                for leaf in ("kernel", "bias"):
                    path = (*place, name, leaf)
                    if path in flat and (leaf, name) != ("bias", "down"):
                        flat[path] = _taken(flat[path], best, axis)
        adapted = unflatten_dict(flat)
        try:
            wrapped, inputs = self.wrap(module), zeros_like_inputs(module)
            jax.eval_shape(lambda v: wrapped.apply(v, **inputs), adapted)
        except Exception as error:  # shapes do not fit: what was raised depends on the module
            raise ValueError(
                f"An MLP of {type(module).__name__} does more between `up` and `down` than neuron "
                "by neuron, so that none can be cut out; leave it out of `targets`."
            ) from error
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no MLP of maps `up` and `down` in {self.targets!r}."
            )
        return adapted

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The map with its kernel's own width."""
        dense = context.module
        kernel = kernel_of(dense) if is_target(context, r".*(^|/)(up|gate|down)") else None
        if kernel is None or kernel.shape == (args[0].shape[-1], dense.features):
            return call(*args, **kwargs)
        return linear(dense, args[0], kernel)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """Zeros for the neurons that were cut out."""
        plain = unwrap(module, self)
        return plain, unflatten_dict(_padded(plain, flatten_dict(dict(variables))))


def _taken(leaf: Array, places: Array, axis: int) -> Array:
    """The parts of an axis of a leaf that is stacked as the places are."""
    for _ in range(places.ndim - 1):
        return jax.vmap(lambda x, p: _taken(x, p, axis))(leaf, places)
    return jnp.take(leaf, places, axis=axis)


# -------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class PruneHeads(Method):
    """Cuts heads out of every attention that `zoo.methods.attention` knows.

    Attributes:
      keep: share of heads that stay in each attention.
      heads: (path of an attention, numbers of the heads that stay), in place of `keep`.
      targets: attention modules (path, regex of the whole).
    """

    keep: float = 0.5
    heads: tuple[tuple[str, tuple[int, ...]], ...] = ()
    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose attention has as many heads as its kernels."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with smaller kernels.

        Raises:
          ValueError: if the module has no attention that this knows.
        """
        flat, chosen = flatten_dict(dict(variables)), dict(self.heads)
        attention = attention_modules(module, variables, self.targets)
        if not attention:
            raise ValueError(
                f"{type(module).__name__} has no attention whose heads can be cut out: its heads "
                "share biases, masks or states that the cut would have to reach, too."
            )
        if set(chosen) - set(attention):
            raise ValueError(
                f"heads names {sorted(set(chosen) - set(attention))}, but the attention modules "
                f"are {', '.join(attention)}."
            )
        for name, count in attention.items():
            place = ("params", *name.split("/"))
            fused = (*place, "qkv", "kernel") in flat
            out = flat[(*place, "out", "kernel")]
            value = flat[(*place, "qkv" if fused else "value", "kernel")]
            value = jnp.split(value, 3, -1)[2] if fused else value

            def score(value: Array, out: Array, count: int = count) -> Array:
                columns, rows = _norms(value, 0), _norms(out, 1)
                return _norms(columns.reshape(count, -1), 1) * _norms(rows.reshape(count, -1), 1)

            if name in chosen:
                best = jnp.asarray(chosen[name])
            else:
                best = over_layers(lambda v, o: _best(score(v, o), self.keep), 2, value, out)
            width = out.shape[-2] // count
            places = (best[..., None] * width + jnp.arange(width)).reshape(*best.shape[:-1], -1)
            for maps in ("qkv", "query", "key", "value", "out"):
                for leaf in ("kernel", "bias"):
                    path = (*place, maps, leaf)
                    if path not in flat or (maps, leaf) == ("out", "bias"):
                        continue
                    parts = jnp.split(flat[path], 3 if maps == "qkv" else 1, -1)
                    axis = -2 if maps == "out" else -1
                    parts = [_taken(part, places, axis) for part in parts]
                    flat[path] = jnp.concatenate(parts, -1)
        return unflatten_dict(flat)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """What the heads that are there give together."""
        module = context.module
        if not _is_target(context, self.targets) or not module.has_variable("params", "out"):
            return call(*args, **kwargs)
        x = args[0]
        rows, width = module.get_variable("params", "out")["kernel"].shape[0], x.shape[-1]
        if rows == width:
            return call(*args, **kwargs)
        return _attend(module, rows // (width // module.num_heads), args, kwargs)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """Heads of zeros behind those that are left."""
        plain = unwrap(module, self)
        flat = flatten_dict(dict(variables))
        thirds: dict[Path, list[Array]] = {}
        for path in [path for path in flat if path[-2] == "qkv"]:
            thirds[path] = jnp.split(flat.pop(path), 3, -1)
        whole = _padded(plain, flat)
        if thirds:
            shapes = jax.eval_shape(plain.init, jax.random.key(0), **zeros_like_inputs(plain))
            shapes = flatten_dict(dict(shapes))
            for path, parts in thirds.items():
                missing = shapes[path].shape[-1] // 3 - parts[0].shape[-1]
                ends = [(0, 0)] * (parts[0].ndim - 1) + [(0, missing)]
                whole[path] = jnp.concatenate([jnp.pad(part, ends) for part in parts], -1)
        return plain, unflatten_dict(whole)


def _is_target(context: nn.module.InterceptorContext, targets: str) -> bool:
    called = context.method_name == "__call__" and is_attention(context.module)
    return called and re.fullmatch(targets, "/".join(context.module.path)) is not None


def _attend(module: nn.Module, heads: int, args: tuple, kwargs: dict) -> Any:
    """Attention of so many heads, with the module's own maps."""
    x, channels = args[0], args[0].shape[-1]
    if getattr(module, "query_key_norm", False):
        raise ValueError(f"{'/'.join(module.path)} normalises queries: heads cannot be cut out.")
    width = channels // module.num_heads
    own = module.get_variable("params", "out")
    dense = partial(Dense, dtype=module.dtype, param_dtype=module.param_dtype)
    shape = (*x.shape[:2], heads, width)
    names = ("qkv",) if module.has_variable("params", "qkv") else ("query", "key", "value")
    maps = [
        dense(
            heads * width * 3 // len(names),
            use_bias="bias" in module.get_variable("params", name),
            name=name,
        )(x)
        for name in names
    ]
    maps = jnp.split(maps[0], 3, -1) if len(maps) == 1 else maps
    query, key, value = (part.reshape(shape) for part in maps)
    out = dense(channels, use_bias="bias" in own, name="out")
    if not isinstance(module, Attention):
        if (args[1] if len(args) > 1 else kwargs.get("state")) is not None:
            raise ValueError("With heads cut out, call the model with whole texts: no state.")
        context = args[3] if len(args) > 3 else kwargs.get("context")
        scale = getattr(module, "scale", None)
        mask = getattr(context, "mask", None)
        y = causal_attention(query, key, value, mask, scale=scale or width**-0.5)
        return out(y.reshape(*x.shape[:2], -1)), None
    if (args[3] if len(args) > 3 else kwargs.get("memory")) is not None:
        raise ValueError(f"{'/'.join(module.path)} attends to a memory: heads cannot be cut out.")
    visible = args[1] if len(args) > 1 else kwargs.get("visible")
    segments = None if visible is None else visible.astype(jnp.int32)
    y = kernels_pallas.attention(
        query,
        key,
        value,
        query_segments=None if segments is None else jnp.ones_like(segments),
        key_segments=segments,
        scale=module.scale,
    )
    return out(y.reshape(*x.shape[:2], -1))


def attention_modules(
    module: nn.Module, variables: Variables, targets: str = ".*"
) -> dict[str, int]:
    """Path of each attention that `zoo.methods.attention` knows -> its heads."""
    found: dict[str, int] = {}

    class Listen:
        def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            if _is_target(context, targets):
                found["/".join(context.module.path)] = context.module.num_heads
            return call(*args, **kwargs)

    listening = intercepted(module, Listen())
    jax.eval_shape(lambda v: listening.apply(v, **zeros_like_inputs(module)), dict(variables))
    return found


def head_importances(
    module: nn.Module,
    variables: Variables,
    loss: Callable[[Any, Mapping[str, Array]], Float[Array, ""]],
    batches: Sequence[Mapping[str, Array]],
) -> dict[str, np.ndarray]:
    """`E |dL / d gate|` of a gate on each head's output, by the path of its attention.

    Args:
      module: the model.
      variables: of it.
      loss: from the model's output and a batch.
      batches: of one example each, as the absolute value stands inside the mean.
    """
    heads = attention_modules(module, variables)
    gates = {name: jnp.ones(count) for name, count in heads.items()}

    @jax.jit
    def slopes(batch: Mapping[str, Array]) -> dict[str, Array]:
        def total(gates: Mapping[str, Array]) -> Array:
            class Gated:
                def intercept(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
                    path = "/".join(context.module.path)
                    place, _, name = path.rpartition("/")
                    if name == "out" and place in gates and context.method_name == "__call__":
                        x = args[0].reshape(*args[0].shape[:-1], len(gates[place]), -1)
                        x = (x * gates[place][:, None]).reshape(args[0].shape)
                        args = (x, *args[1:])
                    return call(*args, **kwargs)

            output = intercepted(module, Gated()).apply(variables, **model_inputs(module, batch))
            return loss(output, batch)

        return jax.grad(total)(gates)

    each = [slopes(batch) for batch in batches]
    return {name: np.mean([np.abs(one[name]) for one in each], 0) for name in gates}
