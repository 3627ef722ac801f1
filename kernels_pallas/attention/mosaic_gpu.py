"""Attention for H100 (Pallas, Mosaic GPU): wgmma products, TMA copies, warpgroups with roles.

A program has three warpgroups. One loads: it walks over the blocks that the program visits and
copies two arrays of each into shared memory, two blocks ahead. The other two compute, each for 64
rows of its own: queries in the forward pass and for dq, keys for dk and dv. Tiles of scores always
have queries in rows and keys in columns, so that all passes share one function for them; weights go
through shared memory into the next product, transposed there where a pass needs it. Lengths are
padded to blocks, head sizes to 64 or 128.

Products take all 64 rows and columns of a block, hidden ones too, and zero times NaN would be NaN.
So the arrays are made finite before, and what was not comes as a 0 or NaN for each row, which is
added to the scores before they are masked.

Lowered for an H100 in the tests, and compared with the definition in Pallas's interpreter of GPU
kernels, which runs warpgroups as threads and looks for races. Never run on a device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import compat
from kernels_pallas.attention.problem import Gradients, Operands, Problem, apart, hides
from kernels_pallas.attention.tile import (
    FULL,
    PARTIAL,
    SKIP,
    Axis,
    Tile,
    additive,
    finite,
    flags,
    pad_length,
    quotient,
    remainder,
    row_statistics,
)
from kernels_pallas.masks import Mask
from kernels_pallas.scores import EMPTY, MASKED, Softmax

ROWS = 64  # of a block that is visited, and of a warpgroup's own: the rows of a wgmma product
WORKERS = 2  # warpgroups that compute
AHEAD = 2  # blocks in shared memory
LOADER_REGISTERS, WORKER_REGISTERS = 40, 232  # of a thread; 65,536 in all


def refusal(problem: Problem, x: Operands) -> str | None:
    """Why this body cannot run a call that other kernels can, or None."""
    if not compat.has_mosaic_gpu():
        return f"JAX {jax.__version__} does not lower it; it needs JAX 0.12 or newer"
    if max(x.query.shape[3], x.value.shape[3]) > 128:
        return (
            f"heads of {x.query.shape[3]} and {x.value.shape[3]} channels; the Mosaic GPU kernel "
            "holds up to 128"
        )
    score = problem.score
    if not isinstance(score, Softmax) or score.modify or problem.dropout or x.slopes is not None:
        return "the Mosaic GPU kernel has plain and capped softmax: no modifier, slopes or dropout"
    if problem.mask is not None and not isinstance(problem.mask, Mask):
        return "the mask is a function; the Mosaic GPU kernel takes those of kernels_pallas.masks"
    return None


def _cut(length: int, block: int) -> Axis:
    return Axis(length, block, -(-length // block))


class _Pass:
    """One kernel: a program's own block on one axis, the blocks that it visits on the other.

    A pass by key makes its visits for each query head of the group, `repeats` of them.
    """

    def __init__(self, problem: Problem, x: Operands, by_key: bool):
        self.problem = problem
        self.batch, self.heads, queries, _ = x.query.shape
        self.kv_heads, keys = x.key.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.repeats = self.group if by_key else 1
        q_block, k_block = (ROWS, WORKERS * ROWS) if by_key else (WORKERS * ROWS, ROWS)
        self.q, self.k = _cut(queries, q_block), _cut(keys, k_block)
        self.own = self.k if by_key else self.q
        self.arrays = {}
        if hides(problem, x):  # queries too are NaN where their gradient is not finite
            self.arrays["q_bad"] = _pad(_bad(x.query), self.q.padded)
            self.arrays["k_bad"] = _pad(_bad(x.key) + _bad(x.value), self.k.padded)
            x = x._replace(query=finite(x.query), key=finite(x.key), value=finite(x.value))
        for name, axis in (("query", self.q), ("key", self.k), ("value", self.k)):
            self.arrays[name] = _pad(getattr(x, name), axis.padded)
        if x.bias is not None:
            self.arrays["bias"] = pad_length(pad_length(additive(x.bias), self.q, 2), self.k, 3)
        flag = flags(problem.table_mask, self.q, self.k)
        if x.query_segments is not None:
            for name, t, axis in (("q", x.query_segments, self.q), ("k", x.key_segments, self.k)):
                self.arrays[f"{name}_segments"] = pad_length(t, axis, 1)
            flag = np.minimum(flag, PARTIAL)
        self.visits(flag.T if by_key else flag)

    def visits(self, flag):
        """Adds a table of one row a block: fully visible blocks first; then their counts."""
        index = np.zeros((len(flag), max(1, int((flag != SKIP).sum(1).max()))), np.int32)
        for row, states in enumerate(flag):
            order = np.flatnonzero(states == FULL), np.flatnonzero(states == PARTIAL)
            found = np.concatenate(order)
            index[row, : len(found)] = found
        self.arrays["index"] = jnp.asarray(index)
        self.arrays["full"] = jnp.asarray((flag == FULL).sum(1).astype(np.int32))
        self.arrays["partial"] = jnp.asarray((flag == PARTIAL).sum(1).astype(np.int32))
        self.has = (flag == FULL).any(), (flag == PARTIAL).any()

    def walk(self, refs, row, step, carry):
        """`carry = step(masked, n, block, repeat, carry)` over the visits, n counts them."""
        full, partly = refs["full"][row], refs["partial"][row]

        def at(masked, first, start, count, n, carry):
            m = n - start
            repeat = 0 if self.repeats == 1 else jax.lax.div(m, count)
            block = refs["index"][row, first + (m if self.repeats == 1 else jax.lax.rem(m, count))]
            return step(masked, n, block, repeat, carry)

        middle = full * self.repeats
        if self.has[0]:
            carry = jax.lax.fori_loop(0, middle, partial(at, False, 0, 0, full), carry)
        if self.has[1]:
            end = middle + partly * self.repeats
            carry = jax.lax.fori_loop(middle, end, partial(at, True, full, middle, partly), carry)
        return carry

    def tile(self, refs, b, h, first_q, first_k, raw, masked):
        """The tile of 64 queries and 64 keys from there on, and its products `raw` with marks."""
        plgpu = compat.mosaic_gpu()
        queries, keys = compat.pallas().ds(first_q, ROWS), compat.pallas().ds(first_k, ROWS)

        def load(ref, axis=0):
            return _spread(_load(ref, axis), (ROWS, ROWS), axis)

        def places(axis):
            return plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis, layout=plgpu.Layout.WGMMA)

        if "q_bad" in refs:
            raw = raw + load(refs["q_bad"].at[b, h, queries])
            raw = raw + load(refs["k_bad"].at[b, quotient(h, self.group), keys], 1)
        bias = segments = None
        if "bias" in refs:
            rows, heads, per_query, per_key = refs["bias"].shape
            ref = refs["bias"].at[remainder(b, rows), h if heads > 1 else 0]
            if per_query == self.q.padded and per_key == self.k.padded:
                ref = ref.at[queries, keys]
                bias = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
            elif per_key == self.k.padded:
                bias = load(ref.at[0, keys], 1)
            elif per_query == self.q.padded:
                bias = load(ref.at[queries, 0])
            else:
                bias = _laid_out(jnp.broadcast_to(ref[0, 0], (ROWS, ROWS)))
        if "q_segments" in refs:
            segments = (
                load(refs["q_segments"].at[b, queries]),
                load(refs["k_segments"].at[b, keys], 1),
            )
        tile = Tile(
            places(0) + first_q,
            places(1) + first_k,
            bias=bias,
            q_segments=segments[0] if segments else None,
            k_segments=segments[1] if segments else None,
            masked=masked,
            keys=self.k.length if self.k.padded > self.k.length else None,
        )
        return tile, raw

    def call(self, name, heads, own, stream, extra, work, outputs, interpret):
        """The kernel.

        Args:
          name: of the pass.
          heads: of the grid.
          own: names of the arrays of which each worker keeps 64 rows, its own.
          stream: names of the arrays whose blocks are visited.
          extra: widths of the workers' other blocks in shared memory, by name.
          work: `f(refs, mine, visit, b, h, first)`, a worker's program for the 64 rows from
            `first` on: `mine` are its blocks, `visit(step, carry)` walks with
            `carry = step(masked, query head, first row there, blocks there, carry)`. It returns
            for each result the numbers, and the block through which they leave or None.
          outputs: shapes of the results, with all rows of the own axis.
          interpret: parameters of the interpreter, or False.

        Raises:
          NotImplementedError: if the process has a GPU that is no Hopper.
        """
        device = compat.cuda_capability()
        if device is not None and int(device) != 9:
            raise NotImplementedError(
                f"implementation='mosaic_gpu': the device has compute capability {device}; wgmma "
                "is an instruction of 9.0 (H100, H200)."
            )
        pl, plgpu = compat.pallas(), compat.mosaic_gpu()
        names, arrays = list(self.arrays), list(self.arrays.values())
        dtype = self.arrays["query"].dtype

        def smem(count, name):
            return plgpu.SMEM((count, ROWS, self.arrays[name].shape[3]), dtype)

        scratch = dict(
            own={name: smem(WORKERS, name) for name in own},
            stream={name: smem(AHEAD, name) for name in stream},
            extra={name: plgpu.SMEM((WORKERS, ROWS, n), dtype) for name, n in extra.items()},
            arrived=plgpu.Barrier(num_arrivals=len(own), num_barriers=WORKERS),
            loaded=plgpu.Barrier(num_arrivals=len(stream), num_barriers=AHEAD),
            freed=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=AHEAD),
        )

        def body(*given, **memory):
            refs, outs = dict(zip(names, given, strict=False)), given[len(names) :]
            program, count = jax.lax.axis_index("program"), jnp.int32(self.own.count)
            row, program = jax.lax.rem(program, count), jax.lax.div(program, count)
            h, b = jax.lax.rem(program, jnp.int32(heads)), jax.lax.div(program, jnp.int32(heads))
            worker = jax.lax.axis_index("warpgroup")

            def source(name, head, first):
                if name in ("key", "value") and heads == self.heads:
                    head = quotient(head, self.group)
                return refs[name].at[b, head, pl.ds(first, ROWS), :]

            @pl.when(worker == WORKERS)
            def _():
                plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

                def load(masked, n, block, repeat, carry):
                    slot = jax.lax.rem(n, jnp.int32(AHEAD))
                    pl.when(n >= AHEAD)(lambda: plgpu.barrier_wait(memory["freed"].at[slot]))
                    for name, buffer in memory["stream"].items():
                        head = h * self.repeats + repeat
                        plgpu.copy_gmem_to_smem(
                            source(name, head, block * ROWS),
                            buffer.at[slot],
                            memory["loaded"].at[slot],
                        )
                    return carry

                self.walk(refs, row, load, 0)

            @pl.when(worker < WORKERS)
            def _():
                plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
                first = row * self.own.block + worker * ROWS
                mine = {name: ref.at[worker] for name, ref in memory["own"].items()}
                mine |= {name: ref.at[worker] for name, ref in memory["extra"].items()}
                for name in own:
                    plgpu.copy_gmem_to_smem(
                        source(name, h, first), mine[name], memory["arrived"].at[worker]
                    )
                plgpu.barrier_wait(memory["arrived"].at[worker])

                def visit(step, carry):
                    def at(masked, n, block, repeat, carry):
                        slot = jax.lax.rem(n, jnp.int32(AHEAD))
                        plgpu.barrier_wait(memory["loaded"].at[slot])
                        there = {name: ref.at[slot] for name, ref in memory["stream"].items()}
                        head = h * self.repeats + repeat
                        carry = step(masked, head, block * ROWS, there, carry)
                        plgpu.barrier_arrive(memory["freed"].at[slot])
                        return carry

                    return self.walk(refs, row, at, carry)

                results = work(refs, mine, visit, b, h, first)
                for (buffer, t), ref in zip(results, outs, strict=True):
                    at = ref.at[b, h, pl.ds(first, ROWS)]
                    if buffer is None:
                        plgpu.store(at, t, optimized=False)
                        continue
                    buffer[...] = t.astype(buffer.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, at)
                plgpu.wait_smem_to_gmem(0)

        return plgpu.kernel(
            body,
            out_type=outputs,
            scratch_types=scratch,
            grid=(self.own.count * heads * self.batch,),  # other axes of CUDA end at 65,535
            grid_names=("program",),
            num_threads=WORKERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=self.problem.score.cap is None),
            interpret=interpret,
            kernel_name=f"attention_{name}",
        )(*arrays)


def _bad(t):
    """0 for each row of numbers, NaN where one is not finite."""
    return jnp.where(jnp.isfinite(t).all(-1), 0.0, jnp.nan).astype(jnp.float32)


def _pad(t, length):
    """Zeros up to `length` tokens and a head size of 64 or 128."""
    widths = [(0, 0), (0, 0), (0, length - t.shape[2])]
    return jnp.pad(t, widths + [(0, -t.shape[3] % 64)] if t.ndim == 4 else widths)


def _load(ref, axis: int):
    """One number for each row of a tile (axis 0) or each column, from global memory."""
    plgpu = compat.mosaic_gpu()
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def _spread(t, shape, axis: int = 0):
    """One number for each row of a tile (axis 0) or each column, over the tile."""
    return jax.lax.broadcast_in_dim(t, shape, (axis,))


def _laid_out(t):
    """A constant as wgmma's results lie in registers: a tile, or one number for each row."""
    plgpu = compat.mosaic_gpu()
    layout = plgpu.Layout.WGMMA if t.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(t, layout)


def _product(a, b):
    """`a @ b` of two blocks in shared memory, in float32."""
    pl, plgpu = compat.pallas(), compat.mosaic_gpu()

    def multiply(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    shape = a.shape[0], b.shape[1]
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _turned(ref):
    return ref.transpose((1, 0))


def forward(problem: Problem, x: Operands, *, interpret=False):
    """Output in the value's type and log-sum-exp in float32."""
    plan = _Pass(problem, x, by_key=False)
    width = plan.arrays["value"].shape[3]

    def work(refs, mine, visit, b, h, first):
        def step(masked, head, first_k, there, carry):
            top, total, acc = carry
            raw = _product(mine["query"], _turned(there["key"]))
            tile, raw = plan.tile(refs, b, h, first, first_k, raw, masked)
            s = tile.finish(problem, raw)[0]
            new = jnp.maximum(top, s.max(1))
            w, keep = jnp.exp(s - _spread(new, (ROWS, ROWS))), jnp.exp(top - new)
            mine["weights"][...] = w.astype(x.value.dtype)
            compat.mosaic_gpu().commit_smem()
            acc = acc * _spread(keep, (ROWS, width)) + _product(mine["weights"], there["value"])
            return new, total * keep + w.sum(1), acc

        start = (
            jnp.full((ROWS,), EMPTY, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
            jnp.zeros((ROWS, width), jnp.float32),
        )
        top, total, acc = visit(step, tuple(map(_laid_out, start)))
        some = jnp.maximum(total, 1e-37)
        lse = jnp.where(total == 0, MASKED, top + jnp.log(some))
        return (mine["out"], acc / _spread(some, (ROWS, width))), (None, lse)

    shape = plan.batch, plan.heads, plan.q.padded
    out, lse = plan.call(
        "forward", plan.heads, ["query"], ["key", "value"], dict(weights=ROWS, out=width), work,
        [
            jax.ShapeDtypeStruct((*shape, width), x.value.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        interpret,
    )  # fmt: skip
    return out[:, :, : plan.q.length, : x.value.shape[3]], lse[:, :, : plan.q.length]


def backward(problem: Problem, x: Operands, out, lse, d_out, d_lse, *, interpret=False):
    """Gradients of query, key and value; those of a bias are left to XLA's form."""
    x, d_out = apart(problem, x, d_out)
    stats = row_statistics(problem, x, out, lse, d_out, d_lse)
    dq = _by_query(problem, x, stats, interpret)
    dk, dv = _by_key(problem, x, stats, interpret)
    return Gradients(dq, dk, dv, None, None)


def _with_rows(problem, x, stats, by_key):
    plan = _Pass(problem, x, by_key)
    fills = 0, -MASKED, 0  # no weight in padded rows
    for name, t, fill in zip(("d_out", "lse", "delta"), stats, fills, strict=True):
        plan.arrays[name] = (
            _pad(t, plan.q.padded) if t.ndim == 4 else pad_length(t, plan.q, 2, fill)
        )
    return plan


def _gradients(plan, refs, b, h, first_q, first_k, masked, there):
    """Weights, and gradients of the products q.k, of a tile; `there` are the four blocks."""
    rows = compat.pallas().ds(first_q, ROWS)
    lse, delta = (
        _spread(_load(refs[name].at[b, h, rows], 0), (ROWS, ROWS)) for name in ("lse", "delta")
    )
    raw = _product(there["query"], _turned(there["key"]))
    dw = _product(there["d_out"], _turned(there["value"]))
    tile, raw = plan.tile(refs, b, h, first_q, first_k, raw, masked)
    w, _, d_raw = tile.gradients(plan.problem, raw, dw, lse, delta)
    return w, d_raw


def _by_query(problem, x, stats, interpret):
    """`dq`."""
    plan = _with_rows(problem, x, stats, by_key=False)
    width = plan.arrays["query"].shape[3]

    def work(refs, mine, visit, b, h, first):
        def step(masked, head, first_k, there, dq):
            _, d_raw = _gradients(plan, refs, b, h, first, first_k, masked, mine | there)
            mine["slopes"][...] = d_raw.astype(x.key.dtype)
            compat.mosaic_gpu().commit_smem()
            return dq + _product(mine["slopes"], there["key"])

        dq = visit(step, _laid_out(jnp.zeros((ROWS, width), jnp.float32)))
        return ((mine["query"], dq),)

    output = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.q.padded, width), x.query.dtype)
    (dq,) = plan.call(
        "dq", plan.heads, ["query", "d_out"], ["key", "value"], dict(slopes=ROWS), work,
        [output], interpret,
    )  # fmt: skip
    return dq[:, :, : plan.q.length, : x.query.shape[3]]


def _by_key(problem, x, stats, interpret):
    """`dk` and `dv`, summed over the query heads of a group."""
    plan = _with_rows(problem, x, stats, by_key=True)
    widths = plan.arrays["key"].shape[3], plan.arrays["value"].shape[3]

    def work(refs, mine, visit, b, h, first):
        def step(masked, head, first_q, there, carry):
            dk, dv = carry
            found = _gradients(plan, refs, b, head, first_q, first, masked, mine | there)
            for name, t in zip(("weights", "slopes"), found, strict=True):
                mine[name][...] = t.astype(x.key.dtype)
            compat.mosaic_gpu().commit_smem()
            dv = dv + _product(_turned(mine["weights"]), there["d_out"])
            return dk + _product(_turned(mine["slopes"]), there["query"]), dv

        start = (_laid_out(jnp.zeros((ROWS, width), jnp.float32)) for width in widths)
        dk, dv = visit(step, tuple(start))
        return (mine["key"], dk), (mine["value"], dv)

    outputs = [
        jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.k.padded, width), x.key.dtype)
        for width in widths
    ]
    grads = plan.call(
        "dkv", plan.kv_heads, ["key", "value"], ["query", "d_out"],
        dict(weights=ROWS, slopes=ROWS), work, outputs, interpret,
    )  # fmt: skip
    return tuple(g[:, :, : plan.k.length, : t.shape[3]] for g, t in zip(grads, x[1:3], strict=True))
