"""What a model file says of itself: found through any wrapper, complete for every leaf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from model_helpers import representatives

import zoo
from zoo.methods import LoRA
from zoo.system import of
from zoo.training import groups
from zoo.training.tree import path_of


class Subclass(type(zoo.create("vit_test"))):
    """Somebody's own."""


class Holder(nn.Module):
    """A model in a field."""

    model: nn.Module
    scale: float = 2.0

    def __call__(self, x, train=False):
        return self.scale * self.model(x, train)


def wrappers(model):
    cls = type(model)
    fields = {f: getattr(model, f) for f in cls.__dataclass_fields__ if f not in ("parent", "name")}
    return {
        "subclass": Subclass(**fields),
        "remat": nn.remat(cls)(**fields),
        "jit": nn.jit(cls)(**fields),
        "field": Holder(model),
        "twice": Holder(Holder(model)),
        "method": LoRA().wrap(model),
        "methods": LoRA(targets=".*mlp/up").wrap(LoRA().wrap(model)),
    }


@pytest.mark.parametrize("kind", wrappers(zoo.create("vit_test")))
def test_a_wrapped_model_is_of_its_system(kind):
    model = zoo.create("vit_test")
    found = of(wrappers(model)[kind])
    assert found is zoo.registry.system("vit_test") is not None
    assert found.layouts and "vit_test" in found.variants


def test_a_module_that_is_nobodys_has_no_system():
    assert of(nn.Dense(3)) is None
    with pytest.raises(ValueError, match="Dense belongs to no system of the zoo"):
        zoo.registry.system(nn.Dense(3))


@pytest.mark.parametrize("name", representatives(zoo.list_models(), published=False))
def test_every_leaf_has_a_decision_on_decay_and_on_freezing(name):
    """A leaf of several axes is named by a rule; what a system names, it has."""
    model = zoo.create(name)
    inputs = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    leaves = {path_of(keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(params)}
    undecided = [
        path
        for path, shape in leaves.items()
        if groups.decision(path, shape, model) is None
        and not zoo.registry.system(name).is_frozen(path)
    ]
    assert not undecided, "name them in SYSTEM.decay or SYSTEM.no_decay"
    assigned = groups.assign(params, model)
    frozen = {path for path, group in assigned.items() if group is None}
    assert frozen == {p for p in leaves if zoo.registry.system(name).is_frozen(p)}
