"""Linear maps of the last axis, laid out so that their gradients are fast on a CPU, too.

XLA for CPUs forms the weight gradient of `[batch, length, in] x [in, out]` from a transposed copy
of the output's gradient, and into that copy it fuses, again and again, the whole sum of residual
branches above: a ViT-S step takes 1.4 times the arithmetic. A product of two matrices has no such
copy. On other platforms the axes stay as they are: TPUs tile the last two.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general`, for `nn.Dense`: a CPU without a mesh multiplies two matrices.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`.
      dimension_numbers: those of `nn.Dense`.
      **options: `precision`, `preferred_element_type`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x.ndim < 3 or not (mesh.empty or mesh.size == 1):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    return _product(x, kernel, numbers=dimension_numbers, options=tuple(options.items()))


@partial(jax.jit, static_argnames=("numbers", "options"))
def _product(x: Array, kernel: Array, *, numbers: Any, options: tuple) -> Array:
    """Compiled by itself, so that JAX traces it once for all layers of one shape."""
    product = partial(jax.lax.dot_general, **dict(options))
    across = partial(product, dimension_numbers=numbers)

    def as_matrices(x: Array, kernel: Array) -> Array:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = product(rows, kernel, dimension_numbers=(((1,), (0,)), ((), ())))
        return y.reshape(*x.shape[:-1], kernel.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=as_matrices, default=across)


Dense = partial(nn.Dense, dot_general=dot_general)
"""`nn.Dense` with the product above."""
