"""The bodies of the chunked recurrences, and the call that runs one of them."""

import importlib

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, lazy
from kernels_pallas.lazy import Body
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.problem import Gradients, Operands, Problem
from kernels_pallas.spread import SEQUENCE_AXES, divisions, spread


def _plain(narrow: bool) -> Body:
    """The scan over chunks; without `narrow`, bfloat16 is computed in float32."""

    def widened(x):
        if narrow:
            return x
        return Operands(
            *(t if t is None else t.astype(jnp.promote_types(t.dtype, jnp.float32)) for t in x)
        )

    def forward(problem, x, keep):
        out, state, *saved = xla.chunked(problem, widened(x), keep=keep)
        return (out.astype(x.value.dtype), state), tuple(saved)

    def backward(problem, x, results, saved, cotangents):
        return xla.chunked_backward(problem, widened(x), *saved, *cotangents)

    return Body(forward, backward)


def kernel(names: dict[str, str], platform: str, gradients, **options) -> Body:
    """The kernels of a module, imported when one is traced."""

    def module():
        return importlib.import_module(f"kernels_pallas.recurrence.{names[platform]}")

    def forward(problem, x, keep):
        problem = dispatch.for_kernel(problem, x[2].dtype)
        found = module().forward(problem, x, keep=keep, **options)
        return tuple(found[:2]), tuple(found[2:])

    def backward(problem, x, results, saved, cotangents):
        problem = dispatch.for_kernel(problem, x[2].dtype)
        return gradients(*module().backward(problem, x, *saved, *cotangents, **options))

    return Body(forward, backward)


# A CPU's compiler lacks some products of bfloat16.
ON_CPU, ON_ACCELERATOR = _plain(False), _plain(True)
MODULES = {"tpu": "tpu", "cuda": "gpu"}
PALLAS = {name: kernel(MODULES, name, Gradients) for name in MODULES}
INTERPRETED = {name: kernel(MODULES, name, Gradients, interpret=True) for name in MODULES}


def refusal(platform: str, x) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    value = x[2]
    if value.dtype not in (jnp.bfloat16, jnp.float32):
        return f"value is {value.dtype}; the {platform} kernel takes bfloat16 and float32"
    if any(not isinstance(n, int) for n in value.shape):
        return "export leaves a size open"
    return None


def run(implementation: str | None, problem: Problem, x: Operands):
    """Output and final state by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    choice = dispatch.choose(
        implementation, "recurrence", x.value.shape[2], lambda platform: refusal(platform, x),
        plain=ON_ACCELERATOR, plain_on_cpu=ON_CPU, pallas=PALLAS, interpreted=INTERPRETED,
    )  # fmt: skip

    def call(x):
        kept = (*x.state.shape[:2], x.value.shape[2] // problem.chunk, *x.state.shape[2:])
        state = jax.ShapeDtypeStruct(kept, x.state.dtype)
        return tuple(lazy.run(choice, problem, x, (x.value, x.state), (state,)))

    batch, groups = x.query.shape[:2]
    b, h, _ = divisions(
        (x.value, *jax.tree.leaves(x)), "bhl.", batch=lambda n: batch % n == 0,
        heads=lambda n: groups % n == 0, head_axes=SEQUENCE_AXES,
    )  # fmt: skip
    layout = Operands(*(None if t is None else "bh" for t in x))
    return spread(call, x, layout, ("bhl", "bh"), b, h)
