"""LoRA: a trained product of two thin matrices beside matrices that stay as they are.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; official code
github.com/microsoft/LoRA (loralib, MIT).

    y = W x + b + (alpha / r) B A dropout(x)        A: Kaiming uniform, as `nn.Linear`; B: zero

so that at first nothing changes. In our layout, where a matrix is `[in, out]`, `lora_a` is
`[in, r]` and `lora_b` is `[r, out]`. An embedding's A is zero and its B normal, as in loralib.

Variants: rsLoRA scales by `alpha / sqrt(r)` (Kalajdzievski, arXiv 2312.03732). DoRA (Liu et al.,
arXiv 2402.09353) learns a magnitude m per output beside the direction, whose norm is a constant of
the gradient:

    W' = m (W + (alpha / r) B A) / |W + (alpha / r) B A|                    m: at first |W|

A fused `qkv` can be adapted in part (loralib's MergedLinear): `enabled=(True, False, True)` has a
pair of matrices for each enabled block of outputs, side by side in `lora_a` and `lora_b`.

Files: loralib's names stand beside each weight (`q.weight`, `q.lora_A`, `q.lora_B`), PEFT's adapter
files hold `base_model.model.q.lora_A.weight` alone. `adapter` and `with_adapter` write and read the
adapter by itself, in either naming.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from zoo.checkpoints.ruleset import Rule, Rules
from zoo.checkpoints.transforms import linear
from zoo.methods.method import Method, Variables, intercepted, unwrap

LEAVES = r".*(^|/)(lora_[ab]|dora_magnitude)"
PEFT = "base_model.model."
PRODUCT = "lora_product"
"""Name of the convolution that computes the product, which is not adapted itself."""

uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def in_blocks(
    y: Float[Array, "... enabled width"], enabled: tuple[bool, ...]
) -> Float[Array, "... outputs"]:
    """Outputs of the enabled blocks, and zeros for the others."""
    each = iter(jnp.moveaxis(y, -2, 0))
    zeros = jnp.zeros((*y.shape[:-2], y.shape[-1]), y.dtype)
    return jnp.concatenate([next(each) if on else zeros for on in enabled], -1)


def product(
    x: Float[Array, "... inputs"],
    a: Float[Array, "inputs rank"],
    b: Float[Array, "rank outputs"],
    enabled: tuple[bool, ...] | None = None,
) -> Float[Array, "... outputs"]:
    """`x a b`, of each enabled block by itself."""
    if enabled is None:
        return (x @ a) @ b
    count = sum(enabled)
    hidden = (x @ a).reshape(*x.shape[:-1], count, -1)
    b = b.reshape(b.shape[0], count, -1)
    return in_blocks(jnp.einsum("...nr,rnw->...nw", hidden, b), enabled)


def delta(
    a: Float[Array, "inputs rank"],
    b: Float[Array, "rank outputs"],
    shape: tuple[int, ...],
    enabled: tuple[bool, ...] | None = None,
) -> Float[Array, "..."]:
    """What the pair adds to a kernel of this shape, but for the scale.

    A convolution's product is read as `[out, in, height, width]`, as loralib does.
    """
    if len(shape) == 2:
        return product(jnp.eye(a.shape[0], dtype=a.dtype), a, b, enabled)
    window, (inputs, outputs) = shape[:-2], shape[-2:]
    return (a @ b).T.reshape(outputs, inputs, *window).transpose(2, 3, 1, 0)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of dense maps, embeddings and convolutions with square windows.

    Attributes:
      rank: columns of A.
      alpha: what the product is scaled by is `alpha / rank`.
      targets: layers (path of the submodule, regex of the whole) that are adapted.
      dropout: rate on the input of A, in training.
      rank_stabilised: scale by `alpha / sqrt(rank)`.
      enabled: of a fused map's equal blocks of outputs, which are adapted; None: the whole.
      magnitude: DoRA: a learned magnitude per output (of dense maps).
      also: other leaves (regex of the whole path) that are trained, such as a fresh head.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r".*(^|/)(qkv|query|key|value|out)"
    dropout: float = 0.0
    rank_stabilised: bool = False
    enabled: tuple[bool, ...] | None = None
    magnitude: bool = False
    also: str = r"(?!)"

    beside = True  # it adds to what a map gives: see `linear.refuse_added`

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the product beside each target."""
        return intercepted(module, self)

    def adapt(self, module: nn.Module, variables: Variables, rng: Any, batches: Any = None) -> dict:
        """The variables with both matrices at each target.

        Raises:
          ValueError: if no layer matches `targets`.
        """
        adapted = super().adapt(module, variables, rng, batches)
        if not any(path[-1] == "lora_a" for path in flatten_dict(adapted["params"])):
            raise ValueError(
                f"LoRA's targets {self.targets!r} match no dense map of {type(module).__name__}; "
                "give a regular expression of whole paths, such as r'.*attention/qkv'."
            )
        return adapted

    def trains(self, path: str) -> bool:
        """What is added is, and `also`."""
        return re.fullmatch(f"{LEAVES}|{self.also}", path) is not None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, modules that are called have it: for an architecture that consists of it."""
        with nn.intercept_methods(self.intercept):
            yield

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """A target's output plus the product's."""
        layer, name = context.module, context.method_name
        adapts = {nn.Dense: self._dense, nn.Conv: self._conv, nn.Embed: self._embed}
        adapt = next((f for kind, f in adapts.items() if isinstance(layer, kind)), None)
        named = name == "__call__" or (isinstance(layer, nn.Embed) and name == "attend")
        named = named and layer.name != PRODUCT
        if adapt is None or not named or not re.fullmatch(self.targets, "/".join(layer.path)):
            return call(*args, **kwargs)
        y = call(*args, **kwargs)
        return adapt(layer, args[0], y, name)

    def _dense(self, dense: nn.Dense, x: Array, y: Array, name: str) -> Array:
        count = 1 if self.enabled is None else sum(self.enabled)
        outputs = dense.features
        if self.enabled is not None:
            if outputs % len(self.enabled):
                raise ValueError(
                    f"{'/'.join(dense.path)} has {outputs} outputs, which {len(self.enabled)} "
                    "equal blocks do not divide; give as many values of `enabled` as it has blocks."
                )
            outputs = outputs // len(self.enabled) * count
        a = dense.param("lora_a", uniform, (x.shape[-1], count * self.rank), dense.param_dtype)
        b = dense.param(
            "lora_b", nn.initializers.zeros_init(), (self.rank, outputs), dense.param_dtype
        )
        given = x
        if self.dropout and dense.has_rng("dropout"):
            keep = jax.random.bernoulli(dense.make_rng("dropout"), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=dense.dtype)
        added = self.scale * product(x, a, b, self.enabled)
        if not self.magnitude:
            return y + added
        kernel = dense.get_variable("params", "kernel")
        magnitude = dense.param("dora_magnitude", lambda _: column_norms(kernel))
        whole = kernel + self.scale * delta(a, b, kernel.shape, self.enabled)
        factor = (magnitude / jax.lax.stop_gradient(column_norms(whole))).astype(y.dtype)
        bias = dense.get_variable("params", "bias").astype(y.dtype) if dense.use_bias else 0
        # Without dropout this is `x` times the matrix of DoRA; PEFT drops out alike.
        plain = y - bias if x is given else given @ kernel.astype(y.dtype)
        return factor * (plain + added) + bias

    def _conv(self, conv: nn.Conv, x: Array, y: Array, name: str) -> Array:
        window = conv.kernel_size
        if len(window) != 2 or window[0] != window[1]:
            raise ValueError(
                f"LoRA adapts convolutions with square windows, not {'/'.join(conv.path)} with "
                f"{window}; leave it out of `targets`."
            )
        size, groups = window[0], conv.feature_group_count
        rank, inputs = self.rank * size, x.shape[-1] // groups
        # As in loralib, A reads the channels of all groups and B gives those of one.
        a = conv.param("lora_a", uniform, (x.shape[-1] * size, rank), conv.param_dtype)
        zeros = nn.initializers.zeros_init()
        b = conv.param("lora_b", zeros, (rank, conv.features // groups * size), conv.param_dtype)
        kernel = self.scale * delta(a, b, (*window, inputs, conv.features))
        plain = conv.clone(use_bias=False, parent=None, name=PRODUCT)
        return y + plain.apply({"params": {"kernel": kernel}}, x)

    def _embed(self, embed: nn.Embed, x: Array, y: Array, name: str) -> Array:
        zeros, normal = nn.initializers.zeros_init(), nn.initializers.normal(1.0)

        def leaf(name: str, start: Callable, shape: tuple[int, ...]) -> Array:
            if embed.has_variable("params", name):  # a tied embedding is called twice
                return embed.get_variable("params", name)
            # Its own `param` is closed: embeddings make theirs in `setup`.
            return embed.scope.param(name, start, shape, embed.param_dtype)

        a = leaf("lora_a", zeros, (embed.num_embeddings, self.rank))
        b = leaf("lora_b", normal, (self.rank, embed.features))
        a, b = nn.dtypes.promote_dtype(a, b, dtype=embed.dtype)
        if name == "attend":
            return y + self.scale * ((x @ b.T) @ a.T)
        return y + self.scale * (jnp.take(a, x, axis=0) @ b)

    def layouts(self, layouts: Mapping[str, Rules]) -> dict[str, Rules]:
        """Each naming of the plain model with loralib's names, and with PEFT's."""
        return {
            f"{name}{suffix}": Rules(
                [*rules.rules, *added(rules)],
                rules.derived,
                rules.unused,
                rules.fresh,
                rules.resize,
            )
            for name, rules in layouts.items()
            for suffix, added in (("", _loralib), ("_peft", _peft))
        }

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The product is added to each matrix."""
        plain = unwrap(module, self)
        return plain, merged(variables, self.scale, self.targets, self.enabled)


def column_norms(kernel: Float[Array, "... inputs outputs"]) -> Float[Array, "... outputs"]:
    """The length of each output's weights."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def merged(
    variables: Variables,
    scale: float,
    targets: str = ".*",
    enabled: tuple[bool, ...] | None = None,
) -> dict[str, Any]:
    """Variables in which the pair of thin matrices of each target is added to its matrix.

    The sum is made in float32, in which a small product is not lost.

    Raises:
      ValueError: if the matrix is one of whole numbers (`Int8`).
    """
    flat = flatten_dict(dict(variables))
    for path in [p for p in flat if p[-1] == "lora_a"]:
        if not re.fullmatch(targets, "/".join(path[1:-1])):
            continue
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        magnitude = flat.pop((*path[:-1], "dora_magnitude"), None)
        name = next(n for n in ("kernel", "embedding") if (*path[:-1], n) in flat)
        kernel = flat[(*path[:-1], name)]
        if jnp.issubdtype(kernel.dtype, jnp.integer):
            raise ValueError(
                f"{'/'.join(path[1:-1])} has whole numbers as weights, which LoRA's product cannot "
                "be added to; keep the wrapped model, or write the adapter by itself (`adapter`)."
            )

        def whole(kernel: Array, a: Array, b: Array) -> Array:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return kernel.astype(jnp.float32) + scale * delta(a, b, kernel.shape, enabled)

        for _ in range(a.ndim - 2):  # stacked layers
            whole = jax.vmap(whole)
        new = a @ b * scale + kernel if name == "embedding" else whole(kernel, a, b)
        if magnitude is not None:
            new = new * (magnitude / column_norms(new))[..., None, :]
        flat[(*path[:-1], name)] = new.astype(kernel.dtype)
    return unflatten_dict(flat)


# ------------------------------------------------------------------------------- files


def _layers(rules: Rules) -> Iterator[tuple[str, str, bool]]:
    """Name and path of each layer whose matrix is one tensor, and whether it is an embedding."""
    seen = set()
    for rule in rules.rules:
        source, target = rule.sources[0].text, rule.targets[0].text
        leaf = target.rpartition("/")[2]
        single = len(rule.sources) == len(rule.targets) == 1 and source.endswith(".weight")
        if single and leaf in ("kernel", "embedding") and source not in seen:
            seen.add(source)
            path = target.removesuffix(leaf).removesuffix("/")
            yield source.removesuffix(".weight"), path, leaf == "embedding"


def _loralib(rules: Rules) -> list[Rule]:
    return [
        rule
        for theirs, ours, _ in _layers(rules)
        for rule in (
            Rule(f"{theirs}.lora_A", f"{ours}/lora_a", linear),
            Rule(f"{theirs}.lora_B", f"{ours}/lora_b", linear),
        )
    ]


def _peft(rules: Rules) -> list[Rule]:
    added = []
    for theirs, ours, embeds in _layers(rules):
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if embeds
            else ("lora_A.weight", "lora_B.weight")
        )
        added += [
            Rule(f"{PEFT}{theirs}.{name}", f"{ours}/{leaf}", linear)
            for name, leaf in zip(names, ("lora_a", "lora_b"), strict=True)
        ]
        added.append(Rule(f"{PEFT}{theirs}.lora_magnitude_vector.weight", f"{ours}/dora_magnitude"))
    return added


def adapter(
    module: nn.Module, variables: Variables, naming: Literal["loralib", "peft"] = "peft"
) -> dict[str, np.ndarray]:
    """The adapter by itself, as `adapter_model.safetensors` or loralib's `lora_state_dict` has it.

    Args:
      module: with one `LoRA` in it.
      variables: of `module`.
      naming: whose names.

    Raises:
      ValueError: if no naming of the model has a place for every added matrix.
    """
    from zoo import export
    from zoo.registry import layouts

    for layout in layouts(module):
        if layout.endswith("_peft") == (naming == "peft"):
            with contextlib.suppress(ValueError):
                state = export(module, variables, layout)
                return {n: x for n, x in state.items() if "lora_" in n}
    raise ValueError(
        f"No {naming} naming of this {type(module).__name__} has a place for every added matrix: "
        "those of its layers whose weights are several tensors of a file cannot be written."
    )


def with_adapter(
    module: nn.Module, variables: Variables, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The variables with an adapter's matrices in place of those that they have.

    Args:
      module: with one `LoRA` in it.
      variables: of `module`, as `adapt` gives them.
      state: an adapter's file, in loralib's or PEFT's names.

    Raises:
      ValueError: if the adapter does not fit.
    """
    from zoo import convert, export
    from zoo.registry import layouts

    naming = "peft" if any(name.startswith(PEFT) for name in state) else "loralib"
    for layout in layouts(module):
        if layout.endswith("_peft") != (naming == "peft"):
            continue
        with contextlib.suppress(ValueError):
            whole = export(module, variables, layout)
            if {name for name in whole if "lora_" in name} == set(state):
                return convert(module, {**whole, **state})
    raise ValueError(
        f"The adapter's {len(state)} tensors (such as {next(iter(state), 'none')!r}) are not those "
        f"that this LoRA adds to the model in {naming}'s names; give its rank and targets."
    )
