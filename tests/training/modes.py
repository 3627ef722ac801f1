"""Trains the tiny model a few steps on 8 devices in many ways; prints what came out as JSON."""

import dataclasses
import json
import sys
from concurrent.futures import wait

import jax
import numpy as np
from training import tiny

from zoo.data import train_iterator
from zoo.planning.collectives import grouped
from zoo.planning.hlo import Module
from zoo.training import Model, Partition
from zoo.training.program import make_program
from zoo.training.start import first_state

STEPS = 4
WAYS = {
    "one device": (Partition(), {}, 1),
    "data": (Partition(), {}, 8),
    "fsdp": (Partition(fsdp=8, fsdp_min_size=64), {}, 8),
    "tensor": (Partition(fsdp=2, tensor=2, fsdp_min_size=64), {}, 8),
    "pmap": (Partition(mode="pmap"), {}, 8),
    "accumulate": (Partition(fsdp=2, fsdp_min_size=64), {"accumulate": 2}, 4),
    "offload": (Partition(fsdp=2, fsdp_min_size=64, offload="optimizer"), {}, 4),
}
COMPILED = []  # an entry for each program, from whatever thread


@jax.monitoring.register_event_duration_secs_listener
def count(event, seconds, **more):
    if event.endswith("/backend_compile_duration"):
        COMPILED.append(seconds)


def run(partition, optimizer, devices, dropout, steps=STEPS):
    config = tiny.get_config()
    config = dataclasses.replace(
        config,
        model=Model(config.model.name, {"dropout": dropout}),
        partition=partition,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
    )
    program = make_program(config, jax.devices()[:devices])
    batches = train_iterator(config.data, config.seed)
    with program.context():
        batch = program.place(next(batches))
        state = first_state(program, batch)
        if program._compiling is not None:
            wait([program._compiling])
        losses, before, again = [], len(COMPILED), 0
        for step in range(steps):
            state, output = program.step(state, batch)
            if step == 0:
                again = len(COMPILED) - before
            batch = program.place(next(batches))
            output = program.fetch(output)
            losses.append(float(output.means["loss"].compute()))
        held_out = program.evaluate(state.variables())
        state = program.to_global(state)
    weights = {
        jax.tree_util.keystr(path): float(np.abs(np.asarray(leaf)).sum())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf.sharding, jax.sharding.NamedSharding)
    }
    collectives = []
    if partition.fsdp == 8:
        with program.context():
            compiled = program.train_step.lower(program.abstract, program.abstract_batch())
        rows = grouped(Module(compiled.compile().as_text()).collectives())
        collectives = sorted({(row.kind, row.what) for row in rows})
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.shape}
    lowered = ""
    if partition.tensor > 1 and not dropout:
        with program.context():
            lowered = program.train_step.lower(program.abstract, program.abstract_batch()).as_text()
    return {
        "losses": losses,
        "held out": held_out,
        "weights": weights,
        "specs": specs,
        "compiled in the first step": again,
        "optimizer in": sorted(kinds),
        "collectives": collectives,
        "constraints": lowered.count("sdy.sharding_constraint"),
    }


if __name__ == "__main__":
    asked = ["one device", *sys.argv[1:]]
    results = {name: run(*way, dropout=0.0) for name, way in WAYS.items() if name in asked}
    for name in ("one device", "tensor"):
        if "dropout" in asked:
            results[f"{name}, dropout"] = run(*WAYS[name], dropout=0.2)
    json.dump(results, sys.stdout)
