import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    apply,
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    gradient,
    random_images,
)

import zoo
from zoo.models.vision import gmm_hosts, gmm_vit
from zoo.models.vision.gmm_vit import MaskedAttention, gaussian_mixture, grid_distances

HOSTS = {
    "gmm_swin": {"embed_dim": 12, "depths": (2,), "num_heads": (2,)},
    "gmm_dinat": {
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 4),
        "dilations": ((2,), (1,)),
        "window_size": 3,
    },
    "gmm_cait": {
        "embed_dim": 12,
        "depth": 1,
        "class_depth": 1,
        "num_heads": 2,
        "head_dim": 5,
        "hidden": 16,
    },
}


def test_shapes_are_those_of_the_docstrings():
    name, table = documented_shapes(gmm_vit.__doc__)
    blocks = {f"block{i}": table["block0"] for i in range(9)}
    assert feature_shapes(zoo.create(name)) == table | blocks
    name, table = documented_shapes(gmm_hosts.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# ----------------------------------------------------------------------------------- masks


def numbers(*shape, key=0):
    return np.random.default_rng(key).normal(size=shape).astype(np.float32)


def test_masks_are_symmetric_and_a_kernel_of_the_offset():
    """Against a lookup in the 15 x 15 kernel of all offsets of a grid of 8 x 8."""
    sigma, alpha = 1 + jnp.abs(numbers(5, 3)), numbers(5, 3, key=1)
    mask = np.asarray(gaussian_mixture(sigma, alpha, grid_distances((8, 8))))
    np.testing.assert_array_equal(mask, mask.swapaxes(1, 2))
    dy, dx = np.mgrid[-7:8, -7:8]
    width = 2 * (np.asarray(sigma, np.float64) ** 2 + 1e-5)[..., None, None]
    kernel = (np.asarray(alpha)[..., None, None] * np.exp(-(dy**2 + dx**2) / width)).sum(0)
    y, x = np.divmod(np.arange(64), 8)
    wanted = kernel[:, y[:, None] - y + 7, x[:, None] - x + 7]
    assert_trees_close(mask, wanted, 1e-5)


def attention_outputs(mask, change=lambda params: params, heads=2):
    """Of a small layer on a grid of 3 x 4, and its parameters."""
    layer = MaskedAttention(heads, 6, mask, kernels=3)
    x, distances = numbers(2, 12, 8), grid_distances((3, 4))
    params = MaskedAttention(heads, 6, None).init(jax.random.key(0), x, distances)["params"]
    if mask is not None:
        own = jax.jit(lambda key: layer.init(key, x, distances))(jax.random.key(0))["params"]
        params = {**params, "mask": own["mask"]}
    params = change(params)
    return jax.jit(lambda p: layer.apply({"params": p}, x, distances))(params), params


def test_wide_gaussians_that_sum_to_one_change_nothing():
    plain, _ = attention_outputs(None)
    masked, _ = attention_outputs("gaussian")
    assert np.abs(masked - plain).max() > 1e-3

    def wide(params):
        alpha = jnp.array([[0.5, 2.0], [0.75, -2.0], [-0.25, 1.0]])
        return params | {"mask": {"sigma": jnp.full((3, 2), 1e4), "alpha": alpha}}

    assert_trees_close(attention_outputs("gaussian", wide)[0], plain, 1e-5)


def test_a_faded_key_has_the_logit_zero_and_is_not_hidden():
    """Narrow Gaussians leave a patch its own score alone, among zeros for all others."""

    def narrow(params):
        return params | {"mask": {"sigma": jnp.full((3, 2), 0.1), "alpha": jnp.full((3, 2), 1 / 3)}}

    got, params = attention_outputs("gaussian", narrow)
    q, k, v = jnp.split(numbers(2, 12, 8) @ params["qkv"]["kernel"], 3, -1)
    q, k, v = (t.reshape(2, 12, 2, 6) for t in (q, k, v))
    own = jnp.exp((q * k).sum(-1) / 6**0.5)[..., None]
    y = (v.sum(1, keepdims=True) + (own - 1) * v) / (11 + own)
    wanted = y.reshape(2, 12, 12) @ params["out"]["kernel"] + params["out"]["bias"]
    assert_trees_close(got, wanted, 1e-5)


def test_elementwise_masks_start_at_uniform_attention():
    got, params = attention_outputs("elementwise")
    value = (numbers(2, 12, 8) @ params["qkv"]["kernel"])[..., 24:].mean(1, keepdims=True)
    wanted = value @ params["out"]["kernel"] + params["out"]["bias"]
    assert_trees_close(got, jnp.broadcast_to(wanted, got.shape), 1e-5)


def test_masks_cost_two_numbers_for_each_gaussian_and_head():
    shapes = lambda mask: jax.eval_shape(  # noqa: E731
        zoo.create("gmm_vit", mask=mask).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )["params"]
    count = lambda tree: sum(p.size for p in jax.tree.leaves(tree))  # noqa: E731
    plain = count(shapes(None)) - 2 * 192  # without its class token and that one's position
    assert count(shapes("gaussian")) - plain == 9 * 2 * 5 * 12
    assert count(shapes("elementwise")) - plain == 9 * 64 * 64


def test_far_patches_of_large_grids_underflow_only_as_the_authors_do():
    distances = grid_distances((16, 16))
    variables = {"params": {"sigma": jnp.full((1, 1), 10.0), "alpha": jnp.ones((1, 1))}}
    masks = [gmm_vit.GaussianMask(1, u).apply(variables, distances, 1)[0] for u in (False, True)]
    assert_trees_close(masks[0], np.exp(-distances / 200), 1e-5)
    np.testing.assert_array_equal(masks[1], np.where(distances < 104, masks[0], 0))
    assert (distances >= 104).any() and not (grid_distances((8, 8)) >= 104).any()


# ----------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_use_their_masks_and_export_the_authors_names(name):
    model = zoo.create(name, **HOSTS[name], kernels=2, image_size=16, drop_path=0.0)
    variables = filled(model)
    images = random_images(model)
    grads = jax.tree.leaves_with_path(gradient(model, variables, images)["params"])
    masks = [g for path, g in grads if "sigma" in str(path) or "alpha" in str(path)]
    assert masks and all(0 < np.abs(g).max() < np.inf for _, g in grads)
    state = zoo.export(model, variables)
    tables = [v for k, v in state.items() if k.endswith("mask.mask") or k == "mask"]
    assert len(tables) == len(masks) // 2 + 1
    side = 4
    wanted = np.exp(-grid_distances((side, side)) / 2.0)
    for table in tables if name != "gmm_dinat" else ():
        np.testing.assert_allclose(table[0, 0], wanted, rtol=1e-6)


def test_windows_add_the_bias_behind_the_mask():
    """A shifted window of the whole map, against dense attention from the definition."""
    attention = lambda **more: MaskedAttention(2, 4, kernels=3, qkv_bias=True, **more)  # noqa: E731
    layer = gmm_hosts.ShiftedWindows(attention, 4, shifted=True)
    x = numbers(1, 8, 8, 8)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * numbers(*p.shape, key=2), params)
    got = apply(layer, {"params": params}, x)

    part = params["attention"]
    y, c = np.divmod(np.arange(64), 8)
    rolled = [(t - 2) % 8 for t in (y, c)]  # where the roll puts each position
    same = np.ones((64, 64), bool)
    for r in rolled:  # one window, and no neighbours that the roll has made
        region = np.where(r >= 6, 2, np.where(r >= 4, 1, 0))
        same &= (r[:, None] // 4 == r // 4) & (region[:, None] == region)
    offsets = [r[:, None] - r + 3 for r in rolled]
    index = np.where(same, offsets[0] * 7 + offsets[1], 0)
    bias = np.moveaxis(np.asarray(params["relative_position_bias"])[index], -1, 0)
    distances = sum((o - 3) ** 2 for o in offsets)
    part, x = jax.tree.map(np.asarray, part), np.asarray(x)
    mask = gaussian_mixture(part["mask"]["sigma"], part["mask"]["alpha"], distances)
    qkv = x.reshape(64, 8) @ part["qkv"]["kernel"] + part["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(64, 3, 2, 4), 1, 0)
    scores = np.asarray(mask) * np.einsum("qnd,knd->nqk", q, k) / 2 + bias
    weights = np.asarray(jax.nn.softmax(np.where(same, scores, -1e9), -1))
    wanted = np.einsum("nqk,knd->qnd", weights, v).reshape(64, 8)
    wanted = wanted @ part["out"]["kernel"] + part["out"]["bias"]
    assert_trees_close(got.reshape(64, 8), wanted, 1e-4)


def test_without_gaussians_neighbourhoods_are_those_of_the_kernel():
    """With alpha summing to one and wide Gaussians, `NeighborhoodAttention` of DiNAT."""
    from zoo.models.vision.dinat import NeighborhoodAttention

    x = numbers(2, 7, 5, 8)  # padded to 7 x 6
    plain = NeighborhoodAttention(2, 3, 2)
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * numbers(*p.shape, key=2), params)
    attention = lambda **more: MaskedAttention(2, 4, kernels=1, qkv_bias=True, **more)  # noqa: E731
    masked = gmm_hosts.Neighborhoods(attention, 3, 2)
    inner = {name: params[name] for name in ("qkv", "out")}
    inner["mask"] = {"sigma": jnp.full((1, 2), 1e4), "alpha": jnp.ones((1, 2))}
    table = params["relative_position_bias"]
    got = apply(masked, {"params": {"attention": inner, "relative_position_bias": table}}, x)
    assert_trees_close(got, apply(plain, {"params": params}, x), 1e-5)


def test_the_class_token_of_cait_reads_patches_that_it_does_not_change():
    model = zoo.create("gmm_cait", **HOSTS["gmm_cait"], drop_path=0.0)
    out = apply(model, filled(model), random_images(model), method="features")
    assert out["class_block0"].shape == (2, 1, 12) and out["block0"].shape == (2, 8, 8, 12)


def test_sizes_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, 32, 32, 3\), not \(1, 24, 24, 3\)"):
        zoo.create("gmm_vit_test").init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    with pytest.raises(ValueError, match="mask='gauss' is none of 'gaussian', 'elementwise'"):
        zoo.create("gmm_vit_test", mask="gauss").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    model = zoo.create("gmm_hosts_test", image_size=(24, 40), window_size=4)
    with pytest.raises(ValueError, match="map of 6x10 tokens cannot be cut into 4x4 windows"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 40, 3)))


def test_oblong_images_work():
    model = zoo.create("gmm_vit_test", image_size=(24, 40))
    assert np.isfinite(apply(model, filled(model), random_images(model))).all()
