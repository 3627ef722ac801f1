"""Names of slices, as clouds, GKE, JAX and libtpu write them."""

import pytest

from zoo.planning import plan
from zoo.planning.chips import NoPlan, find_slice


@pytest.mark.parametrize(
    "name, found",
    [
        ("v5e:4x4", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-16", "v5e:4x4"),
        ("v5litepod:2x8", "v5e:2x8"),
        ("tpu-v5-lite-podslice:4x4", "v5e:4x4"),
        ("TPU v5 lite", "v5e"),
        ("tpu v5e", "v5e"),
        ("v6e-32", "v6e:4x8"),
        ("v6e-4x8", "v6e:4x8"),
        ("v4-8", "v4:2x2x1"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-384", "v5p:4x4x12"),
        ("v5p-896", "v5p:4x4x28"),
        ("v5p-17920", "v5p:16x20x28"),
    ],
)
def test_clouds_names_are_shapes_of_chips(name, found):
    assert find_slice(name) == found


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("v7x:2x2", "names no TPU that plans are made for; these are v4, v5e, v5p, v6e"),
        ("a100-8", "names no TPU"),
        ("", "names no TPU"),
        ("v6e:4x4x4", "its shape is 2 numbers of 1 or more, as in v6e:4x8"),
        ("v5p:4x4", "its shape is 3 numbers"),
        ("v5e:0x4", "its shape is 2 numbers of 1 or more"),
        ("v5e:", "its shape is 2 numbers"),
        ("v5e:²x2", "its shape is 2 numbers"),
        ("v5e:32x32", "has 1,024 chips, and the largest v5e slice 256; --slices"),
        ("v5e-12", "the number is one of chips, and v5e slices have 1, 4, 8, 16"),
        ("v4-9", "the number is one of TensorCores, 2 a chip, and v4 slices have 8, 16"),
        ("v5p-99999999", "There is no slice"),
    ],
)
def test_what_names_no_slice_is_one_sentence(name, sentence):
    with pytest.raises(NoPlan) as error:
        find_slice(name)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_generation_alone_or_no_slices_are_refused_before_anything_is_compiled():
    with pytest.raises(NoPlan, match="v5e is a generation: give a slice of it, such as v5e:4x4"):
        plan.plan(["config.py"], "v5e")
    with pytest.raises(NoPlan, match="slices is 0"):
        plan.plan(["config.py"], "v5e:2x2", slices=0)
