"""Forward and training step of zoo models against the same models in PyTorch.

    pip install -e . torch torchvision timm transformers
    python benchmarks/models.py                          # all of benchmarks/peers.py, float32
    python benchmarks/models.py --models gpt2 gla_340m --rounds 21
    python benchmarks/models.py --compiled               # torch.compile beside eager
    python benchmarks/models.py --json models.json

Both run in this process on the same cores, with the same weights (converted by `zoo.convert`, and
given back by `zoo.export` bit for bit, or the benchmark stops), in turn: torch, zoo, torch, zoo,
... Their outputs agree to 1e-4 of the outputs' scale, or the benchmark stops. Reported are medians
and the ratio zoo / torch of the medians (below 1 the zoo is faster). A step is forward, loss,
backward and an AdamW update of float32 parameters, without dropout. `--compiled` measures
`torch.compile`'s module in the same rounds (it needs a C++ compiler); its ratio is zoo / compiled.
The first line has the ratio of matrix products alone, which differs from processor to processor.

The other columns are seconds: XLA compiling that step; from `create` to the end of the first step
of the trainer's own program, in a new process with an empty compilation cache; and the same in
another process with the cache that this left (`--no-starts` leaves both out).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the compilation has to be measured, not found in a cache
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

from peers import PEERS, Peer, for_torch, zoo_loss

TOLERANCE = 1e-4  # of the outputs' scale


def torch_runs(peer: Peer, module: Any, model: Any, batch: dict[str, Any]) -> tuple:
    """(forward, step) of a PyTorch module, which learns while its step runs."""
    import torch

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05)
    inputs = peer.inputs(model, batch)

    def forward() -> None:
        with torch.no_grad():
            peer.call(module, *inputs)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer.kind.torch_loss(peer.call(module, *inputs), batch).backward()
        optimizer.step()

    return forward, step


def given_back(model: Any, variables: Any, state: dict) -> bool:
    """Whether `zoo.export` writes this state dict, in one of the system's published namings."""
    import numpy as np

    import zoo
    from zoo.registry import system

    for layout in system(model).layouts:
        try:
            back = zoo.export(model, variables, layout)
        except ValueError:  # a naming that has no place for some part of the model
            continue
        if all(name in back and np.array_equal(back[name], state[name]) for name in state):
            return True
    return False


def zoo_runs(peer: Peer, model: Any, variables: dict, batch: dict[str, Any]) -> tuple:
    """(forward, step, output, seconds to compile the step) of a model of the zoo."""
    import jax
    import jax.numpy as jnp
    import optax

    from zoo.training import Optimizer
    from zoo.training.optimizer import make_optimizer

    others = {name: tree for name, tree in variables.items() if name != "params"}
    batch = jax.tree.map(jnp.asarray, batch)
    optimizer = make_optimizer(Optimizer(name="adamw", weight_decay=0.05), model)
    loss = zoo_loss(peer, model)

    def update(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(loss)(params, others, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: -1e-4 * u, updates)
        return optax.apply_updates(params, updates), opt_state

    # the step uses its arguments up: it gets copies
    params = jax.tree.map(jnp.array, variables["params"])
    held = (params, jax.tree.map(jnp.asarray, optimizer.init(params)))
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*held)
    begun = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begun
    apply = jax.jit(lambda variables: model.apply(variables, *peer.inputs(model, batch)))
    output = jax.device_get(apply(variables))

    def forward() -> None:
        apply(variables).block_until_ready()

    def step() -> None:
        nonlocal held
        held = jax.block_until_ready(compiled(*held))

    return forward, step, output, seconds


def interleaved(runs: list[Callable], rounds: int) -> list[float]:
    """Median milliseconds of each, measured in turn, after two calls of each."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 2):
        for run, log in zip(runs, times, strict=True):
            time.sleep(0.3)  # until the workers of the other library have gone to sleep
            begun = time.perf_counter()
            run()
            if i >= 2:
                log.append(1e3 * (time.perf_counter() - begun))
    return [statistics.median(log) for log in times]


def products() -> float:
    """Time of matrix products alone, of the sizes of ViT-S with 8 images, zoo / torch."""
    import jax
    import numpy as np
    import torch

    runs: list[Callable] = []
    for m, k, n in ((1576, 384, 1536), (1576, 1536, 384), (384, 1576, 1536)):
        a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
        there, here = (torch.tensor(a), torch.tensor(b)), (jax.device_put(a), jax.device_put(b))
        product = jax.jit(lambda a, b: a @ b)
        runs.append(lambda pair=there: torch.matmul(*pair))
        runs.append(lambda pair=here, product=product: jax.block_until_ready(product(*pair)))
    ten = [lambda run=run: [run() for _ in range(10)] for run in runs]
    times = interleaved(ten, 7)
    return sum(times[1::2]) / sum(times[::2])


def start(name: str, rows: int, folder: str) -> dict[str, float]:
    """From `create` to the end of the trainer's first step, here and now.

    Args:
      name: of the variant.
      rows: of the batch.
      folder: keeps compiled programs.
    """
    import jax
    import numpy as np

    from zoo.data import Arrays, Data
    from zoo.training import Model, TrainConfig
    from zoo.training.directory import use_compilation_cache
    from zoo.training.program import make_program
    from zoo.training.start import first_state

    use_compilation_cache(folder)
    peer = PEERS[name]
    batch = peer.data(peer.create(name), rows) | {"valid": np.ones(rows, bool)}
    examples = Arrays(**batch)
    config = TrainConfig(
        model=Model(name, dict(peer.fields)),
        task=peer.kind.task,
        data=Data(examples, examples, batch_size=rows),
    )
    begun, used = time.perf_counter(), cpu_seconds()
    program = make_program(config)
    with program.context():
        placed = program.place(batch)
        jax.block_until_ready(program.step(first_state(program, placed), placed))
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds() - used}


def cpu_seconds() -> float:
    """That this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def starts(name: str, rows: int) -> dict[str, dict[str, float]]:
    """A cold start and one with the compilation cache of it, each in a new process."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for which in ("cold", "second"):
            done = subprocess.run(
                [sys.executable, __file__, "--start", name, folder, "--batch", str(rows)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"The start of {name} failed:\n{done.stderr[-3000:]}")
            found[which] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model.

    Raises:
      SystemExit: if weights or outputs differ.
    """
    import numpy as np
    import torch

    import zoo

    peer = PEERS[name]
    model, rows = peer.create(name), args.batch or peer.batch
    batch = peer.data(model, rows)
    torch.manual_seed(0)
    module = peer.make(model).eval()  # no dropout on either side
    theirs = for_torch(batch)
    with torch.no_grad():
        want = peer.call(module, *peer.inputs(model, theirs)).numpy()
    state = {k: v.numpy() for k, v in module.state_dict().items() if v.dtype != torch.int64}
    state = {k: v.copy() for k, v in state.items()}
    variables = zoo.convert(model, state)
    if not given_back(model, variables, state):
        raise SystemExit(f"{name}: the exported weights are not those that were converted.")
    forward, step, got, compile_s = zoo_runs(peer, model, variables, batch)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error < TOLERANCE:
        raise SystemExit(
            f"{name}: outputs differ by {error:.1e} of their scale, over {TOLERANCE:.0e}."
        )
    sides = [torch_runs(peer, module, model, theirs)]
    names = ["torch", "zoo"]
    if args.compiled:
        sides.append(torch_runs(peer, torch.compile(module), model, theirs))
        names.insert(1, "compiled")
    figures: dict[str, Any] = {"peer": peer.of, "batch": rows, "relative_error": error}
    for key, runs in (
        ("forward_ms", [side[0] for side in sides] + [forward]),
        ("step_ms", [side[1] for side in sides] + [step]),
    ):
        medians = dict(zip(names, interleaved(runs, args.rounds), strict=True))
        ratios = {"ratio": medians["zoo"] / medians["torch"]}
        if args.compiled:
            ratios["ratio_to_compiled"] = medians["zoo"] / medians["compiled"]
        figures[key] = medians | ratios
    figures["compile_s"] = compile_s
    if not args.no_starts:
        found = starts(name, rows)
        figures["first_step_s"] = found["cold"]["seconds"]
        figures["second_start_s"] = found["second"]["seconds"]
        figures["starts"] = found
    return figures


def cells(name: str, figures: dict[str, Any]) -> list[str]:
    """A row of the table."""
    row = [name, figures["peer"], str(figures["batch"])]
    for key in ("forward_ms", "step_ms"):
        of = figures[key]
        row += [f"{of['torch']:.1f}", f"{of['zoo']:.1f}", f"{of['ratio']:.2f}"]
        if "compiled" in of:
            row += [f"{of['compiled']:.1f}", f"{of['ratio_to_compiled']:.2f}"]
    seconds = (figures[k] for k in ("compile_s", "first_step_s", "second_start_s") if k in figures)
    return [*row, *(f"{s:.1f}" for s in seconds), f"{figures['relative_error']:.0e}"]


def header(args: argparse.Namespace) -> list[str]:
    """The table's first row."""
    columns = ["model", "peer", "batch"]
    for which in ("forward", "step"):
        columns += [f"{which} ms: torch", "zoo", "ratio"]
        columns += ["compiled", "ratio to it"] if args.compiled else []
    columns.append("compile s")
    columns += [] if args.no_starts else ["first step s", "second start s"]
    return [*columns, "error"]


def main() -> None:
    """Prints a Markdown row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(PEERS), help="default: all")
    parser.add_argument("--batch", type=int, help="default: that of each peer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="torch.compile beside eager")
    parser.add_argument("--no-starts", action="store_true", help="no new processes")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)  # one, in its own process
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.start:
        name, folder = args.start
        print(json.dumps(start(name, args.batch, folder)))
        return
    import jax
    import torch

    torch.set_num_threads(args.threads)
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, load "
        f"{os.getloadavg()[0]:.1f}, JAX {jax.__version__}, torch {torch.__version__}, float32; "
        f"medians of {args.rounds} interleaved rounds; products of matrices alone: "
        f"{products():.2f}\n"
    )
    columns = header(args)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    figures = {}
    for name in args.models or PEERS:
        figures[name] = measure(name, args)
        print(f"| {' | '.join(cells(name, figures[name]))} |", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
