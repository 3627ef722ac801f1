"""`neighborhood_attention`: one door to every body."""

import math

import jax
from jaxtyping import Array, Float

from kernels_pallas.dispatch import check_implementation, floats_alike, stated_precision
from kernels_pallas.neighborhood.choice import run
from kernels_pallas.neighborhood.geometry import Axis
from kernels_pallas.neighborhood.problem import Operands, Problem

TILES = {1: 64, 2: 8, 3: 4}  # queries of a tile along each axis, by rank of the grid
SMALL_GRID = 256  # a grid up to so many tokens is one tile


def neighborhood_attention(
    query: Float[Array, "batch *space heads head_dim"],
    key: Float[Array, "batch *space heads head_dim"],
    value: Float[Array, "batch *space heads value_dim"],
    *,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    bias: Float[Array, "heads *rows"] | None = None,
    causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch *space heads value_dim"]:
    """Softmax attention of every grid position over its nearest `kernel_size` along each axis.

    DiNAT and NATTEN (arXiv 2204.07143, 2209.15001), in one to three dimensions. With dilation d
    the neighbours are taken among the positions of the same remainder modulo d. At a border the
    window is shifted inwards, so that every position sees exactly `kernel_size` positions;
    a causal axis sees the `kernel_size` positions up to itself, fewer at the start.

    Work and memory follow tiles, not positions: no key is copied once a neighbour. The kernels read
    each array once, and keep nothing but the output for the backward pass.

    Args:
      query: `[batch, *space, heads, head_dim]`, with one to three axes of space. Arrays of several
        types are brought to the one that holds them all.
      key: `[batch, *space, heads, head_dim]`.
      value: `[batch, *space, heads, value_dim]`.
      kernel_size: one number, or one for each axis.
      dilation: one number, or one for each axis; `kernel_size * dilation` must fit the axis.
      bias: `[heads, 2 * kernel_size - 1, ...]`, one table axis for each axis of space; entry
        `kernel_size - 1 + (key - query) / dilation` is added to the score.
      causal: one choice, or one for each axis.
      scale: of the raw scores; `head_dim ** -0.5` if None.
      implementation: None (by the platform that is compiled for, see `dispatch.explain`), "xla",
        "pallas_tpu" or "pallas_gpu". Second derivatives need "xla".
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      `[batch, *space, heads, value_dim]` in the value's type.

    Raises:
      ValueError: if shapes do not fit or a window is larger than its axis, with the sizes.
      TypeError: if arrays are not floating-point.
    """
    check_implementation(implementation)
    axes = _axes(query, key, value, kernel_size, dilation, causal)
    out_type = value.dtype
    query, key, value = floats_alike(query, key, value)
    heads = query.shape[-2]
    rows = tuple(2 * a.kernel - 1 for a in axes)
    if bias is not None and bias.shape != (heads, *rows):
        raise ValueError(f"bias has shape {bias.shape}; expected {(heads, *rows)}.")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    problem = Problem(axes, scale, stated_precision(precision))
    return run(implementation, problem, Operands(query, key, value, bias)).astype(out_type)


def _axes(query, key, value, kernel_size, dilation, causal) -> tuple[Axis, ...]:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    space = query.shape[1:-2]
    if len(space) not in TILES:
        raise ValueError(f"{shapes}: expected batch, one to three axes of space, heads, head_dim.")
    if query.shape != key.shape or value.shape[:-1] != key.shape[:-1] or 0 in value.shape:
        raise ValueError(
            f"{shapes}: query and key must be alike, value differ in its last axis only, and no "
            "axis be empty."
        )
    names = ("kernel_size", "dilation", "causal")
    per_axis = []
    for name, given in zip(names, (kernel_size, dilation, causal), strict=True):
        given = tuple(given) if isinstance(given, tuple | list) else (given,) * len(space)
        if len(given) != len(space) or any(n < 1 for n in given if name != "causal"):
            raise ValueError(
                f"{name}={given} does not fit {len(space)} axes of space {space}: give one "
                "positive number, or one for each."
            )
        per_axis.append(given)
    small = math.prod(space) <= SMALL_GRID
    axes = []
    for size, k, d, c in zip(space, *per_axis, strict=True):
        if k * d > size and not c:
            raise ValueError(
                f"kernel_size {k} x dilation {d} is larger than an axis of space {space}; choose "
                f"at most {size // d} or a smaller dilation."
            )
        tile = min(size if small else TILES[len(space)], -(-size // d))
        axes.append(Axis(size, int(k), int(d), bool(c), tile))
    return tuple(axes)
