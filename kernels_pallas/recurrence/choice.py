"""The bodies of the chunked recurrences, and which of them a call runs.

`choose` and `split` serve the other recurrences too.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Body, Choice
from kernels_pallas.recurrence import xla
from kernels_pallas.recurrence.tile import Gradients, Operands, Problem


def _xla_forward(keep: bool, problem: Problem, x: Operands):
    return xla.chunked(problem, x, keep=keep)


def _xla_backward(problem: Problem, x: Operands, states, *cotangents):
    _, pull = jax.vjp(lambda x: xla.chunked(problem, x), x)
    return Gradients(*pull(cotangents)[0])


def _tpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.recurrence import tpu

    return getattr(tpu, which)(problem, *arrays, **options)


def _gpu(which: str, problem: Problem, *arrays, **options):
    from kernels_pallas.recurrence import gpu

    return getattr(gpu, which)(problem, *arrays, **options)


def _body(run, **options) -> dict[bool, Body]:
    """By whether the states before the chunks are wanted."""
    backward = partial(run, "backward", **options)
    return {
        keep: Body(partial(run, "forward", keep=keep, **options), backward)
        for keep in (False, True)
    }


XLA = {keep: Body(partial(_xla_forward, keep), _xla_backward) for keep in (False, True)}
PALLAS = {"tpu": _body(_tpu), "cuda": _body(_gpu)}
INTERPRETED = {"tpu": _body(_tpu, interpret=True), "cuda": _body(_gpu, interpret=True)}


def refusal(platform: str, x: Operands) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    if x.value.dtype not in (jnp.bfloat16, jnp.float32):
        return f"value is {x.value.dtype}; the {platform} kernel takes bfloat16 and float32"
    return None


def run(implementation: str | None, problem: Problem, x: Operands):
    """Output and final state by the body that the call may run.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    bodies = choose(
        implementation, "recurrence", x.value.shape[2], lambda platform: refusal(platform, x),
        XLA, PALLAS, INTERPRETED,
    )  # fmt: skip
    if bodies is None:
        return xla.chunked(problem, x)  # not a custom_vjp: derivatives of any order and mode

    def specs(b, h):
        return Operands(*(None if t is None else P(b, h) for t in x)), (P(b, h), P(b, h))

    return split(bodies, problem, x, *x.query.shape[:2], specs)


def choose(implementation, operation: str, length: int, refusal, on_xla, pallas, interpreted):
    """`(default body, bodies by platform)` of a call, or None if it runs plain XLA everywhere.

    `"pallas_tpu"` and `"pallas_gpu"` run on the CPU in Pallas's interpreter.

    Args:
      implementation: what the caller asked for, or None.
      operation: a row of the table.
      length: of the sequence.
      refusal: of a platform: why its Pallas body cannot run the call, or None.
      on_xla: the body for platforms without a kernel.
      pallas: bodies by platform.
      interpreted: the same bodies, for the CPU.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    dispatch.check_implementation(implementation)
    if implementation in dispatch.PLATFORM_OF:
        platform = dispatch.PLATFORM_OF[implementation]
        if reason := refusal(platform):
            raise ValueError(f"implementation={implementation!r}: {reason}.")
        dispatch.tell({platform: f"{implementation} (asked for)", "cpu": "its interpreter"})
        return pallas[platform], (("cpu", interpreted[platform]),)
    lines, platforms = {"cpu": "xla"}, []
    for name, platform in dispatch.PLATFORM_OF.items():
        reason = "xla was asked for" if implementation else refusal(platform)
        reason = reason or dispatch.reason_for_xla(operation, platform, length)
        lines[platform] = f"xla, because {reason}" if reason else name
        if not reason:
            platforms.append((platform, pallas[platform]))
    dispatch.tell(lines)
    return (on_xla, tuple(platforms)) if platforms else None


def split(bodies, problem, x, batch: int, heads: int, specs):
    """With a mesh in context, each device computes its share of the batch and of the heads.

    Args:
      bodies: from `choose`.
      problem: the static part.
      x: the operands, a NamedTuple.
      batch: how many rows may be divided.
      heads: how many heads, groups of heads or channels may be divided.
      specs: `specs(batch axes, head axes)` are the specs of the operands and of the results.
    """
    bodies = _Bodies(*bodies)
    axes = dispatch.mesh_axes()
    if not axes:
        return _run(bodies, problem, x)
    b, _ = dispatch.fitting(axes, dispatch.BATCH_AXES, lambda n: batch % n == 0)
    h, _ = dispatch.fitting(axes, dispatch.SEQUENCE_AXES, lambda n: heads % n == 0)
    operands, results = specs(b, h)
    return jax.shard_map(
        partial(_run, bodies, problem), in_specs=(operands,), out_specs=results, check_vma=False
    )(x)


class _Bodies:
    """Choices with and without the states before the chunks; hashable by identity of its parts."""

    def __init__(self, default, platforms):
        self.key = (id(default), tuple((name, id(body)) for name, body in platforms))
        self.choice = {
            keep: Choice(default[keep], tuple((name, body[keep]) for name, body in platforms))
            for keep in (False, True)
        }

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, _Bodies) and self.key == other.key


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(bodies: _Bodies, problem, x):
    return tuple(bodies.choice[False].run("forward", problem, x))


def _forward(bodies, problem, x):
    *results, saved = bodies.choice[True].run("forward", problem, x)
    return tuple(results), (x, saved)


def _backward(bodies, problem, residuals, cotangents):
    x, saved = residuals
    return (type(x)(*bodies.choice[True].run("backward", problem, x, saved, *cotangents)),)


_run.defvjp(_forward, _backward)
