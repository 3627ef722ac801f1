"""Meshes and parameter placement, checked on shapes alone."""

import re

import jax
import jax.numpy as jnp
import pytest
from training import tiny

from zoo.errors import PartitionError
from zoo.training import Partition
from zoo.training.partition import check_batch, match, mesh_sizes, place

SHAPES = {
    "layers_0": {
        "attention": {"qkv": {"kernel": (96, 288), "bias": (288,)}, "out": {"kernel": (96, 96)}},
        "mlp": {"up": {"kernel": (96, 384)}, "down": {"kernel": (384, 96)}},
        "norm1": {"scale": (96,)},
    },
    "embed": {"embedding": (1001, 96)},
    "head": {"kernel": (96, 10), "bias": (10,)},
}


def tree(shapes):
    leaf = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=leaf)


def specs(**sizes):
    return {p.path: tuple(p.spec) for p in place(tree(SHAPES), sizes, fsdp_min_size=64)}


def test_heads_and_mlp_go_to_tensor_and_the_largest_other_dim_to_fsdp():
    found = specs(fsdp=4, tensor=2)
    assert found["layers_0/attention/qkv/kernel"] == ("fsdp", "tensor")
    assert found["layers_0/attention/qkv/bias"] == ("tensor",)
    assert found["layers_0/attention/out/kernel"] == ("tensor", "fsdp")
    assert found["layers_0/mlp/up/kernel"] == ("fsdp", "tensor")
    assert found["layers_0/mlp/down/kernel"] == ("tensor", "fsdp")
    assert found["head/kernel"] == ("fsdp",)
    assert found["head/bias"] == ()


def test_a_vocabulary_that_tensor_does_not_divide_stays_whole():
    assert specs(fsdp=4, tensor=2)["embed/embedding"] == (None, "fsdp")


def test_stacked_layers_are_cut_as_single_ones():
    stacked = tree({"layers": {"mlp": {"up": {"kernel": (12, 96, 384)}}}})
    (found,) = place(stacked, {"fsdp": 4, "tensor": 2})
    assert tuple(found.spec) == (None, "fsdp", "tensor")


def test_an_indivisible_parameter_is_named_with_a_mesh_that_fits():
    with pytest.raises(PartitionError) as error:
        place(tree(SHAPES), {"data": 1, "fsdp": 1, "tensor": 10, "sequence": 1})
    said = str(error.value)
    assert re.search(r"layers_0/\w+/\w+/kernel has shape \(\d+, \d+\): tensor=10", said)
    assert "partition data=5 tensor=2 fits" in said
    place(tree(SHAPES), {"data": 5, "tensor": 2})


def test_a_matrix_that_fsdp_cannot_cut_is_named_with_a_mesh_that_fits():
    with pytest.raises(PartitionError, match=r"fsdp=7 .*partition data=7 fits"):
        place(tree(SHAPES), {"data": 1, "fsdp": 7, "tensor": 1, "sequence": 1})


def test_two_rules_for_one_parameter_are_an_error():
    extra = {r".*up/kernel": (None, "mlp"), r".*mlp/.*": (None, "mlp")}
    with pytest.raises(PartitionError, match="matches 2 partition rules"):
        place(tree(SHAPES), {"tensor": 2}, extra)


def test_a_model_file_overrides_the_shared_rules():
    extra = {r".*head/kernel": (None, "vocab")}
    assert match("head/kernel", (96, 10), extra)[1] == (None, "vocab")
    assert match("layers_0/mlp/up/kernel", (96, 384), extra)[1] == ("channels", "mlp")


def test_mesh_sizes_fill_in_the_rest_and_refuse_what_does_not_fit():
    assert mesh_sizes(Partition(fsdp=2), 8) == (4, 2, 1, 1)
    for wrong in (Partition(fsdp=3), Partition(data=2, fsdp=2), Partition(fsdp=0)):
        with pytest.raises(PartitionError, match="partition"):
            mesh_sizes(wrong, 8)
    with pytest.raises(PartitionError, match="mode sharding"):
        mesh_sizes(Partition(mode="pmap", fsdp=2), 8)


def test_a_batch_that_does_not_divide_is_refused_with_ones_that_do():
    with pytest.raises(PartitionError, match=r"data.batch_size is 20.*take 16 or 24"):
        check_batch(20, {"data": 4, "fsdp": 2})
    check_batch(16, {"data": 4, "fsdp": 2}, accumulate=2)


def test_every_parameter_of_the_tiny_model_has_at_most_one_rule():
    model = tiny.Tiny()
    images = jnp.zeros((1, 4, 4, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    placements = place(params, {"fsdp": 2, "tensor": 2}, fsdp_min_size=1)
    rules = {p.path: p.rule for p in placements}
    assert rules.pop("position_embedding") is None
    assert rules.pop("head/bias") is None
    assert rules.pop("embed/bias") is None
    assert all(rules.values())
