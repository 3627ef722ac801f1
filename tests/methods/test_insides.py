"""Learning from a teacher's insides: a step of the trainer, and what is compared with what."""

import jax
import numpy as np
import pytest
from methods.test_norms_and_slimfit import VIT, batch_of
from methods.test_prune import made

import zoo
from zoo.data import Data
from zoo.data.sources import Digits
from zoo.data.transforms import Normalize
from zoo.methods import Insides
from zoo.tasks import LayerDistillation
from zoo.training import Model, Optimizer, TrainConfig
from zoo.training.program import make_program


def config(task, methods, **student):
    scale = (Normalize((0.5,), (0.5,)),)
    fields = {**VIT, "num_classes": 10}
    return TrainConfig(
        model={
            "student": Model("vit_test", {**fields, **student}),
            "teacher": Model("vit_test", {**fields, "depth": 2}),
        },
        task=task,
        methods=methods,
        data=Data(Digits("train"), Digits("test"), scale, scale, batch_size=8),
        optimizer=Optimizer(learning_rate=1e-2, schedule="constant"),
    )


@pytest.mark.slow
def test_a_narrow_student_learns_from_all_that_is_inside():
    task = LayerDistillation(hidden=1.0, relations=1.0, temperature=2.0)
    student = {"embed_dim": 12, "num_heads": 3}
    program = make_program(config(task, (Insides(width=24),), **student))
    assert program.assigned["student/teacher_map"] == "student"
    assert program.assigned["teacher/head/kernel"] is None
    state, losses = program.init(0), []
    with program.context():
        for _ in range(12):
            state, output = program.step(state, batch_of(program))
            means = jax.device_get(output.means)
            losses.append({k: float(m.total / m.count) for k, m in means.items()})
    assert {"loss", "teacher", "hidden", "relations"} <= set(losses[0])
    assert losses[-1]["hidden"] < 0.9 * losses[0]["hidden"]
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.slow
def test_shapes_that_cannot_be_compared_are_said():
    task = LayerDistillation(hidden=1.0)
    program = make_program(config(task, (Insides(),), embed_dim=12, num_heads=3))
    with program.context(), pytest.raises(ValueError, match="give Insides the teacher's width"):
        program.step(program.init(0), batch_of(program))
    program = make_program(config(task, ()))
    with program.context(), pytest.raises(ValueError, match="needs the method Insides"):
        program.step(program.init(0), batch_of(program))


def test_it_tells_of_each_layer_and_merges():
    model, inputs, variables = made("vit_test")
    method = Insides(width=7)
    adapted = method.adapt(model, variables, jax.random.key(0))
    wrapped = method.wrap(model)
    out = jax.jit(lambda v: wrapped.apply(v, **inputs, method="features"))(adapted)
    assert len(out["hidden"]) == len(out["scores"]) == len(out["values"]) == model.depth
    assert out["hidden"][0].shape[-1] == 7
    length = out["hidden"][0].shape[1]
    assert out["scores"][0].shape == (2, model.num_heads, length, length)
    plain, merged = method.merge(wrapped, adapted)
    assert plain == model and "teacher_map" not in merged["params"]
    np.testing.assert_array_equal(
        jax.tree.leaves(merged["params"])[0], jax.tree.leaves(variables["params"])[0]
    )
    with pytest.raises(ValueError, match="no blocks layers_0"):
        swin = zoo.create("dlinear_test")
        shapes = swin.example_inputs(1)
        zeros = {k: np.zeros(x.shape, x.dtype) for k, x in shapes.items()}
        method.adapt(swin, swin.init(jax.random.key(0), **zeros), jax.random.key(0))
