"""Agents with different memories on one task: how often each is right while it learns.

    python benchmarks/memory.py --runs runs/memory --plot docs/images/memory.png
    python benchmarks/memory.py --agents GTrXL LSTM --seeds 3 --rates 2e-3

The task is that of `configs/control/gtrxl_memory.py`: a cue of the first of 20 steps decides in the
last one. All agents get its worlds, updates and optimizer, at each of the learning rates and seeds.
In the picture each line is a run; in the table stand the mean success behind the last step, that of
the worst seed, and the step from which on success stays above 0.95, where all seeds get there. A
run that is done in `--runs` is not trained again.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from zoo.training import TrainConfig, train
from zoo.training.config import load_file
from zoo.training.logbook import METRICS, read_rows

CONFIGS = Path(__file__).resolve().parents[1] / "configs/control"
AGENTS = {
    "GTrXL": {},
    "no gates": {"gated": False},
    "Transformer-XL": {"gated": False, "reordered": False},
    "LSTM": None,
    "memory of 1": {"memory_length": 1},
}
"""Name -> fields that differ from those of the config's GTrXL; None: the LSTM's own config."""
ENOUGH = 0.95


def config_of(name: str, rate: float, seed: int, every: int) -> TrainConfig:
    """What an agent is trained by."""
    fields = AGENTS[name]
    config = load_file(CONFIGS / ("lstm_memory.py" if fields is None else "gtrxl_memory.py"))
    overrides = {**config.model.overrides, **(fields or {})}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, overrides=overrides),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        evaluators=(),
        eval_every=every,
        log_every=every,
        seed=seed,
    )


def curve(config: TrainConfig, folder: Path) -> list[tuple[int, float]]:
    """Steps and successes of a run, which is trained unless it is there."""
    rows = read_rows(folder / METRICS)
    if not rows or rows[-1]["step"] < config.num_steps or "eval/success" not in rows[-1]:
        with contextlib.redirect_stdout(io.StringIO()):
            train(config, folder)
        rows = read_rows(folder / METRICS)
    return [(row["step"], row["eval/success"]) for row in rows if "eval/success" in row]


def learned_at(points: list[tuple[int, float]]) -> int | None:
    """The first step from which on all successes are enough."""
    low = [step for step, success in points if success < ENOUGH]
    later = [step for step, _ in points if not low or step > low[-1]]
    return later[0] if later else None


def draw(path: Path, curves: dict[tuple[float, str], list[list[tuple[int, float]]]]) -> None:
    """One panel for each learning rate, one colour for each agent, one line for each seed."""
    rates = list(dict.fromkeys(rate for rate, _ in curves))
    figure = Figure(figsize=(5 * len(rates), 3.6), layout="constrained")
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for axes, rate in zip(panels, rates, strict=True):
        for i, (name, runs) in enumerate((n, c) for (r, n), c in curves.items() if r == rate):
            for seed, points in enumerate(runs):
                label = name if seed == 0 else None
                width = 4.5 - 0.8 * i  # so that equal ones are seen
                axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, linewidth=width)
        axes.axhline(ENOUGH, color="0.7", linestyle="--", linewidth=1)
        axes.set(title=f"learning rate {rate:g}", xlabel="step (four updates)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right at the end")
    panels[0].legend(fontsize="small", loc="center right")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--runs", type=Path, help="where runs are kept; default: nowhere")
    parser.add_argument("--plot", type=Path, help="file of the picture")
    args = parser.parse_args()
    table = Table(title=f"seeds: {args.seeds}")
    for column in ("agent", "learning rate", "success", "worst seed", f"{ENOUGH} from step"):
        table.add_column(column)
    curves = {}
    with contextlib.ExitStack() as stack:
        runs = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for rate in args.rates:
            for name in args.agents:
                curves[rate, name] = [
                    curve(
                        config_of(name, rate, seed, args.every),
                        runs / f"{name.replace(' ', '_')}-{rate:g}-{seed}",
                    )
                    for seed in range(args.seeds)
                ]
                last = [points[-1][1] for points in curves[rate, name]]
                found = [learned_at(points) for points in curves[rate, name]]
                when = "never" if None in found else f"{min(found)} to {max(found)}"
                figures = f"{statistics.mean(last):.3f}", f"{min(last):.3f}"
                table.add_row(name, f"{rate:g}", *figures, when)
                print(name, rate, *figures, when, flush=True)
    Console().print(table)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(args.plot, curves)


if __name__ == "__main__":
    main()
