"""Agents with a memory: rollouts in the step, their state in the carry, and what they learn."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.data import Data
from zoo.environments import MemoryChain, Seeds, SwitchCorridor
from zoo.evaluators import PlayedEpisodes
from zoo.tasks import Reinforcement
from zoo.tasks.reinforcement import advantages
from zoo.training import Checkpointing, Model, Optimizer, TrainConfig, train
from zoo.training.program import make_program
from zoo.training.state import State

CONFIG = Path(__file__).parents[2] / "configs" / "control" / "gtrxl_memory.py"


def tiny(environment=None, steps=4, **task):
    environment = environment or SwitchCorridor(4, 6)
    fields = {"observation_dim": environment.observation_dim, "embed_dim": 8, "depth": 1,
              "num_heads": 1, "head_dim": 8, "memory_length": 8,
              "outputs": environment.num_actions + 1}  # fmt: skip
    return TrainConfig(
        model=Model("gtrxl_test", fields),
        task=Reinforcement(environment, **{"unroll": 5, "reuse": 1, **task}),
        data=Data(train=Seeds(64), eval=Seeds(8), batch_size=4, eval_batch_size=8),
        optimizer=Optimizer(learning_rate=1e-2, schedule="constant"),
        checkpoint=Checkpointing(metric="success", every=2),
        num_steps=steps,
        log_every=1,
        compilation_cache=None,
    )


def test_advantages_are_discounted_sums_that_stop_where_episodes_end():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 7))
    dones = np.zeros((2, 6), bool)
    dones[0, 2] = True
    got = advantages(*map(jnp.asarray, (rewards, values, dones)), 0.9, 0.8)
    for b in range(2):
        for t in range(6):
            total, weight = 0.0, 1.0
            for k in range(t, 6):
                goes_on = 1.0 - dones[b, k]
                total += weight * (rewards[b, k] + 0.9 * goes_on * values[b, k + 1] - values[b, k])
                weight *= 0.9 * 0.8 * goes_on
            assert got[b, t] == pytest.approx(total, abs=1e-5)


def test_a_segment_over_several_episodes_is_its_steps_one_by_one():
    """What an agent did is judged as it was done, and no episode sees another."""
    model = zoo.create("gtrxl_test", depth=1, memory_length=12, outputs=3)
    x = jax.random.normal(jax.random.key(0), (2, 10, 5))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    variables = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape),
                             variables)  # fmt: skip
    first = np.zeros((2, 10), bool)
    first[:, 0] = first[0, 4] = first[1, 7] = first[1, 8] = True
    step = jax.jit(lambda m, x, r: model.apply(variables, m, x, r, method="step"))
    memory = model.init_state(2)
    _, whole = step(memory, x, first)
    scale = np.abs(whole).max()
    one_by_one = []
    for t in range(10):
        memory, y = step(memory, x[:, t : t + 1], first[:, t : t + 1])
        one_by_one.append(y[:, 0])
    np.testing.assert_allclose(np.stack(one_by_one, 1), whole, atol=2e-5 * scale)
    _, other = step(model.init_state(2), x.at[0, :4].add(1.0), first)
    np.testing.assert_allclose(other[0, 4:], whole[0, 4:], atol=1e-6 * scale)
    assert np.abs(other[0, :4] - whole[0, :4]).max() > 1e-3


def placed(program, state):
    """A copy of a state, where the program wants it: a step uses up what it is given."""
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), state,
                        program.abstract)  # fmt: skip


@pytest.fixture(scope="module")
def played():
    """Four steps of a program, and the state behind each."""
    program = make_program(tiny(reuse=0), jax.devices()[:1])
    batch = program.place({"world": np.arange(4), "valid": np.ones(4, bool)})
    states = [program.init(0)]
    with program.context():
        for _ in range(4):
            states.append(program.step(placed(program, states[-1]), batch)[0])
    return program, batch, states


def test_worlds_memories_and_rollouts_continue_bit_for_bit(played):
    """From the parts that a checkpoint holds of the state behind two steps."""
    program, batch, states = played
    parts = jax.tree.map(np.asarray, program.to_global(states[2]).to_parts())
    state = placed(program, State.from_parts(parts, program.abstract))
    with program.context():
        for _ in range(2):
            state, _ = program.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state, states[4])
    now, before = states[4].carry, states[2].carry
    assert np.any(now.state.time != before.state.time)
    assert np.any(np.asarray(now.memory) != np.asarray(before.memory))


def test_episodes_are_drawn_beside_what_chance_gets(played, tmp_path):
    program, _, states = played
    with program.context():
        found = PlayedEpisodes(count=2, worlds=8).run(
            program, states[0].variables(), program.config.data, tmp_path
        )
    assert -0.1 < found["random_return"] < 1 and 0 <= found["random_success"] < 1
    assert (tmp_path / "episodes.png").stat().st_size > 0


@pytest.mark.slow
def test_the_first_update_begins_at_the_ratio_one(played):
    """The loss of the first update is that of plain policy gradients: the ratio is 1."""
    program, _, states = played
    state, network, task = states[4], program.networks, program.task
    batch = {"world": np.arange(4), "valid": np.ones(4, bool)}
    run = jax.jit(lambda carry, phase: task.loss(
        network, {"params": state.params}, carry, batch, jax.random.key(3), phase
    ), static_argnames="phase")  # fmt: skip
    _, aux = run(state.carry, phase="collect")
    again, reused = run(aux.carry, phase="reuse")
    assert aux.carry.rows["advantages"].shape == (4, 5)
    np.testing.assert_allclose(again, aux.metrics["loss"].compute(), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, reused.carry, aux.carry)
    assert np.any(aux.carry.rows["observations"] != state.carry.rows["observations"])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole = train(tiny(), tmp_path / "whole")
    train(tiny(steps=2), tmp_path / "parts")
    resumed = train(tiny(), tmp_path / "parts")
    for name in ("params", "carry", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(resumed.state, name),
            getattr(whole.state, name),
        )
    assert set(whole.metrics) >= {"success", "return"}


@pytest.mark.slow
def test_a_gated_transformer_remembers_a_cue_for_twenty_steps(tmp_path):
    spec = importlib.util.spec_from_file_location("gtrxl_memory", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.task.environment == MemoryChain(20)
    assert train(config, tmp_path / "long").metrics["success"] >= 0.95
    overrides = {**config.model.overrides, "memory_length": 1}
    short = dataclasses.replace(config, model=Model(config.model.name, overrides))
    assert train(short, tmp_path / "short").metrics["success"] <= 0.6
