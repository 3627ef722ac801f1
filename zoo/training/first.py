"""The first values of a state, without compiling the program that makes them as one.

A network has hundreds of leaves, of a dozen shapes. In one program XLA compiles a kernel for each
leaf: its random numbers, the zeros of its moments. Run one operation after the other, those of
equal shapes are compiled once, which takes a third of the time or less.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, run one operation after the other; only those that its outputs need.

    Random numbers are those of the compiled function, what follows them may differ by a rounding.
    """

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        given = [arg for arg, needed in zip(jax.tree.leaves(args), used, strict=True) if needed]
        outputs = jax.device_put(jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*given))
        taken = {_buffer(x) for x in jax.device_put([*closed.consts, *given])}
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [_alone(output, taken) for output in outputs]
        )

    return run


def _buffer(x: jax.Array) -> int:
    return x.addressable_data(0).unsafe_buffer_pointer()


def _alone(x: jax.Array, taken: set[int]) -> jax.Array:
    """`x` in memory of its own: a step that is given the state uses each part up."""
    if _buffer(x) in taken:
        x = jnp.array(x, copy=True)
    taken.add(_buffer(x))
    return x
