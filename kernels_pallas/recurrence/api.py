"""The recurrences: one door to every body, and the single steps for decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import (
    PLATFORM_OF,
    check_implementation,
    reason_for_xla,
    stated_precision,
    tell,
)
from kernels_pallas.recurrence import packed, scan, xla
from kernels_pallas.recurrence.choice import run
from kernels_pallas.recurrence.problem import Operands, Problem
from kernels_pallas.recurrence.tile import LOWEST_LOG_DECAY

SMALLEST_CHUNK = 16
LARGEST_SCAN_CHUNK = 128


def gated_linear_attention(
    query: Float[Array, "batch length heads key_dim"],
    key: Float[Array, "batch length heads key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    log_decay: Float[Array, "batch length heads #key_dim"] | None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    cu_seqlens: Int[Array, "sequences+1"] | None = None,
    chunk: int = 64,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """Linear attention with a forget gate: `S = diag(exp g) S + k v^T`, `o = scale * q S`.

    One gate per key channel is GLA (arXiv 2312.06635); one per head is Mamba-2 and, if constant,
    retention; None is plain causal linear attention. The work is matrix products inside chunks;
    memory is linear in the length (one state per chunk for the backward), and no exponent is
    positive, so any decay is safe. A gate of -inf (or below -10000) forgets everything: the
    first steps of packed sequences.

    Args:
      query: `[batch, length, heads, key_dim]`.
      key: `[batch, length, heads, key_dim]`.
      value: `[batch, length, heads, value_dim]`.
      log_decay: g <= 0, `[batch, length, heads, key_dim or 1]`, or None for no decay.
      scale: of the output; `key_dim ** -0.5` if None.
      initial_state: S before the first step; zeros if None.
      cu_seqlens: where packed sequences begin and end, from 0 to length, with a batch of one: each
        has a state of its own, `[sequences, heads, ...]` before and after. Runs in XLA.
      chunk: steps done at once, a power of two from 16.
      implementation: None or "xla": there is no kernel (README.md of the package says why).
      precision: of the large matrix products, as in `jax.lax.dot_general`. Sums of decays and the
        state are always float32.

    Returns:
      Output `[batch, length, heads, value_dim]` in the value's type, and the final state in
      float32.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    _check_heads(query, key, value)
    key_dim = key.shape[3]
    _check("log_decay", log_decay, tuple((*value.shape[:3], n) for n in (1, key_dim)))
    scale = key_dim**-0.5 if scale is None else float(scale)
    return _chunked(
        query, key, value, log_decay, None, initial_state,
        scale, chunk, implementation, precision, cu_seqlens,
    )  # fmt: skip


def delta_rule(
    query: Float[Array, "batch length heads key_dim"],
    key: Float[Array, "batch length heads key_dim"],
    value: Float[Array, "batch length heads value_dim"],
    beta: Float[Array, "batch length heads"],
    log_decay: Float[Array, "batch length heads"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    cu_seqlens: Int[Array, "sequences+1"] | None = None,
    chunk: int = 64,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """The (gated) delta rule: `S' = exp(g) S`, `S = S' + beta k (v - k S')^T`, `o = scale * q S`.

    DeltaNet (arXiv 2406.06484) without `log_decay`, Gated DeltaNet (arXiv 2412.06464) with it. The
    triangular system of a chunk is solved by substitution in float32, which stays accurate where
    keys are alike.

    Args:
      query: `[batch, length, heads, key_dim]`.
      key: `[batch, length, heads, key_dim]`, normalised by the caller: the rule is stable for
        beta |k|^2 in [0, 2].
      value: `[batch, length, heads, value_dim]`; it may have more heads, a multiple: groups of
        them share queries and keys. Decays and betas are those of its heads.
      beta: write strength, `[batch, length, heads]`.
      log_decay: g <= 0, `[batch, length, heads]`, or None for no decay.
      scale: of the output; `key_dim ** -0.5` if None.
      initial_state: S before the first step; zeros if None.
      cu_seqlens: where packed sequences begin and end, from 0 to length, with a batch of one: each
        has a state of its own, `[sequences, heads, ...]` before and after. Runs in XLA.
      chunk: steps done at once, a power of two from 16.
      implementation: as in `gated_linear_attention`.
      precision: as in `gated_linear_attention`.

    Returns:
      Output `[batch, length, heads, value_dim]` in the value's type, and the final state in
      float32.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    _check_heads(query, key, value)
    _check("beta", beta, (value.shape[:3],))
    _check("log_decay", log_decay, (value.shape[:3],))
    scale = key.shape[3] ** -0.5 if scale is None else float(scale)
    log_decay = None if log_decay is None else log_decay[..., None]
    return _chunked(
        query, key, value, log_decay, beta[..., None], initial_state,
        scale, chunk, implementation, precision, cu_seqlens,
    )  # fmt: skip


def ssd(
    x: Float[Array, "batch length heads value_dim"],
    dt: Float[Array, "batch length heads"],
    A: Float[Array, "heads"],
    B: Float[Array, "batch length groups key_dim"],
    C: Float[Array, "batch length groups key_dim"],
    *,
    D: Float[Array, "heads"] | None = None,
    initial_state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    cu_seqlens: Int[Array, "sequences+1"] | None = None,
    chunk: int = 64,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """Mamba-2's state space dual: `h = exp(dt A) h + dt B x^T`, `y = C h + D x`.

    arXiv 2405.21060. Heads of one group share B and C, which are never repeated in memory.

    Args:
      x: `[batch, length, heads, value_dim]`.
      dt: step sizes > 0 (after softplus), `[batch, length, heads]`.
      A: negative, `[heads]`.
      B: `[batch, length, groups, key_dim]`; groups divides heads.
      C: `[batch, length, groups, key_dim]`.
      D: skip connection, `[heads]`, or None.
      initial_state: h before the first step, `[batch, heads, key_dim, value_dim]`. (Mamba's own
        caches have the last two axes the other way round.)
      cu_seqlens: where packed sequences begin and end, from 0 to length, with a batch of one: each
        has a state of its own, `[sequences, heads, ...]` before and after. Runs in XLA.
      chunk: steps done at once, a power of two from 16.
      implementation: as in `gated_linear_attention`.
      precision: as in `gated_linear_attention`.

    Returns:
      y `[batch, length, heads, value_dim]` in x's type, and the final state in float32.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    _check_ssd(x, dt, A, B, C, D)
    _check_floats(x=x, dt=dt, A=A, B=B, C=C)
    dt = _wide(dt)
    value = (x * dt[..., None]).astype(x.dtype)
    log_decay = (dt * _wide(A))[..., None]
    y, state = _chunked(
        C, B, value, log_decay, None, initial_state, 1.0, chunk, implementation, precision,
        cu_seqlens,
    )  # fmt: skip
    return _skip(y, D if D is None else D[:, None], x), state


def tree_ssd(
    x: Float[Array, "batch nodes heads value_dim"],
    dt: Float[Array, "batch nodes heads"],
    A: Float[Array, "heads"],
    B: Float[Array, "batch nodes groups key_dim"],
    C: Float[Array, "batch nodes groups key_dim"],
    parents: Int[Array, "nodes"],
    *,
    initial_state: Float[Array, "batch heads key_dim value_dim"],
) -> tuple[Array, Float[Array, "batch nodes heads key_dim value_dim"]]:
    """`ssd` over a tree of drafted tokens: every node continues the state of its parent.

    STree (speculative decoding of state space models). Dense over pairs of nodes, meant for up to
    a hundred or so; float32 throughout.

    XLA runs it everywhere. A kernel earns its place in `ssd` by holding the state on chip from one
    chunk to the next; a tree is a single chunk, so there is nothing to hold, and its output is four
    small matrix products that XLA fuses with their decays. Where the states of all nodes are asked
    for, writing them is the cost, in any body.

    Args:
      x: `[batch, nodes, heads, value_dim]`.
      dt: `[batch, nodes, heads]`.
      A: `[heads]`.
      B: `[batch, nodes, groups, key_dim]`.
      C: `[batch, nodes, groups, key_dim]`.
      parents: index of each node's parent, below its own; -1 for children of `initial_state`.
      initial_state: `[batch, heads, key_dim, value_dim]`.

    Returns:
      y `[batch, nodes, heads, value_dim]` without a skip connection, in x's type, and the state
      after each node in float32. Programs that do not use the states never form them.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    _check_ssd(x, dt, A, B, C, None)
    if parents.shape != x.shape[1:2]:
        raise ValueError(
            f"parents has shape {parents.shape}; expected ({x.shape[1]},), one a node."
        )
    _check("initial_state", initial_state, (_state_shape(B, x),))
    lines = {"cpu": "xla"}
    for platform in PLATFORM_OF.values():
        reason = reason_for_xla("tree_ssd", platform, x.shape[1])
        lines[platform] = f"xla, because {reason}"
    tell(lines)
    repeats = x.shape[2] // B.shape[2]
    _check_floats(x=x, dt=dt, A=A, B=B, C=C)
    B, C = (jnp.repeat(_wide(t), repeats, axis=2) for t in (B, C))
    wide = map(_wide, (x, dt, A))
    y, states = xla.tree_ssd(*wide, B, C, jnp.asarray(parents), _wide(initial_state))
    return y.astype(x.dtype), states


def selective_scan(
    x: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "channels state"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    *,
    D: Float[Array, "channels"] | None = None,
    initial_state: Float[Array, "batch channels state"] | None = None,
    cu_seqlens: Int[Array, "sequences+1"] | None = None,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[Array, Float[Array, "batch channels state"]]:
    """Mamba's selective scan: `h = exp(dt A) h + dt B x`, `y = C h + D x`, in each channel.

    arXiv 2312.00752. There is no matrix form: work and traffic are `channels * state` a step.
    Memory for the backward is one state per chunk.

    Args:
      x: `[batch, length, channels]`.
      dt: step sizes > 0 (after softplus), `[batch, length, channels]`.
      A: negative, `[channels, state]`.
      B: `[batch, length, state]`.
      C: `[batch, length, state]`.
      D: skip connection, `[channels]`, or None.
      initial_state: h before the first step; zeros if None.
      cu_seqlens: where packed sequences begin and end, from 0 to length, with a batch of one: each
        has a state of its own, `[sequences, heads, ...]` before and after. Runs in XLA.
      chunk: steps between two states that are kept; a multiple of 16 up to 128, else the next one.
      implementation: None or "xla": there is no kernel (README.md of the package says why).

    Returns:
      y `[batch, length, channels]` in x's type, and the final state in float32.

    Raises:
      ValueError: if shapes do not fit, with the sizes.
    """
    check_implementation(implementation)
    batch, length, channels = x.shape
    _check("dt", dt, (x.shape,))
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A has shape {A.shape}; expected ({channels}, state).")
    for name, t in (("B", B), ("C", C)):
        _check(name, t, ((batch, length, A.shape[1]),))
    _check("D", D, ((channels,),))
    states = _count_states(cu_seqlens, batch)
    _check("initial_state", initial_state, ((states, *A.shape),))
    _check_floats(x=x, dt=dt, A=A, B=B, C=C)
    one_step = isinstance(length, int) and length == 1
    chunk = min(chunk, length) if isinstance(length, int) else chunk
    if not one_step:
        chunk = min(-(-chunk // SMALLEST_CHUNK) * SMALLEST_CHUNK, LARGEST_SCAN_CHUNK)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((states, *A.shape), wide) if initial_state is None else initial_state
    A, D, state = (None if t is None else t.astype(wide) for t in (A, D, state))
    if cu_seqlens is not None:
        where = packed.layout(cu_seqlens, length, chunk)
        x, dt, B, C = (packed.align(t, where, 1) for t in (x, dt, B, C))
        arrays = packed.Arrays(scan.Operands(x, dt, A, B, C, D, state), where.starts, where.ends)
        y, state = packed.run(
            implementation, "selective_scan", Problem(chunk=chunk), arrays, (x, state)
        )
        return jnp.take(y, where.place, axis=1), state
    x, dt, B, C = (_pad(t, chunk, 1) for t in (x, dt, B, C))
    arrays = scan.Operands(x, dt, A, B, C, D, state)
    y, state = scan.run(implementation, Problem(chunk=chunk), arrays)
    return _first(y, length, 1), state


def gated_linear_attention_step(
    query: Float[Array, "batch heads key_dim"],
    key: Float[Array, "batch heads key_dim"],
    value: Float[Array, "batch heads value_dim"],
    log_decay: Float[Array, "batch heads #key_dim"] | None,
    state: Float[Array, "batch heads key_dim value_dim"],
    *,
    scale: float | None = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """One step of `gated_linear_attention`: output and the next state."""
    if log_decay is not None:
        state = _decayed(log_decay[..., None], state)
    state = state + _outer(key, value)
    return _read(query, state, scale).astype(value.dtype), state


def delta_rule_step(
    query: Float[Array, "batch heads key_dim"],
    key: Float[Array, "batch heads key_dim"],
    value: Float[Array, "batch heads value_dim"],
    beta: Float[Array, "batch heads"],
    log_decay: Float[Array, "batch heads"] | None,
    state: Float[Array, "batch heads key_dim value_dim"],
    *,
    scale: float | None = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """One step of `delta_rule`: output and the next state."""
    if log_decay is not None:
        state = _decayed(log_decay[..., None, None], state)
    change = _wide(beta)[..., None] * (value - _read(key, state, 1.0))
    state = state + _outer(key, change)
    return _read(query, state, scale).astype(value.dtype), state


def ssd_step(
    x: Float[Array, "batch heads value_dim"],
    dt: Float[Array, "batch heads"],
    A: Float[Array, "heads"],
    B: Float[Array, "batch groups key_dim"],
    C: Float[Array, "batch groups key_dim"],
    state: Float[Array, "batch heads key_dim value_dim"],
    *,
    D: Float[Array, "heads"] | None = None,
) -> tuple[Array, Float[Array, "batch heads key_dim value_dim"]]:
    """One step of `ssd`: y and the next state."""
    B, C = (jnp.repeat(t, x.shape[1] // t.shape[1], axis=1) for t in (B, C))
    dt = _wide(dt)
    y, state = gated_linear_attention_step(
        C, B, x * dt[..., None], (dt * A)[..., None], state, scale=1.0
    )
    return _skip(y.astype(x.dtype), D if D is None else D[:, None], x), state


def selective_scan_step(
    x: Float[Array, "batch channels"],
    dt: Float[Array, "batch channels"],
    A: Float[Array, "channels state"],
    B: Float[Array, "batch state"],
    C: Float[Array, "batch state"],
    state: Float[Array, "batch channels state"],
    *,
    D: Float[Array, "channels"] | None = None,
) -> tuple[Array, Float[Array, "batch channels state"]]:
    """One step of `selective_scan`: y and the next state."""
    dt = _wide(dt)
    state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None, :]
    return _skip((state * C[:, None, :]).sum(-1).astype(x.dtype), D, x), state


def _wide(t):
    """In float32, or float64 if it is."""
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def _decayed(log_decay, state):
    """The state after a gate; one that forgets everything also forgets what is not finite."""
    forgets = log_decay.max(-2, keepdims=True) <= LOWEST_LOG_DECAY
    return jnp.exp(_wide(log_decay)) * jnp.where(forgets, 0.0, state)


def _outer(key, value):
    key, value = _wide(key), _wide(value)
    return key[..., :, None] * value[..., None, :]


def _read(query, state, scale):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = _wide(query)
    return scale * jnp.einsum("bhk,bhkv->bhv", query, state, precision="highest")


def _skip(y, D, x):
    return y if D is None else (y + D * x).astype(y.dtype)


def _chunked(
    query, key, value, log_decay, beta, state, scale, chunk, implementation, precision, bounds
):
    """Heads first, in whole chunks, in float32 where it matters; then the body, and back."""
    check_implementation(implementation)
    if chunk < SMALLEST_CHUNK or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} must be a power of two, at least {SMALLEST_CHUNK}.")
    _check_floats(query=query, key=key, value=value, log_decay=log_decay, beta=beta)
    wide = jnp.promote_types(value.dtype, jnp.float32)
    states = _count_states(bounds, value.shape[0]), *_state_shape(key, value)[1:]
    _check("initial_state", state, (states,))
    state = jnp.zeros(states, wide) if state is None else state.astype(wide)
    length = value.shape[1]
    if length == 1 and bounds is None and implementation in (None, "xla"):
        return _one_step(query, key, value, log_decay, beta, state, scale)
    if isinstance(length, int):
        chunk = min(chunk, max(SMALLEST_CHUNK, 1 << (length - 1).bit_length()))
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(wide), LOWEST_LOG_DECAY)
    query, key = query.astype(value.dtype), key.astype(value.dtype)
    beta = None if beta is None else beta.astype(wide)
    heads_first = [
        None if t is None else t.transpose(0, 2, 1, 3) for t in (query, key, value, log_decay, beta)
    ]
    problem = Problem(chunk=chunk, scale=scale, precision=stated_precision(precision))
    if bounds is not None:
        where = packed.layout(bounds, length, chunk)
        aligned = Operands(*(packed.align(t, where, 2) for t in heads_first), state)
        arrays = packed.Arrays(aligned, where.starts, where.ends)
        out, state = packed.run(
            implementation, "recurrence", problem, arrays, (aligned.value, state)
        )
        return jnp.take(out, where.place, axis=2).transpose(0, 2, 1, 3), state
    x = Operands(*(None if t is None else _pad(t, chunk, 2) for t in heads_first), state)
    out, state = run(implementation, problem, x)
    return _first(out, length, 2).transpose(0, 2, 1, 3), state


def _one_step(query, key, value, log_decay, beta, state, scale):
    """A sequence of one step, as in decoding, without the arithmetic of a chunk."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (jnp.repeat(t[:, 0], repeats, axis=1) for t in (query, key))
    decay = None if log_decay is None else log_decay[:, 0]
    if beta is None:
        out, state = gated_linear_attention_step(query, key, value[:, 0], decay, state, scale=scale)
    else:
        decay = None if decay is None else decay[..., 0]
        out, state = delta_rule_step(
            query, key, value[:, 0], beta[:, 0, :, 0], decay, state, scale=scale
        )
    return out[:, None], state


def _pad(t, multiple, axis):
    """Steps of zeros at the end: they neither write, nor decay, nor are they read."""
    length = t.shape[axis]
    extra = (length + multiple - 1) // multiple * multiple - length
    if isinstance(extra, int) and not extra:
        return t
    widths = [(0, extra if a == axis else 0, 0) for a in range(t.ndim)]
    return jax.lax.pad(t, jnp.zeros((), t.dtype), widths)


def _first(t, length, axis):
    """The first steps of an axis, of a number that export may leave open."""
    if isinstance(length, int):
        return jax.lax.slice_in_dim(t, 0, length, axis=axis)
    return jnp.take(t, jnp.arange(length), axis=axis, mode="clip")


def _state_shape(key, value):
    return (value.shape[0], value.shape[2], key.shape[3], value.shape[3])


def _check(name, t, shapes):
    if t is not None and t.shape not in shapes:
        raise ValueError(f"{name} has shape {t.shape}; expected {' or '.join(map(str, shapes))}.")


def _check_heads(query, key, value):
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}: expected 4 axes each, batch length heads head_dim.")
    fits = query.shape == key.shape and value.shape[:2] == key.shape[:2]
    empty = any(isinstance(n, int) and n == 0 for n in (*value.shape, key.shape[2]))
    if not fits or empty or value.shape[2] % key.shape[2]:
        raise ValueError(
            f"{shapes}: query and key must be alike, value agree in batch and length, have as many "
            "heads or a multiple, and no axis be empty."
        )


def _check_floats(**arrays):
    for name, t in arrays.items():
        if t is not None and not jnp.issubdtype(t.dtype, jnp.floating):
            raise TypeError(f"{name} is {t.dtype}; expected floats: convert it first.")


def _count_states(bounds, batch):
    """How many states there are: one for each example, or for each packed sequence."""
    if bounds is None:
        return batch
    if bounds.ndim != 1 or batch != 1 or not jnp.issubdtype(bounds.dtype, jnp.integer):
        raise ValueError(
            f"cu_seqlens is {bounds.dtype}{list(bounds.shape)} with a batch of {batch}; expected "
            "integers [sequences + 1] and a batch of one."
        )
    return bounds.shape[0] - 1


def _check_ssd(x, dt, A, B, C, D):
    if x.ndim != 4 or B.ndim != 4 or B.shape != C.shape or B.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"x {x.shape}, B {B.shape}, C {C.shape}: expected batch length heads value_dim, and "
            "twice batch length groups key_dim."
        )
    if x.shape[2] % B.shape[2]:
        raise ValueError(f"{B.shape[2]} groups of B and C do not divide {x.shape[2]} heads of x.")
    _check("dt", dt, (x.shape[:3],))
    _check("A", A, (x.shape[2:3],))
    _check("D", D, (x.shape[2:3],))
