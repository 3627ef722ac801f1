"""Graph transformers made sparse in four ways: tokens, heads, layers and weights (GTSP).

Liu et al., "Exploring Sparsity in Graph Transformers", arXiv 2312.05479; official code
github.com/LiuChuang0059/GTSP (no licence; facts only). Each is a method of its own, and they
compose. They work on the attention of Graphormer, GraphGPS, GraphTrans and GPS:

    tokens    s = W h;  y = softmax(log softmax(s) + g);  g: Gumbel noise in training, else 0
              the k = max(1, int(L ratio)) nodes with the largest y attend among themselves;
              gradients reach s as if 1 were y (straight through)
    heads     columns of inactive heads in the maps to q, k, v are 0 (their biases stay)
              every so often the n = ceil(death active) active heads with the smallest
              |sum grad A| die, and the n inactive ones with the largest |grad|_1 grow
    layers    the attention branch is dropped at random in training, or left out for good
    weights   global magnitude pruning on a cubic schedule; then each matrix drops its smallest
              weights and grows as many where the gradient is largest (GraNet)

Masks live in the collection `gtsp`, beside the leaves that they mask. `zoo.tasks.Sparsified`
renews those of heads and weights while a model trains.

Where we leave the official code (`SparseTokens(official=True)` is as it has them): it multiplies
the other tokens by 0, and keeps them as keys; lets padding compete; and always keeps the last row.
We gather the tokens that attend, so that scores are k x k, and the others keep what they were.
Layers are dropped a node at a time there, because PyG flattens nodes. Masked weights are zeroed
where they are used, not after each update: what comes back has the value that it had.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zoo.layers.attention import Attention
from zoo.layers.dense import Dense
from zoo.methods.method import Method, Variables, intercepted, outermost, unwrap

COLLECTION = "gtsp"
PERTURBED = "perturbations"
MAPS = ("qkv", "query", "key", "value")


def is_graph_attention(module: nn.Module) -> bool:
    """Whether a module is attention of a host: the shared one, or Graphormer's with a bias."""
    return isinstance(module, Attention) or type(module).__name__ == "BiasedAttention"


def _is_call(context: nn.module.InterceptorContext, targets: str) -> bool:
    module = context.module
    wanted = is_graph_attention(module) and context.method_name == "__call__"
    return wanted and re.fullmatch(targets, "/".join(module.path)) is not None


def _trains(args: tuple, kwargs: dict) -> bool:
    """Whether a call of attention, with what it sees and `train` behind its input, trains."""
    return bool(args[2] if len(args) > 2 else kwargs.get("train", False))


class _Scheduled(Method):
    """Base of methods whose masks change with the number of steps."""

    def adapt(
        self,
        module: nn.Module,
        variables: Variables,
        rng: PRNGKeyArray,
        batches: Sequence[Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """The variables with masks, and a number of steps."""
        variables = super().adapt(module, variables, rng, batches)
        masks = dict(variables.get(COLLECTION, {}))
        masks.setdefault("step", jnp.zeros((), jnp.int32))
        return {**variables, COLLECTION: masks}


def _without_count(flat: dict[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
    """Leaves without the number of steps, if no mask is left that needs it."""
    left = [p for p in flat if p[0] == COLLECTION]
    return {p: x for p, x in flat.items() if p not in left} if len(left) == 1 else flat


# ------------------------------------------------------------------------------- tokens


def chosen_tokens(
    scores: Float[Array, "batch length"], noise: Float[Array, "batch length"], keep: int
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """Which tokens are kept (1 or 0), and the soft choice that gradients go through."""
    soft = jax.nn.softmax(jax.nn.log_softmax(scores, -1) + noise, -1)
    _, index = jax.lax.top_k(soft, keep)
    rows = jnp.arange(len(soft))[:, None]
    return jnp.zeros_like(soft).at[rows, index].set(1), soft


@dataclass(frozen=True)
class SparseTokens(Method):
    """Only some nodes attend.

    Attributes:
      ratio: of the padded length; at least one token is kept.
      keep_first: tokens in front that are always kept: 1 where a graph is read from its first
        token (Graphormer, GraphTrans).
      official: multiply by zero as the official code does, rather than gather.
      targets: attention (path, regex of the whole) that is changed.
    """

    ratio: float = 0.5
    keep_first: int = 0
    official: bool = False
    targets: str = ".*"

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} of the tokens must be above 0, and at most 1.")

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a score for each token beside each attention."""
        return intercepted(module, self)

    def kept(self, length: int) -> int:
        """How many of so many tokens attend."""
        return max(1, self.keep_first, int(length * self.ratio))

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """Attention among the kept tokens."""
        if not _is_call(context, self.targets):
            return call(*args, **kwargs)
        module, (x, *rest) = context.module, args
        score = Dense(1, name="token_score", dtype=module.dtype, param_dtype=module.param_dtype)
        scores = score(x)[..., 0].astype(jnp.float32)
        noise = self._noise(module, scores, _trains(args, kwargs))
        keep = self.kept(x.shape[1])
        if self.official:
            hard, soft = chosen_tokens(scores, noise, keep)
            module.sow("intermediates", "kept", hard)
            mask = hard - jax.lax.stop_gradient(soft) + soft
            mask = mask.at[:, -1].set(1)
            return call(x * mask[..., None].astype(x.dtype), *rest, **kwargs)
        if keep == x.shape[1]:
            return call(*args, **kwargs)
        visible = rest[0] if rest else kwargs.get("visible", kwargs.get("bias"))
        real = _seen(module, visible)
        first = jnp.arange(x.shape[1]) < self.keep_first
        scores = jnp.where(first, 1e9, scores) if self.keep_first else scores
        scores = scores if real is None else jnp.where(real | first, scores, -1e9)
        hard, soft = chosen_tokens(scores, noise, keep)
        module.sow("intermediates", "kept", hard)
        _, index = jax.lax.top_k(hard * 2 - jnp.arange(x.shape[1]) / x.shape[1], keep)
        at = index[..., None]
        weight = jnp.take_along_axis(hard - jax.lax.stop_gradient(soft) + soft, index, 1)
        few = jnp.take_along_axis(x, at, 1) * weight[..., None].astype(x.dtype)
        given = _gathered(module, visible, index)
        if rest:
            y = call(few, given, *rest[1:], **kwargs)
        else:
            name = "visible" if isinstance(module, Attention) else "bias"
            y = call(few, **{**kwargs, name: given})
        return jnp.zeros_like(x).at[jnp.arange(len(x))[:, None], index].set(y.astype(x.dtype))

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model in which only some tokens attend.

        Raises:
          ValueError: always.
        """
        raise ValueError("Attention among some tokens has no plain form: it cannot be merged.")

    def _noise(self, module: nn.Module, scores: Array, train: bool) -> Array:
        """That of the collection `noise`, where it is given; else drawn in training."""
        if module.has_variable("noise", "gumbel"):
            return module.get_variable("noise", "gumbel")
        if train and module.has_rng("dropout"):
            return jax.random.gumbel(module.make_rng("dropout"), scores.shape)
        return jnp.zeros_like(scores)


def _seen(module: nn.Module, visible: Array | None) -> Bool[Array, "batch length"] | None:
    """Which tokens are no padding; of a bias those that any query may see."""
    if visible is None or isinstance(module, Attention):
        return visible
    return (visible > -1e29).any((1, 2))


def _gathered(module: nn.Module, visible: Array | None, index: Array) -> Array | None:
    """The mask or bias among the kept tokens."""
    if visible is None:
        return None
    if isinstance(module, Attention):
        return jnp.take_along_axis(visible, index, 1)
    rows = jnp.take_along_axis(visible, index[:, None, :, None], 2)
    return jnp.take_along_axis(rows, index[:, None, None, :], 3)


# -------------------------------------------------------------------------------- heads


def death_and_growth(
    active: Float[Array, "heads"],
    scores: Float[Array, "heads"],
    norms: Float[Array, "heads"],
    death: float,
) -> Float[Array, "heads"]:
    """The next set of active heads, as large as this one.

    Args:
      active: 1 for heads that are used.
      scores: what an active head is worth; the smallest die.
      norms: what an inactive head would be worth; the largest grow, those that just died included.
      death: part of the active heads that die.
    """
    on = active > 0
    count = jnp.ceil(death * on.sum() - 1e-6)

    def rank(order: Array) -> Array:
        return jnp.argsort(jnp.argsort(order, stable=True), stable=True)

    stays = on & (rank(jnp.where(on, scores, jnp.inf)) >= count)
    grows = ~stays & (rank(jnp.where(stays, jnp.inf, -norms)) < count)
    return (stays | grows).astype(active.dtype)


@dataclass(frozen=True)
class SparseHeads(_Scheduled):
    """Only some heads are used, and which ones changes while a model trains.

    Attributes:
      density: part of the heads that is used; at least one is.
      death: part of the active heads that dies at a time.
      every: steps between changes.
      targets: attention (path, regex of the whole) that is changed.
    """

    density: float = 0.5
    death: float = 0.5
    every: int = 200
    targets: str = ".*"

    def __post_init__(self):
        if not (0 < self.density <= 1 and 0 <= self.death <= 1 and self.every > 0):
            raise ValueError(
                f"density={self.density} must be above 0 and at most 1, death={self.death} from 0 "
                f"to 1, and every={self.every} at least 1."
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a mask of its heads beside each attention."""
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """Attention whose maps of inactive heads give their biases."""
        if not _is_call(context, self.targets):
            return call(*args, **kwargs)
        module = context.module
        heads = module.num_heads

        def start() -> Array:
            order = jax.random.permutation(module.make_rng("params"), heads)
            return (order < max(1, int(heads * self.density))).astype(jnp.float32)

        active = module.variable(COLLECTION, "heads", start).value

        def listen(
            call: Callable, args: tuple, kwargs: dict, inner: nn.module.InterceptorContext
        ) -> Any:
            child, y = inner.module, call(*args, **kwargs)
            if child.parent is not module or child.name not in MAPS:
                return y
            kernel = child.get_variable("params", "kernel")
            bias = child.get_variable("params", "bias") if child.use_bias else 0
            return jnp.where(head_columns(active, kernel) > 0, y, jnp.asarray(bias, y.dtype))

        with outermost(listen):
            y = call(*args, **kwargs)
        return _perturbed(module, y, heads)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The columns of inactive heads become 0."""
        flat = flatten_dict(dict(variables))
        for path in [p for p in flat if p[0] == COLLECTION and p[-1] == "heads"]:
            active = flat.pop(path)
            for name in MAPS:
                leaf = ("params", *path[1:-1], name, "kernel")
                if leaf in flat:
                    flat[leaf] = flat[leaf] * head_columns(active, flat[leaf])
        return unwrap(module, self), unflatten_dict(_without_count(flat))

    def is_due(self, step: Array) -> Array:
        """Whether heads die and grow behind this step."""
        return step % self.every == 0

    def renew(self, step: Array, variables: Variables, grads: Variables) -> dict[str, Any]:
        """The masks behind a step, see `zoo.tasks.Sparsified`.

        Args:
          step: steps that were taken.
          variables: of the model.
          grads: of the loss in its `perturbations`, see `worth`.
        """
        flat, worths = flatten_dict(dict(variables[COLLECTION])), worth(grads[PERTURBED])
        for path, (scores, norms) in worths.items():
            at = (*path, "heads")
            new = death_and_growth(flat[at], scores, norms, self.death)
            flat[at] = jnp.where(self.is_due(step), new, flat[at])
        return unflatten_dict(flat)


def head_columns(active: Array, kernel: Array) -> Array:
    """The mask of heads for a kernel of one map, or of three side by side."""
    inputs, outputs = kernel.shape[-2:]
    times = outputs // inputs if outputs % inputs == 0 else 1
    columns = jnp.repeat(active, outputs // times // len(active))
    return jnp.tile(columns, times).astype(kernel.dtype)


def with_kernel(dense: nn.Module, kernel: Array, x: Array) -> Array:
    """The output of a dense map with another kernel than its own."""
    leaves = {"kernel": kernel}
    if dense.use_bias:
        leaves["bias"] = dense.get_variable("params", "bias")
    return dense.clone(parent=None, name=None).apply({"params": leaves}, x)


def _perturbed(module: nn.Module, y: Array, heads: int) -> Array:
    """An output, plus and times nothing, where gradients of both are asked for."""
    asked = module.is_mutable_collection(PERTURBED) and not module.is_mutable_collection("params")
    if not (asked or module.has_variable(PERTURBED, "added")):
        return y
    added = module.variable(PERTURBED, "added", jnp.zeros, y.shape, y.dtype).value
    gate = module.variable(PERTURBED, "gate", jnp.zeros, (len(y), heads), y.dtype).value
    width = jnp.repeat(gate, y.shape[-1] // heads, axis=-1)[:, None]
    return y * (1 + width) + added


def worth(grads: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[Array, Array]]:
    """Scores and norms of the heads of each attention, from gradients of what `_perturbed` adds.

    They are taken of the output of attention behind its last map, cut into heads, as the official
    code does, although heads are mixed there.
    """
    flat, found = flatten_dict(dict(grads)), {}
    for path in [p[:-1] for p in flat if p[-1] == "gate"]:
        gate, added = flat[(*path, "gate")], flat[(*path, "added")]
        heads = added.reshape(*added.shape[:2], gate.shape[1], -1)
        found[path] = jnp.abs(gate).mean(0), jnp.abs(heads).sum((1, 3)).mean(0)
    return found


def perturbations(
    module: nn.Module, variables: Variables, inputs: Mapping[str, Array]
) -> dict[str, Any]:
    """Zeros to differentiate by, for a batch of inputs; none where no heads are masked."""
    shapes = jax.eval_shape(
        lambda v, x: module.apply(v, **x, mutable=[PERTURBED])[1], dict(variables), dict(inputs)
    )
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.get(PERTURBED, {}))


# ------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class SparseLayers(Method):
    """Attention branches are dropped at random in training, or left out for good.

    Attributes:
      rate: of dropping; what stays is scaled by 1 / (1 - rate).
      per: what is dropped at once: a `node` (as the official code does), a `graph`, or the whole
        `layer`.
      without: attention (path, regex of the whole) that is never computed; "" is none.
      targets: attention that may be dropped.
    """

    rate: float = 0.0
    per: str = "node"
    without: str = ""
    targets: str = ".*"

    def __post_init__(self):
        if self.per not in ("node", "graph", "layer") or not 0 <= self.rate < 1:
            raise ValueError(
                f"per={self.per!r} must be node, graph or layer, and rate={self.rate} from 0 to "
                "below 1."
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with branches that are dropped."""
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The output of attention, or nothing."""
        module = context.module
        if self.without and _is_call(context, self.without) and not module.is_initializing():
            return jnp.zeros_like(args[0])
        y = call(*args, **kwargs)
        if not self.rate or not _is_call(context, self.targets) or not _trains(args, kwargs):
            return y
        shape = {"node": (*y.shape[:2], 1), "graph": (len(y), 1, 1), "layer": (1, 1, 1)}[self.per]
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, y / (1 - self.rate), 0).astype(y.dtype)

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The plain model, whose branches are all there.

        Raises:
          ValueError: if some attention is left out for good.
        """
        if self.without:
            raise ValueError("A model without some of its attention has no plain form to merge to.")
        return super().merge(module, variables)


# ------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class SparseWeights(_Scheduled):
    """Matrices of dense maps lose their smallest weights, step by step.

    Attributes:
      initial_density, final_density: part of all weights that is kept before and behind the
        schedule.
      begin, end: steps of the schedule.
      every: steps between changes.
      regrow: part of the kept weights of each matrix that is dropped and grown elsewhere, at
        first; 0: none.
      regrow_end: the same at step `total`, along a cosine.
      total: steps of the run.
      targets: dense maps (path, regex of the whole) that lose weights.
    """

    initial_density: float = 1.0
    final_density: float = 0.5
    begin: int = 0
    end: int = 1000
    every: int = 100
    regrow: float = 0.5
    regrow_end: float = 0.005
    total: int = 1000
    targets: str = ".*"

    def __post_init__(self):
        if self.end // self.every <= self.begin // self.every:
            raise ValueError(
                f"No multiple of every={self.every} is between begin={self.begin} and "
                f"end={self.end}; make the schedule longer."
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a mask beside each matrix."""
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The output of a dense map whose weights are masked."""
        dense = context.module
        wanted = isinstance(dense, nn.Dense) and context.method_name == "__call__"
        wanted = wanted and isinstance(dense.parent, nn.Module)  # not the product below
        if not wanted or not re.fullmatch(self.targets, "/".join(dense.path)):
            return call(*args, **kwargs)
        if not dense.has_variable("params", "kernel"):
            y = call(*args, **kwargs)
            shape = dense.get_variable("params", "kernel").shape
            dense.variable(COLLECTION, "kernel", jnp.ones, shape, jnp.float32)
            return y
        kernel = dense.get_variable("params", "kernel")
        mask = dense.variable(COLLECTION, "kernel", jnp.ones, kernel.shape, jnp.float32).value
        return with_kernel(dense, kernel * mask.astype(kernel.dtype), args[0])

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """Masked weights become 0."""
        flat = flatten_dict(dict(variables))
        for path in [p for p in flat if p[0] == COLLECTION and p[-1] == "kernel"]:
            leaf = ("params", *path[1:])
            flat[leaf] = flat[leaf] * flat.pop(path).astype(flat[leaf].dtype)
        return unwrap(module, self), unflatten_dict(_without_count(flat))

    def rate(self, step: Array | float) -> Array:
        """The part of all weights that is left out at a step of the schedule."""
        first, last = self.begin // self.every, self.end // self.every
        part = jnp.clip((step // self.every - first) / (last - first), 0.0, 1.0)
        fall = self.initial_density - self.final_density
        return (1 - self.initial_density) + fall * (1 - (1 - part) ** 3)

    def is_due(self, step: Array) -> Array:
        """Whether masks change behind this step."""
        count = step // self.every
        inside = (count >= self.begin // self.every) & (count <= self.end // self.every)
        return (step >= self.begin) & (step % self.every == 0) & inside

    def renew(self, step: Array, variables: Variables, grads: Variables) -> dict[str, Any]:
        """The masks behind a step, see `zoo.tasks.Sparsified`.

        Args:
          step: steps that were taken.
          variables: of the model.
          grads: of the loss in its `params`, as if nothing were masked where masks may grow.
        """
        flat = flatten_dict(dict(variables[COLLECTION]))
        paths = [p for p in flat if p[-1] == "kernel"]
        params, slopes = (flatten_dict(dict(tree["params"])) for tree in (variables, grads))
        weights = [jnp.abs(params[p]) * flat[p] for p in paths]
        masks = global_masks(weights, self.rate(step))
        turn = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / self.total, 1.0)))
        moved = self.regrow_end + (self.regrow - self.regrow_end) * turn
        for path, mask, weight in zip(paths, masks, weights, strict=True):
            if self.regrow:
                mask = regrown(mask, weight, jnp.abs(slopes[path]), moved)
            flat[path] = jnp.where(self.is_due(step), mask, flat[path])
        return unflatten_dict(flat)


def global_masks(
    weights: Sequence[Float[Array, "..."]], rate: Array | float
) -> list[Float[Array, "..."]]:
    """Masks of the weights above the k-th largest of all, k = int(all (1 - rate)).

    The k-th itself is left out, as in the official code, but where all stay.

    Args:
      weights: sizes of the weights of each matrix.
      rate: part that is left out.
    """
    whole = jnp.sort(jnp.concatenate([w.reshape(-1) for w in weights]))[::-1]
    count = jnp.floor(len(whole) * (1 - rate) + 1e-6).astype(jnp.int32)
    threshold = whole[jnp.clip(count - 1, 0, len(whole) - 1)]
    threshold = jnp.where(count >= len(whole), -1.0, threshold)
    return [(w > threshold).astype(jnp.float32) for w in weights]


def regrown(
    mask: Float[Array, "..."], weight: Float[Array, "..."], slope: Float[Array, "..."],
    part: Array | float,
) -> Float[Array, "..."]:  # fmt: skip
    """A mask that has dropped its smallest weights and grown as many where the slope is largest.

    Args:
      mask: 1 for weights that are kept.
      weight: sizes of the weights.
      slope: sizes of their gradients.
      part: of the kept weights that is dropped.
    """
    on = mask.reshape(-1) > 0
    count = jnp.ceil(part * on.sum() - 1e-6)

    def rank(order: Array) -> Array:
        return jnp.argsort(jnp.argsort(order, stable=True), stable=True)

    stays = on & (rank(jnp.where(on, weight.reshape(-1), jnp.inf)) >= count)
    dropped = on.sum() - stays.sum()
    grows = ~stays & (rank(jnp.where(stays, jnp.inf, -slope.reshape(-1))) < dropped)
    return (stays | grows).reshape(mask.shape).astype(mask.dtype)


def density(variables: Variables) -> float:
    """The part of all weights under a mask that is kept."""
    masks = [x for p, x in flatten_dict(dict(variables[COLLECTION])).items() if p[-1] == "kernel"]
    return float(sum(m.sum() for m in masks)) / sum(math.prod(m.shape) for m in masks)
