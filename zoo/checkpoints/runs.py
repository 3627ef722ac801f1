"""Checkpoints of training runs: Orbax, with digests of everything it wrote.

    run/checkpoints/40/          a step, moved into place when it is whole
      params ema optimizer ...   Orbax arrays, one folder a part of the state
      extra/0.json               JSON: data iterator, pending metrics, config, versions
      manifest/<process>.json    digest, shape, type of each leaf, taken in memory before writing
      FILES.json                 digest of each file of the step, added when it is in place
    run/set_aside/40             a step that was found broken

Orbax does not check what it reads: most flipped bits load silently. Here a step is used only if its
files and then its arrays are what was saved; otherwise it is moved aside and the one before is
used. Digests are BLAKE2b over the little-endian bytes of each shard in row-major order.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.checkpoints import together
from zoo.checkpoints.mismatch import CheckpointMismatch, Misfit
from zoo.checkpoints.resume import Match, match
from zoo.errors import CheckpointBroken, StorageError

FILES = "FILES.json"
MARGIN = 1 << 20  # bytes that a step takes besides its arrays, generously
PACKAGES = ("flax-zoo", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
Parts = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: written behind its back, read with suspicion.

    Attributes:
      run: the run directory.
      say: called with each sentence that the user must see.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        *,
        keep: int = 3,
        keep_best: int = 0,
        metric: str = "",
        mode: str = "max",
        say: Callable[[str], None] = print,
    ) -> None:
        """Open (or begin) the checkpoints of a run.

        Args:
          run: the run directory.
          keep: how many of the latest steps stay.
          keep_best: how many of the best by `metric` stay besides.
          metric: a name in the metrics that `save` gets.
          mode: `max` or `min`.
          say: see the class.
        """
        from orbax.checkpoint import v1 as ocp

        self.run, self.say = Path(run).resolve(), say
        together.off_the_devices()
        policies: list = [ocp.training.preservation_policies.LatestN(keep)]
        if keep_best:
            policies.append(
                ocp.training.preservation_policies.BestN(
                    get_metric_fn=lambda metrics: metrics[metric],
                    reverse=mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.metric = metric
        self._orbax = ocp.training.Checkpointer(
            self.run / "checkpoints",
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(policies),
            save_decision_policy=ocp.training.save_decision_policies.AnySavePolicy([]),
            cleanup_tmp_directories=True,
        )
        together.off_the_preemption_protocol(self._orbax)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._failed = False
        self._copy: Parts = {}

    # ------------------------------------------------------------------------ writing

    def save(
        self, step: int, parts: Parts, extra: Mapping[str, Any], metrics: Mapping | None = None
    ) -> None:
        """Start to write a step; waits for the one before, not for this one.

        Arrays are copied off the device before this returns, so the caller may donate them.

        Args:
          step: its number.
          parts: nested dicts of arrays by part (`params`, `optimizer`, ...).
          extra: what JSON can hold.
          metrics: of an evaluation at this step, if there was one.

        Raises:
          StorageError: if the step before could not be written.
        """
        self.wait()
        parts = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
        if jax.process_count() == 1:
            parts = self._copy = _host_copy(parts, self._copy)
        else:
            parts = jax.tree.map(jax.numpy.copy, parts)
        extra = {"step": step, "parts": sorted(parts), "versions": versions(), **extra}
        metrics = metrics or {}
        score = {self.metric: float(metrics[self.metric])} if self.metric in metrics else {}
        job = self._worker.submit(self._write, step, parts, extra, score)
        self._pending = (step, job)

    def _write(self, step: int, parts: Parts, extra: Mapping, score: Mapping) -> None:
        manifest = {"step": step, "leaves": _digests(parts)}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(parts)) + MARGIN
        if shutil.disk_usage(self.run).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _quiet():
            self._orbax.save_checkpointables(
                step,
                {**parts, "extra": _Json(extra, False), "manifest": _Json(manifest, True)},
                force=True,
                metrics=dict(score) or None,
            )
        if jax.process_index() == 0:
            _write_files(self.run / "checkpoints" / str(step))

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
          StorageError: if the last step could not be written.
        """
        if self._pending is None:
            return
        (step, job), self._pending = self._pending, None
        try:
            job.result()
        except Exception as error:  # Orbax and tensorstore raise many kinds
            self._failed = True
            raise StorageError(
                f"Checkpoint {step} could not be written to {self.run}: {cause(error)}. The steps "
                "before it are kept; mend this and give the same command to go on."
            ) from error

    def close(self) -> None:
        """Finish writing and let go.

        Raises:
          StorageError: if the last step could not be written.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            with _quiet(), contextlib.suppress(*[Exception] * self._failed):  # it has been said
                self._orbax.close()

    # ------------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return steps_of(self.run / "checkpoints")

    def restore(self, abstract: Parts) -> tuple[Parts, dict[str, Any]] | None:
        """The newest step that is whole, as arrays in the shardings of `abstract`.

        Steps that are broken are moved aside, and said so.

        Args:
          abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings, by part.

        Returns:
          the parts and what was saved as `extra`; None if there is no step. Leaves of the
          optimizer, running mean and carry that the step lacks are not in the parts.

        Raises:
          CheckpointMismatch: if a whole step is of another model or optimizer.
        """
        wanted = flatten_dict(dict(abstract), sep="/")
        while (step := together.from_first(max(self.steps(), default=-1))) >= 0:
            folder = self.run / "checkpoints" / str(step)
            try:
                with together.all_or_none(folder):
                    extra = verify_files(folder, digests=jax.process_index() == 0)
                saved = read_manifest(folder)
                found = match(saved, wanted)
                _check_shapes(folder, saved, wanted, found)
                parts = _load_matching(folder, saved, wanted, found)
            except CheckpointBroken as error:
                if jax.process_index() == 0:
                    aside = set_aside(folder)
                    self.say(f"{error} It was moved to {aside}; the step before it is used.")
                together.from_first(0)  # the others go on when it is moved
                self._orbax.reload()
                continue
            if said := found.sentence():
                self.say(f"Step {step}: {said}")
            return parts, extra
        return None


def load_variables(
    source: str | os.PathLike,
    model: Any = None,
    *,
    sharding: Any = None,
    averaged: bool = True,
    step: int | None = None,
) -> dict[str, Any]:
    """The variables that a run learnt, for `model.apply`.

    Args:
      source: a run directory, its `checkpoints` folder, or one step of it.
      model: check that they fit this module.
      sharding: None, a `jax.sharding.Sharding`, or `f(path, shape) -> Sharding`.
      averaged: take the running mean of the parameters, if the run kept one.
      step: which step of the run; None is the newest that is whole.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointBroken: if the step asked for, or every step, is not what was saved.
      CheckpointMismatch: if they do not fit the model.
    """
    variables, _ = load_run(source, model, sharding=sharding, averaged=averaged, step=step)
    return variables


def load_run(
    source: str | os.PathLike,
    model: Any = None,
    *,
    sharding: Any = None,
    averaged: bool = True,
    step: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as `load_variables`, with what was saved as `extra` (step, config, versions)."""
    folders = _step_folders(Path(source).resolve(), step)
    for i, folder in enumerate(folders):
        try:
            extra = verify_files(folder)
            parts = _variables(folder, extra, model, sharding, averaged)
        except CheckpointBroken as error:
            if i + 1 == len(folders):
                raise
            print(f"{error} Step {folders[i + 1].name} is used instead.")
            continue
        return parts, extra
    raise FileNotFoundError(f"There is no checkpoint of a run in {str(source)!r}.")


def saved_extra(source: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """What was saved as `extra` (step, config, versions) with the newest step that is whole.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointBroken: if the step asked for, or every step, is not what was saved.
    """
    folders = _step_folders(Path(source).resolve(), step)
    for i, folder in enumerate(folders):
        try:
            return verify_files(folder)
        except CheckpointBroken:
            if i + 1 == len(folders):
                raise
    raise FileNotFoundError(f"There is no checkpoint of a run in {str(source)!r}.")


def run_folder(source: str | os.PathLike) -> Path:
    """The run directory of a path that `load_run` takes."""
    folder = _step_folders(Path(source).resolve(), None)[0]
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def _variables(folder: Path, extra: Mapping, model: Any, sharding: Any, averaged: bool) -> dict:
    leaves = read_manifest(folder)
    params = "ema" if averaged and "ema" in extra["parts"] else "params"
    wanted = {}
    for path, leaf in leaves.items():
        part, _, rest = path.partition("/")
        if part in (params, "frozen", "collections"):
            name = rest if part == "collections" else f"params/{rest}"
            place = sharding(name, tuple(leaf["shape"])) if callable(sharding) else sharding
            place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shape = tuple(leaf["shape"])
            wanted[path] = jax.ShapeDtypeStruct(shape, np.dtype(leaf["dtype"]), sharding=place)
    abstract = unflatten_dict(wanted, sep="/")
    if model is not None:
        _check_model(folder, model, abstract, params)
    parts = _load(folder, abstract)
    flat = flatten_dict(parts[params]) | flatten_dict(parts.get("frozen", {}))
    return {"params": unflatten_dict(flat), **parts.get("collections", {})}


# ---------------------------------------------------------------------------- on disk


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


def cause(error: BaseException) -> str:
    """The reason inside an error of a storage library, in a few words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return os.strerror(seen.errno).lower()
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(error).split())
    if found := re.search(r"OS error (\d+)|\berrno (\d+)", text, re.IGNORECASE):
        return os.strerror(int(found[1] or found[2])).lower()
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number).lower()
    return text[:200] or type(error).__name__


def _host_copy(parts: Parts, before: Parts) -> Parts:
    """Arrays in the host's memory, in place of those of an earlier copy where they are alike.

    Fresh memory would take longer to get than to fill.
    """
    for leaf in jax.tree.leaves(parts):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    known = dict(jax.tree_util.tree_leaves_with_path(before))

    def copy(path: Any, leaf: Any) -> np.ndarray:
        old = known.get(path)
        if old is None or old.shape != leaf.shape or old.dtype != leaf.dtype:
            return np.array(leaf, copy=True)
        np.copyto(old, np.asarray(leaf))
        return old

    return jax.tree_util.tree_map_with_path(copy, parts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Orbax and tensorstore print besides raising.

    After an error it stays quiet: callbacks of writes that were still under way go on failing.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def unraisable(what: Any) -> None:
        if "Event loop is closed" not in str(what.exc_value):
            hook(what)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = unraisable
    yield
    logger.setLevel(level)
    sys.unraisablehook = hook


class _Json:
    """JSON as a part of a step (Orbax's stateful interface): of each process, or of the first."""

    def __init__(self, content: Mapping[str, Any], every_process: bool) -> None:
        self.text = json.dumps(content, indent=1)
        self.writes = every_process or jax.process_index() == 0

    async def save(self, directory: Any) -> Any:
        async def write() -> None:
            folder = Path(await directory.await_creation())
            if self.writes:
                (folder / f"{jax.process_index()}.json").write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        raise NotImplementedError


def _write_files(folder: Path) -> None:
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


# ---------------------------------------------------------------------------- arrays


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest_size=20
    ).hexdigest()


def _digests(parts: Parts) -> dict[str, dict]:
    """Shape, dtype and digests of the shards that this process owns, by leaf path."""
    leaves = {}
    for path, leaf in flatten_dict(parts, sep="/").items():
        if isinstance(leaf, np.ndarray):
            owned = [((slice(None),) * leaf.ndim, leaf)]
        else:
            owned = [
                (s.index, np.asarray(s.data)) for s in leaf.addressable_shards if not s.replica_id
            ]
        shards = []
        for index, data in owned:
            shards.append({"index": _spans(index, leaf.shape), "digest": _digest(data)})
        leaves[path] = {"shape": leaf.shape, "dtype": str(leaf.dtype), "shards": shards}
    return leaves


def _load(folder: Path, abstract: Parts) -> Parts:
    """Read parts of a step and compare each leaf with its digest.

    Raises:
      CheckpointBroken: if something cannot be read, or is not what was saved.
    """
    from orbax.checkpoint import v1 as ocp

    leaves = read_manifest(folder)
    with together.all_or_none(folder):
        try:
            with _quiet():
                parts = ocp.load_checkpointables(folder, dict(abstract))
        except Exception as error:  # whatever a damaged file leads to, in Orbax and tensorstore
            raise CheckpointBroken(f"Checkpoint {folder} cannot be read: {cause(error)}.") from None
    parts = {name: parts[name] for name in abstract}
    pieces = {
        path: _pieces(leaf, leaves[path]["shards"])
        for path, leaf in flatten_dict(parts, sep="/").items()
    }
    with together.all_or_none(folder):
        for path, (found, whole) in pieces.items():
            if any(_digest(piece) != digest for piece, digest in found):
                raise CheckpointBroken(
                    f"Checkpoint {folder} is damaged: {path} is not what was saved."
                )
            if not whole:
                raise CheckpointBroken(f"Checkpoint {folder} is damaged: {path} is not whole.")
    return parts


def _pieces(leaf: jax.Array, shards: list[dict]) -> tuple[list[tuple[np.ndarray, str]], bool]:
    """The saved shards that this process holds, with their digests; whether all make up the leaf.

    Where the mesh has cut a saved shard in pieces, the leaf is put together again.
    """
    saved = [tuple(map(tuple, shard["index"])) for shard in shards]
    whole = sum(math.prod(stop - start for start, stop in span) for span in saved) == leaf.size
    places = leaf.sharding.devices_indices_map(leaf.shape).values()
    homes = {_spans(index, leaf.shape) for index in places}
    if all(any(_holds(home, span) for home in homes) for span in saved):
        local = {_spans(s.index, leaf.shape): s.data for s in leaf.addressable_shards}
    elif leaf.is_fully_addressable:
        local = {tuple((0, n) for n in leaf.shape): leaf}
    else:
        local = {tuple((0, n) for n in leaf.shape): together.gathered(leaf)}
    found = []
    for span, shard in zip(saved, shards, strict=True):
        home = next((home for home in local if _holds(home, span)), None)
        if home is not None:
            cut = [
                slice(a - first, b - first) for (a, b), (first, _) in zip(span, home, strict=True)
            ]
            found.append((np.asarray(local[home])[tuple(cut)], shard["digest"]))
    return found, whole


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last + 1 of a shard along each axis."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _holds(home: tuple, span: tuple) -> bool:
    return all(h[0] <= s[0] and s[1] <= h[1] for h, s in zip(home, span, strict=True))


def _check_shapes(folder: Path, saved: Mapping, wanted: Mapping, found: Match) -> None:
    """Compare what a step holds with what is wanted, before anything is read."""
    spare = {*found.unused, *found.afresh}
    _compare(
        f"Checkpoint {folder} is of another model than this config's.",
        {
            path: (tuple(leaf["shape"]), leaf["dtype"])
            for path, leaf in saved.items()
            if path not in spare
        },
        {
            found.source[path]: (tuple(leaf.shape), str(leaf.dtype))
            for path, leaf in wanted.items()
            if path not in spare
        },
        "Use the config it was made with, or another workdir.",
    )


def _load_matching(folder: Path, saved: Mapping, wanted: Mapping, found: Match) -> Parts:
    """The leaves of a step that are wanted, under the paths by which they are wanted.

    A part is read as a whole, also where some of its leaves are not wanted.
    """
    places = {source: wanted[path].sharding for path, source in found.source.items()}
    some = next(iter(wanted.values())).sharding
    whole = some
    if isinstance(some, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(some.mesh, jax.sharding.PartitionSpec())
    parts = {source.partition("/")[0] for source in found.source.values()}
    read = {
        path: jax.ShapeDtypeStruct(
            tuple(leaf["shape"]), np.dtype(leaf["dtype"]), sharding=places.get(path, whole)
        )
        for path, leaf in saved.items()
        if path.partition("/")[0] in parts
    }
    loaded = flatten_dict(_load(folder, unflatten_dict(read, sep="/")), sep="/")
    taken: set[str] = set()
    leaves = {}
    for path, source in found.source.items():
        leaf = loaded[source]
        again = source in taken or leaf.sharding != wanted[path].sharding
        leaves[path] = jax.device_put(leaf.copy(), wanted[path].sharding) if again else leaf
        taken.add(source)
    return unflatten_dict(leaves, sep="/")


def _check_model(folder: Path, model: Any, abstract: Parts, params: str) -> None:
    from zoo.checkpoints.leaves import model_leaves

    stored = model_leaves(model).stored
    flat = flatten_dict(abstract, sep="/")
    saved = {
        path.removeprefix(f"{params}/").removeprefix("frozen/").removeprefix("collections/"): leaf
        for path, leaf in flat.items()
    }
    _compare(
        f"Checkpoint {folder} does not fit {type(model).__name__}.",
        {path: (tuple(s.shape), "") for path, s in saved.items()},
        {path: (tuple(s.shape), "") for path, s in stored.items()},
        "Create the model with the overrides of the run (its config.json has them).",
    )


def _compare(headline: str, saved: Mapping, wanted: Mapping, hint: str) -> None:
    missing = [path for path in wanted if path not in saved]
    unexpected = [path for path in saved if path not in wanted]
    misshapen = [
        Misfit(path, " ".join(map(str, saved[path])), " ".join(map(str, wanted[path])))
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(headline, missing, unexpected, misshapen, hint)


def _step_folders(source: Path, step: int | None) -> list[Path]:
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
