"""Formats: what was written is what is read, lazily, whoever wrote it."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_writer as tw

from zoo.checkpoints import files
from zoo.checkpoints.files import CheckpointError, open_checkpoint, save_safetensors

DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "complex64", "complex128",
]  # fmt: skip


def same(got, want) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def some_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        f"of.{d}": (rng.normal(size=(3, 4)) * 9).astype(np.dtype(d))
        for d in DTYPES[1:]
        if not d.startswith("u")
    }
    arrays |= {
        "of.bool": rng.random((3, 4)) > 0.5,
        "of.uint8": rng.integers(0, 256, (5,), np.uint8),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
    }
    return arrays


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read_bit_for_bit(tmp_path, legacy):
    arrays = some_arrays()
    got = open_checkpoint(tw.save(tmp_path / "a.pth", arrays, legacy=legacy))
    assert list(got) == list(arrays)
    for name, want in arrays.items():
        assert got[name].shape == want.shape and got[name].dtype == want.dtype
        assert same(got[name].read(), want), name


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (4, 3), (1, 4)),  # transposed
        (1, (2, 2), (4, 2)),  # every second column of some rows
        (2, (3,), (0,)),  # expanded
        (5, (), ()),
        (12, (0,), (1,)),
        (11, (1, 1), (100, 100)),  # strides of axes of one element are of no account
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_is_a_strided_view_of_its_storage(tmp_path, legacy, offset, shape, strides):
    base = np.arange(12, dtype=np.float32)
    reference = tw.storage("FloatStorage", "0", 12)
    pickle = tw.pickled(tw.mapping({"x": tw.rebuilt(reference, offset, shape, strides)}))
    path = tmp_path / "a.pth"
    if legacy:
        path.write_bytes(tw.legacy_bytes(pickle, {"0": (12, base.tobytes())}))
    else:
        tw.zip_file(path, pickle, {"0": base.tobytes()})
    want = np.lib.stride_tricks.as_strided(base[offset:], shape, [4 * s for s in strides])
    assert same(open_checkpoint(path)["x"].read(), want)


def test_tensors_may_share_a_storage(tmp_path):
    entries = {
        "tied.a": tw.rebuilt(tw.storage("FloatStorage", "0", 6), 0, (2, 3), (3, 1)),
        "tied.b": tw.rebuilt(tw.storage("FloatStorage", "0", 6), 0, (3, 2), (1, 3)),
    }
    data = np.arange(6, dtype=np.float32)
    got = open_checkpoint(
        tw.zip_file(tmp_path / "a.pth", tw.pickled(tw.mapping(entries)), {"0": data.tobytes()})
    )
    assert same(got["tied.a"].read(), data.reshape(2, 3))
    assert same(got["tied.b"].read(), data.reshape(2, 3).T)


def test_a_legacy_storage_may_be_a_view_of_another(tmp_path):
    view = tw.group(tw.text("v"), tw.integer(2), tw.integer(4))
    reference = tw.storage("FloatStorage", "0", 8, view)
    pickle = tw.pickled(tw.mapping({"x": tw.rebuilt(reference, 1, (3,), (1,))}))
    data = np.arange(8, dtype=np.float32)
    (tmp_path / "a.bin").write_bytes(tw.legacy_bytes(pickle, {"0": (8, data.tobytes())}))
    assert same(open_checkpoint(tmp_path / "a.bin")["x"].read(), data[3:6])


def test_big_endian_files_are_turned_round(tmp_path):
    arrays = {
        "x": np.array([1.0, 2.5], np.float32),
        "n": np.array([3], np.int64),
        "half": np.array([1.5], ml_dtypes.bfloat16),
    }
    entries = {name: tw.tensor(name, array) for name, array in arrays.items()}
    data = {
        name: array.view(f"u{array.itemsize}").byteswap().tobytes()
        for name, array in arrays.items()
    }
    path = tmp_path / "a.pth"
    tw.zip_file(path, tw.pickled(tw.mapping(entries)), data, byteorder="big")
    got = open_checkpoint(path)
    assert all(same(got[name].read(), array) for name, array in arrays.items())


def test_zip64_members_are_found(tmp_path):
    array = np.arange(5, dtype=np.float32)
    pickle = tw.pickled(tw.mapping({"x": tw.tensor("0", array)}))
    members = {"big/data.pkl": pickle, "big/data/0": array.tobytes(), "big/version": b"3\n"}
    got = open_checkpoint(tw.zip64_file(tmp_path / "a.pth", members))
    assert same(got["x"].read(), array)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "params_ema", "net"])
def test_the_weights_inside_a_training_checkpoint_are_found(tmp_path, key):
    array = np.ones((2, 2), np.float32)
    inert = tw.symbol("yacs.config", "CfgNode") + b")\x81}" + tw.text("LR") + b"K\x01sb"
    namespace = tw.symbol("argparse", "Namespace") + b")\x81}b"
    kind = tw.call(tw.symbol("numpy", "dtype"), tw.text("f8"), b"\x89", b"\x88") + b"(K\x03tb"
    scalar = tw.call(
        tw.symbol("numpy.core.multiarray", "scalar"),
        kind,
        tw.call(tw.symbol("_codecs", "encode"), tw.text("\0" * 8), tw.text("latin1")),
    )
    whole = tw.mapping(
        {
            "epoch": tw.integer(299),
            "best": tw.tensor("best", np.array(81.2, np.float32)),
            key: tw.call(tw.symbol("collections", "OrderedDict"))
            + b"("
            + tw.text("module.w")
            + tw.tensor("0", array)
            + b"u}"
            + tw.text("_metadata")
            + b"}sb",
            "optimizer": tw.mapping({"state": b"}K\x00" + tw.tensor("1", array) + b"s"}),
            "config": inert,
            "args": namespace,
            "max_accuracy": scalar,
        }
    )
    data = {"best": np.array(81.2, np.float32).tobytes(), "0": array.tobytes()}
    path = tw.zip_file(tmp_path / "a.pth", tw.pickled(whole), data | {"1": array.tobytes()})
    got = open_checkpoint(path)
    assert list(got) == ["w"]  # and the prefix that all names share is gone
    assert same(got["w"].read(), array)


def test_a_wrapped_module_prefix_stays_if_not_all_names_have_it(tmp_path):
    arrays = {"module.a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    assert set(open_checkpoint(tw.save(tmp_path / "a.pth", arrays))) == set(arrays)


def test_a_damaged_tensor_is_found_by_its_checksum(tmp_path):
    path = tw.save(tmp_path / "a.pth", {"x": np.full(100, 7.0, np.float32)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.full(9, 7.0, np.float32).tobytes()) + 20] ^= 1
    path.write_bytes(raw)
    tensor = open_checkpoint(path)["x"]
    with pytest.raises(CheckpointError, match="damaged"):
        tensor.read()


def test_safetensors_agree_with_the_package_both_ways(tmp_path):
    arrays = {k: v for k, v in some_arrays().items() if not k.startswith("of.complex128")}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_safetensors(ours, arrays, {"format": "pt"})
    loaded = safetensors.numpy.load_file(ours)
    assert loaded.keys() == arrays.keys()
    assert all(same(loaded[name], array) for name, array in arrays.items())

    safetensors.numpy.save_file(arrays, theirs)
    got = open_checkpoint(theirs)
    assert got.keys() == arrays.keys()
    assert all(same(got[name].read(), array) for name, array in arrays.items())


def test_saving_safetensors_takes_lazy_and_strided_tensors(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    source = open_checkpoint(tw.save(tmp_path / "a.pth", {"x": array}))
    save_safetensors(tmp_path / "b.safetensors", {"x": source["x"], "t": array.T})
    got = open_checkpoint(tmp_path / "b.safetensors")
    assert same(got["x"].read(), array) and same(got["t"].read(), array.T)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.ones(2, np.float32)})
    before = path.read_bytes()

    class Breaks(files.Tensor):
        pass

    def fail():
        raise OSError("No space left on device")

    broken = files.Tensor((2,), np.dtype(np.float32), fail)
    with pytest.raises(OSError, match="No space"):
        save_safetensors(path, {"x": broken})
    with pytest.raises(ValueError, match="no type"):
        save_safetensors(path, {"x": np.array(["text"])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_archives_are_read(tmp_path, save):
    arrays = {
        "Transformer/encoderblock_0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.array(1.5),
    }
    save(tmp_path / "a.npz", **arrays)
    got = open_checkpoint(tmp_path / "a.npz")
    for name, array in arrays.items():
        want = array.astype(array.dtype.newbyteorder("=")) if name == "big" else array
        assert same(got[name].read(), want), name


def write_shards(folder, suffix=".safetensors"):
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros((1, 3), np.float32)}
    names = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for name, arrays in zip(names, (first, second), strict=True):
        if suffix == ".bin":
            tw.save(folder / name, arrays)
        else:
            save_safetensors(folder / name, arrays)
    stem = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    index = folder / f"{stem}.index.json"
    weight_map = {"a": names[0], "b": names[1]}
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_folders_are_one_checkpoint(tmp_path, suffix):
    index, _ = write_shards(tmp_path, suffix)
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, index):
        got = open_checkpoint(place)
        assert {name: tensor.shape for name, tensor in got.items()} == {"a": (2,), "b": (1, 3)}
        assert same(got["a"].read(), np.ones(2, np.float32))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_need_no_index_but_each_other(tmp_path, suffix):
    index, weight_map = write_shards(tmp_path, suffix)
    index.unlink()
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}
    with pytest.raises(CheckpointError, match="part 1 of 2 of a checkpoint; give the folder"):
        open_checkpoint(tmp_path / weight_map["a"])
    (tmp_path / weight_map["a"]).unlink()
    with pytest.raises(CheckpointError, match=r"the shard 'model-00001-of-00002.*is missing"):
        open_checkpoint(tmp_path)


def test_an_index_must_tell_the_truth(tmp_path):
    index, weight_map = write_shards(tmp_path)

    def rewrite(**changes):
        index.write_text(json.dumps({"weight_map": weight_map | changes}))

    rewrite(c=weight_map["a"])
    with pytest.raises(CheckpointError, match="in no shard"):
        open_checkpoint(tmp_path)
    rewrite(a=weight_map["b"])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    rewrite(a="model-00009-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(tmp_path)


def test_a_folder_with_one_file_of_weights_is_that_file(tmp_path):
    tw.save(tmp_path / "anything.pth", {"x": np.zeros(1, np.float32)})
    assert list(open_checkpoint(tmp_path)) == ["x"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x1f\x8b\x08", "a gzip archive to be unpacked first"),
        (b"\x89PNG\r\n\x1a\n0000", "no checkpoint"),
        (b"\x80\x02K\x01.", "torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "a.pth")
    if reason == "LFS pointer":
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(tmp_path / "a.safetensors")


def test_what_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        open_checkpoint(tmp_path / "nothing.pth")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"readme\.txt"):
        open_checkpoint(tmp_path)


def test_paths_resolve_to_themselves(tmp_path):
    assert files.resolve(tmp_path) == tmp_path
    assert files.resolve(tmp_path / "a.pth") == tmp_path / "a.pth"


def test_a_hub_id_is_fetched_without_code(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    class Api:
        def list_repo_files(self, name, revision=None):
            asked["listed"] = (name, revision)
            return ["model.safetensors", "pytorch_model.bin", "modeling_evil.py"]

    def download(name, revision=None, allow_patterns=()):
        asked["fetched"] = (name, revision, tuple(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert files.resolve("org/name@abc123") == tmp_path
    assert asked["listed"] == ("org/name", "abc123")
    name, revision, patterns = asked["fetched"]
    assert (name, revision) == ("org/name", "abc123")
    assert not any("py" in p.rsplit(".")[-1] or p.endswith(".bin") for p in patterns)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    class Api:
        def list_repo_files(self, name, revision=None):
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(FileNotFoundError, match="org/name") as error:
        files.resolve("org/name")
    assert "\n" not in str(error.value)


def test_orbax_folders_are_told_from_others(tmp_path):
    assert not files.is_orbax(tmp_path)
    write_shards(tmp_path)
    assert not files.is_orbax(tmp_path)
    step = tmp_path / "run" / "checkpoints" / "100"
    step.mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    assert all(map(files.is_orbax, (step, step.parent, tmp_path / "run")))
    assert not files.is_orbax(step / "_CHECKPOINT_METADATA")
