"""A run that starts from a published checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
from model_helpers import filled_state_dict
from safetensors.numpy import save_file

import zoo
from zoo.data import Data, Digits
from zoo.data.transforms import Normalize, Resize
from zoo.errors import ConfigError
from zoo.tasks import Classification
from zoo.training import Model, Partition, TrainConfig
from zoo.training.program import make_program
from zoo.training.start import first_state

FIELDS = {"image_size": (16, 16), "in_channels": 1, "depths": (1, 1)}


@pytest.fixture(scope="module")
def state():
    return filled_state_dict(zoo.create("swin_test", **FIELDS))


def program(checkpoint, mode="sharding", **model):
    steps = (Resize((16, 16), "bilinear"), Normalize((0.5,), (0.5,)))
    config = TrainConfig(
        model=Model("swin_test", FIELDS, checkpoint=str(checkpoint), **model),
        task=Classification(),
        data=Data(Digits("train"), Digits("test"), steps, steps),
        partition=Partition(mode=mode),
        ema_decay=0.9,
    )
    return make_program(config)


@pytest.mark.parametrize("mode", ["sharding", "pmap"])
def test_parameters_and_their_mean_are_those_of_the_file(tmp_path, state, mode):
    file = tmp_path / "swin.safetensors"
    save_file(state, file)
    made = program(file, mode)
    with made.context():
        begun = made.to_global(first_state(made))
    _, variables = zoo.load("swin_test", file, **FIELDS)
    for held in (begun.params, begun.ema):
        jax.tree.map(np.testing.assert_array_equal, held, variables["params"])
    fresh = jax.tree.leaves(begun.opt_state)
    assert all(not np.any(x) for x in fresh if np.issubdtype(x.dtype, np.floating))


def test_another_head_is_refused_or_fresh_when_asked_for(tmp_path, state):
    file = tmp_path / "swin.safetensors"
    save_file(state | {k: v[:3] for k, v in state.items() if k.startswith("head.")}, file)
    made = program(file)
    with pytest.raises(ConfigError, match=r"(?s)model.checkpoint: .*head"), made.context():
        first_state(made)
    made = program(file, adapt=True)
    with made.context():
        begun = first_state(made)
    _, variables = zoo.load("swin_test", file, adapt=True, rng=jax.random.key(0), **FIELDS)
    jax.tree.map(np.testing.assert_array_equal, begun.params, variables["params"])


def test_a_missing_file_and_a_module_of_ones_own_are_said(tmp_path):
    made = program(tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match=r"model.checkpoint: .*absent.pth"):
        first_state(made)
    config = made.config
    foreign = dataclasses.replace(config.model, name="tiny:Tiny")
    made.config = dataclasses.replace(config, model=foreign)
    with pytest.raises(ConfigError, match="no checkpoint rules"):
        first_state(made)
