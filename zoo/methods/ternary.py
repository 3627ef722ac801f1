"""Ternary weights and 8-bit activations in training, with a teacher that intervenes.

Kim et al., "Teacher Intervention: Improving Convergence of Quantization Aware Training for
Ultra-Low Precision Transformers", EACL 2023, arXiv 2302.11812; code github.com/MarsJacobs/ti-kd-qat
(no licence file), after TernaryBERT. Numbers are clipped to +-2.5 first; the gradient goes straight
through, and is zero where a number was clipped.

    ternary      t = 0.7 mean |w|; alpha = mean of |w| over |w| > t;  alpha sign(w) [|w| > t]
    symmetric    s = (2^(bits-1) - 1) / max |x|;  round(x s) / s
    asymmetric   2^bits - 1 levels from min to max

Quantised are: the word embedding (ternary, each row by itself), dense maps of attention, MLP and
pooler (ternary weight, 8-bit input), query, key, value and attention weights (8 bits). In each
layer, a number of the student can be replaced by the teacher's of the same batch, whose gradient
then does not flow through what it replaces:

    map       attention weights      query and key read a constant input
    context   weights times values   query, key and value do
    output    what `out` gives       likewise

`gradual` says which, by the step: output, then context, then map.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from zoo.layers.attention import Attention
from zoo.methods.attention import Heads, rewritten
from zoo.methods.linear import refuse_added
from zoo.methods.method import Method, Variables, intercepted, unwrap

CLIP = 2.5
Intervention = Literal["map", "context", "output"]


def _straight_through(quantise: Callable[[Array], Array]) -> Callable[..., Array]:
    """A quantiser of clipped numbers, with the straight-through gradient."""

    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def apply(x: Array, clip: float) -> Array:
        return quantise(jnp.clip(x, -clip, clip))

    def forward(x: Array, clip: float) -> tuple[Array, Array]:
        return apply(x, clip), (x < clip) & (x > -clip)

    apply.defvjp(forward, lambda clip, inside, g: (jnp.where(inside, g, 0),))
    return apply


def _axes(x: Array, rows: bool) -> tuple[int, ...]:
    """What shares a range: everything, or each row (of four axes: each head)."""
    if not rows:
        return tuple(range(x.ndim))
    return (-1,) if x.ndim <= 3 else (-2, -1)


def ternary(
    x: Float[Array, "..."], *, rows: bool = False, clip: float = CLIP, share: float = 0.7
) -> Float[Array, "..."]:
    """Three numbers for each tensor, or for each row; all zero where every number is."""

    def quantise(x: Array) -> Array:
        axes, size = _axes(x, rows), jnp.abs(x)
        far = size > share * size.mean(axes, keepdims=True)
        count = jnp.maximum(far.sum(axes, keepdims=True), 1)
        alpha = jnp.sum(jnp.where(far, size, 0), axes, keepdims=True) / count
        return alpha * jnp.sign(x) * far

    return _straight_through(quantise)(x, clip)


def symmetric(
    x: Float[Array, "..."], bits: int = 8, *, rows: bool = False, clip: float = CLIP
) -> Float[Array, "..."]:
    """Numbers on a grid around zero."""

    def quantise(x: Array) -> Array:
        largest = jnp.abs(x).max(_axes(x, rows), keepdims=True)
        scale = (2 ** (bits - 1) - 1) / jnp.where(largest == 0, 1.0, largest)
        return jnp.round(x * scale) / scale

    return _straight_through(quantise)(x, clip)


def asymmetric(
    x: Float[Array, "..."], bits: int = 8, *, rows: bool = False, clip: float = CLIP
) -> Float[Array, "..."]:
    """Numbers on a grid from the smallest to the largest."""

    def quantise(x: Array) -> Array:
        axes, top = _axes(x, rows), 2**bits - 1
        low = x.min(axes, keepdims=True)
        width = x.max(axes, keepdims=True) - low + 1e-8
        return jnp.round((x - low) / width * top) / top * width + low

    return _straight_through(quantise)(x, clip)


class Seen(NamedTuple):
    """What `zoo.layers.attention.Attention` computes on its way, of one layer.

    Attributes:
      scores: logits, with `hidden` added where a key is padding.
      weights: attention weights.
      context: weights times values, of each head.
      output: what `out` gives.
    """

    scores: Float[Array, "batch heads queries keys"]
    weights: Float[Array, "batch heads queries keys"]
    context: Float[Array, "batch heads queries head_dim"]
    output: Float[Array, "batch queries channels"]


@dataclass(frozen=True, eq=False)
class Teacher(Method):
    """Watches attention: `seen` of each layer, by the path of its module, is sown as `seen`."""

    hidden: float = -10000.0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that tells what its attention computes."""
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The call as it is, and what was seen on its way."""
        module = context.module
        if not isinstance(module, Attention) or context.method_name != "__call__":
            return call(*args, **kwargs)
        return _attend(call, args, kwargs, module, self.hidden)


@dataclass(frozen=True, eq=False)
class Ternary(Method):
    """A student of ternary weights and 8-bit activations.

    Attributes:
      targets: dense maps (path, regex of the whole) that are quantised.
      embeddings: embeddings that are, row by row.
      clip: what numbers are clipped to.
      share: of the mean of |w|, the threshold.
      bits: of activations.
      intervention: what of the teacher's takes the place of the student's; None: nothing.
      teacher: what the teacher saw of each layer, by the path of its attention.
    """

    targets: str = r".*(^|/)(query|key|value|qkv|out|up|down|gate|pooler)"
    embeddings: str = r".*(^|/)embed"
    clip: float = CLIP
    share: float = 0.7
    bits: int = 8
    intervention: Intervention | None = None
    teacher: Mapping[str, Seen] = field(default_factory=dict)
    hidden: float = -10000.0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that computes with quantised numbers."""
        refuse_added(module, self)
        return intercepted(module, self)

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A quantised layer's output."""
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, Attention):
            return _attend(call, args, kwargs, module, self.hidden, self, self.teacher.get(path))
        if isinstance(module, nn.Embed) and re.fullmatch(self.embeddings, path):
            if not module.has_variable("params", "embedding"):
                return call(*args, **kwargs)
            table = module.get_variable("params", "embedding")
            return ternary(table, rows=True, clip=self.clip, share=self.share)[args[0]]
        # Attention's own maps are left to `_attend`, which has to see what they give.
        if isinstance(module, nn.Dense) and not isinstance(module.parent, Attention):
            return self._dense(module, call, args, kwargs)
        return call(*args, **kwargs)

    def _dense(self, dense: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Array:
        wanted = re.fullmatch(self.targets, "/".join(dense.path))
        if not wanted or not dense.has_variable("params", "kernel"):
            return call(*args, **kwargs)
        kernel = dense.get_variable("params", "kernel")
        kernel = ternary(kernel, clip=self.clip, share=self.share)
        y = symmetric(args[0], self.bits, clip=self.clip) @ kernel
        return y + dense.get_variable("params", "bias") if dense.use_bias else y

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """There is no plain model with 8-bit activations.

        Raises:
          ValueError: always.
        """
        unwrap(module, self)
        raise ValueError("A plain model does not quantise its activations: it cannot be merged.")


def _attend(
    call: Callable,
    args: tuple,
    kwargs: dict,
    module: nn.Module,
    hidden: float,
    student: Ternary | None = None,
    teacher: Seen | None = None,
) -> Any:
    """Attention of a teacher, or of a student; what it computes is sown."""
    made = {}
    mode = None if student is None else student.intervention
    if mode is not None and teacher is None:
        raise ValueError(
            f"{'/'.join(module.path)} is to use the teacher's {mode}, and there is none; give "
            "`teacher` what `Teacher` saw of the same batch."
        )

    constant = {
        "map": ("query", "key"),
        "context": ("query", "key", "value"),
        "output": ("query", "key", "value"),
    }.get(mode, ())

    def run(child: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Array:
        if child.name in constant:
            args = (jax.lax.stop_gradient(args[0]), *args[1:])
        dense = student is not None and isinstance(child, nn.Dense)
        y = student._dense(child, call, args, kwargs) if dense else call(*args, **kwargs)
        if child.name != "out":
            return y
        made["output"] = y
        return teacher.output if mode == "output" else y

    def mix(heads: Heads) -> Array:
        def eight(x: Array) -> Array:
            return x if student is None else symmetric(x, student.bits, clip=student.clip)

        query, key, value = (eight(x) for x in (heads.query, heads.key, heads.value))
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key) * heads.scale
        if heads.visible is not None:  # added, as the official code does
            scores = scores + jnp.where(heads.visible, 0.0, hidden)
        weights = made["weights"] = jax.nn.softmax(scores, -1)
        made["scores"] = scores
        weights = teacher.weights if mode == "map" else weights
        context = jnp.einsum("bnqk,bknd->bnqd", eight(weights), value)
        made["context"] = context
        context = teacher.context if mode == "context" else context
        return context.swapaxes(1, 2)

    y = rewritten(call, args, kwargs, module, mix, run)
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "seen", Seen(**made))
    return y


def seen(intermediates: Mapping[str, Any]) -> dict[str, Seen]:
    """What attention computed, by the path of its module, from the collection `intermediates`."""
    found = {}

    def visit(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, part in tree.items():
            if name == "seen":
                found["/".join(path)] = part[-1]
            elif isinstance(part, Mapping):
                visit(part, (*path, name))

    visit(intermediates, ())
    return found


def gradual(step: int, steps: int) -> Intervention:
    """The intervention of the first stage's step: output, from 1/6 context, from 1/3 map."""
    return "output" if step < steps / 6 else "context" if step < steps / 3 else "map"


def inverted(step: int, steps: int) -> Intervention:
    """The other way: map, from 1/3 context, from 2/3 output."""
    return "map" if step < steps / 3 else "context" if step < 2 * steps / 3 else "output"


def stochastic(rng: PRNGKeyArray) -> Intervention:
    """Any of the three."""
    return ("map", "context", "output")[int(jax.random.randint(rng, (), 0, 3))]
