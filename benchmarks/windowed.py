"""Windowed backbones as compiled for a TPU, their windows by XLA and by Pallas; no TPU needed.

    pip install -e '.[tpu]'
    python benchmarks/windowed.py                        # batch 64, and 8 clips
    python benchmarks/windowed.py --models dinat_tiny --batch 128 --json windowed.json

Compiles forward and the gradient of the loss for one v5e (needs libtpu), computing in bfloat16 with
float32 parameters, once with the windows and neighbourhoods by XLA and once by the Pallas kernels.
As `zoo plan` does, it stops each compile at the program that is scheduled and has its buffers:
`HBM` is what XLA assigned, arguments and results included; `moved` is the traffic by the operands
and results of that program's instructions, loops as often as they run (`zoo.planning.hlo`). A
kernel's call counts its operands and results once, whatever it reads in again: there Pallas looks
better than it may be. Nothing here is a time.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# every program has to be compiled, not found in a cache
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

WINDOWED = (
    "swin_tiny_patch4_window7_224",
    "swin_vsa_tiny_window7_224",
    "CSWin_64_12211_tiny_224",
    "ViTAEv2_VSA_S",
    "dinat_tiny",
    "swin_tiny_patch244_window877_kinetics400_1k",
)


def compile_static(name: str, backward: bool, implementation: str, batch: int, clip) -> None:
    """Compile one pass of a model for a v5e, its windows and neighbourhoods by an implementation.

    Only these: other attention runs as always on a TPU.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import kernels_pallas
    import zoo
    from kernels_pallas import aot

    size = {"clip_size": tuple(clip)} if "patch244" in name else {}
    model = zoo.create(name, drop_path=0.0, dtype=jnp.bfloat16, **size)
    (inputs,) = model.example_inputs(batch).values()
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def loss(params, variables, inputs, labels):
        logits = model.apply({**variables, "params": params}, inputs).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def measured(variables, inputs, labels):
        if not backward:
            return model.apply(variables, inputs)
        return jax.grad(loss)(variables["params"], variables, inputs, labels)

    operations = {
        operation: partial(getattr(kernels_pallas, operation), implementation=implementation)
        for operation in ("window_attention", "neighborhood_attention")
    }
    with mock.patch.multiple(kernels_pallas, **operations):
        aot.compile_for_tpu(measured, variables, inputs, labels, mesh=aot.tpu_mesh("v5e"))


def static(names, batch: int, clip) -> dict:
    """Prints Markdown rows, XLA beside Pallas; returns the figures, in bytes."""
    from zoo.planning import compiler

    print("| model | batch | pass | HBM MB: XLA | Pallas | moved MB: XLA | Pallas | kernel calls |")
    print("|---|---|---|---|---|---|---|---|")
    figures = {}
    for name in names:
        count = max(1, batch // 8) if "patch244" in name else batch
        for backward in (False, True):
            found = {}
            for implementation in ("xla", "pallas_tpu"):
                request = json.dumps([name, backward, implementation, count, clip])
                command = [sys.executable, __file__, "--compile", request]
                with tempfile.TemporaryDirectory() as folder:
                    program = compiler.scheduled(command, Path(folder), "measured")
                    if program is None:
                        log = (Path(folder) / "log.txt").read_text()
                        raise SystemExit(f"{request} did not compile:\n{log[-2000:]}")
                module, (hbm, _) = program
                calls = sum(
                    'custom_call_target="tpu_custom_call"' in instruction.text
                    for computation in module.computations.values()
                    for instruction in computation.instructions.values()
                )
                found[implementation] = {"hbm": hbm, "moved": module.traffic(), "kernels": calls}
            xla, ours = found.values()
            which = "gradient" if backward else "forward"
            cells = (f"{f[k] / 1e6:,.0f}" for k in ("hbm", "moved") for f in (xla, ours))
            row = (name, str(count), which, *cells, str(ours["kernels"]))
            print(f"| {' | '.join(row)} |", flush=True)
            figures[f"{name} {which}"] = found
    return figures


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=WINDOWED, help="names of variants")
    parser.add_argument("--batch", type=int, default=64, help="images; an eighth of it of clips")
    parser.add_argument(
        "--clip",
        type=int,
        nargs=3,
        default=(16, 112, 112),
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="size of a clip",
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # one program
    args = parser.parse_args()
    if args.compile:
        return compile_static(*json.loads(args.compile))
    figures = static(args.models, args.batch, args.clip)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
