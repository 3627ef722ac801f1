"""Pallas by one name: imported when a kernel is traced, the same for JAX 0.10 and 0.12."""

import contextlib
import importlib.util

import jax


def pallas():
    """`jax.experimental.pallas`."""
    from jax.experimental import pallas

    return pallas


def tpu():
    """`jax.experimental.pallas.tpu`."""
    from jax.experimental.pallas import tpu

    return tpu


def has_triton() -> bool:
    """Whether this JAX has Pallas-Triton; it is deprecated since 0.11 and will go."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def triton():
    """`jax.experimental.pallas.triton`."""
    from jax.experimental.pallas import triton

    return triton


def has_mosaic_gpu() -> bool:
    """Whether this JAX lowers kernels of Pallas's Mosaic GPU as we write them (0.12 and newer)."""
    return jax.__version_info__ >= (0, 12)


def mosaic_gpu():
    """`jax.experimental.pallas.mosaic_gpu`."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def cuda_capability() -> float | None:
    """Compute capability of this process's CUDA device, such as 9.0 for H100; None without one."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None or jax.default_backend() != "gpu":
        return None
    return float(getattr(jax.local_devices()[0], "compute_capability", "0.0"))


def has_cudnn() -> bool:
    """Whether this process has a CUDA device that runs cuDNN's attention (Ampere or newer)."""
    return (cuda_capability() or 0.0) >= 8.0


def cudnn_attention(query, key, value, scale: float, causal: bool):
    """Output `[batch, queries, heads, head_dim]` and log-sum-exp `[batch, heads, queries]`.

    What `jax.nn.dot_product_attention(implementation="cudnn")` calls, which rounds the log-sum-exp
    to the type of the output.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    kind = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    return cudnn.dot_product_attention(
        query, key, value, scale=scale, mask_type=kind, return_residual=True
    )


@contextlib.contextmanager
def as_if_alone(wide: bool):
    """A context for bodies: no manual mesh axes to vary over, and 64 bits only if `wide`."""
    from jax._src import config

    with config._check_vma(False):
        if wide:
            yield
        else:
            with jax.enable_x64(False):
                yield


def strict_interpreter():
    """The TPU interpreter, made to raise on races, stray reads and conflicts of two cores."""
    options = dict(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=2,
        random_seed=3,
    )
    return tpu().InterpretParams(**options)


def races_found() -> bool:
    """Whether the last strict run saw a race (JAX 0.12 raises instead)."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = getattr(interpret_pallas_call, "races", None)
    return bool(races is not None and races.races_found)
