"""Runs that the contracts of task and method are for: two optimizers, a teacher, frozen leaves.

As a program: those that are named, on 8 devices in several ways; prints the losses as JSON.
"""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from training import tiny

from zoo.data import Arrays, Data, train_iterator
from zoo.data.synthetic import RingOfGaussians
from zoo.methods import LoRA
from zoo.tasks import Adversarial, Classification, Distillation
from zoo.training import Checkpointing, Model, Optimizer, Partition, TrainConfig
from zoo.training.program import make_program


class Points(nn.Module):
    """A small MLP from `argument` to `outputs` numbers."""

    argument: str = "latents"
    inputs: int = 8
    outputs: int = 2
    width: int = 32
    depth: int = 2

    def example_inputs(self, batch_size=1):
        return {self.argument: jax.ShapeDtypeStruct((batch_size, self.inputs), jnp.float32)}

    @nn.compact
    def __call__(self, x=None, train=False, **named):
        x = named.get(self.argument, x)
        for i in range(self.depth):
            x = nn.tanh(nn.Dense(self.width, name=f"layers_{i}")(x))
        return nn.Dense(self.outputs, name="head")(x)


POINTS = f"{__file__}:Points"
TINY = f"{tiny.__file__}:Tiny"
IMAGES = {"image_size": (16, 16), "patch_size": 8, "num_classes": 5}


def images(count=64):
    rng = jax.random.key(1)
    pixels = jax.random.normal(rng, (count, 16, 16, 3))
    return Arrays(image=jax.device_get(pixels), label=(jnp.arange(count) % 5).tolist())


def run_of(**parts):
    defaults = dict(
        optimizer=Optimizer(learning_rate=1e-3, schedule="constant"),
        checkpoint=Checkpointing(every=2, keep=5),
        num_steps=4,
        log_every=1,
        compilation_cache=None,
    )
    return TrainConfig(**{**defaults, **parts})


def gan():
    ring = RingOfGaussians(64)
    return run_of(
        model={
            "generator": Model(POINTS),
            "discriminator": Model(POINTS, {"argument": "points", "inputs": 2, "outputs": 1}),
        },
        task=Adversarial(r1=0.1),
        data=Data(ring, ring, batch_size=16, eval_batch_size=16, threads=1),
        optimizer={
            "generator": Optimizer(name="adam", learning_rate=1e-3, schedule="constant"),
            "discriminator": Optimizer(name="sgd", learning_rate=1e-2, schedule="constant", b1=0.5),
        },
        ema_decay=0.9,
    )


def plain():
    """The smallest network that there is."""
    blobs = tiny.Blobs(), tiny.Blobs("test", 16)
    return run_of(
        model=Model(TINY),
        task=Classification(),
        data=Data(*blobs, batch_size=16, eval_batch_size=16, threads=1),
    )


def distillation():
    return dataclasses.replace(
        plain(),
        model={"student": Model(TINY, {"width": 8}), "teacher": Model(TINY)},
        task=Distillation(),
    )


def lora():
    return run_of(
        model=Model("vit_test", IMAGES),
        methods=(LoRA(rank=2),),
        task=Classification(),
        data=Data(images(), images(), batch_size=16, eval_batch_size=16, threads=1),
    )


RUNS = {"gan": gan, "distillation": distillation, "lora": lora}
WAYS = {
    "one device": (Partition(), 1),
    "fsdp": (Partition(fsdp=4, fsdp_min_size=64), 8),
    "pmap": (Partition(mode="pmap"), 8),
}


def losses(config, devices):
    program = make_program(config, jax.devices()[:devices])
    batches = train_iterator(config.data, config.seed)
    found = []
    with program.context():
        state = program.init(config.seed)
        for _ in range(config.num_steps):
            state, output = program.step(state, program.place(next(batches)))
            means = program.fetch(output).means
            found.append([float(m.compute()) for n, m in means.items() if n.endswith("loss")])
        held_out = program.evaluate(state.variables())
    return {"losses": found, "held out": list(held_out.values())}


if __name__ == "__main__":
    results = {
        name: {
            way: losses(dataclasses.replace(make(), partition=partition), devices)
            for way, (partition, devices) in WAYS.items()
        }
        for name, make in RUNS.items()
        if name in sys.argv[1:]
    }
    json.dump(results, sys.stdout)
