"""How energies and predictions change along the steps of an energy-based transformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.evaluators.evaluator import Evaluator, predictions


@dataclass(frozen=True)
class EnergySteps(Evaluator):
    """`energies.png`: mean energy and cross-entropy of held-out tokens behind every step.

    Attributes:
      every: steps of training between pictures; 0 is at the end only.
    """

    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives for how many places the energy falls from the first step to the last."""
        from matplotlib.figure import Figure

        energies, losses = [], []
        for batch, said in predictions(program, variables, data):
            energies.append(said["energy"][:, :, :-1])
            scores = said["refined"][:, :, :-1].astype(np.float64)
            top = scores.max(-1, keepdims=True)
            whole = top[..., 0] + np.log(np.exp(scores - top).sum(-1))
            at = np.broadcast_to(batch["tokens"][:, None, 1:], whole.shape)[..., None]
            losses.append(whole - np.take_along_axis(scores, at, -1)[..., 0])
        energy, loss = np.concatenate(energies), np.concatenate(losses)
        figure = Figure(figsize=(8, 3), layout="constrained")
        steps = np.arange(1, energy.shape[1] + 1)
        for axis, values, name in zip(
            figure.subplots(1, 2), (energy, loss), ("energy", "cross-entropy"), strict=True
        ):
            axis.plot(steps, values.mean((0, 2)), marker="o")
            axis.set(xlabel="step", title=name, xticks=steps)
        figure.savefig(folder / "energies.png", dpi=100)
        return {"energy_falls": float((energy[:, -1] < energy[:, 0]).mean())}
