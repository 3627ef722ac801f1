"""The bodies of attention, and which of them a call runs."""

from functools import partial

import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.attention import xla
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.dispatch import Body, Choice


def _xla(which: str, block_bytes: int, problem: Problem, *arrays):
    return getattr(xla, which)(problem, *arrays, block_bytes)


def _tpu(which: str, interpret: bool, problem: Problem, *arrays):
    from kernels_pallas.attention import tpu

    return getattr(tpu, which)(problem, *arrays, interpret=interpret)


def _gpu(which: str, interpret: bool, problem: Problem, *arrays):
    from kernels_pallas.attention import gpu

    return getattr(gpu, which)(problem, *arrays, interpret=interpret)


def _body(run, setting) -> Body:
    return Body(partial(run, "forward", setting), partial(run, "backward", setting))


ON_CPU, ON_ACCELERATOR = _body(_xla, xla.CPU_BLOCK_BYTES), _body(_xla, xla.ACCELERATOR_BLOCK_BYTES)
PALLAS = {"tpu": _body(_tpu, False), "cuda": _body(_gpu, False)}
INTERPRETED = {"tpu": _body(_tpu, True), "cuda": _body(_gpu, True)}


def refusal(platform: str, problem: Problem, x: Operands) -> str | None:
    """Why the Pallas body of a platform cannot run a call, or None."""
    types = (jnp.bfloat16, jnp.float32) + ((jnp.float16,) if platform == "cuda" else ())
    for name in ("query", "key", "value"):
        if getattr(x, name).dtype not in types:
            return (
                f"{name} is {getattr(x, name).dtype}; the {platform} kernel takes "
                f"{' and '.join(t.dtype.name for t in types)}"
            )
    if platform == "cuda" and max(x.query.shape[3], x.value.shape[3]) > 256:
        return f"head_dim {x.query.shape[3]} is above 256, the most the cuda kernel holds"
    return None


def choose(
    implementation: str | None,
    problem: Problem,
    x: Operands,
    operation: str = "attention",
) -> Choice:
    """The bodies that a call may run, by platform.

    `"pallas_tpu"` and `"pallas_gpu"` run on the CPU in Pallas's interpreter.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    dispatch.check_implementation(implementation)
    if implementation in dispatch.PLATFORM_OF:
        platform = dispatch.PLATFORM_OF[implementation]
        if reason := refusal(platform, problem, x):
            raise ValueError(f"implementation={implementation!r}: {reason}.")
        dispatch.tell({platform: f"{implementation} (asked for)", "cpu": "its interpreter"})
        return Choice(PALLAS[platform], (("cpu", INTERPRETED[platform]),))
    platforms = [("cpu", ON_CPU)]
    lines = {"cpu": "xla"}
    for name, platform in dispatch.PLATFORM_OF.items():
        reason = "xla was asked for" if implementation else None
        reason = reason or refusal(platform, problem, x)
        reason = reason or dispatch.reason_for_xla(operation, platform, x.key.shape[2])
        lines[platform] = f"xla, because {reason}" if reason else name
        if not reason:
            platforms.append((platform, PALLAS[platform]))
    dispatch.tell(lines)
    return Choice(ON_ACCELERATOR, tuple(platforms))
