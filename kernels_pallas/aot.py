"""Compiling for accelerators that are not there: TPU programs and GPU kernels on a CPU host.

TPU compiles need the `libtpu` package, and two settings before JAX starts its backends, which
`prepare` makes: without them processes wait for a metadata server or stop at libtpu's lock file.

GPU kernels are lowered by JAX as far as Triton's IR. The `triton` package compiles that IR to
machine code of a GPU generation, with an assembler of its own: no CUDA is needed. On a GPU JAX uses
the Triton inside XLA instead, so registers there may differ a little from those reported here.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
CHIPS = ("v5e", "v6e")
"""Those whose static figures stand in the README."""
H100 = "NVIDIA H100 80GB HBM3"


def prepare() -> None:
    """Environment for ahead-of-time TPU compiles; call it before the first use of JAX."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def can_compile_for_tpu() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(chip: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh over described devices of a chip of `TOPOLOGIES`, up to four of them."""
    import numpy as np
    from jax.experimental import topologies

    prepare()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    count = int(np.prod(shape))
    types = (AxisType.Auto,) * len(shape)
    return Mesh(np.asarray(devices[:count]).reshape(shape), names, axis_types=types)


def compile_for_tpu(function, *arguments, mesh: Mesh, specs=None):
    """The compiled program of `function` for the mesh's chips.

    Args:
      function: any JAX function.
      *arguments: arrays or ShapeDtypeStructs, as pytrees.
      mesh: from `tpu_mesh`.
      specs: a PartitionSpec for each argument leaf, as a matching pytree; None replicates.
    """

    def describe(t, spec=None):
        sharding = NamedSharding(mesh, spec if spec is not None else PartitionSpec())
        return jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=sharding)

    if specs is None:
        described = jax.tree.map(describe, arguments)
    else:
        described = jax.tree.map(describe, arguments, specs)
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*described)
        return traced.lower(lowering_platforms=("tpu",)).compile()


@contextlib.contextmanager
def described_gpu(kind: str = H100):
    """A context in which kernels are lowered for that GPU without having one."""
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("d",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lower_for_cuda(function, *arguments, kind: str = H100):
    """The lowered program of `function` for CUDA, as `jax.stages.Lowered`."""
    with described_gpu(kind):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


class GpuKernel(NamedTuple):
    """One compiled GPU kernel: what it occupies, and how it multiplies matrices.

    Attributes:
      name: of the pallas_call.
      warps: of a program.
      registers: of a thread; at most 255.
      stack: bytes of a thread that lie in memory instead of in registers: spills.
      shared: bytes of shared memory of a program.
      tensor_cores: the instructions that feed them, `"wgmma"` or `"mma"`, or None.
    """

    name: str
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_cores: str | None


def can_compile_for_gpu() -> bool:
    """Whether the package `triton`, which compiles GPU kernels on any host, is installed."""
    return importlib.util.find_spec("triton") is not None


def compile_for_gpu(function, *arguments, capability: int = 90) -> list[GpuKernel]:
    """The Pallas-Triton kernels of `function`, compiled to machine code, in program order.

    Args:
      function: any JAX function.
      *arguments: arrays or ShapeDtypeStructs, as pytrees.
      capability: of the GPU: 90 is H100.

    Raises:
      ImportError: without the package `triton`.
    """
    return [_assemble(*kernel, capability) for kernel in _triton_kernels(function, *arguments)]


def _triton_kernels(function, *arguments):
    """`(Triton IR as text, warps, stages)` of each kernel in the program."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    context = ir.Context()
    dialect.register_dialect(context)
    context.allow_unregistered_dialects = True  # jaxlib does not know the dialect of barriers

    def operations(operation):
        for region in operation.regions:
            for block in region.blocks:
                for found in block.operations:
                    yield found.operation
                    yield from operations(found.operation)

    for call in operations(lower_for_cuda(function, *arguments).compiler_ir().operation):
        attributes = call.attributes
        if "call_target_name" not in attributes:
            continue
        if attributes["call_target_name"].value != "__gpu$xla.gpu.triton":
            continue
        config = attributes["mhlo.backend_config"]
        with context:
            module = ir.Module.parse(config["ir"].value_bytes)
            text = module.operation.get_asm(enable_debug_info=False)
            text = re.sub(r'"gpu\.barrier".*', "gpu.barrier", text)
        yield text, config["num_warps"].value, config["num_stages"].value


def _assemble(text, warps, stages, capability) -> GpuKernel:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ttir", Path(folder) / "kernel.cubin"
        source.write_text(text)
        options = dict(num_warps=warps, num_stages=stages)
        kernel = triton.compile(str(source), target=target, options=options)
        binary.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", binary], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    instructions = (word for word in ("wgmma", "mma") if f"{word}." in ptx)
    return GpuKernel(
        name=kernel.metadata.name,
        warps=warps,
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=found["SHARED"] + kernel.metadata.shared,
        tensor_cores=next(instructions, None),
    )
