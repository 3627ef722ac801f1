"""Every config without a budget: model, data, task and optimizer fit together."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from zoo.errors import ConfigError
from zoo.training.config import Partition, load_file
from zoo.training.program import make_program

FOLDER = Path(__file__).parents[1] / "configs"
PODS = {path.stem for path in (FOLDER / "budgets").glob("*")}  # compiled by their budgets' tests
CONFIGS = [path for path in sorted(FOLDER.rglob("*.py")) if path.stem not in PODS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_can_be_traced(path):
    try:
        config = load_file(path)
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        pytest.skip(str(error))
    # those for many devices are traced for one
    config = replace(config, partition=Partition(remat=config.partition.remat))
    program = make_program(config, jax.devices()[:1])
    try:
        batch = program.abstract_batch()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with program.context():
        state, _ = jax.eval_shape(program.train_step, program.abstract, batch)
    shapes = lambda tree: jax.tree.map(lambda t: (t.shape, t.dtype), tree)  # noqa: E731
    assert shapes(state) == shapes(program.abstract)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_docstring_begins_with_the_command(path):
    command = f"python train.py {path.relative_to(FOLDER.parent).as_posix()}"
    text = path.read_text().split('"""')[1]
    assert command in text or (path.stem == "default" and "python train.py" in text)
