"""Configs: from the command line, to JSON and back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from training import tiny

from zoo.data import Arrays
from zoo.errors import ConfigError
from zoo.training import Model, config
from zoo.training.command_line import parse
from zoo.training.program import build_model

CONFIG = str(Path(tiny.__file__))
DEFAULT = str(Path(__file__).parents[2] / "configs/default.py")


def test_fields_are_set_by_path_with_and_without_dashes():
    name, command = parse(
        [CONFIG, "--optimizer.learning-rate", "1e-4", "partition.fsdp=2", "--seed=3"]
    )
    assert name == "tiny"
    assert command.config.optimizer.learning_rate == 1e-4
    assert command.config.partition.fsdp == 2
    assert command.config.seed == 3
    expected = dataclasses.replace(tiny.get_config().optimizer, learning_rate=1e-4)
    assert command.config.optimizer == expected


def test_fields_of_the_model_are_set_by_name():
    _, command = parse(
        [DEFAULT, "--model.overrides.drop-path", "0.3", "--model.overrides.depths=(1, 1)"]
    )
    model = build_model(command.config.model)
    assert model.drop_path == 0.3
    assert model.depths == (1, 1)
    assert model.embed_dim == 48  # of the config file


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--optimizer.larning-rate", "1"], "did you mean --optimizer.learning-rate"),
        (["--num-steps", "many"], "--num-steps"),
        (["--optimizer.name", "adamm"], "adamw"),
        (["--num-steps", "0"], "num_steps is 0; it must be at least 1"),
        (["--ema-decay", "1.5"], "ema_decay is 1.5"),
        (["--model.overrides.width"], "needs a value"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(args, said):
    with pytest.raises(ConfigError) as error:
        parse([CONFIG, *args])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_field_is_said_beside_a_source_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(
        "import dataclasses\nfrom training import tiny\n"
        "@dataclasses.dataclass(frozen=True)\nclass Own:\n    size: int = 9\n"
        "def get_config():\n    config = tiny.get_config()\n"
        "    data = dataclasses.replace(config.data, train=Own())\n"
        "    return dataclasses.replace(config, data=data)\n"
    )
    own = str(tmp_path / "own.py")
    with pytest.raises(ConfigError, match=r"no field --partition\.fspd; did you mean --part"):
        parse([own, "partition.fspd=2"])
    with pytest.raises(ConfigError, match=r"There is no field --nosuch\."):
        parse([own, "--nosuch", "2"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from zoo.training import Optimiser\n", "line 1: ImportError: cannot import name 'Optim"),
        ("def get_config():\n    return tiny()\n", "line 2: NameError: name 'tiny' is not"),
        ("from zoo.training import Optimizer\ndef get_config():\n    return Optimizer(lr=1)\n",
         "line 3: TypeError: .* unexpected keyword argument 'lr'"),
        ("def get_config(:\n", "SyntaxError"),
        ("get_config = 3\n", "has no function get_config"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config_file_are_said_with_their_line(tmp_path, text, said):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        parse([str(tmp_path / "own.py")])
    assert "\n" not in str(error.value)


def test_a_missing_config_file_and_a_wrong_model_are_said():
    with pytest.raises(ConfigError, match=r"no config file 'configs/nothing\.py'"):
        parse(["configs/nothing.py"])
    with pytest.raises(ConfigError, match="no model 'swin_tset'; did you mean swin_test"):
        build_model(Model("swin_tset"))
    with pytest.raises(ConfigError, match="no field 'drop_pth'"):
        build_model(Model("swin_test", {"drop_pth": 1}))
    with pytest.raises(ConfigError, match="nowhere:Model"):
        build_model(Model("nowhere:Model"))


def test_a_saved_config_reads_well_and_is_the_same_again(tmp_path):
    for path in (CONFIG, DEFAULT):
        before = config.load_file(path)
        config.save(before, tmp_path / "config.json")
        assert config.load(tmp_path / "config.json") == before
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["optimizer"]["learning_rate"] == before.optimizer.learning_rate


def test_a_run_continues_with_its_own_config(tmp_path):
    config.save(dataclasses.replace(tiny.get_config(), num_steps=7), tmp_path / "config.json")
    _, command = parse(["--workdir", str(tmp_path), "--seed", "5"])
    assert (command.config.num_steps, command.config.seed) == (7, 5)


@pytest.mark.parametrize("text", [None, "", "{broken", "\xff"])
def test_a_run_whose_saved_config_is_lost_goes_on_from_what_it_was_begun_with(tmp_path, text):
    origin = {"config": str(Path(CONFIG).resolve()), "args": ["--num-steps", "7"]}
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    _, command = parse(["--workdir", str(tmp_path)])
    assert command.config.num_steps == 7 and command.config.model == tiny.get_config().model


def test_arrays_in_memory_are_named_when_a_config_is_loaded_again(tmp_path):
    arrays = Arrays(image=np.zeros((4, 4, 4, 1), np.uint8), label=np.zeros(4, np.int32))
    before = tiny.get_config()
    before = dataclasses.replace(before, data=dataclasses.replace(before.data, train=arrays))
    config.save(before, tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"ndarray of shape \(4, 4, 4, 1\) in memory"):
        config.load(tmp_path / "config.json")


def test_differences_name_the_field():
    old = config.to_json(tiny.get_config())
    new = config.to_json(dataclasses.replace(tiny.get_config(), seed=1))
    assert config.differences(old, new) == ["seed: 0 -> 1"]
