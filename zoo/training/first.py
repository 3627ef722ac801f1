"""The first values of a state, without compiling the program that makes them as one.

A network has hundreds of leaves, of a few dozen shapes. In one program XLA compiles a kernel for
each leaf: its random numbers, the zeros of its moments. Run one operation after the other, those of
equal shapes are compiled once. What takes longest to compile is the generator of random bits, and a
bit depends on the key and on its place among all bits, not on the shape that they are drawn in: it
is compiled for blocks of `BLOCKS` places, and leaves of every shape are made of such blocks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval
from jaxtyping import Array, UInt32

BLOCKS = (1 << 20, 1 << 17, 1 << 14)
"""How many bits (of 32) are drawn at once; a shape is filled with large blocks first."""

Draw = tuple[int, tuple[int, ...]]
"""Which argument of a function is the key, and the shape of what is drawn with it."""


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, run one operation after the other; only those that its outputs need.

    Random numbers are those of the compiled function, what follows them may differ by a rounding.
    """

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        given = [arg for arg, needed in zip(jax.tree.leaves(args), used, strict=True) if needed]
        outputs = jax.device_put(_evaluate(ClosedJaxpr(jaxpr, closed.consts), given))
        taken = {_buffer(x) for x in jax.device_put([*closed.consts, *given])}
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [_alone(output, taken) for output in outputs]
        )

    return run


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """The outputs, operation by operation; functions that draw get their bits from `_bits`."""
    compiled: dict[str, Callable[..., Any]] = {}

    def call(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        if not (_is_call(eqn) and (draws := _draws(eqn.params["jaxpr"].jaxpr))):
            return _plainly(eqn, values)
        if not all(_is_threefry(values[index]) for index, _ in draws):
            return _plainly(eqn, values)
        blocks = [_bits(values[index], shape) for index, shape in draws]
        inner = eqn.params["jaxpr"]
        name = str(inner)
        if name not in compiled or inner.consts:
            shapes = [shape for _, shape in draws]
            compiled[name] = jax.jit(partial(_drawn, inner, shapes))
        return compiled[name](values, blocks)

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


def _draws(jaxpr: Jaxpr) -> list[Draw]:
    """What a function draws, in order; nothing if any of it cannot come from blocks."""
    found: list[Draw | None] = []

    def look(jaxpr: Jaxpr, places: dict[Any, int]) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "random_bits":
                index, shape = places.get(eqn.invars[0]), tuple(eqn.params["shape"])
                simple = eqn.params["bit_width"] == 32 and eqn.invars[0].aval.shape == ()
                found.append((index, shape) if simple and index is not None else None)
            elif _is_call(eqn):
                inner = eqn.params["jaxpr"].jaxpr
                pairs = zip(inner.invars, eqn.invars, strict=True)
                known = {a: b for a, b in pairs if not isinstance(b, Literal)}
                look(inner, {a: places[b] for a, b in known.items() if b in places})

    look(jaxpr, {var: i for i, var in enumerate(jaxpr.invars)})
    return [] if None in found else found


def _drawn(
    closed: ClosedJaxpr, shapes: list[tuple[int, ...]], args: list[Any], blocks: list[list[Array]]
) -> list[Any]:
    """What such a function gives with these bits."""

    def joined() -> Iterator[Array]:
        for shape, parts in zip(shapes, blocks, strict=True):
            yield jnp.concatenate(parts)[: math.prod(shape)].reshape(shape)

    bits = joined()

    def call(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        if eqn.primitive.name == "random_bits":
            return [next(bits)]
        return _walk(eqn.params["jaxpr"], values, call) if _is_call(eqn) else _plainly(eqn, values)

    return _walk(closed, args, call)


def _is_threefry(key: Array) -> bool:
    name = str(jax.random.key_impl(key))
    return name == "threefry2x32" and jax.config.jax_threefry_partitionable


def _bits(key: Array, shape: tuple[int, ...]) -> list[UInt32[Array, "block"]]:
    """Blocks of the bits of this shape; the last is longer than what is left."""
    words, start, size, blocks = jax.random.key_data(key), 0, math.prod(shape), []
    while start < size:
        length = next((b for b in BLOCKS if b <= size - start), BLOCKS[-1])
        blocks.append(_block(words, jnp.uint32(start), length))
        start += length
    return blocks


@partial(jax.jit, static_argnums=2)
def _block(words: UInt32[Array, "2"], start: UInt32[Array, ""], length: int) -> Array:
    """Bits at `start` and behind, as `jax.random.bits` has them."""
    places = start + jax.lax.iota(jnp.uint32, length)
    high, low = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(places), places)
    return high ^ low


def _buffer(x: jax.Array) -> int:
    return x.addressable_data(0).unsafe_buffer_pointer()


def _alone(x: jax.Array, taken: set[int]) -> jax.Array:
    """`x` in memory of its own: a step that is given the state uses each part up."""
    if _buffer(x) in taken:
        x = jnp.array(x, copy=True)
    taken.add(_buffer(x))
    return x
