"""Files that torch itself wrote are read as torch reads them (runs where torch is installed)."""

import argparse
import collections

import numpy as np
import pytest

from zoo.checkpoints.files import open_checkpoint

torch = pytest.importorskip("torch")

KINDS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
DTYPES = [
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


def state() -> dict:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {f"of.{d}": (torch.randn(3, 5) * 3).abs().to(getattr(torch, d)) for d in DTYPES}
    return tensors | {
        "base": base,
        "transposed": base.t(),
        "strided": base[1:4, ::2],
        "row": base[3],
        "scalar": torch.tensor(3.5),
        "element": base[2, 5],
        "empty": torch.empty(0, 3),
        "empty inside": torch.empty(3, 0, 2),
        "position_ids": torch.arange(7).expand(1, -1),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "buffer": torch.nn.parameter.Buffer(torch.randn(2)),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "large": torch.randn(300, 257),
    }


def bits(tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def saved(path, tensors, kind, loadable=("zip", "legacy")) -> dict:
    """The tensors as torch loads them back; those given where its own safe reader cannot.

    It reads protocol 2 only, and in the legacy format no type without a storage class.
    """
    torch.save(tensors, path, **KINDS[kind])
    return torch.load(path, weights_only=True) if kind in loadable else tensors


def agree(path, want) -> None:
    got = open_checkpoint(path)
    assert list(got) == list(want)
    for name, tensor in want.items():
        array = got[name].read()
        assert array.shape == got[name].shape == tuple(tensor.shape), name
        assert array.dtype == got[name].dtype, name
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == bits(tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_any_tensor(tmp_path, kind):
    agree(tmp_path / "a.pth", saved(tmp_path / "a.pth", state(), kind, ["zip"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_of_a_module(tmp_path, kind):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.TransformerEncoderLayer(8, 2)
    )
    agree(tmp_path / "a.pth", saved(tmp_path / "a.pth", module.state_dict(), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_checkpoint(tmp_path, kind):
    """With an optimizer, a scheduler, arguments and NumPy numbers beside the weights."""
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    whole = {
        "model": collections.OrderedDict(module.state_dict()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "max_accuracy": np.float64(81.2),
        "rng": np.arange(3.0),
        "epoch": 299,
        "args": argparse.Namespace(lr=1e-3, betas=[0.9, 0.99], device=torch.device("cpu")),
        "scaler": None,
        "dtype": torch.bfloat16,
        "shape": torch.Size([1, 2]),
        "names": {"a", "b"},
        "loss": torch.tensor(0.5),
    }
    torch.save(whole, tmp_path / "a.pth", **KINDS[kind])
    got = open_checkpoint(tmp_path / "a.pth")
    assert list(got) == ["weight", "bias"]
    assert all(got[k].read().tobytes() == bits(v) for k, v in module.state_dict().items())


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_checkpoint(tmp_path / "a.pth")


def test_quantised_and_sparse_tensors_are_refused_by_name(tmp_path):
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="sparse"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(ValueError, match=r"TorchScript|compressed"):
        open_checkpoint(tmp_path / "a.pth")
