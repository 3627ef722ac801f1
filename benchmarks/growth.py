"""Time and memory of a training step against batch, image size and length.

    python benchmarks/growth.py                                   # minutes on two cores
    python benchmarks/growth.py --json growth.json --plot growth.png
    python benchmarks/growth.py --models gla_340m --rounds 9

One of batch, size and length grows at a time, the others stay where they begin. The step is that of
`benchmarks/programs.py`; its time is the median of `--rounds` calls, its memory what the program
allocates beside its arguments. `order` is the slope of log time over log size between the two
largest sizes: about 1 where the cost is linear. Sizes of images are sides, so that 2 is linear in
the number of pixels there. What is more than linear must be: softmax attention, in the number of
tokens; the rest is not.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from programs import training_step

import zoo
from zoo.training.first import one_by_one


@dataclass(frozen=True)
class Axes:
    """What grows, of one model.

    Attributes:
      batch: numbers of examples.
      size: sides of square images.
      length: tokens of a text.
      fields: of the model.
    """

    batch: tuple[int, ...] = (1,)
    size: tuple[int, ...] = ()
    length: tuple[int, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    def points(self) -> dict[str, tuple[int, ...]]:
        """The axes that have more than one point."""
        every = {"batch": self.batch, "size": self.size, "length": self.length}
        return {name: values for name, values in every.items() if len(values) > 1}


MODELS = {
    "vit_small_patch16_224": Axes((1, 2, 4, 8), (112, 224, 448), fields={"scan_layers": True}),
    "swin_tiny_patch4_window7_224": Axes((1, 2, 4), (224, 448), fields={"depths": (1, 1, 2, 1)}),
    "gpt2": Axes((1, 2, 4), (), (64, 128, 256, 512), {"depth": 4, "vocab_size": 8192}),
    "gla_340m": Axes(
        (1, 2, 4), (), (128, 256, 512, 1024), {"depth": 4, "embed_dim": 512, "vocab_size": 8192}
    ),
}


def measure(name: str, axes: Axes, rounds: int, **at: int) -> dict[str, float]:
    """Milliseconds and bytes of a step at one point."""
    fields = dict(axes.fields)
    if axes.size:
        fields["image_size"] = (at["size"], at["size"])
    model = zoo.create(name, **fields)
    shapes = model.example_inputs(at["batch"], **({"length": at["length"]} if axes.length else {}))
    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    key = jax.random.key(0)
    init = one_by_one(lambda seed: model.init(jax.random.wrap_key_data(seed), **inputs))
    variables = dict(init(jax.random.key_data(key)))
    params = variables.pop("params")
    step, optimizer = training_step(model)
    state = (params, one_by_one(optimizer.init)(params), variables)
    compiled = step.lower(*state, inputs, key).compile()
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        state = jax.block_until_ready(compiled(*state, inputs, key))
        times.append(1e3 * (time.perf_counter() - begun))
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"ms": statistics.median(times[1:]), "bytes": memory}


def order(points: dict[int, Any], which: Any) -> float:
    """Slope of the logarithm of the figure `which` between the two largest sizes."""
    (a, x), (b, y) = sorted(points.items())[-2:]
    if not (x[which] and y[which]):  # a program that allocates nothing
        return 0.0
    return math.log(y[which] / x[which]) / math.log(b / a)


def grown(name: str, rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """`{axis: {size: figures}}` of a model; prints a Markdown row for each axis."""
    axes = MODELS[name]
    first = {"batch": axes.batch, "size": axes.size or (0,), "length": axes.length or (0,)}
    begin = {axis: values[0] for axis, values in first.items()}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for axis, values in axes.points().items():
        points = {v: measure(name, axes, rounds, **{**begin, axis: v}) for v in values}
        found[axis] = points
        each = ", ".join(
            f"{v}: {p['ms']:.0f} ms {p['bytes'] / 1e6:.0f} MB" for v, p in points.items()
        )
        orders = f"{order(points, 'ms'):.2f} | {order(points, 'bytes'):.2f}"
        print(f"| {name} | {axis} | {each} | {orders} |", flush=True)
    return found


def draw(figures: dict[str, dict[str, dict[int, dict[str, float]]]], path: str) -> None:
    """Curves of time and memory, a column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("batch", "size", "length")
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), squeeze=False)
    for column, axis in enumerate(names):
        for row, (which, scale, label) in enumerate((("ms", 1, "ms"), ("bytes", 1e-6, "MB"))):
            place = axes[row][column]
            for name, of in figures.items():
                if axis in of:
                    points = of[axis]
                    place.loglog(
                        list(points), [p[which] * scale for p in points.values()], "o-", label=name
                    )
            place.set_xlabel(axis)
            place.set_ylabel(label)
            place.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Prints the table; writes and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--plot", help="a PNG file; needs matplotlib")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, JAX {jax.__version__}, float32\n")
    print("| model | of | step | order: time | memory |\n|---|---|---|---|---|", flush=True)
    figures = {name: grown(name, args.rounds) for name in args.models}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    if args.plot:
        draw(figures, args.plot)


if __name__ == "__main__":
    main()
