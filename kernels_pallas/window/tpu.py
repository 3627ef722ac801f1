"""Window attention for TPU (Mosaic), a window's tokens in rows.

A step reads some windows of `[windows, tokens, channels]` as they lie: tokens in sublanes, heads
packed in lanes, nothing transposed or padded outside; either the one array of a fused projection,
or queries, keys and values, whose windows may differ in size (HAT's overlapping windows). Windows
of up to 64 tokens are joined in pairs, so that one tile of scores fills the 128 lanes; the bias
becomes block-diagonal for it and stays in vector memory. The backward kernel forms the weights
again from the operands, reads nothing else than the output's gradient, and sums the bias gradient
in place over all windows.

Where tokens or channels do not fill registers (49 rows, 288 lanes), XLA stores the arrays in
another order, and copies would surround this kernel: `tpu_lanes.py` takes those that fit on chip.
What is missed: windows of 392 tokens do not, as the table of bias and mask in lanes would take
79 MB a head. 2.3 times the necessary bytes move forward with 3 heads, 1.5 times with 4: the mask,
stored with windows innermost, is copied to rows of 392 in 512 lanes, and 288 channels to 384. With
HAT's three arrays and heads of 30 it is 4.6 times (README.md of the package).
"""

import jax
import jax.numpy as jnp

from kernels_pallas import chips, compat
from kernels_pallas.attention.tile import dot, finite, marked, seen_only
from kernels_pallas.scores import EMPTY, MASKED

WINDOWS_PER_STEP = 8


class _Geometry:
    """How windows are grouped: `pair` in a tile, `step` in a grid step."""

    def __init__(self, arrays, bias, mask, heads: int):
        self.windows, self.queries, _ = arrays[0].shape
        self.keys, self.heads, self.fused = arrays[-1].shape[1], heads, len(arrays) == 1
        parts = 3 if self.fused else 1
        widths = [t.shape[2] // parts for t in arrays] * parts
        self.widths = widths[0] // heads, widths[2] // heads  # of a query's, of a value's head
        masks = 1 if mask is None else mask.shape[0]
        cycle = self.windows if masks == 1 else masks
        self.pair = 2 if max(self.queries, self.keys) <= 64 and cycle % 2 == 0 else 1
        most = WINDOWS_PER_STEP if self.pair == 2 else 1
        self.step = max(n for n in range(self.pair, most + 1, self.pair) if cycle % n == 0)
        table = jnp.zeros((heads, self.queries, self.keys), jnp.float32)
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
            paired = mask.reshape(-1, self.pair, self.queries, self.keys)
            self.mask = self.diagonal(paired, len(paired), 0.0)
        self.cycle = cycle // self.step

    def diagonal(self, t, lead: int, fill):
        """`[lead, (pair,) n, m]` to block-diagonal `[lead, pair * n, pair * m]`."""
        if self.pair == 1:
            return t.reshape(lead, self.queries, self.keys)
        a, b = (t, t) if t.ndim == 3 else (t[:, 0], t[:, 1])
        empty = jnp.full_like(a, fill)
        return jnp.concatenate(
            [jnp.concatenate([a, empty], 2), jnp.concatenate([empty, b], 2)], axis=1
        )

    def spec(self, t):
        """Blocks of windows."""
        return compat.pallas().BlockSpec((self.step, *t.shape[1:]), lambda i: (i, 0, 0))

    def whole(self, t):
        """All of an array, in every step."""
        return compat.pallas().BlockSpec(t.shape, lambda i: (0, 0, 0))

    def inputs(self, *arrays):
        """`(arrays, specs)`: arrays by window, then the bias and the masks."""
        specs = [*map(self.spec, arrays), self.whole(self.bias)]
        arrays = [*arrays, self.bias]
        if self.mask is not None:
            cycle, block = self.cycle, (self.step // self.pair, *self.mask.shape[1:])
            index = lambda i: (jax.lax.rem(i, jnp.int32(cycle)), 0, 0)  # noqa: E731
            specs.append(compat.pallas().BlockSpec(block, index))
            arrays.append(self.mask)
        return arrays, specs

    def read(self, ref, g):
        """The windows of tile `g`, `[rows, channels]`."""
        if self.pair == 1:
            return ref[g]
        return jnp.concatenate([ref[2 * g], ref[2 * g + 1]], axis=0)

    def write(self, ref, g, columns, tile):
        """A tile of some channels back to its windows."""
        n = ref.shape[1]
        for m in range(self.pair):
            part = tile[m * n : (m + 1) * n]
            ref[self.pair * g + m, :, columns] = part.astype(ref.dtype)

    def tiles(self, refs, g):
        """q, k and v of tile `g`, all heads: one array thrice if it is fused."""
        every = [self.read(ref, g) for ref in refs]
        return every * 3 if self.fused else every

    def columns(self, which: int, head: int):
        """The lanes of q, k or v (0, 1, 2) of a head."""
        width = self.widths[which == 2]
        start = ((which * self.heads if self.fused else 0) + head) * width
        return slice(start, start + width)

    def of_out(self, head: int):
        """The lanes of a head in the output."""
        return slice(head * self.widths[1], (head + 1) * self.widths[1])

    def each_tile(self, body):
        """`body(g)` for the tiles of a step."""
        if self.step == self.pair:
            return body(0)
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
                dimension_semantics=("arbitrary",), vmem_limit_bytes=chips.vmem_bytes()
            ),
            name=f"window_attention_{name}",
            interpret=interpret,
        )(*arrays)


def _softmax(q, k, v, bias, mask, scale, precision):
    """Weights of one tile, zero where a key is hidden; NaN in rows that see what is not finite."""
    extra = bias if mask is None else bias + mask
    s = dot(q, marked(k, v), (1, 1), precision) * scale
    s = jnp.where(extra > MASKED, s + extra, MASKED)
    w = jnp.exp(s - jnp.maximum(s.max(1, keepdims=True), EMPTY))
    w = w * (1.0 / jnp.maximum(w.sum(1, keepdims=True), 1e-37))
    return jnp.where(s <= EMPTY, 0.0, w)


def forward(arrays, bias, mask, *, heads: int, scale: float, precision=None, interpret=False):
    """`[windows, queries, heads * value_dim]` in the type of the last of `arrays`.

    `arrays` are `(qkv,)` or `(q, k, v)`, each `[windows, tokens, channels]`.
    """
    shape = _Geometry(arrays, bias, mask, heads)
    operands, specs = shape.inputs(*arrays)
    count = len(arrays)

    def kernel(*refs):
        of_windows, (bias_ref, *refs) = refs[:count], refs[count:]
        mask_ref, out_ref = (None, *refs)[-2:]

        def tile(g):
            every = shape.tiles(of_windows, g)
            extra = None if mask_ref is None else mask_ref[g]
            for h in range(heads):
                q, k, v = (t[:, shape.columns(n, h)] for n, t in enumerate(every))
                w = _softmax(q, k, v, bias_ref[h], extra, scale, precision)
                out = dot(w.astype(v.dtype), finite(v), (1, 0), precision)
                shape.write(out_ref, g, shape.of_out(h), out)

        shape.each_tile(tile)

    sizes = (shape.windows, shape.queries, heads * shape.widths[1])
    output = jax.ShapeDtypeStruct(sizes, arrays[-1].dtype)
    return shape.call(kernel, "forward", operands, specs, output, shape.spec(output), interpret)


def backward(
    arrays, bias, mask, d_out, *, heads: int, scale: float, precision=None, interpret=False
):
    """Gradients of `arrays`, in their types, and of `bias` (float32, None without a bias)."""
    pl = compat.pallas()
    shape = _Geometry(arrays, bias, mask, heads)
    operands, specs = shape.inputs(*arrays, d_out.astype(arrays[-1].dtype))
    count = len(arrays)

    def kernel(*refs):
        of_windows, (do_ref, bias_ref, *refs) = refs[:count], refs[count:]
        mask_ref, *grads, d_bias_ref = (None, *refs)[-count - 2 :]
        grads = grads * 3 if shape.fused else grads

        @pl.when(pl.program_id(0) == 0)
        def _():
            d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

        def tile(g):
            every, d = shape.tiles(of_windows, g), shape.read(do_ref, g)
            extra = None if mask_ref is None else mask_ref[g]
            for h in range(heads):
                q, k, v = (t[:, shape.columns(n, h)] for n, t in enumerate(every))
                do = d[:, shape.of_out(h)]
                w = _softmax(q, k, v, bias_ref[h], extra, scale, precision)
                dw = seen_only(w, dot(do, finite(v), (1, 1), precision))
                ds = seen_only(w, w * (dw - (w * dw).sum(1, keepdims=True)))
                d_bias_ref[h] += ds
                d_raw = (ds * scale).astype(q.dtype)
                w = seen_only(w, w + 0.0 * dw)  # NaN where the output's gradient is
                products = (
                    dot(d_raw, finite(k), (1, 0), precision),
                    dot(d_raw, finite(q), (0, 0), precision),
                    dot(w.astype(do.dtype), finite(do), (0, 0), precision),
                )
                for n, (ref, product) in enumerate(zip(grads, products, strict=True)):
                    shape.write(ref, g, shape.columns(n, h), product)

        shape.each_tile(tile)

    outputs = [
        *(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in arrays),
        jax.ShapeDtypeStruct(shape.bias.shape, jnp.float32),
    ]
    out_specs = [*map(shape.spec, outputs[:-1]), shape.whole(outputs[-1])]
    *gradients, d_bias = shape.call(
        kernel, "backward", operands, specs, outputs, out_specs, interpret
    )
    if bias is None:
        return tuple(gradients), None
    n, k = shape.queries, shape.keys
    blocks = (d_bias[:, m * n : (m + 1) * n, m * k : (m + 1) * k] for m in range(shape.pair))
    return tuple(gradients), sum(blocks)
