"""Pruning of single weights: some become zero, and stay so.

Han et al., arXiv 1506.02626 (magnitude); Mishra et al., arXiv 2104.08378 (N:M); Sanh et al.,
"Movement Pruning", arXiv 2005.07683; Frantar and Alistarh, "SparseGPT", arXiv 2301.00774.

    Prune      a kernel's weights are chosen once, by `criterion`; those that are zero stay zero in
               training, as W [W != 0] is what is computed with
    Movement   W [s among the largest], the scores s are learned: ds = dW' W

`zoo.methods.cut` cuts heads and neurons out instead.

SparseGPT: with H = X^T X + damping over calibration inputs, U the upper Cholesky factor of H^-1,
go through the inputs i in order; in blocks, the weights with the smallest w^2 / U_ii^2 become zero,
and what each did is made up for by those behind it: W[j] -= (w_i / U_ii) U_ij.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zoo.methods.compress import magnitude_mask, nm_mask
from zoo.methods.linear import (
    ALL_BUT_HEAD,
    dense_maps,
    is_target,
    kernel_of,
    linear,
    observed,
    over_layers,
    refuse_added,
)
from zoo.methods.method import Method, Variables, intercepted, unwrap

LEARNED = "movement_score"


def mask_of(
    kernel: Float[Array, "inputs outputs"], sparsity: float, pattern: tuple[int, int] | None
) -> Bool[Array, "inputs outputs"]:
    """Which weights stay: by magnitude in the whole kernel, or N of each M inputs in a row."""
    if pattern is None:
        return magnitude_mask(kernel, sparsity)
    return nm_mask(kernel.T, *pattern).T


def sparse_gpt(
    kernel: Float[Array, "inputs outputs"],
    gram: Float[Array, "inputs inputs"],
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    *,
    block: int = 128,
    damping: float = 0.01,
) -> Float[Array, "inputs outputs"]:
    """The kernel with zeros, for which the other weights of each output make up.

    Args:
      kernel: `[in, out]`.
      gram: the sum of `x x^T` over inputs.
      sparsity: share of zeros in each block of inputs.
      pattern: N of each M inputs in a row stay, in place of `sparsity`.
      block: inputs that are decided on together; a whole number of M.
      damping: added to the diagonal of `gram`, as a share of its mean.
    """
    inputs = kernel.shape[0]
    if pattern is not None:
        nm_mask(kernel.T, *pattern)  # refuses groups that do not divide the inputs
    block = pattern[1] if pattern else max(n for n in range(1, block + 1) if inputs % n == 0)
    weights, gram = kernel.astype(jnp.float32), gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    damp = damping * jnp.maximum(diagonal.mean(), 1e-12)
    gram = gram + jnp.diag(jnp.where(diagonal == 0, 1.0, damp))
    upper = jnp.linalg.cholesky(jnp.linalg.inv(gram)).T
    scale = jnp.diagonal(upper)[:, None]

    def one(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, keep = carry

        def decided() -> Array:
            size = jax.lax.dynamic_slice_in_dim(jnp.abs(weights) / scale, i, block)
            return mask_of(size, sparsity, pattern)

        keep = jax.lax.cond(i % block == 0, decided, lambda: keep)
        error = jnp.where(keep[i % block], 0.0, weights[i]) / scale[i]
        later = jnp.where(jnp.arange(inputs) >= i, upper[i], 0.0)
        weights = (weights - later[:, None] * error).at[i].multiply(keep[i % block])
        return weights, keep

    keep = jnp.ones((block, kernel.shape[1]), bool)
    return jax.lax.fori_loop(0, inputs, one, (weights, keep))[0].astype(kernel.dtype)


@dataclass(frozen=True)
class Prune(Method):
    """Zeros in the kernels of dense maps, chosen once.

    Attributes:
      sparsity: share of zeros.
      pattern: (N, M): of each M inputs in a row the N most important stay, in place of `sparsity`.
      criterion: which weights are important: the largest, or SparseGPT's, which needs data.
      batches: of training data that SparseGPT looks at.
      targets: dense maps (path, regex of the whole).
    """

    sparsity: float = 0.5
    pattern: tuple[int, int] | None = None
    criterion: Literal["magnitude", "sparse_gpt"] = "magnitude"
    batches: int = 4
    targets: str = ALL_BUT_HEAD

    @property
    def calibration(self) -> int:
        """Batches that are looked at."""
        return self.batches if self.criterion == "sparse_gpt" else 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose zeros stay zero."""
        refuse_added(module, self)
        return intercepted(module, self)

    def adapt(
        self,
        module: nn.Module,
        variables: Variables,
        rng: PRNGKeyArray,
        batches: Sequence[Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """The variables with zeros.

        Raises:
          ValueError: if no dense map matches `targets`, or SparseGPT has no data.
        """
        flat = flatten_dict(dict(variables))
        places = dense_maps(module, variables, self.targets)
        if not places:
            raise ValueError(
                f"Prune's targets {self.targets!r} match no dense map of {type(module).__name__}."
            )
        grams = {}
        if self.criterion == "sparse_gpt" and batches:
            grams = observed(module, variables, batches, self.targets, _gram, jnp.add)
        elif self.criterion == "sparse_gpt" and not isinstance(flat[places[0]], jax.core.Tracer):
            raise ValueError("SparseGPT looks at data: give `adapt` batches.")
        chosen = jax.jit(partial(sparse_gpt, sparsity=self.sparsity, pattern=self.pattern))
        for path in places:
            kernel = flat[path]
            if path[1:-1] in grams:
                flat[path] = over_layers(chosen, 2, kernel, grams[path[1:-1]])
            else:
                mask = over_layers(lambda k: mask_of(k, self.sparsity, self.pattern), 2, kernel)
                flat[path] = kernel * mask
        return unflatten_dict(flat)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The map, whose zeros have no gradient."""
        dense = context.module
        kernel = kernel_of(dense) if is_target(context, self.targets) else None
        if kernel is None:
            return call(*args, **kwargs)
        return linear(dense, args[0], kernel * jax.lax.stop_gradient(kernel != 0))


def _gram(x: Float[Array, "... inputs"]) -> Float[Array, "inputs inputs"]:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return rows.T @ rows


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def among_largest(
    kernel: Float[Array, "inputs outputs"], score: Float[Array, "inputs outputs"], sparsity: float
) -> Float[Array, "inputs outputs"]:
    """The weights whose scores are not among the share `sparsity` of smallest ones; else zero."""
    size = score.reshape(-1)
    rank = jnp.argsort(jnp.argsort(size, stable=True), stable=True)
    return kernel * (rank >= round(sparsity * size.size)).reshape(kernel.shape)


def _largest_forward(kernel: Array, score: Array, sparsity: float) -> tuple[Array, tuple]:
    y = among_largest(kernel, score, sparsity)
    return y, (kernel, y != 0)


def _largest_backward(sparsity: float, kept: tuple, g: Array) -> tuple[Array, Array]:
    kernel, stays = kept
    return g * stays, g * kernel


among_largest.defvjp(_largest_forward, _largest_backward)


@dataclass(frozen=True)
class Movement(Method):
    """Movement pruning: which weights stay is learned beside them.

    Attributes:
      sparsity: share of zeros in each kernel.
      targets: dense maps (path, regex of the whole).
    """

    sparsity: float = 0.5
    targets: str = ALL_BUT_HEAD

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a score beside each weight."""
        refuse_added(module, self)
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with scores; before anything is learned they are the weights' sizes."""
        adapted = super().adapt(module, variables, rng, batches)
        if not any(path[-1] == LEARNED for path in flatten_dict(adapted["params"])):
            raise ValueError(
                f"Movement's targets {self.targets!r} match no dense map of "
                f"{type(module).__name__}."
            )
        return adapted

    def trains(self, path: str) -> bool | None:
        """The scores are; of the rest another method decides."""
        return True if path.endswith(LEARNED) else None

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The map with the weights that stay."""
        dense = context.module
        kernel = kernel_of(dense) if is_target(context, self.targets) else None
        if kernel is None:
            return call(*args, **kwargs)
        score = dense.param(LEARNED, lambda _: 1e-2 * jnp.abs(kernel))
        return linear(dense, args[0], among_largest(kernel, score, self.sparsity))

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """Weights that do not stay become zero."""
        flat = flatten_dict(dict(variables))
        for path in [path for path in flat if path[-1] == LEARNED]:
            place = (*path[:-1], "kernel")
            flat[place] = over_layers(
                lambda k, s: among_largest(k, s, self.sparsity), 2, flat[place], flat.pop(path)
            )
        return unwrap(module, self), unflatten_dict(flat)
