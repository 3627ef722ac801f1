import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.environments import (
    CartPole,
    HiddenCartPole,
    MemoryChain,
    SwitchCorridor,
    TMaze,
    continued,
    rollout,
)

ALL = (MemoryChain(5), TMaze(3, 8), SwitchCorridor(5, 12), HiddenCartPole(20), CartPole(20))


def play(environment, actions, key=0):
    """An episode of these actions, one by one, until it ends: observations, rewards, whether."""
    state, seen = environment.reset(jax.random.key(key))
    observations, rewards, done = [np.asarray(seen)], [], False
    for action in actions:
        state, got = environment.step(state, jnp.asarray(action), jax.random.key(1))
        observations.append(np.asarray(got.observation))
        rewards.append(float(got.reward))
        done = bool(got.done)
        if done:
            break
    return np.stack(observations), rewards, done


@pytest.mark.parametrize("environment", ALL, ids=lambda e: type(e).__name__)
def test_worlds_are_pure_and_end_in_time(environment):
    """Random play of many worlds in one scan: the same twice, and no episode is too long."""

    def policy(memory, observation, first, rng):
        actions = jax.random.randint(rng, (len(first),), 0, environment.num_actions)
        return memory + 1, actions

    @jax.jit
    def run(key):
        state, seen = jax.vmap(environment.reset)(jax.random.split(key, 6))
        begin = (state, seen, jnp.ones(6, bool), jnp.zeros((), jnp.int32))
        return rollout(environment, policy, begin, key, 40)

    end, rows = run(jax.random.key(0))
    again = run(jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, rows, again)
    assert int(end[3]) == 40
    assert rows["observations"].shape == (6, 40, environment.observation_dim)
    assert np.isfinite(rows["observations"]).all()
    np.testing.assert_array_equal(rows["first"][:, 1:], rows["dones"][:, :-1])
    assert rows["first"][:, 0].all()
    for dones in np.asarray(rows["dones"]):
        ends = np.flatnonzero(dones)
        assert len(ends) and np.diff(np.concatenate([[-1], ends])).max() <= environment.horizon + 1


@pytest.mark.parametrize("cue", [0, 1])
def test_the_chain_rewards_the_cue_of_the_first_step(cue):
    environment = MemoryChain(5)
    key = next(k for k in range(9) if int(environment.reset(jax.random.key(k))[0].cue) == cue)
    seen, rewards, done = play(environment, [0, 0, 0, 0, cue], key)
    assert seen[0, cue] == 1 and not seen[1:, :2].any()
    assert seen[:, 2].tolist() == [0, 0, 0, 0, 1, 0]
    assert done and rewards == [0, 0, 0, 0, 1]
    assert play(environment, [0, 0, 0, 0, 1 - cue], key)[1][-1] == -1


def test_the_maze_pays_at_the_side_that_the_sign_said():
    environment = TMaze(3, 8)
    seen, rewards, done = play(environment, [1, 0, 0, 0])
    side = int(np.argmax(seen[0, :2]))
    assert seen[1, side] == 1 and not seen[2:, :2].any()  # turning early bumps into a wall
    assert not done and seen[-1, 2] == 1
    _, rewards, done = play(environment, [0, 0, 0, 1 + side])
    assert done and rewards[-1] == 1
    assert play(environment, [0, 0, 0, 2 - side])[1][-1] == -1


def test_the_door_opens_for_those_who_were_at_the_switch():
    environment = SwitchCorridor(5, 30)
    straight = play(environment, [1] * 8)
    assert not straight[2] and max(straight[1]) < 0
    _, rewards, done = play(environment, [0] * 4 + [1] * 5)
    assert done and rewards[-1] == 1
    ends = [x for x in straight[0] if x[1]]
    assert all(np.array_equal(x, ends[0]) for x in ends)  # it looks the same, pressed or not


def test_a_pole_falls_over_when_pushed_to_one_side():
    environment = HiddenCartPole(200)
    assert len(play(environment, [1] * 200)[1]) < 15
    seen, rewards, _ = play(environment, [1, 0] * 10)
    assert seen.shape[1] == 2 and len(rewards) == 20
    np.testing.assert_allclose(sum(rewards), 20 / 200, rtol=1e-5)


def test_a_new_episode_begins_where_one_has_ended():
    environment = MemoryChain(1)
    state, _ = environment.reset(jax.random.key(0))
    step = jax.jit(functools.partial(continued, environment))
    after, got = step(state, state.cue, jax.random.key(1))
    assert bool(got.done) and float(got.reward) == 1
    assert int(after.time) == 0 and got.observation[:2].sum() == 1


def test_worlds_of_gymnax_are_ours():
    pytest.importorskip("gymnax")
    from zoo.environments.from_gymnax import FromGymnax

    environment = FromGymnax("MemoryChain-bsuite")
    state, seen = jax.jit(environment.reset)(jax.random.key(0))
    assert seen.shape == (environment.observation_dim,)
    _, got = jax.jit(environment.step)(state, jnp.asarray(0), jax.random.key(1))
    assert got.observation.shape == seen.shape and got.reward.shape == () == got.done.shape


def test_without_gymnax_the_package_is_named(monkeypatch):
    import sys

    from zoo.environments.from_gymnax import FromGymnax

    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'flax-zoo"):
        FromGymnax("CartPole-v1")
