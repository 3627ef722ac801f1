"""What in a series spoke for its class, and the weighted log-loss of a classifier.

Where a classifier is linear in the mean over time of its last features, each step's part of a logit
is known: the class-activation map (Zhou et al., arXiv 1512.04150).

    out = model.apply(variables, series, method="features")
    figure = draw_activation(series[0], out["activation"][0, :, 3], names="ugrizy")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.evaluators.evaluator import Evaluator, predictions, some_examples
from zoo.tasks.apply import apply_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def class_activation_map(
    features: Float[Array, "batch time channels"], kernel: Float[Array, "channels classes"]
) -> Float[Array, "batch time classes"]:
    """Each step's part of every logit; its mean over time, plus the head's bias, is the logit.

    Args:
      features: what is averaged over time in front of the head.
      kernel: of the head.
    """
    return jnp.einsum("btd,dc->btc", features, kernel)


def weighted_log_loss(
    probabilities: Float[np.ndarray, "k classes"], labels: Int[np.ndarray, "k"]
) -> float:
    """The mean over classes of the mean -log p of their members (PLAsTiCC); absent ones count not.

    Probabilities are clipped to [1e-15, 1 - 1e-15].
    """
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    losses = -np.log(np.clip(own, 1e-15, 1 - 1e-15))
    return float(np.mean([losses[labels == c].mean() for c in np.unique(labels)]))


def draw_activation(
    series: Float[np.ndarray, "time variates"],
    activation: Float[np.ndarray, "steps"],
    names: Sequence[str] = (),
    extra: Sequence[str] = (),
    axes: "Axes | None" = None,
) -> "Figure":
    """A series over the map of one class, which is scaled from 0 to 1 over its steps.

    Args:
      series: one line a variate.
      activation: of the class; steps behind those of the series are drawn behind them.
      names: of the variates, for the legend.
      extra: names of the steps behind the series (t2 appends the redshift and its error).
      axes: of a figure of yours; None makes one, which a notebook shows.

    Raises:
      ValueError: if the map has not a step for each of the series' and of `extra`.
    """
    from matplotlib.figure import Figure

    time = len(series)
    if len(activation) != time + len(extra):
        raise ValueError(
            f"The map has {len(activation)} steps and the series {time}; name the "
            f"{len(activation) - time} others with extra=, not {list(extra)}."
        )
    if axes is None:
        axes = Figure(figsize=(7, 3), layout="constrained").add_subplot()
    span = np.ptp(activation)
    scaled = (activation - activation.min()) / (span if span else 1)
    low, high = float(series.min()), float(series.max())
    edge = 0.05 * (high - low or 1)
    axes.imshow(
        np.asarray(scaled)[None],
        cmap="Reds",
        aspect="auto",
        alpha=0.6,
        vmin=0,
        vmax=1,
        extent=(-0.5, len(activation) - 0.5, low - edge, high + edge),
    )
    for i, line in enumerate(np.asarray(series).T):
        axes.plot(line, linewidth=1, label=names[i] if i < len(names) else None)
    if names:
        axes.legend(fontsize="x-small", ncols=2)
    if extra:
        axes.axvline(time - 0.5, color="black", linewidth=0.5)
        axes.text(len(activation), high, "\n".join(extra), fontsize="x-small", va="top")
    axes.set(xlabel="step", ylabel="value")
    return axes.figure


@dataclass(frozen=True)
class ActivationMaps(Evaluator):
    """The weighted log-loss (PLAsTiCC) of a classifier of series, and `activation_maps.png`.

    The maps are of models that give `activation` among their features, for their own predictions.

    Attributes:
      classes: names, by number.
      variates: names.
      every: steps between measurements; 0 is at the end only.
    """

    classes: tuple[str, ...] = ()
    variates: tuple[str, ...] = ()
    every: int = 0

    def run(
        self, program: Any, variables: Mapping[str, Any], data: Any, folder: Path
    ) -> dict[str, float]:
        """Weighted log-loss of the held-out series; maps of the first of each class."""
        found, labels = [], []
        for batch, said in predictions(program, variables, data):
            found.append(said["probabilities"])
            labels.append(batch["labels"])
        probabilities, labels = np.concatenate(found), np.concatenate(labels)
        batch = some_examples(data, np.unique(labels, return_index=True)[1][:8].tolist())

        def features(variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Any:
            return apply_model(program.networks, variables, batch, None, False, "features")[0]

        out = jax.jit(features)(variables, batch)
        if "activation" in out:
            self._draw(folder / "activation_maps.png", batch, jax.device_get(out))
        return {"weighted_log_loss": weighted_log_loss(probabilities, labels)}

    def _draw(self, path: Path, batch: Mapping[str, np.ndarray], out: Mapping[str, Any]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        series, maps = batch["series"], out["activation"]
        figure = Figure(figsize=(7, 2.2 * len(series)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(series), 1, squeeze=False)[:, 0]
        extra = [f"extra {i}" for i in range(maps.shape[1] - series.shape[1])]
        name = lambda c: self.classes[c] if c < len(self.classes) else f"class {c}"  # noqa: E731
        for i, axes in enumerate(panels):
            said = int(out["logits"][i].argmax())
            draw_activation(series[i], maps[i, :, said], self.variates, extra, axes)
            axes.set_title(f"{name(int(batch['labels'][i]))}, taken for {name(said)}", fontsize=9)
        figure.savefig(path, dpi=100)
