"""Declarative attention masks: which key a query may see, and which blocks of keys need a visit.

A mask is called with query and key indices (NumPy or traced integers that broadcast) and returns
booleans. The same object therefore serves the oracle, XLA and the inside of a Pallas kernel. Its
`blocks` method says, for ranges of queries and keys, whether *some* and whether *all* pairs of the
range are visible, so that kernels skip the invisible blocks and do no mask arithmetic in the full
ones. Any function `f(q_index, k_index) -> bool` written with operators is a mask as well.

    >>> import numpy as np
    >>> mask = Causal() & SlidingWindow(left=1, right=0)
    >>> mask(np.arange(3)[:, None], np.arange(3)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
"""

# ruff: noqa: D102 (the base class documents both methods)

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def visible_everywhere(q_index, k_index):
    """True of the shape that two index arrays broadcast to, NumPy or traced."""
    return (q_index == q_index) & (k_index == k_index)


class Mask:
    """Base of the declarative masks; combine them with `&` and `|`."""

    @property
    def position(self):
        """Place of query 0 among the keys, for scores that depend on distance."""
        return 0

    def __call__(self, q_index, k_index):
        """Visibility of every (query, key) pair of two index arrays that broadcast."""
        raise NotImplementedError

    def blocks(self, q_first, q_last, k_first, k_last):
        """`(some, all)` visible in inclusive index ranges, or None where no closed form is known.

        `some` may be True for a range that is invisible, and `all` False for one that is fully
        visible: kernels only lose time by it.
        """
        return None

    def __and__(self, other):
        return And(self, other)

    def __or__(self, other):
        return Or(self, other)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def __call__(self, q_index, k_index):
        return visible_everywhere(q_index, k_index)

    def blocks(self, q_first, q_last, k_first, k_last):
        everything = visible_everywhere(q_first, k_first)
        return everything, everything


@dataclass(frozen=True)
class Causal(Mask):
    """Query `i` sees keys up to `i + offset` (offset = keys before the first query, in a cache).

    Query `i` then stands at place `i + offset`: ALiBi and score modifiers count from there.
    """

    offset: int = 0

    @property
    def position(self):
        return self.offset

    def __call__(self, q_index, k_index):
        return k_index <= q_index + self.offset

    def blocks(self, q_first, q_last, k_first, k_last):
        return k_first <= q_last + self.offset, k_last <= q_first + self.offset


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query `i` sees keys `i - left` to `i + right`; None leaves that side open."""

    left: int | None
    right: int | None = 0

    def __call__(self, q_index, k_index):
        seen = visible_everywhere(q_index, k_index)
        if self.left is not None:
            seen = seen & (k_index >= q_index - self.left)
        if self.right is not None:
            seen = seen & (k_index <= q_index + self.right)
        return seen

    def blocks(self, q_first, q_last, k_first, k_last):
        some = every = visible_everywhere(q_first, k_first)
        if self.left is not None:
            some = some & (k_last >= q_first - self.left)
            every = every & (k_first >= q_last - self.left)
        if self.right is not None:
            some = some & (k_first <= q_last + self.right)
            every = every & (k_last <= q_first + self.right)
        return some, every


@dataclass(frozen=True)
class Chunked(Mask):
    """Queries and keys see each other inside chunks of `size` tokens."""

    size: int

    def __call__(self, q_index, k_index):
        return q_index // self.size == k_index // self.size

    def blocks(self, q_first, q_last, k_first, k_last):
        q0, q1 = q_first // self.size, q_last // self.size
        k0, k1 = k_first // self.size, k_last // self.size
        return (k0 <= q1) & (q0 <= k1), (q0 == q1) & (k0 == k1) & (q0 == k0)


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, but the first `prefix` keys are seen by every query."""

    prefix: int

    def __call__(self, q_index, k_index):
        return (k_index < self.prefix) | (k_index <= q_index)

    def blocks(self, q_first, q_last, k_first, k_last):
        some = (k_first < self.prefix) | (k_first <= q_last)
        return some, (k_last < self.prefix) | (k_last <= q_first)


@dataclass(frozen=True)
class Dilated(Mask):
    """Every `step`-th key of a window: `i - left*step` to `i + right*step` (Longformer)."""

    left: int
    right: int
    step: int

    def __call__(self, q_index, k_index):
        distance = k_index - q_index
        inside = (distance >= -self.left * self.step) & (distance <= self.right * self.step)
        return inside & (distance % self.step == 0)

    def blocks(self, q_first, q_last, k_first, k_last):
        window = SlidingWindow(self.left * self.step, self.right * self.step)
        some, every = window.blocks(q_first, q_last, k_first, k_last)
        return some, every & (self.step == 1)


@dataclass(frozen=True)
class Neighborhood(Mask):
    """Each token of a grid sees its `kernel_size` nearest along every axis (NATTEN's border rule).

    Tokens are the row-major positions of `shape`. With dilation d the neighbours are taken among
    the tokens whose coordinate has the same remainder modulo d. Near a border the window is
    shifted inwards, so every query sees exactly `kernel_size ** len(shape)` keys. A causal mask
    sees the `kernel_size` tokens up to the query along each axis, fewer at the start.

    Raises:
      ValueError: if a window does not fit the grid.
    """

    shape: tuple[int, ...]
    kernel_size: int
    dilation: int = 1
    causal: bool = False

    def __post_init__(self):
        smallest = min(self.shape)
        if self.kernel_size * self.dilation > smallest and not self.causal:
            raise ValueError(
                f"kernel_size {self.kernel_size} x dilation {self.dilation} is larger than the "
                f"grid {self.shape}; choose at most {smallest // self.dilation}."
            )

    def __call__(self, q_index, k_index):
        seen = visible_everywhere(q_index, k_index)
        for axis in reversed(range(len(self.shape))):
            size = self.shape[axis]
            seen = seen & self._along(q_index % size, k_index % size, size)
            q_index, k_index = q_index // size, k_index // size
        return seen

    def _along(self, q, k, size):
        d, width = self.dilation, self.kernel_size
        if self.causal:
            return (k <= q) & (k > q - width * d) & ((q - k) % d == 0)
        group = (size - 1 - q % d) // d + 1  # tokens with the query's remainder modulo d
        start = q // d - width // 2
        start = start - start * (start < 0)  # max(start, 0), for NumPy and traced alike
        excess = start + width - group
        start = start - excess * (excess > 0)
        return (q % d == k % d) & (k // d >= start) & (k // d < start + width)


class _Combined(Mask):
    def __init__(self, *masks: Callable):
        self.masks = masks

    def __eq__(self, other):
        return type(self) is type(other) and self.masks == other.masks

    def __hash__(self):
        return hash((type(self), self.masks))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(repr, self.masks))})"

    @property
    def position(self):
        return max(m.position if isinstance(m, Mask) else 0 for m in self.masks)

    def _each(self, ranges):
        found = [m.blocks(*ranges) if isinstance(m, Mask) else None for m in self.masks]
        return None if any(f is None for f in found) else found


class And(_Combined):
    """Visible where all of `masks` are."""

    def __call__(self, q_index, k_index):
        return functools.reduce(lambda a, b: a & b, (m(q_index, k_index) for m in self.masks))

    def blocks(self, *ranges):
        found = self._each(ranges)
        return found and tuple(
            functools.reduce(lambda a, b: a & b, f) for f in zip(*found, strict=True)
        )


class Or(_Combined):
    """Visible where any of `masks` is."""

    def __call__(self, q_index, k_index):
        return functools.reduce(lambda a, b: a | b, (m(q_index, k_index) for m in self.masks))

    def blocks(self, *ranges):
        found = self._each(ranges)
        return found and tuple(
            functools.reduce(lambda a, b: a | b, f) for f in zip(*found, strict=True)
        )


@functools.lru_cache(maxsize=512)
def block_table(
    mask: Callable | None, queries: int, keys: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`(some, all)` visible, bool `[q blocks, k blocks]`, for blocks over `queries` x `keys`.

    Ragged last blocks count their real tokens only. A mask without a closed form is evaluated on
    the host, one row of blocks at a time, and remembered.
    """
    n, m = math.ceil(queries / block_q), math.ceil(keys / block_k)
    q_first, k_first = np.arange(n)[:, None] * block_q, np.arange(m)[None, :] * block_k
    q_last = np.minimum(q_first + block_q, queries) - 1
    k_last = np.minimum(k_first + block_k, keys) - 1
    mask = Full() if mask is None else mask
    found = mask.blocks(q_first, q_last, k_first, k_last) if isinstance(mask, Mask) else None
    if found is not None:
        some, every = (np.array(np.broadcast_to(f, (n, m))) for f in found)
    else:
        some, every = np.zeros((n, m), bool), np.zeros((n, m), bool)
        starts = k_first[0]
        for row in range(n):
            rows = np.arange(q_first[row, 0], q_last[row, 0] + 1)[:, None]
            seen = np.broadcast_to(mask(rows, np.arange(keys)[None, :]), (len(rows), keys))
            some[row] = np.logical_or.reduceat(seen.any(0), starts)
            every[row] = np.logical_and.reduceat(seen.all(0), starts)
    some.flags.writeable = every.flags.writeable = False
    return some, every
