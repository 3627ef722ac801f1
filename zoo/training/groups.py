"""Which leaves are trained, in which group, which decay, and how fast each learns.

All of it is decided from paths and shapes alone, before anything is traced. A pattern is a regular
expression of a whole path; one of the config's that matches nothing is an error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from zoo.errors import ConfigError
from zoo.methods.method import Method, trains
from zoo.system import System
from zoo.system import of as system_of
from zoo.tasks.task import Networks, Phase
from zoo.training.tree import leaf_paths, path_of

FROZEN = None
"""The group of leaves that are not trained."""

STACKED = r"(^|/)layers/"  # of a path: layers stacked along the first axis

DECAY = (r".*(^|/)(\w+_)?(kernel|embedding)|.*(^|/)lora_[ab]",)
"""Leaves of several axes that decay: matrices, filters and tables of tokens."""

NO_DECAY = (
    r".*position(s|al)?(_\w+)?(/embedding)?",  # position embeddings, tables of relative positions
    r".*(^|/)((cls|dist|class|mask|distillation|register|pad)_?)?(token|register)s?(_embedding)?",
    r".*(^|/)norm[^/]*/.*",
    r".*(^|/)(\w+_)?bias",
)
"""Leaves that do not decay, beside all of one axis. They go before `DECAY`."""

FIRST = r".*(^|/)(embed|patch|position|stem|(cls|dist|class|mask|register)?_?token)[^/]*(/.*)?"
"""Leaves below the first layer, for layer-wise learning rates; others without a layer are above."""


def systems_of(networks: Networks) -> list[tuple[str, System]]:
    """The systems of the networks, each with what its leaves' paths begin with."""
    named = [("", networks)] if isinstance(networks, nn.Module) else [
        (f"{name}/", network) for name, network in networks.items()
    ]  # fmt: skip
    found = [(prefix, system_of(network)) for prefix, network in named]
    return [(prefix, system) for prefix, system in found if system is not None]


def own_patterns(networks: Networks, field: str) -> list[str]:
    """A system's patterns (`frozen`, `decay`, `no_decay`, `partition`), as whole paths."""
    return [
        re.escape(prefix) + f"(?:{pattern})"
        for prefix, system in systems_of(networks)
        for pattern in getattr(system, field)
    ]


def partition_rules(networks: Networks) -> dict[str, Any]:
    """The partition rules of the networks' systems, as whole paths."""
    return {
        re.escape(prefix) + f"(?:{pattern})" if prefix else pattern: dims
        for prefix, system in systems_of(networks)
        for pattern, dims in system.partition.items()
    }


def assign(
    params: Any,
    networks: Networks,
    *,
    phases: Sequence[Phase] = (Phase(),),
    methods: Sequence[Method] = (),
    freeze: Sequence[str] = (),
) -> dict[str, str | None]:
    """Path of each leaf -> its group, or None for a leaf that is not trained.

    A leaf's group is what a method names, else its network's name, or `train` where there is one
    network. Not trained is what its system or `freeze` says, what methods leave out, and whatever
    is in a group that no phase trains.

    Raises:
      ConfigError: if a pattern of `freeze` matches nothing, or nothing is left to train.
    """
    paths = leaf_paths(params)
    check_patterns("freeze", freeze, paths)
    never = _any_of([*own_patterns(networks, "frozen"), *freeze])
    trained = {group for phase in phases for group in phase.groups}
    groups: dict[str, str | None] = {}
    for path in paths:
        said = trains(methods, path)
        group = "train" if isinstance(networks, nn.Module) else path.partition("/")[0]
        group = said if isinstance(said, str) else group
        fixed = said is False or never.fullmatch(path) or group not in trained
        groups[path] = FROZEN if fixed else group
    if not any(groups.values()):
        raise ConfigError(
            f"Nothing is left to train: of {len(paths)} leaves each is frozen by its system, by "
            "freeze, by a method, or belongs to no phase of the task."
        )
    return groups


def decays(params: Any, networks: Networks | None = None, no_decay: Iterable[str] = ()) -> Any:
    """A tree of booleans: whether a leaf has weight decay.

    Matrices, filters and tables of tokens do. Biases, scales and all else of one axis, norms,
    tables of positions, special tokens, what the system's `no_decay` and `no_decay` here name do
    not; the system's `decay` goes before all of these. Layers that are stacked along an axis count
    one by one.
    """
    flat = [
        decision(path_of(keys), leaf.shape, networks, tuple(no_decay)) is not False
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def decision(
    path: str,
    shape: tuple[int, ...],
    networks: Networks | None = None,
    no_decay: tuple[str, ...] = (),
) -> bool | None:
    """Whether a leaf decays; None if no rule says anything of it (then it does)."""
    own = own_patterns(networks, "decay") if networks is not None else []
    other = own_patterns(networks, "no_decay") if networks is not None else []
    if _any_of(own).fullmatch(path):
        return True
    axes = len(shape) - bool(re.search(STACKED, path))
    if axes < 2 or _any_of([*NO_DECAY, *other, *no_decay]).fullmatch(path):
        return False
    return True if _any_of(DECAY).fullmatch(path) else None


def multipliers(params: Any, patterns: Mapping[str, float]) -> Any:
    """A tree of factors: the product of those whose pattern matches a leaf."""

    def factor(keys: tuple, leaf: Any) -> Any:
        matching = [f for pattern, f in patterns.items() if re.fullmatch(pattern, path_of(keys))]
        return np.prod(matching, dtype=np.float32) if matching else np.float32(1)

    return jax.tree_util.tree_map_with_path(factor, params)


def layer_factors(params: Any, networks: Networks, decay: float) -> Any:
    """A tree of factors `decay ** (layers above)`, of stacked layers one a row.

    The layers are those that the system's `depth` numbers in a path, in order. What comes before
    them (embeddings, tokens, positions) is one layer below, what comes after (norm, head) one
    above, whose factor is 1. Bao et al. (BEiT), arXiv 2106.08254.
    """
    pattern = next((system.depth for _, system in systems_of(networks)), System.depth)
    flat = jax.tree_util.tree_leaves_with_path(params)
    numbers = []
    for keys, leaf in flat:
        path = path_of(keys)
        stacked = bool(re.search(STACKED, path))
        inside = tuple(int(n) for n in re.findall(pattern, path))
        rows = [(*inside, i) for i in range(leaf.shape[0])] if stacked else [inside]
        numbers.append((path, leaf, rows, stacked))
    order = sorted({row for *_, rows, _ in numbers for row in rows if row})
    place = {row: 1 + i for i, row in enumerate(order)}
    top = len(order) + 1

    def factor(path: str, row: tuple[int, ...]) -> float:
        layer = place[row] if row else 0 if re.fullmatch(FIRST, path) else top
        return decay ** (top - layer)

    factors = []
    for path, leaf, rows, stacked in numbers:
        values = np.array([factor(path, row) for row in rows], np.float32)
        shape = (-1, *(1,) * (len(leaf.shape) - 1)) if stacked else ()
        factors.append(values.reshape(shape))
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def check_patterns(what: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Refuse patterns that are no regular expression or match no path.

    Raises:
      ConfigError: naming the first, with a path as it could be.
    """
    paths = list(paths)
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise ConfigError(f"{what}: {pattern!r} is no regular expression ({error}).") from None
        if not found:
            some = ", ".join(paths[:: max(1, len(paths) // 3)][:3])
            raise ConfigError(
                f"{what}: {pattern!r} matches no leaf; a pattern is a regular expression of a "
                f"whole path such as {some}."
            )


def _any_of(patterns: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
