"""LoRA on any model: nothing at first, two thin matrices a target, gone after merging."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_helpers import assert_trees_close

import zoo
from zoo.methods import LoRA, adapt_all, wrap_all
from zoo.methods.lora import adapter, with_adapter
from zoo.tasks.apply import zeros_like_inputs


def random_inputs(model, batch=2):
    inputs = zeros_like_inputs(model, batch)
    return {
        name: jax.random.randint(jax.random.key(0), x.shape, 0, 5)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else jax.random.normal(jax.random.key(0), x.shape)
        for name, x in inputs.items()
    }


def moved(variables):
    """With second matrices that are not zero."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: x + 0.1 if "lora_b" in jax.tree_util.keystr(keys) else x, variables
    )


@pytest.mark.parametrize("name, fields", [("vit_test", {}), ("gpt2_test", {"scan_layers": True})])
def test_it_is_nothing_at_first_and_merges_into_the_matrices(name, fields):
    model, method = zoo.create(name, **fields), LoRA(rank=3, alpha=6.0)
    inputs = random_inputs(model)
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    adapted = method.adapt(model, variables, jax.random.key(1))
    run = jax.jit(lambda m, v: m.apply(v, **inputs), static_argnums=0)
    wrapped = method.wrap(model)
    before = run(model, variables)
    assert_trees_close(run(wrapped, adapted), before, 1e-5)
    other = run(wrapped, moved(adapted))
    assert np.abs(other - before).max() > 1e-3
    plain, merged = method.merge(wrapped, moved(adapted))
    assert plain == model
    assert_trees_close(run(plain, merged), other, 1e-5)
    assert flatten_dict(merged).keys() == flatten_dict(variables).keys()
    zoo.export(plain, merged)  # in the official layout


def test_added_leaves_stand_beside_their_matrix_and_alone_are_trained():
    model, method = zoo.create("vit_test"), LoRA(rank=3, targets=r".*mlp/(up|down)")
    variables = jax.jit(model.init)(jax.random.key(0), **zeros_like_inputs(model))
    adapted = flatten_dict(method.adapt(model, variables, jax.random.key(1))["params"], sep="/")
    added = {path for path in adapted if method.trains(path)}
    assert added == set(adapted) - set(flatten_dict(variables["params"], sep="/"))
    width = adapted["layers_0/mlp/up/kernel"].shape
    assert adapted["layers_0/mlp/up/lora_a"].shape == (width[0], 3)
    assert adapted["layers_0/mlp/up/lora_b"].shape == (3, width[1])


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    assert LoRA(rank=16, alpha=8.0).scale == 0.5
    assert LoRA(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


def test_two_of_them_compose_and_come_off_in_reverse():
    model = zoo.create("vit_test")
    both = LoRA(rank=2, targets=r".*/qkv"), LoRA(rank=4, targets=r".*mlp/up")
    inputs = random_inputs(model)
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    wrapped = wrap_all(model, both)
    adapted = moved(adapt_all(model, variables, both, jax.random.key(1)))
    run = jax.jit(lambda m, v: m.apply(v, **inputs), static_argnums=0)
    wanted = run(wrapped, adapted)
    with pytest.raises(ValueError, match="in the reverse of the order"):
        both[0].merge(wrapped, adapted)
    for method in reversed(both):
        wrapped, adapted = method.merge(wrapped, adapted)
    assert wrapped == model
    assert_trees_close(run(model, adapted), wanted, 1e-5)


def test_targets_that_match_nothing_are_refused():
    model = zoo.create("vit_test")
    variables = jax.jit(model.init)(jax.random.key(0), **zeros_like_inputs(model))
    with pytest.raises(ValueError, match=r"targets 'attn' match no dense map of VisionTransf"):
        LoRA(targets="attn").adapt(model, variables, jax.random.key(0))


def test_an_adapter_goes_through_both_namings_and_into_another_model():
    model, method = zoo.create("vit_test"), LoRA(rank=2, targets=r".*/(qkv|up)")
    variables = jax.jit(model.init)(jax.random.key(0), **zeros_like_inputs(model))
    adapted = moved(method.adapt(model, variables, jax.random.key(1)))
    other = method.adapt(model, variables, jax.random.key(2))
    module = method.wrap(model)
    for naming, name in (
        ("peft", "base_model.model.blocks.0.attn.qkv.lora_A.weight"),
        ("loralib", "blocks.0.attn.qkv.lora_A"),
    ):
        state = adapter(module, adapted, naming)
        assert len(state) == 4 * model.depth
        assert state[name].shape == (2, model.embed_dim)
        loaded = flatten_dict(with_adapter(module, other, state)["params"])
        for path, leaf in flatten_dict(adapted["params"]).items():
            np.testing.assert_array_equal(loaded[path], leaf)
    with pytest.raises(ValueError, match="give its rank and targets"):
        with_adapter(module, other, {"blocks.0.attn.proj.lora_A": np.zeros((2, 3))})


def test_magnitudes_start_at_nothing_and_merge():
    layer = nn.Dense(5)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    variables = layer.init(jax.random.key(1), x)
    method = LoRA(rank=2, targets=".*", magnitude=True)
    module = method.wrap(layer)
    _, made = module.apply(variables, x, rngs={"params": jax.random.key(2)}, mutable="params")
    wanted = layer.apply(variables, x)
    adapted = {"params": made["params"]}
    np.testing.assert_allclose(module.apply(adapted, x), wanted, atol=1e-5)
    adapted = moved(adapted)
    adapted["params"]["dora_magnitude"] = 2 * adapted["params"]["dora_magnitude"]
    plain, merged = method.merge(module, adapted)
    got = module.apply(adapted, x)
    assert np.abs(got - wanted).max() > 0.1
    np.testing.assert_allclose(plain.apply(merged, x), got, atol=1e-5)


def test_a_tied_embedding_and_a_convolution_merge():
    cases = (nn.Embed(7, 4), jnp.arange(5)), (nn.Conv(6, (3, 3)), jnp.ones((1, 5, 5, 2)))
    for layer, x in cases:
        method = LoRA(rank=2, targets=".*")
        module = method.wrap(layer)
        variables = layer.init(jax.random.key(1), x)
        _, made = module.apply(variables, x, rngs={"params": jax.random.key(2)}, mutable="params")
        adapted = {"params": jax.tree.map(lambda leaf: leaf + 0.1, made["params"])}
        plain, merged = method.merge(module, adapted)
        np.testing.assert_allclose(plain.apply(merged, x), module.apply(adapted, x), atol=1e-4)


def test_a_convolution_in_groups_has_loralibs_shapes_and_merges():
    layer, x = nn.Conv(6, (3, 3), feature_group_count=2), jnp.ones((1, 5, 5, 4))
    method = LoRA(rank=2, targets=".*")
    module = method.wrap(layer)
    variables = layer.init(jax.random.key(1), x)
    _, made = module.apply(variables, x, rngs={"params": jax.random.key(2)}, mutable="params")
    assert made["params"]["lora_a"].shape == (4 * 3, 2 * 3)
    assert made["params"]["lora_b"].shape == (2 * 3, 6 // 2 * 3)
    adapted = {"params": jax.tree.map(lambda leaf: leaf + 0.1, made["params"])}
    plain, merged = method.merge(module, adapted)
    np.testing.assert_allclose(plain.apply(merged, x), module.apply(adapted, x), atol=1e-4)


def test_a_head_is_trained_beside_it():
    method = LoRA(also=r"head/.*")
    assert method.trains("head/kernel") and method.trains("a/qkv/lora_b")
    assert not method.trains("a/qkv/kernel")


def test_fields_of_methods_are_flags():
    from zoo.training import command_line, config

    base = config.load_file("configs/default.py")
    command = config.Command(replace(base, methods=(LoRA(rank=2), LoRA(rank=3))))
    args = ["--methods.0.rank", "4", "--methods.1.targets", ".*up"]
    found = command_line._tyro(args, command, "train.py").config.methods
    assert found == (LoRA(rank=4), LoRA(rank=3, targets=".*up"))
