"""Kernels: static figures of compiled programs, and timings on the device at hand.

    python benchmarks/kernels.py --static            # TPU v5e and v6e, compiled on any host
    python benchmarks/kernels.py --static --write    # the same into kernels_pallas/README.md, and
                                                     # what follows into tuning/dispatch.json
    python benchmarks/kernels.py --static --cases neighbourhood    # cases with that word only
    python benchmarks/kernels.py --static --cases HAT --chips v6e  # and their rows of one chip
    python benchmarks/kernels.py                     # timings here, interleaved, ratios of medians

Static figures need `libtpu`, no TPU. Each program is compiled in a process of its own with a clean
folder for the compiler's estimates. Timings compare with `jax.nn.dot_product_attention` and, where
torch is installed, its scaled_dot_product_attention.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}  # cycles a second
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9}  # bytes a second
TIMEOUT = 60  # seconds for one compile: the estimator does not end on some programs
README = Path(__file__).parent.parent / "kernels_pallas" / "README.md"
DISPATCH = README.parent / "tuning" / "dispatch.json"
MARKS = "<!-- static figures: python benchmarks/kernels.py --static --write -->", "<!-- end -->"

# name -> (operation, sizes, options); sizes: batch length heads head_dim. Neighbourhoods: length of
# a square grid; what stands for XLA there is the dense form, with its mask as an array.
CASES = {
    "ViT-S, 8 x 197 tokens, 6 heads of 64": ("attention", (8, 197, 6, 64), {}),
    "1,024 tokens, 1 head of 64": ("attention", (1, 1024, 1, 64), {}),
    "4,096 tokens, 1 head of 64": ("attention", (1, 4096, 1, 64), {}),
    "4,096 tokens, 1 head of 128": ("attention", (1, 4096, 1, 128), {}),
    "4,096 tokens, causal, 1 head of 64": ("attention", (1, 4096, 1, 64), {"causal": True}),
    "1,000 tokens, 8 heads of 64, bias [1,8,L,L]": ("attention", (1, 1000, 8, 64), {"bias": True}),
    "16,384 tokens, 8 heads of 64": ("attention", (1, 16384, 8, 64), {}),
    "decoding: 8 x 1 query, 32 heads, 8,192 keys of 4 heads of 128": (
        "attention", (8, 1, 32, 128), {"keys": (8192, 4), "forward": True},
    ),
    "decoding: the same, a cache with heads first": (
        "attention", (8, 1, 32, 128), {"keys": (8192, 4), "forward": True, "cache": True},
    ),
    "decoding: heads first, and caches of several lengths": (
        "attention", (8, 1, 32, 128),
        {"keys": (8192, 4), "forward": True, "cache": True, "ragged": True},
    ),
    "Swin stage 1: 1,024 windows of 49, 3 heads": ("windows", (1024, 49, 3, 32), {"masks": 64}),
    "Swin stage 3: 1,024 windows of 49, 12 heads": ("windows", (1024, 49, 12, 32), {"masks": 4}),
    "Swin V2 stage 1: 1,024 windows of 64, 3 heads": ("windows", (1024, 64, 3, 32), {"masks": 64}),
    "Swin-B 384 stage 1: 256 windows of 144, 4 heads": (
        "windows", (256, 144, 4, 32), {"masks": 64},
    ),
    "Video Swin-T stage 1: 128 windows of 392, 3 heads": (
        "windows", (128, 392, 3, 32), {"masks": 128},
    ),
    "Video Swin-B stage 1: 128 windows of 392, 4 heads": (
        "windows", (128, 392, 4, 32), {"masks": 128},
    ),
    "HAT: 64 windows of 256 queries and 576 keys, 6 heads of 30": (
        "windows", (64, 256, 6, 30), {"keys": 576},
    ),
    "8 x 56 x 56, neighbourhoods of 7 x 7, 2 heads of 32": (
        "neighbourhoods", (8, 3136, 2, 32), {"kernel": 7},
    ),
    "64 x 64, neighbourhoods of 7 x 7, 4 heads of 32": (
        "neighbourhoods", (1, 4096, 4, 32), {"kernel": 7},
    ),
    "64 x 64, neighbourhoods of 13 x 13, 4 heads of 32": (
        "neighbourhoods", (1, 4096, 4, 32), {"kernel": 13},
    ),
    "64 x 64, neighbourhoods of 7 x 7, 4 heads of 32, float32": (
        "neighbourhoods", (1, 4096, 4, 32), {"kernel": 7, "dtype": "float32"},
    ),
    "64 x 64, neighbourhoods of 13 x 13, 4 heads of 32, float32": (
        "neighbourhoods", (1, 4096, 4, 32), {"kernel": 13, "dtype": "float32"},
    ),
}  # fmt: skip
OPERATIONS = {"windows": "window_attention", "neighbourhoods": "neighborhood_attention"}


def program(operation, sizes, options, implementation, backward):
    """`(function, arguments)` of a case, bfloat16 unless it says otherwise."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas

    usual = options.get("dtype", "bfloat16")

    def shape(*lengths, dtype=usual):
        return jax.ShapeDtypeStruct(lengths, jnp.dtype(dtype))

    batch, length, heads, width = sizes
    if operation == "attention":
        keys, kv_heads = options.get("keys", (length, heads))
        cache = options.get("cache")
        stored = (batch, kv_heads, keys, width) if cache else (batch, keys, kv_heads, width)
        arrays = [shape(*sizes), *[shape(*stored)] * 2]
        extra = [shape(1, heads, length, length)] if options.get("bias") else []
        ragged = options.get("ragged")
        extra += [shape(batch, dtype="int32")] if ragged else []
        mask = kernels_pallas.Causal() if options.get("causal") else None

        def call(q, k, v, *extra):
            if implementation == "jax_flash":
                from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

                fields = dataclasses.fields(jax_flash.BlockSizes)
                blocks = {f.name: min(512, length) for f in fields} | {"block_b": 1}
                q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))
                out = jax_flash.flash_attention(
                    q, k, v, causal=mask is not None, sm_scale=width**-0.5,
                    block_sizes=jax_flash.BlockSizes(**blocks),
                )  # fmt: skip
                return out.transpose(0, 2, 1, 3)
            if cache:  # this transposition and that of the call cancel
                k, v = (t.transpose(0, 2, 1, 3) for t in (k, v))
            options = dict(zip(["lengths" if ragged else "bias"], extra, strict=False))
            options["mask"] = mask
            return kernels_pallas.attention(q, k, v, **options, implementation=implementation)

        out = shape(*sizes)
    elif operation == "neighbourhoods":
        # Arrays as projections write them: heads packed in the last axis.
        kernel, side = options["kernel"], round(length**0.5)
        arrays = [shape(batch, side, side, heads * width)] * 3

        def dense(q, k, v, mask):
            q, k, v = (t.reshape(*sizes) for t in (q, k, v))
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
            w = jax.nn.softmax(s * width**-0.5 + mask).astype(v.dtype)
            return jnp.einsum("bhqk,bkhd->bqhd", w, v).reshape(batch, side, side, -1)

        def call(q, k, v, extra):
            if implementation == "xla":
                return dense(q, k, v, extra)
            q, k, v = (t.reshape(batch, side, side, heads, width) for t in (q, k, v))
            out = kernels_pallas.neighborhood_attention(
                q, k, v, kernel_size=kernel, bias=extra, implementation=implementation
            )
            return out.reshape(batch, side, side, -1)

        rows = 2 * kernel - 1
        extra = [shape(heads, rows, rows, dtype=jnp.float32)]
        if implementation == "xla":
            extra = [shape(heads, length, length)]
        out = arrays[0]
    else:
        call, arrays, extra, out = windows(sizes, options, implementation, shape)
    if not backward:
        return call, [*arrays, *extra]

    def both(d_out, *arrays):
        result, pullback = jax.vjp(call, *arrays)
        return result, pullback(d_out)

    return both, [out, *arrays, *extra]


def windows(sizes, options, implementation, shape):
    """`(function, arrays, bias and mask, output)` of window attention, float32 bias and mask."""
    import kernels_pallas

    count, length, heads, width = sizes
    keys = options.get("keys")
    extra = [shape(heads, length, keys or length, dtype="float32")]
    if "masks" in options:
        extra.append(shape(options["masks"], length, length, dtype="float32"))
    if keys:  # queries and keys of different windows, each as its projection wrote it
        arrays = [shape(count, n, heads * width) for n in (length, keys, keys)]
    else:
        arrays = [shape(count, length, 3 * heads * width)]

    def call(*arrays):
        if keys:
            *arrays, bias = arrays
            arrays, mask = [t.reshape(*t.shape[:2], heads, width) for t in arrays], None
        else:
            qkv, bias, mask = (*arrays, None)[:3]
            arrays = [qkv]
        out = kernels_pallas.window_attention(
            *arrays, num_heads=heads, bias=bias, mask=mask, implementation=implementation
        )
        return out.reshape(count, length, heads * width)

    return call, arrays, extra, shape(count, length, heads * width)


def piece(case):
    """`(sizes, times)`: a smaller case of which a case consists, for its cycles; or None.

    The estimator does not take the copies of some of many heads into vector memory. Where windows
    lie in lanes the kernel's steps are the same for each head, or for each group of heads and block
    of 128 windows, so that one of them is compiled alone (without a mask, which is added once a
    head).
    """
    import jax

    from kernels_pallas.window import tpu_lanes

    operation, (count, length, heads, width), options = CASES[case]
    if operation != "windows" or "keys" in options:
        return None
    qkv = jax.ShapeDtypeStruct((count, length, 3 * heads * width), "bfloat16")
    mask = jax.ShapeDtypeStruct((options["masks"],), "float32")
    order = tpu_lanes.layout(qkv, mask, heads)
    if order == "windows":
        return (count, length, 1, width), heads
    if order == "channels":
        group = tpu_lanes.LANES // width
        return (tpu_lanes.LANES, length, group, width), count // tpu_lanes.LANES * heads // group
    return None


def compile_one(case, chip, implementation, backward, part=False) -> dict:
    """Figures of one compiled program, or of the piece that it repeats, in this process."""
    from kernels_pallas import aot

    operation, sizes, options = CASES[case]
    if part:
        sizes, options = piece(case)[0], {}
    function, arguments = program(operation, sizes, options, implementation, backward)
    compiled = aot.compile_for_tpu(function, *arguments, mesh=aot.tpu_mesh(chip))
    memory = compiled.memory_analysis()
    return {
        "operands": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
    }


def figures(case, chip, implementation, backward) -> dict:
    """`compile_one` in a process of its own, with the compiler's cycle estimate if it gives one."""

    def run(folder, part=False):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        if folder:
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        request = json.dumps([case, chip, implementation, backward, part])
        command = [sys.executable, __file__, "--one", request]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return None
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if done.returncode == 0 and lines else None

    def estimated(part=False):
        with tempfile.TemporaryDirectory() as folder:
            found = run(folder, part)
            return found and {**found, "us": microseconds(folder, chip)}

    ours = implementation == "pallas_tpu"
    found = estimated() or {**(run(None) or {}), "us": None}  # it stops on some programs
    if "bytes" not in found:
        return None
    if ours and CASES[case][2].keys() & {"causal", "ragged"}:
        found["us"] = None  # which blocks are visited stands in a table it cannot see
    if ours and (repeated := piece(case)) is not None:
        part = estimated(part=True)
        found["us"] = part and part["us"] * repeated[1]
    return found


def microseconds(folder, chip):
    """The cycles of all operations in the estimator's files, as time."""
    cycles = 0
    for path in Path(folder).iterdir():
        text = path.read_text()
        (count,) = re.findall(r"estimated_cycles: (\d+)", text) or ["0"]
        (alike,) = re.findall(r"num_equivalent_hlos: (\d+)", text) or ["1"]
        cycles += int(count) * max(1, int(alike))
    return cycles / CLOCK[chip] * 1e6


HEADER = [
    "| case | pass | chip | operands MB | XLA: us / MB moved / MB temporary |"
    " Pallas: us / MB moved / MB temporary | JAX flash us |",
    "|---|---|---|---|---|---|---|",
]


def static_table(cases=tuple(CASES), chips=tuple(CLOCK)) -> list[str]:
    """Rows of Markdown: each case, pass and chip, XLA beside Pallas."""
    lines = []

    def cell(found, chip):
        if found is None:
            return "did not compile in a minute"
        least = found["operands"]  # prefetches into vector memory are not in the compiler's count
        moved = "?" if found["bytes"] is None else f"{max(least, found['bytes']) / 1e6:.0f}"
        us = "?" if found["us"] is None else f"{found['us']:.0f}"
        return f"{us} / {moved} / {found['temporaries'] / 1e6:.0f}"

    for case in cases:
        operation, _, options = CASES[case]
        for backward in (False,) if options.get("forward") else (False, True):
            for chip in chips:
                xla, ours = (figures(case, chip, i, backward) for i in ("xla", "pallas_tpu"))
                flash = ""
                if operation == "attention" and not options.keys() & {"bias", "keys"}:
                    found = figures(case, chip, "jax_flash", backward)
                    flash = "refuses" if found is None else str(round(found["us"] or 0) or "?")
                lines.append(
                    f"| {case} | {'both' if backward else 'forward'} | {chip} | "
                    f"{ours['operands'] / 1e6 if ours else 0:.0f} | {cell(xla, chip)} | "
                    f"{cell(ours, chip)} | {flash} |"
                )
                print(lines[-1], flush=True)
    return lines


def merged(table: list[str], rows: list[str]) -> list[str]:
    """The table's rows, those of measured cases replaced, in the order of `CASES`."""
    found = {}
    for row in (*table, *rows):
        case, which, chip = (cell.strip() for cell in row.split("|")[1:4])
        found[case, which, chip] = row
    keys = [(c, p, chip) for c in CASES for p in ("forward", "both") for chip in CLOCK]
    return [found[key] for key in keys if key in found]


def choices(table: list[str]) -> dict[str, dict]:
    """Rows of the dispatch table for TPU, by operation, that follow from the static figures.

    A kernel is chosen from the size of the smallest case on from which on it costs less (the larger
    of its cycles and its traffic) than XLA's traffic alone, in every case of that size, on both
    chips and in both passes.
    """
    ratios = {name: {} for name in OPERATIONS.values()}
    for row in table:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        operation, sizes, _ = CASES[cells[0]]
        if operation not in OPERATIONS:
            continue
        chip, xla, ours = cells[2], cells[4].split(" / "), cells[5].split(" / ")
        ratio = None
        if "?" not in (xla[1:2] + ours[:2]) and len(xla) == len(ours) == 3:
            per_us = BANDWIDTH[chip] / 1e12  # MB in a microsecond
            cost = max(float(ours[0]), float(ours[1]) / per_us)
            ratio = cost / (float(xla[1]) / per_us)
        ratios[OPERATIONS[operation]].setdefault(sizes[1], {}).setdefault(cells[0], []).append(
            ratio
        )
    found = {}
    for operation, sizes in ratios.items():
        least, why = None, "the estimator gives no cycles on both chips"
        for size in sorted(sizes, reverse=True):
            every = [ratio for case in sizes[size].values() for ratio in case]
            known = None not in every and len(every) == 2 * len(CLOCK) * len(sizes[size])
            better = known and max(every) < 1
            text = f"the estimator gives no cycles on both chips in every case of {size} keys"
            if known:
                cost = f"the kernel costs {max(every):.2f} of XLA's traffic"
                text = f"static figures: at {size} keys {cost}"
            if better or least is None:
                least, why = (size if better else None), text
            if not better:
                break
        why += "; no device has measured it" if least else "; XLA until a device decides"
        found[operation] = {"min_keys": least, "why": why}
    return found


def write_choices(found: dict[str, dict]) -> None:
    """Puts rows for TPU into the dispatch table."""
    table = json.loads(DISPATCH.read_text())
    for operation, row in found.items():
        table[operation]["tpu"] = row
    blocks = []
    for operation, platforms in table.items():
        rows = ",\n".join(f'    "{p}": {json.dumps(row)}' for p, row in platforms.items())
        blocks.append(f'  "{operation}": {{\n{rows}\n  }}')
    DISPATCH.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def timings(rounds: int) -> None:
    """Interleaved timings on the default device; prints milliseconds and ratios of medians."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas

    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), {platform.processor() or platform.machine()}")
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    for case, (operation, sizes, options) in CASES.items():
        if operation != "attention" or options or (device.platform == "cpu" and sizes[1] > 4096):
            continue
        arrays = [jax.random.normal(jax.random.key(n), sizes, dtype) for n in range(4)]
        rivals = {
            "kernels_pallas": kernels_pallas.attention,
            "jax.nn": jax.nn.dot_product_attention,
        }
        calls = {}
        for name, function in rivals.items():

            def both(d_out, *qkv, function=function):
                out, pullback = jax.vjp(function, *qkv)
                return out, pullback(d_out)

            calls[name] = partial(lambda f, a: jax.block_until_ready(f(*a)), jax.jit(both), arrays)
        calls.update(torch_call(sizes, device.platform))
        times = {name: [] for name in calls}
        for round_ in range(rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if round_ > 1:
                    times[name].append(time.perf_counter() - start)
        ours = statistics.median(times["kernels_pallas"])
        text = ", ".join(
            f"{name} {statistics.median(t) * 1e3:.2f} ms ({ours / statistics.median(t):.2f}x)"
            for name, t in times.items()
        )
        print(f"{case}, forward and backward: {text}", flush=True)


def torch_call(sizes, platform_name) -> dict:
    """`{"torch": call}` on the same kind of device, or nothing."""
    try:
        import torch
    except ImportError:
        return {}
    device = "cuda" if platform_name == "gpu" and torch.cuda.is_available() else "cpu"
    if platform_name != "cpu" and device == "cpu":
        return {}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    batch, length, heads, width = sizes
    arrays = [
        torch.randn(batch, heads, length, width, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(*arrays)
        torch.autograd.grad(out, arrays, torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()

    return {"torch": call}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--static", action="store_true", help="compile for TPU v5e and v6e")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--cases", default="", help="a word in the names of the cases to compile")
    parser.add_argument(
        "--chips", nargs="+", choices=CLOCK, default=list(CLOCK), help="of the rows"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_one(*json.loads(options.one))))
    elif options.static:
        print("\n".join(HEADER))
        rows = static_table([case for case in CASES if options.cases in case], options.chips)
        text = README.read_text()
        start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
        table = merged(text[start:end].strip().splitlines()[len(HEADER) :], rows)
        print(json.dumps(choices(table), indent=2))
        if options.write:
            table = "\n".join([*HEADER, *table])
            README.write_text(f"{text[:start]}\n{table}\n{text[end:]}")
            write_choices(choices(table.splitlines()[len(HEADER) :]))
    else:
        timings(options.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
