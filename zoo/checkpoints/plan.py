"""Which rules fill which leaves, decided from names and shapes before anything is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.checkpoints.leaves import Leaves
from zoo.checkpoints.mismatch import CheckpointMismatch, Misfit
from zoo.checkpoints.ruleset import LazyTensor, Rules, Step, make_step, matches, steps_for


def choose_layout(layouts: Mapping[str, Rules], tensors: Mapping[str, Any], leaves: Leaves) -> str:
    """The layout whose rules know most of these names; of equals, the first that fits best.

    Two layouts may have the same names for matrices that one of them keeps transposed.
    """
    matched = {name: match(rules, tensors, leaves)[0] for name, rules in layouts.items()}

    def known(name: str) -> int:
        used = {source for step in matched[name] for source in step.sources}
        return len(used) + sum(
            matches(layouts[name].derived, tensor) for tensor in tensors if tensor not in used
        )

    counts = {name: known(name) for name in layouts}
    best = [name for name in layouts if counts[name] == max(counts.values())]
    if len(best) == 1:
        return best[0]
    return max(best, key=lambda name: sum(_fits(step, tensors, leaves) for step in matched[name]))


def _fits(step: Step, tensors: Mapping[str, Any], leaves: Leaves) -> bool:
    """Whether what a step makes of these tensors has the shapes of its leaves."""
    try:
        made = step.transform.forward([_fake(tuple(tensors[name].shape)) for name in step.sources])
    except (ValueError, IndexError):
        return False
    return [x.shape for x in made] == [leaves.unrolled[path].shape for path in step.targets]


def match(
    rules: Rules, tensors: Mapping[str, Any], leaves: Leaves
) -> tuple[list[Step], list[Step]]:
    """Steps that these names allow, and those that lack some of their sources."""
    found: dict[tuple[int, tuple[tuple[str, int], ...]], dict[int, str]] = {}
    for number, rule in enumerate(rules.rules):
        for position, pattern in enumerate(rule.sources):
            for name in tensors:
                indices = pattern.match(name)
                if indices is not None:
                    found.setdefault((number, tuple(sorted(indices.items()))), {})[position] = name
    steps, incomplete = [], []
    used: set[str] = set()
    filled: set[str] = set()
    for (number, items), names in sorted(found.items()):
        rule, indices = rules.rules[number], dict(items)
        step = make_step(rule, indices, leaves.model)
        if not all(path in leaves.unrolled for path in step.targets):
            continue
        if len(names) < len(step.sources):
            incomplete.append(step)
        elif used.isdisjoint(step.sources) and filled.isdisjoint(step.targets):
            steps.append(step)
            used.update(step.sources)
            filled.update(step.targets)
    return steps, [step for step in incomplete if filled.isdisjoint(step.targets)]


def make_plan(
    layouts: Mapping[str, Rules],
    layout: str,
    tensors: Mapping[str, LazyTensor],
    leaves: Leaves,
    model: nn.Module,
    adapt: bool,
) -> tuple[list[Step], list[str]]:
    """The steps that fill the model and the leaves to initialise, or `CheckpointMismatch`."""
    rules = layouts[layout]
    steps, incomplete = match(rules, tensors, leaves)
    misshapen: list[Misfit] = []
    fits: list[Step] = []
    fresh: list[str] = []
    remedies: list[str] = []  # what adapt=True would do, one for each problem it would solve
    problems = 0
    for step in steps:
        misfits, remedy = _misfits(step, tensors, leaves, rules)
        if not misfits or (adapt and remedy == "resize"):
            fits.append(step)
        elif adapt and remedy == "fresh":
            fresh += step.targets
        else:
            misshapen += misfits
            problems += len(step.targets)
            if remedy:
                remedies += [f"{remedy} {path}" for path in step.targets]

    used = {name for step in steps for name in step.sources}
    filled = {path for step in steps for path in step.targets}
    unexpected = []
    for name in tensors:
        if name in used or rules.is_ignored(name):
            continue
        if _belongs_to_absent_head(name, rules, leaves):
            if adapt:
                continue
            remedies.append(f"drop {name}")
        unexpected.append(name)
    missing = []
    for path in leaves.unrolled:
        if path in filled:
            continue
        if rules.is_fresh(path):
            if adapt:
                fresh.append(path)
                continue
            remedies.append(f"fresh {path}")
        missing.append(path)
    if not (missing or unexpected or misshapen):
        return fits, fresh

    named = _official_names(missing, rules, leaves, incomplete, tensors)
    problems += len(missing) + len(unexpected)
    raise CheckpointMismatch(
        _headline(model, layouts, layout, tensors, used),
        missing=named,
        unexpected=unexpected,
        misshapen=misshapen,
        hint="" if adapt or not used else _adapt_hint(remedies, problems),
    )


def _misfits(
    step: Step, tensors: Mapping[str, LazyTensor], leaves: Leaves, rules: Rules
) -> tuple[list[Misfit], str]:
    """What does not fit in a step, and what `adapt=True` would do: `resize`, `fresh` or nothing."""
    wanted = [leaves.unrolled[path] for path in step.targets]
    shapes = [tuple(tensors[name].shape) for name in step.sources]
    kinds_fit = all(
        jnp.issubdtype(tensors[name].dtype, jnp.floating)
        == jnp.issubdtype(wanted[0].dtype, jnp.floating)
        for name in step.sources
    )
    try:
        got = [x.shape for x in step.transform.forward([_fake(s) for s in shapes])]
    except (ValueError, IndexError):
        got = None
    if got == [w.shape for w in wanted] and kinds_fit:
        return [], ""
    if got is not None and len(got) != len(wanted):
        raise ValueError(
            f"The transform of {step.rule.source!r} gives {len(got)} arrays, not {len(wanted)}."
        )
    try:
        back = [x.shape for x in step.transform.inverse([_fake(w.shape) for w in wanted])]
    except (ValueError, IndexError):
        back = [w.shape for w in wanted][: len(shapes)]
    misfits = [
        Misfit(
            name, _described(has, tensors[name].dtype, kinds_fit), _described(wants, w, kinds_fit)
        )
        for name, has, wants, w in zip(
            step.sources, shapes, back, [wanted[0].dtype] * len(shapes), strict=True
        )
        if has != wants or not kinds_fit
    ]
    if not misfits:
        misfits = [Misfit(step.sources[0], f"shape {shapes[0]}", f"shape {back[0]}")]
    if not kinds_fit:
        return misfits, ""
    if got is not None:
        triples = zip(step.targets, wanted, got, strict=True)
        if all(rules.resizer(path) for path, w, g in triples if g != w.shape):
            return misfits, "resize"
    return misfits, "fresh" if all(rules.is_fresh(path) for path in step.targets) else ""


def _described(shape: tuple[int, ...], dtype: Any, kinds_fit: bool) -> str:
    return f"shape {shape}" if kinds_fit else f"shape {shape} of {np.dtype(dtype).name}"


def _belongs_to_absent_head(name: str, rules: Rules, leaves: Leaves) -> bool:
    """Whether a tensor is for leaves that may start afresh and that this model does not have."""
    for rule in rules.rules:
        for pattern in rule.sources:
            indices = pattern.match(name)
            if indices is not None:
                targets = [target.format(indices) for target in rule.targets]
                if all(rules.is_fresh(t) and t not in leaves.unrolled for t in targets):
                    return True
    return False


def _official_names(
    paths: Sequence[str],
    rules: Rules,
    leaves: Leaves,
    incomplete: Sequence[Step],
    tensors: Mapping[str, Any],
) -> list[str]:
    """What the file should hold to fill these leaves, in the layout's own names."""
    names: dict[str, None] = {}
    covered: set[str] = set()
    for step in incomplete:
        names.update((name, None) for name in step.sources if name not in tensors)
        covered.update(step.targets)
    for path in paths:
        if path not in covered:
            found = next(steps_for(path, rules, leaves.model), None)
            sources = found.sources if found else (f"{path} (no rule fills it)",)
            names.update((name, None) for name in sources)
    return list(names)


def _headline(
    model: nn.Module,
    layouts: Mapping[str, Rules],
    layout: str,
    tensors: Mapping[str, Any],
    used: set[str],
) -> str:
    kind = type(model).__name__
    if not tensors:
        return f"The checkpoint holds no tensors, so it cannot fill {kind}."
    if not used:
        some, known = ", ".join(list(tensors)[:3]), ", ".join(layouts)
        return (
            f"This is no checkpoint of {kind}: none of its {len(tensors)} names ({some}, ...) "
            f"is in a layout known for it ({known})."
        )
    return (
        f"The checkpoint does not fit {kind} as it is configured "
        f"(layout {layout!r}, {len(used)} of {len(tensors)} tensors have a place)."
    )


def _adapt_hint(remedies: Sequence[str], problems: int) -> str:
    if not remedies:
        return ""
    does = {
        "resize": "resize the tables that differ",
        "fresh": "start the head afresh",
        "drop": "drop the head",
    }
    actions = [text for verb, text in does.items() if any(r.startswith(verb) for r in remedies)]
    extent = "adapt=True would" if len(remedies) >= problems else "adapt=True would, in part,"
    return f"{extent} {' and '.join(actions)}, as the official code does."


def _fake(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape with one byte behind it."""
    return np.broadcast_to(np.zeros((), np.int8), shape)
