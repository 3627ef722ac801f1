"""Attention by cuDNN's flash kernels, through JAX's own binding of them.

cuDNN multiplies hidden weights, which are zero, with values: what is not finite behind a causal
mask would spread, and a gradient that is not finite would spoil what its row does not see. So each
pass asks first whether its arrays are finite, and the plain JAX body runs where they are not.
Where the process has no CUDA device that can run it (a program compiled on another host, a device
older than Ampere), the plain JAX body runs, too. The backward pass computes the forward pass again.

No device has run this: the tests see that programs lower to cuDNN's calls, and that what stands
around them gives the right numbers with another body in their place.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.attention import xla
from kernels_pallas.attention.problem import Gradients, Operands, Problem
from kernels_pallas.masks import Causal
from kernels_pallas.scores import Softmax


def refusal(problem: Problem, x: Operands, wants_lse: bool) -> str | None:
    """Why cuDNN cannot run a call, or None."""
    if {t.dtype for t in x[:3]} - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"query is {x.query.dtype}; cuDNN takes bfloat16 and float16"
    if any(not isinstance(n, int) for t in (x.query, x.key) for n in t.shape):
        return "export leaves a size open"
    width, queries, keys = x.query.shape[3], x.query.shape[2], x.key.shape[2]
    if width != x.value.shape[3] or width > 128 or width % 8:
        return (
            f"heads of {width} and {x.value.shape[3]} channels; cuDNN takes one width, a multiple "
            "of 8 up to 128"
        )
    if any(t is not None for t in x[3:]) or problem.score != Softmax() or problem.dropout:
        return "cuDNN is called for plain softmax only: no bias, segments, lengths, slopes, dropout"
    if problem.mask is not None and (problem.mask != Causal() or problem.offset or queries != keys):
        return "cuDNN is called without a mask or with a causal one of as many queries as keys"
    if wants_lse:
        return "the log-sum-exp is asked for, whose gradient cuDNN has not"
    return None


def _flash(problem: Problem, query, key, value):
    """Output and log-sum-exp; the arrays heads first."""
    heads_last = (t.transpose(0, 2, 1, 3) for t in (query, key, value))
    out, lse = compat.cudnn_attention(
        *heads_last, scale=problem.scale, causal=problem.mask is not None
    )
    return out.transpose(0, 2, 1, 3), lse.astype(jnp.float32)


def _finite(*arrays):
    return jnp.stack([jnp.isfinite(t).all() for t in arrays]).all()


def forward(problem: Problem, x: Operands):
    """Output and log-sum-exp."""

    def plain(*arrays):
        return xla.forward(problem, Operands(*arrays), xla.ACCELERATOR_BLOCK_BYTES)

    if not compat.has_cudnn():
        return plain(*x[:3])
    flash = lambda *arrays: _flash(problem, *arrays)  # noqa: E731
    return jax.lax.cond(_finite(*x[:3]), flash, plain, *x[:3])


def backward(problem: Problem, x: Operands, out, lse, d_out, d_lse):
    """Gradients of query, key and value; the log-sum-exp has none here."""

    def plain(query, key, value, d_out):
        x = Operands(query, key, value)
        grads = xla.backward(problem, x, out, lse, d_out, d_lse, xla.ACCELERATOR_BLOCK_BYTES)
        return grads.query, grads.key, grads.value

    if not compat.has_cudnn():
        return Gradients(*plain(*x[:3], d_out), None, None)

    def flash(query, key, value, d_out):
        _, pull = jax.vjp(lambda *t: _flash(problem, *t)[0], query, key, value)
        return pull(d_out)

    arrays = *x[:3], d_out.astype(x.value.dtype)
    return Gradients(*jax.lax.cond(_finite(*arrays), flash, plain, *arrays), None, None)
