"""Sigma-reparametrisation: every matrix is divided by its spectral norm and has a learned scale.

Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023,
arXiv 2303.06296; code github.com/apple/ml-sigma-reparam (Apple sample code licence), whose PyTorch
part (`vision/layers.py`) we follow.

    W' = gamma / sigma(W) W          gamma: a number a matrix, at first sigma(W), so that W' = W

`sigma` is one power iteration from the stored vector u: with the kernel K `[in, out]`,

    v = K^T u / |K^T u|;   u' = K v / |K v|;   sigma = v . K^T u'

u and v are constants of the gradient, which flows through K alone. A training step stores u';
evaluation iterates once, too, and stores nothing. u starts as the singular vector of the largest
singular value. A convolution's kernel is a matrix of all its inputs. Biases are as they were.

With it a ViT trains without LayerNorm, warm-up and weight decay: `WithoutNorms` takes all norms
away. The entropy of attention, whose collapse the paper sees before a run diverges, is
`attention_entropy`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from zoo.checkpoints.ruleset import Rule, Rules
from zoo.checkpoints.transforms import Transform, chain, conv, elementwise, identity
from zoo.layers.patch import PatchEmbed
from zoo.methods.method import Method, Variables, intercepted, refuse_lost, unwrap
from zoo.tasks.apply import zeros_like_inputs

NORMS = (nn.LayerNorm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)
MAPS = (nn.Dense, nn.Conv, PatchEmbed)


def power_iteration(
    kernel: Float[Array, "inputs outputs"], u: Float[Array, "inputs"]
) -> tuple[Float[Array, ""], Float[Array, "inputs"]]:
    """The spectral norm by one iteration from u, and the next u."""
    fixed = jax.lax.stop_gradient(kernel)
    v = _unit(fixed.T @ u)
    u = _unit(fixed @ v)
    return v @ (kernel.T @ u), u


def _unit(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def attention_entropy(weights: Float[Array, "... queries keys"]) -> Float[Array, "... queries"]:
    """`-sum a log a` of each query's attention weights, in nats; at most the log of the keys."""
    weights = weights.astype(jnp.float32)
    return -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), -1)


@dataclass(frozen=True)
class SigmaReparam(Method):
    """The reparametrisation of dense maps, convolutions and patch embeddings.

    Attributes:
      targets: submodules (path, regex of the whole) that have it.
    """

    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a scale and a vector beside each kernel."""
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The output of the layer whose kernel is `gamma / sigma` times its own.

        As the map is linear, its input is scaled instead; the bias is added as it is.
        """
        layer = context.module
        wanted = isinstance(layer, MAPS) and context.method_name == "__call__"
        if not wanted or not re.fullmatch(self.targets, "/".join(layer.path)):
            return call(*args, **kwargs)
        if not layer.has_variable("params", "kernel"):
            y = call(*args, **kwargs)  # at first the scale is 1
            self._scale(layer)
            return y
        x, *rest = args
        return call(x * self._scale(layer).astype(x.dtype), *rest, **kwargs)

    def _scale(self, layer: nn.Module) -> Float[Array, ""]:
        kernel = layer.get_variable("params", "kernel").astype(jnp.float32)
        kernel = kernel.reshape(-1, kernel.shape[-1])

        def singular() -> tuple[Array, Array]:
            left, values, _ = jnp.linalg.svd(jax.lax.stop_gradient(kernel), full_matrices=False)
            return left[:, 0], values[0]

        refuse_lost(layer, "batch_stats", "spectral_u")
        u = layer.variable("batch_stats", "spectral_u", lambda: singular()[0])
        gamma = layer.param("gamma", lambda _: singular()[1])
        sigma, following = power_iteration(kernel, u.value)
        if layer.is_mutable_collection("batch_stats") and not layer.is_initializing():
            u.value = jax.lax.stop_gradient(following)
        return gamma.astype(jnp.float32) / sigma

    def layouts(self, layouts: Mapping[str, Rules]) -> dict[str, Rules]:
        """The official code's names: `sigma` and `spectral_normed_weight.u` beside each weight."""
        return {name: _with_norms(rules) for name, rules in layouts.items()}

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """Each kernel is multiplied by `gamma / sigma`, as evaluation does."""
        flat = flatten_dict(dict(variables))
        for path in [p for p in flat if p[0] == "params" and p[-1] == "gamma"]:
            gamma = flat.pop(path)
            u = flat.pop(("batch_stats", *path[1:-1], "spectral_u"))
            kernel = flat[(*path[:-1], "kernel")]

            def scaled(kernel: Array, gamma: Array, u: Array) -> Array:
                matrix = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
                return (kernel * (gamma / power_iteration(matrix, u)[0])).astype(kernel.dtype)

            for _ in range(gamma.ndim):  # stacked layers
                scaled = jax.vmap(scaled)
            flat[(*path[:-1], "kernel")] = scaled(kernel, gamma, u)
        return unwrap(module, self), unflatten_dict(flat)


@dataclass(frozen=True)
class WithoutNorms(Method):
    """Takes layer, batch, group, instance and root-mean-square norms out of a model.

    Attributes:
      targets: norms (path of the submodule, regex of the whole) that are left out.
    """

    targets: str = ".*"

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose norms give what they get."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables without those of the norms."""
        kept = jax.eval_shape(lambda: self._variables(module, rng))
        wanted = flatten_dict(dict(kept))
        return unflatten_dict({p: x for p, x in flatten_dict(dict(variables)).items()
                               if p in wanted})  # fmt: skip

    def _variables(self, module: nn.Module, rng: Any) -> Any:
        return self.wrap(module).init(rng, **zeros_like_inputs(module))

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A norm's input."""
        layer = context.module
        left_out = isinstance(layer, NORMS) and context.method_name == "__call__"
        if left_out and re.fullmatch(self.targets, "/".join(layer.path)):
            return args[0]
        return call(*args, **kwargs)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model without its norms.

        Raises:
          ValueError: always.
        """
        raise ValueError("A model without its norms is no model of the zoo: it cannot be merged.")


def _with_norms(rules: Rules) -> Rules:
    """A layout whose layers have a scale and a vector, and whose filters are stored as matrices."""
    added, unused = [], list(rules.unused)
    for rule in rules.rules:
        (source, target) = (rule.sources[0].text, rule.targets[0].text)
        if len(rule.sources) > 1 or not target.endswith("/kernel"):
            added.append(rule)
            continue
        theirs, ours = source.removesuffix(".weight"), target.removesuffix("/kernel")
        filters = rule.transform is conv
        added += [
            Rule(source, target, _flat_filters(target) if filters else rule.transform),
            Rule(f"{theirs}.sigma", f"{ours}/gamma", _number),
            Rule(
                f"{theirs}.spectral_normed_weight.u",
                f"batch_stats/{ours}/spectral_u",
                _flat_vector(target) if filters else identity,
            ),
        ]
        names = ("effective_spectral_norm", "spectral_normed_weight.weight",
                 "spectral_normed_weight.spectral_norm")  # fmt: skip
        unused += [f"{re.sub(r'{.*?}', '*', theirs)}.{name}" for name in names]
    return Rules(added, rules.derived, unused, rules.fresh, rules.resize)


_number = elementwise(lambda x: x.reshape(()), lambda x: np.reshape(x, (1,)))


def _flat_filters(target: str) -> Callable[[nn.Module], Transform]:
    """`[out, in * height * width]` of a file <-> `[height, width, in, out]`."""

    def of_model(model: nn.Module) -> Transform:
        height, width, inputs, outputs = _shape(model, target)
        return chain(
            elementwise(
                lambda x: x.reshape(outputs, inputs, height, width),
                lambda x: x.reshape(outputs, -1),
            ),
            conv,
        )

    return of_model


def _flat_vector(target: str) -> Callable[[nn.Module], Transform]:
    """The vector of such filters, in the order of a file <-> in ours."""

    def of_model(model: nn.Module) -> Transform:
        height, width, inputs, _ = _shape(model, target)
        return elementwise(
            lambda x: x.reshape(inputs, height, width).transpose(1, 2, 0).reshape(-1),
            lambda x: x.reshape(height, width, inputs).transpose(2, 0, 1).reshape(-1),
        )

    return of_model


def _shape(model: nn.Module, target: str) -> tuple[int, ...]:
    from zoo.checkpoints.leaves import model_leaves

    return tuple(model_leaves(model).unrolled[target].shape)
