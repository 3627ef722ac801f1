import gzip
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.data import Arrays, Digits, ImageFolder, Tfds
from zoo.data.fashion_mnist import DEBIAN_FOLDER, FashionMnist, read_idx


def test_digits_are_split_without_overlap():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train[0]["image"].shape == (8, 8, 1) and train[0]["image"].dtype == np.uint8
    counts = np.bincount([s[i]["label"] for s in (train, test) for i in range(len(s))])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(ValueError, match="split='valid'"):
        Digits("valid")


def test_arrays_need_one_length():
    with pytest.raises(ValueError, match="one length"):
        Arrays(image=np.zeros(3), label=np.zeros(4))


def test_a_folder_of_images_has_a_class_per_folder(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 255, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 4), colour).save(tmp_path / name / "a.png")
    Image.new("L", (5, 4), 7).save(tmp_path / "dog" / "b.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog") and len(source) == 3
    assert source[0]["label"] == 0 and (source[0]["image"] == [255, 0, 0]).all()
    assert source[2]["image"].shape == (4, 5, 3) and (source[2]["image"] == 7).all()


def test_folders_that_are_no_use_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"broken\.png' is not a readable image"):
        ImageFolder(tmp_path)[0]


def write_idx(path, array, dims=None):
    dims = dims or array.shape
    header = struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files_are_read_and_checked(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path, (2, 3, 4)), array)
    with pytest.raises(ValueError, match="its header says"):
        read_idx(path, (2, 3, 5))
    write_idx(path, array[:1], (2, 3, 4))
    with pytest.raises(ValueError, match="holds 12 bytes in place of 24"):
        read_idx(path, (2, 3, 4))
    for junk in (b"", b"plain", gzip.compress(b"\0")):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="is not an IDX file"):
            read_idx(path, (2, 3, 4))


def test_fashion_mnist_without_its_files_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        FashionMnist(source=str(tmp_path / "absent"), data_dir=str(tmp_path / "tfds"))
    assert not (tmp_path / "tfds").exists()


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(num_classes=10)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"image": image, "label": label})
        )
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(10):
            yield i, {"image": np.full((2, 2, 1), i, np.uint8), "label": i}
"""

USE = """
import sys
from tinyset import Tiny
from zoo.data import Tfds
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
source = Tfds("tiny", "train[:50%]", sys.argv[1])
assert len(source) == 5
example = source[3]
assert (example["image"] == example["label"]).all()
assert "tensorflow" not in sys.modules
"""


def test_prepared_tfds_sets_are_read_without_tensorflow(tmp_path):
    package = tmp_path / "code" / "tinyset"  # TFDS wants builders in a package
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BUILDER)
    path = os.pathsep.join((os.getcwd(), str(package.parent)))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", USE, str(tmp_path / "sets")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_set_that_was_not_prepared_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="file_format=array_record"):
        Tfds("mnist", data_dir=str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir(DEBIAN_FOLDER), reason="dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_has_all_its_examples(tmp_path):
    train = FashionMnist("train", data_dir=str(tmp_path))
    test = FashionMnist("test", data_dir=str(tmp_path))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount([test[i]["label"] for i in range(len(test))]).tolist() == [1000] * 10
