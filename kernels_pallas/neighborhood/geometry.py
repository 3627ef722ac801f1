"""Tiles of a grid: which keys belong to a tile of queries, and what it sees of them. NumPy only.

Each axis is cut alone. With dilation d its positions fall into d residue classes, which do not see
each other; a class is cut into tiles of consecutive members. The keys of a tile are a run of
members as well: a strided slice of the axis, never a gather.
"""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """One axis of the grid.

    Attributes:
      size: positions.
      kernel: neighbours of a position, itself included.
      dilation: step between neighbours.
      causal: whether the window ends at the position itself.
      queries: queries of a tile.
      unit: the keys of a tile start at a multiple of it, and their number is one.
    """

    size: int
    kernel: int
    dilation: int
    causal: bool
    queries: int
    unit: int = 1

    @property
    def members(self) -> int:
        """Members of the largest residue class."""
        return -(-self.size // self.dilation)

    @property
    def extent(self) -> int:
        """Members, rounded up to whole units."""
        return -(-self.members // self.unit) * self.unit

    @property
    def runs(self) -> int:
        """Tiles of one residue class."""
        return -(-self.members // self.queries)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        first, last = self._reach
        unit = self.unit
        return int((-(-last // unit) * unit - first // unit * unit).max())

    @functools.cached_property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """For each tile, class after class: the residue, and the member that its keys start at."""
        first, _ = self._reach
        start = np.minimum(first // self.unit * self.unit, self.extent - self.keys)
        return tuple((n // self.runs, int(at)) for n, at in enumerate(start))

    @functools.cached_property
    def kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct tiles.

        Returns the kind of each tile `[tiles]`; and of each kind, `[kinds, queries, keys]`,
        visibility and the row of the bias table (key minus query, from 0 to 2 kernel - 2).
        Queries that fill up the last tile see what the last one sees.
        """
        tiles = []
        for number, (residue, start) in enumerate(self.starts):
            query = self._members_at(number)[:, None]
            query = np.minimum(query, self._members_of(residue) - 1)
            key = start + np.arange(self.keys)[None, :]
            row = np.clip(key - query + self.kernel - 1, 0, 2 * self.kernel - 2)
            tiles.append(np.stack([self._sees(residue, query, key), row]))
        kinds, kind = np.unique(np.stack(tiles), axis=0, return_inverse=True)
        return kind.reshape(-1), kinds[:, 0].astype(bool), kinds[:, 1]

    @functools.cached_property
    def shifted_kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct tiles by visibility and by how far the keys start after the queries.

        Returns the kind of each tile `[tiles]`; and of each kind that distance `[kinds]` and
        visibility `[kinds, queries, keys]`, none for queries that fill up the last tile.
        """
        tiles = []
        for number, (residue, start) in enumerate(self.starts):
            query = self._members_at(number)
            key = start + np.arange(self.keys)
            sees = self._sees(residue, query[:, None], key[None, :])
            sees &= (query < self._members_of(residue))[:, None]
            tiles.append(np.concatenate([[start - query[0]], sees.reshape(-1)]))
        kinds, kind = np.unique(np.stack(tiles), axis=0, return_inverse=True)
        visible = kinds[:, 1:].reshape(-1, self.queries, self.keys).astype(bool)
        return kind.reshape(-1), kinds[:, 0], visible

    def _members_of(self, residue: int) -> int:
        return max(0, (self.size - 1 - residue) // self.dilation + 1)

    def _members_at(self, tile: int):
        return tile % self.runs * self.queries + np.arange(self.queries)

    def _window(self, residue: int, query):
        """The first member that a query sees, and the one after the last."""
        if self.causal:
            return np.maximum(query - self.kernel + 1, 0), query + 1
        last = self._members_of(residue) - self.kernel
        first = np.clip(query - self.kernel // 2, 0, last)
        return first, first + self.kernel

    def _sees(self, residue: int, query, key):
        first, last = self._window(residue, query)
        return (key >= first) & (key < last)

    @functools.cached_property
    def _reach(self):
        """`_window` of each tile, over its queries."""
        reach = []
        for number in range(self.dilation * self.runs):
            residue = number // self.runs
            query = np.minimum(self._members_at(number), max(0, self._members_of(residue) - 1))
            first, last = self._window(residue, query)
            reach.append((first.min(), last.max()))
        return np.array(reach).T


@functools.cache
def grid_kinds(axes: tuple[Axis, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Axis.kinds` of the whole grid: row-major tiles, row-major queries and keys in a tile."""
    kind, visible, row = np.zeros(1, int), np.ones((1, 1, 1), bool), np.zeros((1, 1, 1), int)
    for axis in axes:
        kind_a, visible_a, row_a = axis.kinds
        kind = (kind[:, None] * len(visible_a) + kind_a).reshape(-1)
        visible = _outer(visible, visible_a, np.logical_and)
        row = _outer(row * (2 * axis.kernel - 1), row_a, np.add)
    return kind.astype(np.int32), visible, row.astype(np.int32)


def _outer(a, b, combine):
    both = combine(a[:, None, :, None, :, None], b[None, :, None, :, None, :])
    return both.reshape([m * n for m, n in zip(a.shape, b.shape, strict=True)])
