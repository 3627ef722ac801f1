"""A step on disk: its files and their digests, its manifest and its JSON."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from zoo.checkpoints.runs.storage import cause
from zoo.errors import CheckpointBroken

FILES = "FILES.json"
SCORES = "scores.json"
PACKAGES = ("flax-zoo", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def steps_of(folder: Path) -> list[int]:
    """Numbers of the steps in a folder, smallest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def set_aside(folder: Path) -> Path:
    """Move a step out of the way, to `run/set_aside`; nothing is deleted."""
    home = folder.parent.parent / "set_aside"
    home.mkdir(exist_ok=True)
    target, n = home / folder.name, 1
    while target.exists():
        n += 1
        target = home / f"{folder.name}-{n}"
    os.replace(folder, target)
    return target


def verify_files(folder: Path, digests: bool = True) -> dict[str, Any]:
    """Check a step's files against their digests; gives what was saved as `extra`.

    A step that was in place but not yet digested when its run was killed has no `FILES.json`; its
    arrays are still checked when they are read.

    Args:
      folder: of the step.
      digests: check them; of several processes one is enough.

    Raises:
      CheckpointBroken: naming the first file that is missing or changed.
    """
    listing = folder / FILES
    try:
        if digests and listing.exists():
            recorded = json.loads(listing.read_text())
            body = json.dumps(recorded["files"], sort_keys=True).encode()
            if hashlib.blake2b(body, digest_size=20).hexdigest() != recorded["digest"]:
                raise CheckpointBroken(f"Checkpoint {folder} is damaged: {FILES} has changed.")
            for name, digest in recorded["files"].items():
                file = folder / name
                if not file.is_file():
                    raise CheckpointBroken(f"Checkpoint {folder} is damaged: {name} is missing.")
                if _file_digest(file) != digest:
                    raise CheckpointBroken(
                        f"Checkpoint {folder} is damaged: {name} is not what was written."
                    )
        return json.loads((folder / "extra" / "0.json").read_text())
    except CheckpointBroken:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointBroken(f"Checkpoint {folder} is damaged: {cause(error)}.") from None


def read_manifest(folder: Path) -> dict[str, dict]:
    """Leaf path -> shape, dtype and digests, of all processes that wrote the step.

    Raises:
      CheckpointBroken: if it cannot be read.
    """
    leaves: dict[str, dict] = {}
    try:
        files = sorted((folder / "manifest").glob("*.json"))
        for file in files:
            for path, leaf in json.loads(file.read_text())["leaves"].items():
                known = leaves.setdefault(path, {**leaf, "shards": []})
                known["shards"] += leaf["shards"]
        if not files:
            raise ValueError("it has no manifest")
        return leaves
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointBroken(f"Checkpoint {folder} is damaged: {cause(error)}.") from None


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Json:
    """JSON as a part of a step (Orbax's stateful interface): of each process, or of the first."""

    def __init__(self, content: Mapping[str, Any], every_process: bool) -> None:
        self.text = json.dumps(content, indent=1)
        self.writes = every_process or jax.process_index() == 0

    async def save(self, directory: Any) -> Any:
        """The writing, for Orbax to wait for."""

        async def write() -> None:
            folder = Path(await directory.await_creation())
            if self.writes:
                (folder / f"{jax.process_index()}.json").write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        """Not used: JSON is read without Orbax."""
        raise NotImplementedError


def write_files(folder: Path) -> None:
    """Write the digest of each file of a step beside it."""
    files = {
        str(p.relative_to(folder)): _file_digest(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    body = json.dumps(files, sort_keys=True).encode()
    digest = hashlib.blake2b(body, digest_size=20).hexdigest()
    draft = folder / f"{FILES}.tmp"
    draft.write_text(json.dumps({"digest": digest, "files": files}, indent=1))
    os.replace(draft, folder / FILES)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def read_scores(run: Path, metric: str, mode: str) -> dict[int, float]:
    """What is known of steps by this metric: `run/scores.json`."""
    try:
        known = json.loads((run / SCORES).read_text())
        if (known["metric"], known["mode"]) == (metric, mode):
            return {int(step): float(value) for step, value in known["steps"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def write_scores(run: Path, metric: str, mode: str, scores: Mapping[int, float]) -> None:
    """Write what `read_scores` reads, of steps that are still there."""
    there = steps_of(run / "checkpoints")
    steps = {str(step): scores[step] for step in sorted(scores) if step in there}
    draft = run / f"{SCORES}.tmp"
    draft.write_text(json.dumps({"metric": metric, "mode": mode, "steps": steps}, indent=1))
    os.replace(draft, run / SCORES)


def step_folders(source: Path, step: int | None) -> list[Path]:
    """Folders of steps that a path may mean, best first."""
    if (source / "_CHECKPOINT_METADATA").exists() or (source / FILES).exists():
        return [source]
    for home in (source / "checkpoints", source):
        steps = steps_of(home)
        if step is not None and step not in steps and steps:
            raise FileNotFoundError(
                f"{home} has no step {step}; it has {', '.join(map(str, steps))}."
            )
        if steps:
            chosen = steps[::-1] if step is None else [step]
            return [home / str(n) for n in chosen]
    raise FileNotFoundError(f"There is no checkpoint of a run in {str(source)!r}.")
