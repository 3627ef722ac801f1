"""Transitions between gaits: the loss, and what a small network learns."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.data import Data, eval_batches
from zoo.data.gaits import GaitWindows
from zoo.evaluators.stories import PlayedStory, save_animation
from zoo.motion.skeleton import WALKER
from zoo.tasks import MotionCompletion
from zoo.training import train

CONFIG = Path(__file__).parents[2] / "configs" / "motion" / "story_to_motion.py"


@pytest.fixture(scope="module")
def batch():
    source = GaitWindows(4, length=24, gap=(6, 8))
    return next(eval_batches(Data(source, source, eval_batch_size=4)))


def test_the_truth_costs_nothing_and_an_error_costs_where_it_is_unknown(batch):
    task, truth = MotionCompletion(), jnp.asarray(batch["motion"])
    unknown = jnp.asarray(batch["known"] == 0)
    terms = jax.jit(lambda said: task.terms(said, truth, unknown))
    right = terms(truth)
    assert (right["loss"] < 0.1 * 0.05).all() and not right["rotations"].any()
    wrong = terms(truth + 0.1 * unknown[..., None])
    np.testing.assert_allclose(wrong["rotations"], 0.1, rtol=1e-3)
    assert (wrong["loss"] > 0.2).all() and (wrong["joints"] > 0.005).all()


def test_a_network_that_adds_nothing_to_the_line_is_measured_beside_it(batch):
    """Its head is zero: rotations are then on lines rather than arcs, which differ little."""
    model, task = zoo.create("story_to_motion_tiny", depth=1), MotionCompletion()
    inputs = {k: batch[k] for k in ("motion", "known")}
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    head = jax.tree.map(jnp.zeros_like, variables["params"]["head"])
    variables = {"params": {**variables["params"], "head": head}}
    said = jax.jit(lambda v, b: task.metrics(model, v, b))(variables, batch)
    said = {name: float(mean.compute()) for name, mean in said.items()}
    assert said["line_joint_error"] > 0.005
    assert said["joint_error"] == pytest.approx(said["line_joint_error"], rel=0.15)
    assert said["foot_sliding"] == pytest.approx(said["line_foot_sliding"], rel=0.25)


def test_an_animation_shows_every_frame(tmp_path):
    from PIL import Image

    joints = np.cumsum(np.full((9, 10, 3), 0.05), 0)
    save_animation(tmp_path / "story.gif", WALKER, joints, {"door": (1.0, 0.0, 1.0)}, size=64)
    with Image.open(tmp_path / "story.gif") as image:
        assert image.n_frames == 3 and image.size == (64, 64)


@pytest.mark.slow
def test_a_story_is_played_with_what_was_learned(tmp_path):
    spec = importlib.util.spec_from_file_location("story_to_motion_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert PlayedStory() in config.evaluators
    found = train(dataclasses.replace(config, num_steps=500), tmp_path).metrics
    assert found["joint_error"] < 0.7 * found["line_joint_error"]
    assert found["foot_sliding"] < found["line_foot_sliding"]
    assert (tmp_path / "gaps.gif").stat().st_size > 0
    assert found["place_error"] < 0.3
    assert (tmp_path / "story.gif").stat().st_size > 0
