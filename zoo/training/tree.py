"""Paths of leaves, and trees as plain nested dicts."""

from collections.abc import Callable
from typing import Any

import jax


def path_of(keys: tuple) -> str:
    """A leaf's key path as text: `stages_0/layers_1/mlp/up/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaf_paths(tree: Any) -> list[str]:
    """Paths of all leaves, in tree order."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def to_dict(tree: Any) -> Any:
    """Any pytree as nested dicts by path; nodes without leaves are left out."""
    nested: dict = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not keys:
            return leaf
        node = nested
        *parents, last = (path_of((key,)) for key in keys)
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested


def from_dict(nested: Any, like: Any) -> Any:
    """The inverse of `to_dict`, with the structure of `like`.

    Raises:
      KeyError: if a leaf of `like` is not there.
    """

    def pick(keys: tuple, _: Any) -> Any:
        node = nested
        for key in keys:
            node = node[path_of((key,))]
        return node

    return jax.tree_util.tree_map_with_path(pick, like)


def split(tree: Any, chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """A tree of nested dicts as two: the leaves whose path is chosen, and the others."""
    yes: dict = {}
    no: dict = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        node = yes if chosen(path_of(keys)) else no
        *parents, last = (path_of((key,)) for key in keys)
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return yes, no


def join(first: Any, second: Any) -> dict:
    """The inverse of `split`: one tree of nested dicts that has the leaves of both."""
    joined = dict(first)
    for name, node in second.items():
        both = isinstance(node, dict) and isinstance(joined.get(name), dict)
        joined[name] = join(joined[name], node) if both else node
    return joined
