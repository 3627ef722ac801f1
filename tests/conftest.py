"""How the tests run: on the CPU unless told otherwise, compiled fast rather than to run fast.

Most of their time is compilation, which takes less than half as long without LLVM's optimisations.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
