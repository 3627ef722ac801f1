"""`zoo plan`: the train step of a config, compiled for TPUs that are not there.

    zoo plan configs/vision/vit_l16_imagenet.py --topology v5e:16x16 --partition fsdp=256

libtpu (`pip install 'flax-zoo[tpu]'`) compiles on any Linux machine for a topology that is only
described. It runs in a process of its own, which writes down the scheduled program and the buffers
it has assigned; from these come the figures. Making machine code of it would take nine tenths of
the time and tells nothing more about memory or collectives, so the process is stopped there.

What a chip holds is what XLA assigned, padding included; the machine code itself (some ten MiB) is
not in it. FLOPs are our own count (`zoo.training.flops`), bytes those of the program
(`zoo.training.hlo`): XLA's cost analysis counts the body of a loop once.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError
from zoo.training import hlo

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, one device a chip.

    Attributes:
      hbm: GiB of memory on a chip.
      usable: GiB that the compiler may assign (its own figure).
      flops: peak in bfloat16, operations a second.
      bandwidth: of the memory, bytes a second.
      axes: of the torus.
      smallest: the slices there are, from one host on.
    """

    hbm: int
    usable: float
    flops: float
    bandwidth: float
    axes: int
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS = {
    "v4": Chip(32, 30.75, 275e12, 1.23e12, 3, _CUBE),
    "v5e": Chip(16, 15.75, 197e12, 0.82e12, 2, _FLAT),
    "v5p": Chip(95, 95.73, 459e12, 2.77e12, 3, _CUBE),
    "v6e": Chip(32, 31.24, 918e12, 1.64e12, 2, _FLAT),
}
"""Peaks and bandwidths are Google's (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step that are alike.

    Attributes:
      kind: as in HLO.
      what: `parameters` (their gradients included), `activations` or `scalars`.
      shapes: of one of them, as text.
      count: how many run in a step.
      bytes: of all of them, at one chip.
      group: chips that take part together.
      known: False where a loop's length is not known: then these are figures of one iteration.
      source: the operation of the model that the first of them serves.
    """

    kind: str
    what: str
    shapes: str
    count: int
    bytes: int
    group: int
    known: bool
    source: str


@dataclass(frozen=True)
class Plan:
    """What the compiler said of a config on a slice.

    Attributes:
      config: the name of its file.
      topology: as asked for.
      slices: of this topology.
      chips: in all.
      partition: sizes of the mesh axes, and choices that are not the default.
      holds: what a chip holds, bytes by name.
      host: what is kept in the host's memory for a chip, bytes by name.
      hbm: bytes that a chip uses; what it would need if it does not fit.
      usable: bytes that there are.
      fits: whether it compiles.
      collectives: of a step, largest first.
      flops: of a step, all chips together.
      traffic: bytes of a step to and from a chip's HBM.
      seconds: that planning took.
      compiler: libtpu's version.
    """

    config: str
    topology: str
    slices: int
    chips: int
    partition: dict[str, Any]
    holds: dict[str, int]
    host: dict[str, int]
    hbm: int
    usable: int
    fits: bool
    collectives: tuple[Traffic, ...]
    flops: float
    traffic: float
    seconds: float
    compiler: str


class NoPlan(ConfigError):
    """Nothing can be compiled; one sentence says why."""


# ---------------------------------------------------------------------------- asking


def plan(args: Sequence[str], topology: str, slices: int = 1) -> Plan:
    """Compile the train step that a command line of `train.py` describes, for a topology.

    Args:
      args: the config file and fields to change, as for `train.py`.
      topology: chip and shape, such as `v5e:16x16` or `v5p:4x4x4`.
      slices: how many of them, joined by the data centre's network.

    Raises:
      NoPlan: if config, mesh and topology do not fit together, or libtpu is missing.
    """
    chip = find_chip(topology)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zoo-plan-") as folder:
        request = {"args": list(args), "topology": topology, "slices": slices}
        (Path(folder) / "request.json").write_text(json.dumps(request))
        program = _compile(Path(folder))
        facts = json.loads((Path(folder) / "facts.json").read_text())
        common = dict(
            config=facts["name"],
            topology=topology,
            slices=slices,
            chips=facts["chips"],
            partition=facts["partition"],
            host=facts["host"],
            usable=int(chip.usable * GIB),
            flops=facts["flops"],
            compiler=facts["compiler"],
        )
        if isinstance(program, float):  # what it would need
            return Plan(
                **common,
                holds=facts["holds"],
                hbm=int(program),
                fits=False,
                collectives=(),
                traffic=0.0,
                seconds=time.monotonic() - started,
            )
        module, memory = program
        hbm, host = memory
        rest = hbm - sum(facts["holds"].values())
        if host > sum(common["host"].values()) + 2**20:
            common["host"]["activations"] = host - sum(common["host"].values())
        return Plan(
            **common,
            holds={**facts["holds"], "activations and temporaries": rest},
            hbm=hbm,
            fits=True,
            collectives=tuple(_grouped(module.collectives())),
            traffic=module.traffic(),
            seconds=time.monotonic() - started,
        )


def smallest(args: Sequence[str], chip: str, slices: int = 1) -> tuple[Plan, list[str]]:
    """The smallest slice of a chip's generation that a config fits, and what to change for it.

    Each slice is tried with all of `fsdp`; on the first that fits, with copies instead, as many as
    have room: they communicate less.

    Returns:
      the plan, and the partition as fields to add to the command line.

    Raises:
      NoPlan: if it fits none.
    """
    last: Plan | NoPlan | None = None
    for shape in find_chip(chip).slices:
        chips = math.prod(map(int, shape.split("x"))) * slices
        topology = f"{chip.partition(':')[0]}:{shape}"
        fields = _partition_fields(data=1, fsdp=chips)
        try:
            last = plan([*args, *fields], topology, slices)
        except NoPlan as error:
            last = error
            continue
        if not last.fits:
            continue
        for fsdp in (n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < chips):
            state = sum(last.holds[k] for k in last.holds if k in STATE) * chips / fsdp
            if state + last.holds["activations and temporaries"] > last.usable:
                continue
            wider = _partition_fields(data=-1, fsdp=fsdp)
            found = plan([*args, *wider], topology, slices)
            if found.fits:
                return found, wider
        return last, fields
    if isinstance(last, NoPlan):
        raise last
    raise NoPlan(
        f"It fits no slice up to {last.topology}: a chip would need {last.hbm / GIB:.2f} of "
        f"{last.usable / GIB:.2f} GiB there; {proposal_text(args, last)}."
    )


STATE = ("parameters", "optimizer state", "mean of the parameters", "other state")


def _partition_fields(**sizes: int) -> list[str]:
    return [f"--partition.{axis}={size}" for axis, size in sizes.items()]


def proposal(args: Sequence[str], failed: Plan) -> tuple[list[str], Plan] | None:
    """Fields that make a config fit, with the plan that shows it; None if none was found.

    More fsdp, recomputation, microbatches and the optimizer's state in host memory are added in
    this order, none of which changes what is learnt.
    """
    whole = failed.chips // (
        failed.partition.get("tensor", 1) * failed.partition.get("sequence", 1)
    )
    steps = []
    if failed.partition["fsdp"] < whole:
        steps.append(_partition_fields(data=1, fsdp=whole))
    steps += [["--partition.remat=full"], ["--optimizer.accumulate=2"]]
    steps += [["--optimizer.accumulate=4"], ["--partition.offload=optimizer"]]
    fields: list[str] = []
    for step in steps:
        trial = [f for f in fields if f.split("=")[0] not in {s.split("=")[0] for s in step}] + step
        try:
            found = plan([*args, *trial], failed.topology, failed.slices)
        except NoPlan:
            continue
        if found.fits:
            return trial, found
        fields = trial
    return None


def proposal_text(args: Sequence[str], failed: Plan) -> str:
    """What makes a config fit, as the end of a sentence."""
    found = proposal(args, failed)
    if found is None:
        return "take more chips, or a smaller data.batch_size"
    fields, fitting = found
    return f"{' '.join(fields)} brings it to {fitting.hbm / GIB:.2f} GiB"


def find_chip(topology: str) -> Chip:
    """The chip of a topology's name.

    Raises:
      NoPlan: for an unknown generation, or a shape of the wrong kind.
    """
    name, colon, shape = topology.partition(":")
    if name not in CHIPS:
        raise NoPlan(f"There is no TPU {name!r}; choose {', '.join(CHIPS)}, as in v5e:16x16.")
    chip = CHIPS[name]
    if colon and not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), shape):
        raise NoPlan(
            f"{topology!r} is no {name} slice: it has {chip.axes} axes, as in "
            f"{name}:{chip.slices[4]}."
        )
    return chip


# ---------------------------------------------------------------------------- the compiler


OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([KMGT])\)? (?:exceeds|of)", re.S)


def scheduled(
    command: Sequence[str], folder: Path, name: str
) -> tuple[hlo.Module, tuple[int, int]] | None:
    """Run a process until XLA has scheduled a function's program and assigned its buffers.

    Args:
      command: of the process, which compiles for TPU; its output goes to `log.txt`.
      folder: an empty one for the compiler's files.
      name: of the jitted function.

    Returns:
      The program, and the bytes it takes of the chip's and of the host's memory; None if the
      process ended before.
    """
    flags = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    dump = f"dump/*.jit_{name}.*after_optimizations"
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            while process.poll() is None and not _finished(folder, dump):
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if not (text := _finished(folder, dump)):
        return None
    report = next(folder.glob(f"{dump}-memory-usage-report.txt")).read_text()
    sizes = dict(re.findall(r"Memory Space: (\w+) .*\nTotal bytes: (\d+)", report))
    return hlo.Module(text), (int(sizes["default"]), int(sizes.get("host", 0)))


def _finished(folder: Path, dump: str) -> str:
    """The scheduled module as text, once it is written with all that belongs to it."""
    for program in folder.glob(f"{dump}_after_buffer_assignment.txt"):
        text = program.read_text()
        return text if text.endswith("}\n\n") else ""
    return ""


def _compile(folder: Path) -> Any:
    """Run `compile_in` in a process: the module and its memory, or the bytes it would need."""
    code = f"from zoo.training.plan import compile_in; compile_in({str(folder)!r})"
    if found := scheduled([sys.executable, "-c", code], folder, "train_step"):
        return found
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        if "bytes" in error:
            return float(error["bytes"])
        raise NoPlan(error["sentence"])
    last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
    raise NoPlan(f"The compiler stopped without a word; its last one was: {' '.join(last)}")


def compile_in(folder: str) -> None:
    """Compile what `request.json` of a folder asks for; write `facts.json`, or `error.json`."""
    from zoo.training import command_line

    place = Path(folder)
    request = json.loads((place / "request.json").read_text())
    error: dict[str, Any] = {}
    try:
        devices = _devices(request["topology"], request["slices"])
        name, command = command_line.parse(request["args"])
        lowered = _lower(name, command.config, devices, place)
        lowered.compile()
    except ConfigError as what:
        error["sentence"] = str(what)
    except Exception as what:
        text = str(what)
        if needed := OUT_OF_MEMORY.search(text):
            error["bytes"] = float(needed.group(1)) * 2 ** (
                10 * (1 + "KMGT".index(needed.group(2)))
            )
        else:
            first = text.strip().splitlines()[0] if text.strip() else repr(what)
            error["sentence"] = f"{type(what).__name__}: {first}"
    if error:
        (place / "error.json").write_text(json.dumps(error))


def _devices(topology: str, slices: int) -> list:
    """Descriptions of a slice's chips."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX runs it there
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except Exception as error:
        import importlib.util

        if importlib.util.find_spec("libtpu") is None:
            raise NoPlan(
                "Plans need the compiler for TPUs: pip install 'flax-zoo[tpu]' (Linux only)."
            ) from None
        what = f"{slices} slices of {topology}" if slices > 1 else topology
        reason = str(error).strip().splitlines()[0].partition(": ")[2] or str(error)
        raise NoPlan(f"libtpu cannot describe {what}: {reason.rstrip('.')}.") from None
    return list(found)


def _lower(name: str, config: Any, devices: list, place: Path) -> Any:
    """The train step, lowered for the devices; writes what is known before it is compiled."""
    import jax
    import libtpu

    from zoo.training.flops import count_flops
    from zoo.training.program import make_program

    if config.partition.mode == "pmap":
        raise NoPlan("zoo plan compiles one program for all chips: set partition.mode=sharding.")
    jax.config.update("jax_enable_compilation_cache", False)
    program = make_program(config, devices)
    batch = program.abstract_batch()
    with program.context():
        traced = program.train_step.trace(program.abstract, batch)
        lowered = traced.lower(lowering_platforms=("tpu",))
    state = program.abstract
    parts = {
        "parameters": state.params,
        "optimizer state": state.opt_state,
        "mean of the parameters": state.ema,
        "other state": (state.collections, state.step, state.rng),
        "batch": batch,
    }
    sizes = {part: _local_bytes(tree) for part, tree in parts.items()}
    sizes = {part: size for part, size in sizes.items() if sum(size)}
    default = type(config.partition)()
    choices = {
        f.name: getattr(config.partition, f.name)
        for f in dataclasses.fields(default)
        if f.name not in program.mesh.shape
        and getattr(config.partition, f.name) != getattr(default, f.name)
    }
    facts = {
        "name": name,
        "chips": len(devices),
        "partition": {**{k: n for k, n in program.mesh.shape.items()}, **choices},
        "holds": {part: size[0] for part, size in sizes.items() if size[0]},
        "host": {part: size[1] for part, size in sizes.items() if size[1]},
        "flops": count_flops(traced.jaxpr),
        "compiler": f"libtpu {libtpu.__version__}",
    }
    (place / "facts.json").write_text(json.dumps(facts))
    return lowered


def _local_bytes(tree: Any) -> tuple[int, int]:
    """Bytes that one chip holds of a tree, in HBM and in the host's memory."""
    import jax

    sizes = [0, 0]
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        on_host = leaf.sharding.memory_kind == "pinned_host"
        sizes[on_host] += math.prod(shape) * leaf.dtype.itemsize
    return sizes[0], sizes[1]


# ---------------------------------------------------------------------------- collectives


def _grouped(collectives: list) -> Iterator[Traffic]:
    """Collectives of one kind and shape together, largest first.

    One that moves parameters and activations at once stands in two rows.
    """
    groups: dict[tuple, list] = defaultdict(list)
    for c in collectives:
        parts: dict[str, list] = defaultdict(list)
        for shape, of_parameters in zip(c.shapes, c.of_parameters, strict=True):
            what = "parameters" if of_parameters else "activations"
            parts[what if math.prod(shape[1]) > 1 else "scalars"].append(shape)
        for what, shapes in parts.items():
            groups[c.kind, what, tuple(shapes), c.group, c.known].append(c)
    rows = []
    for (kind, what, shapes, group, known), members in groups.items():
        text = [f"{t}[{','.join(map(str, dims))}]" for t, dims in shapes]
        more = f" and {len(text) - 2} more" if len(text) > 2 else ""
        rows.append(
            Traffic(
                kind,
                what,
                " ".join(text[:2]) + more,
                sum(c.times for c in members),
                round(sum(c.times * hlo.size((*s, 0)) for c in members for s in shapes)),
                group,
                known,
                members[0].source,
            )
        )
    return iter(sorted(rows, key=lambda row: -row.bytes))


# ---------------------------------------------------------------------------- telling


def readable(found: Plan, full: bool = False) -> str:
    """A plan as text."""
    chip = find_chip(found.topology)
    mesh = " ".join(f"{k}={v}" for k, v in found.partition.items() if v != 1) or "one device"
    many = f"{found.slices} slices of " if found.slices > 1 else ""
    lines = [f"{found.config} on {many}{found.topology}: {found.chips} chips, {mesh}", ""]
    lines.append("a chip holds                       MiB")
    for name, size in found.holds.items():
        lines.append(f"  {name:28}{size / 2**20:10,.1f}")
    share = 100 * found.hbm / found.usable
    verdict = "fits" if found.fits else "does NOT fit"
    lines.append(
        f"  {'in all':28}{found.hbm / 2**20:10,.1f}   of {found.usable / 2**20:,.0f} that can be "
        f"used of {chip.hbm} GiB: {share:.0f} %, {verdict}"
    )
    for name, size in found.host.items():
        lines.append(f"  {'in host memory: ' + name:28}{size / 2**20:10,.1f}")
    each = found.flops / found.chips
    lines += [
        "",
        f"a step computes {_units(found.flops)}FLOP, {_units(each)}FLOP a chip (matrix products "
        "and convolutions,",
        f"recomputed ones too): {1e3 * each / chip.flops:.1f} ms at the peak in bfloat16",
    ]
    if not found.fits:
        return "\n".join(lines)
    ridge = chip.flops / chip.bandwidth
    intensity = each / max(found.traffic, 1.0)
    bound = "arithmetic" if intensity > ridge else "memory"
    lines += [
        f"and moves {_units(found.traffic)}B to and from a chip's HBM: {intensity:.0f} FLOP a "
        f"byte, where {ridge:.0f} is the ridge: {bound} bound",
        "",
        "collectives a step, at a chip",
        f"  {'MiB':>10}  {'runs':>6}  {'chips':>5}  kind",
    ]
    rows = found.collectives if full else found.collectives[:12]
    for row in rows:
        once = "" if row.known else "  (an iteration of a loop of unknown length)"
        group = row.group or found.chips
        lines.append(
            f"  {row.bytes / 2**20:10,.2f}  {row.count:6}  {group:5}  {row.kind} of {row.what} "
            f"{row.shapes}{once}"
        )
        if full:
            lines.append(f"  {'':27}{row.source}")
    for rest, what in (
        (found.collectives[len(rows) :], "smaller ones (--full lists them)"),
        (found.collectives, "in all"),
    ):
        if rest:
            size, count = sum(row.bytes for row in rest), sum(row.count for row in rest)
            lines.append(f"  {size / 2**20:10,.2f}  {count:6}         {what}")
    lines += ["", f"planned in {found.seconds:.0f} s with {found.compiler}"]
    return "\n".join(lines)


def _units(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "


# ---------------------------------------------------------------------------- budgets

BUDGETS = Path("configs/budgets")
TOLERANCE = 0.05


def budget(found: Plan) -> dict[str, Any]:
    """What a budget file holds of a plan."""
    totals: dict[str, int] = defaultdict(int)
    for row in found.collectives:
        totals[f"{row.kind} of {row.what}"] += row.bytes
    return {
        "partition": found.partition,
        "hbm_bytes": found.hbm,
        "collective_bytes": dict(sorted(totals.items())),
        "compiler": found.compiler,
    }


def over_budget(found: Plan, allowed: dict[str, Any]) -> list[str]:
    """Sentences on what a plan exceeds a budget in; none if it keeps to it.

    HBM may grow by 5 %. Collectives of a kind may grow by 5 %, and no kind may be new, small ones
    (a thousandth of the whole) apart.
    """
    said = []
    if not found.fits:
        return [f"{found.config} no longer fits {found.topology}."]
    if found.hbm > (1 + TOLERANCE) * allowed["hbm_bytes"]:
        said.append(
            f"{found.config} on {found.topology} uses {found.hbm / 2**20:,.1f} MiB a chip; its "
            f"budget is {allowed['hbm_bytes'] / 2**20:,.1f} MiB and 5 %."
        )
    now, before = budget(found)["collective_bytes"], allowed["collective_bytes"]
    slack = sum(before.values()) / 1000
    for name, size in now.items():
        if size > (1 + TOLERANCE) * before.get(name, 0) + slack:
            rows = [row for row in found.collectives if f"{row.kind} of {row.what}" == name]
            said.append(
                f"{found.config} on {found.topology} runs {name} with {size / 2**20:,.1f} MiB a "
                f"step; its budget is {before.get(name, 0) / 2**20:,.1f} MiB. The largest is "
                f"{rows[0].shapes}, for {rows[0].source}."
            )
    return said


def write_budget(found: Plan, folder: Path = BUDGETS) -> Path:
    """Put a plan into the budget file of its config, beside those of other topologies."""
    path = folder / f"{found.config}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[found.topology] = budget(found)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    return path
