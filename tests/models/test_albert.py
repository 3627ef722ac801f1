import jax
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.models.language import albert


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(albert.__doc__)
    found = feature_shapes(zoo.create(name))
    assert {name: found[name] for name in table} == table


def test_layers_of_a_group_share_their_weights():
    model = zoo.create("albert_test", depth=4, groups=2)
    variables = filled(model)
    assert {n for n in variables["params"] if n.startswith("layers")} == {"layers_0", "layers_1"}
    with pytest.raises(ValueError, match="groups=3 of a depth of 4: choose a divisor"):
        zoo.create("albert_test", depth=4, groups=3).init(
            jax.random.key(0), np.zeros((1, 3), np.int32)
        )


def test_a_set_of_weights_may_hold_layers_of_its_own():
    model = zoo.create("albert_test", depth=2, inner_layers=2)
    variables = filled(model)
    assert {n for n in variables["params"] if n.startswith("layers")} == {
        "layers_0",
        "layers_0_inner_1",
    }
    state = zoo.export(model, variables)
    place = "encoder.albert_layer_groups.0.albert_layers"
    assert f"{place}.0.ffn.weight" in state and f"{place}.1.ffn.weight" in state
