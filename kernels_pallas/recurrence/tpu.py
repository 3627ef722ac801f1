"""Chunked recurrences for TPU (Mosaic).

Grid: batch, groups, chunks, heads of a group; the last two run in order. The states of a group's
heads stay in vector memory from chunk to chunk (in the block of the last result), and a group's
queries and keys are read once for all its heads. Numbers per step (decays per head, write
strengths) come as rows, which cost no padding to 128 lanes, and are turned inside.

The backward walks the chunks from last to first, with the state before each chunk as the forward
wrote it, and differentiates the arithmetic of a chunk (`tile.step`) inside the kernel.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.recurrence import tile
from kernels_pallas.recurrence.problem import Gradients, Operands, Problem

VMEM_BYTES = 96 << 20


class _Call:
    """Blocks of a call; `last_first` reverses the chunks."""

    def __init__(self, problem: Problem, x: Operands, *, last_first=False):
        self.batch, self.groups, length, self.key_dim = x.query.shape
        self.heads, self.value_dim = x.value.shape[1], x.value.shape[3]
        self.group = self.heads // self.groups
        self.chunk, self.chunks = problem.chunk, length // problem.chunk
        self.last_first = last_first
        self.arrays, self.specs = [], []

    def at(self, c):
        """The chunk of a grid point."""
        return self.chunks - 1 - c if self.last_first else c

    def spec(self, kind: str, width: int | None = None):
        """`(array shape, block, index map)` of a kind of array."""
        per_head = (self.batch, self.heads)
        state = (self.key_dim, self.value_dim)
        padded = self.chunks * self.chunk
        head = lambda b, g, c, r: (b, g * self.group + r)  # noqa: E731
        return {
            "group": (
                (self.batch, self.groups, padded, width),
                (1, 1, self.chunk, width),
                lambda b, g, c, r: (b, g, self.at(c), 0),
            ),
            "head": (
                (*per_head, padded, width),
                (1, 1, self.chunk, width),
                lambda *p: (*head(*p), self.at(p[2]), 0),
            ),
            "row": (
                (*per_head, self.chunks, 1, self.chunk),
                (1, 1, 1, 1, self.chunk),
                lambda *p: (*head(*p), self.at(p[2]), 0, 0),
            ),
            "states": (
                (*per_head, self.chunks, *state),
                (1, 1, 1, *state),
                lambda *p: (*head(*p), self.at(p[2]), 0, 0),
            ),
            "state": (
                (*per_head, *state),
                (1, self.group, *state),
                lambda b, g, c, r: (b, g, 0, 0),
            ),
        }[kind]

    def add(self, kind: str, t):
        """One more input, if it is there."""
        if t is not None:
            shape, block, index_map = self.spec(kind, t.shape[-1])
            self.arrays.append(t.reshape(shape))
            self.specs.append(compat.pallas().BlockSpec(block, index_map))

    def operands(self, x: Operands):
        """The inputs of a chunk, and their names."""
        named = dict(query="group", key="group", value="head", log_decay="head", beta="row")
        if x.log_decay is not None and x.log_decay.shape[-1] == 1:
            named["log_decay"] = "row"
        for name, kind in named.items():
            self.add(kind, getattr(x, name))
        return {name: kind for name, kind in named.items() if getattr(x, name) is not None}

    def run(self, kernel, name, outputs, scratch, interpret):
        """The pallas_call; `outputs` are `(kind, width, dtype)`."""
        pl, pltpu = compat.pallas(), compat.tpu()
        outputs = [(self.spec(kind, width), dtype) for kind, width, dtype in outputs]
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for (shape, _, _), dtype in outputs],
            grid=(self.batch, self.groups, self.chunks, self.group),
            in_specs=self.specs,
            out_specs=[pl.BlockSpec(block, at) for (_, block, at), _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            name=f"recurrence_{name}",
            interpret=interpret,
        )(*self.arrays)


def _read(kinds, refs):
    """The values of a chunk by name; rows become columns in `_step`."""
    return {
        name: ref[(0,) * (len(ref.shape) - 2)]
        for (name, _), ref in zip(kinds.items(), refs, strict=True)
    }


def _step(problem: Problem, kinds, values, state):
    """`tile.step` on what the blocks hold."""
    columns = {name: tile.as_column(t) if kinds[name] == "row" else t for name, t in values.items()}
    return tile.step(
        problem,
        columns["query"],
        columns["key"],
        columns["value"],
        columns.get("log_decay"),
        columns.get("beta"),
        state,
    )


def forward(problem: Problem, x: Operands, *, keep=False, interpret=False):
    """Output and final state, and with `keep` the states before every chunk."""
    pl = compat.pallas()
    call = _Call(problem, x)
    kinds = call.operands(x)
    call.add("state", x.state)

    def kernel(*refs):
        ins, initial = refs[: len(kinds)], refs[len(kinds)]
        out, memory, *states = refs[len(kinds) + 1 :]
        c, r = pl.program_id(2), pl.program_id(3)

        @pl.when(c == 0)
        def _():
            memory[0, r] = initial[0, r]

        before = memory[0, r]
        for ref in states:
            ref[0, 0, 0] = before
        o, after = _step(problem, kinds, _read(kinds, ins), before)
        out[0, 0] = o.astype(out.dtype)
        memory[0, r] = after

    outputs = [("head", call.value_dim, x.value.dtype), ("state", None, jnp.float32)]
    outputs += [("states", None, jnp.float32)] if keep else []
    return tuple(call.run(kernel, "forward", outputs, [], interpret))


def backward(problem: Problem, x: Operands, states, d_out, d_final, *, interpret=False):
    """Gradients in the operands' types, decays, strengths and states in float32."""
    pl = compat.pallas()
    call = _Call(problem, x, last_first=True)
    kinds = call.operands(x)
    call.add("states", states)
    call.add("head", d_out)
    call.add("state", d_final)
    n = len(kinds)

    def kernel(*refs):
        ins, (before, d_out, d_final) = refs[:n], refs[n : n + 3]
        grads, (memory, d_query, d_key) = refs[n + 3 : 2 * n + 3], refs[2 * n + 3 :]
        c, r = pl.program_id(2), pl.program_id(3)

        @pl.when(c == 0)
        def _():
            memory[0, r] = d_final[0, r]

        @pl.when(r == 0)
        def _():
            d_query[...] = jnp.zeros_like(d_query)
            d_key[...] = jnp.zeros_like(d_key)

        step = partial(_step, problem, kinds)
        _, pull = jax.vjp(step, _read(kinds, ins), before[0, 0, 0])
        found, d_before = pull((d_out[0, 0].astype(jnp.float32), memory[0, r]))
        memory[0, r] = d_before
        d_query[...] += found.pop("query").astype(jnp.float32)
        d_key[...] += found.pop("key").astype(jnp.float32)
        for name, ref in zip(list(kinds)[2:], grads[2:], strict=True):
            ref[(0,) * (len(ref.shape) - 2)] = found[name].astype(ref.dtype)

        @pl.when(r == call.group - 1)
        def _():
            grads[0][0, 0] = d_query[...].astype(grads[0].dtype)
            grads[1][0, 0] = d_key[...].astype(grads[1].dtype)

    outputs = [
        (kind, getattr(x, name).shape[-1], getattr(x, name).dtype) for name, kind in kinds.items()
    ]
    outputs.append(("state", None, jnp.float32))
    tall = (call.chunk, call.key_dim)
    *grads, d_initial = call.run(kernel, "backward", outputs, [tall, tall], interpret)
    named = {name: t.reshape(getattr(x, name).shape) for name, t in zip(kinds, grads, strict=True)}
    return Gradients(**{"log_decay": None, "beta": None, **named, "state": d_initial})
