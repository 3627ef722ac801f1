"""Each config of `configs/incontext` reaches what its docstring says, within the stated margin."""

from pathlib import Path

import pytest

from zoo.training import train
from zoo.training.config import load_file

FOLDER = Path(__file__).parents[2] / "configs" / "incontext"


@pytest.fixture
def reached(request, tmp_path):
    """The numbers of a run of the config that is the parameter."""
    return train(load_file(FOLDER / f"{request.param}.py"), tmp_path).metrics


def config(name):
    return pytest.mark.parametrize("reached", [name], indirect=True)


@pytest.mark.variants
@config("linear")
def test_linear_functions_are_learned(reached):
    assert reached["standard/prediction"] < 0.15
    assert reached["standard/averaging"] > 0.45


@pytest.mark.variants
@config("conjunctions")
def test_conjunctions_are_learned_nearly_as_well_as_can_be(reached):
    assert reached["standard/prediction"] > reached["standard/bayes"] - 0.06
    assert reached["standard/prediction"] > reached["standard/nearest"] + 0.06


@pytest.mark.variants
@config("parities")
def test_parities_are_not(reached):
    assert reached["standard/prediction"] < 0.6
    assert reached["standard/bayes"] > 0.98


@pytest.mark.variants
@config("teaching")
def test_teaching_sequences_shorten_learning(reached):
    assert reached["taught/prediction"] > 0.98
    assert reached["plain/prediction"] < 0.95 < reached["plain/bayes"]
