"""The step: schedules, decay, guard, average and precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import tiny

from zoo.data import train_iterator
from zoo.errors import ConfigError, NonFiniteError
from zoo.training import Checkpointing, Model, Optimizer, Partition, train
from zoo.training.groups import decays
from zoo.training.guard import watched
from zoo.training.logbook import read_rows
from zoo.training.optimizer import make_optimizer, make_schedule, scale_by_adam
from zoo.training.program import make_program
from zoo.training.step import turns
from zoo.training.tree import from_dict, to_dict


@pytest.fixture(scope="module")
def program():
    return make_program(tiny.get_config(), jax.devices()[:1])


@pytest.fixture
def batch(program):
    return next(train_iterator(program.config.data, 0))


def fetch(program, *args):
    with program.context():
        return program.step(*args)


def test_schedules_begin_peak_and_end_where_they_say():
    cosine = make_schedule(
        Optimizer(learning_rate=2.0, warmup_steps=10, initial_fraction=0.1, final_fraction=0.05),
        100,
    )
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(55)], [0.2, 2.0, 1.05], rtol=1e-6)
    np.testing.assert_allclose(cosine(100), 0.1, rtol=1e-6)
    cycle = make_schedule(Optimizer(learning_rate=2.0, schedule="one_cycle"), 100)
    np.testing.assert_allclose([cycle(0), cycle(30), cycle(100)], [0, 2.0, 0], atol=1e-6)
    line = make_schedule(Optimizer(learning_rate=2.0, schedule="linear"), 100)
    np.testing.assert_allclose([line(0), line(50)], [2.0, 1.0])
    with pytest.raises(ConfigError, match="warmup_steps is 10, but the run has 5 steps"):
        make_schedule(Optimizer(warmup_steps=10), 5)


def test_matrices_decay_and_norms_biases_and_tables_do_not(program):
    mask = to_dict(decays(program.abstract.params, None, (r"head/.*",)))
    assert mask["mlp"]["up"] == {"kernel": True, "bias": False}
    assert mask["embed"]["kernel"]
    assert not mask["head"]["kernel"]  # asked for
    assert not mask["position_embedding"]
    assert not any(mask["norm"].values())
    stacked = {"layers": {"norm1": {"scale": jnp.zeros((3, 4))}, "a": {"bias": jnp.zeros((3, 4))}}}
    assert not any(jax.tree.leaves(decays(stacked)))


RULES = ["adamw", "adam", "sgd", "lamb", "lion", "adafactor", "nadamw", "rmsprop"]


@pytest.mark.parametrize("name", RULES)
def test_a_bad_step_leaves_the_state_of_every_rule(name):
    rule = make_optimizer(Optimizer(name=name, clip=1.0))
    params = {"a": jnp.full((3, 4), 2.0), "b": jnp.ones(4)}
    grads = jax.tree.map(jnp.sin, params)
    _, state = rule.update(grads, rule.init(params), params, bad=jnp.int32(-1))
    _, kept = rule.update(jax.tree.map(jnp.log, params), state, params, bad=jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    _, gone = rule.update(grads, state, params)
    moved = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (gone, state)), strict=True)
    ]
    assert any(moved)


@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_is_that_of_optax(nesterov):
    ours, theirs = (
        of(0.8, 0.95, 1e-6, nesterov=nesterov) for of in (scale_by_adam, optax.scale_by_adam)
    )
    params = {"a": jnp.full((3, 4), 2.0), "b": jnp.ones(4)}
    states = [rule.init(params) for rule in (ours, theirs)]
    for step in range(4):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(p * (step + 1)), params)
        with jax.disable_jit():  # compiled, products and sums may become one rounding
            found = [rule.update(grads, s) for rule, s in zip((ours, theirs), states, strict=True)]
        jax.tree.map(np.testing.assert_array_equal, *found)
        states = [state for _, state in found]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_goes_down_hill(name):
    rule = make_optimizer(Optimizer(name=name, weight_decay=0.01, clip=1.0))
    params = {"a": {"kernel": jnp.full((4, 4), 2.0)}}
    loss = lambda p: (p["a"]["kernel"] ** 2).sum()  # noqa: E731

    @jax.jit
    def descend(params, state):
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(lambda p, u: p - 0.05 * u, params, updates), state

    state, before = rule.init(params), loss(params)
    for _ in range(20):
        params, state = descend(params, state)
    assert loss(params) < 0.9 * before


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(program, batch):
    state = program.init(0)
    before = jax.tree.map(np.asarray, state)
    batch = {**batch, "images": np.where(np.arange(16) == 3, np.nan, 1.0)[:, None, None, None] *
             batch["images"]}  # fmt: skip
    after, output = fetch(program, state, program.place(batch))
    names = watched(turns(program.task.phases), program.assigned)
    assert names[int(output.bad)] == "the loss"
    assert int(after.step) == 1
    for name in ("params", "opt_state", "ema"):
        old, new = getattr(before, name), getattr(after, name)
        jax.tree.map(lambda o, n: np.testing.assert_array_equal(o, np.asarray(n)), old, new)


def test_the_average_follows_the_parameters(program, batch):
    state = program.init(0)
    first = np.asarray(state.params["head"]["kernel"])
    state, output = fetch(program, state, program.place(batch))
    assert int(output.bad) == -1
    now, mean = (np.asarray(t["head"]["kernel"]) for t in (state.params, state.ema))
    np.testing.assert_allclose(mean, 0.1 * first + 0.9 * now, rtol=1e-5, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, state.variables()["params"], state.ema)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(program, batch):
    def once(seed):
        state, _ = fetch(program, program.init(seed), program.place(batch))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])

    np.testing.assert_array_equal(once(0), once(0))
    assert np.abs(once(0) - once(1)).max() > 1e-3


def test_bfloat16_computes_in_half_and_keeps_parameters_whole(program, batch):
    config = dataclasses.replace(program.config, precision="bfloat16")
    half = make_program(config, jax.devices()[:1])
    state, output = fetch(half, half.init(0), half.place(batch))
    _, whole = fetch(program, program.init(0), program.place(batch))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    losses = [float(o.means["loss"].compute()) for o in (output, whole)]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[1]


def poisoned(**changes):
    config = tiny.get_config()
    data = dataclasses.replace(config.data, train=tiny.Blobs(broken_at=32))
    return dataclasses.replace(config, data=data, **changes)


def test_the_guard_names_what_is_not_finite(tmp_path):
    with pytest.raises(NonFiniteError, match=r"At step [1-4] the loss is not finite"):
        train(poisoned(), tmp_path / "run")


def test_the_guard_skips(tmp_path, capsys):
    result = train(poisoned(guard="skip"), tmp_path / "run")
    assert "it is left out" in capsys.readouterr().out
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
    assert int(result.state.step) == 12


def test_the_guard_goes_back_to_a_checkpoint(tmp_path, capsys):
    config = poisoned(guard="rollback", checkpoint=Checkpointing(every=1, keep=2), num_steps=6)
    result = train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "going back" in said
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
    losses = [row["train/loss"] for row in read_rows(tmp_path / "run/metrics.jsonl")
              if "train/loss" in row]  # fmt: skip
    assert len(losses) == 6
    assert np.isfinite(losses).all()


def test_trees_become_dicts_and_trees_again():
    tree = {"a": (jnp.zeros(2), {"b": jnp.ones(3)}, ()), "c": None}
    back = from_dict(to_dict(tree), tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert from_dict(to_dict(None), None) is None


def test_what_blocks_keep_is_a_choice_of_the_partition():
    config = tiny.get_config()
    vit = dataclasses.replace(
        config, model=Model("vit_test"), partition=Partition(remat="attention")
    )
    assert make_program(vit, jax.devices()[:1]).networks.remat == "attention"
    vit = dataclasses.replace(vit, model=Model("vit_test", {"remat": True}))
    none = dataclasses.replace(vit, partition=Partition(remat="none"))
    assert make_program(none, jax.devices()[:1]).networks.remat is False
    config = dataclasses.replace(config, partition=Partition(remat="full"))
    with pytest.raises(ConfigError, match="Tiny has none"):
        make_program(config, jax.devices()[:1])
