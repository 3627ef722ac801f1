"""Which device stands where in a mesh: the innermost axes get the innermost links.

Devices of a TPU slice are joined the faster the nearer they are: the cores of a chip, the chips of
a host, the hosts of a slice. Mesh axes are served from the last one to the first. Each takes what
it needs from the innermost level that is free, as a block of neighbours as square as can be, and
only then from the next level. Any sizes whose product is the number of devices fit any slice: an
axis of the torus is split where none is whole. A host's devices lie together along the outer axes,
so that each process reads one contiguous part of the batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

LEVELS = ((6,), (3, 4, 5), (0, 1, 2))
"""Axes of `_torus`: cores of a chip, chips of a host, hosts of a slice."""


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice as an array of these sizes.

    Devices without coordinates (CPUs, GPUs), or whose coordinates do not fill a box, keep their
    order.

    Args:
      sizes: of the mesh axes, their product the number of devices; the batch is cut over the
        first two.
      devices: of one slice.
    """
    torus = _torus(devices)
    if torus is None:
        grid = np.empty(len(devices), object)
        grid[:] = devices
        return grid.reshape(sizes)
    grid = _spread(sizes, torus)
    if not _one_part_each(grid):  # an odd factor: let data and fsdp share their blocks
        grid = _spread((math.prod(sizes[:2]), *sizes[2:]), torus).reshape(sizes)
    return grid


def _spread(sizes: Sequence[int], torus: np.ndarray) -> np.ndarray:
    """The devices of a torus as an array of these sizes."""
    taken = _assign(sizes, torus.shape)
    # every axis of the torus is split among the mesh axes, the last of which gets neighbours
    split = torus.reshape(taken.T.reshape(-1))
    order = np.arange(taken.size).reshape(taken.T.shape).T
    return split.transpose(order.reshape(-1)).reshape(sizes)


def _one_part_each(grid: np.ndarray) -> bool:
    """Whether each process holds contiguous rows of a batch that is cut over the first two axes."""
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(grid.reshape(math.prod(grid.shape[:2]), -1)):
        for device in devices:
            held.setdefault(getattr(device, "process_index", 0), set()).add(row)
    return all(max(rows) - min(rows) + 1 == len(rows) for rows in held.values())


def _torus(devices: Sequence[Any]) -> np.ndarray | None:
    """Devices by place: host (three axes), chip of the host (three axes), core of the chip."""
    if not all(hasattr(d, "coords") for d in devices):
        return None
    places = np.array([(*d.coords, getattr(d, "core_on_chip", 0)) for d in devices])
    places -= places.min(axis=0)
    box = places.max(axis=0) + 1
    if len(box) != 4 or not len(set(map(tuple, places))) == len(places) == math.prod(box):
        return None
    grid, hosts = np.empty(box, object), np.empty(box, int)
    for place, device in zip(places, devices, strict=True):
        grid[tuple(place)], hosts[tuple(place)] = device, getattr(device, "process_index", 0)
    host = np.argwhere(hosts == hosts.flat[0]).max(axis=0) + 1
    if any(box % host) or any(np.ptp(_by_host(hosts, host), axis=(3, 4, 5, 6)).flat):
        host = box  # the hosts are not boxes that are alike: take all as one
    return _by_host(grid, host)


def _by_host(grid: np.ndarray, host: np.ndarray) -> np.ndarray:
    """`x y z core` -> hosts along x, y, z, then x, y, z inside a host, then cores."""
    (x, y, z, cores), (a, b, c, _) = grid.shape, host
    split = grid.reshape(x // a, a, y // b, b, z // c, c, cores)
    return split.transpose(0, 2, 4, 1, 3, 5, 6)


def _assign(sizes: Sequence[int], torus: Sequence[int]) -> np.ndarray:
    """How much of each axis of the torus each mesh axis takes, `mesh axis, torus axis`."""
    taken = np.ones((len(sizes), len(torus)), int)
    for axis in reversed(range(len(sizes))):
        need = sizes[axis]
        for level in LEVELS:
            free = [int(torus[i] // taken[:, i].prod()) for i in level]
            size = math.gcd(need, math.prod(free))
            before = [taken[axis, i + 3] if i < 3 else 1 for i in level]  # in this direction
            taken[axis, level] = min(
                _splits(size, free),
                key=lambda parts: (sum(np.multiply(parts, before)), [-n for n in parts]),
            )
            need //= size
    return taken


def _splits(size: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways of writing a size as a product of divisors of these numbers."""
    if not free:
        if size == 1:
            yield ()
        return
    common = math.gcd(size, free[0])
    for part in range(1, common + 1):
        if common % part == 0:
            for rest in _splits(size // part, free[1:]):
                yield (part, *rest)
