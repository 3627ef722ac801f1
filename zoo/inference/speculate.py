"""Speculative decoding: a small model drafts tokens, the large one reads them all in one pass.

Leviathan et al., arXiv 2211.17192 (chains); Miao et al., "SpecInfer", arXiv 2305.09781 (trees,
multi-step sampling); Wu et al., "STree: Speculative Tree Decoding for Hybrid State-Space Models",
2025 (trees over a recurrent state; code github.com/wyc1997/stree, without a licence).

A pass drafts a tree whose root is the last token of the text, asks the large model for its
distributions behind every node (`model.branch`, which leaves the state alone), walks from the root
as far as the drafts hold, and puts the nodes of that walk into the state (`model.keep`). Greedy
tokens are exactly those of `generate`; sampled ones have exactly its distribution. A pass costs one
call of the large model and adds at least one token.

The tree is the same in every pass: `Tree(((0, 0, 0), (0, 1)))` has three drafts behind the root,
the first two of which have one more behind each. The drafter's likeliest tokens go to the nodes of
one parent in their order when drafts are greedy; otherwise they are drawn without replacement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zoo.inference.generate import padded
from zoo.inference.samplers import Filter
from zoo.layers.causal import check_tokens


@dataclass(frozen=True)
class Tree:
    """The shape of a draft, level by level.

    Attributes:
      levels: for each level, the parent of every node as a number within the level above; the root
        alone is the level above the first. Parents are in order.
    """

    levels: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        above = 1
        for level in self.levels:
            if not level or list(level) != sorted(level) or not 0 <= level[0] <= level[-1] < above:
                raise ValueError(
                    f"The level {level} of a tree should name parents among 0 to {above - 1}, in "
                    "order."
                )
            above = len(level)

    @property
    def parents(self) -> tuple[int, ...]:
        """The parent of each node, -1 for the root."""
        parents, first = [-1], 0
        for level in self.levels:
            before = len(parents)
            parents += [first + parent for parent in level]
            first = before
        return tuple(parents)

    def children(self, node: int) -> tuple[int, ...]:
        """The nodes behind a node, in the order in which they are tried."""
        return tuple(i for i, parent in enumerate(self.parents) if parent == node)


def chain(length: int) -> Tree:
    """One draft behind the other, as vanilla speculative decoding has them."""
    return Tree(((0,),) * length)


STREE = Tree(((0, 0, 0, 0, 0), (0, 0, 1, 2), (0, 0, 1, 2), (0, 0, 1, 1)))
"""The tree of STree's code: 17 drafts behind the root."""


class Accepted(NamedTuple):
    """How far the drafts of a tree hold.

    Attributes:
      path: nodes from the root on, as many as the tree has levels and one more.
      count: how many of them are accepted, the root among them.
      token: what comes behind the last of these.
    """

    path: Int[Array, "depth"]
    count: Int[Array, ""]
    token: Int[Array, ""]


def verify_greedy(
    tokens: Int[Array, "nodes"], logits: Float[Array, "nodes vocab"], parents: Sequence[int]
) -> Accepted:
    """Walk to the child that holds the likeliest token, as long as there is one.

    Args:
      tokens: of the nodes.
      logits: of the large model behind each node.
      parents: the parent of each node, below its own number; -1 for the root.
    """
    best = logits.argmax(-1).astype(tokens.dtype)
    above = jnp.asarray(parents)
    number = jnp.arange(len(tokens))

    def go(node: Array, _: None) -> tuple[Array, Array]:
        found = (above == node) & (tokens == best[jnp.maximum(node, 0)]) & (node >= 0)
        return jnp.where(found.any(), jnp.where(found, number, len(tokens)).min(), -1), node

    _, path = jax.lax.scan(go, jnp.zeros((), number.dtype), length=depth_of(parents) + 1)
    count = (path >= 0).sum()
    return Accepted(jnp.maximum(path, 0), count, best[path[count - 1]])


def verify_sampled(
    rng: PRNGKeyArray,
    tokens: Int[Array, "nodes"],
    target: Float[Array, "nodes vocab"],
    draft: Float[Array, "nodes vocab"],
    parents: Sequence[int],
) -> Accepted:
    """SpecInfer's walk: what it accepts, and the token behind, are draws from `target`.

    The children of a node are drawn without replacement from the drafter's distribution. Each is
    accepted with probability min(1, p / q); after a rejection p becomes max(p - q, 0) and q loses
    that child, both scaled to one. Behind the last accepted node a token is drawn from what p is
    then.

    Args:
      rng: a key of `jax.random`.
      tokens: of the nodes.
      target: the large model's distribution behind each node, as probabilities.
      draft: the drafter's behind each node.
      parents: the parent of each node, below its own number; -1 for the root.
    """
    depth, nodes = depth_of(parents), len(parents)
    above = jnp.asarray(parents)
    chances, last = jax.random.uniform(rng, (depth, nodes)), jax.random.fold_in(rng, 1)

    def normal(p: Array) -> Array:
        return p / jnp.maximum(p.sum(), 1e-30)

    def level(carry: tuple, chance: Array) -> tuple[tuple, Array]:
        node, left = carry  # node: -1 once the walk has ended; left: what to draw from then

        def child(i: int, tried: tuple) -> tuple:
            p, q, chosen = tried
            token = tokens[i]
            asked = (above[i] == node) & (node >= 0) & (chosen < 0) & (q[token] > 0)
            holds = chance[i] * q[token] < p[token]
            rest = normal(jnp.maximum(p - q, 0))
            # p and q may be equal, up to rounding, where a rejection then cannot happen
            rest = jnp.where(rest.sum() > 0, rest, p)
            without = normal(q.at[token].set(0))
            chosen = jnp.where(asked & holds, i, chosen)
            rejected = asked & ~holds
            return jnp.where(rejected, rest, p), jnp.where(rejected, without, q), chosen

        at = jnp.maximum(node, 0)
        start = target[at], draft[at], jnp.full((), -1)
        p, _, chosen = jax.lax.fori_loop(0, nodes, child, start)
        left = jnp.where(node >= 0, p, left)
        return (jnp.where(node >= 0, chosen, -1), left), node

    (node, left), path = jax.lax.scan(level, (jnp.zeros((), int), target[0]), chances)
    path = jnp.append(path, node)
    left = jnp.where(node >= 0, target[jnp.maximum(node, 0)], left)  # a leaf: its own distribution
    token = jax.random.categorical(last, jnp.log(left))
    return Accepted(jnp.maximum(path, 0), (path >= 0).sum(), token.astype(tokens.dtype))


def depth_of(parents: Sequence[int]) -> int:
    """Levels of a tree below its root."""
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not (node == 0 and parent == -1) and not 0 <= parent < node:
            raise ValueError(
                f"parents {tuple(parents)} are no tree: the first is -1, others lie below their "
                "node."
            )
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return max(depths)


class Speculated(NamedTuple):
    """What speculative decoding gives.

    Attributes:
      tokens: the new tokens.
      passes: calls of the large model after the prompt, for each row; `steps` over this many
        tokens a call is what speculation brings.
    """

    tokens: Int[Array, "batch steps"]
    passes: Int[Array, "batch"]


def speculate(
    model: nn.Module,
    variables: Mapping[str, Any],
    drafter: nn.Module,
    drafter_variables: Mapping[str, Any],
    prompt: Int[Array, "batch length"] | Sequence[Sequence[int]],
    *,
    steps: int,
    tree: Tree = STREE,
    rng: PRNGKeyArray | None = None,
    filters: tuple[Filter, ...] | None = None,
    mask: Array | None = None,
) -> Speculated:
    """Continue prompts by what the drafter proposes and the model accepts.

    Args:
      model: the large model; it has `branch` and `keep` (attention and Mamba-2, not delta rules).
      variables: of the model.
      drafter: the small model, of the same vocabulary, with `branch` and `keep`, too.
      drafter_variables: of the drafter.
      prompt: tokens, `[batch, length]`; or lists of different lengths.
      steps: how many tokens to add.
      tree: shape of the drafts; `chain(k)` is vanilla speculative decoding.
      rng: a key of `jax.random`; for sampling.
      filters: what is done to both models' logits before tokens are drawn, as in `Draw`; None:
        greedy.
      mask: of the prompt.

    Raises:
      ValueError: if a model has no `branch`, or vocabularies differ.
    """
    for each in (model, drafter):
        if not hasattr(each, "branch"):
            raise ValueError(
                f"{type(each).__name__} has no branch and keep: it cannot read a tree of tokens."
            )
    if model.vocab_size != drafter.vocab_size:
        raise ValueError(
            f"The model has {model.vocab_size} tokens and the drafter {drafter.vocab_size}; both "
            "should have one tokenizer."
        )
    if filters is not None and rng is None:
        raise ValueError("Drawing tokens needs rng=, a key of jax.random; greedy needs none.")
    prompt, mask = padded(prompt, mask)
    check_tokens(model, prompt, mask)
    mask = jnp.ones(prompt.shape, bool) if mask is None else mask
    rng = jax.random.key(0) if rng is None else rng
    options = {"model": model, "drafter": drafter, "steps": steps, "tree": tree, "filters": filters}
    rows = [
        # Rows accept different numbers of drafts, so each runs by itself.
        _speculate(
            (variables, drafter_variables), prompt[i : i + 1], mask[i : i + 1],
            jax.random.fold_in(rng, i), **options,
        )
        for i in range(len(prompt))
    ]  # fmt: skip
    return Speculated(*(jnp.concatenate(parts) for parts in zip(*rows, strict=True)))


@partial(jax.jit, static_argnames=("model", "drafter", "steps", "tree", "filters"))
def _speculate(variables, prompt, mask, rng, *, model, drafter, steps, tree, filters):
    depth, parents = len(tree.levels), tree.parents
    room = prompt.shape[1] + steps + 2 * depth + 2
    both = []
    for each, own in zip((model, drafter), variables, strict=True):
        state = each.init_state(1, room)
        if prompt.shape[1] > 1:
            state, _ = each.apply(own, state, prompt[:, :-1], mask[:, :-1], method="step")
        both.append(state)

    def going_on(carry):
        return carry[0] < steps

    def one_pass(carry):
        count, passes, root, states, out = carry
        key = jax.random.fold_in(rng, passes)
        draft_key, walk_key = jax.random.split(key)
        tokens, draft = _draft(drafter, variables[1], states[1], root, tree, filters, draft_key)
        nodes, logits = model.apply(
            variables[0], states[0], tokens[None], jnp.asarray(parents), method="branch"
        )
        if filters is None:
            found = verify_greedy(tokens, logits[0], parents)
        else:
            target = _probabilities(logits[0], filters)
            found = verify_sampled(walk_key, tokens, target, draft, parents)
        accepted = (jnp.arange(depth + 1) < found.count)[None]
        path = found.path[None]
        drafted, _ = drafter.apply(
            variables[1], states[1], tokens[None], jnp.asarray(parents), method="branch"
        )
        states = (
            model.keep(states[0], nodes, path, accepted),
            drafter.keep(states[1], drafted, path, accepted),
        )
        # The accepted drafts, then the token behind them; the root is in the text already.
        added = jnp.append(tokens[found.path[1:]], found.token)
        added = added.at[found.count - 1].set(found.token)
        out = jax.lax.dynamic_update_slice(out, added, (count,))
        return count + found.count, passes + 1, found.token, states, out

    out = jnp.zeros(steps + depth + 1, prompt.dtype)
    carry = (jnp.zeros((), int), jnp.zeros((), int), prompt[0, -1], tuple(both), out)
    _, passes, _, _, out = jax.lax.while_loop(going_on, one_pass, carry)
    return out[None, :steps], passes[None]


def _probabilities(logits: Array, filters: tuple[Filter, ...]) -> Float[Array, "nodes vocab"]:
    logits = logits.astype(jnp.float32)
    for change in filters:
        logits = change(logits)
    return jax.nn.softmax(logits, axis=-1)


def _draft(
    drafter: nn.Module,
    variables: Mapping[str, Any],
    state: Any,
    root: Array,
    tree: Tree,
    filters: tuple[Filter, ...] | None,
    rng: PRNGKeyArray,
) -> tuple[Int[Array, "nodes"], Float[Array, "nodes vocab"]]:
    """A tree of tokens behind `root`, and the drafter's distributions behind its nodes.

    Level by level the drafter reads what there is of the tree, which leaves its state alone.
    """
    parents = np.asarray(tree.parents)
    tokens = jnp.zeros(len(parents), root.dtype).at[0].set(root)
    distributions = jnp.zeros((len(parents), drafter.vocab_size))
    first, size = 0, 1  # the level whose children are next
    for number, level in enumerate(tree.levels):
        end = first + size
        _, logits = drafter.apply(
            variables, state, tokens[None, :end], jnp.asarray(parents[:end]), method="branch"
        )
        logits = logits[0, first:end].astype(jnp.float32)
        widest = max(np.bincount(level))
        if filters is None:
            choice = jax.lax.top_k(logits, widest)[1]
        else:
            p = _probabilities(logits, filters)
            distributions = distributions.at[first:end].set(p)
            # The largest of perturbed logarithms are draws without replacement, in their order.
            noise = jax.random.gumbel(jax.random.fold_in(rng, number), p.shape)
            choice = jax.lax.top_k(jnp.log(p) + noise, widest)[1]
        ranks = [level[:i].count(parent) for i, parent in enumerate(level)]
        drafted = choice[jnp.asarray(level), jnp.asarray(ranks)].astype(root.dtype)
        tokens = tokens.at[end : end + len(level)].set(drafted)
        first, size = end, len(level)
    return tokens, distributions
