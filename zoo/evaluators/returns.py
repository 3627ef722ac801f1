"""Whether an agent gets the return that it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.evaluators.evaluator import Evaluator


@dataclass(frozen=True)
class AskedReturns(Evaluator):
    """`returns.png`: returns that were got against those asked for, with those of the data below.

    For a task `ReturnConditioned`. In a world that does not end by itself before its horizon, more
    than the horizon gives cannot be got.

    Attributes:
      asked: returns.
      worlds: episodes of each.
      won: a return above this is a success, whose share is given, too; None: no such share.
      every: steps of training between pictures; 0 is at the end only.
    """

    asked: tuple[float, ...]
    worlds: int = 64
    won: float | None = None
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives mean returns and their mean distance from what was asked."""
        import jax

        task, got = program.task, {}
        asked = np.repeat(np.array(self.asked, np.float32), self.worlds)
        for name, network, own in task.each(program.networks, variables):
            told = name not in task.untold

            def play(own: Any, rng: Any, network: Any = network, told: bool = told) -> Any:
                return task.play(network, own, asked, rng, told)

            got[name] = np.asarray(jax.jit(play)(own, jax.random.key(1)))
        of_data = data.train.returns
        draw(folder / "returns.png", self.asked, got, of_data)
        found = {"data_return": float(of_data.mean())}
        for name, returns in got.items():
            front, means = f"{name}_" if name else "", returns.reshape(-1, self.worlds).mean(1)
            found[f"{front}asked_error"] = float(np.abs(means - self.asked).mean())
            for wanted, mean in zip(self.asked, means, strict=True):
                found[f"{front}got_{wanted:g}"] = float(mean)
            if self.won is not None:
                share = (returns > self.won).reshape(-1, self.worlds).mean(1)
                for wanted, part in zip(self.asked, share, strict=True):
                    found[f"{front}won_{wanted:g}"] = float(part)
        return found


def draw(
    path: Path, asked: tuple[float, ...], got: Mapping[str, np.ndarray], of_data: np.ndarray
) -> None:
    """The picture: one line and band a network (a standard deviation), and a histogram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot(asked, asked, color="0.6", linestyle="--", label="asked")
    for i, (name, returns) in enumerate(got.items()):
        rows = returns.reshape(len(asked), -1)
        mean, spread = rows.mean(1), rows.std(1)
        above.plot(asked, mean, marker="o", color=f"C{i}", label=name or "got")
        above.fill_between(asked, mean - spread, mean + spread, color=f"C{i}", alpha=0.15)
    above.set(ylabel="return that was got")
    above.grid(alpha=0.3)
    above.legend()
    below.hist(of_data, bins=40, color="0.6")
    below.set(xlabel="return asked for", ylabel="episodes\nlearnt from")
    figure.savefig(path, dpi=100)
