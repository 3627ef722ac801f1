import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.models.motion import story_to_motion
from zoo.models.motion.story_to_motion import from_gap, line, progressive_masks, shrunk


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(story_to_motion.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert table == {part: shapes[part] for part in table}
    assert {f"layer{i}" for i in range(6)} < set(shapes)


@pytest.mark.parametrize("start, stop, passes", [(6, 16, 3), (3, 8, 4), (2, 3, 1), (4, 9, 7)])
def test_gaps_shrink_from_both_ends_and_close(start, stop, passes):
    masks = progressive_masks(20, start, stop, passes)
    counts = masks.sum(1)
    assert counts[0] == stop - start and counts[-1] == 0
    assert np.all(np.diff(counts) <= 0)
    for before, after in itertools.pairwise(masks):
        assert not np.any(after & ~before)
    for done in range(passes + 1):
        low, high = shrunk(jnp.array([start]), jnp.array([stop]), done, passes)
        assert int(high[0] - low[0]) == counts[done]


@pytest.fixture(scope="module")
def small():
    model = zoo.create("story_to_motion_test")
    motion = jax.random.normal(jax.random.key(0), (3, 12, model.width))
    edges = jnp.array([2, 4, 5]), jnp.array([9, 6, 11])
    return model, filled(model), motion, edges


def test_known_frames_come_back_as_they_are_and_unknown_ones_are_not_read(small):
    model, variables, motion, (start, stop) = small
    run = jax.jit(lambda x: model.apply(variables, x, start, stop, method="complete"))
    frame = np.arange(12)
    unknown = (frame >= start[:, None]) & (frame < stop[:, None])
    got = run(motion)
    np.testing.assert_array_equal(got[~unknown], motion[~unknown])
    other = run(jnp.where(unknown[..., None], 7.0, motion))
    np.testing.assert_array_equal(got, other)
    assert np.abs(got - line(motion, ~unknown))[unknown].min(-1).max() > 1e-3


def test_a_pass_sees_what_the_pass_before_has_kept(small):
    """All passes by hand: the outer frames of each count as known in the next."""
    model, variables, motion, (start, stop) = small
    once = jax.jit(lambda x, known: model.apply(variables, x, known))
    wanted = motion[:1]
    for mask in progressive_masks(12, int(start[0]), int(stop[0]), model.passes)[:-1]:
        wanted = once(wanted, jnp.asarray(~mask[None], jnp.int32))
    got = model.apply(variables, motion[:1], start[:1], stop[:1], method="complete")
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())


def test_the_line_goes_between_neighbours_and_is_flat_beyond_the_ends():
    x = jnp.arange(6.0)[None, :, None] ** 2
    known = jnp.array([[0, 1, 0, 0, 1, 0]]) != 0
    np.testing.assert_allclose(line(x, known)[0, :, 0], [1, 1, 6, 11, 16, 16])


def test_places_are_counted_from_the_gap_and_it_begins_as_the_line(small):
    known = jnp.array([[1, 1, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 1]]) != 0
    places = from_gap(known, 12)
    np.testing.assert_array_equal(places[0, :6], places[1, 2:])
    assert len(np.unique(places[0].round(4), axis=0)) == 8
    model, _, motion, (start, stop) = small
    frame = np.arange(12)
    known = ((frame < start[:, None]) | (frame >= stop[:, None])).astype(np.int32)
    said = jax.jit(lambda key: model.init_with_output(key, motion, known)[0])(jax.random.key(0))
    np.testing.assert_array_equal(said, line(motion, known != 0))


def test_frames_of_another_skeleton_are_refused(small):
    model, variables, motion, _ = small
    with pytest.raises(ValueError, match="which 2 joints have"):
        model.apply(variables, motion[..., 1:], jnp.ones((3, 12), jnp.int32))
