"""Chunked recurrences for NVIDIA GPUs (Pallas-Triton).

One program for a block of value columns of one head: it walks over the steps, sixteen at once,
with its columns of the state in registers. Columns do not meet in any of the recurrences, so that
blocks are independent; scores are formed again in each. With gates by channel (and no delta rule)
blocks of 64 key channels do not meet either: they are heads here, whose outputs XLA adds, as more
channels do not fit the registers. Sixteen steps, whatever the chunk of the call: sums of decays are
products of float32, which fill the registers where they are larger.

The backward first runs the forward again, for the states before every sixteen steps; then it walks
from last to first and differentiates the arithmetic of a chunk (`tile.step`) inside the kernel. Its
products take operands in the type of the values, cotangents too: Triton multiplies no two types,
and in float32 they would not fit the registers (of the gated delta rule's backward 96 bytes do
not: it solves, and sums decays, in float32). What belongs to several programs (queries, keys,
decays) comes back in parts, which XLA adds.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.attention.tile import quotient
from kernels_pallas.recurrence import tile
from kernels_pallas.recurrence.problem import Gradients, Operands, Problem

STEPS = 16  # done at once
COLUMNS = 32  # of the values, in one program
KEYS = 64  # most channels with their own gates in one program
WARPS = 8
NAMES = ("query", "key", "value", "log_decay", "beta")


def _power(n: int) -> int:
    """The next power of two, at least 16: what Triton multiplies."""
    return max(16, 1 << (n - 1).bit_length())


def _pad(t, axis, size):
    return jnp.pad(t, [(0, size - n if a == axis % t.ndim else 0) for a, n in enumerate(t.shape)])


class _Call:
    """Padded arrays, addresses, and the pallas_call."""

    def __init__(self, problem: Problem, x: Operands):
        self.problem = replace(problem, chunk=STEPS)
        self.batch, self.heads, self.length, self.value_dim = x.value.shape
        self.key_dim = x.key.shape[3]
        self.group = self.heads // x.key.shape[1]
        self.kept, self.inner = self.length // problem.chunk, problem.chunk // STEPS
        self.vector = x.log_decay is not None and x.log_decay.shape[3] > 1
        alone = self.vector and x.beta is None and self.group == 1
        self.split = -(-self.key_dim // KEYS) if alone else 1
        self.keys = _power(self.key_dim) if self.split == 1 else KEYS
        self.programs, self.dtype = self.heads * self.split, x.value.dtype
        self.part_dtype = self.dtype if self.split == 1 else jnp.float32
        self.values = _power(self.value_dim)
        self.columns = min(COLUMNS, self.values)
        self.blocks = self.values // self.columns
        self.names = [name for name in NAMES if getattr(x, name) is not None]
        self.arrays = []
        for name in self.names:
            t = getattr(x, name)
            if name == "value":
                t = _pad(t, 3, self.values)
            elif t.shape[3] > 1:
                t = self.by_keys(t, 3) if self.split > 1 else _pad(t, 3, self.keys)
            else:
                t = t[..., 0]
            self.arrays.append(t)

    def by_keys(self, t, axis):
        """`[batch, heads, ..., key_dim, ...]` with its blocks of keys as heads."""
        axis %= t.ndim
        t = _pad(t, axis, self.split * self.keys)
        t = t.reshape(*t.shape[:axis], self.split, self.keys, *t.shape[axis + 1 :])
        t = jnp.moveaxis(t, axis, 2)
        return t.reshape(self.batch, self.programs, *t.shape[3:])

    def joined(self, t, axis):
        """The way back."""
        axis %= t.ndim
        t = t.reshape(self.batch, self.heads, self.split, *t.shape[2:])
        t = jnp.moveaxis(t, 2, axis)
        t = t.reshape(*t.shape[:axis], -1, *t.shape[axis + 2 :])
        return lax.slice_in_dim(t, 0, self.key_dim, axis=axis)

    def added(self, t):
        """What blocks of keys give to one `[batch, heads, length, value_dim]`, as `value` is."""
        t = t.reshape(self.batch, self.heads, self.split, *t.shape[2:])
        return t.sum(2)[..., : self.value_dim].astype(self.dtype)

    def state(self, t):
        """A state, or several, padded."""
        return self.by_keys(_pad(t, -1, self.values), -2)

    def here(self):
        """`(block of columns, its columns, head, batch row)` of a program."""
        pl = compat.pallas()
        block = pl.program_id(0)
        return block, pl.ds(block * self.columns, self.columns), pl.program_id(1), pl.program_id(2)

    def rows(self, c):
        """The steps that are done at once."""
        return compat.pallas().ds(c * STEPS, STEPS)

    def read(self, refs, b, h, c, columns):
        """The values of sixteen steps by name."""
        group, at, found = quotient(h, self.group), self.rows(c), {}
        for name, ref in zip(self.names, refs, strict=True):
            if name in ("query", "key"):
                found[name] = ref[b, group, at, :]
            elif name == "value":
                found[name] = ref[b, quotient(h, self.split), at, columns]
            elif len(ref.shape) == 4:
                found[name] = ref[b, h, at, :]
            else:
                found[name] = ref[b, h, at][:, None]
        return found

    def step(self, values, state, product=None, scores=tile.scores_in_a_loop):
        """`tile.step` on what `read` gives."""
        if "log_decay" not in values:
            values = {**values, "log_decay": jnp.zeros((STEPS, 1), jnp.float32)}
        operands = (values.get(name) for name in NAMES)
        return tile.step(self.problem, *operands, state, product, scores)

    def run(self, kernel, name, outputs, interpret):
        """The pallas_call; `outputs` are `(shape, dtype)`."""
        pl, triton = compat.pallas(), compat.triton()
        return pl.pallas_call(
            kernel,
            grid=(self.blocks, self.programs, self.batch),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
            name=f"recurrence_{name}",
            interpret=interpret,
        )(*self.arrays)


def forward(problem: Problem, x: Operands, *, keep=False, interpret=False):
    """Output and final state, and with `keep` the states before every chunk."""
    call = _Call(problem, x)
    call.arrays.append(call.state(x.state))
    n = len(call.names)

    def kernel(*refs):
        initial, out, final, *states = refs[n:]
        _, columns, h, b = call.here()

        def chunk(c, state):
            for ref in states:
                ref[b, h, c, :, columns] = state

            def step(i, state):
                i = c * call.inner + i
                o, after = call.step(call.read(refs[:n], b, h, i, columns), state)
                out[b, h, call.rows(i), columns] = o.astype(out.dtype)
                return after

            return step(0, state) if call.inner == 1 else lax.fori_loop(0, call.inner, step, state)

        start = initial[b, h, :, columns]
        final[b, h, :, columns] = lax.fori_loop(0, call.kept, chunk, start)

    per_head, state = (call.batch, call.programs), (call.keys, call.values)
    outputs = [
        ((*per_head, call.length, call.values), call.part_dtype),
        ((*per_head, *state), jnp.float32),
    ]
    outputs += [((*per_head, call.kept, *state), jnp.float32)] if keep else []
    out, *states = call.run(kernel, "forward", outputs, interpret)
    return call.added(out), *(call.joined(t, -2)[..., : call.value_dim] for t in states)


def backward(problem: Problem, x: Operands, states, d_out, d_final, *, interpret=False):
    """Gradients in the operands' types, decays, strengths and states in float32."""
    problem = replace(problem, chunk=STEPS)
    *_, states = forward(problem, x, keep=True, interpret=interpret)
    call = _Call(problem, x)
    call.arrays += [call.state(states), _pad(d_out, 3, call.values), call.state(d_final)]
    n = len(call.names)
    product = partial(tile.product_of_one_type, x.value.dtype, problem.precision)
    step = partial(call.step, product=product, scores=tile.scores_with_derivative)

    def kernel(*refs):
        before, d_out, d_final = refs[n : n + 3]
        *grads, d_initial = refs[n + 3 :]
        block, columns, h, b = call.here()

        def chunk(i, d_state):
            c = call.kept - 1 - i
            at = call.rows(c)
            values = call.read(refs[:n], b, h, c, columns)
            values = {name: t.astype(jnp.float32) for name, t in values.items()}
            _, pull = jax.vjp(step, values, before[b, h, c, :, columns])
            of_out = d_out[b, quotient(h, call.split), at, columns]
            found, d_state = pull((of_out.astype(jnp.float32), d_state))
            for name, ref in zip(call.names, grads, strict=True):
                grad = found[name].astype(ref.dtype)
                if name == "value":
                    ref[b, h, at, columns] = grad
                elif len(ref.shape) == 5:
                    ref[block, b, h, at, :] = grad
                else:
                    ref[block, b, h, at] = grad.sum(1)
            return d_state

        start = d_final[b, h, :, columns]
        d_initial[b, h, :, columns] = lax.fori_loop(0, call.kept, chunk, start)

    steps = (call.batch, call.programs, call.length)
    parts = {name: ((call.blocks, *steps, call.keys), jnp.float32) for name in NAMES}
    parts["value"] = ((*steps, call.values), call.part_dtype)
    parts["beta"] = ((call.blocks, *steps), jnp.float32)
    if not call.vector:
        parts["log_decay"] = parts["beta"]
    outputs = [parts[name] for name in call.names]
    outputs.append(((*steps[:2], call.keys, call.values), jnp.float32))
    *grads, d_state = call.run(kernel, "backward", outputs, interpret)
    named = dict(zip(call.names, grads, strict=True))
    for name, t in named.items():
        like = getattr(x, name)
        if name == "value":
            t = call.added(t)
        elif call.split > 1:
            t = call.joined(t.sum(0), 3)
        elif name in ("query", "key"):
            t = t.sum(0).reshape(call.batch, -1, call.group, call.length, call.keys).sum(2)
        else:
            t = t.sum(0)
            t = t[..., None] if t.ndim == 3 else t
        named[name] = t[..., : like.shape[3]].astype(like.dtype)
    d_state = call.joined(d_state, -2)[..., : call.value_dim]
    return Gradients(**{"log_decay": None, "beta": None, **named, "state": d_state})
