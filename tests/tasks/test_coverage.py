"""The table of objectives: no required cell is empty, and what it names is there."""

import json
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.tasks.coverage import NONE, OBJECTIVES, resolve, table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return table()


def test_no_required_cell_is_empty(rows):
    empty = [row["objective"] for row in rows if row["required"] and row["systems"] == [NONE]]
    assert not empty
    assert {row["objective"] for row in rows} == set(OBJECTIVES)


def test_a_system_is_where_its_task_says(rows):
    systems = {(row["objective"], row["modality"]): row["systems"] for row in rows}
    assert "bert" in systems["mlm", "text"] and "gpt2" in systems["clm", "text"]
    assert {"vit", "swin"} <= set(systems["sup", "image"])
    assert systems["clip", ""] == [NONE]


def test_what_it_names_is_there(rows):
    for row in rows:
        assert callable(resolve(row["made_of"]))
        assert (ROOT / row["learns"]).is_file(), row["learns"]


def test_the_command_prints_it(capsys):
    assert main(["objectives", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["objective"] == "mlm"
