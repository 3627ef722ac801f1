"""Forward and training step of zoo models against the same models in PyTorch eager.

    pip install -e . torch torchvision timm transformers
    python benchmarks/models.py              # ViT-S/16, Swin-T, BERT-base; batch 8, float32
    python benchmarks/models.py --models swin_tiny_patch4_window7_224 --rounds 21
    python benchmarks/models.py --models swin_tiny_patch244_window877_kinetics400_1k --batch 1
    python benchmarks/models.py --static     # windowed backbones on a TPU v5e; no torch, no TPU

Both run in this process on the same cores, with the same weights (converted by `zoo.convert`, and
given back by `zoo.export` bit for bit, or the benchmark stops), in turn: torch, zoo, torch, zoo,
... Reported are medians, the ratio zoo / torch of the medians (below 1 the zoo is faster), the
largest difference of the outputs beside their scale, the seconds XLA takes to compile the step, and
the seconds from a created model to the end of its first training step (tracing, compiling,
initialising and running). A step is forward, cross-entropy loss, backward and an AdamW update of
float32 parameters. Video Swin is measured against torchvision's, on clips of size `--clip`.

`--static` compiles forward and the gradient of the loss for one v5e (needs libtpu), computing in
bfloat16 with float32 parameters, once with the windows and neighbourhoods by XLA and once by the
Pallas kernels. As `zoo plan` does, it stops each compile at the program that is scheduled and has
its buffers: `HBM` is what XLA assigned, arguments and results included; `moved` is the traffic by
the operands and results of that program's instructions, loops as often as they run
(`zoo.planning.hlo`). A kernel's call counts its operands and results once, whatever it reads in
again: there Pallas looks better than it may be. Nothing here is a time.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the compilation has to be measured, not found in a cache
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "bert_base_uncased")
WINDOWED = (
    "swin_tiny_patch4_window7_224",
    "swin_vsa_tiny_window7_224",
    "CSWin_64_12211_tiny_224",
    "ViTAEv2_VSA_S",
    "dinat_tiny",
    "swin_tiny_patch244_window877_kinetics400_1k",
)
CLASSES, CLIP_CLASSES = 1000, 400


def torch_model(name: str):
    """(module, its state dict as the zoo reads it, a function of a batch that gives logits)."""
    import torch

    if name.startswith("bert"):
        import transformers

        config = transformers.BertConfig(num_labels=2, attn_implementation="sdpa")
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = transformers.BertForSequenceClassification(config)

        def call(tokens):
            return model(input_ids=tokens).logits

    elif "patch244" in name:
        from torchvision.models import video

        model = call = getattr(video, f"swin3d_{name.split('_')[1][0]}")()
    else:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
        call = model
    state = {k: v.numpy() for k, v in model.state_dict().items() if v.dtype != torch.int64}
    return model, state, call


def make_batch(name: str, args: argparse.Namespace):
    """(inputs as the zoo takes them, the same for torch, labels), as NumPy arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    if name.startswith("bert"):
        tokens = rng.integers(0, 30522, (args.batch, args.length))
        return tokens.astype("int32"), tokens, rng.integers(0, 2, args.batch)
    size, classes = (args.clip, CLIP_CLASSES) if "patch244" in name else ((224, 224), CLASSES)
    images = rng.standard_normal((args.batch, *size, 3)).astype("float32")
    return images, np.moveaxis(images, -1, 1).copy(), rng.integers(0, classes, args.batch)


def torch_runs(name: str, args: argparse.Namespace):
    """(forward, step, state dict, logits) of the PyTorch model."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, state, call = torch_model(name)
    _, inputs, labels = make_batch(name, args)
    inputs, labels = torch.from_numpy(inputs), torch.from_numpy(labels)
    model.eval()  # no dropout on either side
    with torch.no_grad():
        logits = call(inputs).numpy()
    state = {k: v.copy() for k, v in state.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def forward():
        with torch.no_grad():
            call(inputs)

    def step():
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(call(inputs), labels).backward()
        optimizer.step()

    return forward, step, state, logits


def given_back(model, params, state: dict) -> bool:
    """Whether `zoo.export` writes this state dict, in one of the system's published namings."""
    import numpy as np

    import zoo
    from zoo.registry import system

    for layout in system(model).layouts:
        try:
            back = zoo.export(model, {"params": params}, layout)
        except ValueError:  # a naming that has no place for some part of the model
            continue
        if all(name in back and np.array_equal(back[name], state[name]) for name in state):
            return True
    return False


def zoo_runs(name: str, args: argparse.Namespace, state: dict):
    """(forward, step, logits, seconds to compile the step, seconds to the first step)."""
    import jax
    import jax.numpy as jnp
    import optax

    import zoo

    if name.startswith("bert"):
        model = zoo.create("bert_base_uncased_classification", num_classes=2)
    else:
        model = zoo.create(name, drop_path=0.0)
    inputs, _, labels = make_batch(name, args)
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    optimizer = optax.adamw(1e-4, weight_decay=0.05)

    def loss(params):
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    start = time.perf_counter()
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    opt_state = jax.jit(optimizer.init)(params)
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, opt_state)
    lowering = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - lowering
    jax.block_until_ready(compiled(params, opt_state))
    first_step = time.perf_counter() - start

    # the donated arrays are gone: start again from torch's weights
    params = zoo.convert(model, state)["params"]
    if not given_back(model, params, state):
        raise SystemExit(f"{name}: the exported weights are not those that were converted.")
    apply = jax.jit(lambda params: model.apply({"params": params}, inputs))
    logits = jax.device_get(apply(params))
    held = {"state": (jax.tree.map(jnp.array, params), jax.jit(optimizer.init)(params))}

    def forward():
        apply(params).block_until_ready()

    def step():
        held["state"] = jax.block_until_ready(compiled(*held["state"]))

    return forward, step, logits, compile_seconds, first_step


def interleaved(first: Callable, second: Callable, rounds: int) -> tuple[list, list]:
    """Milliseconds of both, measured in turn, after two calls of each."""
    times: tuple[list, list] = ([], [])
    for i in range(rounds + 2):
        for run, log in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            if i >= 2:
                log.append(1e3 * (time.perf_counter() - start))
    return times


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names (default: those named above)")
    parser.add_argument("--batch", type=int, help="default: 8; static: 64, and an eighth of clips")
    parser.add_argument("--length", type=int, default=128, help="tokens a text")
    parser.add_argument(
        "--clip",
        type=int,
        nargs=3,
        default=(16, 112, 112),
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="size of a clip",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--static", action="store_true", help="compile for a TPU, run nothing")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # one program of --static
    args = parser.parse_args()
    if args.compile:
        return compile_static(*json.loads(args.compile))
    figures = (
        measure(args)
        if not args.static
        else static(args.models or WINDOWED, args.batch or 64, args.clip)
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)


def measure(args: argparse.Namespace) -> dict:
    """Prints a row for each model, PyTorch beside the zoo; returns the figures."""
    args.batch = args.batch or 8
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import numpy as np
    import torch

    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, load "
        f"{os.getloadavg()[0]:.1f}, JAX {jax.__version__}, torch {torch.__version__}, "
        f"batch {args.batch}, float32; median ms of {args.rounds} interleaved rounds"
    )
    row = "{:42} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6} {:>9} {:>9} {:>9}"
    print(row.format("", "forward", "", "", "step", "", "", "compile", "first", "largest"))
    columns = ("torch", "zoo", "ratio", "torch", "zoo", "ratio", "s", "step s", "error")
    print(row.format("model", *columns))
    figures = {}
    for name in args.models or MODELS:
        forward, step, state, want = torch_runs(name, args)
        zoo_forward, zoo_step, got, compile_s, first_s = zoo_runs(name, args, state)
        error = np.abs(got - want).max() / np.abs(want).max()
        medians = [
            statistics.median(times)
            for pair in ((forward, zoo_forward), (step, zoo_step))
            for times in interleaved(*pair, args.rounds)
        ]
        ratios = medians[1] / medians[0], medians[3] / medians[2]
        print(
            row.format(
                name,
                *(f"{m:.1f}" for m in medians[:2]),
                f"{ratios[0]:.2f}",
                *(f"{m:.1f}" for m in medians[2:]),
                f"{ratios[1]:.2f}",
                f"{compile_s:.1f}",
                f"{first_s:.1f}",
                f"{error:.1e}",
            ),
            flush=True,
        )
        figures[name] = {
            "forward_ms": {"torch": medians[0], "zoo": medians[1], "ratio": ratios[0]},
            "step_ms": {"torch": medians[2], "zoo": medians[3], "ratio": ratios[1]},
            "compile_s": compile_s,
            "first_step_s": first_s,
            "relative_error": float(error),
        }
    return figures


if __name__ == "__main__":
    main()
