"""Window attention for TPU (Mosaic) with 128 windows side by side in the lanes.

XLA stores `[windows, tokens, channels]` without padding. Where the tokens do not fill registers of
8 rows, or the channels registers of 128 lanes (49 tokens, 288 channels: 1.5 times the bytes), it
puts tokens outermost, and innermost the windows, or the channels if they fill the lanes. This body
reads and writes those orders, every byte once; nothing is copied or padded around it. Where
channels are innermost, `[windows, channels]` of each token is turned on chip.

All arithmetic is then elementwise over windows, in float32, and the matrix units rest: a product
of a 49 x 32 with a 32 x 49 matrix fills a quarter of one at best, while here each operation does
useful work in all lanes. A step takes `rows` queries of one head against all keys:

    s[i] = sum_d q[i, d] k[d]       k[d], s[i]: [keys, lanes]      q[i, d] repeated over keys
    o[i] = sum_m w[i, m] v[m]       v[m], o[i]: [channels, lanes]  w[i, m] repeated over channels

Bias and mask lie in vector memory as one table `[heads, queries, keys, lanes]`, made once a head;
the bias gradient is summed in another. They bound the tokens: 160 or so, 64 where heads come in
groups. More tokens, masks that do not divide 128, and head sizes that are no multiple of 16 go to
`tpu.py`, with copies around it where XLA stores another order.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import chips, compat
from kernels_pallas.attention.tile import finite, seen_only
from kernels_pallas.scores import EMPTY, MASKED

LANES = 128
F32 = jnp.float32


def _padding(rows: int, lanes: int) -> float:
    """Stored by needed bytes of an array in tiles of 8 rows and 128 lanes."""
    return -(-rows // 8) * 8 / rows * (-(-lanes // LANES) * LANES / lanes)


def layout(qkv, mask, heads: int) -> str | None:
    """The order in which XLA stores the operands: `"windows"` or `"channels"` innermost.

    None where this body cannot run, or rows of tokens (`tpu.py`) are stored in no more bytes.
    """
    windows, tokens, width = qkv.shape
    masks, head_dim = 1 if mask is None else mask.shape[0], width // (3 * heads)
    tables = tokens * -(-tokens // 8) * 8 * LANES * 4  # bias and mask of a head
    most = chips.vmem_bytes() // 4
    if LANES % masks or head_dim % 16 or tables > most:
        return None
    as_rows, turned = _padding(tokens, width), _padding(windows, width)
    if as_rows <= min(turned, _padding(8, windows)):
        return None
    block = tokens * LANES * qkv.dtype.itemsize * 2
    if turned > _padding(8, windows):
        held = 7 * block * head_dim + tokens * LANES * 4 * 7 * head_dim + 2 * tables
        return "windows" if held <= chips.vmem_bytes() else None
    whole = windows % LANES == 0 and width // 3 % LANES == 0 and LANES % head_dim == 0
    held = 6 * block * LANES + tokens * LANES * 4 * 7 * LANES + 2 * tables * (LANES // head_dim)
    fits = tables * (LANES // head_dim) <= most and held <= chips.vmem_bytes()
    return "channels" if whole and fits else None


def _divisor(n: int, most: int = 8) -> int:
    return max(k for k in range(1, most + 1) if n % k == 0)


class _Geometry:
    """Sizes of a call, its operands with tokens outermost, and their blocks.

    The grid is (groups of heads, windows, heads of a group, queries). Where windows are innermost a
    group is one head; where channels are, as many as fill the lanes.
    """

    def __init__(self, qkv, bias, mask, heads: int):
        pl = compat.pallas()
        self.windows, self.tokens, width = qkv.shape
        self.heads, self.head_dim, self.width = heads, width // (3 * heads), width // 3
        self.turned = layout(qkv, mask, heads) == "channels"
        self.group = LANES // self.head_dim if self.turned else 1
        self.rows = _divisor(self.tokens)
        self.blocks = pl.cdiv(self.windows, LANES)
        n = self.tokens
        self.tables, self.table_specs = [], []
        if bias is not None:
            self.tables.append(bias.astype(F32).transpose(0, 2, 1))
            self.table_specs.append(self.by_group())
        if mask is not None:
            mask = jnp.where(mask, 0.0, MASKED) if mask.dtype == bool else mask
            self.tables.append(mask.astype(F32).transpose(1, 2, 0))
            self.table_specs.append(pl.BlockSpec((n, n, len(mask)), lambda g, w, h, i: (0, 0, 0)))
        self.has = (bias is not None, mask is not None)

    def by_group(self):
        """Blocks of `[heads, n, n]`."""
        block = (self.group, self.tokens, self.tokens)
        return compat.pallas().BlockSpec(block, lambda g, w, h, i: (g, 0, 0))

    def inward(self, t, parts: int):
        """Arrays for `specs(parts)`: `[windows, tokens, parts * width]` as it is stored."""
        if self.turned:
            return [t.transpose(1, 0, 2)] * parts
        return [t.transpose(1, 2, 0).reshape(self.tokens, parts, -1, self.windows)]

    def specs(self, parts: int):
        """Blocks of a group of heads: one for each part where channels are innermost."""
        pl = compat.pallas()
        n, d, columns = self.tokens, self.head_dim, self.width // LANES
        if self.turned:
            return [
                pl.BlockSpec((n, LANES, LANES), lambda g, w, h, i, p=p: (0, w, p * columns + g))
                for p in range(parts)
            ]
        return [pl.BlockSpec((n, parts, d, LANES), lambda g, w, h, i: (0, 0, g, w))]

    def stored(self, parts: int, dtype):
        """Shape of a result as it is stored."""
        n, width, windows = self.tokens, self.width, self.windows
        shape = (n, windows, parts * width) if self.turned else (n, parts, width, windows)
        return jax.ShapeDtypeStruct(shape, dtype)

    def outward(self, t):
        """A result back to `[windows, tokens, channels]`."""
        if self.turned:
            return t.transpose(1, 0, 2)
        return t.reshape(self.tokens, -1, self.windows).transpose(2, 0, 1)

    def turn_in(self, blocks, into):
        """Each `[windows, channels]` of the blocks to `[channels, windows]`."""

        def one(m, _):
            for p, block in enumerate(blocks):
                into[m, p] = block[m].astype(F32).T

        jax.lax.fori_loop(0, self.tokens, one, None)

    def turn_out(self, t, outs):
        """The way back."""

        def one(m, _):
            for p, out in enumerate(outs):
                out[m] = t[m, p].T.astype(out.dtype)

        jax.lax.fori_loop(0, self.tokens, one, None)

    def of_head(self, t, head):
        """The head's channels, `[tokens, parts, head_dim, lanes]`."""
        pl = compat.pallas()
        start = pl.multiple_of(head * self.head_dim, self.head_dim)
        return t.at[:, :, pl.ds(start, self.head_dim)]

    def scratch(self, *shape):
        """Vector memory of `[*shape, lanes]` in float32."""
        return compat.tpu().VMEM((*shape, LANES), F32)

    def fill(self, refs, head, table):
        """`table[head, query] = bias + mask`: bias in all lanes, a mask in its windows' lanes."""
        bias_ref, mask_ref = _optional(self.has, refs)
        n = self.tokens
        column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)

        def one(i, _):
            row = jnp.zeros((n, LANES), F32)
            if bias_ref is not None:
                bias = jnp.where(column == i, bias_ref[head], 0.0)
                row = row + bias.sum(1, keepdims=True)
            if mask_ref is not None:
                times = LANES // mask_ref.shape[2]
                row = row + jnp.concatenate([mask_ref[i]] * times, axis=1)
            table[head, i] = row

        jax.lax.fori_loop(0, n, one, None)

    def loop(self, n: int, body, carry):
        """A loop of `n` steps, some of them in a row."""
        return jax.lax.fori_loop(0, n, body, carry, unroll=_divisor(n))

    def contract(self, left, right, length: int, width: int):
        """`out[j] = sum_m left[j, m] right[m]` for the rows of a block, `[width, lanes]` each."""
        pl = compat.pallas()

        def add(m, sums):
            r = right[m]
            return tuple(s + left[j, pl.ds(m, 1)] * r for j, s in enumerate(sums))

        zeros = tuple(jnp.zeros((width, LANES), F32) for _ in range(self.rows))
        return self.loop(length, add, zeros)

    def weights(self, q, kt, table, first):
        """Softmax over keys for the rows of a block, zero where a key is hidden."""
        scores = self.contract(q, kt, self.head_dim, self.tokens)
        every = []
        for j, s in enumerate(scores):
            extra = table[first + j]
            s = jnp.where(extra > MASKED, s + extra, MASKED)
            w = jnp.exp(s - jnp.maximum(s.max(0, keepdims=True), EMPTY))
            w = w * (1.0 / jnp.maximum(w.sum(0, keepdims=True), 1e-37))
            every.append(jnp.where(s <= EMPTY, 0.0, w))
        return every

    def spread(self, left, right, into):
        """`into[m] += sum_j left[j, m] right[j]` over the rows of a block."""
        pl = compat.pallas()
        right = [right[j] for j in range(self.rows)]

        def add(m, _):
            into[m] += sum(left[j, pl.ds(m, 1)] * r for j, r in enumerate(right))

        self.loop(self.tokens, add, None)

    def at(self):
        """The step's group of heads, block of windows, head in the group, and block of queries."""
        at = compat.pallas().program_id
        return at(0), at(1), at(2) if self.turned else 0, at(3)

    def ends_of_group(self, head, step):
        """Whether a step is the first and the last of a group of heads in a block of windows."""
        last = self.tokens // self.rows - 1
        return (head == 0) & (step == 0), (head == self.group - 1) & (step == last)

    def call(self, kernel, name, arrays, specs, outputs, out_specs, scratch, interpret):
        """The pallas_call over heads, windows and queries, in order."""
        pl, pltpu = compat.pallas(), compat.tpu()
        groups, steps = self.heads // self.group, self.tokens // self.rows
        return pl.pallas_call(
            kernel,
            grid=(groups, self.blocks, self.group, steps),
            in_specs=[*specs, *self.table_specs],
            out_specs=out_specs,
            out_shape=outputs,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=chips.vmem_bytes()
            ),
            name=f"window_attention_lanes_{name}",
            interpret=interpret,
        )(*arrays, *self.tables)


def _marked(x):
    """Keys, NaN where the value is not finite: rows that see one become NaN."""
    k, v = x[:, 1].astype(F32), x[:, 2].astype(F32)
    good = jnp.where(finite(v) == v, 1.0, 0.0).min(1, keepdims=True)
    return jnp.where(good > 0, k, jnp.nan)


def _optional(has, refs):
    """The refs of operands that are there, None for the others."""
    refs = iter(refs)
    return [next(refs) if there else None for there in has]


def _take(refs, *counts):
    """`refs` cut into lists of so many, and the rest."""
    lists = []
    for count in counts:
        lists.append(refs[:count])
        refs = refs[count:]
    return [*lists, refs]


def forward(qkv, bias, mask, *, heads: int, scale: float, interpret=False):
    """`[windows, tokens, heads * head_dim]` in the type of `qkv`."""
    pl = compat.pallas()
    shape = _Geometry(qkv, bias, mask, heads)
    n, d, rows, turned = shape.tokens, shape.head_dim, shape.rows, shape.turned
    specs = shape.specs(3)

    def kernel(*refs):
        blocks, tables, (out, q, kt, v, w, table), turning = _take(
            refs, len(specs), len(shape.tables), 6
        )
        _, window, head, step = shape.at()
        begins, ends = shape.ends_of_group(head, step)
        first, of_block = step * rows, out
        if turned:
            x, out = turning
            pl.when(begins)(lambda: shape.turn_in(blocks, x))
            x, out = shape.of_head(x, head), shape.of_head(out, head)
        else:
            (x,) = blocks

        @pl.when((window == 0) & (step == 0))
        def _():
            shape.fill(tables, head, table)

        @pl.when(step == 0)
        def _():
            kt[...] = jnp.swapaxes(_marked(x), 0, 1)
            v[...] = finite(x[:, 2].astype(F32))

        q[...] = x[pl.ds(first, rows), 0].astype(F32) * scale
        for j, t in enumerate(shape.weights(q, kt, table.at[head], first)):
            w[j] = t
        for j, t in enumerate(shape.contract(w, v, n, d)):
            out[first + j, 0] = t.astype(out.dtype)
        if turned:
            pl.when(ends)(lambda: shape.turn_out(turning[1], [of_block]))

    scratch = [(rows, d), (d, n), (n, d), (rows, n), (shape.group, n, n)]
    scratch += [(n, 3, LANES), (n, 1, LANES)] if turned else []
    out = shape.call(
        kernel,
        "forward",
        [*shape.inward(qkv, 3)],
        specs,
        shape.stored(1, qkv.dtype),
        shape.specs(1)[0],
        [shape.scratch(*sizes) for sizes in scratch],
        interpret,
    )
    return shape.outward(out)


def backward(qkv, bias, mask, d_out, *, heads: int, scale: float, interpret=False):
    """Gradients of `qkv` (its type) and of `bias` (float32, None without a bias)."""
    pl, pltpu = compat.pallas(), compat.tpu()
    shape = _Geometry(qkv, bias, mask, heads)
    n, d, rows, turned = shape.tokens, shape.head_dim, shape.rows, shape.turned
    blocks, last_lane = shape.blocks, shape.windows - (shape.blocks - 1) * LANES
    specs = [*shape.specs(3), *shape.specs(1)]

    def kernel(*refs):
        operands, tables, (dx, d_bias), scratch, turning = _take(
            refs, len(specs), len(shape.tables), 2, 11
        )
        q, do, k, kt, vt, w, ds, dk, dv, table, sums = scratch
        group, window, head, step = shape.at()
        begins, ends = shape.ends_of_group(head, step)
        first, of_array = step * rows, dx
        if turned:
            x, g, dx, staged, semaphores = turning

            @pl.when(begins)
            def _():
                shape.turn_in(operands[:3], x)
                shape.turn_in(operands[3:], g)

            x, g, dx = (shape.of_head(t, head) for t in (x, g, dx))
        else:
            x, g = operands

        @pl.when((window == 0) & (step == 0))
        def _():
            shape.fill(tables, head, table)
            sums[head] = jnp.zeros_like(sums[head])

        @pl.when(step == 0)
        def _():
            k[...] = finite(x[:, 1].astype(F32))
            kt[...] = jnp.swapaxes(_marked(x), 0, 1)
            vt[...] = jnp.swapaxes(finite(x[:, 2].astype(F32)), 0, 1)
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)

        q[...] = x[pl.ds(first, rows), 0].astype(F32) * scale
        do[...] = g[pl.ds(first, rows), 0].astype(F32)
        for j, t in enumerate(shape.weights(q, kt, table.at[head], first)):
            w[j] = t
        inside = None
        if last_lane < LANES:  # what lies beyond the last window must not reach the bias gradient
            lane = jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 1)
            inside = (window < blocks - 1) | (lane < last_lane)
        for j, dw in enumerate(shape.contract(do, vt, d, n)):
            dw = seen_only(w[j], dw)
            t = seen_only(w[j], w[j] * (dw - (w[j] * dw).sum(0, keepdims=True)))
            ds[j] = t
            w[j] = seen_only(w[j], w[j] + 0.0 * dw)  # NaN where the output's gradient is
            sums[head, first + j] += t if inside is None else jnp.where(inside, t, 0.0)
        for j, t in enumerate(shape.contract(ds, k, n, d)):
            dx[first + j, 0] = (t * scale).astype(dx.dtype)
        q[...], do[...] = finite(q[...]), finite(do[...])
        shape.spread(ds, q, dk)
        shape.spread(w, do, dv)

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            dx[:, 1] = dk[...].astype(dx.dtype)
            dx[:, 2] = dv[...].astype(dx.dtype)

        @pl.when((step == pl.num_programs(3) - 1) & (window == blocks - 1))
        def _():
            column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)

            def one(i, found):
                return jnp.where(column == i, sums[head, i].sum(1, keepdims=True), found)

            d_bias[head] = jax.lax.fori_loop(0, n, one, jnp.zeros((n, n), F32))

        if turned:

            @pl.when(ends)
            def _():
                shape.turn_out(turning[2], [staged.at[p] for p in range(3)])
                copies = []
                for p in range(3):
                    at = pl.multiple_of(p * shape.width + group * LANES, LANES)
                    into = of_array.at[:, pl.ds(window * LANES, LANES), pl.ds(at, LANES)]
                    copies.append(pltpu.make_async_copy(staged.at[p], into, semaphores.at[p]))
                    copies[-1].start()
                for copy in copies:
                    copy.wait()

    scratch = [(rows, d)] * 2 + [(n, d), (d, n), (d, n)] + [(rows, n)] * 2 + [(n, d)] * 2
    scratch += [(shape.group, n, n)] * 2
    scratch += [(n, 3, LANES), (n, 1, LANES), (n, 3, LANES)] if turned else []
    scratch = [shape.scratch(*sizes) for sizes in scratch]
    out_spec = shape.specs(3)[0]
    if turned:
        out_spec = pl.BlockSpec(memory_space=pl.ANY)
        scratch.append(pltpu.VMEM((3, n, LANES, LANES), qkv.dtype))
        scratch.append(pltpu.SemaphoreType.DMA((3,)))
    dx, d_bias = shape.call(
        kernel,
        "backward",
        [*shape.inward(qkv, 3), *shape.inward(d_out.astype(qkv.dtype), 1)],
        specs,
        [shape.stored(3, qkv.dtype), jax.ShapeDtypeStruct((heads, n, n), F32)],
        [out_spec, shape.by_group()],
        scratch,
        interpret,
    )
    return shape.outward(dx), None if bias is None else d_bias.transpose(0, 2, 1)
