"""The bodies of attention, and which of them a call runs."""

import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.attention import cudnn, mosaic_gpu, xla
from kernels_pallas.attention.problem import Operands, Problem
from kernels_pallas.lazy import Body, Choice


def plain(block_bytes: int) -> Body:
    """The plain JAX body with blocks of scores of about that size."""

    def forward(problem, x, keep):
        return xla.forward(problem, x, block_bytes, keep), ()

    def backward(problem, x, results, saved, cotangents):
        return xla.backward(problem, x, *results, *cotangents, block_bytes)

    return Body(forward, backward)


def _kernel(name: str, interpret: bool) -> Body:
    def module():
        import importlib

        return importlib.import_module(f"kernels_pallas.attention.{name}")

    def forward(problem, x, keep):
        problem = dispatch.for_kernel(problem, x.value.dtype)
        return module().forward(problem, x, interpret=interpret), ()

    def backward(problem, x, results, saved, cotangents):
        problem = dispatch.for_kernel(problem, x.value.dtype)
        grads = module().backward(problem, x, *results, *cotangents, interpret=interpret)
        if x.bias is not None and x.bias.dtype != bool and grads.bias is None:
            # where the kernels have none; left out of the program if not asked for
            whole = xla.backward(problem, x, *results, *cotangents)
            grads = grads._replace(bias=whole.bias)
        return grads

    return Body(forward, backward)


ON_CPU, ON_ACCELERATOR = plain(xla.CPU_BLOCK_BYTES), plain(xla.ACCELERATOR_BLOCK_BYTES)
MODULES = {"tpu": "tpu", "cuda": "gpu"}
PALLAS = {platform: _kernel(name, False) for platform, name in MODULES.items()}
INTERPRETED = {platform: _kernel(name, True) for platform, name in MODULES.items()}


def _by_cudnn() -> Body:
    def forward(problem, x, keep):
        return cudnn.forward(problem, x), ()

    def backward(problem, x, results, saved, cotangents):
        return cudnn.backward(problem, x, *results, *cotangents)

    return Body(forward, backward)


TYPES = {
    "tpu": (jnp.bfloat16, jnp.float32),
    "cuda": (jnp.bfloat16, jnp.float32, jnp.float16),
    "mosaic_gpu": (jnp.bfloat16, jnp.float16),
}
CUDNN = _by_cudnn()
MOSAIC = _kernel("mosaic_gpu", False)


def refusal(platform: str, problem: Problem, x: Operands) -> str | None:
    """Why the Pallas body of a platform, or "mosaic_gpu", cannot run a call, or None."""
    types = TYPES[platform]
    for name in ("query", "key", "value"):
        if getattr(x, name).dtype not in types:
            return (
                f"{name} is {getattr(x, name).dtype}; the {platform} kernel takes "
                f"{' and '.join(t.dtype.name for t in types)}"
            )
    if problem.arrays or x.captured is not None:
        return "mask or modifier close over arrays, which a kernel cannot read"
    if x.offsets is not None:
        return "query_offset is traced, and a kernel's visits are planned before it runs"
    if any(not isinstance(n, int) for t in (x.query, x.key) for n in t.shape):
        return "export leaves a size open"
    if x.bias is not None and x.bias.dtype not in (jnp.bfloat16, jnp.float32, jnp.bool_):
        return f"bias is {x.bias.dtype}; the kernels take bool, bfloat16 and float32"
    if platform == "mosaic_gpu":
        return mosaic_gpu.refusal(problem, x)
    if platform == "tpu":
        from kernels_pallas.attention import tpu

        return tpu.refusal(problem, x)
    if platform == "cuda" and max(x.query.shape[3], x.value.shape[3]) > 256:
        return f"head_dim {x.query.shape[3]} is above 256, the most the cuda kernel holds"
    return None


def choose(
    implementation: str | None,
    problem: Problem,
    x: Operands,
    operation: str = "attention",
    wants_lse: bool = False,
) -> Choice:
    """The bodies that a call may run, by platform; `wants_lse`: it uses the log-sum-exp.

    Raises:
      ValueError: for an unknown implementation, or one that cannot run the call.
    """
    return dispatch.choose(
        implementation, operation, x.key.shape[2],
        lambda platform: refusal(platform, problem, x),
        plain=ON_ACCELERATOR, plain_on_cpu=ON_CPU, pallas=PALLAS, interpreted=INTERPRETED,
        cudnn=CUDNN, no_cudnn=cudnn.refusal(problem, x, wants_lse),
        mosaic=MOSAIC,
    )  # fmt: skip
