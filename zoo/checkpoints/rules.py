"""Declarative, invertible rules from published tensor names to ours.

A system's file has `LAYOUTS`, a table from the name of a layout (the official repository's,
timm's, ...) to its `Rules`:

    LAYOUTS = {
        "official": Rules(
            (
                Rule("patch_embed.proj.weight", "embed/kernel", conv),
                Rule("blocks.{i}.attn.qkv.weight", "layers_{i}/attention/qkv/kernel", linear),
                ...
            ),
            derived={"blocks.{i}.attn.relative_position_index": position_index},
            fresh=("head/*",),
            resize={"position": resize_positions},
        ),
    }

`convert` runs them forwards, one leaf in memory at a time; `export` runs them backwards and gives
the published state dict bit for bit. Both are strict: every tensor of the file is used once, every
leaf of the model is filled once, and `CheckpointMismatch` names all that is wrong at once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.checkpoints.leaves import Leaves, Slot, flat_leaves, initialise, model_leaves, nested
from zoo.checkpoints.mismatch import CheckpointMismatch, Misfit
from zoo.checkpoints.naming import find
from zoo.checkpoints.patterns import compile_pattern
from zoo.checkpoints.plan import kernel_resizer, make_plan
from zoo.checkpoints.report import Report
from zoo.checkpoints.ruleset import (
    LazyTensor,
    Rule,
    Rules,
    Step,
    batch_norm_rules,
    conv_rules,
    dense_rules,
    matches,
    norm_rules,
    steps_for,
)
from zoo.checkpoints.tensor import aligned_empty
from zoo.checkpoints.transforms import (
    Transform,
    chain,
    concat,
    conv,
    elementwise,
    identity,
    linear,
    reshape,
    split,
    squeeze,
    stack,
    tied,
    transpose,
    unsqueeze,
)

__all__ = [
    "CheckpointMismatch",
    "Rule",
    "Rules",
    "Transform",
    "batch_norm_rules",
    "chain",
    "concat",
    "conv",
    "conv_rules",
    "convert",
    "convert_with_report",
    "dense_rules",
    "elementwise",
    "export",
    "identity",
    "linear",
    "manifest",
    "norm_rules",
    "reshape",
    "split",
    "squeeze",
    "stack",
    "tied",
    "transpose",
    "unsqueeze",
]

Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None


def convert(
    layouts: Mapping[str, Rules],
    source: Mapping[str, LazyTensor | np.ndarray],
    model: nn.Module,
    *,
    adapt: bool = False,
    sharding: Placement = None,
    rng: jax.Array | None = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A published state dict as the model's variables, streamed one leaf at a time.

    Types are kept as in the file, so that `export` gives the bits back (float64 becomes float32
    unless JAX's x64 mode is on); a model whose `param_dtype` is not float32 gets that type.

    Args:
      layouts: layout name -> rules; the one that knows most of the file's names is used, under the
        prefix under which it does (`zoo.checkpoints.naming`).
      source: name -> array or lazy tensor.
      model: the module to fill, in either form (`scan_layers`).
      adapt: resize what differs in shape where the rules say how, start heads afresh.
      sharding: where leaves go: None, a `Sharding`, or `f(path, shape) -> Sharding`, with paths as
        rules name them.
      rng: for leaves started afresh; default `jax.random.key(0)`.
      weights: which set, where the names hold several (`teacher`, `student`, `averaged`, `raw`, or
        a prefix).
      ignore: patterns (with `*`) of names that are left aside.
      rename: pattern -> name, each with as many `*`: the file's names are changed before all else.

    Returns:
      Variables for `model.apply`: `{"params": ..., maybe "batch_stats": ...}`.

    Raises:
      CheckpointMismatch: naming all missing, unexpected and misshapen tensors.
      ValueError: for an adapter without its model, or a set of weights that is not there.
    """
    return convert_with_report(
        layouts, source, model, adapt=adapt, sharding=sharding, rng=rng, weights=weights,
        ignore=ignore, rename=rename,
    )[0]  # fmt: skip


def convert_with_report(
    layouts: Mapping[str, Rules],
    source: Mapping[str, LazyTensor | np.ndarray],
    model: nn.Module,
    *,
    adapt: bool = False,
    sharding: Placement = None,
    rng: jax.Array | None = None,
    weights: str | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    param_dtype: Any = None,
) -> tuple[dict[str, Any], Report]:
    """`convert`, which see for the arguments, with the account of what was done.

    The leaves get the type `param_dtype`; None: as `convert` says.
    """
    tensors = {name: _tensor(value) for name, value in source.items()}
    _check_adapter(tensors, layouts, model)
    tensors = dict(renamed(tensors, rename or {}))
    ignored = [name for name in tensors if matches(ignore, name)]
    leaves = model_leaves(model)
    naming = find(layouts, {n: t for n, t in tensors.items() if n not in ignored}, leaves, weights)
    plan = make_plan(layouts, naming, leaves, model, adapt)
    rules, tensors = layouts[naming.layout], dict(naming.tensors)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if param_dtype is None and getattr(model, "param_dtype", jnp.float32) != jnp.float32:
        param_dtype = model.param_dtype
    store = _Store(leaves, sharding, param_dtype)
    resized = {}
    for step in sorted(plan.steps, key=lambda s: leaves.slots[s.targets[0]].path):
        arrays = [tensors[name].read() for name in step.sources]
        try:
            values = step.transform.forward(arrays)
        except ValueError as error:
            raise ValueError(f"{' and '.join(step.sources)}: {error}.") from None
        del arrays
        for path, value in zip(step.targets, values, strict=True):
            wanted = leaves.unrolled[path].shape
            if value.shape != wanted:
                resized[path] = (value.shape, wanted)
                resizer = rules.resizer(path)
                if resizer is not None:
                    made = resizer(value, wanted, leaves.plain, shapes)
                else:
                    kernel = kernel_resizer(value.shape, wanted, leaves.plain)
                    assert kernel is not None, path  # the plan has refused it otherwise
                    made = kernel(value)
                value = np.asarray(made, value.dtype)
                if value.shape != wanted:
                    raise ValueError(f"{path} was resized to {value.shape}, not to {wanted}.")
            store.put(path, value)
        del values, value
    rng = jax.random.key(0) if rng is None else rng
    for path, leaf in initialise(leaves.model, plan.fresh, rng).items():
        store.put(path, np.asarray(leaf))
    used = {name for step in plan.steps for name in step.sources}
    unused = [naming.original[n] for n in tensors if n not in used and matches(rules.unused, n)]
    aside = (*ignored, *naming.aside, *unused)
    report = Report(
        naming.layout, naming.prefix, aside, tuple(plan.fresh), resized,
        tuple(plan.dropped), naming.notes,
    )  # fmt: skip
    return store.variables(), report


def renamed(tensors: Mapping[str, LazyTensor], rename: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Tensors under other names: what a `*` of a pattern matched stands for the `*` of the name.

    Raises:
      ValueError: if a pattern and its name differ in the number of `*`, or two names become one.
    """
    if not isinstance(rename, Mapping):
        raise ValueError(f"rename={rename!r} is no dict of {{'THEIRS*': 'OURS*'}}.")
    for old, new in rename.items():
        if old.count("*") != new.count("*"):
            raise ValueError(f"rename needs as many * in {new!r} as in {old!r}.")
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        for old, new in rename.items():
            found = re.fullmatch("(.*)".join(re.escape(piece) for piece in old.split("*")), name)
            if found is not None:
                pieces = new.split("*")
                name = pieces[0] + "".join(
                    map("".join, zip(found.groups(), pieces[1:], strict=True))
                )
                break
        if name in result:
            raise ValueError(f"Two tensors of the file would be called {name!r}: change rename.")
        result[name] = tensor
    return result


def _check_adapter(
    tensors: Mapping[str, Any], layouts: Mapping[str, Rules], model: nn.Module
) -> None:
    """An adapter (LoRA and its kind) holds differences, not a model's weights."""
    marks = ("lora_", "prompt_embeddings", "ia3_", "adapter_", "lokr_", "hada_", "oft_", "vera_")
    names = [n for n in tensors if any(mark in n for mark in marks)]
    peft = [n for n in tensors if n.startswith("base_model.model.")]
    adds = any("lora_" in p.text for r in layouts.values() for x in r.rules for p in x.sources)
    if not names or adds:
        return
    if any(".base_layer." in n for n in tensors):
        raise ValueError(
            f"This file holds a model with an adapter that is not merged ({names[0]!r} beside its "
            "base). Merge it first (PEFT: model.merge_and_unload(), then save)."
        )
    if 2 * len(names) > len(tensors) or len(peft) == len(tensors):
        raise ValueError(
            f"This is an adapter (PEFT or LoRA, {len(tensors)} tensors such as {names[0]!r}), not "
            f"the weights of {type(model).__name__}. Load the base model's file first, add the "
            "method zoo.methods.lora.LoRA, and read the adapter with "
            "zoo.methods.lora.with_adapter(module, variables, state)."
        )


def export(
    layouts: Mapping[str, Rules],
    variables: Mapping[str, Any],
    model: nn.Module,
    layout: str | None = None,
) -> dict[str, np.ndarray]:
    """Variables as the published state dict: the rules backwards, derived tensors included.

    Arrays are views of the variables where NumPy can make them (on CPU, nothing is copied).

    Args:
      layouts: layout name -> rules.
      variables: of `model`, in its own form (`scan_layers` or not).
      model: the module.
      layout: which layout to write; None: the first that has a place for every leaf.

    Raises:
      ValueError: for an unknown layout.
      CheckpointMismatch: if the variables are not this model's.
    """
    leaves = model_leaves(model)
    values = flat_leaves(variables)
    _check_variables(values, leaves, model)
    return dict(_export(layouts, lambda slot: _row(values[slot.path], slot), leaves, layout))


def manifest(
    layouts: Mapping[str, Rules], model: nn.Module, layout: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and types of the published state dict, from shapes alone."""
    leaves = model_leaves(model)

    def zeros(slot: Slot) -> np.ndarray:
        leaf = leaves.stored[slot.path]
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape[len(slot.index) :])

    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in _export(layouts, zeros, leaves, layout)
    }


def _export(
    layouts: Mapping[str, Rules],
    value: Callable[[Slot], np.ndarray],
    leaves: Leaves,
    layout: str | None,
) -> Iterator[tuple[str, np.ndarray]]:
    rules, steps = _writing_layout(layouts, leaves, layout)
    for step in steps:
        arrays = step.transform.inverse([value(leaves.slots[path]) for path in step.targets])
        yield from zip(step.sources, arrays, strict=True)
    yield from _derived(rules, steps, leaves.plain)


def _writing_layout(
    layouts: Mapping[str, Rules], leaves: Leaves, layout: str | None
) -> tuple[Rules, list[Step]]:
    """The layout asked for, or the first that has a place for every leaf, and its steps."""
    if layout is not None and layout not in layouts:
        raise ValueError(f"There is no layout {layout!r}; known are {', '.join(layouts)}.")
    reasons = []
    for name in layouts if layout is None else [layout]:
        steps, lost = _export_steps(layouts[name], leaves)
        if lost is None:
            return layouts[name], steps
        reasons.append(f"Layout {name!r} has no rule that writes {lost!r}.")
    raise ValueError(reasons[0])


def _export_steps(rules: Rules, leaves: Leaves) -> tuple[list[Step], str | None]:
    """The steps that write every leaf, and the path of a leaf that none writes."""
    steps: list[Step] = []
    written: set[str] = set()
    for path in leaves.unrolled:
        if path in written:
            continue
        fitting = (
            s
            for s in steps_for(path, rules, leaves.plain)
            if all(t in leaves.unrolled and t not in written for t in s.targets)
        )
        step = next(fitting, None)
        if step is None:
            return [], path
        steps.append(step)
        written.update(step.targets)
    return steps, None


def _derived(
    rules: Rules, steps: Sequence[Step], model: nn.Module
) -> Iterator[tuple[str, np.ndarray]]:
    """Recomputed tensors, for the indices under which their neighbours exist."""
    for text, function in rules.derived.items():
        if function is None:
            continue
        pattern = compile_pattern(text)
        near = [
            rule
            for rule in rules.rules
            if pattern.names and any(p.text.startswith(pattern.prefix) for p in rule.sources)
        ]
        places = {
            tuple(sorted((n, s.indices[n]) for n in pattern.names))
            for s in steps
            if pattern.names <= s.indices.keys() and (s.rule in near or not near)
        }
        for items in sorted(places):
            value = function(model, **dict(items))
            if value is not None:
                yield pattern.format(dict(items)), np.asarray(value)


class _Store:
    """Collects leaves on their devices; rows of a stacked leaf wait until it is complete."""

    def __init__(self, leaves: Leaves, sharding: Placement, dtype: Any = None) -> None:
        self._leaves, self._sharding, self._dtype = leaves, sharding, dtype
        self._done: dict[str, jax.Array] = {}
        self._open: dict[str, tuple[np.ndarray, int]] = {}

    def put(self, path: str, value: np.ndarray) -> None:
        slot = self._leaves.slots[path]
        if not slot.index:
            self._done[slot.path] = self._place(slot.path, value)
            return
        shape = self._leaves.stored[slot.path].shape
        rows = int(np.prod(shape[: len(slot.index)]))
        buffer, left = self._open.pop(slot.path, (None, rows))
        if buffer is None:
            buffer = aligned_empty(shape, value.dtype)
        elif buffer.dtype != value.dtype:
            buffer = buffer.astype(jnp.promote_types(buffer.dtype, value.dtype))
        buffer[slot.index] = value
        if left > 1:
            self._open[slot.path] = (buffer, left - 1)
        else:
            self._done[slot.path] = self._place(slot.path, buffer)

    def variables(self) -> dict[str, Any]:
        return nested(self._done, self._leaves.collections)

    def _place(self, path: str, value: np.ndarray) -> jax.Array:
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        if self._dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.dtype(self._dtype)
        if value.dtype != dtype or not value.flags.c_contiguous:
            value, source = aligned_empty(value.shape, dtype), value
            value[...] = source
            del source
        sharding = self._sharding
        if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
            sharding = sharding(path, value.shape)
        if sharding is not None and not sharding.is_fully_addressable:
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        return jax.block_until_ready(jax.device_put(value, sharding))


@dataclass(frozen=True)
class _InMemory:
    """An array of the caller's, as a lazy tensor; `read` copies, for JAX may keep what it gets."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self) -> np.ndarray:
        return np.array(self.array)


def _tensor(value: Any) -> LazyTensor:
    return value if hasattr(value, "read") else _InMemory(np.asarray(value))


def _row(leaf: Any, slot: Slot) -> np.ndarray:
    return np.asarray(leaf)[slot.index]


def _check_variables(values: Mapping[str, Any], leaves: Leaves, model: nn.Module) -> None:
    missing = [path for path in leaves.stored if path not in values]
    unexpected = [path for path in values if path not in leaves.stored]
    misshapen = [
        Misfit(path, f"shape {np.shape(values[path])}", f"shape {leaf.shape}")
        for path, leaf in leaves.stored.items()
        if path in values and np.shape(values[path]) != leaf.shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(
            f"These variables are not those of {type(model).__name__} as it is configured.",
            missing,
            unexpected,
            misshapen,
        )
