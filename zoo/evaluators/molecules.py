"""Where a graph transformer looks: attention that atoms get, drawn on molecules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from zoo.evaluators.evaluator import Evaluator, some_examples


@dataclass(frozen=True)
class AttentionOnMolecules(Evaluator):
    """`attention.png`: each atom as large as the attention that it gets in the last layer.

    Atoms that `SparseTokens` leaves out of the attention get none.

    Attributes:
      every: steps between pictures; 0 is at the end only.
      count: held-out molecules, from the first to the last at equal distances.
    """

    every: int = 0
    count: int = 6

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Draws; gives how often the most frequent class of the training set is right."""
        import jax
        from matplotlib.figure import Figure

        from zoo.data.molecules import ELEMENTS
        from zoo.tasks.apply import model_inputs

        places = np.linspace(0, len(data.eval) - 1, self.count).astype(int)  # files are sorted
        batch = some_examples(data, places.tolist())
        network = program.networks
        inputs = model_inputs(network, batch)
        sown = jax.jit(
            lambda v, x: network.apply(v, **x, mutable=["intermediates"])[1]["intermediates"]
        )(dict(variables), inputs)
        last = max((k for k in sown if k.startswith("layers_")), key=lambda k: int(k[7:]))
        of_layer = {name: np.asarray(x[0]) for name, x in sown[last]["attention"].items()}
        weights = of_layer["attention"].mean(1)
        if "kept" in of_layer:  # SparseTokens: among the tokens that attend, in their order
            weights = _among_all(weights, of_layer["kept"] > 0)
        figure = Figure(figsize=(3 * self.count, 3), layout="constrained")
        for i, axis in enumerate(np.atleast_1d(figure.subplots(1, self.count))):
            count = int(batch["num_nodes"][i])
            got = weights[i, :count, :count].mean(0) * count
            x, y = batch["places"][i, :count].T
            for a, b in batch["edges"][i]:
                if b < count:
                    axis.plot(x[[a, b]], y[[a, b]], color="0.7", zorder=1)
            axis.scatter(x, y, s=60 * got, c=got, cmap="viridis", zorder=2)
            for atom in range(count):
                element = int(batch["nodes"][i, atom, 0])
                if element != 0:
                    name = ELEMENTS[element] if element < len(ELEMENTS) else "?"
                    axis.text(x[atom], y[atom], name, ha="center", va="center", fontsize=8)
            axis.set_aspect("equal")
            axis.margins(0.15)
            axis.axis("off")
        figure.savefig(folder / "attention.png", dpi=100)
        labels = [np.array([int(part[i]["labels"]) for i in range(len(part))])
                  for part in (data.train, data.eval)]  # fmt: skip
        return {"most_frequent_class": float((labels[1] == np.bincount(labels[0]).argmax()).mean())}


def _among_all(
    few: Float[np.ndarray, "batch kept kept"], kept: Bool[np.ndarray, "batch length"]
) -> Float[np.ndarray, "batch length length"]:
    """Attention among the kept tokens, and 0 for the others."""
    whole = np.zeros((len(few), kept.shape[1], kept.shape[1]), few.dtype)
    for row, weights, mask in zip(whole, few, kept, strict=True):
        row[np.ix_(mask, mask)] = weights
    return whole
