"""The findings of `configs/incontext`, each within the margin that its docstring states.

Each is a training of minutes: `pytest -m variants tests/test_incontext_findings.py`.
"""

from pathlib import Path

import pytest

from zoo.training import train
from zoo.training.config import load_file

FOLDER = Path(__file__).parents[1] / "configs/incontext"

FINDINGS = {
    "linear": lambda m: m["standard/prediction"] < 0.15 < 0.4 < m["standard/averaging"],
    "conjunctions": lambda m: m["standard/bayes"] - m["standard/prediction"] < 0.06,
    "parities": lambda m: m["standard/prediction"] < 0.6 < 0.98 < m["standard/bayes"],
    "teaching": lambda m: m["taught/prediction"] > 0.98 and m["plain/prediction"] < 0.95,
    "uncertainty": lambda m: (
        m["standard/prediction"] - m["standard/trained"] < 0.2
        and m["noise_6/prediction"] - m["noise_6/informed"] > 1
        and m["weights_3/prediction"] - m["weights_3/informed"] > 0.3
    ),
    "windows": lambda m: (
        m["standard/prediction"] < 0.7
        and m["standard/prediction"] + 0.1 < m["random_0.25/prediction"]
        and m["random_0.25/prediction"] + 0.1 < m["random_0.5/prediction"]
        and m["random_0.5/prediction"] < m["random_1/prediction"]
    ),
    "algoformer": lambda m: m["standard/looped"] < m["standard/standard"] < 0.35,
}


def test_every_finding_has_its_margin():
    assert set(FINDINGS) == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.variants
@pytest.mark.parametrize("name", FINDINGS)
def test_a_run_shows_the_finding(name, tmp_path):
    result = train(load_file(FOLDER / f"{name}.py"), tmp_path)
    assert FINDINGS[name](result.metrics), result.metrics
    assert (tmp_path / "learning_curves.png").is_file()
