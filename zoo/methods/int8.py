"""INT8 after training: whole numbers for weights and inputs of dense maps, summed in int32.

Dettmers et al., "LLM.int8()", arXiv 2208.07339 (a scale per token); Xiao et al., "SmoothQuant",
arXiv 2211.10438; surveyed in Chitty-Venkata et al., arXiv 2307.07982. With s = max |.| / 127 over
what shares a scale,

    y = s_x s_w (q_x . q_w) + b            weights: a scale per output
                                           inputs: a scale per token, or one from calibration
    SmoothQuant: x / t and t W for x and W, t = max |X_j|^a / max |W_j|^(1 - a) per channel

A kernel becomes int8 in `params`; beside it stand `kernel_scale [out]` and, where asked for,
`input_scale []` and `smooth [in]` (t). The gradient of the input goes straight through, so that
LoRA trains beside a quantised map: `methods=(Int8(), LoRA())`.

qwix does the same sums. It is not used underneath: its kernels are objects in place of arrays,
which checkpoints, partition rules and other methods would all have to know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray
from jaxtyping import Int8 as Int8Array

from zoo.methods.compress import quantise, smoothing
from zoo.methods.linear import (
    ALL_BUT_HEAD,
    is_target,
    kernel_of,
    largest_input,
    linear,
    observed,
    refuse_added,
)
from zoo.methods.method import Method, Variables, add_leaves, intercepted, unwrap


@dataclass(frozen=True)
class Int8(Method):
    """Dense maps in whole numbers.

    Attributes:
      activations: what shares a scale of the inputs: each "token", the whole "tensor" (its range
        comes from calibration), or None: inputs stay in float.
      smooth: SmoothQuant's exponent a, such as 0.5; None: no smoothing.
      bits: of weights and inputs, at most 8.
      batches: of training data that "tensor" and `smooth` look at.
      targets: dense maps (path, regex of the whole).
    """

    activations: Literal["token", "tensor"] | None = "token"
    smooth: float | None = None
    bits: int = 8
    batches: int = 2
    targets: str = ALL_BUT_HEAD

    @property
    def calibration(self) -> int:
        """Batches that are looked at."""
        return self.batches if self.activations == "tensor" or self.smooth is not None else 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that computes in whole numbers where its kernels are such."""
        refuse_added(module, self)
        return intercepted(module, self)

    def trains(self, path: str) -> bool:
        """Nothing is: rounding has no gradient."""
        return False

    def adapt(
        self,
        module: nn.Module,
        variables: Variables,
        rng: PRNGKeyArray,
        batches: Sequence[Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """The variables with kernels in int8.

        Raises:
          ValueError: if no dense map matches `targets`, or there is no batch to calibrate on.
        """
        flat = flatten_dict(add_leaves(self.wrap(module), variables, rng))
        places = [path[:-1] for path in flat if path[-1] == "kernel_scale"]
        if not places:
            raise ValueError(
                f"Int8's targets {self.targets!r} match no dense map of {type(module).__name__}."
            )
        seen = {}
        if self.calibration:
            if batches:
                seen = observed(
                    module, variables, batches, self.targets, largest_input, jnp.maximum
                )
            elif not isinstance(next(iter(flat.values())), jax.core.Tracer):
                raise ValueError(
                    "A range of inputs comes from data: give `adapt` batches, or use "
                    "activations='token' without smoothing."
                )
        for place in places:
            kernel = flat[(*place, "kernel")].astype(jnp.float32)
            largest = seen.get(place[1:], jnp.ones(kernel.shape[:-1]))
            if self.smooth is not None:
                rows = jnp.maximum(jnp.abs(kernel).max(-1), 1e-5)
                factor = smoothing(jnp.maximum(largest, 1e-5), rows, self.smooth)
                flat[(*place, "smooth")], kernel = factor, kernel * factor[..., None]
                largest = largest / factor
            if self.activations == "tensor":
                flat[(*place, "input_scale")] = largest.max(-1) / self._top
            codes, scale = quantise(kernel, axis=-2, bits=self.bits)
            flat[(*place, "kernel")], flat[(*place, "kernel_scale")] = codes, scale[..., 0, :]
        return unflatten_dict(flat)

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The map of codes; while a kernel is in float, the map itself."""
        dense = context.module
        kernel = kernel_of(dense) if is_target(context, self.targets) else None
        if kernel is None:
            return call(*args, **kwargs)
        ones = nn.initializers.ones_init()
        scale = dense.param("kernel_scale", ones, kernel.shape[-1:], jnp.float32)
        wanted = self.activations == "tensor"
        at = dense.param("input_scale", ones, (), jnp.float32) if wanted else None
        smooth = None
        if self.smooth is not None:
            smooth = dense.param("smooth", ones, kernel.shape[:1], jnp.float32)
        if not jnp.issubdtype(kernel.dtype, jnp.integer):
            return call(*args, **kwargs)
        x = args[0] if smooth is None else args[0] / smooth.astype(args[0].dtype)
        if self.activations is None:
            return linear(dense, x, kernel.astype(jnp.float32) * scale)
        (x,) = nn.dtypes.promote_dtype(x, dtype=dense.dtype)
        y = product(x, kernel, scale, at, self.bits).astype(x.dtype)
        return y + dense.get_variable("params", "bias").astype(y.dtype) if dense.use_bias else y

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """A plain model with the rounded weights.

        Raises:
          ValueError: if inputs are rounded, too, which no plain model does.
        """
        plain = unwrap(module, self)
        if self.activations is not None:
            raise ValueError(
                "A plain model does not round its inputs: it cannot give the same outputs. Keep "
                "the wrapped model, or use Int8(activations=None)."
            )
        flat = flatten_dict(dict(variables))
        for path in [path for path in flat if path[-1] == "kernel_scale"]:
            kernel = flat[(*path[:-1], "kernel")].astype(jnp.float32) * flat.pop(path)[..., None, :]
            smooth = flat.pop((*path[:-1], "smooth"), None)
            flat[(*path[:-1], "kernel")] = kernel if smooth is None else kernel / smooth[..., None]
        return plain, unflatten_dict(flat)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def product(
    x: Float[Array, "... inputs"],
    kernel: Int8Array[Array, "inputs outputs"],
    scale: Float[Array, "outputs"],
    input_scale: Float[Array, ""] | None,
    bits: int = 8,
) -> Float[Array, "... outputs"]:
    """The product of codes in int32, times both scales, in float32.

    Args:
      x: the input in float.
      kernel: codes.
      scale: of each output.
      input_scale: of the input; None: one for each token.
      bits: of the input's codes.
    """
    top = 2 ** (bits - 1) - 1
    if input_scale is None:
        codes, input_scale = quantise(x.astype(jnp.float32), bits=bits)
    else:
        codes = jnp.clip(jnp.round(x / input_scale), -top, top).astype(jnp.int8)
    whole = jax.lax.dot_general(
        codes, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return whole.astype(jnp.float32) * input_scale * scale


def _forward(x: Array, kernel: Array, scale: Array, at: Array | None, bits: int) -> tuple:
    return product(x, kernel, scale, at, bits), (kernel, scale, at, jnp.zeros((), x.dtype))


def _backward(bits: int, kept: tuple, g: Array) -> tuple:
    kernel, scale, at, like = kept
    of_x = ((g * scale) @ kernel.astype(g.dtype).T).astype(like.dtype)
    nothing = np.zeros(kernel.shape, jax.dtypes.float0)
    return of_x, nothing, jnp.zeros_like(scale), None if at is None else jnp.zeros_like(at)


product.defvjp(_forward, _backward)
