"""The first values of a state, without compiling the program that makes them as one.

A network has hundreds of leaves, of a few dozen shapes. In one program XLA compiles a kernel for
each leaf: its random numbers, the zeros of its moments. Run one operation after the other, those of
equal shapes are compiled once. A random number depends on the key and on its place among all
numbers, not on the shape that they are drawn in: what draws is compiled for blocks of `BLOCKS`
places, and leaves of every shape are made of such blocks. On a CPU, NumPy joins the blocks, fills
the constants and multiplies by the scale, for which nothing need be compiled.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval
from jaxtyping import Array, Shaped, UInt32

BLOCKS = (1 << 20, 1 << 17, 1 << 14)
"""How many numbers are drawn at once; a shape is filled with large blocks first."""

ELEMENTWISE = frozenset(
    "add bitcast_convert_type broadcast_in_dim convert_element_type div erf erf_inv lt log log1p "
    "max min mul neg nextafter or shift_right_logical sqrt stop_gradient sub xor".split()
)
"""Operations between random bits and what is drawn, each number by itself."""


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, run one operation after the other; only those that its outputs need.

    Random numbers are those of the compiled function, what follows them may differ by a rounding.
    """

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        given = [arg for arg, needed in zip(jax.tree.leaves(args), used, strict=True) if needed]
        outputs = _evaluate(ClosedJaxpr(jaxpr, closed.consts), given)
        taken = {_buffer(x) for x in jax.device_put([*closed.consts, *given])}
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [_alone(output, taken) for output in outputs]
        )

    return run


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """The outputs, operation by operation."""
    on_cpu = jax.default_backend() == "cpu"
    compiled: dict[tuple[str, int], Callable[..., Array]] = {}

    def draw(eqn: JaxprEqn, values: list[Any]) -> Any:
        """What a call draws, made of blocks; calls that differ in their shape share programs."""
        inner, shape = eqn.params["jaxpr"], eqn.outvars[0].aval.shape
        block = partial(_block, inner)
        name = str(jax.make_jaxpr(block, static_argnums=0)(BLOCKS[-1], jnp.uint32(0), values))
        size, start, blocks = math.prod(shape), 0, []
        while start < size:
            length = next((b for b in BLOCKS if b <= size - start), BLOCKS[-1])
            if (name, length) not in compiled:
                compiled[name, length] = jax.jit(partial(block, length))
            blocks.append(compiled[name, length](jnp.uint32(start), values))
            start += length
        if on_cpu:
            return np.concatenate([np.asarray(x) for x in blocks])[:size].reshape(shape)
        return jnp.concatenate(blocks)[:size].reshape(shape)

    def call(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        operation, (out, *_) = eqn.primitive.name, eqn.outvars
        if _is_call(eqn):
            if _draws_each(eqn) and _is_threefry(values[0]):
                return [draw(eqn, values)]
            if _calls_draws(eqn):
                return _walk(eqn.params["jaxpr"], values, call)
        if on_cpu and operation == "broadcast_in_dim" and np.size(values[0]) == 1:
            return [np.full(out.aval.shape, np.reshape(values[0], ()), out.aval.dtype)]
        if on_cpu and operation == "mul" and any(isinstance(x, np.ndarray) for x in values):
            return [np.multiply(*values, dtype=out.aval.dtype)]
        return _plainly(eqn, values)

    return _walk(closed, args, call)


def _walk(
    closed: ClosedJaxpr, args: Sequence[Any], call: Callable[[JaxprEqn, list[Any]], Sequence[Any]]
) -> list[Any]:
    """The outputs of a program whose operations `call` runs."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= zip(jaxpr.invars, args, strict=True)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known |= zip(eqn.outvars, call(eqn, [value(x) for x in eqn.invars]), strict=True)
    return [value(x) for x in jaxpr.outvars]


def _plainly(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """What an operation gives."""
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return found if eqn.primitive.multiple_results else [found]


def _is_call(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ("jit", "pjit")


def _draws_each(eqn: JaxprEqn) -> bool:
    """Whether a call draws, from its first argument, an array of numbers each by itself."""
    closed = eqn.params["jaxpr"]
    if len(eqn.outvars) != 1 or not eqn.invars or closed.consts:
        return False
    shape, drawn = eqn.outvars[0].aval.shape, []

    def each(jaxpr: Jaxpr, key: Any) -> bool:
        for eqn in jaxpr.eqns:
            operation = eqn.primitive.name
            if any(x.aval.shape != shape and x.aval.size != 1 for x in eqn.outvars):
                return False
            if operation == "random_bits":
                drawn.append(eqn)
                if eqn.invars[0] is not key or eqn.params["bit_width"] != 32:
                    return False
            elif _is_call(eqn):
                inner = eqn.params["jaxpr"].jaxpr
                passed = [a for a, b in zip(inner.invars, eqn.invars, strict=True) if b is key]
                if not each(inner, passed[0] if passed else None):
                    return False
            elif operation not in ELEMENTWISE:
                return False
        return True

    scalars = math.prod(shape) > 1 and all(x.aval.size == 1 for x in eqn.invars[1:])
    return scalars and each(closed.jaxpr, closed.jaxpr.invars[0]) and len(drawn) == 1


def _calls_draws(eqn: JaxprEqn) -> bool:
    """Whether a call, or one within it, calls what draws in such a way."""
    calls = [inner for inner in eqn.params["jaxpr"].jaxpr.eqns if _is_call(inner)]
    return any(_draws_each(inner) or _calls_draws(inner) for inner in calls)


def _is_threefry(key: Array) -> bool:
    name = str(jax.random.key_impl(key))
    return name == "threefry2x32" and jax.config.jax_threefry_partitionable


def _block(
    closed: ClosedJaxpr, length: int, start: UInt32[Array, ""], args: list[Any]
) -> Shaped[Array, "length"]:
    """Numbers at `start` and behind of what such a call draws."""
    key, *others = args
    words = jax.random.key_data(key)
    places = start + jax.lax.iota(jnp.uint32, length)
    high, low = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(places), places)

    def call(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        if eqn.primitive.name == "random_bits":
            return [high ^ low]
        if eqn.primitive.name == "broadcast_in_dim":  # a number stays one, whatever the rank
            return values
        return _walk(eqn.params["jaxpr"], values, call) if _is_call(eqn) else _plainly(eqn, values)

    [numbers] = _walk(closed, [key, *(jnp.reshape(x, ()) for x in others)], call)
    return numbers


def _buffer(x: jax.Array) -> int:
    return x.addressable_data(0).unsafe_buffer_pointer()


def _alone(x: Any, taken: set[int]) -> jax.Array:
    """`x` in memory of its own: a step that is given the state uses each part up."""
    if not isinstance(x, jax.Array):
        return jax.device_put(x, may_alias=False)
    if _buffer(x) in taken:
        x = jnp.array(x, copy=True)
    taken.add(_buffer(x))
    return x
