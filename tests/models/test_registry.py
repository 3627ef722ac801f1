"""What every registered model keeps: a system is covered by being registered.

Over all variants: the published number of parameters, and rules that place every parameter on a
mesh. Over the small `<system>_test` variants: what needs running.
"""

import fnmatch
import functools
import importlib
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType
from model_helpers import assert_trees_close, filled, representatives, sin_loss

import zoo
from zoo.layers.model import Model
from zoo.registry import SYSTEMS, system
from zoo.training.partition import place
from zoo.training.tree import path_of

NAMES = zoo.list_models()
SMALL = zoo.list_models("*_test")
PARTS = 6  # of the models, each in a process with eight devices
MATRIX = re.compile(r"(^|/)(qkv|query|key|value|out|up|gate|down)/kernel$")
OUTPUTS = ("logits", "forecast", "image", "prediction")
KINDS = ("bert_test", "dlinear_test", "fmvit_test", "gla_test", "informer_test", "swin_test",
         "vit_test")  # fmt: skip
"""Of each kind one: what compiles a program more is run of these, of all with `-m variants`."""
DRAWN = ("ebt_test", "spiking_test", "sret_test", "urpe_test")
"""Their parameters are drawn: tensors of their files are tied, or need numbers of their own kind.
Those of the others are made without a compiled program."""
LARGE = ("ebt_test", "sret_test", "swin_vsa_test", "vitaev2_vsa_test")
"""Their programs take ten seconds to compile."""
SOME_SMALL = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.variants) for name in SMALL
]


def example(model, batch=4, key=0):
    """Arguments of the model by name: normal numbers, or integers that are 0 and 1."""
    arguments = {}
    for i, (name, spec) in enumerate(model.example_inputs(batch).items()):
        rng = jax.random.fold_in(jax.random.key(key), i)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            arguments[name] = jax.random.randint(rng, spec.shape, 0, 2, spec.dtype)
        else:
            arguments[name] = jax.random.normal(rng, spec.shape, spec.dtype)
    return arguments


@functools.cache
def initialised(name):
    """A small model with its parameters, small ones larger than at first so that outputs differ."""
    model = zoo.create(name)
    variables = jax.jit(model.init)(jax.random.key(0), **example(model, 1))

    def grow(path, p):
        if p.ndim == 2 and not np.any(p):  # no gradient passes LoRA's second matrix at first
            return 0.1 * jax.random.normal(jax.random.key(1), p.shape, p.dtype)
        if re.search(r"fire\w*/norm/scale", jax.tree_util.keystr(path, simple=True, separator="/")):
            return p * 5  # neurons fire
        return p * 4 if p.ndim > 1 and jnp.std(p) < 0.1 else p

    return model, jax.tree_util.tree_map_with_path(grow, variables)


def parameter_shapes(name):
    overrides = {"drop_path": 0.0} if "drop_path" in zoo.info(name).fields else {}
    return shapes_of(zoo.create(name, **overrides))


@functools.cache
def shapes_of(model):
    """Many variants differ in their weights only."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **example(model, 1)))["params"]


# --------------------------------------------------------------------------- all variants


@pytest.mark.parametrize("path", SYSTEMS)
def test_names_match_the_patterns_of_their_file_and_one_is_for_tests(path):
    variants = importlib.import_module(path).SYSTEM.variants
    for name in variants:
        assert issubclass(variants[name].module, Model), name
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in SYSTEMS[path]), name
        others = [p for p in SYSTEMS if p != path]
        assert not any(fnmatch.fnmatchcase(name, g) for p in others for g in SYSTEMS[p]), name
    assert sum(name.endswith("_test") for name in variants) == 1


@pytest.mark.parametrize("name", representatives(NAMES))
def test_parameters_are_as_many_as_published_and_matrices_cut_over_the_tensor_axis(name):
    shapes = parameter_shapes(name)
    published = zoo.info(name).params
    assert published in (None, 0, sum(p.size for p in jax.tree.leaves(shapes)))
    extra = system(name).partition
    placed = place(shapes, {"data": 2, "fsdp": 2, "tensor": 2}, extra)
    assert len(placed) == len(jax.tree.leaves(shapes))
    cut = {p.path for p in placed if "tensor" in p.spec}
    own = [re.compile(pattern) for pattern in extra]  # a file may keep a matrix whole
    free = [p.path for p in placed if not any(o.fullmatch(p.path) for o in own)]
    matrices = {path for path in free if MATRIX.search(path)}
    assert matrices <= cut
    assert cut or not any("norm" in p.path for p in placed)  # LTSF-Linear has no block


# ------------------------------------------------------------------------ small variants


@functools.cache
def features_of(name):
    """The compiled `features`: variables, inputs -> pytree."""
    model = zoo.create(name)
    return jax.jit(lambda variables, inputs: model.apply(variables, **inputs, method="features"))


def output_in(features):
    """What a plain call gives, of the features that hold it."""
    (held,) = (features[key] for key in OUTPUTS if key in features)
    return held


def features_and_gradients(model):
    """One compiled program: variables, inputs -> a call's outputs, features, gradients."""

    @jax.jit
    def run(variables, inputs):
        def loss(variables):
            output = model.apply(variables, **inputs)
            features = model.apply(variables, **inputs, method="features")
            return sin_loss(output), (output, features)

        grads, (output, features) = jax.grad(loss, has_aux=True)(variables)
        return output, features, grads["params"]

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in SMALL]
)
def test_outputs_are_finite_of_one_example_each_and_need_every_parameter(name):
    """One program a model: what it says is checked from several sides."""
    model = zoo.create(name)
    variables, inputs = initialised(name)[1] if name in DRAWN else filled(model), example(model)
    run = features_and_gradients(model)
    output, features, grads = run(variables, inputs)

    for leaf in jax.tree.leaves(features):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    assert_trees_close(output, output_in(features), 1e-5)

    # examples of a batch do not see each other
    order = np.array([2, 0, 3, 1])
    permuted = run(variables, {k: x[order] for k, x in inputs.items()})[0]
    assert_trees_close(permuted, jax.tree.map(lambda x: x[order], output), 1e-5)
    changed = run(variables, {k: x.at[0].set(x[1]) for k, x in inputs.items()})[0]
    np.testing.assert_array_equal(changed[2:], output[2:])
    assert np.abs(changed[0] - output[0]).max() > 0

    for path, g in jax.tree.leaves_with_path(grads):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), where
        only_in_features = "pooler" in where  # without a head, BERT's logits are hidden states
        # PiT reads the class token alone, and masks what patches get of each other
        only_in_features |= "stages_1_layers_0']['attention']['mask" in where
        frozen = system(name).is_frozen(path_of(path))
        assert only_in_features or (np.abs(g).max() > 0) != frozen, where


@pytest.mark.parametrize("name", SOME_SMALL)
def test_training_is_a_function_of_its_key(name):
    model, variables = initialised(name)
    dropout = hasattr(model, "dropout")
    model = model.clone(dropout=0.2) if dropout else model
    inputs = example(model)
    collections = [collection for collection in variables if collection != "params"]

    @jax.jit
    def run(variables, key):
        rngs = {"dropout": key}
        return model.apply(variables, **inputs, train=True, rngs=rngs, mutable=collections)

    keys = jax.random.split(jax.random.key(0))
    first, again, other = (run(variables, k)[0] for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - other).max() > 0) == dropout


@pytest.mark.parametrize("name", SOME_SMALL)
def test_bfloat16_is_near_float32(name):
    model, variables = initialised(name)
    inputs = example(model)
    exact = output_in(features_of(name)(variables, inputs))
    half = model.clone(dtype=jnp.bfloat16)
    rough = jax.jit(lambda v, x: half.apply(v, **x))(variables, inputs)
    for leaf, wanted in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert leaf.dtype == jnp.bfloat16
        deviation = np.asarray(leaf, np.float32) - wanted
        assert np.linalg.norm(deviation) <= 4e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in KINDS else pytest.mark.variants)
     for n in SMALL],
)  # fmt: skip
def test_an_exported_program_gives_the_same_outputs(name):
    model, variables = initialised(name)
    inputs = example(model)
    data = jax.export.export(features_of(name))(variables, inputs).serialize()
    got = jax.export.deserialize(data).call(variables, inputs)
    assert_trees_close(got, features_of(name)(variables, inputs), 1e-5)


def in_nnx(model, inputs):
    """The model through Flax's bridge, initialised."""
    return bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(**inputs)


@pytest.mark.parametrize("name", SOME_SMALL)
def test_nnx_can_hold_it(name):
    """The same parameters, and a gradient for each."""
    model = zoo.create(name)
    inputs = example(model, 1)
    wrapped = nnx.eval_shape(lambda: in_nnx(model, inputs))
    shapes = jax.tree.map(jnp.shape, parameter_shapes(name))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))) == shapes
    grads = nnx.eval_shape(nnx.grad(lambda wrapped: sin_loss(wrapped(**inputs))), wrapped)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(grads)) == shapes


@pytest.mark.parametrize("name", ["bert_test", "fmvit_test", "gla_test", "informer_test"])
def test_nnx_gives_the_same_outputs(name):
    """Of models with and without state, dropout and layers that are scanned."""
    model, variables = initialised(name)
    inputs = example(model)
    wrapped = nnx.jit(lambda: in_nnx(model, inputs))()
    state = nnx.state(wrapped, nnx.Param)
    nnx.replace_by_pure_dict(state, variables["params"])
    nnx.update(wrapped, state)
    output = nnx.jit(lambda wrapped: wrapped(**inputs))(wrapped)
    assert_trees_close(output, output_in(features_of(name)(variables, inputs)), 1e-5)


@pytest.mark.parametrize(
    "names",
    [pytest.param(KINDS, marks=pytest.mark.slow, id="kinds"),
     *(pytest.param(SMALL[i::PARTS], marks=pytest.mark.variants, id=f"{i}")
       for i in range(PARTS))],
)  # fmt: skip
def test_eight_devices_give_what_one_gives(names):
    """Small models, their parameters placed on a fake mesh of 2 x 2 x 2, in fresh processes."""
    flags = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
    done = subprocess.run(
        [sys.executable, __file__, *names],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
             "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(names)


def compare_on_eight_devices(names):
    """Features of small models with and without the mesh; prints the names."""
    from zoo.training.config import Partition
    from zoo.training.partition import BATCH, shardings

    mesh = jax.make_mesh(
        (2, 2, 2, 1), ("data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 4
    )
    for name in names:
        model, variables = initialised(name)
        inputs = example(model)
        expected = jax.device_get(features_of(name)(variables, inputs))
        extra = system(name).partition
        with jax.set_mesh(mesh):
            specs = shardings(variables["params"], mesh, Partition(), extra)
            params = jax.device_put(variables["params"], specs)
            inputs = jax.device_put(inputs, jax.NamedSharding(mesh, BATCH))
            jax.clear_caches()  # constraints depend on the mesh in context
            placed = {**variables, "params": params}
            lowered = features_of(name).lower(placed, inputs)
            assert "sharding_constraint" in lowered.as_text()
            got = jax.device_get(lowered.compile()(placed, inputs))
        kernels = [p for p in jax.tree.leaves(params) if p.ndim > 1]
        assert any(not k.sharding.is_fully_replicated for k in kernels)
        assert_trees_close(got, expected, 1e-5)
        print(name)


if __name__ == "__main__":
    compare_on_eight_devices(sys.argv[1:])
