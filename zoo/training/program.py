"""A run's compiled functions over its devices: one program on a mesh, or a replica each (`pmap`).

Both kinds offer the same: `init`, `step`, `evaluate`, and `to_global` / `from_global`, which turn a
state into the form that checkpoints hold (whole arrays on the mesh) and back. `abstract` is that
form without memory, so that `train_step.lower(program.abstract, program.abstract_batch())` compiles
the real step for devices that need not be there.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from zoo.errors import ConfigError
from zoo.system import of as system_of
from zoo.training import partition
from zoo.training.config import Model, TrainConfig, resolve
from zoo.training.offload import leaf_by_leaf, on_host
from zoo.training.optimizer import make_optimizer, make_schedule
from zoo.training.state import State
from zoo.training.step import in_bfloat16, make_eval_step, make_init, make_train_step

Batch = Mapping[str, np.ndarray]


def build_model(config: Model, precision: str = "float32") -> nn.Module:
    """The module that a config names, computing in `precision` if it has a `dtype` field.

    Raises:
      ConfigError: if there is none of that name or it lacks an overridden field.
    """
    try:
        if ":" not in config.name:
            model = zoo.create(config.name, **config.overrides)
        else:
            model = zoo.Variant(resolve(config.name), {}, "").create(**config.overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    if precision == "bfloat16" and "dtype" in type(model).__dataclass_fields__:
        return model.clone(dtype=jnp.bfloat16)
    return model


def make_program(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> "Program":
    """The program of a config on these devices (default: all).

    Raises:
      ConfigError: if model, mesh, batch or schedule do not fit together.
    """
    kind = PmapProgram if config.partition.mode == "pmap" else Program
    if kind is PmapProgram and config.partition.offload != "none":
        raise ConfigError("partition.offload needs partition.mode=sharding, not pmap.")
    mesh = partition.make_mesh(config.partition, devices)
    partition.check_batch(config.data.batch_size, dict(mesh.shape), config.optimizer.accumulate)
    return kind(config, mesh)


class Program:
    """One program over a mesh, partitioned by GSPMD.

    Attributes:
      config: of the run.
      mesh: its devices.
      model: the module.
      task: what it learns.
      abstract: the state as `jax.ShapeDtypeStruct`s with shardings.
      train_step: `(state, batch) -> (state, output)`, jitted; the state is donated.
      eval_step: `(variables, batch) -> metrics`, jitted.
    """

    axis: str | None = None

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        """Check everything that shapes alone can tell, and set up the functions."""
        self.config, self.mesh = config, mesh
        self.model = build_model(config.model, config.precision)
        if config.partition.remat is not None:
            self.model = _with_remat(self.model, config.partition.remat)
        self.task = config.task
        if config.precision == "bfloat16" and not hasattr(self.model, "dtype"):
            self.task = in_bfloat16(config.task)
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        ema = config.ema_decay is not None
        self._init = make_init(self.model, self.task, optimizer, ema)
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, partition.BATCH)
        self.abstract = self._abstract_state()
        update = None
        if config.partition.offload == "optimizer":
            there = jax.tree.map(lambda s: s.sharding, self.abstract.opt_state)
            update = leaf_by_leaf(optimizer, config.optimizer.clip, there)
        step = make_train_step(
            self.model,
            self.task,
            optimizer,
            make_schedule(config.optimizer, config.num_steps),
            accumulate=config.optimizer.accumulate,
            ema_decay=config.ema_decay,
            axis=self.axis,
            update=update,
        )
        self._compile(step, make_eval_step(self.model, self.task, self.axis))

    def _abstract_state(self) -> State:
        shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: self._key(0)))
        extra = _partition_rules(self.model)
        params = partition.shardings(shapes.params, self.mesh, self.config.partition, extra)
        places = partition.like_parameters(shapes, shapes.params, params, self.whole)
        if self.config.partition.offload == "optimizer":
            opt_state = on_host(places.opt_state, shapes.opt_state)
            places = dataclasses.replace(places, opt_state=opt_state)
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
        )

    def _compile(self, step: Any, eval_step: Any) -> None:
        places = jax.tree.map(lambda s: s.sharding, self.abstract)
        self.train_step = jax.jit(
            step,
            in_shardings=(places, self.batch_sharding),
            out_shardings=(places, self.whole),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(eval_step, out_shardings=self.whole)
        self._first = jax.jit(self._init, out_shardings=places)

    @staticmethod
    def _key(seed: int) -> jax.Array:
        return jax.random.key_data(jax.random.key(seed))

    def context(self) -> contextlib.AbstractContextManager:
        """The mesh as context: without it the models' constraints say nothing."""
        return jax.set_mesh(self.mesh)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global training batch, without reading one where the source says its form."""
        from zoo.data import example_batch

        rows = self.config.data.batch_size
        return {
            name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=self.batch_sharding)
            for name, x in example_batch(self.config.data).items()
        }

    def share(self) -> tuple[int, int]:
        """Which share of each global batch this process reads: index and count."""
        if jax.process_count() == 1:
            return 0, 1
        size = self.config.data.batch_size
        places = self.batch_sharding.addressable_devices_indices_map((size,)).values()
        rows = sorted({index[0].indices(size)[:2] for index in places})
        first, last = rows[0][0], rows[-1][1]
        if sum(stop - start for start, stop in rows) != last - first or first % (last - first):
            raise ConfigError(
                "The devices of one process hold rows of the batch that are not contiguous; put "
                "the data and fsdp axes across processes, tensor and sequence inside them."
            )
        return first // (last - first), size // (last - first)

    def init(self, seed: int) -> State:
        """The first state, made where it lives."""
        return self._first(self._key(seed))

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """This process's rows of a batch as global arrays on the mesh."""
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), self.batch_sharding)
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, x)
            for name, x in batch.items()
        }

    def place_padded(self, batch: Batch) -> dict[str, jax.Array]:
        """The same for evaluation: rows that are missing for an even cut are added as not valid."""
        rows = math.prod(self.mesh.shape[a] for a in ("data", "fsdp")) // self.share()[1]
        missing = -len(batch["valid"]) % max(rows, 1)
        if missing:
            batch = {
                name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
                for name, x in batch.items()
            }
        return self.place(batch)

    def step(self, state: State, batch: Any) -> tuple[State, Any]:
        """One training step; the state given is used up."""
        return self.train_step(state, batch)

    def evaluate(self, variables: Mapping[str, Any]) -> dict[str, float]:
        """Metrics over all held-out examples, every one once."""
        from zoo.data import eval_batches

        outputs = [
            self.eval_step(variables, self.place_padded(batch))
            for batch in eval_batches(self.config.data, *self.share())
        ]
        sums: dict[str, list[float]] = {}
        for output in outputs:
            for name, mean in self.fetch(output).items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += float(mean.total)
                total[1] += float(mean.count)
        return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}

    def put(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables from elsewhere, whole on each device, for `evaluate`."""
        return jax.device_put(dict(variables), self.whole)

    def fetch(self, output: Any) -> Any:
        """A step's or evaluation's output on the host."""
        return jax.device_get(output)

    def to_global(self, state: State) -> State:
        """The form that checkpoints hold."""
        return state

    def from_global(self, state: State) -> State:
        """The inverse of `to_global`."""
        return state


class PmapProgram(Program):
    """A replica on each device, through `jax.pmap`; gradients are summed over the replicas.

    Dropout draws other masks than in the one-program form, and batch statistics are those of each
    replica, averaged; all else gives the same losses.
    """

    axis = "data"

    def _abstract_state(self) -> State:
        shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: self._key(0)))
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.whole), shapes
        )

    def _compile(self, step: Any, eval_step: Any) -> None:
        devices = list(self.mesh.devices.flat)
        self.local = [d for d in devices if d.process_index == jax.process_index()]
        options = {"axis_name": self.axis, "devices": devices}
        self.train_step = jax.pmap(step, donate_argnums=0, **options)
        self.eval_step = jax.pmap(eval_step, **options)
        self._first = jax.pmap(self._init, **options)
        self._copy = jax.pmap(lambda x: x, **options)

    def context(self) -> contextlib.AbstractContextManager:
        """No mesh: each replica is a program of its own."""
        return contextlib.nullcontext()

    def _spread(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (len(self.local), *x.shape)), tree
        )

    def init(self, seed: int) -> State:
        """The first state, made on each device."""
        return self._first(self._spread(np.asarray(self._key(seed))))

    def place(self, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of a batch, a part for each local device."""
        parts = len(self.local)
        return {k: x.reshape(parts, len(x) // parts, *x.shape[1:]) for k, x in batch.items()}

    def fetch(self, output: Any) -> Any:
        """The first replica's output on the host; all are the same."""
        return jax.tree.map(lambda x: x[0], jax.device_get(_local(output)))

    def to_global(self, state: State) -> State:
        """Replicas as one array that is whole on every device."""

        def join(x: jax.Array) -> jax.Array:
            shape = x.shape[1:]
            parts = [shard.data.reshape(shape) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(shape, self.whole, parts)

        return jax.tree.map(join, state)

    def from_global(self, state: State) -> State:
        """A replica of the state on each device."""
        return self._copy(self._spread(state))


def _local(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def _with_remat(model: nn.Module, how: str) -> nn.Module:
    if "remat" not in type(model).__dataclass_fields__:
        raise ConfigError(
            f"partition.remat={how} needs a model that has the field remat; "
            f"{type(model).__name__} has none."
        )
    return model.clone(remat=False if how == "none" else how)


def _partition_rules(model: nn.Module) -> Mapping[str, Any]:
    """What the model's system says of where its leaves live, or nothing."""
    found = system_of(model)
    return {} if found is None else found.partition
