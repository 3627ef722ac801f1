import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    learn,
)

import zoo
from zoo.models.language import nprf
from zoo.models.language.nprf import (
    exact_attention,
    nprf_attention,
    positive_features,
    toeplitz_product,
)


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


def heads(seed, *grid):
    return jax.random.normal(jax.random.key(seed), (2, *grid, 3, 8))


def quadratic(q, k, v, b, rows, causal):
    """The definition, as a matrix of weights."""
    length = q.shape[1]
    at = np.arange(length)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    weights = jnp.einsum(
        "bqnm,bknm->bnqk",
        positive_features(unit(q), rows, is_query=True),
        positive_features(unit(k), rows, is_query=False),
    )
    weights = weights * jnp.exp(b[:, at[None] - at[:, None] + length - 1])
    weights = jnp.where(np.tri(length, dtype=bool) | (not causal), weights, 0)
    return jnp.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(nprf.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


@pytest.mark.parametrize("length", [1, 2, 31, 64, pytest.param(257, marks=pytest.mark.slow)])
def test_the_transform_is_the_quadratic_form(length):
    q, k, v = (heads(i, length) for i in range(3))
    b = jax.random.normal(jax.random.key(3), (3, 2 * length - 1))
    rows = jax.random.normal(jax.random.key(4), (16, 8))
    for causal in (False, True):
        got = nprf_attention(q, k, v, b, rows, causal=causal)
        # Each sum is rounded by those of the whole text.
        assert_trees_close(got, quadratic(q, k, v, b, rows, causal), 2e-7 * max(length, 50))


def test_a_grid_has_an_offset_for_rows_and_columns():
    table = jax.random.normal(jax.random.key(0), (3, 9, 13))
    x = jax.random.normal(jax.random.key(1), (2, 5, 7, 3, 4))
    got = toeplitz_product(table, x)
    at, to = np.arange(5), np.arange(7)
    matrix = table[
        :,
        (at[None] - at[:, None] + 4)[:, None, :, None],
        (to[None] - to[:, None] + 6)[None, :, None],
    ]
    assert_trees_close(got, jnp.einsum("nhwyx,byxnf->bhwnf", matrix, x), 1e-5)


@pytest.mark.slow
def test_more_features_come_nearer_to_softmax():
    """The error falls with the root of their number: 16 times as many, a quarter."""
    q, k, v = (heads(i, 12) for i in range(3))
    b = jax.random.normal(jax.random.key(3), (3, 23))
    exact = exact_attention(q, k, v, b)

    def error(key, count):
        rows = jax.random.normal(key, (count, 8))
        return jnp.sqrt(((nprf_attention(q, k, v, b, rows) - exact) ** 2).mean())

    keys = jax.random.split(jax.random.key(4), 8)
    few, many = (jax.jit(jax.vmap(lambda key, n=n: error(key, n)))(keys).mean() for n in (32, 512))
    assert 2.5 < few / many < 6.5


def test_positions_that_say_nothing_leave_linear_attention():
    q, k, v = (heads(i, 24) for i in range(3))
    rows = jax.random.normal(jax.random.key(4), (16, 8))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    a = positive_features(unit(q), rows, is_query=True)
    c = positive_features(unit(k), rows, is_query=False)
    sums = jnp.einsum("blnm,blnd->bnmd", c, v)
    below = jnp.einsum("blnm,bnm->bln", a, c.sum(1))
    want = jnp.einsum("blnm,bnmd->blnd", a, sums) / below[..., None]
    assert_trees_close(nprf_attention(q, k, v, jnp.zeros((3, 47)), rows), want, 1e-5)


def test_later_values_reach_no_earlier_token_but_by_rounding():
    model = zoo.create("nprf_test", depth=1)
    variables, x = filled(model), tokens()
    changed = np.where(np.arange(40) < 25, x, (x + 1) % 97)
    call = jax.jit(model.apply)
    a, b = call(variables, x), call(variables, changed)
    assert np.abs(a[:, :25] - b[:, :25]).max() < 1e-5 * np.abs(a).max()
    assert np.abs(a[:, 25:] - b[:, 25:]).max() > 1e-2


def test_padding_changes_nothing():
    model = zoo.create("nprf_test", causal=False)
    variables, x = filled(model), tokens(length=29)
    padded = np.pad(x, ((0, 0), (0, 11)))
    mask = np.arange(40) < np.array([[29], [29]])
    call = jax.jit(model.apply)
    assert_trees_close(call(variables, padded, mask)[:, :29], call(variables, x), 1e-5)


def test_the_cost_is_nearly_linear_in_the_length():
    """Counted by the compiler without the transform itself, which is L log L by definition."""
    rows = jnp.zeros((16, 8))

    def bytes_of(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        b = jax.ShapeDtypeStruct((2, 2 * length - 1), jnp.float32)
        run = jax.jit(lambda q, b: nprf_attention(q, q, q, b, rows, causal=True))
        return run.lower(x, b).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8192) < 2.5 * bytes_of(4096)


def test_a_text_that_is_too_long_is_one_sentence():
    model = zoo.create("nprf_test", max_length=30)
    with pytest.raises(ValueError, match="reads at most 30 tokens, not 40"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))


@pytest.mark.slow
def test_a_token_five_steps_back_is_copied_by_relative_positions_alone():
    """Without them a token of 32 is guessed from those that have been."""

    def accuracy(**fields):
        model = zoo.create("nprf_test", vocab_size=32, depth=1, max_length=40, **fields)

        def draw(key):
            return jax.random.randint(key, (8, 40), 0, 32)

        def loss(variables, x):
            said = model.apply(variables, x)[:, 5:]
            return optax.softmax_cross_entropy_with_integer_labels(said, x[:, :-5]).mean()

        variables = jax.jit(model.init)(jax.random.key(0), draw(jax.random.key(0)))
        variables, _ = learn(loss, variables, draw, steps=300, rate=1e-2)
        x = draw(jax.random.key(2))
        said = jax.jit(model.apply)(variables, x).argmax(-1)
        return (said[:, 20:] == x[:, 15:-5]).mean()

    assert accuracy() > 0.99
    assert accuracy(max_distance=0) < 0.15
