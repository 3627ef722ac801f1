"""From a story to frames: the scheduler, matching, and endless playing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data.gaits import captioned_clips
from zoo.motion import matching, skeleton
from zoo.motion.matching import candidates, hashed_words
from zoo.motion.scheduler import Scene, Segment, find_path, parse_answer, schedule
from zoo.motion.skeleton import WALKER
from zoo.motion.stream import Player, make_plan

PLACES = {"door": (4.0, 0.0, 3.0), "bench": (-2.0, 0.0, 6.0), "tree": (-5.0, 0.0, 0.0),
          "gate": (0.0, 0.0, -4.0), "house": (5.0, 0.0, -3.0)}  # fmt: skip
STORY = (
    "Anna walks to the door. She waves for 4 seconds, then she runs to the bench and sits. "
    "She went to the tree, then she hurries to the gate. Then to the house, where she is waving."
)


# ------------------------------------------------------------------------------ matching


def by_hand(sem, clip, left, current, keep, duration, guard):
    """Candidates as the rule is written, in a loop."""
    order = sorted(range(len(sem)), key=lambda c: (sem[c], c))
    while True:
        kept = order[:keep]
        for near in (guard, None):
            found = [
                f for f in range(len(clip))
                if clip[f] in kept and left[f] > duration
                and not (near is not None and current >= 0 and abs(f - current) <= near)
            ]  # fmt: skip
            if found:
                return [f in found for f in range(len(clip))]
        keep += 1


@pytest.mark.parametrize(
    "keep, duration, guard, current",
    [(2, 3, 2, 7), (1, 3, 0, -1), (1, 6, 30, 9), (1, 9, 1, 4), (3, 2, 1, 0)],
)
def test_candidates_are_those_of_the_rule_and_never_none(keep, duration, guard, current):
    lengths = [5, 8, 4, 12]
    clip = np.repeat(np.arange(4), lengths)
    left = np.concatenate([np.arange(n, 0, -1) for n in lengths])
    sem = np.array([0.5, 0.2, 0.2, 0.9])
    options = {"keep": keep, "duration": duration, "guard": guard}
    got = jax.jit(lambda: candidates(jnp.asarray(sem), jnp.asarray(clip), jnp.asarray(left),
                                     jnp.asarray(current), **options))()  # fmt: skip
    assert got.tolist() == by_hand(sem, clip, left, current, **options)
    assert got.any()


def test_the_nearest_allowed_frame_is_found_and_of_equal_ones_the_first():
    features = jnp.array([[0.0], [2.0], [1.0], [2.0]])
    allowed = jnp.array([False, True, False, True])
    found = matching.match(features, jnp.array([0.5]), jnp.array([2.0]), allowed)
    assert int(found.frame) == 1
    np.testing.assert_allclose(found.costs, [0.5, 4.5, 0.5, 4.5])


def test_captions_are_near_texts_of_the_same_words():
    words = hashed_words(["she walks", "a person walking", "runs", "he was running fast"])
    sem = np.asarray(matching.distances(jnp.asarray(words[0]), jnp.asarray(words)))
    assert sem[0] < 1e-5 and sem[1] < 0.5 < sem[2]
    assert matching.distances(jnp.asarray(words[2]), jnp.asarray(words))[3] < 0.6


# ----------------------------------------------------------------------------- scheduler


def test_rules_read_a_story():
    got = schedule(STORY, Scene(PLACES))
    texts = [(s.text.split()[-1], s.place and s.place[0]) for s in got]
    assert texts == [("walks", 4.0), ("waves", None), ("runs", -2.0), ("sits", None),
                     ("walks", -5.0), ("runs", 0.0), ("walks", 5.0), ("waves", None)]  # fmt: skip
    assert got[1].seconds == 4.0 and got[0].seconds == pytest.approx(5.0 / 1.4)
    with pytest.raises(ValueError, match="find nothing to do"):
        schedule("Once upon a time.", Scene(PLACES))
    there = schedule("He sits on the bench", Scene(PLACES))
    assert [s.text for s in there] == ["a person walks", "a person sits"]


def test_a_language_model_is_a_function_and_its_answer_is_repaired():
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return (
            '```json\n[{"text": "a person walks", "position": [2.8, 0, 0]},'
            ' {"text": "sits", "duration": 2.5}]\n```'
        )

    got = schedule("whatever", Scene(PLACES), language_model=ask)
    assert got == [Segment("a person walks", (2.8, 0.0, 0.0), 2.0), Segment("sits", None, 2.5)]
    assert "whatever" in asked[0] and '"bench"' in asked[0]


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("walk", "is no JSON"),
        ("{}", "must be a list"),
        ('[{"text": "walks", "speed": 3}]', "must be an object of text, position and duration"),
        ('[{"text": ""}]', "needs words"),
        ('[{"text": "walks", "position": [1, 2]}]', r"needs a position \[x, y, z\]"),
        ('[{"text": "walks", "duration": -1}]', "above 0 seconds"),
    ],
)
def test_an_answer_of_another_form_is_refused(answer, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_answer(answer)


def test_paths_go_around_walls():
    blocked = np.zeros((40, 40), bool)
    blocked[20, 5:40] = True
    scene = Scene({}, blocked, 0.25)
    path = find_path(scene, (2.0, 8.0), (8.0, 8.0), 200)
    assert not blocked[tuple(np.floor(path / 0.25).astype(int).T)].any()
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(path[[0, -1]], [[2.0, 8.0], [8.0, 8.0]])
    straight = 2 * np.hypot(3.0, 8.0 - 1.25)
    assert straight - 0.3 < steps.sum() < straight + 1.0
    assert len(np.unique(np.round(np.diff(path, axis=0) / steps[:, None], 3), axis=0)) < 20
    blocked[20] = True
    with pytest.raises(ValueError, match="no free way"):
        find_path(scene, (2.0, 8.0), (8.0, 8.0))
    with pytest.raises(ValueError, match="blocked or off the map"):
        find_path(scene, (2.0, 8.0), (80.0, 8.0))


# -------------------------------------------------------------------------------- playing


@pytest.fixture(scope="module")
def played():
    player = Player()
    database = matching.make_database(captioned_clips(), WALKER, hashed_words, player.duration)
    scene = Scene(PLACES)
    segments = schedule(STORY, scene)
    plan = make_plan(segments, scene, hashed_words)
    state, frames = player.play(database, plan, player.init_state(database), 300)
    return player, database, plan, segments, state, jax.device_get(frames)


def test_every_place_is_reached_and_the_clips_do_what_the_story_says(played):
    _, database, plan, segments, state, frames = played
    assert int(state.segment) == len(segments)
    for number, segment in enumerate(segments[:-1]):
        mine = np.flatnonzero(frames.segment == number)
        assert {database.captions[c] for c in frames.clip[mine]} == {segment.text}
        end = frames.where.place[mine[-1]]
        assert np.linalg.norm(end - plan.path[number, -1]) < 0.3
        assert len(mine) < plan.frames[number] or not plan.moves[number]


def test_3000_frames_in_chunks_are_those_of_one_run_at_the_memory_of_one_chunk(played):
    player, database, plan, _, state, frames = played
    assert len(frames.rows) == 3000
    chunks, states, alive = [], [], []
    for behind, chunk in player.stream(database, plan, player.init_state(database), 300, 20):
        chunks.append(chunk)
        states = [behind]
        alive.append(sum(x.nbytes for x in jax.live_arrays()))
    assert len(set(alive[2:])) == 1  # nothing grows on the device
    whole = jax.tree.map(lambda *x: np.concatenate(x), *chunks)
    np.testing.assert_array_equal(whole.clip, frames.clip)
    np.testing.assert_array_equal(whole.segment, frames.segment)
    np.testing.assert_allclose(whole.rows, frames.rows, atol=1e-4)
    np.testing.assert_allclose(whole.where.place, frames.where.place, atol=1e-3)
    assert int(states[0].segment) == int(state.segment)
    with pytest.raises(ValueError, match="chunk=7 does not divide"):
        next(player.stream(database, plan, state, 20, 7))


def test_rows_are_continuous_where_clips_meet(played):
    """Without a gap that is filled in, poses jump."""
    player, database, plan, _, _, frames = played
    _, jumping = dataclasses.replace(player, gap=0).play(
        database, plan, player.init_state(database), 60
    )

    def largest_jump(frames):
        places = skeleton.joints(WALKER, frames.rows[:600], jax.tree.map(lambda x: x[:600],
                                                                         frames.where))  # fmt: skip
        return np.linalg.norm(np.diff(places, axis=0), axis=-1).max()

    assert largest_jump(frames) < 0.6 * largest_jump(jumping)


def test_a_database_of_short_clips_is_refused():
    clips = [matching.Clip("a person walks", np.zeros((5, WALKER.width), np.float32))]
    with pytest.raises(ValueError, match="No clip is longer than duration=10"):
        matching.make_database(clips, WALKER, hashed_words, 10)
    with pytest.raises(ValueError, match="must be below duration"):
        Player(duration=5, gap=5)
