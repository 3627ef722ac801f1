"""What a method is: something that changes a model or its training, and works on every model.

A method never edits a model's file. It wraps the module (`nn.intercept_methods` sees every call of
every submodule), adds or changes leaves, says which leaves are trained, and can be taken away
again:

    method = LoRA(rank=8)
    adapted = method.wrap(model)                                  # same calls, same inputs
    variables = method.adapt(model, variables, jax.random.key(0))  # with leaves beside the old ones
    logits = adapted.apply(variables, images)
    model, variables = method.merge(adapted, variables)           # a plain model, which exports

Leaves that a method adds stand in `params`, in the scope of the submodule that they belong to
(`layers_0/attention/qkv/lora_a`), so that the model's own leaves keep their paths and published
files keep loading. In a config, `methods=(LoRA(rank=8), ...)` composes from left to right: the
second method wraps what the first has wrapped.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from zoo.checkpoints.ruleset import Rules
from zoo.tasks.apply import zeros_like_inputs

Variables = Mapping[str, Any]
Interceptor = Callable[[Callable, tuple, dict, nn.module.InterceptorContext], Any]


class Method:
    """The contract, with the defaults of a method that changes nothing.

    A method is a frozen dataclass: it is a part of the config, and hashable.

    Attributes:
      calibration: batches of training data that `adapt` wants to see; 0 is none.
    """

    calibration: int = 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the method in it: same calls, `features` and `example_inputs`."""
        return module

    def adapt(
        self,
        module: nn.Module,
        variables: Variables,
        rng: PRNGKeyArray,
        batches: Sequence[Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """The variables of `wrap(module)` from those of `module`.

        Args:
          module: as it was before `wrap`.
          variables: of `module`.
          rng: for leaves that are added.
          batches: `calibration` batches of training data, or None where there are none (shapes are
            asked for then).
        """
        return add_leaves(self.wrap(module), variables, rng)

    def trains(self, path: str) -> bool | str | None:
        """Whether a leaf (by its path in `params`) is trained: a method decides, or says None.

        True trains it, a name trains it in that optimizer group, False freezes it. Of several
        methods one that trains a leaf wins.
        """
        return None

    def layouts(self, layouts: Mapping[str, Rules]) -> Mapping[str, Rules]:
        """The namings of files that have the method in them, from those of the plain model."""
        return layouts

    def merge(self, module: nn.Module, variables: Variables) -> tuple[nn.Module, dict[str, Any]]:
        """The inverse of `wrap`: a plain module and variables that give the same outputs.

        Args:
          module: what `wrap` gave.
          variables: of `module`.
        """
        return unwrap(module, self), dict(variables)


@runtime_checkable
class Intercepting(Protocol):
    """A method that works by watching the calls of submodules."""

    def intercept(
        self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """What a submodule's call gives, see `nn.intercept_methods`."""

    def layouts(self, layouts: Mapping[str, Rules]) -> Mapping[str, Rules]:
        """As every method's, see `Method.layouts`."""


class Intercepted(nn.Module):
    """A module under whose calls methods listen; its variables keep their paths.

    Attributes:
      inner: the module.
      methods: whose `intercept` sees every call of every submodule, the last one first.
    """

    inner: nn.Module
    methods: tuple[Intercepting, ...]

    def setup(self) -> None:
        """The inner module's scope is this one's."""
        nn.share_scope(self, self.inner)

    def example_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the inner module."""
        return self.inner.example_inputs(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's call."""
        with self._listening():
            return self.inner(*args, **kwargs)

    def features(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's `features`."""
        with self._listening():
            return self.inner.features(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's `step`."""
        with self._listening():
            return self.inner.step(*args, **kwargs)

    def _listening(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(nn.intercept_methods(_listen))
        for method in reversed(self.methods):  # Flax asks the one first that was entered first
            stack.enter_context(nn.intercept_methods(method.intercept))
        return stack

    def init_state(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's `init_state`."""
        return self.inner.init_state(*args, **kwargs)


_OUTERMOST: contextvars.ContextVar[tuple[Interceptor, ...]] = contextvars.ContextVar(
    "outermost", default=()
)


@contextlib.contextmanager
def outermost(listen: Interceptor) -> Iterator[None]:
    """Inside, `listen` is asked before all methods, so that it sees what they make of a call.

    It is for a method that runs a module while it watches the module's children.
    """
    token = _OUTERMOST.set((*_OUTERMOST.get(), listen))
    try:
        yield
    finally:
        _OUTERMOST.reset(token)


def _listen(
    call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    for listen in _OUTERMOST.get():
        call = _bound(listen, call, context)
    return call(*args, **kwargs)


def _bound(listen: Interceptor, call: Callable, context: Any) -> Callable:
    return lambda *args, **kwargs: listen(call, args, kwargs, context)


def intercepted(module: nn.Module, method: Intercepting) -> nn.Module:
    """The module with one more method that listens."""
    if isinstance(module, Intercepted):
        return Intercepted(module.inner, (*module.methods, method))
    return Intercepted(module, (method,))


def unwrap(module: nn.Module, method: Any) -> nn.Module:
    """What `method` has wrapped.

    Raises:
      ValueError: if `module` is not wrapped by this method.
    """
    if isinstance(module, Intercepted) and module.methods[-1] == method:
        rest = module.methods[:-1]
        return Intercepted(module.inner, rest) if rest else module.inner
    raise ValueError(
        f"{type(module).__name__} is not wrapped by {type(method).__name__}; methods are taken "
        "away in the reverse of the order in which they were put on."
    )


def refuse_lost(layer: nn.Module, collection: str, name: str) -> None:
    """Refuse a layer whose state is gone when it is called again.

    Raises:
      ValueError: if it has no variable of this name and can make none.
    """
    if not layer.has_variable(collection, name) and not layer.is_mutable_collection(collection):
        raise ValueError(
            f"{'/'.join(layer.path)} runs in a scan or loop that carries no {collection!r}; leave "
            "it out of the method's targets."
        )


def wrap_all(module: nn.Module, methods: Sequence[Method]) -> nn.Module:
    """The module in all methods, from left to right."""
    for method in methods:
        module = method.wrap(module)
    return module


def adapt_all(
    module: nn.Module,
    variables: Variables,
    methods: Sequence[Method],
    rng: PRNGKeyArray,
    batches: Sequence[Mapping[str, Array]] | None = None,
) -> dict[str, Any]:
    """The variables of `wrap_all(module, methods)` from those of `module`."""
    for i, method in enumerate(methods):
        variables = method.adapt(module, variables, jax.random.fold_in(rng, i), batches)
        module = method.wrap(module)
    return dict(variables)


def trains(methods: Sequence[Method], path: str) -> bool | str | None:
    """What several methods together say of a leaf: one that trains it wins."""
    said = [answer for method in methods if (answer := method.trains(path)) is not None]
    return next((answer for answer in said if answer is not False), said[0] if said else None)


def add_leaves(module: nn.Module, variables: Variables, rng: PRNGKeyArray) -> dict[str, Any]:
    """A module's variables: those given, and fresh ones where none are given.

    Fresh ones may depend on those given, as a spectral norm does on its matrix.
    """
    given = flatten_dict(dict(variables))

    def fresh(variables: Variables, rng: PRNGKeyArray) -> dict[str, Any]:
        inputs = zeros_like_inputs(module)
        added = DenyList("intermediates")
        _, made = module.apply(variables, **inputs, rngs={"params": rng}, mutable=added)
        return {path: leaf for path, leaf in flatten_dict(made).items() if path not in given}

    return unflatten_dict({**given, **jax.jit(fresh)(variables, rng)})
