"""Window attention for TPU (Mosaic), on the array that a fused projection wrote.

A step reads some windows of `[windows, tokens, 3 * heads * head_dim]` as they lie: tokens in
sublanes, heads packed in lanes, nothing transposed or padded outside. Windows of up to 64 tokens
are joined in pairs, so that one tile of scores fills the 128 lanes; the bias becomes
block-diagonal for it and stays in vector memory. The backward kernel forms the weights again from
the operands, reads nothing else than the output's gradient, and sums the bias gradient in place
over all windows.

What it misses: 2.1 to 3.1 times the necessary bytes move, not 1.3. XLA stores arrays of 49 tokens
with windows and channels innermost, as 49 rows fill registers badly, and the call, which wants
windows outermost, is surrounded by copies from one layout to the other. Removing them needs a body
that takes `[tokens, windows, channels]`, windows in sublanes.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.attention.tile import dot
from kernels_pallas.scores import EMPTY, MASKED

WINDOWS_PER_STEP = 8
VMEM_BYTES = 96 << 20


class _Geometry:
    """How windows are grouped: `pair` in a tile, `step` in a grid step."""

    def __init__(self, qkv, bias, mask, heads: int):
        self.windows, self.tokens, width = qkv.shape
        self.heads, self.width = heads, width // 3
        self.head_dim = self.width // heads
        masks = 1 if mask is None else mask.shape[0]
        cycle = self.windows if masks == 1 else masks
        self.pair = 2 if self.tokens <= 64 and cycle % 2 == 0 else 1
        self.step = max(
            n for n in range(self.pair, WINDOWS_PER_STEP + 1, self.pair) if cycle % n == 0
        )
        self.rows = self.pair * self.tokens
        table = jnp.zeros((heads, self.tokens, self.tokens), jnp.float32)
        if bias is not None:
            table = table + bias.astype(jnp.float32)
        if mask is not None:
            mask = jnp.where(mask, 0.0, MASKED) if mask.dtype == bool else mask
            mask = mask.astype(jnp.float32)
            if masks == 1:
                table, mask = table + mask, None
        self.bias = self.diagonal(table, heads, MASKED)
        self.mask = None
        if mask is not None:
            paired = mask.reshape(-1, self.pair, self.tokens, self.tokens)
            self.mask = self.diagonal(paired, len(paired), 0.0)
        self.cycle = cycle // self.step

    def diagonal(self, t, lead: int, fill):
        """`[lead, (pair,) n, n]` to block-diagonal `[lead, pair * n, pair * n]`."""
        if self.pair == 1:
            return t.reshape(lead, self.tokens, self.tokens)
        a, b = (t, t) if t.ndim == 3 else (t[:, 0], t[:, 1])
        empty = jnp.full_like(a, fill)
        return jnp.concatenate(
            [jnp.concatenate([a, empty], 2), jnp.concatenate([empty, b], 2)], axis=1
        )

    def inputs(self, *arrays):
        """`(arrays, specs)`: arrays by window, then the bias and the masks."""
        pl = compat.pallas()
        specs = [pl.BlockSpec((self.step, *t.shape[1:]), lambda i: (i, 0, 0)) for t in arrays]
        specs.append(pl.BlockSpec(self.bias.shape, lambda i: (0, 0, 0)))
        arrays = [*arrays, self.bias]
        if self.mask is not None:
            cycle, block = self.cycle, (self.step // self.pair, self.rows, self.rows)
            specs.append(pl.BlockSpec(block, lambda i: (jax.lax.rem(i, jnp.int32(cycle)), 0, 0)))
            arrays.append(self.mask)
        return arrays, specs

    def read(self, ref, g):
        """The windows of tile `g`, `[rows, channels]`."""
        if self.pair == 1:
            return ref[g]
        return jnp.concatenate([ref[2 * g], ref[2 * g + 1]], axis=0)

    def write(self, ref, g, columns, tile):
        """A tile of some channels back to its windows."""
        for n in range(self.pair):
            part = tile[n * self.tokens : (n + 1) * self.tokens]
            ref[self.pair * g + n, :, columns] = part.astype(ref.dtype)

    def columns(self, which: int, head: int):
        """The lanes of q, k or v (0, 1, 2) of a head."""
        start = which * self.width + head * self.head_dim
        return slice(start, start + self.head_dim)

    def each_tile(self, body):
        """`body(g)` for the tiles of a step."""
        jax.lax.fori_loop(0, self.step // self.pair, lambda g, _: body(g), None)

    def call(self, kernel, name, arrays, specs, outputs, out_specs, interpret):
        """The pallas_call over steps of windows, in order."""
        pl, pltpu = compat.pallas(), compat.tpu()
        return pl.pallas_call(
            kernel,
            grid=(self.windows // self.step,),
            in_specs=specs,
            out_specs=out_specs,
            out_shape=outputs,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
            ),
            name=f"window_attention_{name}",
            interpret=interpret,
        )(*arrays)


def _softmax(q, k, bias, mask, scale, precision):
    """Weights of one tile, zero in rows that see no key."""
    s = dot(q, k, (1, 1), precision) * scale + bias
    if mask is not None:
        s = s + mask
    top = jnp.maximum(s.max(1, keepdims=True), EMPTY)
    w = jnp.exp(s - top)
    return w * (1.0 / jnp.maximum(w.sum(1, keepdims=True), 1e-37))


def forward(qkv, bias, mask, *, heads: int, scale: float, precision=None, interpret=False):
    """`[windows, tokens, heads * head_dim]` in the type of `qkv`."""
    pl = compat.pallas()
    shape = _Geometry(qkv, bias, mask, heads)
    arrays, specs = shape.inputs(qkv)

    def kernel(qkv_ref, bias_ref, *refs):
        mask_ref, out_ref = (None, *refs)[-2:]

        def tile(g):
            x = shape.read(qkv_ref, g)
            extra = None if mask_ref is None else mask_ref[g]
            for h in range(heads):
                q, k, v = (x[:, shape.columns(n, h)] for n in range(3))
                w = _softmax(q, k, bias_ref[h], extra, scale, precision)
                out = dot(w.astype(v.dtype), v, (1, 0), precision)
                shape.write(out_ref, g, shape.columns(0, h), out)

        shape.each_tile(tile)

    output = jax.ShapeDtypeStruct((*qkv.shape[:2], shape.width), qkv.dtype)
    out_spec = pl.BlockSpec((shape.step, shape.tokens, shape.width), lambda i: (i, 0, 0))
    return shape.call(kernel, "forward", arrays, specs, output, out_spec, interpret)


def backward(qkv, bias, mask, d_out, *, heads: int, scale: float, precision=None, interpret=False):
    """Gradients of `qkv` (its type) and of `bias` (float32, None without a bias)."""
    pl = compat.pallas()
    shape = _Geometry(qkv, bias, mask, heads)
    arrays, specs = shape.inputs(qkv, d_out.astype(qkv.dtype))

    def kernel(qkv_ref, do_ref, bias_ref, *refs):
        mask_ref, d_qkv_ref, d_bias_ref = (None, *refs)[-3:]

        @pl.when(pl.program_id(0) == 0)
        def _():
            d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

        def tile(g):
            x, d = shape.read(qkv_ref, g), shape.read(do_ref, g)
            extra = None if mask_ref is None else mask_ref[g]
            for h in range(heads):
                q, k, v = (x[:, shape.columns(n, h)] for n in range(3))
                do = d[:, shape.columns(0, h)]
                w = _softmax(q, k, bias_ref[h], extra, scale, precision)
                dw = dot(do, v, (1, 1), precision)
                ds = w * (dw - (w * dw).sum(1, keepdims=True))
                d_bias_ref[h] += ds
                d_raw = (ds * scale).astype(q.dtype)
                for n, grad in enumerate(
                    (
                        dot(d_raw, k, (1, 0), precision),
                        dot(d_raw, q, (0, 0), precision),
                        dot(w.astype(do.dtype), do, (0, 0), precision),
                    )
                ):
                    shape.write(d_qkv_ref, g, shape.columns(n, h), grad)

        shape.each_tile(tile)

    outputs = [
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct(shape.bias.shape, jnp.float32),
    ]
    out_specs = [
        pl.BlockSpec((shape.step, *qkv.shape[1:]), lambda i: (i, 0, 0)),
        pl.BlockSpec(shape.bias.shape, lambda i: (0, 0, 0)),
    ]
    d_qkv, d_bias = shape.call(kernel, "backward", arrays, specs, outputs, out_specs, interpret)
    if bias is None:
        return d_qkv, None
    n = shape.tokens
    blocks = (d_bias[:, m * n : (m + 1) * n, m * n : (m + 1) * n] for m in range(shape.pair))
    return d_qkv, sum(blocks)
