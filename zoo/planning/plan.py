"""`zoo plan`: the train step of a config, compiled for TPUs that are not there.

    zoo plan configs/vision/vit_l16_imagenet.py --topology v5e:16x16 --partition fsdp=256

libtpu (`pip install 'flax-zoo[tpu]'`) compiles on any Linux machine for a topology that is only
described. It runs in a process of its own, which writes down the scheduled program and the buffers
it has assigned; from these come the figures. Making machine code of it would take nine tenths of
the time and tells nothing more about memory or collectives, so the process is stopped there.

What a chip holds is what XLA assigned, padding included; the machine code itself (some ten MiB) is
not in it. FLOPs are our own count (`zoo.planning.flops`), bytes those of the program
(`zoo.planning.hlo`): XLA's cost analysis counts the body of a loop once.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.planning import compiler
from zoo.planning.chips import GIB, NoPlan, find_chip, find_slice
from zoo.planning.collectives import Traffic, grouped


@dataclass(frozen=True)
class Plan:
    """What the compiler said of a config on a slice.

    Attributes:
      config: the name of its file.
      topology: chip and shape, as libtpu names them.
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


def plan(args: Sequence[str], topology: str, slices: int = 1) -> Plan:
    """Compile the train step that a command line of `train.py` describes, for a topology.

    Args:
      args: the config file and fields to change, as for `train.py`.
      topology: chip and shape, such as `v5e:16x16` or `v5p:4x4x4`, or a cloud's name of a slice,
        such as `v5litepod-256`.
      slices: how many of them, joined by the data centre's network.

    Raises:
      NoPlan: if config, mesh and topology do not fit together, or libtpu is missing.
    """
    chip, topology = find_chip(topology), find_slice(topology)
    if ":" not in topology:
        raise NoPlan(
            f"{topology} is a generation: give a slice of it, such as {topology}:{chip.slices[3]}, "
            "or ask for the --smallest."
        )
    if slices < 1:
        raise NoPlan(f"slices is {slices}; give 1 or more.")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zoo-plan-") as folder:
        request = {"args": list(args), "topology": topology, "slices": slices}
        (Path(folder) / "request.json").write_text(json.dumps(request))
        program = compiler.train_step(Path(folder))
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
            collectives=tuple(grouped(module.collectives())),
            traffic=module.traffic(),
            seconds=time.monotonic() - started,
        )
