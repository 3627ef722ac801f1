"""Every forecaster on one real series, with one budget, beside forecasts that learn nothing.

    pip install --no-deps hyperts==0.2.2         # carries the series
    python benchmarks/forecasting.py             # all, three seeds; half an hour on two busy cores
    python benchmarks/forecasting.py --models dlinear itransformer --seeds 1 --steps 100

The series is that of `configs/timeseries/itransformer.py`: hourly network traffic, a day from the
week before. Sizes of a model are those of its file in `configs/timeseries`, and each gets the same
steps, batches, optimizer (Adam) and schedule. The learning rate is, for each, whichever of
`--learning-rates` gives the smaller error on the validation split with the first seed; the test
split is looked at once, after the last step. Errors are of scaled values, over all test windows:
mean and standard deviation over seeds. Each run is `zoo.training.train`, in a folder that goes.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from zoo.data import Data
from zoo.data.series import Windows, network_traffic
from zoo.tasks import Forecasting
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig, train
from zoo.training.config import load_file
from zoo.training.evaluation import evaluate_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs/timeseries"
CONTEXT, HORIZON, DAY = 168, 24, 24
LINEAR = {"linear": "ltsf_linear_336_96", "nlinear": "nlinear_336_96", "dlinear": "dlinear_336_96"}
OTHERS = ("itransformer", "informer", "autoformer", "s_mamba", "gateformer", "tempo", "patchtst")


def model_of(name: str, variates: int) -> Model:
    """A linear model of these windows, or what the system's config file trains."""
    if name in LINEAR:
        sizes = {"context_length": CONTEXT, "horizon": HORIZON, "variates": variates}
        return Model(LINEAR[name], sizes)
    return load_file(CONFIGS / f"{name}.py").model


def run(config: TrainConfig, test: Windows) -> dict[str, float]:
    """Train; the validation error, those of the test, parameters and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = train(config, folder)
        measured = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=test))
        errors, _ = evaluate_run(folder, config=measured)
    return {
        "validation": result.metrics["mse"],
        "mse": errors["mse"],
        "mae": errors["mae"],
        "params": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "seconds": time.perf_counter() - started,
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Each figure of a forecaster for every seed, at its best learning rate."""
    table = network_traffic()
    windows = {split: Windows(table, split, CONTEXT, HORIZON) for split in ("train", "val", "test")}

    def once(rate: float, seed: int) -> dict[str, float]:
        config = TrainConfig(
            model=model_of(name, len(table.variates)),
            task=Forecasting(),
            data=Data(windows["train"], windows["val"], batch_size=args.batch, eval_batch_size=64),
            optimizer=Optimizer(
                name="adam", learning_rate=rate, schedule="one_cycle", initial_fraction=0.04
            ),
            checkpoint=Checkpointing(metric="mse", mode="min"),
            num_steps=args.steps,
            log_every=args.steps,
            seed=seed,
        )
        return run(config, windows["test"])

    first = {rate: once(rate, 0) for rate in args.learning_rates}
    rate = min(first, key=lambda rate: first[rate]["validation"])
    runs = [first[rate], *(once(rate, seed) for seed in range(1, args.seeds))]
    figures = {key: [one[key] for one in runs] for key in runs[0]}
    return figures | {"rate": [rate]}


def baselines() -> dict[str, dict[str, list[float]]]:
    """Errors of the day before, the week before, the last value and the week's mean, repeated."""
    windows = Windows(network_traffic(), "test", CONTEXT, HORIZON)
    examples = [windows[i] for i in range(len(windows))]
    past, future = (np.stack([e[key] for e in examples]) for key in ("series", "target"))
    forecasts = {
        "the day before": past[:, -DAY:],
        "the week before": past[:, -7 * DAY :][:, :HORIZON],
        "the last value": past[:, -1:],
        "the week's mean": past.mean(1, keepdims=True),
    }
    return {
        name: {"mse": [float(np.mean((y - future) ** 2))],
               "mae": [float(np.mean(np.abs(y - future)))]}
        for name, y in forecasts.items()
    }  # fmt: skip


def shown(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Measure and print."""
    every = (*LINEAR, *OTHERS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME",
                        help=", ".join(every))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=(1e-3, 5e-3))
    args = parser.parse_args()

    rows = baselines()
    for name in args.models:
        rows[name] = measure(name, args)
        print(f"{name}: {shown(rows[name]['mse'])}", flush=True)
    budget = f"{args.seeds} seeds, {args.steps} steps of {args.batch} windows"
    machine = f"JAX {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    print(f"{budget}; {CONTEXT} hours to {HORIZON}; {machine}")
    table = Table("forecaster", "MSE", "MAE", "parameters", "learning rate", "seconds a run")
    for name, row in sorted(rows.items(), key=lambda item: statistics.mean(item[1]["mse"])):
        learnt = (f"{row['params'][0]:,}", f"{row['rate'][0]:g}",
                  f"{statistics.mean(row['seconds']):.0f}") if "rate" in row else ()  # fmt: skip
        table.add_row(name, shown(row["mse"]), shown(row["mae"]), *learnt)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
