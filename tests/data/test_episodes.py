"""Episodes to learn from: their windows say what was done and what was still to come."""

import jax
import numpy as np
import pytest

from zoo.data.episodes import AtRandom, Episodes, GivesUp
from zoo.environments import HiddenCartPole, SwitchCorridor


@pytest.fixture(scope="module")
def corridor():
    return Episodes(SwitchCorridor(4, 8), AtRandom(2), count=12, steps=5)


def test_windows_are_of_one_episode_and_padded_at_the_left(corridor):
    lengths = corridor.rows["alive"].sum(1)
    assert len(corridor) == lengths.sum() and lengths.max() <= 8
    index = 0
    for episode, length in enumerate(lengths[:4]):
        for first in range(length):
            window = corridor[index]
            index += 1
            count = min(5, length - first)
            assert window["mask"].sum() == count and window["mask"][-1] == 1
            inside = slice(5 - count, 5)
            np.testing.assert_array_equal(window["times"][inside], np.arange(first, first + count))
            np.testing.assert_array_equal(window["actions"].argmax(1)[inside],
                                          window["chosen"][inside])  # fmt: skip
            whole = corridor.rows["rewards"][episode, first:length].sum()
            assert window["returns"][5 - count, 0] == pytest.approx(whole, abs=1e-5)
            assert not any(x[: 5 - count].any() for x in window.values())


def test_an_example_has_the_form_of_what_is_played(corridor):
    shapes = [
        {k: (x.shape, x.dtype) for k, x in e.items()} for e in (corridor.example(), corridor[3])
    ]
    assert shapes[0] == shapes[1]


def test_who_gives_up_late_gets_more():
    """One who never gives up keeps the pole up; the fall comes soon behind the step."""
    world = HiddenCartPole(60)
    never = Episodes(world, GivesUp(latest=10**6, noise=0.0), count=16)
    at_once = Episodes(world, GivesUp(latest=0, noise=0.0), count=16)
    assert never.returns.min() == pytest.approx(1.0, abs=1e-5)
    assert at_once.returns.max() < 0.3
    assert jax.tree.map(np.shape, never.rows)["states"] == (16, 60, 2)
