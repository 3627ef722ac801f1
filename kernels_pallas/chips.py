"""What a TPU holds: one figure for each chip, for blocks, limits and refusals alike.

The chip is that of the mesh in context (programs are compiled for described chips, too), else that
of the process. A process without a TPU, and a chip that is not known, count as a v5e.
"""

import jax

MIB = 1 << 20
VMEM = {
    "TPU v4": 16 * MIB,
    "TPU v5 lite": 128 * MIB,
    "TPU v5e": 128 * MIB,
    "TPU v5": 64 * MIB,
    "TPU v5p": 64 * MIB,
    "TPU v6 lite": 128 * MIB,
    "TPU v6e": 128 * MIB,
    "TPU7x": 64 * MIB,
}
"""Vector memory of a core, in bytes, by JAX's name of the chip."""
SCALAR_BYTES = 3 * MIB // 4
"""Of scalar memory, of which every chip has 1 MiB a core, for the tables of a kernel."""


def kind() -> str | None:
    """JAX's name of the chip that a program is for, or None where that is no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def vmem_bytes() -> int:
    """What a kernel may take of vector memory: three quarters, the rest is the compiler's."""
    return VMEM.get(kind(), VMEM["TPU v5e"]) * 3 // 4
