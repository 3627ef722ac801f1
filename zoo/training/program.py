"""A run's compiled functions over its devices: one program on a mesh, or a replica each (`pmap`).

Both kinds offer the same: `init`, `step`, `evaluate`, and `to_global` / `from_global`, which turn a
state into the form that checkpoints hold (whole arrays on the mesh) and back. `abstract` is that
form without memory, so that `train_step.lower(program.abstract, program.abstract_batch())` compiles
the real step for devices that need not be there.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from zoo.errors import ConfigError
from zoo.methods.method import adapt_all, wrap_all
from zoo.tasks.task import Networks, joined, of_network
from zoo.training import groups, partition
from zoo.training.checks import checked, reading
from zoo.training.config import Model, Optimizer, TrainConfig, resolve
from zoo.training.first import one_by_one
from zoo.training.offload import leaf_by_leaf, on_host
from zoo.training.optimizer import make_optimizer, make_schedule, rate_factors
from zoo.training.precision import compute_in
from zoo.training.state import State
from zoo.training.step import Group, make_eval_step, make_train_step, whole_update
from zoo.training.tree import join, path_of, split

Batch = Mapping[str, np.ndarray]
METHODS, CARRY = 0x6D657468, 0x63617272  # what the run's seed is folded with, for other uses


def build_model(config: Model) -> nn.Module:
    """The module that a config names.

    Raises:
      ConfigError: if there is none of that name or it lacks an overridden field.
    """
    try:
        if ":" not in config.name:
            return zoo.create(config.name, **config.overrides)
        return zoo.Variant(resolve(config.name), {}, "").create(**config.overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def build_networks(config: TrainConfig) -> Networks:
    """The network, or networks by name, that a config names, without its methods.

    Raises:
      ConfigError: if one is not there, lacks an overridden field, or cannot have `partition.remat`.
    """
    remat = config.partition.remat
    if isinstance(config.model, Model):
        network = build_model(config.model)
        return network if remat is None else _with_remat(network, remat)
    networks = {name: build_model(model) for name, model in config.model.items()}
    if remat is not None:
        can = {n: "remat" in type(m).__dataclass_fields__ for n, m in networks.items()}
        networks |= {n: _with_remat(networks[n], remat) for n in networks if can[n]}
    return networks


def trained_networks(config: TrainConfig, networks: Networks) -> tuple[str, ...]:
    """Names of the networks that a phase trains: methods apply to them. '' is an only network."""
    if isinstance(networks, nn.Module):
        return ("",)
    groups = {group for phase in config.task.phases for group in phase.groups}
    return tuple(name for name in networks if name in groups)


def make_program(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> "Program":
    """The program of a config on these devices (default: all).

    Raises:
      ConfigError: if model, mesh, batch or schedule do not fit together.
    """
    kind = PmapProgram if config.partition.mode == "pmap" else Program
    if kind is PmapProgram and config.partition.offload != "none":
        raise ConfigError("partition.offload needs partition.mode=sharding, not pmap.")
    mesh = partition.make_mesh(config.partition, devices)
    partition.check_batch(config.data.batch_size, dict(mesh.shape), config.accumulate)
    return kind(config, mesh)


class Program:
    """One program over a mesh, partitioned by GSPMD.

    Attributes:
      config: of the run.
      mesh: its devices.
      base: the network or networks of the config, as checkpoints know them.
      networks: the same with the config's methods, as the task sees them.
      task: what they learn.
      assigned: path of each parameter -> its optimizer group, None for a frozen one.
      abstract: the state as `jax.ShapeDtypeStruct`s with shardings.
      train_step: `(state, batch) -> (state, output)`, jitted; the state is donated.
      eval_step: `(variables, batch) -> metrics`, jitted.
    """

    axis: str | None = None
    _compiling: Future | None = None

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        """Check everything that shapes alone can tell, and set up the functions."""
        self.config, self.mesh, self.task = config, mesh, config.task
        self.base, self.precision = compute_in(build_networks(config), config.precision)
        self.adapted = trained_networks(config, self.base)
        try:
            self.networks = self._wrapped()
            self._initial = jax.jit(self._variables)  # traced once, used by all that follows
            with self.context():
                shapes = jax.eval_shape(self._initial, jax.eval_shape(lambda: self._key(0)))
        except ValueError as error:
            if not config.methods:
                raise
            raise ConfigError(str(error)) from None
        self.assigned = groups.assign(
            shapes["params"],
            self.base,
            phases=self.task.phases,
            methods=config.methods,
            freeze=config.freeze,
        )
        self.optimizers = self._optimizers()
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, partition.BATCH)
        self.abstract = self._abstract_state()
        step = make_train_step(
            self.networks,
            self.task,
            {name: self._group(name) for name in self.optimizers},
            self.assigned,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            axis=self.axis,
            precision=self.precision,
        )
        self._compile(step, make_eval_step(self.networks, self.task, self.axis, self.precision))

    # ------------------------------------------------------------------------ what is trained

    def _wrapped(self) -> Networks:
        methods = self.config.methods
        if isinstance(self.base, nn.Module):
            return wrap_all(self.base, methods)
        return {
            name: wrap_all(network, methods) if name in self.adapted else network
            for name, network in self.base.items()
        }

    def adapt(self, variables: Any, rng: jax.Array, batches: Any = None) -> dict[str, Any]:
        """Variables of `networks` from those of `base`."""
        methods = self.config.methods
        if isinstance(self.base, nn.Module):
            return adapt_all(self.base, variables, methods, rng, batches)
        each = {name: of_network(variables, name) for name in self.base}
        for name in self.adapted:
            each[name] = adapt_all(self.base[name], each[name], methods, rng, batches)
        return joined(each)

    def _variables(self, seed: jax.Array) -> dict[str, Any]:
        key = jax.random.wrap_key_data(seed)
        variables = self.task.init(self.base, key)
        return self.adapt(variables, jax.random.fold_in(key, METHODS))

    def _optimizers(self) -> dict[str, Optimizer]:
        """Group -> its optimizer's config, of the groups that have leaves.

        Raises:
          ConfigError: for a group without an optimizer, an optimizer without a group, or a pattern
            that matches nothing.
        """
        config, used = self.config, {g for g in self.assigned.values() if g is not None}
        if "" not in config.optimizers:
            for name, known in ((n, config.optimizers) for n in sorted(used)):
                if name not in known:
                    raise ConfigError(
                        f"optimizer has no entry for the group {name!r}; it has {', '.join(known)}."
                    )
            for name in config.optimizers:
                if name not in used:
                    raise ConfigError(
                        f"optimizer has an entry {name!r}, but no leaf is trained in that group; "
                        f"the groups are {', '.join(sorted(used))}."
                    )
        for name, optimizer in config.optimizers.items():
            paths = [p for p, g in self.assigned.items() if g is not None and name in ("", g)]
            for what in ("rate_multipliers", "decay_multipliers", "no_decay"):
                groups.check_patterns(f"optimizer.{what}", getattr(optimizer, what), paths)
        return {name: config.optimizers.get(name) or config.optimizers[""] for name in sorted(used)}

    def _group(self, name: str) -> Group:
        config = self.optimizers[name]
        optimizer = make_optimizer(config, self.base)
        update = whole_update(optimizer)
        if self.config.partition.offload == "optimizer":
            there = jax.tree.map(lambda s: s.sharding, self.abstract.opt_state[name])
            update = leaf_by_leaf(optimizer, config.clip, there)
        return Group(
            update,
            make_schedule(config, self.config.num_steps),
            lambda params: rate_factors(config, self.base, params),
        )

    # ------------------------------------------------------------------------ the state

    def _init(self, seed: jax.Array) -> State:
        """The first state from a seed's key data."""
        return self._begin(self._initial(seed), seed)

    def _begin(self, variables: Any, seed: jax.Array) -> State:
        """The state of step 0 with these variables."""
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        params, frozen = split(variables["params"], lambda path: self.assigned[path] is not None)
        opt_state = {}
        for name, config in self.optimizers.items():
            own, _ = split(params, lambda path, name=name: self.assigned[path] == name)
            opt_state[name] = make_optimizer(config, self.base).init(own)
        average = jax.tree.map(jnp.copy, params) if self.config.ema_decay is not None else None
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), CARRY)
        carry = self.task.init_carry(self.networks, jax.vmap(
            lambda row: jax.random.fold_in(key, row)
        )(self._rows()))  # fmt: skip
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, frozen, collections, carry, opt_state, average, seed)

    def _rows(self) -> jax.Array:
        """Numbers of the rows of the global batch that a program of this kind holds."""
        return jnp.arange(self.config.data.batch_size)

    def _abstract_state(self) -> State:
        with self.context():
            shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: self._key(0)))
        whole = join(shapes.params, shapes.frozen)
        rules = groups.partition_rules(self.base)
        params = partition.shardings(whole, self.mesh, self.config.partition, rules)
        places = partition.like_parameters(shapes, whole, params, self.whole)
        carry = jax.tree.map(lambda _: self.batch_sharding, shapes.carry)
        places = dataclasses.replace(places, carry=carry)
        if self.config.partition.offload == "optimizer":
            opt_state = on_host(places.opt_state, shapes.opt_state)
            places = dataclasses.replace(places, opt_state=opt_state)
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
        )

    def sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a leaf of the variables lives, as `zoo.load` asks: paths relative to `params`.

        Leaves of other collections have its name in front. What the program does not know is whole.
        """
        return self._places.get(path.removeprefix("params/"), self.whole)

    @functools.cached_property
    def _places(self) -> dict[str, NamedSharding]:
        variables = self.abstract.variables(averaged=False)
        flat = jax.tree_util.tree_leaves_with_path(variables)
        return {path_of(keys).removeprefix("params/"): leaf.sharding for keys, leaf in flat}

    def _compile(self, step: Any, eval_step: Any) -> None:
        places = jax.tree.map(lambda s: s.sharding, self.abstract)
        self.train_step = jax.jit(
            step,
            in_shardings=(places, self.batch_sharding),
            out_shardings=(places, self.whole),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(eval_step, out_shardings=self.whole)
        if self.mesh.size == 1:
            self._first = lambda seed: jax.device_put(one_by_one(self._init)(seed), places)
        else:  # each leaf is made where it lives
            self._first = jax.jit(self._init, out_shardings=places)
        # what variables become is what they were: no second copy is made
        self._first_with = jax.jit(self._begin, out_shardings=places, donate_argnums=0)

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

    def init_with(self, variables: Mapping[str, Any], seed: int) -> State:
        """The first state with these variables of `networks`, which are used up."""
        return self._first_with(dict(variables), self._key(seed))

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

    def trace(self, batch: Any) -> None:
        """Trace the training step for a placed batch, without compiling it."""
        self.train_step.eval_shape(self.abstract, batch)

    def compile_ahead(self, batch: Any) -> None:
        """Begin to compile the training step for a placed batch, in another thread.

        The first state can be made meanwhile; `step` waits. An error is raised by `step`, which
        compiles once more. Of several processes none compiles ahead, as all must go in step; nor
        does one with a GPU, whose compiler measures kernels, which the first state would disturb.
        """
        if jax.process_count() > 1 or self.mesh.devices.flat[0].platform == "gpu":
            return
        lowered = self.train_step.lower(self.abstract, batch)
        thread = ThreadPoolExecutor(1)
        self._compiling = thread.submit(lowered.compile)
        thread.shutdown(wait=False)

    def step(self, state: State, batch: Any) -> tuple[State, Any]:
        """One training step; the state given is used up."""
        if self._compiling is not None:
            wait([self._compiling])
            self._compiling = None
        return self.train_step(state, batch)

    def measures(self, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Names and shapes of what evaluation measures, for a placed batch; nothing is run."""
        return self.eval_step.eval_shape(self.abstract.variables(), batch)

    def evaluate(
        self,
        variables: Mapping[str, Any],
        data: Any = None,
        each: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Metrics over all held-out examples (of the config, or of other data), every one once.

        Args:
          variables: of the networks.
          data: None: that of the config.
          each: called before each batch; it may raise.

        Raises:
          DataError: for an example that cannot be read or does not fit.
        """
        data = self.config.data if data is None else data
        outputs = []
        for batch in self.held_out(data):
            each()
            outputs.append(self.eval_step(variables, batch))
        sums: dict[str, list[float]] = {}
        for output in outputs:
            for name, mean in self.fetch(output).items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += float(mean.total)
                total[1] += float(mean.count)
        return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}

    def held_out(self, data: Any) -> Iterator[Any]:
        """Batches of held-out examples, checked and placed."""
        from zoo.data import eval_batches

        batches = eval_batches(data, *self.share())
        check = None
        with contextlib.closing(batches):
            while True:
                with reading("a held-out example"):
                    batch = next(batches, None)
                if batch is None:
                    return
                if check is None:
                    check, _ = self.check(batch, "data.eval")
                yield self.place_padded(check(batch))

    def check(self, batch: Batch, what: str) -> tuple[Any, dict[str, Any]]:
        """What refuses batches that do not fit, on the host, and the shapes of predictions."""
        first = checked(self.task, self.networks, {}, what)(batch)
        outputs = self.predicted(first)
        return checked(self.task, self.networks, outputs, what), outputs

    def predicted(self, batch: Batch) -> dict[str, Any]:
        """Shapes of what the task predicts, where its check asks for them."""
        if not self.task.checks_outputs:
            return {}
        variables = self.abstract.variables(averaged=False)
        shapes = {name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)
                  for name, x in batch.items()}  # fmt: skip
        try:
            with self.context():
                return dict(jax.eval_shape(self.predict, variables, shapes))
        except (NotImplementedError, ValueError, TypeError, LookupError, FlaxError):
            return {}  # what is wrong is said where the metrics are traced

    @functools.cached_property
    def predict(self) -> Any:
        """`(variables, batch) -> {name: array}` of the task, compiled when it is called."""

        def predict(variables: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
            cast = self.precision
            return self.task.predict(self.networks, cast.variables(variables), cast.batch(batch))

        return jax.jit(predict)

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

    def _rows(self) -> jax.Array:
        rows = self.config.data.batch_size // self.mesh.size
        return jax.lax.axis_index(self.axis) * rows + jnp.arange(rows)

    def _abstract_state(self) -> State:
        seed = jax.eval_shape(lambda: self._key(0))
        init = jax.vmap(self._init, axis_name=self.axis, axis_size=self.mesh.size, in_axes=None)
        shapes = jax.eval_shape(init, seed)

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=self.whole)

        def all_rows(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.batch_sharding)

        carry = jax.tree.map(all_rows, shapes.carry)
        return dataclasses.replace(jax.tree.map(one, shapes), carry=carry)

    def _compile(self, step: Any, eval_step: Any) -> None:
        devices = list(self.mesh.devices.flat)
        self.local = [d for d in devices if d.process_index == jax.process_index()]
        options = {"axis_name": self.axis, "devices": devices}
        self.train_step = jax.pmap(step, donate_argnums=0, **options)
        self.eval_step = jax.pmap(eval_step, **options)
        self._first = jax.pmap(self._init, **options)
        self._first_with = jax.pmap(self._begin, **options)
        self._copy = jax.pmap(lambda x: x, **options)

    def trace(self, batch: Any) -> None:
        """Not done ahead: what does not fit is said when the first step is compiled."""

    def compile_ahead(self, batch: Any) -> None:
        """Not done ahead."""

    def measures(self, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Names and shapes of what evaluation measures, for the parts of a batch."""
        variables = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((len(self.local), *s.shape), s.dtype),
            self.abstract.variables(),
        )
        return jax.eval_shape(self.eval_step, variables, batch)

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

    def init_with(self, variables: Mapping[str, Any], seed: int) -> State:
        """The first state with these variables, on each device."""
        seeds = self._spread(np.asarray(self._key(seed)))
        return self._first_with(self._spread(dict(variables)), seeds)

    def place(self, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of a batch, a part for each local device."""
        parts = len(self.local)
        return {k: x.reshape(parts, len(x) // parts, *x.shape[1:]) for k, x in batch.items()}

    def fetch(self, output: Any) -> Any:
        """The first replica's output on the host; all are the same."""
        return jax.tree.map(lambda x: x[0], jax.device_get(_local(output)))

    def to_global(self, state: State) -> State:
        """Replicas as one array that is whole on every device; each has its rows of the carry."""

        def one(x: jax.Array) -> jax.Array:
            shape = x.shape[1:]
            parts = [shard.data.reshape(shape) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(shape, self.whole, parts)

        def all_rows(x: jax.Array) -> jax.Array:
            shape = (x.shape[0] * x.shape[1], *x.shape[2:])
            parts = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(shape, self.batch_sharding, parts)

        carry = jax.tree.map(all_rows, state.carry)
        rest = dataclasses.replace(state, carry={})
        return dataclasses.replace(jax.tree.map(one, rest), carry=carry)

    def from_global(self, state: State) -> State:
        """A replica of the state on each device, and its rows of the carry."""

        def own_rows(x: jax.Array) -> np.ndarray:
            shards = {s.device: np.asarray(s.data) for s in x.addressable_shards}
            return np.stack([shards[device] for device in self.local])

        carry = jax.tree.map(own_rows, state.carry)
        rest = self._spread(dataclasses.replace(state, carry={}))
        return self._copy(dataclasses.replace(rest, carry=carry))


def _local(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def _with_remat(model: nn.Module, how: str) -> nn.Module:
    if "remat" not in type(model).__dataclass_fields__:
        raise ConfigError(
            f"partition.remat={how} needs a model that has the field remat; "
            f"{type(model).__name__} has none."
        )
    return model.clone(remat=False if how == "none" else how)
