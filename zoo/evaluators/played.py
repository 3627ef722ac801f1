"""Episodes that an agent plays: what it sees and does, and how it stands beside chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.evaluators.evaluator import Evaluator, some_examples


@dataclass(frozen=True)
class PlayedEpisodes(Evaluator):
    """`episodes.png`: held-out episodes of a task `Reinforcement`, step by step.

    Attributes:
      count: episodes that are drawn.
      worlds: held-out worlds on which random actions are measured.
      every: steps of training between pictures; 0 is at the end only.
    """

    count: int = 6
    worlds: int = 512
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives the return and the success of random actions."""
        import jax

        task, network = program.task, program.networks
        held_out = len(data.eval)
        batch = some_examples(data, list(range(min(self.count, held_out))))
        draw(folder / "episodes.png", jax.device_get(program.predict(variables, batch)))
        worlds = some_examples(data, list(range(min(self.worlds, held_out))))["world"]
        chance = jax.jit(lambda worlds: task.play(network, worlds, task.at_random))(worlds)
        return {
            "random_return": float(np.mean(chance["return"])),
            "random_success": float(np.mean(chance["won"])),
        }


def draw(path: Path, said: Mapping[str, np.ndarray]) -> None:
    """The picture: a column an episode, what is seen above what is done."""
    from matplotlib.figure import Figure

    count = len(said["return"])
    figure = Figure(figsize=(2.6 * count, 3.2), layout="constrained")
    panels = figure.subplots(2, count, squeeze=False, sharex="col", height_ratios=(3, 1))
    most = max(1, int(said["actions"].max()))
    for i, (above, below) in enumerate(panels.T):
        steps = int(said["mine"][i].sum())
        above.imshow(said["observations"][i, :steps].T, aspect="auto", cmap="viridis")
        below.imshow(
            said["actions"][i, None, :steps], aspect="auto", cmap="cool", vmin=0, vmax=most
        )
        won = "won" if said["won"][i] else "not won"
        above.set_title(f"{said['return'][i]:.2f}, {won}", fontsize="small")
        above.set_yticks([])
        below.set(yticks=[], xlabel="step")
    panels[0, 0].set_ylabel("seen")
    panels[1, 0].set_ylabel("done")
    figure.savefig(path, dpi=100)
