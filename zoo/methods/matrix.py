"""The matrix of methods and systems: where each works, why it does not apply, what it changes.

Every cell is made by tracing the method on a system's `_test` variant, so that a new system has its
row by being registered, and a new method its column by being in `COLUMNS`. Nothing is computed:
what a cell tells comes from shapes and programs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

import zoo
from zoo.methods import (
    EarlyExit,
    Insides,
    Int8,
    LayerDrop,
    LoRA,
    Method,
    Movement,
    Prompts,
    Prune,
    PruneHeads,
    PruneNeurons,
    QuietAttention,
    SigmaReparam,
    SlimFit,
    SmallFloat,
    TokenPruning,
    UnifiedNorms,
    WithoutNorms,
)
from zoo.methods.ternary import Ternary
from zoo.planning.flops import count_flops
from zoo.tasks.apply import zeros_like_inputs


@dataclass(frozen=True)
class Column:
    """A method as the matrix tries it.

    Attributes:
      method: with settings that suit a small model.
      same: whether a model gives the same outputs with it as without it, before training.
      merges: whether `merge` gives a plain model.
    """

    method: Method
    same: bool = False
    merges: bool = True


COLUMNS: Mapping[str, Column] = {
    "LoRA": Column(LoRA(rank=2, targets=r".*(^|/)[^/]*(?<!head)"), same=True),
    "DoRA": Column(LoRA(rank=2, targets=r".*/(query|value|qkv|up)", magnitude=True), same=True),
    "prompts": Column(Prompts(2), merges=False),
    "sigma_reparam": Column(SigmaReparam(), same=True),
    "without_norms": Column(WithoutNorms(), merges=False),
    "quiet_attention": Column(QuietAttention(gamma=-0.03), merges=False),
    "unified_norm": Column(UnifiedNorms(), merges=False),
    "int8": Column(Int8(), merges=False),
    "int8_weights": Column(Int8(activations=None)),
    "smooth_quant": Column(Int8("tensor", 0.5), merges=False),
    "fp4": Column(SmallFloat(), merges=False),
    "fp8_weights": Column(SmallFloat(8, 4, input_bits=None)),
    "ternary": Column(Ternary(), merges=False),
    "slimfit": Column(SlimFit(), same=True),
    "magnitude": Column(Prune(0.5)),
    "sparse_gpt": Column(Prune(0.5, None, "sparse_gpt")),
    "movement": Column(Movement(0.5)),
    "prune_heads": Column(PruneHeads(0.5)),
    "prune_neurons": Column(PruneNeurons(0.5)),
    "layer_drop": Column(LayerDrop(drop=(0,)), merges=False),
    "early_exit": Column(EarlyExit(0.0), same=True),
    "token_pruning": Column(TokenPruning(((0, 0.5),)), merges=False),
    "distillation": Column(Insides(), same=True),
}
"""Name -> method. Offloading needs no column: it is the trainer's, and knows leaves alone."""


@dataclass(frozen=True)
class Cell:
    """What a method does to a system.

    Attributes:
      method: the column's name.
      system: the variant's name.
      works: whether it applies.
      reason: why not.
      trained: share of the parameters that is trained.
      size: bytes of the parameters, relative to those without it.
      work: operations of a forward pass, relative to those without it.
    """

    method: str
    system: str
    works: bool
    reason: str = ""
    trained: float = 1.0
    size: float = 1.0
    work: float = 1.0

    @property
    def effect(self) -> str:
        """In a few words."""
        if not self.works:
            return self.reason
        parts = []
        for value, what in ((self.trained, "trained"), (self.size, "bytes"), (self.work, "FLOPs")):
            if abs(value - 1) > 5e-3:
                parts.append(f"{what} {value:.0%}" if value >= 0.1 else f"{what} {value:.1%}")
        return ", ".join(parts) or "works"


def _traced(module: nn.Module, variables: Any, inputs: Any) -> Any:
    return jax.make_jaxpr(lambda v, x: module.apply(v, **x, method="features"))(variables, inputs)


def operations(module: nn.Module, variables: Any, inputs: Any) -> float:
    """Those of a call, as `count_flops` counts, without what its output does not need."""
    jaxpr = jax.make_jaxpr(lambda v, x: module.apply(v, **x))(variables, inputs).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return count_flops(needed, "cpu")


def _bytes(variables: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables["params"]))


@dataclass(frozen=True)
class Traced:
    """A system without a method, as the cells of its row are compared with it."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    variables: Any
    program: Any
    work: float

    @classmethod
    def of(cls, name: str) -> "Traced":
        """Trace a variant."""
        model = zoo.create(name)
        inputs = jax.eval_shape(lambda: zeros_like_inputs(model, 2))
        variables = jax.eval_shape(lambda: dict(model.init(jax.random.key(0), **zeros(inputs))))
        program = _traced(model, variables, inputs)
        return cls(name, model, inputs, variables, program, operations(model, variables, inputs))


def zeros(shapes: Any) -> Any:
    """Arrays of these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def cell(column: str, row: Traced) -> Cell:
    """Try a method on a system; what refuses with a `ValueError` does not apply."""
    method, model = COLUMNS[column].method, row.model

    def adapt(variables: Any, inputs: Any) -> Any:
        batches = [inputs] * method.calibration
        return method.adapt(model, variables, jax.random.key(1), batches or None)

    try:
        wrapped = method.wrap(model)
        adapting, variables = jax.make_jaxpr(adapt, return_shape=True)(row.variables, row.inputs)
        program = _traced(wrapped, variables, row.inputs)
        work = operations(wrapped, variables, row.inputs)
    except ValueError as error:
        return Cell(column, row.name, False, phrase(error))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    paths = {jax.tree_util.keystr(k, simple=True, separator="/"): x.size for k, x in leaves}
    trained = sum(n for path, n in paths.items() if method.trains(path) is not False)
    given = set(adapting.jaxpr.invars)
    same = all(leaf in given for leaf in adapting.jaxpr.outvars)
    if same and str(program) == str(row.program):
        return Cell(column, row.name, False, "nothing in the model is of its kind")
    said = [method.trains(path) for path in paths]
    if not any(said) and all(answer is False for answer in said):
        trained = sum(paths.values())  # what is not for training has no share
    return Cell(
        column,
        row.name,
        True,
        trained=trained / sum(paths.values()),
        size=_bytes(variables) / _bytes(row.variables),
        work=work / max(row.work, 1.0),
    )


def phrase(error: Exception) -> str:
    """The first sentence of a message, shortly."""
    text = " ".join(str(error).split())
    first = text.split(";")[0].split(". ")[0].split(": ")[0].rstrip(".")
    return first


def systems(pattern: str = "*") -> list[str]:
    """The `_test` variants of the systems that have a variant of this name."""
    if pattern == "*":
        return zoo.list_models("*_test")
    files = {zoo.registry.file_of(name) for name in zoo.list_models(pattern)}
    return [n for n in zoo.list_models("*_test") if zoo.registry.file_of(n) in files]
