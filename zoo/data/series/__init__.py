"""Tables of time series, and the windows of them that models see.

Any CSV file with a column of dates:

    table = Table("load.csv", date="time")
    windows = functools.partial(Windows, table, context_length=96, horizon=24)
    data = Data(train=windows(split="train"), eval=windows(split="test"), batch_size=32)

The protocol is that of github.com/thuml/Time-Series-Library: rows are split in order; mean and
deviation of each column are those of the training rows; the rows of a later split begin
`context_length` early, so that its first forecast is for its first row; windows start at every row;
errors are measured on scaled values, over every window (older code dropped the last batch of the
test, which flattered). `benchmark` gives the tables of the literature with their official splits.
"""

from zoo.data.series.dates import FREQUENCIES, calendar, parse_dates, time_features
from zoo.data.series.sets import (
    BENCHMARKS,
    benchmark,
    machine_temperature,
    network_traffic,
    packaged,
)
from zoo.data.series.table import Table
from zoo.data.series.windows import DecomposedWindows, HideValues, Segments, Windows

__all__ = [
    "BENCHMARKS",
    "FREQUENCIES",
    "DecomposedWindows",
    "HideValues",
    "Segments",
    "Table",
    "Windows",
    "benchmark",
    "calendar",
    "machine_temperature",
    "network_traffic",
    "packaged",
    "parse_dates",
    "time_features",
]
