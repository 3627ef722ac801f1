"""The programs of training steps do not grow: `benchmarks/programs.py` says how large they are."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BUDGETS = json.loads((FOLDER / "program_budgets.json").read_text())
QUICK = "vit_test"
ROOM = 1.2  # versions of XLA and kinds of processors differ; what grows with the depth does more


@pytest.fixture(scope="module")
def programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the file takes it out on import
        spec = importlib.util.spec_from_file_location("programs", FOLDER / "programs.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUDGETS],
)
def test_a_training_step_is_no_larger_than_its_budget(programs, name):
    size = programs.size_of(programs.lowered_step(name).compile())
    assert size <= ROOM * BUDGETS[name]
    assert size >= BUDGETS[name] / 3, "write the budget anew: python benchmarks/programs.py"


def test_what_says_where_an_instruction_comes_from_does_not_count(programs):
    class Compiled:
        def as_text(self):
            line = '%a = f32[2]{0} add(%b, %c), metadata={op_name="a{b}" source_line=3}'
            return f"{line}, frontend_attributes={{x={{1}}}}, calls=%d"

    assert programs.size_of(Compiled()) == len("%a = f32[2]{0} add(%b, %c), calls=%d")
