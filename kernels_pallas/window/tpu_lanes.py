"""Window attention for TPU (Mosaic) with 128 windows side by side in the lanes.

XLA stores `[windows, tokens, channels]` without padding: where the tokens do not fill registers of
8 rows, or the channels registers of 128 lanes (49 tokens, 288 channels: 1.5 times the bytes), it
puts windows innermost. This body reads and writes that order, `[tokens, channels, windows]`, and
every byte once; nothing is copied or padded around it.

All arithmetic is then elementwise over windows, in float32, and the matrix units rest: a product
of a 49 x 32 with a 32 x 49 matrix fills a quarter of one at best, while here each operation does
useful work in all lanes. A step takes `rows` queries of one head against all keys:

    s[i] = sum_d q[i, d] k[d]       k[d], s[i]: [keys, lanes]      q[i, d] repeated over keys
    o[i] = sum_m w[i, m] v[m]       v[m], o[i]: [channels, lanes]  w[i, m] repeated over channels

The grid is (heads, windows, queries). Bias and mask lie in vector memory as one table
`[queries, keys, lanes]`, made once a head; the bias gradient is summed in another.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.scores import EMPTY, MASKED

LANES = 128
MAX_TOKENS = 160  # the table of bias and mask takes 512 bytes a pair of tokens
VMEM_BYTES = 96 << 20
F32 = jnp.float32


def _padding(shape) -> float:
    """Stored by needed bytes of an array with rows of 8 and lanes of 128."""
    rows, lanes = shape
    return -(-rows // 8) * 8 / rows * (-(-lanes // LANES) * LANES / lanes)


def fits(qkv, mask, heads: int) -> bool:
    """Whether this body can run a call, and stores its operands in fewer bytes than rows would."""
    windows, tokens, width = qkv.shape
    masks = 1 if mask is None else mask.shape[0]
    return (
        tokens <= MAX_TOKENS
        and width // (3 * heads) % 16 == 0
        and LANES % masks == 0
        and _padding((8, windows)) < _padding((tokens, width))
    )


def _divisor(n: int, most: int = 8) -> int:
    return max(k for k in range(1, most + 1) if n % k == 0)


class _Geometry:
    """Sizes of a call, its operands with windows innermost, and their blocks."""

    def __init__(self, qkv, bias, mask, heads: int):
        pl = compat.pallas()
        self.windows, self.tokens, width = qkv.shape
        self.heads, self.head_dim = heads, width // (3 * heads)
        self.rows = _divisor(self.tokens)
        self.blocks = pl.cdiv(self.windows, LANES)
        n, d = self.tokens, self.head_dim
        self.qkv = self.inward(qkv, 3)
        self.qkv_spec = pl.BlockSpec((n, 3, d, LANES), lambda h, w, i: (0, 0, h, w))
        self.out_spec = pl.BlockSpec((n, 1, d, LANES), lambda h, w, i: (0, 0, h, w))
        self.tables, self.table_specs = [], []
        if bias is not None:
            self.tables.append(bias.astype(F32).transpose(0, 2, 1))
            self.table_specs.append(pl.BlockSpec((1, n, n), lambda h, w, i: (h, 0, 0)))
        if mask is not None:
            mask = jnp.where(mask, 0.0, MASKED) if mask.dtype == bool else mask
            self.tables.append(mask.astype(F32).transpose(1, 2, 0))
            self.table_specs.append(pl.BlockSpec((n, n, len(mask)), lambda h, w, i: (0, 0, 0)))
        self.has = (bias is not None, mask is not None)

    def inward(self, t, parts: int):
        """`[windows, tokens, parts * width]` to `[tokens, parts, width, windows]`."""
        t = t.transpose(1, 2, 0)
        return t.reshape(self.tokens, parts, -1, self.windows)

    def outward(self, t):
        """Back to `[windows, tokens, channels]`."""
        return t.reshape(self.tokens, -1, self.windows).transpose(2, 0, 1)

    def stored(self, parts: int, dtype):
        """Shape of an array with windows innermost."""
        width = self.heads * self.head_dim
        return jax.ShapeDtypeStruct((self.tokens, parts, width, self.windows), dtype)

    def scratch(self, *shape):
        """Vector memory of `[*shape, lanes]` in float32."""
        return compat.tpu().VMEM((*shape, LANES), F32)

    def fill(self, refs, table):
        """`table[query] = bias + mask`, each bias over all lanes, each mask in its windows'."""
        bias_ref, mask_ref = _optional(self.has, refs)
        n = self.tokens
        column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)

        def one(i, _):
            row = jnp.zeros((n, LANES), F32)
            if bias_ref is not None:
                bias = jnp.where(column == i, bias_ref[0], 0.0)
                row = row + bias.sum(1, keepdims=True)
            if mask_ref is not None:
                times = LANES // mask_ref.shape[2]
                row = row + jnp.concatenate([mask_ref[i]] * times, axis=1)
            table[i] = row

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
        """Softmax over keys for the rows of a block, zero in rows that see no key."""
        scores = self.contract(q, kt, self.head_dim, self.tokens)
        every = []
        for j, s in enumerate(scores):
            s = s + table[first + j]
            w = jnp.exp(s - jnp.maximum(s.max(0, keepdims=True), EMPTY))
            every.append(w * (1.0 / jnp.maximum(w.sum(0, keepdims=True), 1e-37)))
        return every

    def call(self, kernel, name, arrays, specs, outputs, out_specs, scratch, interpret):
        """The pallas_call over heads, windows and queries, in order."""
        pl, pltpu = compat.pallas(), compat.tpu()
        return pl.pallas_call(
            kernel,
            grid=(self.heads, self.blocks, self.tokens // self.rows),
            in_specs=[*specs, *self.table_specs],
            out_specs=out_specs,
            out_shape=outputs,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_BYTES
            ),
            name=f"window_attention_lanes_{name}",
            interpret=interpret,
        )(*arrays, *self.tables)


def _optional(has, refs):
    """The refs of operands that are there, None for the others."""
    refs = iter(refs)
    return [next(refs) if there else None for there in has]


def forward(qkv, bias, mask, *, heads: int, scale: float, precision=None, interpret=False):
    """`[windows, tokens, heads * head_dim]` in the type of `qkv`."""
    del precision  # all of it is float32
    pl = compat.pallas()
    shape = _Geometry(qkv, bias, mask, heads)
    n, d, rows = shape.tokens, shape.head_dim, shape.rows

    def kernel(x, *refs):
        *tables, out, q, kt, v, w, table = refs
        window, step = pl.program_id(1), pl.program_id(2)
        first = step * rows

        @pl.when((window == 0) & (step == 0))
        def _():
            shape.fill(tables, table)

        @pl.when(step == 0)
        def _():
            kt[...] = jnp.swapaxes(x[:, 1].astype(F32), 0, 1)
            v[...] = x[:, 2].astype(F32)

        q[...] = x[pl.ds(first, rows), 0].astype(F32) * scale
        for j, t in enumerate(shape.weights(q, kt, table, first)):
            w[j] = t
        for j, t in enumerate(shape.contract(w, v, n, d)):
            out[first + j, 0] = t.astype(out.dtype)

    scratch = [(rows, d), (d, n), (n, d), (rows, n), (n, n)]
    scratch = [shape.scratch(*sizes) for sizes in scratch]
    output = shape.stored(1, qkv.dtype)
    specs = [shape.qkv_spec]
    out = shape.call(
        kernel, "forward", [shape.qkv], specs, output, shape.out_spec, scratch, interpret
    )
    return shape.outward(out)


def backward(qkv, bias, mask, d_out, *, heads: int, scale: float, precision=None, interpret=False):
    """Gradients of `qkv` (its type) and of `bias` (float32, None without a bias)."""
    del precision  # all of it is float32
    pl = compat.pallas()
    shape = _Geometry(qkv, bias, mask, heads)
    n, d, rows, blocks = shape.tokens, shape.head_dim, shape.rows, shape.blocks
    last_lane = shape.windows - (blocks - 1) * LANES

    def kernel(x, g, *refs):
        tables, refs = refs[: len(shape.tables)], refs[len(shape.tables) :]
        dx, d_bias, q, do, k, kt, vt, w, ds, dk, dv, table, sums = refs
        window, step = pl.program_id(1), pl.program_id(2)
        first = step * rows

        @pl.when((window == 0) & (step == 0))
        def _():
            shape.fill(tables, table)
            sums[...] = jnp.zeros_like(sums)

        @pl.when(step == 0)
        def _():
            k[...] = x[:, 1].astype(F32)
            kt[...] = jnp.swapaxes(k[...], 0, 1)
            vt[...] = jnp.swapaxes(x[:, 2].astype(F32), 0, 1)
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)

        q[...] = x[pl.ds(first, rows), 0].astype(F32) * scale
        do[...] = g[pl.ds(first, rows), 0].astype(F32)
        for j, t in enumerate(shape.weights(q, kt, table, first)):
            w[j] = t
        inside = True
        if last_lane < LANES:  # what lies beyond the last window must not reach the bias gradient
            lane = jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 1)
            inside = (window < blocks - 1) | (lane < last_lane)
        for j, dw in enumerate(shape.contract(do, vt, d, n)):
            t = w[j] * (dw - (w[j] * dw).sum(0, keepdims=True))
            ds[j] = t
            sums[first + j] += t if inside is True else jnp.where(inside, t, 0.0)
        for j, t in enumerate(shape.contract(ds, k, n, d)):
            dx[first + j, 0] = (t * scale).astype(dx.dtype)

        def spread(left, right, into):
            """`into[m] += sum_j left[j, m] right[j]`."""
            right = [right[j] for j in range(rows)]

            def add(m, _):
                into[m] += sum(left[j, pl.ds(m, 1)] * r for j, r in enumerate(right))

            shape.loop(n, add, None)

        spread(ds, q, dk)
        spread(w, do, dv)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            dx[:, 1] = dk[...].astype(dx.dtype)
            dx[:, 2] = dv[...].astype(dx.dtype)

        @pl.when((step == pl.num_programs(2) - 1) & (window == blocks - 1))
        def _():
            column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)

            def one(i, found):
                return jnp.where(column == i, sums[i].sum(1, keepdims=True), found)

            d_bias[0] = jax.lax.fori_loop(0, n, one, jnp.zeros((n, n), F32))

    scratch = [(rows, d)] * 2 + [(n, d), (d, n), (d, n)] + [(rows, n)] * 2 + [(n, d)] * 2
    scratch = [shape.scratch(*sizes) for sizes in (*scratch, (n, n), (n, n))]
    outputs = [shape.stored(3, qkv.dtype), jax.ShapeDtypeStruct((heads, n, n), F32)]
    out_specs = [shape.qkv_spec, pl.BlockSpec((1, n, n), lambda h, w, i: (h, 0, 0))]
    arrays = [shape.qkv, shape.inward(d_out.astype(qkv.dtype), 1)]
    specs = [shape.qkv_spec, shape.out_spec]
    dx, d_bias = shape.call(
        kernel, "backward", arrays, specs, outputs, out_specs, scratch, interpret
    )
    return shape.outward(dx), None if bias is None else d_bias.transpose(0, 2, 1)
