import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, feature_shapes, filled

import kernels_pallas
import zoo
from zoo.layers.window import shifted_window_mask, window_merge, window_partition
from zoo.models.imaging import pt_dit
from zoo.models.imaging.pt_dit import proxy_density, proxy_tokens, score_entries


@pytest.fixture(scope="module")
def small():
    model = zoo.create("pt_dit_test")
    return model, filled(model)


def inputs(model, batch=1, key=0):
    specs = model.example_inputs(batch)
    keys = jax.random.split(jax.random.key(key), len(specs))
    made = {n: jax.random.normal(k, s.shape) for k, (n, s) in zip(keys, specs.items(), strict=True)}
    return made | {"text_mask": jnp.ones(specs["text_mask"].shape, jnp.int32)}


def run(model, variables, given):
    return jax.jit(lambda v, x: model.apply(v, **x))(variables, given)


def without(variables, *names):
    """With zeros for these matrices of every block."""
    layer = variables["params"]["layers_0"]
    cut = {n: jax.tree.map(jnp.zeros_like, layer[n]) for n in names}
    return {"params": variables["params"] | {"layers_0": layer | cut}}


def test_shapes_are_those_of_the_docstring():
    model = zoo.create("PT-DiT_T2I")
    shapes = feature_shapes(model)
    assert shapes["embed"] == shapes["block28"] == (1, 16, 16, 1152)
    assert shapes["prediction"] == (1, 32, 32, 8)


def test_a_proxy_is_the_mean_of_tokens_that_lie_apart():
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 8, 3))
    whole = proxy_tokens(x, (1, 4, 4), (1, 1, 1))
    assert whole.shape == (2, 4, 3)
    np.testing.assert_allclose(whole[0, 1], x[0, 0, :, 4:].mean((0, 1)), rtol=1e-6)
    assert proxy_density((1, 4, 4), (1, 2, 2)) == (1, 2, 2)
    strided = proxy_tokens(x, (1, 4, 4), (1, 2, 2)).reshape(2, 2, 2, 2, 2, 3)
    for row in range(2):
        for column in range(2):
            mean = x[1, 1, row::2, 4 + column : 8 : 2].mean((0, 1))
            np.testing.assert_allclose(strided[1, 1, 1, row, column], mean, rtol=1e-6)


def test_only_proxies_carry_news_out_of_a_window(small):
    """Without them and the shifted windows a patch changes its own window; with them, all."""
    model, variables = small
    given = inputs(model)
    moved = given | {"latents": given["latents"].at[0, 0, 0, 0].add(1.0)}

    def reached(variables):
        first, second = (run(model, variables, g) for g in (given, moved))
        return np.abs(np.asarray(first - second))[0, 0].max(-1) > 0

    alone = reached(without(variables, "inject", "shift_out"))
    wanted = np.zeros((8, 8), bool)
    wanted[:4, :4] = True
    np.testing.assert_array_equal(alone, wanted)
    assert reached(variables).all()


def test_shifted_windows_equal_attention_by_region():
    """The mask, against regions written out; rolling back gives the map again."""
    size, window = (1, 6, 6), (1, 3, 3)
    shift = tuple(w // 2 for w in window)
    x = np.arange(36.0).reshape(1, *size, 1)
    rolled = np.roll(x, [-s for s in shift], (1, 2, 3))
    tokens = np.asarray(window_partition(rolled, window))[..., 0]
    mask = shifted_window_mask(size, window, shift)
    for w, places in enumerate(tokens.astype(int)):
        rows, columns = np.divmod(places, 6)
        far = np.abs(rows[:, None] - rows) > 3
        far |= np.abs(columns[:, None] - columns) > 3
        np.testing.assert_array_equal(mask[w] < 0, far)
    back = np.roll(np.asarray(window_merge(window_partition(rolled, window), size, window)),
                   shift, (1, 2, 3))  # fmt: skip
    np.testing.assert_array_equal(back, x)


def test_padded_text_is_not_seen(small):
    model, variables = small
    given = inputs(model) | {"text_mask": jnp.array([[1, 1, 0]])}
    other = given | {"text": given["text"].at[:, 2].add(3.0)}
    np.testing.assert_array_equal(run(model, variables, given), run(model, variables, other))
    short = {**given, "text": given["text"][:, :2], "text_mask": given["text_mask"][:, :2]}
    assert_trees_close(run(model, variables, given), np.asarray(run(model, variables, short)), 1e-5)


def test_examples_of_a_batch_keep_their_own_times(small):
    """The published code mixes them up where they differ."""
    model, variables = small
    given = inputs(model, 2) | {"times": jnp.array([10.0, 700.0])}
    both = run(model, variables, given)
    for i in range(2):
        alone = run(model, variables, {k: v[i : i + 1] for k, v in given.items()})
        assert_trees_close(both[i : i + 1], np.asarray(alone), 1e-5)


def test_scores_are_counted_as_the_kernels_compute_them(monkeypatch):
    model = zoo.create("pt_dit_test", proxy_window=(1, 1, 1), window=(1, 4, 4))
    asked = []

    def counting(function):
        def call(query, key, value, **kwargs):
            asked.append(query.shape[0] * query.shape[1] * key.shape[1])
            return function(query, key, value, **kwargs)

        return call

    for name in ("attention", "window_attention"):
        monkeypatch.setattr(kernels_pallas, name, counting(getattr(kernels_pallas, name)))
    jax.eval_shape(model.init, jax.random.key(0), **inputs(model))
    counts = score_entries(model, (1, 4, 4), 3)
    assert sum(asked) == sum(n for part, n in counts.items() if part != "dense")
    large = score_entries(zoo.create("PT-DiT_T2I"), (1, 64, 64), 120)
    assert sum(n for part, n in large.items() if part != "dense") < 0.1 * large["dense"]


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "geglu"},
        {"activation": "gelu", "qkv_bias": False},
        {"norm_affine": True, "shift_window": False},
        {"sample_size": 128, "head_dim": 24},
        {"text_channels": None},
    ],
)
def test_settings_of_the_code_round_trip(fields):
    model = zoo.create("pt_dit_test", **fields)
    variables = filled(model)
    state = zoo.export(model, variables)
    again = zoo.convert(model, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, again))


def test_what_cannot_be_built_is_said_in_a_sentence(small):
    model, _ = small
    given = inputs(model)
    cases = (
        (model, given | {"latents": given["latents"][:, :, :6]}, "multiples of"),
        (model.clone(head_dim=12), given, "num_heads \\* head_dim=24 is no multiple of 16"),
        (model.clone(activation="swish"), given, "activation='swish' is none of"),
        (model.clone(sample_size=128), given, "is told the image's size"),
    )
    for broken, x, message in cases:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(broken.init, jax.random.key(0), **x)


def test_positions_are_frames_then_columns_then_rows():
    """Token 11 of 3x4 places is at row 3 and column 2 of the exchanged shape."""
    table = pt_dit.positions((2, 3, 4), 16, 2)
    rates = 10000.0 ** (-np.arange(2) / 2)
    frame = np.concatenate([np.sin(0.5 * rates), np.cos(0.5 * rates)])
    np.testing.assert_allclose(table[1, 2, 3, :4], frame, rtol=1e-6)
    third = 10000.0 ** (-np.arange(3) / 3)
    for start, at in ((4, 2), (10, 3)):
        wanted = np.concatenate([np.sin(at / 2 * third), np.cos(at / 2 * third)])
        np.testing.assert_allclose(table[1, 2, 3, start : start + 6], wanted, rtol=1e-6)
