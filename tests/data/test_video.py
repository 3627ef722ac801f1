import numpy as np
import pytest
from PIL import Image

from zoo.data.synthetic import MovingSquare
from zoo.data.transforms import Normalize, RandomCrop, RandomFlip
from zoo.data.video import ClipFolder, EachFrame, SampleClip, clip_windows, slide


@pytest.fixture
def folder(tmp_path):
    """Two classes; frame i of a video has the value 10 * i + its class."""
    for label, name in enumerate(("awake", "drowsy")):
        for video in ("a", "b"):
            where = tmp_path / name / video
            where.mkdir(parents=True)
            for i in range(6):
                image = np.full((8, 10, 3), 10 * i + label, np.uint8)
                Image.fromarray(image).save(where / f"{i:03}.png")
    return tmp_path


def test_folders_of_frames_are_read_by_class_and_only_where_sampled(folder):
    source = ClipFolder(folder)
    assert source.classes == ("awake", "drowsy") and len(source) == 4
    example = SampleClip(2, 3, random=False)(source[3], np.random.default_rng(0))
    assert example["label"] == 1 and example["clip"].shape == (2, 8, 10, 3)
    np.testing.assert_array_equal(example["clip"][:, 0, 0, 0], [11, 41])


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    where = tmp_path / "awake" / "a"
    where.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(where / f"frame{i}.png")
    clip = SampleClip(12)(ClipFolder(tmp_path)[0], np.random.default_rng(0))["clip"]
    assert clip[:, 0, 0, 0].tolist() == list(range(12))
    with pytest.raises(ValueError, match="has no frames"):
        SampleClip(2)({"clip": np.zeros((0, 4, 4, 3))}, np.random.default_rng(0))


def test_a_wrong_folder_is_said_when_it_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        len(ClipFolder(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="one folder per class"):
        len(ClipFolder(tmp_path))


def test_samples_start_anywhere_that_has_room_and_short_videos_are_repeated():
    video = np.arange(10)[:, None]
    rng = np.random.default_rng(0)
    starts = {int(SampleClip(3, 2)({"clip": video}, rng)["clip"][0, 0]) for _ in range(200)}
    assert starts == set(range(6))
    short = SampleClip(5, random=False)({"clip": video[:3]}, rng)["clip"]
    assert short[:, 0].tolist() == [0, 1, 2, 0, 1]


def test_every_frame_gets_the_same_draws_and_the_next_clip_others():
    clip = np.broadcast_to(np.random.default_rng(1).integers(0, 255, (1, 9, 9, 3)), (4, 9, 9, 3))
    rng = np.random.default_rng(0)
    crop, flip = EachFrame(RandomCrop((4, 4))), EachFrame(RandomFlip())
    seen = []
    for _ in range(8):
        out = flip(crop({"clip": clip.astype(np.uint8)}, rng), rng)["clip"]
        assert (out == out[:1]).all()
        seen.append(out[0].tobytes())
    assert len(set(seen)) > 4


@pytest.mark.parametrize("length", [1, 7, 16, 33])
def test_windows_cover_a_long_video_to_its_end(length):
    windows = clip_windows(length, frames=4, stride=2)
    assert windows.shape[1] == 4 and windows.max() == length - 1
    spans = np.concatenate([np.arange(w[0], w[-1] + 1) for w in windows if w[-1] >= w[0]])
    assert length < 7 or set(spans) == set(range(length))
    overlapping = clip_windows(length, 4, 2, step=1)
    assert length < 7 or overlapping[:, 0].tolist() == list(range(length - 6))


def test_sliding_gives_each_window_its_own_prediction():
    video = np.zeros((20, 4, 4, 3), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None]
    shapes = set()

    def predict(clips):
        shapes.add(clips.shape)
        return clips[..., 0].mean((1, 2, 3))[:, None] * [[1.0, -1.0]]

    scale = (EachFrame(Normalize((0.0,) * 3, (1 / 255,) * 3)),)
    out, starts = slide(predict, video, frames=4, step=3, transforms=scale, batch_size=4)
    assert shapes == {(4, 4, 4, 4, 3)}
    np.testing.assert_array_equal(starts, [0, 3, 6, 9, 12, 15, 16])
    np.testing.assert_allclose(out[:, 0], starts + 1.5, rtol=1e-5)


def test_a_frame_of_a_moving_square_does_not_tell_its_direction():
    clips = MovingSquare(400)
    labels = np.array([clips[i]["label"] for i in range(400)])
    assert (np.bincount(labels) > 70).all()
    first = np.stack([clips[i]["clip"][0, ..., 0] > 100 for i in range(400)])
    np.testing.assert_array_equal(first.sum((1, 2)), 64)
    rows = first.any(2).argmax(1)  # where the square is
    means = [rows[labels == k].mean() for k in range(4)]
    assert np.ptp(means) < 4
