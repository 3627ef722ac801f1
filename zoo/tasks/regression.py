"""Regression: one number for an example, and an interval that holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoo.tasks.apply import apply_model, zeros_like_inputs
from zoo.tasks.conformal import covered, near_radii
from zoo.tasks.metrics import Mean

HALVINGS = 50  # of the held-out examples, over which coverage is averaged


@dataclass(frozen=True)
class Regression:
    """Absolute or squared error of a number; its report measures R2 and conformal intervals.

    Batches have the model's inputs, `target [batch]` and, if some examples are more alike than
    others, `group [batch]`: a number. Intervals of an example come from the errors of examples of
    its group and near ones.

    Attributes:
      error: what the loss is a mean of.
      penalties: features of the model that are losses themselves, and their weights.
      coverage: part of the truths that intervals are to hold.
      least: examples that an interval comes from, at least.
    """

    error: Literal["absolute", "squared"] = "absolute"
    penalties: tuple[tuple[str, float], ...] = ()
    coverage: float = 0.9
    least: int = 100

    def init_inputs(self, model: nn.Module) -> dict[str, Array]:
        """Zeros to initialise the model with."""
        return zeros_like_inputs(model)

    def loss(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        rng: Array | None,
        train: bool,
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The error of the valid examples and the penalties; aux as for every task."""
        out, collections = apply_model(model, variables, batch, rng, train, method="features")
        metrics = self._metrics(model, out["logits"], batch)
        loss = metrics["loss"].compute()
        for name, weight in self.penalties:
            loss = loss + weight * out[name].astype(jnp.float32).mean()
        return loss, {"metrics": metrics, "collections": collections}

    def metrics(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Mean]:
        """Metrics of one batch, in evaluation mode."""
        return self._metrics(model, self.predict(model, variables, batch)[:, None], batch)

    def predict(
        self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> Float[Array, "batch"]:
        """The numbers."""
        return _numbers(model, apply_model(model, variables, batch, None, train=False)[0])

    def report(
        self, model: nn.Module, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """R2 of the held-out numbers, and how intervals hold them; drawn into `regression.png`.

        One half of the held-out examples, drawn at random, gives the errors from which the other
        half gets its intervals: coverage is the mean over 50 such draws, `radius` half the mean
        width of the finite ones.
        """
        from zoo.data import eval_batches

        predict = jax.jit(lambda v, b: self.predict(model, v, b))
        rows = []
        for batch in eval_batches(data):
            group = batch.get("group", np.zeros(len(batch["valid"])))
            numbers = np.asarray(predict(variables, batch))
            rows.append(np.stack([batch["target"], numbers, group], -1)[batch["valid"]])
        truth, guess, group = np.concatenate(rows).astype(np.float64).T
        found, radii = intervals(truth, guess, group, self.coverage, self.least)
        _draw(folder / "regression.png", truth, guess, group, radii)
        spread = ((truth - truth.mean()) ** 2).sum()
        return {"r2": 1 - float(((truth - guess) ** 2).sum() / spread), **found}

    def _metrics(self, model: nn.Module, output: Array, batch: Mapping[str, Array]) -> dict:
        error = _numbers(model, output) - batch["target"]
        valid = batch.get("valid")
        absolute, squared = Mean.of(jnp.abs(error), valid), Mean.of(error**2, valid)
        loss = {"absolute": absolute, "squared": squared}[self.error]
        return {"loss": loss, "mae": absolute, "mse": squared}


def _numbers(model: nn.Module, output: Array) -> Float[Array, "batch"]:
    if output.ndim != 2 or output.shape[1] != 1:
        raise ValueError(
            f"{type(model).__name__} gives outputs of shape {output.shape}; regression is of one "
            "number an example, (batch, 1): create it with num_classes=1, if it has such a field."
        )
    return output[:, 0].astype(jnp.float32)


def intervals(
    truth: Float[np.ndarray, "k"],
    guess: Float[np.ndarray, "k"],
    group: Float[np.ndarray, "k"],
    coverage: float = 0.9,
    least: int = 100,
) -> tuple[dict[str, float], Float[np.ndarray, "k"]]:
    """Coverage of conformal intervals, averaged over random halvings, and their mean radius.

    Also a radius for each example, from the last halvings that did not calibrate on it.
    """
    rng, shares, radii = np.random.default_rng(0), [], np.full(len(truth), np.nan)
    for _ in range(HALVINGS):
        order = rng.permutation(len(truth))
        known, new = np.split(order, [len(order) // 2])
        errors = truth[known] - guess[known]
        radii[new] = near_radii(errors, group[known], group[new], coverage, least)
        shares.append(covered(truth[new], guess[new], radii[new]))
    finite = radii[np.isfinite(radii)]
    mean = float(finite.mean()) if len(finite) else float("inf")
    return {"coverage": float(np.mean(shares)), "radius": mean}, radii


def _draw(path: Path, truth: Any, guess: Any, group: Any, radii: Any) -> None:
    """Predictions with their intervals against truths, coloured by group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = np.linspace(0, len(truth) - 1, min(len(truth), 2000)).astype(int)
    length = np.where(np.isfinite(radii), radii, 0)
    axes.errorbar(truth[shown], guess[shown], length[shown], fmt="none", ecolor="lightgrey")
    points = axes.scatter(truth[shown], guess[shown], c=group[shown], s=6, zorder=2)
    axes.axline((truth.mean(), truth.mean()), slope=1, color="grey", linewidth=0.8)
    axes.set(xlabel="truth", ylabel="prediction, and the interval of it")
    if len(np.unique(group)) > 1:
        figure.colorbar(points, label="group")
    figure.savefig(path, dpi=100)
