"""What a rule and a layout's rules are."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import flax.linen as nn
import numpy as np

from zoo.checkpoints.patterns import Pattern, compile_pattern
from zoo.checkpoints.transforms import Transform, conv, identity, linear

Resize = Callable[
    [np.ndarray, tuple[int, ...], nn.Module, Mapping[str, tuple[int, ...]]], np.ndarray
]
Derived = Callable[..., np.ndarray | None]


class LazyTensor(Protocol):
    """A tensor that is read when asked for: what `files.open_checkpoint` gives."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its type, as NumPy (or ml_dtypes) names it."""

    def read(self) -> np.ndarray:
        """Its values, in memory of their own."""


@dataclass(frozen=True)
class Rule:
    """Tensors of a file <-> leaves of a model.

    Attributes:
      source: pattern(s) of the official names; `{i}` matches one number (see `patterns`).
      target: pattern(s) of leaf paths, relative to `params`; one that starts with `batch_stats/`
        names that collection. Every source and target has the same indices.
      transform: from the sources' arrays to the targets', or a function of the model that gives
        such a `Transform` where sizes depend on it.
      when: of which models the rule is; None: of all. For names that count what a pattern cannot,
        such as stages from the last one back.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    transform: Transform | Callable[[nn.Module], Transform] = identity
    when: Callable[[nn.Module], bool] | None = None

    @functools.cached_property
    def _patterns(self) -> tuple[tuple[Pattern, ...], tuple[Pattern, ...]]:
        """Sources and targets, compiled and compared when first used, as patterns are."""
        sources, targets = _compiled(self.source), _compiled(self.target)
        for pattern in (*sources, *targets):
            if pattern.wild:
                raise ValueError(f"A rule's pattern cannot hold '*': {pattern.text!r}.")
            if pattern.names != sources[0].names:
                raise ValueError(
                    f"All patterns of a rule need the same indices: {pattern.text!r} differs from "
                    f"{sources[0].text!r}."
                )
        return sources, targets

    @property
    def sources(self) -> tuple[Pattern, ...]:
        """The compiled source patterns.

        Raises:
          ValueError: if the rule's patterns have different indices, or a `*`.
        """
        return self._patterns[0]

    @property
    def targets(self) -> tuple[Pattern, ...]:
        """The compiled target patterns.

        Raises:
          ValueError: as `sources` does.
        """
        return self._patterns[1]

    def suits(self, model: nn.Module) -> bool:
        """Whether the rule is one of this model's."""
        return self.when is None or self.when(_without_methods(model))

    def bound(self, model: nn.Module) -> Transform:
        """The transform for this model."""
        transform = self.transform
        if not isinstance(transform, Transform):
            transform = transform(_without_methods(model))
        return transform.bound(len(self.sources), len(self.targets))


def _without_methods(model: nn.Module) -> nn.Module:
    """The architecture itself, whose fields say the sizes."""
    from zoo.system import wrapped

    inner = wrapped(model)
    return model if inner is None else _without_methods(inner)


@dataclass(frozen=True)
class Rules:
    """The rules of one published layout.

    A rule whose target the model does not have, or whose pattern no tensor matches, is not used;
    where two rules would fill one leaf, the first that applies does.

    Attributes:
      rules: in order of preference.
      derived: tensors that can be recomputed (index tables, masks, counters): ignored on load,
        written by export. Pattern -> `f(model, **indices)`, which returns the array, or None if
        this model has no such tensor; in place of a function, None: never exported.
      unused: patterns (with `*`) of tensors that other models of the same file need; dropped.
      fresh: target patterns that `adapt=True` may initialise anew (heads).
      resize: target pattern -> `f(array, target_shape, model, source_shapes) -> array`, used by
        `adapt=True` where shapes differ; `array` is in our layout, `source_shapes` maps every
        name of the file to its shape.
    """

    rules: Sequence[Rule]
    derived: Mapping[str, Derived | None] = field(default_factory=dict)
    unused: Sequence[str] = ()
    fresh: Sequence[str] = ()
    resize: Mapping[str, Resize] = field(default_factory=dict)

    def resizer(self, path: str) -> Resize | None:
        """The function that resizes this leaf, if there is one."""
        return next((f for p, f in self.resize.items() if matches((p,), path)), None)

    def is_fresh(self, path: str) -> bool:
        """Whether this leaf may be initialised anew."""
        return matches(self.fresh, path)

    def is_ignored(self, name: str) -> bool:
        """Whether a file's tensor is derived or unused."""
        return matches(self.derived, name) or matches(self.unused, name)


@dataclass(frozen=True)
class Step:
    """One rule with its indices filled in: tensor names -> leaf paths."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform
    rule: Rule
    indices: Mapping[str, int]


def steps_for(path: str, rules: Rules, model: nn.Module) -> Iterator[Step]:
    """The steps that would fill a leaf, in order of preference."""
    for rule in rules.rules:
        for pattern in rule.targets:
            indices = pattern.match(path)
            if indices is not None and rule.suits(model):
                yield make_step(rule, indices, model)


def make_step(rule: Rule, indices: Mapping[str, int], model: nn.Module) -> Step:
    """A rule with its indices filled in."""
    return Step(
        tuple(p.format(indices) for p in rule.sources),
        tuple(p.format(indices) for p in rule.targets),
        rule.bound(model),
        rule,
        indices,
    )


def _compiled(texts: str | tuple[str, ...]) -> tuple[Pattern, ...]:
    return tuple(compile_pattern(t) for t in ((texts,) if isinstance(texts, str) else texts))


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the patterns (which may hold `*`) is this name."""
    return any(compile_pattern(p).match(name) is not None for p in patterns)


def dense_rules(theirs: str, ours: str, kernel: Transform = linear) -> list[Rule]:
    """The two rules of a PyTorch `Linear` called `theirs` and a Linen `Dense` at `ours`.

    Another `kernel` is for maps that are stored as something else, such as convolutions of width 1.
    """
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", kernel),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def conv_rules(theirs: str, ours: str) -> list[Rule]:
    """The two rules of a PyTorch `Conv1d` to `Conv3d` called `theirs` and a Linen `Conv`."""
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", conv),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """The two rules of a PyTorch `LayerNorm` called `theirs` and a Linen one at `ours`."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def batch_norm_rules(theirs: str, ours: str) -> list[Rule]:
    """The four of a PyTorch `BatchNorm` and a Linen one: scale, bias and both statistics."""
    return [
        *norm_rules(theirs, ours),
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    ]
