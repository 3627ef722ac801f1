"""The selective scan for TPU (Mosaic).

Channels lie in lanes, the state's components in sublanes. Grid: batch, chunks, tiles of channels;
the last two run in order. The states of all tiles stay in vector memory from chunk to chunk (in
the block of the last result). Steps run one after the other, sixteen to a round: the rows of a
round are made float32 together, and its loop is unrolled.

B and C multiply the same component in every channel: their columns are spread over the lanes once
for a chunk and all its tiles. Sums over components, for all steps of a round at once, go through
memory: steps store eight rows each, which are read back in strides. Sums over channels (the
gradients of B and C) are collected per lane over all tiles, and over lanes by one product.

The backward walks the chunks from last to first. It forms the states of a chunk again from the one
before it, in vector memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.recurrence.problem import Problem
from kernels_pallas.recurrence.problem import ScanGradients as Gradients
from kernels_pallas.recurrence.problem import ScanOperands as Operands

VMEM_BYTES = 96 << 20
LANES, ROWS, ROUND = 128, 8, 16
TILE = 8192  # numbers of one step's state that are worked on at once


class _Call:
    """Blocks of a call, with arrays as the kernels want them; `last_first` reverses the chunks."""

    def __init__(self, problem: Problem, x: Operands, *, last_first=False):
        self.batch, self.length, self.channels = x.x.shape
        self.chunk, self.chunks = problem.chunk, self.length // problem.chunk
        self.components = x.A.shape[1]
        self.sublanes = -(-self.components // ROWS) * ROWS
        width = -(-self.channels // LANES)
        most = max(1, TILE // self.sublanes // LANES)
        self.tiles = next(n for n in range(1, width + 1) if width % n == 0 and width // n <= most)
        self.tile = width // self.tiles * LANES
        self.last_first = last_first
        self.arrays, self.specs = [], []
        self.add("steps", self.steps(x.x))
        self.add("steps", self.steps(x.dt))
        self.add("tiles", self.by_tile(x.A[None])[0])
        self.add("columns", self.columns(x.B))
        self.add("columns", self.columns(x.C))
        D = jnp.zeros((self.channels,)) if x.D is None else x.D
        self.add("row", self.pad(D, 0).reshape(self.tiles, 1, self.tile))

    def pad(self, t, axis):
        """Channels up to whole tiles."""
        extra = self.tiles * self.tile - self.channels
        return jnp.pad(t, [(0, extra if a == axis else 0) for a in range(t.ndim)]) if extra else t

    def steps(self, t):
        """`[batch, length, channels]`, padded."""
        return self.pad(t, 2)

    def by_tile(self, t):
        """`[n, channels, components]` to `[n, tiles, sublanes, tile]`."""
        t = self.pad(t, 1)
        t = jnp.pad(t, [(0, 0), (0, 0), (0, self.sublanes - self.components)])
        return t.reshape(-1, self.tiles, self.tile, self.sublanes).swapaxes(2, 3)

    def from_tiles(self, t):
        """The inverse of `by_tile`."""
        t = t.swapaxes(2, 3).reshape(-1, self.tiles * self.tile, self.sublanes)
        return t[:, : self.channels, : self.components]

    def columns(self, t):
        """`[batch, length, components]` to `[batch, chunks, sublanes, chunk]`, float32."""
        t = t.astype(jnp.float32).reshape(self.batch, self.chunks, self.chunk, self.components)
        t = t.swapaxes(2, 3)
        return jnp.pad(t, [(0, 0), (0, 0), (0, self.sublanes - self.components), (0, 0)])

    def spec(self, kind: str):
        """`(array shape, block, index map)` of a kind of array."""
        at = (lambda c: self.chunks - 1 - c) if self.last_first else (lambda c: c)
        per_batch, state = (self.tiles, self.sublanes, self.tile), (self.sublanes, self.tile)
        padded, flat = self.tiles * self.tile, self.chunk * self.sublanes
        return {
            "steps": (
                (self.batch, self.length, padded),
                (1, self.chunk, self.tile),
                lambda b, c, e: (b, at(c), e),
            ),
            "tiles": (per_batch, per_batch, lambda b, c, e: (0, 0, 0)),
            "row": ((self.tiles, 1, self.tile),) * 2 + (lambda b, c, e: (0, 0, 0),),
            "rows": (
                (self.batch, self.tiles, 1, self.tile),
                (1, self.tiles, 1, self.tile),
                lambda b, c, e: (b, 0, 0, 0),
            ),
            "columns": (
                (self.batch, self.chunks, self.sublanes, self.chunk),
                (1, 1, self.sublanes, self.chunk),
                lambda b, c, e: (b, at(c), 0, 0),
            ),
            "flat": (
                (self.batch, self.chunks, 1, flat),
                (1, 1, 1, flat),
                lambda b, c, e: (b, at(c), 0, 0),
            ),
            "states": (
                (self.batch, self.chunks, self.sublanes, padded),
                (1, 1, *state),
                lambda b, c, e: (b, at(c), 0, e),
            ),
            "state": (
                (self.batch, *per_batch),
                (1, *per_batch),
                lambda b, c, e: (b, 0, 0, 0),
            ),
        }[kind]

    def add(self, kind: str, t):
        """One more input."""
        _, block, index_map = self.spec(kind)
        self.arrays.append(t)
        self.specs.append(compat.pallas().BlockSpec(block, index_map))

    def run(self, kernel, name, outputs, scratch, interpret):
        """The pallas_call; `outputs` are `(kind, dtype)`."""
        pl, pltpu = compat.pallas(), compat.tpu()
        outputs = [(self.spec(kind), dtype) for kind, dtype in outputs]
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for (shape, _, _), dtype in outputs],
            grid=(self.batch, self.chunks, self.tiles),
            in_specs=self.specs,
            out_specs=[pl.BlockSpec(block, at) for (_, block, at), _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            name=f"selective_scan_{name}",
            interpret=interpret,
        )(*self.arrays)

    @property
    def spread(self):
        """The shape of columns spread over lanes."""
        return (self.chunk, self.sublanes, LANES)

    @property
    def rows(self):
        """The shape of the rows of a round."""
        return (ROUND, self.tile)

    @property
    def parts(self):
        """The shape of the sums of a round: by block of lanes and step, eight rows."""
        return (self.tile // LANES * ROUND * ROWS, LANES)


def _spread(columns, out):
    """Column t of `[sublanes, chunk]` to all lanes of `out[t]`."""
    values = columns[0, 0]
    for t in range(out.shape[0]):
        out[t] = jnp.broadcast_to(values[:, t : t + 1], out.shape[1:])


def _over_lanes(t, width):
    """`[sublanes, 128]` repeated to `[sublanes, width]`."""
    return jnp.concatenate([t] * (width // LANES), axis=1)


def _fold_lanes(t):
    """`[sublanes, width]` summed to `[sublanes, 128]`."""
    return sum(t[:, i : i + LANES] for i in range(0, t.shape[1], LANES))


def _store_part(parts, t, values):
    """Sums of `[sublanes, width]` by sublane, as part t."""
    folded = sum(values[i : i + ROWS] for i in range(0, values.shape[0], ROWS))
    for k in range(values.shape[1] // LANES):
        parts[_at(k * ROUND + t, ROWS), :] = folded[:, k * LANES : (k + 1) * LANES]


def _sum_parts(parts):
    """`[16, width]`: the sums over the rows of every part."""
    pl = compat.pallas()
    blocks = (
        sum(parts[pl.ds(start + s, ROUND, stride=ROWS), :] for s in range(ROWS))
        for start in range(0, parts.shape[0], ROUND * ROWS)
    )
    return jnp.concatenate(list(blocks), axis=1)


def _at(i, size):
    """The i-th rows of so many."""
    pl = compat.pallas()
    return pl.ds(pl.multiple_of(i * size, size) if size > 1 else i, size)


def forward(problem: Problem, x: Operands, *, keep=False, interpret=False):
    """Output, final state, and with `keep` the states before every chunk."""
    pl = compat.pallas()
    call = _Call(problem, x)
    call.add("state", call.by_tile(x.state))

    def kernel(x, dt, A, B, C, D, initial, y, memory, *rest):
        *states, b_all, c_all, dts, writes, parts = rest
        c, e = pl.program_id(1), pl.program_id(2)

        @pl.when(c == 0)
        def _():
            memory[0, e] = initial[0, e]

        @pl.when(e == 0)
        def _():
            _spread(B, b_all)
            _spread(C, c_all)

        for ref in states:
            ref[0, 0] = memory[0, e]
        rates, skip = A[e], D[e]

        def round_(i, h):
            at = _at(i, ROUND)
            inputs = x[0, at, :].astype(jnp.float32)
            dts[...] = dt[0, at, :].astype(jnp.float32)
            writes[...] = inputs * dts[...]

            def step(t, h):
                row, now = _at(t, 1), i * ROUND + t
                b, read = (_over_lanes(ref[now], call.tile) for ref in (b_all, c_all))
                h = jnp.exp(dts[row, :] * rates) * h + writes[row, :] * b
                _store_part(parts, t, h * read)
                return h

            h = lax.fori_loop(0, ROUND, step, h, unroll=not interpret)
            y[0, at, :] = (_sum_parts(parts) + skip * inputs).astype(y.dtype)
            return h

        memory[0, e] = lax.fori_loop(0, call.chunk // ROUND, round_, memory[0, e])

    outputs = [("steps", x.x.dtype), ("state", jnp.float32)]
    outputs += [("states", jnp.float32)] if keep else []
    scratch = [call.spread, call.spread, call.rows, call.rows, call.parts]
    y, final, *states = call.run(kernel, "forward", outputs, scratch, interpret)
    states = (t[:, :, : call.components, : call.channels] for t in states)
    return y[:, :, : call.channels], call.from_tiles(final), *states


def backward(problem: Problem, x: Operands, states, d_y, d_final, *, interpret=False):
    """Gradients in the operands' types."""
    pl = compat.pallas()
    call = _Call(problem, x, last_first=True)
    extra = call.sublanes - call.components
    call.add("states", jnp.pad(call.pad(states, 3), [(0, 0), (0, 0), (0, extra), (0, 0)]))
    call.add("steps", call.steps(d_y))
    call.add("state", call.by_tile(d_final))

    def kernel(x, dt, A, B, C, D, before, d_y, d_final, *rest):
        d_x, d_dt, d_A, d_B, d_C, d_D, memory, *scratch = rest
        b_all, c_all, h_all, b_sums, c_sums, dts, writes, dys, parts, decay_parts = scratch
        c, e = pl.program_id(1), pl.program_id(2)
        rounds = call.chunk // ROUND

        @pl.when(c == 0)
        def _():
            memory[0, e] = d_final[0, e]
            d_A[0, e] = jnp.zeros(d_A.shape[2:], jnp.float32)
            d_D[0, e] = jnp.zeros(d_D.shape[2:], jnp.float32)

        @pl.when(e == 0)
        def _():
            _spread(B, b_all)
            _spread(C, c_all)
            b_sums[...] = jnp.zeros_like(b_sums)
            c_sums[...] = jnp.zeros_like(c_sums)

        rates, skip, unroll = A[e], D[e], not interpret
        wide = partial(_over_lanes, width=call.tile)

        def load(i):
            at = _at(i, ROUND)
            inputs = x[0, at, :].astype(jnp.float32)
            dts[...] = dt[0, at, :].astype(jnp.float32)
            writes[...] = inputs * dts[...]
            return at, inputs

        def again(i, h):
            load(i)

            def step(t, h):
                row, now = _at(t, 1), i * ROUND + t
                h_all[now] = h
                return jnp.exp(dts[row, :] * rates) * h + writes[row, :] * wide(b_all[now])

            return lax.fori_loop(0, ROUND, step, h, unroll=unroll)

        lax.fori_loop(0, rounds, again, before[0, 0])

        def round_(i, carry):
            i = rounds - 1 - i
            at, inputs = load(i)
            dys[...] = d_y[0, at, :].astype(jnp.float32)

            def step(t, carry):
                g, d_rates = carry
                t = ROUND - 1 - t
                row, now = _at(t, 1), i * ROUND + t
                b, dy = wide(b_all[now]), dys[row, :]
                decay = jnp.exp(dts[row, :] * rates)
                kept = decay * h_all[now]
                g = g + dy * wide(c_all[now])
                c_sums[now] += _fold_lanes(dy * (kept + writes[row, :] * b))
                b_sums[now] += _fold_lanes(g * writes[row, :])
                d_log = g * kept
                _store_part(parts, t, g * b)
                _store_part(decay_parts, t, rates * d_log)
                return decay * g, d_rates + dts[row, :] * d_log

            *carry, d_skip = carry
            carry = lax.fori_loop(0, ROUND, step, tuple(carry), unroll=unroll)
            d_writes = _sum_parts(parts)
            d_x[0, at, :] = (dts[...] * d_writes + skip * dys[...]).astype(d_x.dtype)
            d_dt[0, at, :] = (inputs * d_writes + _sum_parts(decay_parts)).astype(d_dt.dtype)
            return *carry, d_skip + (inputs * dys[...]).sum(0, keepdims=True)

        start = memory[0, e], d_A[0, e], d_D[0, e]
        memory[0, e], d_A[0, e], d_D[0, e] = lax.fori_loop(0, rounds, round_, start)

        @pl.when(e == call.tiles - 1)
        def _():
            ones = jnp.ones((ROWS, LANES), jnp.float32)
            for sums, out in ((b_sums, d_B), (c_sums, d_C)):
                total = lax.dot_general(
                    ones,
                    sums[...].reshape(-1, LANES),
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.HIGHEST,
                    preferred_element_type=jnp.float32,
                )
                out[0, 0] = total[:1]

    outputs = [("steps", x.x.dtype), ("steps", x.dt.dtype), ("state", jnp.float32)]
    outputs += [("flat", jnp.float32)] * 2 + [("rows", jnp.float32), ("state", jnp.float32)]
    tall = (call.chunk, call.sublanes, call.tile)
    scratch = [call.spread, call.spread, tall, call.spread, call.spread]
    scratch += [call.rows, call.rows, call.rows, call.parts, call.parts]
    d_x, d_dt, d_A, d_B, d_C, d_D, d_state = call.run(
        kernel, "backward", outputs, scratch, interpret
    )

    def by_step(t, like):
        t = t.reshape(call.batch, call.length, call.sublanes)[:, :, : call.components]
        return t.astype(like.dtype)

    return Gradients(
        d_x[:, :, : call.channels],
        d_dt[:, :, : call.channels],
        call.from_tiles(d_A).sum(0),
        by_step(d_B, x.B),
        by_step(d_C, x.C),
        None if x.D is None else d_D.sum(0).reshape(-1)[: call.channels],
        call.from_tiles(d_state),
    )
