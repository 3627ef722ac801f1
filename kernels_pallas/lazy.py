"""Calls whose body is traced when the platform is known: at lowering, not when the caller traces.

`lax.platform_dependent` traces every branch wherever it stands, so that a process on a CPU pays for
kernels that it never runs. Here a call is one equation of a primitive of our own. It carries a
`Function`: a hashable description that gives the body for a platform, the shapes of its results,
and its derivatives, which are such calls again. So a program for CPU, TPU or CUDA, compiled on any
host, contains the body of that platform and no other, and derivatives of any order and mode exist
whichever body runs: what a body has no rule for is derived from the plain JAX body.

Inside a caller's `jax.shard_map` a body never sees how values vary over the mesh: operands are made
to vary alike before the call (which sums the gradients of replicated ones), and results vary with
them. Nor does it see `jax_enable_x64`, unless its arrays are wide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import compat

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")

call_p = Primitive("kernel_by_platform")
call_p.multiple_results = True


def shape_of(t) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, without its sharding."""
    return jax.ShapeDtypeStruct(t.shape, t.dtype)


class Function:
    """What a call computes. Subclasses are frozen dataclasses, compared by value.

    `outs` are the shapes of the results. Derivatives are those of the plain body unless a subclass
    knows better.
    """

    outs: tuple[jax.ShapeDtypeStruct, ...]

    def body(self, platform: str | None) -> Callable:
        """What runs on a platform: `f(*arrays) -> sequence of arrays`."""
        raise NotImplementedError

    def plain(self, platform: str | None) -> Callable:
        """The same function in code that JAX can differentiate."""
        return self.body(platform)

    def jvp(self, primals, where, tangents):
        """Results and their tangents; `tangents` belong to the primals at the indices `where`."""
        slope = Tangent(self, where, self.outs)
        return call(self, *primals), call(slope, *primals, *tangents)

    def transpose(self, cotangents, arrays, linear):
        """Cotangents of the arrays at the indices `linear`, in which the function is linear."""
        raise NotImplementedError(f"{self} is not linear.")


@dataclass(frozen=True)
class Tangent(Function):
    """The derivative of a function: arrays are its primals, then the tangents of those `where`."""

    function: Function
    where: tuple[int, ...]
    outs: tuple[jax.ShapeDtypeStruct, ...]

    def body(self, platform):
        """The derivative by forward mode."""
        function = self.function.plain(platform)

        def run(*arrays):
            primals, tangents = _split(arrays, len(self.where))
            moving, along = _moving(function, primals, self.where)
            return jax.jvp(along, moving, tuple(tangents))[1]

        return run

    def transpose(self, cotangents, arrays, linear):
        """Reverse mode."""
        primals, _ = _split(arrays, len(self.where))
        where = tuple(self.where[i - len(primals)] for i in linear)
        outs = tuple(shape_of(primals[i]) for i in where)
        return call(Pullback(self.function, where, outs), *primals, *cotangents)


@dataclass(frozen=True)
class Pullback(Function):
    """The transposed derivative: arrays are the primals of a function, then its cotangents."""

    function: Function
    where: tuple[int, ...]
    outs: tuple[jax.ShapeDtypeStruct, ...]

    def body(self, platform):
        """The derivative by reverse mode."""
        function = self.function.plain(platform)

        def run(*arrays):
            primals, cotangents = _split(arrays, len(self.function.outs))
            moving, along = _moving(function, primals, self.where)
            return jax.vjp(along, *moving)[1](tuple(cotangents))

        return run

    def transpose(self, cotangents, arrays, linear):
        """Forward mode again; cotangents that are not asked for count as zeros."""
        primals, given = _split(arrays, len(self.function.outs))
        del given
        tangents = call(Tangent(self.function, self.where, self.function.outs), *primals,
                        *cotangents)  # fmt: skip
        return [tangents[i - len(primals)] for i in linear]


@dataclass(frozen=True)
class Mapped(Function):
    """A function under `vmap`: `axes` of its arrays (None where one is shared); results lead."""

    function: Function
    axes: tuple[int | None, ...]
    size: int

    @property
    def outs(self):
        """The results with the mapped axis in front."""
        return tuple(
            jax.ShapeDtypeStruct((self.size, *t.shape), t.dtype) for t in self.function.outs
        )

    def body(self, platform):
        """The body under `vmap`."""
        return self._map(lambda *arrays: tuple(self.function.body(platform)(*arrays)))

    def plain(self, platform):
        """The plain body under `vmap`."""
        return self._map(lambda *arrays: tuple(self.function.plain(platform)(*arrays)))

    def _map(self, function, *more):
        axes = (*self.axes, *more)
        return jax.vmap(function, in_axes=axes, axis_size=self.size)

    def jvp(self, primals, where, tangents):
        """The function's own derivative under `vmap`."""

        def one(*arrays):
            primals, tangents = _split(arrays, len(where))
            outs, slopes = self.function.jvp(primals, where, tangents)
            return tuple(outs), tuple(slopes)

        return self._map(one, *(self.axes[i] for i in where))(*primals, *tangents)

    def transpose(self, cotangents, arrays, linear):
        """The function's own transpose under `vmap`; summed for shared arrays."""
        known = [i for i in range(len(arrays)) if i not in linear]

        def one(*given):
            given, cotangents = _split(given, len(self.outs))
            inner = list(arrays)
            for i, t in zip(known, given, strict=True):
                inner[i] = t
            for i in linear:
                inner[i] = _without(arrays[i], self.axes[i])
            return tuple(self.function.transpose(cotangents, inner, linear))

        axes = (*(self.axes[i] for i in known), *(0 for _ in cotangents))
        mapped = jax.vmap(one, in_axes=axes, axis_size=self.size)
        found = mapped(*(arrays[i] for i in known), *cotangents)
        return [
            t.sum(0) if self.axes[i] is None else jnp.moveaxis(t, 0, self.axes[i])
            for i, t in zip(linear, found, strict=True)
        ]


def _without(t, axis):
    """The shape of one entry along a mapped axis."""
    shape = [n for i, n in enumerate(t.shape) if i != axis]
    return jax.ShapeDtypeStruct(shape, t.dtype)


def _split(arrays, last: int):
    """All but the last `last`, and those."""
    first = len(arrays) - last
    return list(arrays[:first]), list(arrays[first:])


def _moving(function, primals, where):
    """`(primals at where, function of them alone)`."""

    def along(*moving):
        every = list(primals)
        for i, t in zip(where, moving, strict=True):
            every[i] = t
        return tuple(function(*every))

    return tuple(primals[i] for i in where), along


# --- operations with a forward and a backward body --------------------------------------------
@dataclass(frozen=True)
class Body:
    """One implementation of an operation.

    Attributes:
      forward: `f(problem, operands, keep) -> (results, saved)`, two tuples; `saved` is what the
        backward pass wants besides the results, only with `keep`.
      backward: `f(problem, operands, results, saved, cotangents) -> gradients`, a NamedTuple like
        the operands; None where an operand is absent or no float.
    """

    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Choice:
    """The bodies of an operation by platform, and where derivatives of higher order come from.

    Attributes:
      default: the body of platforms that are not named.
      platforms: `(platform, body)` of the others.
      plain: the plain JAX body for a platform, which JAX can differentiate.
      plain_platforms: the same, by platform.
    """

    default: Body
    platforms: tuple[tuple[str, Body], ...] = ()
    plain: Body | None = None
    plain_platforms: tuple[tuple[str, Body], ...] = ()

    def on(self, platform: str | None) -> Body:
        """The body that runs on a platform."""
        return dict(self.platforms).get(platform, self.default)

    def plain_on(self, platform: str | None) -> Body:
        """The plain JAX body of a platform."""
        return dict(self.plain_platforms).get(platform, self.plain or self.default)


@dataclass(frozen=True)
class _Operation:
    """The static part of a call: bodies, problem, and how flat arrays become operands."""

    choice: Choice
    problem: object
    tree: object  # of the operands
    count: int  # arrays of the operands
    results: tuple[jax.ShapeDtypeStruct, ...]
    saved: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]

    def operands(self, arrays):
        return jax.tree.unflatten(self.tree, arrays)


@dataclass(frozen=True)
class _Forward(Function):
    operation: _Operation
    keep: bool

    @property
    def outs(self):
        return self.operation.results + (self.operation.saved if self.keep else ())

    def _run(self, body, *arrays):
        operation = self.operation
        results, saved = body.forward(operation.problem, operation.operands(arrays), self.keep)
        return (*results, *saved)

    def body(self, platform):
        return partial(self._run, self.operation.choice.on(platform))

    def plain(self, platform):
        return partial(self._run, self.operation.choice.plain_on(platform))

    def jvp(self, primals, where, tangents):
        if self.keep:
            return Function.jvp(self, primals, where, tangents)
        operation = self.operation
        found = call(_Forward(operation, True), *primals)
        named = [
            checkpoint_name(t, operation.names[i]) if i < len(operation.names) else t
            for i, t in enumerate(found)
        ]
        slope = _Slope(operation, where)
        return named[: len(operation.results)], call(slope, *primals, *named, *tangents)


@dataclass(frozen=True)
class _Slope(Function):
    """Arrays: operands, results, saved, tangents of the operands at `where`."""

    operation: _Operation
    where: tuple[int, ...]

    @property
    def outs(self):
        return self.operation.results

    def body(self, platform):
        count, forward = self.operation.count, _Forward(self.operation, False)
        tangent = Tangent(forward, self.where, forward.outs).body(platform)
        return lambda *arrays: tangent(*arrays[:count], *arrays[len(arrays) - len(self.where) :])

    def transpose(self, cotangents, arrays, linear):
        given, _ = _split(arrays, len(self.where))
        where = tuple(self.where[i - len(given)] for i in linear)
        outs = tuple(shape_of(given[i]) for i in where)
        return call(_Backward(self.operation, where, outs), *given, *cotangents)


@dataclass(frozen=True)
class _Backward(Function):
    """Arrays: operands, results, saved, cotangents of the results. Gradients of those `where`."""

    operation: _Operation
    where: tuple[int, ...]
    outs: tuple[jax.ShapeDtypeStruct, ...]

    def _run(self, body, *arrays):
        operation, count = self.operation, self.operation.count
        given, cotangents = _split(arrays, len(operation.results))
        results, saved = _split(given[count:], len(operation.saved))
        x = operation.operands(given[:count])
        grads = body.backward(operation.problem, x, results, saved, cotangents)
        leaves = jax.tree.flatten(grads, is_leaf=lambda t: t is None)[0]
        absent = jax.tree.flatten(x, is_leaf=lambda t: t is None)[0]
        flat = [g for g, t in zip(leaves, absent, strict=True) if t is not None]
        return [
            jnp.zeros(out.shape, out.dtype) if flat[i] is None else flat[i].astype(out.dtype)
            for i, out in zip(self.where, self.outs, strict=True)
        ]

    def body(self, platform):
        return partial(self._run, self.operation.choice.on(platform))

    def plain(self, platform):
        return partial(self._run, self.operation.choice.plain_on(platform))

    def transpose(self, cotangents, arrays, linear):
        given, _ = _split(arrays, len(self.operation.results))
        tangents = call(_Slope(self.operation, self.where), *given, *cotangents)
        return [tangents[i - len(given)] for i in linear]


def run(choice: Choice, problem, operands, results, saved=(), names=()):
    """An operation with its derivatives.

    Args:
      choice: its bodies.
      problem: the static part, hashable.
      operands: a NamedTuple of arrays and Nones.
      results: shapes of the results.
      saved: shapes of what else the forward pass keeps for the backward pass.
      names: of results and of what is saved, for remat policies.

    Returns:
      The results, a list.
    """
    arrays, tree = jax.tree.flatten(operands)
    operation = _Operation(
        choice, problem, tree, len(arrays),
        tuple(map(shape_of, results)), tuple(map(shape_of, saved)), tuple(names),
    )  # fmt: skip
    return call(_Forward(operation, False), *arrays)


# --- the primitive -----------------------------------------------------------------------------
def call(function: Function, *arrays) -> Sequence:
    """The results of a function, by the body of the platform that the program is lowered for."""
    return call_p.bind(*_varying_alike(arrays), function=function)


def program(equation, platform: str):
    """What a call in a jaxpr runs on a platform, as a jaxpr: for whoever counts its work."""
    shapes = [shape_of(v.aval) for v in equation.invars]
    body = equation.params["function"].body(platform)
    return jax.make_jaxpr(lambda *arrays: tuple(body(*arrays)))(*shapes)


def _varying(t) -> frozenset:
    """The manual mesh axes over which a value varies."""
    aval = jax.typeof(t)
    found = getattr(aval, "manual_axis_type", None)
    return aval.vma if found is None else found.varying


def _varying_alike(arrays):
    arrays = [t if hasattr(t, "aval") else jnp.asarray(t) for t in arrays]
    every = [_varying(t) for t in arrays]
    union = frozenset().union(*every)
    if not union:
        return arrays
    return [
        jax.lax.pcast(t, tuple(sorted(union - own)), to="varying") if union - own else t
        for t, own in zip(arrays, every, strict=True)
    ]


@call_p.def_abstract_eval
def _(*avals, function: Function):
    def like(out):  # varies over the mesh as the operands do
        if not avals:
            return jax.core.ShapedArray(out.shape, out.dtype)
        spec = PartitionSpec(*(None for _ in out.shape))
        sharding = NamedSharding(avals[0].sharding.mesh, spec)
        return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

    return [like(out) for out in function.outs]


@partial(jax.jit, static_argnames="function")
def _compiled(*arrays, function):
    return call_p.bind(*arrays, function=function)


@call_p.def_impl
def _(*arrays, function: Function):
    if jax.config.jax_disable_jit:
        return list(function.body(jax.default_backend())(*arrays))
    return list(_compiled(*arrays, function=function))


def _lower(platform, context, *arrays, function: Function):
    plain = [jax.core.ShapedArray(a.shape, a.dtype, sharding=a.sharding) for a in context.avals_in]
    rule = mlir.lower_fun(lambda *t: list(function.body(platform)(*t)), multiple_results=True)
    wide = any(_is_wide(t) for t in (*plain, *function.outs))
    with compat.as_if_alone(wide):
        return rule(context.replace(avals_in=plain), *arrays)


def _is_wide(t) -> bool:
    return t.dtype.itemsize == 8 and t.dtype.kind in "fiu"


mlir.register_lowering(call_p, partial(_lower, None))
for _platform in PLATFORMS:
    mlir.register_lowering(call_p, partial(_lower, _platform), platform=_platform)


def _jvp(primals, tangents, *, function: Function):
    where = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    outs, slopes = function.jvp(primals, where, [tangents[i] for i in where])
    return list(outs), list(slopes)


def _transpose(cotangents, *arrays, function: Function):
    linear = tuple(i for i, t in enumerate(arrays) if ad.is_undefined_primal(t))
    known = [t.aval if ad.is_undefined_primal(t) else t for t in arrays]
    if all(type(t) is ad.Zero for t in cotangents):
        return [ad.Zero(known[i]) if i in linear else None for i in range(len(arrays))]
    found = function.transpose([ad.instantiate_zeros(t) for t in cotangents], known, linear)
    by_index = dict(zip(linear, found, strict=True))
    return [by_index.get(i) for i in range(len(arrays))]


def _batch(arrays, axes, *, function: Function):
    size = next(t.shape[a] for t, a in zip(arrays, axes, strict=True) if a is not None)
    outs = call(Mapped(function, tuple(axes), size), *arrays)
    return outs, [0] * len(outs)


ad.primitive_jvps[call_p] = _jvp
ad.primitive_transposes[call_p] = _transpose
batching.primitive_batchers[call_p] = _batch
