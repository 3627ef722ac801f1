"""The arrays of a step: digests of what each process wrote, and reading that checks them."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.checkpoints import together
from zoo.checkpoints.resume import Match
from zoo.checkpoints.runs.disk import read_manifest
from zoo.checkpoints.runs.storage import cause, quiet
from zoo.errors import CheckpointBroken

Parts = dict[str, Any]


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest_size=20
    ).hexdigest()


def digests(parts: Parts) -> dict[str, dict]:
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


def load(folder: Path, abstract: Parts) -> Parts:
    """Read parts of a step and compare each leaf with its digest.

    Raises:
      CheckpointBroken: if something cannot be read, or is not what was saved.
    """
    from orbax.checkpoint import v1 as ocp

    leaves = read_manifest(folder)
    with together.all_or_none(folder):
        try:
            with quiet():
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


def load_matching(folder: Path, saved: Mapping, wanted: Mapping, found: Match) -> Parts:
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
    loaded = flatten_dict(load(folder, unflatten_dict(read, sep="/")), sep="/")
    taken: set[str] = set()
    leaves = {}
    for path, source in found.source.items():
        leaf = loaded[source]
        again = source in taken or leaf.sharding != wanted[path].sharding
        leaves[path] = jax.device_put(leaf.copy(), wanted[path].sharding) if again else leaf
        taken.add(source)
    return unflatten_dict(leaves, sep="/")
