"""What the training step of every system costs to compile, and how large its program is.

    python benchmarks/programs.py                          # all test variants, ten full-size models
    python benchmarks/programs.py --models swin_test gpt2  # some
    python benchmarks/programs.py --json programs.json
    python benchmarks/programs.py --write-budgets          # benchmarks/program_budgets.json

The step is the gradient of the mean square of the outputs, in training (dropout, stochastic depth
and batch statistics as they are by default), and an AdamW update; inputs are the model's
`example_inputs`, one example. `lower` and `compile` are CPU seconds of this process, so that other
work on the machine hardly counts; no program is run. `bytes` is the length of the text of the
optimised program for this machine's CPU, without names and places in source files; it is the same
each time, and `tests/test_program_budgets.py` keeps some of it from growing.
"""

import argparse
import json
import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# every program has to be compiled, not found in a cache
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jax.numpy as jnp
import optax

import zoo
from zoo.tasks.apply import apply_model, zeros_like_inputs

BUDGETS = Path(__file__).with_name("program_budgets.json")
FULL_SIZE = (
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "CSWin_64_12211_tiny_224",
    "dinat_tiny",
    "swin_tiny_patch244_window877_kinetics400_1k",
    "bert_base_uncased",
    "gpt2",
    "mamba2_130m",
    "itransformer_ecl_96_96",
    "autoformer_ettm1_96_96",
)
ANNOTATIONS = re.compile(r", (?:metadata|frontend_attributes)=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")


def training_step(model: Any) -> tuple[Any, Any]:
    """The step `(params, opt_state, others, inputs, key) -> the first three`, and its optimizer."""
    optimizer = optax.adamw(1e-3, weight_decay=0.05)

    def loss(params: Any, others: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
        output, new = apply_model(model, {"params": params, **others}, inputs, key, True)
        floats = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x.astype(jnp.float32) ** 2).mean() for x in floats), {**others, **new}

    def step(params: Any, opt_state: Any, others: Any, inputs: Any, key: Any) -> Any:
        grads, others = jax.grad(loss, has_aux=True, allow_int=True)(params, others, inputs, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, others

    return jax.jit(step, donate_argnums=(0, 1, 2)), optimizer


def lowered_step(name: str) -> Any:
    """The training step of a variant, lowered; nothing is computed."""
    model = zoo.create(name)
    inputs = jax.eval_shape(lambda: zeros_like_inputs(model))
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = dict(jax.eval_shape(lambda key, inputs: model.init(key, **inputs), key, inputs))
    params = variables.pop("params")
    step, optimizer = training_step(model)
    return step.lower(params, jax.eval_shape(optimizer.init, params), variables, inputs, key)


def size_of(compiled: Any) -> int:
    """Bytes of the program's text, without what says where it comes from."""
    return len(ANNOTATIONS.sub("", compiled.as_text()))


def cpu_seconds() -> float:
    """That this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str) -> dict[str, float]:
    """Figures of one variant."""
    begun = cpu_seconds()
    lowered = lowered_step(name)
    between = cpu_seconds()
    compiled = lowered.compile()
    ended = cpu_seconds()
    return {"lower_s": between - begun, "compile_s": ended - between, "bytes": size_of(compiled)}


def table(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Prints a Markdown row for each variant, and gives the figures."""
    print("| variant | lower CPU s | compile CPU s | program KB |\n|---|---|---|---|", flush=True)
    figures = {}
    for name in names:
        try:
            of = figures[name] = measure(name)
        except Exception as error:  # the others are still wanted
            reason = (str(error).splitlines() or [""])[0]
            print(f"{name}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
            continue
        cells = f"{of['lower_s']:.1f} | {of['compile_s']:.1f} | {of['bytes'] / 1e3:,.0f}"
        print(f"| {name} | {cells} |", flush=True)
    return figures


def main() -> None:
    """Prints the table; the exit status is 1 if a variant has no program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names of variants")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument(
        "--write-budgets", action="store_true", help="of the variants that have a budget"
    )
    args = parser.parse_args()
    names = args.models or [*zoo.list_models("*_test"), *FULL_SIZE]
    names = list(json.loads(BUDGETS.read_text())) if args.write_budgets else names
    figures = table(names)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    if args.write_budgets:
        sizes = {name: of["bytes"] for name, of in figures.items()}
        BUDGETS.write_text(json.dumps(sizes, indent=2) + "\n")
    if len(figures) < len(names):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
