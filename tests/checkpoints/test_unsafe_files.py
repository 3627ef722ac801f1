"""Files made to do harm, or broken by accident, are refused with the reason and do nothing."""

import json
import os
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_writer as tw

from zoo.checkpoints.files import CheckpointError, UnsafeCheckpoint, open_checkpoint
from zoo.checkpoints.pickle_machine import PickleMachine

ARRAY = np.arange(6, dtype=np.float32)
GOOD = tw.tensor("0", ARRAY)
DATA = {"0": ARRAY.tobytes()}
FLOATS = tw.storage("FloatStorage", "0", 6)
MEMORY = 400 << 20  # bytes that refusing a file may take at most


def opened(path: Path):
    """Open a file and read every tensor, in bounded memory."""
    tracemalloc.start()
    try:
        for tensor in open_checkpoint(path).values():
            tensor.read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


def refused(path: Path, reason: str, kind: type = UnsafeCheckpoint) -> None:
    folder = path.parent
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(kind, match=reason) as error:
        opened(path)
    assert isinstance(error.value, ValueError)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def evil(module: str, name: str, *args: bytes) -> bytes:
    return tw.call(tw.symbol(module, name), *args)


def touch(folder: Path) -> bytes:
    return tw.text(f"touch {folder / 'harm'}")


PICKLES = {
    "os.system": (lambda d: evil("os", "system", touch(d)), r"os\.system"),
    "posix.system": (lambda d: evil("posix", "system", touch(d)), r"posix\.system"),
    "subprocess": (lambda d: evil("subprocess", "Popen", touch(d)), r"subprocess\.Popen"),
    "eval": (lambda d: evil("builtins", "eval", tw.text("1+1")), r"builtins\.eval"),
    "exec": (lambda d: evil("builtins", "exec", tw.text("import os")), r"builtins\.exec"),
    "py2 eval": (lambda d: evil("__builtin__", "eval", tw.text("1")), r"__builtin__\.eval"),
    "getattr": (lambda d: evil("builtins", "getattr", GOOD, tw.text("x")), r"builtins\.getattr"),
    "import": (lambda d: evil("builtins", "__import__", tw.text("os")), r"builtins\.__import__"),
    "open": (lambda d: evil("io", "open", tw.text(str(d / "harm")), tw.text("w")), r"io\.open"),
    "nested global": (
        lambda d: evil("collections", "OrderedDict.__class__", tw.text("x")),
        r"collections\.OrderedDict\.__class__",
    ),
    "torch.load": (lambda d: evil("torch", "load", tw.text("x")), r"torch\.load"),
    "torch.hub": (lambda d: evil("torch.hub", "load", tw.text("x")), r"torch\.hub\.load"),
    "torch dtype called": (lambda d: evil("torch", "float32", GOOD), r"a call of torch\.float32"),
    "type called": (lambda d: evil("builtins", "list", GOOD), r"a call of builtins\.list"),
    "call of data": (lambda d: tw.text("os.system") + tw.group(GOOD) + b"R", "a call of a str"),
    "reduce chain": (
        lambda d: tw.call(evil("builtins", "getattr", tw.text("a"), tw.text("b")), touch(d)),
        r"builtins\.getattr",
    ),
    "reduce of reduced": (
        lambda d: tw.call(tw.call(tw.symbol("collections", "OrderedDict")), GOOD),
        "a call of a dict",
    ),
    "stack global": (lambda d: tw.text("os") + tw.text("system") + b"\x93", r"os\.system"),
    "stack global of data": (lambda d: tw.text("os") + b"K\x01\x93", "a name that is no text"),
    "newobj": (lambda d: tw.symbol("os", "system") + b")\x81", r"os\.system"),
    "inst": (lambda d: b"(" + touch(d) + b"ios\nsystem\n", r"opcode b'i'"),
    "obj": (lambda d: b"(" + tw.symbol("argparse", "Namespace") + b"o", r"opcode b'o'"),
    "extension": (lambda d: b"\x82\x01", "opcode"),
    "persid": (lambda d: b"Pstorage\n", r"opcode b'P'"),
    "next buffer": (lambda d: b"\x97", "opcode"),
    "build on a list": (lambda d: b"]}b", "attributes for a list"),
    "build on a symbol": (
        lambda d: tw.symbol("collections", "OrderedDict") + b"}b", "attributes for collections"
    ),
    "whole module": (lambda d: evil("models.swin", "Swin"), r"models\.swin\.Swin"),
    "unhashable depth": (
        lambda d: b"}" + b")" + b"\x85" * 100_000 + b"K\x01s", "a dictionary key"
    ),
    "deep call": (
        lambda d: tw.call(
            tw.symbol("torch._tensor", "_rebuild_from_type_v2"), b")" + b"\x85" * 100_000,
            tw.symbol("torch", "Tensor"), tw.group(GOOD), b"N",
        ),
        "tensor of class",
    ),
    "huge key": (lambda d: b"}\x8a\x20" + b"\x7f" * 32 + b"K\x01s", "more than 63 bits"),
    "huge integer": (lambda d: b"\x8b" + struct.pack("<i", 1 << 20) + b"\1" * (1 << 20), "integer"),
    "negative integer length": (lambda d: b"\x8b" + struct.pack("<i", -5), "integer of -5"),
    "copy bomb": (
        lambda d: b"](" + b"K\x01" * 50_000 + b"eq\x00" + b"".join(
            tw.symbol("torch", "Size") + b"h\x00\x85R" for _ in range(60)
        ),
        "steps",
    ),
    "memo bomb": (
        lambda d: b"".join(b"]r" + struct.pack("<I", n) for n in (1 << 20, 1 << 31, 2**32 - 1))
        + GOOD,
        "no state dict",
    ),
    "not a storage": (lambda d: tw.group(tw.text("module"), b"N", b"N", b"N", b"N") + b"Q",
                      "no storage"),
    "storage of another type": (
        lambda d: tw.group(
            tw.text("storage"), tw.symbol("argparse", "Namespace"), tw.text("0"), tw.text("cpu"),
            tw.integer(6),
        ) + b"Q",
        r"argparse\.Namespace",
    ),
    "negative storage": (lambda d: tw.storage("FloatStorage", "0", -1), "proper type, key"),
    "huge storage": (
        lambda d: tw.mapping(
            {"x": tw.rebuilt(tw.storage("FloatStorage", "0", 1 << 60), 0, (1,), (1,))}
        ),
        "should have",
    ),
    "storage of two types": (
        lambda d: tw.storage("FloatStorage", "0", 6) + tw.storage("IntStorage", "0", 6), "twice"
    ),
    "wrong dtype": (
        lambda d: tw.mapping({"x": tw.rebuilt(tw.storage("DoubleStorage", "0", 6), 0, (6,), (1,))}),
        "should have 48 bytes",
    ),
    "lost storage": (
        lambda d: tw.mapping({"x": tw.rebuilt(tw.storage("FloatStorage", "9", 6), 0, (6,), (1,))}),
        "not in the file",
    ),
    "storage by path": (
        lambda d: tw.mapping(
            {"x": tw.rebuilt(tw.storage("FloatStorage", "../../x", 6), 0, (6,), (1,))}
        ),
        "not in the file",
    ),
    "shape beyond": (lambda d: tw.rebuilt(FLOATS, 0, (7,), (1,)), "beyond the 6 elements"),
    "offset beyond": (lambda d: tw.rebuilt(FLOATS, 4, (3,), (1,)), "beyond the 6 elements"),
    "empty offset beyond": (lambda d: tw.rebuilt(FLOATS, 7, (0,), (1,)), "beyond the 6 elements"),
    "strides beyond": (lambda d: tw.rebuilt(FLOATS, 0, (2, 3), (4, 1)), "beyond the 6 elements"),
    "negative size": (lambda d: tw.rebuilt(FLOATS, 0, (-1,), (1,)), "negative"),
    "negative stride": (lambda d: tw.rebuilt(FLOATS, 5, (6,), (-1,)), "negative"),
    "negative offset": (lambda d: tw.rebuilt(FLOATS, -1, (6,), (1,)), "proper shape"),
    "boolean size": (
        lambda d: tw.call(
            tw.symbol("torch._utils", "_rebuild_tensor"), FLOATS, b"K\x00",
            b"\x88\x85", b"K\x01\x85"
        ),
        "non-integer",
    ),
    "overflowing size": (lambda d: tw.rebuilt(FLOATS, 0, (1 << 64,), (0,)), "non-integer"),
    "many dimensions": (lambda d: tw.rebuilt(FLOATS, 0, [1] * 40, [1] * 40), "40 dimensions"),
    "unequal dimensions": (lambda d: tw.rebuilt(FLOATS, 0, (2, 3), (1,)), "2 dimensions"),
    "expansion bomb": (
        lambda d: tw.mapping({"x": tw.rebuilt(FLOATS, 0, (1 << 20, 1 << 20), (0, 0))}),
        "more than the file",
    ),
    "tensor of no storage": (
        lambda d: tw.rebuilt(tw.text("storage"), 0, (6,), (1,)), "without a typed storage"
    ),
    "parameter of no tensor": (
        lambda d: evil("torch._utils", "_rebuild_parameter", tw.text("x"), b"\x88", b"N"),
        "no tensor",
    ),
    "protocol": (lambda d: b"\x80\x09", "protocol 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_harmful_pickles_are_refused(tmp_path, name, legacy):
    make, reason = PICKLES[name]
    pickle = tw.pickled(make(tmp_path))
    path = tmp_path / "a.pth"
    if legacy:
        path.write_bytes(tw.legacy_bytes(pickle, {"0": (6, ARRAY.tobytes())}))
        beyond = ("should have", "should have 48 bytes", "not in the file")
        if reason in beyond or name == "whole module":
            reason = "element|storages listed|file ends"
    else:
        tw.zip_file(path, pickle, DATA)
    refused(path, reason, CheckpointError)
    assert not (tmp_path / "harm").exists()


def test_a_pickle_without_end_is_given_up(tmp_path):
    path = tw.zip_file(tmp_path / "a.pth", tw.pickled(b"}" * 2_100_000), DATA)
    with pytest.raises(UnsafeCheckpoint, match="steps"):
        open_checkpoint(path)


def test_refusals_are_of_the_unsafe_kind(tmp_path):
    tw.zip_file(tmp_path / "a.pth", tw.pickled(evil("os", "system", touch(tmp_path))), DATA)
    refused(tmp_path / "a.pth", "Only tensors and plain containers are read", UnsafeCheckpoint)


def renamed(path: Path, old: str, new: str) -> None:
    """Change a member's name in both headers of a zip file (names of equal length)."""
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/cron.d/evil", "absolute"),
        ("archive/../../evil", r"'\.\.'"),
        ("archive\\evil", "foreign"),
        ("C:/evil", "foreign"),
        ("elsewhere/evil", "outside"),
        ("archive/constants.pkl", "TorchScript"),
    ],
)
def test_members_with_foreign_paths_are_refused(tmp_path, name, reason):
    path = tmp_path / "a.pth"
    placeholder = "archive/" + "x" * (len(name) - 8) if len(name) > 8 else "archive"
    if len(placeholder) != len(name):
        placeholder = "y" * len(name)
    tw.zip_file(path, tw.pickled(tw.mapping({"x": GOOD})), DATA, more={placeholder: b"evil"})
    renamed(path, placeholder, name)
    refused(path, reason)


def test_doubled_members_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    more = {"archive/data/1": b"\0" * 24}
    tw.zip_file(path, tw.pickled(tw.mapping({"x": GOOD})), DATA, more=more)
    renamed(path, "archive/data/1", "archive/data/0")
    refused(path, "twice")


def test_a_zip_bomb_is_not_inflated(tmp_path):
    pickle = tw.pickled(
        tw.mapping({"x": tw.rebuilt(tw.storage("ByteStorage", "0", 1 << 24), 0, (1 << 24,), (1,))})
    )
    path = tmp_path / "a.pth"
    tw.zip_file(path, pickle, {"0": b"\0" * (1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refused(path, "compressed")


def test_encrypted_members_are_refused(tmp_path):
    path = tw.zip_file(tmp_path / "a.pth", tw.pickled(tw.mapping({"x": GOOD})), DATA)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    refused(path, "encrypted")


def test_overlapping_members_are_refused(tmp_path):
    """The quoted-overlap bomb: many members whose data is one and the same."""
    path = tw.zip_file(
        tmp_path / "a.pth", tw.pickled(tw.mapping({"x": GOOD})), DATA | {"1": b"\1" * 24}
    )
    raw = bytearray(path.read_bytes())
    central = [i for i in range(len(raw)) if raw[i : i + 4] == b"PK\x01\x02"]
    entry = next(i for i in central if raw[i + 46 :].startswith(b"archive/data/0"))
    size = struct.unpack_from("<I", raw, entry + 24)[0]
    struct.pack_into("<II", raw, entry + 20, size + 40, size + 40)
    path.write_bytes(raw)
    refused(path, "overlap")


def test_a_directory_that_claims_too_much_is_refused(tmp_path):
    path = tw.zip64_file(tmp_path / "a.pth", {"a/data.pkl": b""})
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack("<I", 0x06064B50))
    struct.pack_into("<QQ", raw, at + 24, 1 << 40, 1 << 40)
    path.write_bytes(raw)
    refused(path, "limits")


def test_a_member_with_two_names_is_refused(tmp_path):
    path = tw.zip_file(tmp_path / "a.pth", tw.pickled(tw.mapping({"x": GOOD})), DATA)
    raw = path.read_bytes()
    at = raw.index(b"archive/data/0")
    path.write_bytes(raw[:at] + b"archive/data/7" + raw[at + 14 :])
    refused(path, "another name")


def test_an_oversized_pickle_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    tw.zip_file(path, b"\x80\x02" + b"N" * (33 << 20), DATA)
    refused(path, "pickle of")


def header(path: Path, entries, body: bytes = b"", length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("entries", "body", "length", "reason"),
    [
        ({"x": entry()}, 8, 1 << 62, "header of"),
        ({"x": entry()}, 8, 1 << 20, "does not lie"),
        ({"x": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, 8, None, "inside the file"),
        ({"x": entry(shape=(3,))}, 8, None, "needs 12 bytes"),
        ({"x": entry(shape=(-2,))}, 8, None, "proper shape"),
        ({"x": entry(shape=(2.0,))}, 8, None, "proper shape"),
        ({"x": entry(shape=(True, 2))}, 8, None, "proper shape"),
        ({"x": entry(shape=[1] * 50 + [2])}, 8, None, "proper shape"),
        ({"x": entry(offsets=(8, 0))}, 8, None, "inside the file"),
        ({"x": entry(offsets=(-8, 0))}, 8, None, "inside the file"),
        ({"x": entry(), "y": entry()}, 8, None, "do not fit"),
        ({"x": entry(offsets=(4, 12))}, 12, None, "do not fit"),
        ({"x": entry()}, 12, None, "file holds 12"),
        ({"x": entry(dtype="PICKLE")}, 8, None, "unknown type"),
        ({"x": {"dtype": "F32"}}, 8, None, "lacks"),
        ({"x": 3}, 8, None, "lacks"),
        (b"[" * 100_000, 0, None, "JSON is broken"),
        (b'{"x": 1, "x": 2}', 0, None, "twice"),
        (b"[]", 0, None, "no object"),
        (b"\xff\xfe{", 0, None, "JSON is broken"),
        ({"x": entry(shape=(1 << 62, 1 << 62, 0), offsets=(0, 8))}, 8, None, "needs 0 bytes"),
    ],
)
def test_dishonest_safetensors_are_refused(tmp_path, entries, body, length, reason):
    path = header(tmp_path / "a.safetensors", entries, b"\0" * body, length)
    refused(path, reason, CheckpointError)


def test_npz_with_objects_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    np.savez(tmp_path / "a.npz", x=np.array([Harm()], dtype=object))
    refused(tmp_path / "a.npz", "Python objects")
    assert not (tmp_path / "harm").exists()


def npz(path: Path, name: str, data: bytes, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
    return path


def npy(shape, descr="<f4", body=b"") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.npy", npy((1 << 40,)), "needs"),
        ("x.npy", npy((-4,)), "shape"),
        ("x.npy", npy((2,), "<U3", b"\0" * 24), "not of numbers"),
        ("x.npy", npy("__import__('os')"), "broken"),
        ("x.npy", b"not an array", "broken"),
        ("../x.npy", npy((0,)), "outside"),
        ("/x.npy", npy((0,)), "outside"),
        ("x.sh", b"rm", "no plain .npy"),
    ],
)
def test_dishonest_npz_is_refused(tmp_path, name, data, reason):
    refused(npz(tmp_path / "a.npz", name, data), reason, CheckpointError)


def test_an_npz_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "a.npz"
    npz(path, "x.npy", npy((1 << 31,), "|u1", bytes(1 << 20)), zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, 128 + (1 << 31))
    path.write_bytes(raw)
    refused(path, "zip bomb")


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.bin", "a.py", 7, None]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(path, "outside its folder|no file of weights")


# ------------------------------------------------------------------------------ by accident


def good_files(folder: Path) -> list[Path]:
    arrays = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "a.bias": np.arange(4, dtype=np.float16),
        "n": np.array(7),
    }
    from zoo.checkpoints.files import save_safetensors

    save_safetensors(folder / "a.safetensors", arrays)
    np.savez_compressed(folder / "a.npz", **arrays)
    tw.save(folder / "zip.pth", arrays)
    tw.save(folder / "legacy.pth", arrays, legacy=True)
    return [folder / n for n in ("a.safetensors", "a.npz", "zip.pth", "legacy.pth")]


@pytest.mark.parametrize("number", range(4))
def test_files_cut_off_anywhere_are_refused(tmp_path, number):
    path = good_files(tmp_path)[number]
    whole = path.read_bytes()
    opened(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            for tensor in open_checkpoint(path).values():
                tensor.read()


@pytest.mark.parametrize("number", range(4))
def test_damaged_bytes_never_escape_as_another_error(tmp_path, number):
    path = good_files(tmp_path)[number]
    whole = path.read_bytes()
    chance = random.Random(number)
    refusals = 0
    for _ in range(1500):
        broken = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 3, 20))):
            broken[chance.randrange(len(whole))] = chance.randrange(256)
        if chance.random() < 0.2:
            at = chance.randrange(len(whole))
            del broken[at : at + chance.randrange(1, 9)]
        path.write_bytes(broken)
        try:
            for tensor in open_checkpoint(path).values():
                assert tensor.read().shape == tensor.shape
        except CheckpointError:
            refusals += 1
    assert refusals > 500


def test_random_programs_never_escape_the_machine():
    """Random opcodes with random operands: a result or a CheckpointError, nothing else."""
    chance = random.Random(0)
    pieces = [bytes([op]) for op in range(256)] + 6 * [
        b"(", b")", b"t", b"]", b"}", b"q\x00", b"h\x00", b"K\x01", b"R", b"b", b"Q", b"s", b"u",
        b"e", b"\x85", b"\x86", b"N", tw.text("storage"), tw.text("cpu"), GOOD, FLOATS,
        tw.symbol("collections", "OrderedDict"), tw.symbol("torch", "FloatStorage"),
        tw.symbol("torch._utils", "_rebuild_tensor_v2"), tw.symbol("argparse", "Namespace"),
    ]  # fmt: skip
    ends = 0
    for _ in range(20_000):
        program = b"".join(chance.choices(pieces, k=chance.randrange(1, 30))) + b"."
        try:
            PickleMachine(program, "random").run()
            ends += 1
        except CheckpointError:
            pass
    assert ends > 100
