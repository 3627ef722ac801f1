"""What runs in the compiler's process: a config's train step, lowered for described chips."""

import dataclasses
import json
import math
import re
import traceback
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, PartitionError
from zoo.planning.chips import CHIPS, NoPlan

OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([KMGT])\)? (?:exceeds|of)", re.S)


def compile_in(folder: str) -> None:
    """Compile what `request.json` of a folder asks for; write `facts.json`, or `error.json`."""
    place = Path(folder)
    request = json.loads((place / "request.json").read_text())
    error: dict[str, Any] = {}
    try:
        from zoo.training import command_line

        devices = devices_of(request["topology"], request["slices"])
        name, command = command_line.parse(request["args"])
        lowered = _lower(name, command.config, devices, place)
        lowered.compile()
    except PartitionError as what:
        error = {"kind": "division", "sentence": str(what)}
    except ConfigError as what:
        error = {"kind": "foreseen", "sentence": str(what)}
    except Exception as what:
        text = str(what).strip()
        if needed := OUT_OF_MEMORY.search(text):
            size = float(needed.group(1)) * 2 ** (10 * (1 + "KMGT".index(needed.group(2))))
            error = {"kind": "memory", "bytes": size}
        else:
            traceback.print_exc()
            reason = f": {text.splitlines()[0][:300].rstrip('.')}" if text else ""
            sentence = f"{request['args'][0]} gives no plan for {request['topology']}{reason}"
            error = {"kind": "unforeseen", "sentence": sentence}
    if error:
        (place / "error.json").write_text(json.dumps(error))


def devices_of(topology: str, slices: int) -> list:
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
        generation, _, shape = topology.partition(":")
        if "not divisible" in str(error):
            raise NoPlan(
                f"There is no {generation} slice of {shape} chips, of whole hosts; there are "
                f"{', '.join(CHIPS[generation].slices)} and others."
            ) from None
        what = f"{slices} slices of {topology}" if slices > 1 else topology
        reason = str(error).strip().splitlines()[0].partition(": ")[2] or str(error)
        raise NoPlan(f"libtpu cannot describe {what}: {reason.rstrip('.')}.") from None
    return list(found)


def _lower(name: str, config: Any, devices: list, place: Path) -> Any:
    """The train step, lowered for the devices; writes what is known before it is compiled."""
    import jax
    import libtpu

    from zoo.planning.flops import count_flops
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
        "frozen parameters": state.frozen,
        "optimizer state": state.opt_state,
        "mean of the parameters": state.ema,
        "other state": (state.collections, state.carry, state.step, state.rng),
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
