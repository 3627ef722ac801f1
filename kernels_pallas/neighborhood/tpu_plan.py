"""The geometry of a TPU call: tiles, tables of visibility and bias, and where things lie."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import chips, compat
from kernels_pallas.attention.tile import LARGEST, dot, quotient, remainder
from kernels_pallas.neighborhood.geometry import Axis
from kernels_pallas.neighborhood.problem import (
    Operands,
    Problem,
    batch_to_space,
    space_to_batch,
)
from kernels_pallas.scores import MASKED

LANES = 128  # queries of a tile
TILES = 8  # of a grid step
COLUMNS = (128, 64, 32, 16)  # of them along the last axis


class Plan:
    """Which heads share a step, how the grid is cut, and specs and indices that follow."""

    def __init__(self, problem: Problem, x: Operands):
        self.problem, self.dtype = problem, x.value.dtype
        self.batch, self.heads, self.dim = x.query.shape[0], *x.query.shape[-2:]
        self.value_dim = x.value.shape[-1]
        self.group, self.packed = self._share()
        self.groups = self.heads // self.group
        self.axes = self._tiles()
        self.rank = len(self.axes)
        self.inner = self._slab()
        self.steps = [-(-a.runs // n) for a, n in zip(self.axes, self.inner, strict=True)]
        *self.lead, self.last = self.axes
        self.images = self.batch * math.prod(a.dilation for a in self.axes)
        self.lanes = self.group * LANES
        self.width = self.group * self.dim  # lanes of an image
        self.value_width = self.group * self.value_dim
        self.rows = math.prod(a.keys for a in self.lead)  # key rows of a tile
        self.keys = self.rows * self.last.keys
        self.padded = self.last.extent > self.last.members
        self.has_bias = x.bias is not None
        self.spans = [self._span(a) for a in self.lead] if self.has_bias else []
        self.distances = math.prod(n for _, n in self.spans)

    def _share(self):
        """How many heads share a step, and whether they lie packed in lanes."""
        if self.value_dim != self.dim:
            return 1, False
        for group in range(1, self.heads + 1):
            whole = group * self.dim % LANES == 0 or group == self.heads
            if self.heads % group == 0 and whole and group * self.dim <= max(256, self.dim):
                return group, True
        return 1, False

    def _tiles(self):
        """The axes with the tiles that form the fewest scores."""
        *lead, last = self.problem.axes
        unit = 32 // self.dtype.itemsize  # rows of a register
        best = None
        for columns in COLUMNS if lead else COLUMNS[:1]:
            if columns < 2 * last.kernel - 1:
                break
            axes = [replace(last, queries=columns, unit=unit)]
            left = LANES // columns
            for axis in reversed(lead):  # near squares
                rest = len(lead) + 1 - len(axes)
                queries = 2 ** -(-(left.bit_length() - 1) // rest)
                axes.insert(0, replace(axis, queries=queries, unit=1))
                left //= queries
            cost = math.prod(a.keys * a.runs for a in axes)
            if best is None or cost < 0.9 * best[0]:  # wide tiles lie together in memory
                best = cost, tuple(axes)
        return best[1]

    def _slab(self):
        """Tiles that a step works through along each axis: all columns, and several rows."""
        inner, left = [], TILES
        for axis in reversed(self.axes[-2:]):
            inner.insert(0, max(1, min(axis.runs, left)))
            left //= inner[0]
        return [1] * (self.rank - len(inner)) + inner

    @staticmethod
    def _span(axis):
        """Distances from the first query to a key, along a leading axis: `(least, count)`."""
        _, shift, _ = axis.shifted_kinds
        return int(shift.min()), int(shift.max() - shift.min()) + axis.keys

    @property
    def tall(self):
        """An image with whole units of columns."""
        return *(a.members for a in self.lead), self.last.extent

    @property
    def table_shape(self):
        """Of bias and visibility along the columns, of one group of heads."""
        kinds = len(self.last.shifted_kinds[1])
        return kinds, self.distances, self.last.keys, self.lanes

    def vmem_bytes(self) -> int:
        """What the backward pass holds in vector memory, about."""
        size, lanes = self.dtype.itemsize, -(-max(self.width, self.value_width) // LANES) * LANES
        image = math.prod(self.tall) * lanes
        slab = math.prod(a.queries * n for a, n in zip(self.axes, self.inner, strict=True)) * lanes
        scores = 6 * self.keys * self.lanes
        tables = 2 * math.prod(self.table_shape)
        return image * (10 * size + 8) + slab * 6 * size + 4 * (scores + tables)

    # --- arrays --------------------------------------------------------------------------------
    def pack(self, t):
        """`[batch, *space, heads, d]` to `[images, 1, *members, heads * d]` or heads first."""
        if self.packed:
            t = t.reshape(*t.shape[:-2], -1)
            return space_to_batch(self.axes, t)[:, None]
        return jnp.moveaxis(space_to_batch(self.axes, t), -2, 1)

    def unpack(self, t):
        """The inverse of `pack`."""
        if self.packed:
            t = batch_to_space(self.axes, t[:, 0])
            return t.reshape(*t.shape[:-1], self.heads, -1)
        return batch_to_space(self.axes, jnp.moveaxis(t, 1, -2))

    def spec(self, width: int, tiled: bool):
        """Of a packed array: the tiles of a step, or the whole image."""
        pl = compat.pallas()
        shape = [
            a.queries * n if tiled else a.members
            for a, n in zip(self.axes, self.inner, strict=True)
        ]

        def at(g, n, *runs):
            runs = runs[: self.rank] if tiled else (0,) * self.rank
            return (n, 0, *runs, g) if self.packed else (n, g, *runs, 0)

        return pl.BlockSpec((None, None, *shape, width), at)

    def lead_mask(self):
        """What tiles see along the leading axes: `[kinds, rows, 1, lanes]`, 0 or -1e30."""
        visible = np.ones((1, 1, 1), bool)
        for axis in self.lead:
            _, _, sees = axis.shifted_kinds
            both = visible[:, None, :, None, :, None] & sees[None, :, None, :, None, :]
            visible = both.reshape([m * n for m, n in zip(visible.shape, sees.shape, strict=True)])
        visible = np.repeat(visible.transpose(0, 2, 1), self.last.queries, axis=2)
        visible = np.tile(visible, self.group)[:, :, None]
        return np.where(visible, np.float32(0), np.float32(MASKED))

    def column_mask(self):
        """What tiles see along the last axis: `[kinds, keys, LANES]`, 0 or -1e30."""
        visible = self.last.shifted_kinds[2].transpose(0, 2, 1)
        visible = np.tile(visible, LANES // self.last.queries)
        return np.where(visible, np.float32(0), np.float32(MASKED))

    def bias_rows(self, bias):
        """The bias of each head and row of queries, from the farthest key on the right to the left.

        `[groups, distances, 1, lanes]`, a row for each distance from a tile to a key row.
        """
        spare = self.last.queries - (2 * self.last.kernel - 1)
        t = jnp.pad(bias[..., ::-1], [(0, 0)] * self.rank + [(0, spare)])
        for i, (axis, (least, count)) in enumerate(zip(self.lead, self.spans, strict=True)):
            start = least - axis.queries + axis.kernel  # of the last query row's slice
            before, after = max(0, -start), max(0, least + count + axis.kernel - 1 - t.shape[1 + i])
            widths = [(0, 0)] * t.ndim
            widths[1 + i] = before, after
            padded = jnp.pad(t, widths)
            slices = [
                jax.lax.slice_in_dim(padded, at, at + count, axis=1 + i)
                for at in (
                    before + least + axis.kernel - 1 - query for query in range(axis.queries)
                )
            ]
            t = jnp.stack(slices, axis=-2)
        t = t.reshape(self.groups, self.group, self.distances, LANES)
        t = jnp.roll(t, 1 - self.last.kernel, axis=-1)  # distance 0 at a query's first lane
        return t.swapaxes(1, 2).reshape(self.groups, self.distances, 1, self.lanes)

    # --- inside a kernel -----------------------------------------------------------------------
    def ids(self):
        """The step's place in the grid; to be asked outside of loops and branches."""
        pl = compat.pallas()
        return [pl.program_id(i) for i in range(2 + self.rank)]

    def first_step(self, ids):
        """Whether this is the first step of a group, and of an image."""
        runs = sum(ids[2:])
        return (runs + ids[1]) == 0, runs == 0

    def last_step(self, ids):
        """Whether this is the last step of a group, and of an image."""
        left = sum(n - 1 - i for n, i in zip(self.steps, ids[2:], strict=True))
        return (left + self.images - 1 - ids[1]) == 0, left == 0

    def each_tile(self, body):
        """`body(numbers)` for the tiles of a step, numbered along each axis of the step."""

        def of_tile(n, _):
            numbers = []
            for inner in reversed(self.inner):
                numbers.insert(0, remainder(n, inner))
                n = quotient(n, inner)
            body(numbers)
            return 0

        jax.lax.fori_loop(0, math.prod(self.inner), of_tile, 0)

    def place(self, ids, numbers):
        """`(starts, kinds, distances)` of a tile, one entry an axis.

        Where its keys start, what it sees, and how far its keys start after its queries, beyond
        the least such distance.
        """
        image, found = ids[1], []
        for i in reversed(range(self.rank)):
            axis = self.axes[i]
            tile = jnp.minimum(ids[2 + i] * self.inner[i] + numbers[i], axis.runs - 1)
            kind, shift, _ = axis.shifted_kinds
            start = np.array([at for _, at in axis.starts])
            found.append(
                [
                    _lookup(axis, values, remainder(image, axis.dilation), tile)
                    for values in (start, kind, shift[kind] - shift.min())
                ]
            )
            image = quotient(image, axis.dilation)
        return zip(*reversed(found), strict=True)

    def queries(self, numbers):
        """Index of a tile's queries in a block."""
        pl = compat.pallas()
        index = []
        for n, axis, inner in zip(numbers, self.axes, self.inner, strict=True):
            start = 0 if inner == 1 else pl.multiple_of(n * axis.queries, axis.queries)
            index.append(pl.ds(start, axis.queries))
        return (*index, slice(None))

    def window(self, starts):
        """Index of a tile's keys in an image."""
        pl = compat.pallas()
        *lead, last = starts
        index = [pl.ds(at, axis.keys) for at, axis in zip(lead, self.lead, strict=True)]
        if self.last.keys == self.last.extent:
            last = 0
        elif self.last.unit > 1:
            last = pl.multiple_of(last, self.last.unit)
        return (*index, pl.ds(last, self.last.keys), slice(None))

    def distance_slices(self, distances):
        """Slices of a table's distances that hold a tile's key rows, in order."""
        pl = compat.pallas()
        if not self.has_bias or not self.lead:
            return [pl.ds(0, 1)]
        *outer, inner = self.lead
        slices = []
        for offsets in np.ndindex(*(a.keys for a in outer)):
            at = 0
            for distance, offset, (_, count) in zip(
                distances[:-1], (*offsets, 0), self.spans, strict=True
            ):
                at = at * count + distance + offset
            slices.append(pl.ds(at, inner.keys))
        return slices

    def stacked(self, tile, ids, numbers):
        """Queries of a tile `[*queries, width]` as `[lanes, width]`.

        One copy a head, in which the other heads' lanes are zero, as are queries beyond the image.
        """
        dtype = tile.dtype
        tile = tile.astype(jnp.float32)  # not every chip selects bfloat16
        for i, axis in enumerate(self.axes):
            if axis.members % (axis.queries * self.inner[i]):
                at = jax.lax.broadcasted_iota(jnp.int32, tile.shape, i)
                number = ids[2 + i] * self.inner[i] + numbers[i]
                inside = at < axis.members - number * axis.queries
                tile = jnp.where(inside, tile, 0.0)
        tile = tile.reshape(LANES, -1)
        if self.group == 1:
            return tile.astype(dtype)
        lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
        return jnp.concatenate(
            [
                jnp.where((lane >= at) & (lane < at + self.dim), tile, 0.0).astype(dtype)
                for at in range(0, self.width, self.dim)
            ]
        )

    def spoiled(self, k, v):
        """`[keys, lanes]`: how many channels of a head's key and value are not finite."""
        count = 0.0
        for t in (k, v):
            bad = jnp.where(jnp.abs(t.astype(jnp.float32)) <= LARGEST, 0.0, 1.0)
            shape = self.lanes, t.shape[1]
            lane, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            head, owner = quotient(lane, LANES), quotient(column, t.shape[1] // self.group)
            own = jnp.where(head == owner, 1.0, 0.0)
            count += dot(*(u.astype(jnp.bfloat16) for u in (bad, own)), (1, 1), None)
        return count

    def products(self, keys, t):
        """`keys^T t` of each head, `[d, LANES]`: `keys [keys, width]`, `t [keys, lanes]`."""
        keys = keys.T
        dim = keys.shape[0] // self.group
        return [
            dot(
                keys[h * dim : (h + 1) * dim],
                t[:, h * LANES : (h + 1) * LANES],
                (1, 0),
                self.problem.precision,
            )
            for h in range(self.group)
        ]

    def write(self, ref, index, parts):
        """Stores the heads' `[d, LANES]` as queries of a tile."""
        queries = [a.queries for a in self.axes]
        ref[index] = jnp.concatenate(parts).T.reshape(*queries, -1).astype(ref.dtype)

    def call(self, kernel, name, inputs, outputs, scratch, interpret):
        """The pallas_call; inputs and outputs are `(array, spec)`."""
        pl, pltpu = compat.pallas(), compat.tpu()
        scores = self.groups * self.images * math.prod(a.runs for a in self.axes) * self.keys
        products = 2 if name == "forward" else 5
        cost = pl.CostEstimate(
            flops=2 * products * scores * self.lanes * self.width,
            transcendentals=scores * self.lanes,
            bytes_accessed=sum(t.size * t.dtype.itemsize for t, _ in (*inputs, *outputs)),
        )
        return pl.pallas_call(
            kernel,
            out_shape=[t for t, _ in outputs],
            grid=(self.groups, self.images, *self.steps),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(*s) for s in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) + ("arbitrary",) * (1 + self.rank),
                vmem_limit_bytes=chips.vmem_bytes(),
            ),
            cost_estimate=cost,
            name=f"neighborhood_{name}",
            interpret=interpret,
        )(*(t for t, _ in inputs))


def _lookup(axis: Axis, values: np.ndarray, residue, tile):
    """`values[residue, tile]` without a table: residue classes have one of two sizes."""
    values = values.reshape(axis.dilation, axis.runs)
    found = _piecewise(values[0], tile)
    if (values == values[0]).all():
        return found
    return jnp.where(residue < axis.size % axis.dilation, found, _piecewise(values[-1], tile))


def _piecewise(values: np.ndarray, index):
    """`values[index]` as a line, and a correction wherever the values leave it."""
    slope = int(np.median(np.diff(values))) if len(values) > 1 else 0
    rest = values - slope * np.arange(len(values))
    found = slope * index + int(rest[0])
    for i in np.flatnonzero(np.diff(rest)):
        found = jnp.where(index > int(i), slope * index + int(rest[i + 1]), found)
    return found
