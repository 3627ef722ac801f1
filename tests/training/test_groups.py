"""Which leaves are trained, decay, and how fast each learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import proofs

import zoo
from zoo.errors import ConfigError
from zoo.tasks import Phase
from zoo.training import Optimizer, groups
from zoo.training.command_line import parse
from zoo.training.optimizer import make_optimizer, rate_factors
from zoo.training.program import make_program
from zoo.training.tree import join, leaf_paths, split


def shapes(name, **fields):
    model = zoo.create(name, **fields)
    inputs = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]


def by_path(tree):
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def test_learning_rates_fall_from_the_head_down():
    model, params = shapes("vit_test", depth=3)
    factors = by_path(groups.layer_factors(params, model, 0.5))
    found = {
        path: float(factors[f"{path}/kernel"])
        for path in ("embed", "layers_0/mlp/up", "layers_2/mlp/up", "head")
    }
    assert found == {"embed": 0.5**4, "layers_0/mlp/up": 0.5**3, "layers_2/mlp/up": 0.5, "head": 1}
    assert factors["norm/scale"] == 1 and factors["position_embedding"] == 0.5**4


def test_layers_of_stages_are_counted_through():
    model, params = shapes("swin_test")
    factors = by_path(groups.layer_factors(params, model, 0.5))
    kernels = [p for p in factors if p.endswith("mlp/up/kernel")]
    assert kernels == sorted(kernels)
    falling = [float(factors[path]) for path in kernels]
    assert falling == sorted(set(falling)) and falling[-1] == 0.5


def test_stacked_layers_have_a_factor_a_row():
    model, params = shapes("gpt2_test", scan_layers=True)
    plain, unrolled = shapes("gpt2_test")
    stacked = by_path(groups.layer_factors(params, model, 0.5))["layers/mlp/up/kernel"]
    each = by_path(groups.layer_factors(unrolled, plain, 0.5))
    wanted = [each[f"layers_{i}/mlp/up/kernel"] for i in range(len(stacked))]
    np.testing.assert_array_equal(stacked.reshape(-1), np.array(wanted))


def test_factors_scale_the_step_and_the_decay_of_their_leaves():
    config = dataclasses.replace(
        proofs.plain(),
        optimizer=Optimizer(
            name="sgd", b1=0.0, learning_rate=0.1, schedule="constant",
            rate_multipliers={"head/.*": 0.0, "embed/.*": 0.5},
        ),
    )  # fmt: skip
    plain = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, rate_multipliers={})
    )
    moves = []
    for made in map(make_program, (config, plain)):
        state = made.init(0)
        before = jax.tree.map(np.asarray, state.params)
        batch = next(proofs.train_iterator(made.config.data, 0))
        with made.context():
            state, _ = made.step(state, made.place(batch))
        moves.append(by_path(jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)))
    slow, fast = moves
    assert not slow["head/kernel"].any() and fast["head/kernel"].any()
    largest = np.abs(fast["embed/kernel"]).max()
    np.testing.assert_allclose(slow["embed/kernel"], fast["embed/kernel"] / 2, atol=1e-5 * largest)


def test_decay_is_scaled_by_pattern():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    rule = make_optimizer(
        Optimizer(name="sgd", b1=0.0, weight_decay=0.1, decay_multipliers={"b/.*": 3.0})
    )
    updates, _ = rule.update(zeros, rule.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["kernel"], 0.3, rtol=1e-6)
    assert rate_factors(Optimizer(), zoo.create("vit_test"), params) is None


def test_groups_are_networks_methods_and_phases():
    model, params = shapes("vit_test")
    networks = {"one": model, "two": model}
    both = {"one": params, "two": params}
    phases = (Phase("first", ("one",)),)
    assigned = groups.assign(both, networks, phases=phases)
    assert {g for p, g in assigned.items() if p.startswith("one/")} == {"one"}
    assert {g for p, g in assigned.items() if p.startswith("two/")} == {None}
    with pytest.raises(ConfigError, match="Nothing is left to train"):
        groups.assign(both, networks, phases=(Phase("none", ("three",)),))


def test_all_of_it_is_set_from_the_command_line():
    _, command = parse(
        ["configs/vision/cswin_digits.py", "--freeze", "embed.*", "--optimizer.layer-decay", "0.7",
         "--optimizer.rate-multipliers", "head/.*", "0.1"]
    )  # fmt: skip
    assert command.config.freeze == ("embed.*",)
    assert command.config.optimizer.layer_decay == 0.7
    assert command.config.optimizer.rate_multipliers == {"head/.*": 0.1}


def test_trees_are_split_and_joined_again():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    yes, no = split(tree, lambda path: path in ("a/b", "d"))
    assert yes == {"a": {"b": 1}, "d": 3} and no == {"a": {"c": 2}}
    assert join(yes, no) == join(no, yes) == tree
