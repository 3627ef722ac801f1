import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data.gaits import GaitWindows, changing_gait, gait
from zoo.data.motion_capture import HUMANOID, mirrored, packaged_clips, read_clip
from zoo.motion import skeleton
from zoo.motion.skeleton import WALKER, Skeleton, Track


def test_six_numbers_give_a_rotation():
    six = np.random.default_rng(0).normal(size=(50, 6))
    matrix = skeleton.to_matrix(six)
    eye = np.broadcast_to(np.eye(3), matrix.shape)
    np.testing.assert_allclose(matrix @ matrix.swapaxes(1, 2), eye, atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-6)
    np.testing.assert_allclose(skeleton.to_matrix(skeleton.to_six(matrix)), matrix, atol=1e-9)


def test_a_straight_chain_ends_where_the_angles_say():
    """A chain in a plane: the sum of its bones, each turned by all angles above it."""
    chain = Skeleton(("a", "b", "c", "d"), (-1, 0, 1, 2), ((0, 0, 0),) + ((0, 0, 1.0),) * 3, (2, 3))
    angles = np.array([0.3, -0.5, 1.1, 0.0])
    got = skeleton.positions(chain, skeleton.turn(angles), np.array([1.0, 2.0, 3.0]))
    sums = np.cumsum(angles)[:3]
    x, z = 1 + np.cumsum(np.sin(sums)), 3 + np.cumsum(np.cos(sums))
    np.testing.assert_allclose(got[1:], np.stack([x, np.full(3, 2.0), z], 1), atol=1e-12)
    with pytest.raises(ValueError, match="before its child"):
        Skeleton(("a", "b"), (1, -1), ((0, 0, 0),) * 2, (0, 1))


def test_half_way_between_two_rotations_is_the_half_angle():
    first, last = skeleton.turn(np.array(0.2)), skeleton.turn(np.array(1.4))
    np.testing.assert_allclose(
        skeleton.between(first, last, np.array(0.5)), skeleton.turn(np.array(0.8)), atol=1e-6
    )


def test_rows_keep_a_motion_wherever_it_starts():
    rows = changing_gait(np.random.default_rng(3), 60)
    here = skeleton.joints(WALKER, rows, skeleton.track(rows))
    start = Track(np.array([2.0, -1.0]), np.array(0.7))
    there = skeleton.joints(WALKER, rows, skeleton.track(rows, start=start))
    moved = skeleton.turned(here[..., [0, 2]], start.heading) + start.place
    np.testing.assert_allclose(there[..., [0, 2]], moved, atol=2e-5)
    device = jax.jit(lambda r: skeleton.joints(WALKER, r, skeleton.track(r)))(jnp.asarray(rows))
    np.testing.assert_allclose(device, here, atol=2e-5)


@pytest.mark.parametrize("speed, turning", [(0.0, 0.0), (0.7, 1.0), (1.4, 0.0), (2.6, -0.5)])
def test_feet_of_a_procedural_gait_stand_still_on_the_ground(speed, turning):
    rows = gait(np.full(60, speed), np.full(60, turning))
    where = skeleton.track(rows)
    places = skeleton.joints(WALKER, rows, where)
    _, moves, touching = skeleton.parts(rows)
    assert skeleton.foot_sliding(WALKER, places, touching) < 0.05
    assert places[..., 1].min() > -1e-5
    assert touching.mean(0).min() > 0.3
    np.testing.assert_allclose(moves[:, 1], speed, atol=0.05 + 0.02 * abs(turning))
    bones = np.linalg.norm(places[:, 3] - places[:, 2], axis=-1)
    np.testing.assert_allclose(bones, 0.46, atol=1e-5)


def test_windows_say_where_their_gap_is():
    source = GaitWindows(20, length=30, gap=(5, 12))
    for i in range(0, 20, 5):
        example = source[i]
        gap = example["stop"] - example["start"]
        assert 5 <= gap <= 12 and (1 - example["known"]).sum() == gap
        assert not example["known"][example["start"] : example["stop"]].any()
        assert example["motion"].shape == (30, WALKER.width)
    np.testing.assert_array_equal(source[3]["motion"], GaitWindows(20, 30, (5, 12))[3]["motion"])


def test_a_file_of_motion_capture_is_read(tmp_path):
    """A character that stands, goes along x, turned by a quarter: three frames at 0.1 seconds."""
    identity = [1.0, 0, 0, 0]
    rest = identity * 2 + identity + [0.5] + identity + identity + [0.0] + identity + [0.0]
    rest = rest + identity + identity + [0.0]
    frames = [[0.1, 0.1 * i, 0.9, 0.0, *identity, *rest] for i in range(4)]
    assert len(frames[0]) == 44
    path = tmp_path / "humanoid3d_some_walk.txt"
    path.write_text(str({"Loop": "wrap", "Frames": frames}).replace("'", '"'))
    clip = read_clip(path)
    assert clip.caption == "a person does some walk" and len(clip.rows) == 10
    moves = skeleton.parts(clip.rows)[1]
    np.testing.assert_allclose(moves, np.broadcast_to([0, 1, 0, 0.9], moves.shape), atol=1e-4)
    places = skeleton.joints(HUMANOID, clip.rows, skeleton.track(clip.rows))
    assert places[0, 8, 0] > 0 > places[0, 3, 0]  # the left hip is to the left
    assert places[0, 5, 2] < -0.1 + places[0, 10, 2] or places[0, 5, 2] > 0.1 + places[0, 10, 2]
    path.write_text('{"Frames": [[1, 2]]}')
    with pytest.raises(ValueError, match="must have 44 numbers each"):
        read_clip(path)


def test_packaged_clips_are_bodies_that_stand_on_the_ground():
    try:
        clips = packaged_clips(("walk", "run"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    for clip in clips:
        places = skeleton.joints(HUMANOID, clip.rows, skeleton.track(clip.rows))
        assert -0.05 < places[..., 1].min() < 0.1 and 1.2 < places[..., 1].max() < 1.8
        assert skeleton.parts(clip.rows)[1][:, 1].mean() > 0.5  # forward
    with pytest.raises(ValueError, match="There is no clip 'swim'"):
        packaged_clips(("swim",))


def test_in_a_mirror_left_is_right():
    """Of any rotations: joints in the mirror are those of the other side, x turned around."""
    rng = np.random.default_rng(0)
    six = rng.normal(size=(5, len(HUMANOID.names), 6))
    six = skeleton.to_six(skeleton.to_matrix(six)).reshape(5, -1)
    rest = np.concatenate([rng.normal(size=(5, 4)), rng.integers(0, 2, (5, 2))], 1)
    rows = np.concatenate([six, rest], 1).astype(np.float32)
    other = mirrored(rows)
    places, mirror = (skeleton.joints(HUMANOID, x, skeleton.track(x)) for x in (rows, other))
    swap = [HUMANOID.names.index(n) for n in (
        "root", "chest", "neck", "left_hip", "left_knee", "left_ankle", "left_shoulder",
        "left_elbow", "right_hip", "right_knee", "right_ankle", "right_shoulder", "right_elbow",
    )]  # fmt: skip
    np.testing.assert_allclose(mirror, places[:, swap] * np.array([-1, 1, 1]), atol=1e-5)
    np.testing.assert_array_equal(other[:, -2:], rows[:, :-3:-1])
    np.testing.assert_array_equal(mirrored(other), rows)
