"""Settings of a model under which a file would fit, found from names and shapes alone.

A file of 7 classes at 48 pixels does not fit a model of 10 classes at 32. `settings_that_fit` tries
the fields whose values would explain the difference, and keeps those that leave fewer problems.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np

from zoo.checkpoints.leaves import Leaves, model_leaves
from zoo.checkpoints.ruleset import LazyTensor, Rules, make_step

if TYPE_CHECKING:
    from zoo.checkpoints.naming import Naming

MOST_TRIALS = 20  # each costs a trace of the model's shapes


def settings_that_fit(
    layouts: Mapping[str, Rules], naming: "Naming", model: nn.Module
) -> tuple[str, dict[str, Any]]:
    """A sentence on settings that solve all or most of the problems (or an empty text).

    Beside it the settings themselves, where they solve all.
    """
    from zoo.checkpoints.plan import problems_of

    rules = layouts[naming.layout]
    changes: dict[str, Any] = {}
    tried: set[Any] = set()
    start = left = problems_of(rules, naming.tensors, model_leaves(model))
    improved = True
    while improved and left and len(tried) < MOST_TRIALS:
        improved = False
        for field, value in _candidates(rules, naming.tensors, model):
            if (field, repr(value)) in tried or len(tried) >= MOST_TRIALS:
                continue
            tried.add((field, repr(value)))
            try:
                other = model.clone(**{field: value})
                count = problems_of(rules, naming.tensors, model_leaves(other))
            except (ValueError, TypeError, ZeroDivisionError, AssertionError):
                continue
            if count < left:
                model, left, improved = other, count, True
                changes[field] = value
                break
    if not changes or 4 * left > start:
        return "", {}
    said = ", ".join(f"{field}={_short(value)}" for field, value in changes.items())
    if left:
        return f"{said} would fit more of the file ({left} of {start} problems stay).", {}
    return f"The file fits with {said}{_variants(model, changes)}.", changes


def _variants(model: nn.Module, changes: Mapping[str, Any]) -> str:
    """Which published variants have these settings, where shapes may not say all (heads)."""
    from zoo import system

    found = system.of(model)
    same = [
        name
        for name, variant in (found.variants.items() if found else ())
        if variant.module is type(model)
        and len(changes) > ("num_classes" in changes)
        and all(variant.fields.get(f) == v for f, v in changes.items() if f != "num_classes")
    ]
    return f" (as {' or '.join(same[:3])} has)" if same else ""


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        return str(value[0])
    return repr(value)


def _candidates(
    rules: Rules, tensors: Mapping[str, LazyTensor], model: nn.Module
) -> Iterator[tuple[str, Any]]:
    leaves = model_leaves(model)
    fields = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(model)
        if f.name not in ("parent", "name", "dtype", "param_dtype", "remat", "scan_layers")
    }
    ints = {f: v for f, v in fields.items() if type(v) is int}
    changes, has, wants = _differences(rules, tensors, leaves)
    if "num_classes" in ints:
        heads = [old for path, old, _ in changes if rules.is_fresh(path) and old]
        yield from (("num_classes", old[-1]) for old in heads if old[-1] != ints["num_classes"])
        if not heads and not any(rules.is_fresh(p) and not p.startswith("norm/") for p in has):
            yield "num_classes", 0
    if isinstance(fields.get("pool"), str):  # where the last norm is tells it
        yield from (("pool", value) for value in ("avg", "map", "token"))
    size, patch = fields.get("image_size"), fields.get("patch_size")
    if isinstance(size, tuple) and type(patch) is int:
        for path, old, new in changes:
            if "position" in path and len(old) == len(new) == 3:
                yield from _image_sizes(size, patch, old[1], new[1])
    for path, old, new in changes:
        if "relative" in path and "window_size" in ints and len(old) == len(new):
            for a, b in zip(old, new, strict=True):
                side = (math.isqrt(a) + 1) // 2
                if a != b and (2 * side - 1) ** 2 == a:
                    yield "window_size", side
    pairs: dict[tuple[int, int], None] = {}
    for _, old, new in changes:
        if len(old) == len(new):
            pairs.update(((a, b), None) for a, b in zip(old, new, strict=True) if a != b)
    for a, b in pairs:
        yield from ((f, a) for f, v in ints.items() if v == b)
    for a, b in pairs:
        for f, v in ints.items():
            if v and b % v == 0 and a % (b // v) == 0 and v != b:
                yield f, a // (b // v)
    counted = (_counts(rules, tensors), _counts(rules, leaves.unrolled, ours=True))
    for number in counted[0].keys() & counted[1].keys():
        theirs, ours = counted[0][number], counted[1][number]
        if theirs != ours:
            same = (f for f, held in fields.items() if held == ours and held is not True)
            yield from ((f, theirs) for f in same)
    names = has.keys() ^ wants.keys()
    if names:
        yield from ((f, not v) for f, v in fields.items() if isinstance(v, bool))


def _image_sizes(
    size: tuple[int, ...], patch: int, has: int, wants: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = wants - math.prod(s // patch for s in size)
    rows = has - prefix
    if prefix < 0 or rows < 1 or len(size) != 2:
        return
    aspect = size[0] / size[1]
    pairs = [(a, rows // a) for a in range(1, rows + 1) if rows % a == 0]
    pairs.sort(key=lambda pair: abs(np.log(pair[0] / pair[1] / aspect)))
    best = pairs[0]
    if 0.5 <= best[0] / best[1] / aspect <= 2:
        yield "image_size", (best[0] * patch, best[1] * patch)


def _differences(
    rules: Rules, tensors: Mapping[str, LazyTensor], leaves: Leaves
) -> tuple[list[tuple[str, tuple, tuple]], dict[str, None], dict[str, None]]:
    """Leaves whose shape differs (path, the file's, the model's); leaves of the file; of both."""
    from zoo.checkpoints.plan import fake

    changes: list[tuple[str, tuple, tuple]] = []
    has: dict[str, None] = {}
    for rule in rules.rules:
        for name in tensors:
            indices = rule.sources[0].match(name)
            if indices is None:
                continue
            step = make_step(rule, indices, leaves.plain)
            if any(source not in tensors for source in step.sources):
                continue
            has.update((path, None) for path in step.targets)
            try:
                made = step.transform.forward([fake(tuple(tensors[n].shape)) for n in step.sources])
            except (ValueError, IndexError):
                made = []
            for path, array in zip(step.targets, made, strict=False):
                leaf = leaves.unrolled.get(path)
                if leaf is not None and leaf.shape != array.shape:
                    changes.append((path, array.shape, leaf.shape))
    return changes, has, dict.fromkeys(leaves.unrolled)


def _counts(
    rules: Rules, names: Mapping[str, Any], ours: bool = False
) -> dict[int, int | tuple[int, ...]]:
    """How many layers a rule's names count: a number, or one for each stage."""
    found: dict[int, int | tuple[int, ...]] = {}
    for number, rule in enumerate(rules.rules):
        pattern = (rule.targets if ours else rule.sources)[0]
        if not pattern.names or len(pattern.names) > 2:
            continue
        matched = [i for i in map(pattern.match, names) if i is not None]
        if not matched:
            continue
        order = [name for name in _order(pattern.text) if name in pattern.names]
        if len(order) == 1:
            found[number] = max(i[order[0]] for i in matched) + 1
        else:
            stages = max(i[order[0]] for i in matched) + 1
            found[number] = tuple(
                1 + max((i[order[1]] for i in matched if i[order[0]] == s), default=-1)
                for s in range(stages)
            )
    return found


def _order(text: str) -> list[str]:
    """The index names of a pattern from left to right."""
    return list(dict.fromkeys(re.findall(r"\{(?:\d+\*)?([A-Za-z_]\w*)", text)))
