"""Opening published checkpoints, whatever their format, as a mapping of lazy tensors.

    state = open_checkpoint("swin_tiny_patch4_window7_224.pth")
    state["head.weight"].shape, state["head.weight"].read()

Formats: `.safetensors`; torch's `.pth`, `.pt`, `.bin` (no torch needed); `.npz`; Flax's
`.msgpack`; Hugging Face directories and their sharded `*.index.json`. The format is told from the
contents, not the name.
Nothing in a file is ever run, and what a file claims is checked before memory is taken for it.
"""

import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from zoo.checkpoints.msgpack_file import read_msgpack
from zoo.checkpoints.npz_file import read_npz
from zoo.checkpoints.safetensors_file import parse_json, read_safetensors, save_safetensors
from zoo.checkpoints.tensor import (
    CheckpointError,
    StateDict,
    Tensor,
    UnsafeCheckpoint,
    file_size,
    read_bytes,
)
from zoo.checkpoints.torch_file import read_torch

__all__ = [
    "CheckpointError",
    "StateDict",
    "Tensor",
    "UnsafeCheckpoint",
    "is_orbax",
    "open_checkpoint",
    "resolve",
    "save_safetensors",
]

T = TypeVar("T")
MAX_INDEX = 64 << 20  # bytes of an index.json
_WHOLE = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_OTHERS = {
    b"GGUF": "a GGUF file (llama.cpp), which is no checkpoint",
    b"\x89HDF": "an HDF5 file (Keras), which is no checkpoint",
    b"\x1f\x8b": "a gzip archive to be unpacked first, no checkpoint",
    b"\x93NUMPY": "an array (.npy), no checkpoint",
}
"""What files of other formats begin with."""

_UNKNOWN = "no checkpoint"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WRAPPING = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
HUB_SECONDS = 3.0  # after which a hub that does not answer is given up


def open_checkpoint(path: str | os.PathLike, weights: str | None = None) -> StateDict:
    """The tensors of a published checkpoint by their official names, none of them read yet.

    The weights inside a training checkpoint (`model`, `state_dict`, ...) are found.

    Args:
      path: a file, a Hugging Face directory, or an index of shards.
      weights: which set, where a file holds several: `raw`, `averaged`, `teacher`, `student`, or
        the name of its entry. Without a choice the published one is taken, and `notes` says so.

    Raises:
      FileNotFoundError: if there is none.
      UnsafeCheckpoint: if the file asks for what published weights never need.
      CheckpointError: if it is broken, truncated or of an unknown format.
      ValueError: if the file does not hold these weights.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    if path.is_file() and (part := _SHARD.fullmatch(path.name)) and int(part[2]) > 1:
        raise CheckpointError(
            f"{path}: part {int(part[1])} of {int(part[2])} of a checkpoint; give the folder, "
            "which has all parts."
        )
    tensors = _open_directory(path, weights) if path.is_dir() else _open_file(path, weights)
    notes = list(getattr(tensors, "notes", ()))
    chosen = getattr(tensors, "chosen", False)
    for prefix in _WRAPPING:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            notes.append(f"The prefix {prefix!r} was stripped of the file's names.")
    return StateDict(tensors, tuple(notes), chosen)


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether a path is a directory that the trainer (through Orbax) wrote.

    That is a step (`_CHECKPOINT_METADATA` stands in it), a folder of steps, or a run with its
    `checkpoints` folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        return False
    return any(
        (step / "_CHECKPOINT_METADATA").exists()
        for place in (folder, folder / "checkpoints")
        for step in (place, *(p for p in _children(place) if p.is_dir()))
    )


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """A path as it is; a hub id (`org/name`, `org/name@revision`) as the folder it is fetched to.

    Only weights and JSON files are fetched (safetensors where there are any), no code.

    Args:
      path_or_id: a path that exists, or else a hub id.
      revision: a branch, tag or commit of the hub's repository.

    Raises:
      FileNotFoundError: if it is neither, or cannot be fetched.
    """
    path, text = Path(path_or_id), str(path_or_id)
    name, _, pinned = text.partition("@")
    if path.exists() or not _HUB_ID.fullmatch(name) or path.suffix in (".pth", ".pt", ".bin"):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"There is no file {text!r}; to fetch it from the hub, pip install huggingface_hub."
        ) from None
    revision = revision or pinned or None

    def fetched() -> Path:
        listed = _in_time(lambda: huggingface_hub.HfApi().list_repo_files(name, revision=revision))
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in listed) else "*.bin"
        patterns = [weights, f"{weights}.index.json", "*.json"]
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )

    try:
        return fetched()
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise FileNotFoundError(
            f"There is no file {text!r}, and the hub gave none of that name "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})."
        ) from None


def _in_time(ask: Callable[[], T]) -> T:
    """The answer, or TimeoutError after `HUB_SECONDS`: the hub's client tries again for longer."""
    answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((True, ask()))
        except Exception as error:
            answer.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        done, value = answer.get(timeout=HUB_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer in {HUB_SECONDS:g} seconds") from None
    if done:
        return value
    raise value


def _open_file(path: Path, weights: str | None = None) -> Mapping[str, Tensor]:
    size = file_size(path)
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty.")
    start = read_bytes(path, 0, min(size, 9)).tobytes()
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if start[:4] == b"PK\x03\x04":
        return read_npz(path) if path.suffix == ".npz" else read_torch(path, weights)
    text = start[1:2] > b"\xa0" and start[1:2] < b"\xc0"  # a map whose first key is a short text
    if path.suffix == ".msgpack" or (b"\x80" < start[:1] < b"\x90" and text and size > 64):
        return read_msgpack(path)
    if start[:1] == b"\x80" and path.suffix != ".safetensors":
        return read_torch(path, weights)
    if start[:5] == b"<html" or start[:9].lower() == b"<!doctype" or start[:7] == b"version":
        raise CheckpointError(f"{path}: a web page or a Git LFS pointer, not the weights.")
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return read_safetensors(path)
    what = next(
        (name for magic, name in _OTHERS.items() if start.startswith(magic)), "no checkpoint"
    )
    raise CheckpointError(
        f"{path}: {what} that is known here; it should be a safetensors file, a torch file, "
        "an .npz archive, Flax's .msgpack or a Hugging Face folder."
    )


def _open_directory(folder: Path, weights: str | None) -> Mapping[str, Tensor]:
    for name in _WHOLE:
        for candidate in (folder / name, folder / f"{name}.index.json"):
            if candidate.exists():
                return _open_file(candidate, weights)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: an adapter (PEFT), not the weights of a model. Load the base model's file, "
            "add zoo.methods.lora.LoRA, and read the adapter with zoo.methods.lora.with_adapter."
        )
    if shards := [p for p in _children(folder) if _SHARD.fullmatch(p.name)]:
        return _open_shards(folder, shards)
    for suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".msgpack"):
        found = [p for p in _children(folder) if p.suffix == suffix]
        if len(found) == 1:
            return _open_file(found[0], weights)
    inner = folder / "0_Transformer"  # older folders of sentence-transformers
    if inner.is_dir():
        return _open_directory(inner, weights)
    names = ", ".join(p.name for p in _children(folder)[:8]) or "nothing"
    raise CheckpointError(
        f"{folder}: no weights that are known here (one of {', '.join(_WHOLE)}, their index, or a "
        f"single file of weights); it holds {names}."
    )


def _open_index(path: Path) -> Mapping[str, Tensor]:
    """The tensors of all shards that an index names, which must lie beside it."""
    if file_size(path) > MAX_INDEX:
        raise UnsafeCheckpoint(f"{path}: an index of more than {MAX_INDEX} bytes.")
    weight_map = parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: the index has no weight_map.")
    shards: dict[str, None] = {}
    for shard in weight_map.values():
        if isinstance(shard, str) and shard in shards:
            continue
        if not isinstance(shard, str) or shard != os.path.basename(shard) or "\\" in shard:
            raise UnsafeCheckpoint(f"{path}: the shard {str(shard)[:200]!r} is outside its folder.")
        if not shard.endswith((".safetensors", ".bin")):
            raise UnsafeCheckpoint(f"{path}: the shard {shard[:200]!r} is no file of weights.")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard[:200]!r} is missing.")
        shards[shard] = None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in _open_file(path.parent / shard).items():
            if weight_map.get(name, shard) != shard or name in tensors:
                raise CheckpointError(f"{path}: {name!r} is in another shard than the index says.")
            tensors[name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} tensors of the index are in no shard, {lost[0][:100]!r} first."
        )
    return tensors


def _open_shards(folder: Path, shards: list[Path]) -> Mapping[str, Tensor]:
    """The tensors of shards whose index is not there: all of them, as their names number them."""
    first = _SHARD.fullmatch(shards[0].name)
    count = int(first[2]) if first else 0
    wanted = [
        shards[0].name.replace(f"-{first[1]}-of-", f"-{i + 1:05}-of-") if first else ""
        for i in range(min(count, 10_000))
    ]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: the shard {missing[0]!r} is missing.")
    tensors: dict[str, Tensor] = {}
    for name in wanted:
        for key, tensor in _open_file(folder / name).items():
            if key in tensors:
                raise CheckpointError(f"{folder}: {key!r} is in two shards.")
            tensors[key] = tensor
    return tensors


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
