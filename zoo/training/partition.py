"""Where parameters live: path -> logical dims -> mesh axes.

`RULES` names the leaves that the zoo's models share (see the design of parameter names); a model
file adds or overrides some with `PARTITION = {regex: dims}`. A leaf is matched by exactly one rule,
or by none, when it has no dim that `tensor` may cut. Then:

    heads, mlp     -> tensor     must be divisible
    vocab          -> tensor     if divisible
    fsdp           -> the largest other dim that it divides, if the leaf is not small and has
                      more than one axis; a leaf without one stays whole, unless a rule names it:
                      that is an error

All of it is checked on shapes alone, before anything is traced or allocated.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.axes import AXES, BATCH_AXES, HEAD_AXES
from zoo.errors import PartitionError
from zoo.training.config import Partition
from zoo.training.mesh import arrange
from zoo.training.tree import path_of

BATCH = PartitionSpec(BATCH_AXES)
(TENSOR,) = HEAD_AXES
STRICT = {"heads": TENSOR, "mlp": TENSOR}
LENIENT = {"vocab": TENSOR}

Dims = tuple[str | None, ...]
RULES: dict[str, Dims | tuple[Dims, ...]] = {
    r".*(query|key|value|qkv)/kernel": (("channels", "heads"), ("channels", "heads", "head_dim")),
    r".*(query|key|value|qkv)/bias": (("heads",), ("heads", "head_dim")),
    r".*(^|/)out/kernel": (("heads", "channels"), ("heads", "head_dim", "channels")),
    r".*(^|/)out/bias": ("channels",),
    r".*mlp/(up|gate)/kernel": ("channels", "mlp"),
    r".*mlp/(up|gate)/bias": ("mlp",),
    r".*mlp/down/kernel": ("mlp", "channels"),
    r".*mlp/down/bias": ("channels",),
    r".*embed[^/]*/embedding": ("vocab", "channels"),
    r".*embed[^/]*/kernel": (("channels", "channels"), (None, None, "channels", "channels")),
    r".*(^|/)head/kernel": ("channels", "classes"),
    r".*norm\w*/(scale|bias)": ("channels",),
}
"""Path (regex, whole) -> dims, or alternatives of different length. Leading axes of stacked layers
(`.../layers/...`) are not written. Paths are those of the parameters."""


@dataclass(frozen=True)
class Placement:
    """Where one leaf goes: its path, shape, the rule that matched (or None) and the spec."""

    path: str
    shape: tuple[int, ...]
    rule: str | None
    spec: PartitionSpec


# ---------------------------------------------------------------------------- the mesh


def mesh_sizes(config: Partition, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` for this many devices, `-1` filled in.

    Raises:
      PartitionError: if they do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise PartitionError(f"partition.{axis} is {size}; give a positive number, or -1 once.")
    if sizes.count(-1) > 1:
        raise PartitionError("Only one axis of partition may be -1 (all remaining devices).")
    if config.mode == "pmap" and any(size not in (1, -1) for size in sizes[1:]):
        raise PartitionError(
            "partition.mode pmap copies the model to each device: fsdp, tensor and sequence must "
            "be 1; use mode sharding for them."
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        asked = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise PartitionError(
            f"partition asks for {asked}, but there are {num_devices} devices; the product must "
            f"{'divide' if -1 in sizes else 'be'} {num_devices} (data=-1 takes what remains). On "
            "a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 gives 8 devices."
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: Partition, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, with Auto axes (models run under Explicit ones as under Auto).

    `zoo.training.mesh` says which device stands where. Of several TPU slices, `data` and then
    `fsdp` run between them.

    Raises:
      PartitionError: if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = _slices(devices)
    data, fsdp = between = _between(sizes, len(slices))
    within = (sizes[0] // data, sizes[1] // fsdp, *sizes[2:])
    if len({len(members) for members in slices}) > 1:
        counts = " and ".join(str(len(members)) for members in slices)
        raise PartitionError(f"The slices have {counts} devices; a mesh needs slices of one size.")
    grids = np.stack([arrange(within, members) for members in slices]).reshape(*between, *within)
    grid = grids.transpose(0, 2, 1, *range(3, grids.ndim)).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each TPU slice; all together where there are none."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        of = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(of, []).append(device)
    return [slices[of] for of in sorted(slices)]


def _between(sizes: Sequence[int], slices: int) -> tuple[int, int]:
    """How many slices `data` and `fsdp` run across."""
    data = math.gcd(sizes[0], slices)
    fsdp = slices // data
    if sizes[1] % fsdp:
        raise PartitionError(
            f"There are {slices} slices, but data * fsdp = {sizes[0]} * {sizes[1]} cannot be cut "
            f"into {slices} equal parts; only these axes run between slices, whose network is slow."
        )
    return data, fsdp


# ---------------------------------------------------------------------------- parameters


def match(
    path: str, shape: tuple[int, ...], extra: Mapping[str, Any] | None = None
) -> tuple[str | None, Dims]:
    """The rule for a parameter and its logical dims; (None, all None) if no rule names it.

    Raises:
      PartitionError: if two rules match.
    """
    for rules in (extra or {}, RULES):
        found = []
        for pattern, dims in rules.items():
            if re.fullmatch(pattern, path):
                choices = dims if dims and isinstance(dims[0], tuple) else (dims,)
                stacked = len(re.findall(r"(?:^|/)layers(?=/)", path))
                for choice in choices:
                    if len(choice) + stacked == len(shape):
                        found.append((pattern, ("layers",) * stacked + tuple(choice)))
        if len(found) > 1:
            raise PartitionError(
                f"Parameter {path} {shape} matches {len(found)} partition rules, "
                f"{' and '.join(repr(p) for p, _ in found)}; make one of them narrower."
            )
        if found:
            return found[0]
    return None, (None,) * len(shape)


def place(
    params: Any,
    sizes: Mapping[str, int],
    extra: Mapping[str, Any] | None = None,
    fsdp_min_size: int = 1024,
) -> list[Placement]:
    """Where each parameter goes on a mesh of these sizes.

    Args:
      params: the tree of parameters, or of their shapes.
      sizes: mesh axis -> size.
      extra: the model file's `PARTITION`.
      fsdp_min_size: leaves with fewer elements are not cut by fsdp.

    Raises:
      PartitionError: naming the first parameter that cannot be cut, with a mesh that works.
    """
    placements = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, shape = path_of(keys), tuple(leaf.shape)
        rule, dims = match(path, shape, extra)
        spec: list[str | None] = [None] * len(shape)
        for i, name in enumerate(dims):
            axis = STRICT.get(name) or LENIENT.get(name)
            size = sizes.get(axis, 1)
            if size == 1 or axis in spec:
                continue
            if shape[i] % size == 0:
                spec[i] = axis
            elif name in STRICT:
                raise _indivisible(path, shape, name, i, size, params, sizes, extra)
        fsdp = sizes.get("fsdp", 1)
        # cut vectors would have the compiler cut the channels of activations to match
        several = len(shape) - dims.count("layers") > 1
        if fsdp > 1 and several and math.prod(shape) >= fsdp_min_size:
            free = [
                i
                for i in range(len(shape))
                if spec[i] is None and dims[i] != "layers" and shape[i] % fsdp == 0
            ]
            if free:
                spec[max(free, key=lambda i: shape[i])] = "fsdp"
            elif rule and len(shape) > 1 and "tensor" not in spec:
                raise _whole(path, shape, fsdp, params, sizes, fsdp_min_size)
        while spec and spec[-1] is None:
            spec.pop()
        placements.append(Placement(path, shape, rule, PartitionSpec(*spec)))
    return placements


def shardings(
    params: Any, mesh: Mesh, config: Partition, extra: Mapping[str, Any] | None = None
) -> Any:
    """A tree of `NamedSharding` for the parameters."""
    placements = place(params, dict(mesh.shape), extra, config.fsdp_min_size)
    flat = [NamedSharding(mesh, p.spec) for p in placements]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def like_parameters(tree: Any, params: Any, specs: Any, default: Any) -> Any:
    """Shardings for a tree that repeats parameters inside (optimizer state, EMA).

    A leaf whose path ends in a parameter's path and which has its shape goes where the parameter
    goes; all others get `default`.
    """
    known: dict[str, list] = {}
    spec_leaves = jax.tree.leaves(specs)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (keys, leaf), spec in zip(leaves, spec_leaves, strict=True):
        path = path_of(keys)
        known.setdefault(path.rpartition("/")[2], []).append((path, leaf.shape, spec))

    def pick(keys: tuple, leaf: Any) -> Any:
        path = "/" + path_of(keys)
        fits = [
            (len(p), spec)
            for p, shape, spec in known.get(path.rpartition("/")[2], ())
            if shape == leaf.shape and path.endswith("/" + p)
        ]
        return max(fits, key=lambda f: f[0])[1] if fits else default

    return jax.tree_util.tree_map_with_path(pick, tree)


def check_batch(batch_size: int, sizes: Mapping[str, int], accumulate: int = 1) -> None:
    """Check that a global batch divides over the mesh and into microbatches.

    Raises:
      PartitionError: with the next batch sizes that do.
    """
    parts = sizes.get("data", 1) * sizes.get("fsdp", 1) * accumulate
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = f"{below} or {above}" if below else str(above)
        raise PartitionError(
            f"data.batch_size is {batch_size}, which does not divide into data * fsdp * "
            f"accumulate = {sizes.get('data', 1)} * {sizes.get('fsdp', 1)} * {accumulate} = "
            f"{parts} parts; take {near}."
        )


# ---------------------------------------------------------------------------- what to say


def _indivisible(path, shape, name, dim, size, params, sizes, extra):
    """The sentence for a dim that `tensor` must cut and cannot."""
    common = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        _, dims = match(path_of(keys), tuple(leaf.shape), extra)
        for i, d in enumerate(dims):
            if d in STRICT:
                common = math.gcd(common, leaf.shape[i])
    best = max(n for n in range(1, size) if common % n == 0 and math.prod(sizes.values()) % n == 0)
    return PartitionError(
        f"Parameter {path} has shape {shape}: tensor={size} does not divide its axis {dim} "
        f"({name}, {shape[dim]}); {_proposal(sizes, tensor=best)} fits this model."
    )


def _whole(path, shape, size, params, sizes, fsdp_min_size):
    """The sentence for a large leaf without a dim that fsdp divides."""

    def fits(n: int) -> bool:
        return all(
            any(d % n == 0 for d in leaf.shape)
            for leaf in jax.tree.leaves(params)
            if len(leaf.shape) > 1 and math.prod(leaf.shape) >= fsdp_min_size
        )

    devices = math.prod(sizes.values())
    best = max(n for n in range(1, size) if devices % n == 0 and fits(n))
    return PartitionError(
        f"Parameter {path} has shape {shape}, and fsdp={size} divides none of its free axes; "
        f"{_proposal(sizes, fsdp=best)} fits this model."
    )


def _proposal(sizes: Mapping[str, int], **change: int) -> str:
    """A mesh of as many devices with some axes changed and `data` taking the rest."""
    new = {**sizes, **change}
    others = math.prod(size for axis, size in new.items() if axis != "data")
    new["data"] = max(1, math.prod(sizes.values()) // others)
    return "partition " + " ".join(f"{axis}={size}" for axis, size in new.items() if size > 1)
