"""How the tests run: on the CPU unless told otherwise, compiled fast rather than to run fast.

Most of their time is compilation. LLVM's optimisations are half of it, and XLA's emitters by fusion
half of what remains. JAX 0.10 can do without these too; it is told by a flag that libtpu, which
reads the same variable later, does not know, so that the flag is gone when the backend has it.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
if version("jax").startswith("0.10."):
    import jax

    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.devices("cpu")
    os.environ["XLA_FLAGS"] = flags
