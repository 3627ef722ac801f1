"""Which rules fill which leaves, decided from names and shapes before anything is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.checkpoints.leaves import Leaves
from zoo.checkpoints.mismatch import CheckpointMismatch, Misfit
from zoo.checkpoints.ruleset import LazyTensor, Rules, Step, make_step, steps_for
from zoo.checkpoints.settings import settings_that_fit

if TYPE_CHECKING:
    from zoo.checkpoints.naming import Naming


def fits(step: Step, tensors: Mapping[str, Any], leaves: Leaves) -> bool:
    """Whether what a step makes of these tensors has the shapes of its leaves."""
    try:
        made = step.transform.forward([fake(tuple(tensors[name].shape)) for name in step.sources])
    except (ValueError, IndexError):
        return False
    return [x.shape for x in made] == [leaves.unrolled[path].shape for path in step.targets]


def match(
    rules: Rules, tensors: Mapping[str, Any], leaves: Leaves
) -> tuple[list[Step], list[Step]]:
    """Steps that these names allow, and those that lack some of their sources."""
    found: dict[tuple[int, tuple[tuple[str, int], ...]], dict[int, str]] = {}
    for number, rule in enumerate(rules.rules):
        if not rule.suits(leaves.plain):
            continue
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
        step = make_step(rule, indices, leaves.plain)
        if not all(path in leaves.unrolled for path in step.targets):
            continue
        if len(names) < len(step.sources):
            incomplete.append(step)
        elif used.isdisjoint(step.sources) and filled.isdisjoint(step.targets):
            steps.append(step)
            used.update(step.sources)
            filled.update(step.targets)
    return steps, [step for step in incomplete if filled.isdisjoint(step.targets)]


@dataclass(frozen=True)
class Plan:
    """What to do with a file's tensors.

    Attributes:
      steps: they fill the model.
      fresh: leaves to initialise.
      dropped: tensors of a head that this model does not have.
    """

    steps: list[Step]
    fresh: list[str]
    dropped: list[str]


def make_plan(
    layouts: Mapping[str, Rules],
    naming: "Naming",
    leaves: Leaves,
    model: nn.Module,
    adapt: bool,
) -> Plan:
    """The steps that fill the model and the leaves to initialise, or `CheckpointMismatch`."""
    rules, tensors = layouts[naming.layout], naming.tensors
    steps, incomplete = match(rules, tensors, leaves)
    misshapen: list[Misfit] = []
    fit: list[Step] = []
    fresh: list[str] = []
    dropped: list[str] = []
    remedies: list[str] = []  # what adapt=True would do, one for each problem it would solve
    problems = 0
    for step in steps:
        misfits, remedy = _misfits(step, tensors, leaves, rules)
        if not misfits or (adapt and remedy == "resize"):
            fit.append(step)
        elif adapt and remedy == "fresh":
            fresh += step.targets
        else:
            misshapen += [m._replace(name=naming.original.get(m.name, m.name)) for m in misfits]
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
                dropped.append(naming.original[name])
                continue
            remedies.append(f"drop {name}")
        unexpected.append(naming.original[name])
    missing = []
    for path in leaves.unrolled:
        if path in filled:
            continue
        if rules.is_fresh(path):
            if adapt:
                fresh.append(path)
                continue
            remedies.append(f"start {path}")
        missing.append(path)
    if not (missing or unexpected or misshapen):
        return Plan(fit, fresh, dropped)

    named = _official_names(missing, rules, leaves, incomplete, tensors)
    problems += len(missing) + len(unexpected)
    hints: list[str] = []
    settings: Mapping[str, Any] = {}
    if used:
        said, settings = settings_that_fit(layouts, naming, model)
        hints += [said] if said else []
        hints += [] if adapt else [_adapt_hint(remedies, problems, bool(said))]
        if unexpected and not (missing or misshapen):
            pattern = _pattern_for(unexpected)
            hints.append(f"If the model does not need what is unexpected: ignore=({pattern!r},).")
        elif unexpected and missing:
            hints.append("If names differ only: rename={'THEIRS*': 'OURS*'}.")
    raise CheckpointMismatch(
        _headline(model, layouts, naming, used),
        missing=[naming.prefix + name for name in named],
        unexpected=unexpected,
        misshapen=misshapen,
        hint="\n  ".join(filter(None, hints)),
        settings=settings,
    )


def problems_of(rules: Rules, tensors: Mapping[str, LazyTensor], leaves: Leaves) -> int:
    """How many leaves and tensors do not fit."""
    steps, _ = match(rules, tensors, leaves)
    used = {name for step in steps for name in step.sources}
    filled = {path for step in steps for path in step.targets}
    return (
        sum(len(s.targets) for s in steps if not fits(s, tensors, leaves))
        + sum(path not in filled for path in leaves.unrolled)
        + sum(name not in used and not rules.is_ignored(name) for name in tensors)
    )


def _pattern_for(names: Sequence[str]) -> str:
    """A pattern with `*` that all these names match: the one name, or what they begin with."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*names, strict=False))
    count = next((i for i, letters in enumerate(columns) if len(set(letters)) > 1), len(columns))
    return f"{names[0][:count]}*"


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
        got = [x.shape for x in step.transform.forward([fake(s) for s in shapes])]
    except (ValueError, IndexError):
        got = None
    if got == [w.shape for w in wanted] and kinds_fit:
        return [], ""
    if got is not None and len(got) != len(wanted):
        raise ValueError(
            f"The transform of {step.rule.source!r} gives {len(got)} arrays, not {len(wanted)}."
        )
    try:
        back = [x.shape for x in step.transform.inverse([fake(w.shape) for w in wanted])]
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
        if all(
            rules.resizer(path) or kernel_resizer(g, w.shape, leaves.plain)
            for path, w, g in triples
            if g != w.shape
        ):
            return misfits, "resize"
    return misfits, "fresh" if all(rules.is_fresh(path) for path in step.targets) else ""


def kernel_resizer(
    has: tuple[int, ...], wants: tuple[int, ...], model: nn.Module
) -> Callable[[np.ndarray], np.ndarray] | None:
    """How the first convolution's kernel is made for another number of channels, or for clips.

    timm's way with channels: a single one takes the sum over the file's, more take them in turn,
    scaled to the same total. A kernel of images is inflated over time as in I3D and Video Swin: the
    same in each frame, divided by their number.
    """
    channels = getattr(model, "in_channels", None)
    if len(has) >= 3 and len(wants) == len(has) + 1 and wants[1:] == has:
        frames = wants[0]
        return lambda x: np.repeat(x[None] / frames, frames, 0)
    if len(has) < 3 or len(has) != len(wants) or channels != wants[-2] or has[-2] == wants[-2]:
        return None
    if has[:-2] != wants[:-2] or has[-1] != wants[-1]:
        return None
    if channels == 1:
        return lambda x: x.sum(-2, keepdims=True)
    return lambda x: np.take(x, np.arange(channels) % has[-2], -2) * (has[-2] / channels)


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
            found = next(steps_for(path, rules, leaves.plain), None)
            sources = found.sources if found else (f"{path} (no rule fills it)",)
            names.update((name, None) for name in sources)
    return list(names)


def _headline(
    model: nn.Module, layouts: Mapping[str, Rules], naming: "Naming", used: set[str]
) -> str:
    kind, tensors = type(model).__name__, naming.tensors
    if not tensors:
        return f"The checkpoint holds no tensors, so it cannot fill {kind}."
    if not used:
        some, known = ", ".join(list(tensors)[:3]), ", ".join(layouts)
        return (
            f"This is no checkpoint of {kind}: none of its {len(tensors)} names ({some}, ...) "
            f"is in a layout known for it ({known})."
        )
    under = f", names under {naming.prefix!r}" if naming.prefix else ""
    return (
        f"The checkpoint does not fit {kind} as it is configured (layout {naming.layout!r}{under}, "
        f"{len(used)} of {len(tensors)} tensors have a place)."
    )


def _adapt_hint(remedies: Sequence[str], problems: int, second: bool) -> str:
    if not remedies:
        return ""
    does = {
        "resize": "resize the tables that differ",
        "fresh": "start the head afresh",
        "start": "start the head afresh",
        "drop": "drop the head",
    }
    verbs = [verb for verb in does if any(r.startswith(verb) for r in remedies)]
    actions = list(dict.fromkeys(does[verb] for verb in verbs))
    extent = "adapt=True would" if len(remedies) >= problems else "adapt=True would, in part,"
    lost = second and {"fresh", "drop"} & set(verbs)
    loses = "; the file's trained head would be lost" if lost else ""
    return f"{extent} {' and '.join(actions)}, as the official code does{loses}."


def fake(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape with one byte behind it."""
    return np.broadcast_to(np.zeros((), np.int8), shape)
