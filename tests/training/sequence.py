"""Attention, recurrences and training steps with the length cut over devices; prints JSON."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kernels_pallas
from zoo.data import Data, train_iterator
from zoo.data.synthetic import PeriodicText
from zoo.tasks import LanguageModelling
from zoo.training import Model, Optimizer, Partition, TrainConfig
from zoo.training.program import make_program


def attention(mesh, heads):
    """The largest differences in values and gradients, and what the devices exchange."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(4, 64, heads, 8)), jnp.float32) for _ in range(3)
    )

    def loss(*x):
        out = kernels_pallas.attention(*x, mask=kernels_pallas.Causal())
        return jnp.sin(out).sum(), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, want), grads = jax.jit(run)(query, key, value)
    cut = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    with jax.set_mesh(mesh):
        spread = jax.jit(run, out_shardings=((None, cut), (cut,) * 3))
        x = jax.device_put((query, key, value), cut)
        text = spread.lower(*x).compile().as_text()
        (_, got), found = spread(*x)
    pairs = zip((got, *found), (want, *grads), strict=True)
    return {
        "error": max(float(jnp.abs(a - b).max()) for a, b in pairs),
        "exchanged": sorted(set(re.findall(r"(all-[\w-]+|collective-permute)\(", text))),
    }


def losses(name, partition, devices):
    """Of some steps of a language model."""
    text = PeriodicText(64, 32, vocab_size=32)
    config = TrainConfig(
        model=Model(name, {"vocab_size": 32}),
        task=LanguageModelling(),
        data=Data(text, text, batch_size=8),
        optimizer=Optimizer(learning_rate=1e-2, schedule="constant"),
        partition=dataclasses.replace(partition, fsdp_min_size=64),
    )
    program = make_program(config, jax.devices()[:devices])
    batches, found = train_iterator(config.data, 0), []
    with program.context():
        state = program.init(0)
        for _ in range(3):
            state, output = program.step(state, program.place(next(batches)))
            found.append(float(program.fetch(output).means["loss"].compute()))
    return found


if __name__ == "__main__":
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    results = {f"{heads} heads": attention(mesh, heads) for heads in (4, 3)}
    for name in sys.argv[1:]:
        results[name] = {
            "alone": losses(name, Partition(), 1),
            "cut": losses(name, Partition(data=2, sequence=2, fsdp=2), 8),
        }
    json.dump(results, sys.stdout)
