"""Unified norms and SlimFit on whole models, in the trainer's own step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from methods.test_prune import made, run
from model_helpers import assert_trees_close

from zoo.data import Data
from zoo.data.sources import Digits
from zoo.data.transforms import Normalize
from zoo.methods import FixedNorms, SlimFit, UnifiedNorms
from zoo.methods.norms import STATISTICS
from zoo.methods.slimfit import frozen_paths, layers_of
from zoo.methods.unified_norm import UnifiedNorm
from zoo.tasks import Classification, Phase
from zoo.training import Model, Optimizer, TrainConfig
from zoo.training.program import make_program

VIT = {"image_size": (8, 8), "patch_size": 4, "in_channels": 1, "depth": 1, "embed_dim": 24}


@dataclasses.dataclass(frozen=True)
class WithStatistics(Classification):
    phases = (Phase("train", ("train", STATISTICS)),)


def config(methods, task=None, optimizer=None):
    scale = (Normalize((0.5,), (0.5,)),)
    return TrainConfig(
        model=Model("vit_test", {**VIT, "num_classes": 10}),
        task=task or Classification(),
        methods=methods,
        data=Data(Digits("train"), Digits("test"), scale, scale, batch_size=8),
        optimizer=optimizer or Optimizer(learning_rate=1e-3, schedule="constant"),
    )


def batch_of(program):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((8, 8, 8, 1)).astype("f")
    return program.place({"images": images, "labels": np.arange(8), "valid": np.ones(8, bool)})


@pytest.mark.slow
def test_a_training_step_moves_both_states_as_a_step_of_the_norm_does():
    method = UnifiedNorms(UnifiedNorm(window=2, warmup=1))
    program = make_program(
        config((method,), WithStatistics(), method.optimizers(Optimizer(learning_rate=0.0)))
    )
    state = program.init(0)
    seen = []
    with program.context():
        for _ in range(3):
            state, output = program.step(state, batch_of(program))
            assert output.bad < 0
            seen.append(jax.device_get((state.params, state.collections)))
    at = lambda one: one["layers_0"]["norm1"]  # noqa: E731
    # step 1 writes row 1, step 2 row 0; parameters do not move
    windows = [at(params)["un_backward_window"] for params, _ in seen]
    emas = [at(params)["un_backward_ema"] for params, _ in seen]
    limit = 1e-5 * np.abs(windows[1]).max()
    assert limit > 0 and not windows[0][0].any()
    np.testing.assert_allclose(windows[1][1], windows[0][1], atol=limit)
    np.testing.assert_allclose(emas[0], 0.1 * windows[0][1], atol=limit)
    np.testing.assert_allclose(emas[1], 0.9 * emas[0] + 0.1 * windows[1][0], atol=limit)
    assert int(at(seen[2][1]["batch_stats"])["un_steps"]) == 3


def test_the_fixed_form_is_the_same_without_root_and_most_norms():
    model, inputs, variables = made("vit_test")
    method = UnifiedNorms()
    adapted = method.adapt(model, variables, jax.random.key(0))
    adapted["batch_stats"] = jax.tree.map(
        lambda x: x + jnp.linspace(0, 1, x.size).reshape(x.shape) if x.ndim == 1 else x,
        adapted["batch_stats"],
    )
    wrapped = method.wrap(model)
    fixed, variables = FixedNorms.of(method, wrapped, adapted)
    assert_trees_close(run(fixed, variables, inputs), run(wrapped, adapted, inputs), 1e-5)
    left = [p for p in flatten_dict(variables["params"], sep="/") if re.search("norm.*/scale", p)]
    assert left == ["norm/scale"]  # its reader is the head, behind a choice of tokens
    text = str(jax.make_jaxpr(lambda v: fixed.apply(v, **inputs))(variables))
    assert "sqrt" not in text


def test_forward_passes_are_exact_and_less_is_kept():
    model, inputs, variables = made("vit_test")
    layers = layers_of(variables)
    distances = {path: jnp.asarray(float(i)) for i, path in enumerate(layers)}
    method = SlimFit(frozen_paths(distances, 0.9))
    assert len(method.frozen) == int(0.9 * len(layers))
    wrapped = method.wrap(model)
    assert_trees_close(run(wrapped, variables, inputs), run(model, variables, inputs), 1e-6)

    flat = flatten_dict(variables["params"], sep="/")

    def kept(module, frozen):
        trained = {p: x for p, x in flat.items() if p not in frozen}
        rest = {p: x for p, x in flat.items() if p in frozen}

        def loss(trained):
            from flax.traverse_util import unflatten_dict

            params = unflatten_dict({**trained, **rest}, sep="/")
            return jnp.sum(module.apply({"params": params}, **inputs) ** 2)

        shapes = jax.eval_shape(lambda t: jax.vjp(loss, t)[1], trained)
        own = {(x.shape, x.dtype) for x in flat.values()}
        return sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(shapes)
            if (x.shape, x.dtype) not in own
        )

    assert kept(wrapped, method.frozen) < 0.5 * kept(model, ())


@pytest.mark.slow
def test_frozen_layers_stay_and_all_else_moves():
    frozen = ("layers_0/mlp/up/kernel", "layers_0/norm1/scale", "patch_embed/kernel")
    method = SlimFit(frozen)
    program = make_program(config((method,)))
    frozen = [p for p in frozen if p in program.assigned]
    assert len(frozen) >= 2
    state = program.init(0)
    before = jax.device_get(flatten_dict(state.variables()["params"], sep="/"))
    with program.context():
        state, _ = program.step(state, batch_of(program))
    after = jax.device_get(flatten_dict(state.variables()["params"], sep="/"))
    for path in after:
        same = np.array_equal(before[path], after[path])
        assert same == (path in frozen), path
