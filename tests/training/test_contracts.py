"""Several networks, optimizers and frozen leaves: what holds for one network holds for them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import proofs

from zoo.errors import ConfigError
from zoo.training import Model, Optimizer, train
from zoo.training.program import make_program
from zoo.training.tree import leaf_paths

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(request):
    asked = {item.callspec.params["name"] for item in request.session.items
             if "results" in item.fixturenames and item.path == request.path}  # fmt: skip
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
           "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, HERE / "proofs.py", *sorted(asked)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", proofs.RUNS)
@pytest.mark.parametrize("way", ["fsdp", "pmap"])
def test_devices_change_no_loss(results, name, way):
    alone, spread = results[name]["one device"], results[name][way]
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-4)
    np.testing.assert_allclose(spread["held out"], alone["held out"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def programs():
    return {name: make_program(make(), jax.devices()[:1]) for name, make in proofs.RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", proofs.RUNS)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(name, tmp_path):
    config = proofs.RUNS[name]()
    whole = train(config, tmp_path / "whole").state
    train(dataclasses.replace(config, num_steps=2), tmp_path / "parts")
    parts = train(config, tmp_path / "parts").state
    for path, a, b in zip(leaf_paths(whole), *map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_each_phase_moves_its_own_network_with_its_own_optimizer(programs):
    program = programs["gan"]
    state = program.init(0)
    assert set(state.opt_state) == {"generator", "discriminator"}
    assert "adam" in state.opt_state["generator"] and "sgd" in state.opt_state["discriminator"]
    assert leaf_paths(state.opt_state["discriminator"]["sgd"]) == [
        f"trace/{path}" for path in leaf_paths(state.params) if path.startswith("discriminator")
    ]


@pytest.mark.parametrize("name", ["distillation", "lora"])
def test_frozen_leaves_stay_to_the_bit_and_have_no_moments(programs, name):
    program = programs[name]
    state = program.init(0)
    before = jax.tree.map(np.asarray, (state.frozen, state.params))
    batch = next(proofs.train_iterator(program.config.data, 0))
    with program.context():
        state, _ = program.step(state, program.place(batch))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before[0])
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, before[1])),
                                            strict=True)]  # fmt: skip
    assert any(moved)
    trained = leaf_paths(state.params)
    held = leaf_paths(state.opt_state["student" if name == "distillation" else "train"])
    assert sorted(p.split("/mu/")[1] for p in held if "/mu/" in p) == sorted(trained)
    assert not any(path.startswith("teacher/") for path in trained)


def test_frozen_leaves_cost_no_gradient_in_the_compiled_step():
    """Of a network that is frozen but for its head, the step multiplies no other matrix twice."""
    config = proofs.lora()
    whole = dataclasses.replace(config, methods=())
    head = dataclasses.replace(whole, freeze=(r"(?!head/).*",))

    def cost(config):
        program = make_program(config, jax.devices()[:1])
        with program.context():
            step = program.train_step.lower(program.abstract, program.abstract_batch())
        compiled = step.compile()
        held = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.opt_state))
        return compiled.cost_analysis()["flops"], held, program

    flops, held, _ = cost(whole)
    less, few, frozen = cost(head)
    assert less < 0.45 * flops  # a forward pass is a third
    assert few == 2 * sum(x.size for x in jax.tree.leaves(frozen.abstract.params)) + 1
    assert set(frozen.abstract.params) == {"head"} and held > 10 * few


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"freeze": (r"blocks/.*",)}, r"freeze: 'blocks/.\*' matches no leaf; a pattern is"),
        ({"freeze": (r"(",)}, "they are regular expressions"),
        ({"freeze": (r".*",)}, "Nothing is left to train"),
        (
            {"optimizer": Optimizer(rate_multipliers={"nothing": 0.1})},
            "rate_multipliers: 'nothing'",
        ),
        ({"optimizer": {"heads": Optimizer()}}, "no entry for the group 'train'"),
        ({"optimizer": {"train": Optimizer(), "heads": Optimizer()}}, "has an entry 'heads'"),
        ({"methods": (proofs.LoRA(targets="nothing"),)}, "match no dense map of VisionTransformer"),
    ],
)
def test_what_matches_nothing_is_said_before_anything_is_traced(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_program(dataclasses.replace(proofs.lora(), methods=(), **changes)
                     if "methods" not in changes
                     else dataclasses.replace(proofs.lora(), **changes))  # fmt: skip


def test_a_run_goes_on_with_other_frozen_leaves_another_rule_and_a_mean(tmp_path, capsys):
    config = dataclasses.replace(proofs.plain(), num_steps=2)
    first = train(config, tmp_path).state
    config = dataclasses.replace(
        config,
        num_steps=4,
        ema_decay=0.9,
        freeze=("embed/.*",),
        optimizer=Optimizer(name="lion", learning_rate=1e-4, clip=1.0, weight_decay=0.1),
    )
    second = train(config, tmp_path).state
    said = capsys.readouterr().out
    assert "begins afresh" in said and "not used any more" in said
    kernel = second.frozen["embed"]["kernel"]
    np.testing.assert_array_equal(kernel, first.params["embed"]["kernel"])
    assert int(second.step) == 4 and "embed" not in second.ema


def test_another_clip_decay_and_schedule_keep_the_moments(tmp_path, capsys):
    config = dataclasses.replace(proofs.plain(), num_steps=2)
    train(config, tmp_path)
    other = Optimizer(learning_rate=1e-3, schedule="cosine", clip=1.0, weight_decay=0.01)
    second = train(dataclasses.replace(config, optimizer=other, num_steps=4), tmp_path).state
    said = capsys.readouterr().out
    assert "afresh" not in said and "not used" not in said
    assert int(second.opt_state["train"]["adam"].count) == 4


def test_a_network_starts_from_its_own_checkpoint(tmp_path):
    teacher = dataclasses.replace(proofs.plain(), num_steps=2)
    state = train(teacher, tmp_path / "teacher").state
    config = dataclasses.replace(proofs.distillation(), num_steps=2)
    model = {**config.model, "teacher": Model(proofs.TINY, checkpoint=str(tmp_path / "teacher"))}
    found = train(dataclasses.replace(config, model=model), tmp_path / "student").state
    jax.tree.map(np.testing.assert_array_equal, found.frozen["teacher"], state.params)
