"""Answers for tables of series: forecasts past the last row, scores of rows, values filled in."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.series import Table
from zoo.data.series.dates import TIME_FEATURES
from zoo.errors import ConfigError
from zoo.prediction.predictor import Predictor
from zoo.tasks import AnomalyDetection, Imputation
from zoo.training.checks import reading
from zoo.training.fields import TYPE

Row = dict[str, Any]


def answers(
    predictor: Predictor, file: Path, folder: Path | None, fields: Mapping[str, Any] | None = None
) -> Iterator[Row]:
    """Rows for one CSV file, in its units.

    Args:
      predictor: of a forecaster, a reconstructor or an imputer.
      file: with the columns of the run's table.
      folder: where a picture of it goes; None: nowhere.
      fields: of `zoo.data.series.Table`, in place of those of the run's table.

    Raises:
      ConfigError: for a field that a table does not have.
      DataError: if the file is not what the run's table is, or too short.
    """
    with reading(str(file)):
        table = _table(predictor, file, fields or {})
        mean, deviation = scale(predictor, table)
        scaled = ((table.values - mean) / deviation).astype(np.float32)
    if isinstance(predictor.task, AnomalyDetection):
        yield from _scores(predictor, file, table, scaled, folder)
    elif isinstance(predictor.task, Imputation):
        yield from _imputed(predictor, table, scaled, mean, deviation)
    else:
        yield from _forecast(predictor, file, table, scaled, mean, deviation, folder)


def _table(predictor: Predictor, file: Path, given: Mapping[str, Any]) -> Table:
    """The file, read as the run's table was."""
    saved = predictor.source.get("table") or {}
    known = {f.name for f in dataclasses.fields(Table)}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
              if k in known and k not in ("path", TYPE)}  # fmt: skip
    fields |= {"splits": (1.0, 0.0, 0.0)}
    if isinstance(predictor.task, Imputation):
        fields["fill_gaps"] = True
    variates = predictor.facts.get("variates")
    if variates and not fields.get("series"):
        fields |= {"columns": tuple(variates), "target": None}
    own = sorted(known - {"path", "splits"})
    if strange := [name for name in given if name not in own]:
        raise ConfigError(f"A table has no field {strange[0]!r}; its fields are {', '.join(own)}.")
    table = Table(file, **(fields | given))
    if fields.get("labels"):
        from zoo.data.series.csv_file import CsvFile

        if fields["labels"] not in CsvFile(file, table.delimiter).header:
            table = dataclasses.replace(table, labels=None)
    if variates and tuple(table.variates) != tuple(variates):
        raise ValueError(
            f"{str(file)!r} has the variates {', '.join(table.variates)}; the run learnt "
            f"{', '.join(variates)}."
        )
    return table


def scale(predictor: Predictor, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation that the run was trained with; of a published file those of the table."""
    known = predictor.facts.get("scale")
    if known is None:
        return table.scale
    return np.array(known["mean"]), np.array(known["deviation"])


def _context(predictor: Predictor) -> int:
    return int(predictor.inputs["series"].shape[1])


def _features(predictor: Predictor, dates: np.ndarray, table: Table, name: str) -> Any:
    """Time features of dates, of the kind that the network takes; None where it takes none."""
    if name not in predictor.inputs:
        return None
    kind = predictor.source.get("time_features") or (
        "calendar" if np.issubdtype(predictor.inputs[name].dtype, np.integer) else "features"
    )
    return TIME_FEATURES[kind](dates, table.frequency)


def _forecast(
    predictor: Predictor,
    file: Path,
    table: Table,
    scaled: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    folder: Path | None,
) -> Iterator[Row]:
    """The steps after the last row."""
    context = _context(predictor)
    if len(table) < context:
        raise ConfigError(
            f"{str(file)!r} has {len(table)} rows; a forecast is made from the last {context}."
        )
    batch = {"series": scaled[-context:][None]}
    horizon = getattr(predictor.network, "horizon", None) or predictor.source.get("horizon") or 1
    dates = table.following(int(horizon))
    for name, when in (("time_features", table.dates[-context:]), ("future_time_features", dates)):
        features = _features(predictor, when, table, name)
        if features is not None:
            batch[name] = features[None]
    said = np.asarray(predictor(batch)["forecast"])[0]
    if said.shape[-1] != len(mean):
        raise ConfigError(
            f"The network forecasts {said.shape[-1]} variates, and the table has {len(mean)}."
        )
    values = said * deviation + mean
    if not np.isfinite(values).all():
        raise ConfigError(f"The forecast of {str(file)!r} is no number (NaN): see its last rows.")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / f"{file.stem}.forecast.png", table, dates[: len(values)], values, context)
    for when, row in zip(table.following(len(values)), values, strict=True):
        yield {"input": str(file), table.date: _text(when), **_named(table, row)}


def of_window(names: Row, windows: Any, number: int, said: np.ndarray) -> Iterator[Row]:
    """Forecast and truth of one held-out window, a row a step, in the units of the table."""
    table = windows.table
    first = windows._first + number + windows.context_length
    values = table.unscaled(said)
    for i, row in enumerate(values):
        truth = {f"true {n}": float(v) for n, v in
                 zip(table.variates, table.values[first + i], strict=True)}  # fmt: skip
        yield {**names, table.date: _text(table.dates[first + i]), **_named(table, row), **truth}


def _scores(
    predictor: Predictor, file: Path, table: Table, scaled: np.ndarray, folder: Path | None
) -> Iterator[Row]:
    """A score of each row: how badly windows that hold it are reconstructed there."""
    length = _context(predictor)
    if len(scaled) < length:
        raise ConfigError(f"{str(file)!r} has {len(scaled)} rows; a window has {length}.")
    starts = list(range(0, len(scaled) - length + 1, length))
    if starts[-1] + length < len(scaled):
        starts.append(len(scaled) - length)
    energy = np.zeros(len(scaled))
    size = predictor.batch_size
    for first in range(0, len(starts), size):
        part = starts[first : first + size]
        part += part[-1:] * (size - len(part))
        windows = np.stack([scaled[s : s + length] for s in part])
        said = np.asarray(predictor({"series": windows, "valid": np.ones(size, bool)})["energy"])
        for start, one in zip(part, said, strict=True):
            energy[start : start + length] = one
    if folder is not None:
        from zoo.evaluators.anomalies import _draw

        folder.mkdir(parents=True, exist_ok=True)
        flags = np.zeros(len(energy), bool) if table.anomalies is None else table.anomalies
        _draw(folder / f"{file.stem}.scores.png", energy, flags, float(np.percentile(energy, 99)))
    for when, score in zip(table.dates, energy, strict=True):
        yield {"input": str(file), table.date: _text(when), "score": float(score)}


def _imputed(
    predictor: Predictor, table: Table, scaled: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> Iterator[Row]:
    """The rows of the table, values that were missing filled in."""
    length, holes = _context(predictor), table.holes
    values = table.values.copy()
    starts = list(range(0, max(len(scaled) - length, 0) + 1, length))
    if starts[-1] + length < len(scaled):
        starts.append(len(scaled) - length)
    for start in starts:
        rows = slice(start, start + length)
        mask = ~holes[rows]
        if mask.all():
            continue
        series = np.where(mask, scaled[rows], 0)
        batch = {"series": series[None], "mask": mask[None], "valid": np.ones(1, bool)}
        said = np.asarray(predictor(batch)["series"])[0] * deviation + mean
        values[rows] = np.where(mask, values[rows], said)
    for when, row in zip(table.dates, values, strict=True):
        yield {table.date: _text(when), **_named(table, row)}


def _named(table: Table, row: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(table.variates, row, strict=True)}


def _text(when: np.datetime64) -> str:
    return str(when).replace("T", " ")


def draw(path: Path, table: Table, dates: np.ndarray, values: np.ndarray, context: int) -> None:
    """The last rows of a table and what is forecast to follow, in its units."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(table.variates)
    shown = range(count) if count <= 5 else [0, 1, 2, 3, count - 1]
    figure = Figure(figsize=(9, 2.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    rows = slice(-min(context, len(table)), None)
    for axes, variate in zip(panels, shown, strict=True):
        axes.plot(table.dates[rows], table.values[rows, variate], color="grey", label="seen")
        axes.plot(dates, values[:, variate], color="tab:red", label="forecast")
        axes.set_ylabel(table.variates[variate])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.autofmt_xdate()
    figure.savefig(path, dpi=110)
