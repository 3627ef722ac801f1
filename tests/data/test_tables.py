"""Tables of series as people have them."""

import gzip
import zipfile

import numpy as np
import pytest

from zoo.data.series import Segments, Table, Windows, csv_file

HOURS = [f"2021-01-01 {h:02d}:00:00" for h in range(12)]


def write(path, rows, encoding="utf-8", end="\n"):
    path.write_bytes((end.join(rows) + end).encode(encoding))
    return path


def plain(tmp_path, rows, header="date,load"):
    return write(tmp_path / "x.csv", [header, *rows])


def test_rows_out_of_order_are_refused_or_sorted(tmp_path):
    rows = [f"{d},{i}" for i, d in enumerate(HOURS)]
    path = plain(tmp_path, [*rows[:3], rows[5], rows[4], rows[3], *rows[6:]])
    with pytest.raises(
        ValueError, match=r"Line 6 of .* is earlier than the row before it \(2 rows"
    ):
        len(Table(path))
    table = Table(path, order="sort")
    assert table.values[:, 0].tolist() == list(range(12))


def test_rows_of_one_date_are_refused_or_merged(tmp_path):
    path = plain(tmp_path, [f"{d},{i}" for i, d in enumerate([*HOURS[:3], HOURS[2], *HOURS[3:]])])
    with pytest.raises(ValueError, match=r"Line 5 of .* has the date of another row.* 'mean'"):
        len(Table(path))
    for how, value in (("first", 2), ("last", 3), ("mean", 2.5)):
        assert Table(path, repeats=how).values[2, 0] == value
    assert len(Table(path, repeats="keep", gaps="keep")) == 13


def test_missing_rows_are_refused_filled_or_kept(tmp_path):
    path = plain(tmp_path, [f"{d},{i}" for i, d in enumerate(HOURS) if i not in (4, 5)])
    with pytest.raises(
        ValueError, match=r"1 of 9 steps are not 3600 seconds, .*after line 5 .*2 ro"
    ):
        len(Table(path))
    filled = Table(path, gaps="fill")
    assert filled.values[:, 0].tolist() == list(range(12))
    assert filled.holes[:, 0].tolist() == [i in (4, 5) for i in range(12)]
    assert len(Table(path, gaps="keep")) == 10


def test_months_and_business_days_are_even_steps(tmp_path):
    months = [f"20{20 + m // 12}-{m % 12 + 1:02d}-01" for m in range(15)]
    table = Table(plain(tmp_path, [f"{d},1" for d in months]), frequency="m")
    assert str(table.following(2)[1])[:10] == "2021-05-01"
    days = [str(d) for d in np.busday_offset("2021-01-01", range(10))]
    table = Table(plain(tmp_path, [f"{d},1" for d in days]), frequency="b")
    assert str(table.following(1)[0])[:10] == str(np.busday_offset("2021-01-01", 10))
    with pytest.raises(ValueError, match="steps are not"):
        len(Table(plain(tmp_path, [f"{d},1" for d in days]), frequency="d"))


def test_several_series_in_a_file_stand_side_by_side(tmp_path):
    rows = [f"{d},{s},{i + 100 * k}" for k, s in enumerate("AB") for i, d in enumerate(HOURS)]
    path = plain(tmp_path, rows, "date,store,load")
    with pytest.raises(ValueError, match=r"no row of numbers .*several series with series="):
        len(Table(path))
    table = Table(path, series="store")
    assert table.variates == ("load A", "load B")
    assert table.values[3].tolist() == [3, 103]
    assert Table(path, series="store", only=("B",)).values[3].tolist() == [103]
    path = plain(tmp_path, rows[:-1], "date,store,load")
    with pytest.raises(ValueError, match="no number for 'load B'"):
        len(Table(path, series="store"))
    assert Table(path, series="store", fill_gaps=True).values[-1].tolist() == [11, 110]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_separators_and_decimal_commas_are_told_from_the_file(tmp_path, encoding):
    rows = ["date;Wärme;Preis", *(f"{d};{i},25;{i}" for i, d in enumerate(HOURS))]
    table = Table(write(tmp_path / "x.csv", rows, encoding, "\r\n"))
    assert table.variates == ("Wärme", "Preis")
    assert table.values[2].tolist() == [2.25, 2.0]
    tabs = Table(write(tmp_path / "y.tsv", [row.replace(";", "\t") for row in rows], encoding))
    np.testing.assert_array_equal(tabs.values, table.values)


def test_what_is_ambiguous_is_asked_for(tmp_path):
    path = write(
        tmp_path / "x.csv", ["date;load", *(f"{d};1,{i:03d}" for i, d in enumerate(HOURS))]
    )
    with pytest.raises(ValueError, match="may part thousands or decimals; give decimal=','"):
        len(Table(path))
    assert Table(path, decimal=",").values[2, 0] == 1.002
    path = plain(tmp_path, [f"{d},1,5" for d in HOURS])
    with pytest.raises(
        ValueError, match=r"Line 2 .* has 3 cells, and the header names 2 .*decimal"
    ):
        len(Table(path))
    path = write(tmp_path / "y.csv", ["timestamp,load", f"{HOURS[0]},1"])
    with pytest.raises(ValueError, match=r"no column .date..*; give date=.timestamp."):
        len(Table(path))


def test_missing_values_are_refused_or_taken_from_before(tmp_path):
    cells = ["NA", "1", "", "null", "2", "-", "3", "4", "5", "6", "7", "n/a"]
    path = plain(tmp_path, [f"{d},{c}" for d, c in zip(HOURS, cells, strict=True)])
    with pytest.raises(ValueError, match=r"Line 2 of .* no number for 'load' \(5 cells"):
        len(Table(path))
    table = Table(path, fill_gaps=True)
    assert table.values[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 7]
    assert table.holes.sum() == 5
    with pytest.raises(ValueError, match=r"The column .load. .* has no number at all"):
        len(Table(plain(tmp_path, [f"{d}," for d in HOURS]), fill_gaps=True))


def test_columns_without_a_name_or_with_one_name_are_said(tmp_path):
    index = plain(tmp_path, [f"{i},{d},{i}" for i, d in enumerate(HOURS)], ",date,load")
    assert Table(index).variates == ("load",)
    trailing = plain(tmp_path, [f"{d},{i}," for i, d in enumerate(HOURS)], "date,load,")
    assert Table(trailing).variates == ("load",)
    unnamed = plain(tmp_path, [f"{d},{i},7" for i, d in enumerate(HOURS)], "date,load,")
    with pytest.raises(ValueError, match=r"Column 3 of .* has no name"):
        len(Table(unnamed))
    twice = plain(tmp_path, [f"{d},{i},7" for i, d in enumerate(HOURS)], "date,load,load")
    with pytest.raises(ValueError, match="2 columns 'load'; rename one"):
        len(Table(twice))


def test_zones_and_unix_times_are_dates(tmp_path):
    zoned = plain(tmp_path, [f"{d}+0{1 + (i > 5)}:00,1" for i, d in enumerate(HOURS[:6])])
    assert str(Table(zoned).dates[0]) == "2020-12-31T23:00:00"
    unix = plain(tmp_path, [f"{1609459200 + 3600 * i},1" for i in range(6)])
    with pytest.raises(ValueError, match="no date; give date_format= 's' for Unix time"):
        len(Table(unix))
    assert str(Table(unix, date_format="s").dates[1]) == "2021-01-01T01:00:00"


@pytest.mark.parametrize(
    ("dates", "forms"),
    [
        (["03.01.2021 00:00", "04.01.2021 00:00"], "'%d.%m.%Y %H:%M'."),
        (["1/2/2021", "1/3/2021"], "'%m/%d/%Y' or '%d/%m/%Y'."),
        (["1/12/2021", "1/13/2021"], "'%m/%d/%Y'."),
        (["2021-01", "2021-02", "2021-03"], "'%Y-%m'."),
        (["202101010000", "202101010100"], "'%Y%m%d%H%M'."),
        (["2021Q1", "2021Q2"], "as strptime takes it"),
    ],
)
def test_dates_of_another_form_are_refused_with_what_would_read_them(tmp_path, dates, forms):
    path = plain(tmp_path, [f"{d},{i}" for i, d in enumerate(dates)])
    with pytest.raises(ValueError) as refused:
        len(Table(path))
    assert f"no date; give date_format= {forms}" in str(refused.value)
    if forms.count("%") and " or " not in forms:
        assert len(Table(path, date_format=forms.strip("'."))) == len(dates)


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("Datum,load", "give date='Datum'"),
        (",load", "give date=''"),
        ("2020-12-31 23:00:00,7", "put a line with the columns' names above"),
    ],
)
def test_a_table_without_the_column_of_dates_is_told_which_it_is(tmp_path, header, hint):
    path = plain(tmp_path, [f"{d},{i}" for i, d in enumerate(HOURS)], header)
    with pytest.raises(ValueError, match=hint):
        len(Table(path))


def test_remarks_above_a_header_are_passed_over(tmp_path):
    rows = [f"{d},{i}" for i, d in enumerate(HOURS)]
    table = Table(write(tmp_path / "x.csv", ["# by X", "# unit: MW", "date,load", *rows]))
    assert table.variates == ("load",) and len(table) == 12
    assert Table(write(tmp_path / "y.csv", ["#date,load", *rows]), date="#date").values[3, 0] == 3


@pytest.mark.parametrize("cell", ["10.5%", "$10", '"1,200.5"'])
def test_marks_in_numbers_are_named(tmp_path, cell):
    with pytest.raises(ValueError, match="without marks of thousands, units and percent signs"):
        len(Table(plain(tmp_path, [f"{HOURS[0]},{cell}"])))


def test_the_minus_sign_of_typesetters_is_one(tmp_path):
    path = plain(tmp_path, [f"{d},\u2212{i}" for i, d in enumerate(HOURS)])
    assert Table(path).values[3, 0] == -3


def test_a_large_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_file, "PIECE", 7)
    rows = [f"{d},{i}" for i, d in enumerate(HOURS)]
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["date,load", *rows]).encode()))
    assert max(map(len, csv_file.CsvFile(path).pieces())) == 7
    assert Table(path).values[:, 0].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"order": "sorted"}, "order is 'sorted'; it must be 'refuse', 'sort' or 'keep'"),
        ({"gaps": "interpolate"}, "gaps is 'interpolate'"),
        ({"columns": ("load", "load")}, "names a column twice"),
        ({"splits": (0.9, 0.2, -0.1)}, "give none below 0"),
        ({"splits": (0.7, 0.3)}, "splits is .*must be tuple"),
        ({"splits": (float("nan"), 0, 0)}, "give none below 0"),
        ({"delimiter": ", "}, "is not one character"),
        ({"encoding": "utf-99"}, "none that Python knows"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, fields, said):
    path = plain(tmp_path, [f"{d},{i}" for i, d in enumerate(HOURS)])
    with pytest.raises(ValueError, match=said):
        len(Table(path, **fields))


def test_windows_of_no_steps_are_refused(tmp_path):
    table = Table(plain(tmp_path, [f"{d},{i}" for i, d in enumerate(HOURS)]))
    with pytest.raises(ValueError, match="context_length=0 and horizon=1 are steps"):
        Windows(table, "train", 0, 1)
    with pytest.raises(ValueError, match="time_features is 'timeF'; it must be 'features'"):
        Windows(table, "train", 2, 1, time_features="timeF")
    with pytest.raises(ValueError, match=r"Windows\.table is 'x\.csv'; it must be Table"):
        Windows("x.csv", "train", 2, 1)
    with pytest.raises(ValueError, match="length=2 and step=0 are rows"):
        Segments(table, "train", 2, 0)


def test_archives_hold_one_table(tmp_path):
    rows = "\n".join(["date,load", *(f"{d},{i}" for i, d in enumerate(HOURS))])
    with zipfile.ZipFile(tmp_path / "x.ZIP", "w") as archive:
        archive.mkdir("data")
        archive.writestr("readme.txt", "what this is")
        archive.writestr("data/load.csv", rows)
    assert len(Table(tmp_path / "x.ZIP")) == 12
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    with pytest.raises(ValueError, match="holds no file; one table was expected"):
        len(Table(tmp_path / "none.zip"))
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress(rows.encode())[:-20])
    (tmp_path / "no.zip").write_text(rows)
    for name in ("torn.csv.gz", "no.zip"):
        with pytest.raises(ValueError, match=f"{name}' cannot be unpacked"):
            len(Table(tmp_path / name))
    (tmp_path / "sheet.csv").write_bytes(b"PK\3\4 a workbook")
    with pytest.raises(ValueError, match="is no CSV file; save it as CSV first"):
        len(Table(tmp_path / "sheet.csv"))


def test_cells_that_look_like_numbers_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"Line 2 .* is no row of numbers .*'1_5'"):
        len(Table(plain(tmp_path, [f"{d},1_5" for d in HOURS])))
    with pytest.raises(ValueError, match="mark that is never closed"):
        len(Table(plain(tmp_path, [f'{HOURS[0]},"1', *[f"{HOURS[1]},1"] * 9000])))
    rows = [*(f"{d},{i}" for i, d in enumerate(HOURS[:-1])), f"{HOURS[-1]},1e39"]
    with pytest.raises(ValueError, match="values too large to be scaled, up to 1e\\+39"):
        Table(plain(tmp_path, rows)).scaled_by(Table(plain(tmp_path, rows)))
    with pytest.raises(ValueError, match="no column of numbers beside 'date'"):
        len(Table(plain(tmp_path, HOURS, header="date")))
    with pytest.raises(ValueError, match="label 'odd' that is neither 0 nor 1, such as -1"):
        len(Table(plain(tmp_path, [f"{d},1,-1" for d in HOURS], "date,load,odd"), labels="odd"))


def test_steps_may_be_parts_of_a_second(tmp_path):
    rows = [f"2021-01-01 00:00:00.{i:02d}0,{i}" for i in range(20)]
    table = Table(plain(tmp_path, rows))
    assert table.values[:, 0].tolist() == list(range(20))
    assert str(table.following(1)[0]) == "2021-01-01T00:00:00.200000"
    assert len(Table(plain(tmp_path, [*rows[:5], *rows[6:]]), gaps="fill")) == 20
    mixed = [f"{HOURS[0]}+02:00,1", f"{HOURS[1]},1"]
    with pytest.raises(ValueError, match="some dates have a time zone and some have none"):
        len(Table(plain(tmp_path, mixed)))


def test_the_separator_line_of_excel_is_no_header(tmp_path):
    rows = ["sep=;", "date;load", *(f"{d};{i}" for i, d in enumerate(HOURS))]
    assert Table(write(tmp_path / "x.csv", rows, "utf-8-sig")).values[:, 0].tolist() == list(
        range(12)
    )
