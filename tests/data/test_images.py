"""Folders of image files as people have them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from zoo.data import Arrays, Data, ImageFolder, Part, class_weights, split
from zoo.data.images import read_image
from zoo.data.video import ClipFolder


def save(folder, name, image, **options):
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def plain(folder, classes, count=3):
    for i, name in enumerate(classes):
        for k in range(count):
            save(folder / name, f"{k}.png", Image.new("RGB", (4, 3), (i, k, 0)))
    return folder


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (np.linspace(0, 65535, 64).reshape(8, 8).astype("u2"), "png"),
        (np.linspace(0, 65535, 64).reshape(8, 8).astype("i4"), "tif"),
        (np.linspace(0, 1, 64).reshape(8, 8).astype("f4"), "tif"),
    ],
)
def test_deep_images_keep_their_steps(tmp_path, values, suffix):
    image = read_image(save(tmp_path, f"deep.{suffix}", Image.fromarray(values)))
    np.testing.assert_array_equal(image[..., 0].ravel(), np.round(np.linspace(0, 255, 64)))


def test_twelve_bits_in_sixteen_ask_for_their_white(tmp_path):
    values = np.linspace(0, 4095, 64).reshape(8, 8).astype("u2")
    file = save(tmp_path, "twelve.png", Image.fromarray(values))
    with pytest.raises(ValueError, match=r"no value above 4095.*give white=4095"):
        read_image(file)
    assert read_image(file, white=4095).max() == 255
    assert read_image(file, white=65535).max() == 16
    file = save(tmp_path, "float.tif", Image.fromarray(values.astype("f4")))
    with pytest.raises(ValueError, match="from 0 to 4095, which do not fit 0 to 1; give white="):
        read_image(file)


def test_pictures_are_as_a_viewer_shows_them(tmp_path):
    left = np.zeros((8, 16, 3), "u1")
    left[:, :8] = 255, 0, 0
    turned = Image.Exif()
    turned[0x0112] = 6
    image = read_image(
        save(tmp_path, "turned.jfif", Image.fromarray(left), format="JPEG", exif=turned)
    )
    assert image.shape == (16, 8, 3)
    assert image[1, 4, 0] > 240 and image[14, 4, 0] < 15
    for mode, colour, suffix, seen in (
        ("RGBA", (9, 9, 9, 0), "png", 255), ("LA", (100, 255), "png", 100), ("1", 1, "png", 255),
        ("L", 7, "pgm", 7), ("CMYK", (0, 0, 0, 255), "tif", 0), ("P", 0, "gif", 0),
    ):  # fmt: skip
        image = read_image(save(tmp_path, f"{mode}.{suffix}", Image.new(mode, (5, 4), colour)))
        assert image.shape == (4, 5, 3) and image.dtype == np.uint8
        assert (image == seen).all(), mode
    assert read_image(tmp_path / "L.pgm", channels=1).shape == (4, 5, 1)


def test_what_is_hidden_is_no_image_and_no_class(tmp_path):
    root = plain(tmp_path / "photos", ["cat", "dog"])
    plain(root, [".ipynb_checkpoints", "__MACOSX"])
    (root / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "notes").mkdir()
    save(root / "dog" / "deep" / "er", "x.JPG", Image.new("RGB", (4, 3)))
    source = ImageFolder(root)
    assert source.classes == ("cat", "dog")
    assert len(source) == 7
    with pytest.raises(ValueError, match=r"they are splits, not classes; give .*train"):
        ImageFolder(plain(tmp_path / "splits" / "train", ["cat"]).parent)


def test_held_out_folders_are_numbered_as_the_training_folder(tmp_path):
    train = ImageFolder(plain(tmp_path / "a", ["cat", "dog", "owl"]))
    held_out = ImageFolder(plain(tmp_path / "b", ["dog", "owl"]))
    data = Data(train, held_out)
    assert data.eval.classes == train.classes
    assert [data.eval[i]["label"] for i in (0, 5)] == [1, 2]
    with pytest.raises(ValueError, match="a folder 'fox', which is none of the 3 classes cat, dog"):
        Data(train, ImageFolder(plain(tmp_path / "c", ["dog", "fox"])))
    clips = [ClipFolder(tmp_path / name) for name in "ab"]
    assert Data(*clips).eval.classes == ("cat", "dog", "owl")


def test_broken_files_are_refused_at_the_start_or_left_out_with_a_count(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype("u1")
    whole = save(tmp_path / "cat", "a.jpg", Image.fromarray(noise))
    (tmp_path / "cat" / "b.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "cat" / "c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 3 images .* cannot be read, .*b\.jpg' the first"):
        ImageFolder(tmp_path).check()
    source = ImageFolder(tmp_path, corrupt="skip")
    source.check()
    assert len(source) == 1
    assert "2 of 3 images" in capsys.readouterr().out
    (tmp_path / "cat" / "d.heic").write_bytes(b"ftypheic")
    with pytest.raises(ValueError, match="cannot be read"):
        ImageFolder(tmp_path).check()


def test_one_folder_is_split_in_two_of_each_class(tmp_path):
    source = ImageFolder(plain(tmp_path, ["cat", "dog"], count=10))
    train, held_out = split(source, 0.2)
    assert (len(train), len(held_out)) == (16, 4)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [2, 2])
    seen = [(int(e["label"]), int(e["image"][0, 0, 1])) for p in (train, held_out) for e in p]
    assert len(set(seen)) == 20
    assert split(source, 0.2)[1] == held_out
    assert split(source, 0.2, seed=1)[1].labels.tolist() == held_out.labels.tolist()
    with pytest.raises(ValueError, match=r"share=1\.5"):
        Part(source, share=1.5)


def test_weights_make_classes_count_alike():
    source = Arrays(image=np.zeros((8, 2)), label=np.array([0] * 6 + [2] * 2))
    weights = class_weights(source)
    np.testing.assert_allclose(weights, (8 / 12, 0.0, 2.0))
    with pytest.raises(ValueError, match="does not tell its labels"):
        class_weights(Arrays(image=np.zeros(3)))


def test_held_out_examples_are_read_by_several_threads():
    import threading

    seen = set()
    gate = threading.Barrier(4, timeout=20)

    @dataclasses.dataclass(frozen=True)
    class Waits:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            gate.wait()  # passes when four threads read at once
            seen.add(threading.get_ident())
            return {"x": np.float32(index)}

    from zoo.data import eval_batches

    batches = list(eval_batches(Data(Waits(), Waits(), batch_size=8, threads=4)))
    assert batches[0]["x"].tolist() == list(range(8))
    assert len(seen) == 4


def test_settings_that_mean_nothing_are_refused(tmp_path):
    root = plain(tmp_path, "ab")
    with pytest.raises(ValueError, match="corrupt is 'ignore'; it must be 'refuse' or 'skip'"):
        ImageFolder(root, corrupt="ignore")
    with pytest.raises(ValueError, match="channels is 4; it must be 1 or 3"):
        ImageFolder(root, channels=4)
    with pytest.raises(ValueError, match="white=0 becomes 255; give a number above 0"):
        ImageFolder(root, white=0)
    with pytest.raises(ValueError, match="names a class twice"):
        ImageFolder(root, classes=("a", "b", "a"))
    with pytest.raises(ValueError, match=r"Data.train is 'photos', which is no source .*ImageFo"):
        Data("photos", ImageFolder(root))
