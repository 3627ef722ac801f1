"""Time and memory of every kind of attention as the text grows.

    python benchmarks/sequence_scaling.py                        # 512 to 16,384 tokens, forward
    python benchmarks/sequence_scaling.py --lengths 512 1024     # some lengths only
    python benchmarks/sequence_scaling.py --dense 16384          # quadratic kinds to the end, too
    python benchmarks/sequence_scaling.py --json scaling.json --plot scaling.png

One layer's attention of 4 heads of 32 channels, batch 1, float32, without the maps around it. At
each length all kinds run in turn, in one process, `--repeats` times; the time is the median.
Memory is what the compiled program allocates beside its arguments and its output. `order` is the
slope of log time over log length between the two longest texts: about 1 for a linear cost and 2
for a quadratic one. Kinds whose cost is quadratic stop at `--dense` tokens. The default takes less
than ten minutes on two cores, most of it to compile.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from growth import order

import kernels_pallas
from zoo.models.language import combiner, linformer, longformer, nprf, performer, reformer
from zoo.models.language import routing_transformer as routing

HEADS, WIDTH, CHUNK = 4, 32, 64
CHANNELS = HEADS * WIDTH


def module(make: Callable, *arguments) -> Callable:
    """A layer of a system, its maps included, as a function of `[1, length, channels]`."""

    def build(length: int) -> Callable:
        layer = make(length)
        x = jax.ShapeDtypeStruct((1, length, CHANNELS), jnp.float32)
        extra = tuple(a(length) if callable(a) else a for a in arguments)
        shapes = jax.eval_shape(lambda k, x: layer.init(k, x, *extra), jax.random.key(0), x)
        variables = jax.tree.map(lambda s: 0.05 * jnp.ones(s.shape, s.dtype), shapes)
        return lambda x: layer.apply(variables, x, *extra)

    return build


def function(run: Callable) -> Callable:
    """A function of queries, keys and values as one of `[1, length, channels]`."""

    def build(length: int) -> Callable:
        def call(x):
            heads = x.reshape(1, length, HEADS, WIDTH)
            return run(heads, jnp.flip(heads, 1), heads * 2)

        return call

    return build


def gated(q, k, v):
    """Gated linear attention with a constant gate."""
    decay = jnp.full((*q.shape[:3], 1), -0.05)
    return kernels_pallas.gated_linear_attention(q, k, v, decay)[0]


def kernelised(q, k, v):
    """NPRF with 32 features."""
    rows = jnp.ones((32, WIDTH)) * 0.1
    bias = jnp.zeros((HEADS, 2 * q.shape[1] - 1))
    return nprf.nprf_attention(q, k, v, bias, rows, causal=True)


def visible(length: int):
    """No padding."""
    return jnp.ones((1, length), bool)


def first_two(length: int):
    """Two global tokens."""
    return jnp.arange(length)[None] < 2


def rotations(length: int):
    """Random directions of Reformer's hashes."""
    count = sum(reformer.num_buckets_for(length, CHUNK, 1 << 16)) // 2
    return jax.random.normal(jax.random.key(1), (HEADS, WIDTH, 2, count))


nothing = {"visible": None}
causal = kernels_pallas.Causal()
KINDS: dict[str, tuple[bool, Callable]] = {
    # name -> whether the cost is quadratic, and how it is built for a length
    "softmax": (True, function(partial(kernels_pallas.attention, mask=causal))),
    "sigmoid": (
        True,
        function(
            partial(kernels_pallas.attention, mask=causal, score=kernels_pallas.Sigmoid(-8.0))
        ),
    ),
    "window 128": (
        False,
        function(
            partial(kernels_pallas.attention, mask=kernels_pallas.SlidingWindow(left=127, right=0))
        ),
    ),
    "longformer": (
        False,
        module(
            lambda n: longformer.LongformerAttention(HEADS, longformer.window_mask(128), 4),
            visible,
            first_two,
        ),
    ),
    "linformer": (
        False,
        module(lambda n: linformer.LinformerAttention(n, 128, HEADS), nothing),
    ),
    "performer": (
        False,
        module(lambda n: performer.PerformerAttention(HEADS, WIDTH, 64, causal=True), nothing),
    ),
    "reformer lsh": (
        False,
        module(
            lambda n: reformer.ReformerAttention(
                "lsh", HEADS, WIDTH, CHUNK, causal=True,
                buckets=reformer.num_buckets_for(n, CHUNK, 1 << 16),
            ),
            None,
            rotations,
        ),
    ),
    "routing": (
        True,  # clusters have 64 tokens: products with the means grow as L^2 / 64
        module(
            lambda n: routing.RoutingAttention(
                HEADS, WIDTH, n // CHUNK, CHUNK, 0, CHUNK, 1, True, True, 0, 0.999, 1e-4
            ),
            {"visible": None, "place": False},
        ),
    ),
    "nprf": (False, function(kernelised)),
    "combiner fixed": (
        True,  # L^1.5 with spans of the root
        function(
            lambda q, k, v: combiner.fixed_attention(
                q, k, v, combiner.span_for(q.shape[1]), causal=True
            )
        ),
    ),
    "combiner logsparse": (False, function(combiner.logsparse_attention)),
    "gated linear": (False, function(gated)),
}  # fmt: skip


def compile_kind(build: Callable, length: int) -> tuple[Callable, jax.Array, int]:
    """The compiled program, its input, and the bytes that it allocates."""
    x = jax.random.normal(jax.random.key(0), (1, length, CHANNELS))
    run = build(length)

    def total(x):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(run(x)))

    compiled = jax.jit(total).lower(x).compile()
    return compiled, x, compiled.memory_analysis().temp_size_in_bytes


def measure(lengths: list[int], kinds: list[str], repeats: int, dense: int) -> dict:
    """`{kind: {length: (seconds, bytes)}}`."""
    found: dict[str, dict[int, tuple[float, int]]] = {kind: {} for kind in kinds}
    for length in lengths:
        programs = {
            kind: compile_kind(KINDS[kind][1], length)
            for kind in kinds
            if length <= dense or not KINDS[kind][0]
        }
        times: dict[str, list[float]] = {kind: [] for kind in programs}
        for i in range(repeats + 1):
            for kind, (run, x, _) in programs.items():
                started = time.perf_counter()
                run(x).block_until_ready()
                if i:  # the first warms up
                    times[kind].append(time.perf_counter() - started)
        for kind, (_, _, size) in programs.items():
            found[kind][length] = (statistics.median(times[kind]), size)
        print(f"{length:,} tokens measured", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Prints the table, and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 4096, 8192, 16384])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense", type=int, default=4096, help="longest text of quadratic kinds")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--plot", help="a PNG file; needs matplotlib")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, JAX {jax.__version__}, forward, ms / MB")
    found = measure(options.lengths, options.kinds, options.repeats, options.dense)
    print(f"{'kind':20}" + "".join(f"{n:>15,}" for n in options.lengths) + "   order: time  memory")
    for kind, of in found.items():
        cells = "".join(
            f"{of[n][0] * 1e3:8.1f}/{of[n][1] / 1e6:<6.1f}" if n in of else f"{'':15}"
            for n in options.lengths
        )
        slopes = f"{order(of, 0):14.2f}{order(of, 1):8.2f}" if len(of) > 1 else ""
        print(f"{kind:20}{cells}{slopes}")
    if options.json:
        figures = {
            kind: {n: {"ms": 1e3 * t, "bytes": size} for n, (t, size) in of.items()}
            for kind, of in found.items()
        }
        Path(options.json).write_text(json.dumps(figures, indent=2))
    if options.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
        for axis, which, scale, label in ((axes[0], 0, 1e3, "ms"), (axes[1], 1, 1e-6, "MB")):
            for kind, of in found.items():
                axis.loglog(list(of), [v[which] * scale for v in of.values()], label=kind)
            axis.set_xlabel("tokens")
            axis.set_ylabel(label)
        axes[0].legend(fontsize=7)
        figure.savefig(options.plot, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
