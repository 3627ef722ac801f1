"""What a run tells: a live line, metrics.jsonl, TensorBoard events, a picture, a table."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

METRICS = "metrics.jsonl"
PICTURE = "curves.png"
TIMING = ("steps_per_second", "examples_per_second", "data_wait")


class Logbook:
    """Writes what the first process learns of a run; on other processes it is silent.

    Rows of metrics.jsonl are `{"step": n, "train/loss": x, ...}`: means over the steps since the
    row before. Speed and data wait (the part of the time that was spent waiting for batches) stand
    in the same rows.
    """

    def __init__(self, run: Path, num_steps: int, active: bool = True) -> None:
        """Open the logs of a run directory, which must be there."""
        self.run, self.active = run, active
        self.console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self.rows: list[dict[str, Any]] = read_rows(run / METRICS)
        self._file: Any = None
        self._events: Any = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )
        self._bar = self._progress.add_task("training", total=num_steps, status="compiling")
        self._num_steps = num_steps
        self._shown = 0.0

    def start(self, step: int) -> None:
        """Begin after `step` steps: rows of later steps, from a run that was cut off, go."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._progress.update(self._bar, completed=step)
        if not self.active:
            return
        from tensorboardX import SummaryWriter

        self.close()
        draft = self.run / f"{METRICS}.tmp"
        draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(draft, self.run / METRICS)
        self._file = open(self.run / METRICS, "a", buffering=1)
        self._events = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)
        self._progress.start()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        if not self.active:
            return
        row = {"step": step, **{name: _number(v) for name, v in values.items()}}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Show where the run is: a live line on a terminal, else a plain one now and then."""
        shown = [
            f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items() if k not in TIMING
        ]
        speed = f"{values['steps_per_second']:.3g} step/s"
        speed += f"  {values['examples_per_second']:.4g} examples/s"
        speed += f"  data wait {100 * values['data_wait']:.1f} %"
        status = "  ".join([*shown, speed])
        self._progress.update(self._bar, completed=step, status=status)
        if not self.console.is_terminal:
            left = (self._num_steps - step) / max(values["steps_per_second"], 1e-9)
            if time.monotonic() - self._shown > 2 or step == self._num_steps:
                self.say(f"step {step}/{self._num_steps}  {status}  left {_duration(left)}")
                self._shown = time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the progress line."""
        self.console.print(text, style=style, markup=False)

    def table(self, seconds: float) -> None:
        """Print last and best value of each metric, and the time of the run."""
        table = Table(title=f"{self.run.name}: {_duration(seconds)}")
        for column in ("metric", "last", "best", "at step"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        names = dict.fromkeys(n for row in self.rows for n in row if n != "step")
        for name in names:
            points = [(row["step"], row[name]) for row in self.rows if _finite(row.get(name))]
            if not points or name in (*TIMING, "learning_rate", "grad_norm"):
                continue
            small = any(part in name for part in ("loss", "perplexity", "mse", "mae"))
            pick = min if small else max
            best = pick(points, key=lambda point: point[1])
            table.add_row(name, f"{points[-1][1]:.4f}", f"{best[1]:.4f}", str(best[0]))
        self.console.print(table)

    def picture(self) -> None:
        """Draw the curves of all metrics into curves.png."""
        if self.active and self.rows:
            draw(self.rows, self.run / PICTURE)

    def close(self) -> None:
        """Stop the live line and close the files."""
        self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._events.close()
            self._file = self._events = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of train and eval metrics, one panel for each name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(n for row in rows for n in row):
        if name not in ("step", *TIMING):
            panels.setdefault(name.rpartition("/")[2], []).append(name)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if _finite(row.get(name))]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." * (len(points) < 30))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    draft = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(draft, dpi=110)
    os.replace(draft, path)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float) -> float | str:
    """JSON has no NaN: it is written as text."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
