"""A run that starts from a published checkpoint."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from model_helpers import filled_state_dict
from safetensors.numpy import save_file

import zoo
from zoo.data import Arrays, Data, Digits
from zoo.data.transforms import Normalize, Resize
from zoo.errors import ConfigError
from zoo.tasks import Classification
from zoo.training import Model, Optimizer, Partition, TrainConfig
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
    with pytest.raises(ConfigError, match="is no run directory"):
        first_state(made)


SCRIPT = """
import resource, sys, dataclasses, jax
from training.test_start import large
from zoo.training.start import first_state
from zoo.training.program import make_program

made = make_program(large(sys.argv[1]))
with made.context():
    # the program is compiled before memory is looked at
    made._first_with.lower(made.abstract.variables(averaged=False), made._key(0)).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = jax.block_until_ready(first_state(made))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernel = state.params["layers_0"]["mlp"]["up"]["kernel"]
print(kernel.sharding.spec, (after - before) * 1024, sum(x.nbytes for x in jax.tree.leaves(state)))
"""


def large(checkpoint):
    """A network of 100 MB whose largest leaf is 9 MB, cut over two devices."""
    fields = {
        "image_size": (16, 16),
        "patch_size": 8,
        "embed_dim": 768,
        "depth": 4,
        "num_heads": 12,
    }
    images = Arrays(image=np.zeros((4, 16, 16, 3), "f"), label=np.zeros(4, int))
    return TrainConfig(
        model=Model("vit_test", fields, checkpoint=checkpoint),
        task=Classification(),
        data=Data(images, images, batch_size=4, threads=1),
        optimizer=Optimizer(name="sgd", b1=0.0, schedule="constant"),
        partition=Partition(fsdp=2),
    )


@pytest.mark.slow
def test_a_checkpoint_goes_leaf_by_leaf_into_the_sharding_of_the_run(tmp_path):
    """The peak is the state itself and a few leaves, not a whole copy more on the host."""
    model = zoo.create("vit_test", **large("").model.overrides)
    file = tmp_path / "vit.safetensors"
    save_file(filled_state_dict(model), file)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    spec, grown, held = done.stdout.strip().rsplit(" ", 2)
    assert spec == "P(None, 'fsdp')"
    assert int(held) > 100e6
    assert int(grown) < 1.5 * int(held)
