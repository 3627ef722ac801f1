"""Which body a call runs.

The body is chosen by the platform that is compiled for (`lazy.py`), never by the process's default
device, so that programs for TPU and CUDA can be compiled on any host. Whether a platform's Pallas
body is used at all says `tuning/dispatch.json`, by operation and size; `explain` tells a caller.
"""

import functools
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.lazy import Body, Choice

IMPLEMENTATIONS = (None, "xla", "pallas_tpu", "pallas_gpu", "cudnn", "mosaic_gpu")
ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32", jax.lax.Precision.DEFAULT)
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose None (by platform), "
            "'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn' or 'mosaic_gpu'."
        )


def stated_precision(precision):
    """The precision of a call: the argument, or what `jax.default_matmul_precision` says now."""
    return jax.config.jax_default_matmul_precision if precision is None else precision


def floats_alike(query, key, value):
    """The arrays in the one floating type that holds them all.

    Raises:
      TypeError: if one is not floating-point.
    """
    arrays = query, key, value
    for name, t in zip(("query", "key", "value"), arrays, strict=True):
        if not jnp.issubdtype(t.dtype, jnp.floating) or jnp.finfo(t.dtype).bits < 16:
            raise TypeError(
                f"{name} is {t.dtype}; attention takes float16, bfloat16, float32 and float64: "
                "convert it first."
            )
    one = jnp.result_type(*(t.dtype for t in arrays))
    return tuple(t.astype(one) for t in arrays)


def for_kernel(problem, dtype):
    """A problem whose precision kernels can compile.

    Products of 16-bit numbers are exact in float32, and Mosaic takes no other word for them. Of
    float32 there are two kinds: one pass, and full precision for whatever asks for more.
    """
    given = problem.precision
    parts = given if isinstance(given, tuple) else (given,)
    one_pass = all(p in ONE_PASS for p in parts)
    full = dtype.itemsize > 2 and not one_pass
    precision = jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
    return replace(problem, precision=precision)


@functools.cache
def _table() -> dict:
    source = importlib.resources.files("kernels_pallas") / "tuning" / "dispatch.json"
    return json.loads(source.read_text())


def reason_for_xla(operation: str, platform: str, keys: int) -> str | None:
    """Why the table sends a call to XLA on a platform, or None if Pallas runs it."""
    row = _table()[operation][platform]
    if not isinstance(keys, int):
        return "export leaves the size open"
    if row["min_keys"] is not None and keys >= row["min_keys"]:
        return None
    bound = "any size" if row["min_keys"] is None else f"fewer than {row['min_keys']} keys"
    return f"the table sends {bound} to XLA ({row['why']})"


def choose(
    implementation: str | None,
    operation: str,
    size: int,
    refusal: Callable[[str], str | None] = lambda platform: None,
    *,
    plain: Body,
    plain_on_cpu: Body | None = None,
    pallas: dict[str, Body] | None = None,
    interpreted: dict[str, Body] | None = None,
    cudnn: Body | None = None,
    no_cudnn: str | None = "only attention has a body by cuDNN",
    mosaic: Body | None = None,
) -> Choice:
    """The bodies that a call may run, by platform, and tells `explain` why.

    `"pallas_tpu"` and `"pallas_gpu"` run on the CPU in Pallas's interpreter.

    Args:
      implementation: what the caller asked for, or None.
      operation: a row of the table.
      size: what the row counts, such as keys; a size that export leaves open goes to XLA.
      refusal: of a platform: why its Pallas body cannot run the call, or None.
      plain: the plain JAX body.
      plain_on_cpu: the same for CPUs, if that is another.
      pallas: the kernels by platform; None where an operation has none.
      interpreted: the same kernels in Pallas's interpreter.
      cudnn: the body by cuDNN, where an operation has one.
      no_cudnn: why it cannot run the call, or None.
      mosaic: the kernels in Mosaic GPU, where an operation has them; never chosen by default.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    check_implementation(implementation)
    if pallas is None:
        refusal = lambda platform: _table()[operation][platform]["why"]  # noqa: E731
    cpu = (("cpu", plain_on_cpu),) if plain_on_cpu else ()
    if implementation in PLATFORM_OF:
        platform = PLATFORM_OF[implementation]
        reason = refusal(platform)
        if platform == "cuda" and not reason and not compat.has_triton():
            reason = f"JAX {jax.__version__} has no Pallas-Triton any more"
        if reason:
            raise ValueError(f"implementation={implementation!r}: {reason}.")
        tell({platform: f"{implementation} (asked for)", "cpu": "its interpreter"})
        return Choice(pallas[platform], (("cpu", interpreted[platform]),), plain, cpu)
    if implementation in ("cudnn", "mosaic_gpu"):
        body, reason = cudnn, no_cudnn
        if implementation == "mosaic_gpu":
            body, reason = mosaic, "only attention has a body in Mosaic GPU"
            reason = refusal(implementation) if mosaic else reason
        if reason:
            raise ValueError(f"implementation={implementation!r}: {reason}.")
        elsewhere = f"xla, because {implementation} was asked for"
        tell({"cuda": f"{implementation} (asked for)", "cpu": "xla", "tpu": elsewhere})
        return Choice(plain, (*cpu, ("cuda", body)), plain, cpu)
    lines, platforms = {"cpu": "xla"}, list(cpu)
    for name, platform in PLATFORM_OF.items():
        reason = "xla was asked for" if implementation else None
        reason = reason or refusal(platform) or reason_for_xla(operation, platform, size)
        lines[platform] = f"xla, because {reason}" if reason else name
        if not reason:
            platforms.append((platform, pallas[platform]))
        elif platform == "cuda" and not no_cudnn and not implementation:
            lines[platform] = "cudnn; xla where the process has no device for it"
            platforms.append((platform, cudnn))
    tell(lines)
    return Choice(plain, tuple(platforms), plain, cpu)


def explain(function: Callable, *arrays, **options) -> str:
    """Which body a call would run on each platform, and why.

    Args:
      function: `kernels_pallas.attention` or `kernels_pallas.window_attention`.
      *arrays: its arrays, or ShapeDtypeStructs of them.
      **options: its keyword arguments.

    Returns:
      One line for each platform.

        >>> import jax, jax.numpy as jnp, kernels_pallas
        >>> x = jax.ShapeDtypeStruct((2, 197, 6, 64), jnp.bfloat16)
        >>> print(kernels_pallas.explain(kernels_pallas.attention, x, x, x).splitlines()[0])
        cpu: xla
    """
    found: list[dict[str, str]] = []
    _listening.append(found)
    try:
        jax.eval_shape(partial(function, **options), *arrays)
    finally:
        _listening.pop()
    return "\n".join(f"{platform}: {line}" for platform, line in found[0].items())


_listening: list[list] = []


def tell(lines: dict[str, str]) -> None:
    """Reports a choice to the `explain` that listens, if one does."""
    if _listening:
        _listening[-1].append(lines)
