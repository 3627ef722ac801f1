"""Speculative decoding is exact: greedy token for token, sampled in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import assert_trees_close, filled

import zoo
from zoo.inference import STREE, Tree, chain, generate, speculate
from zoo.inference.speculate import depth_of, verify_greedy, verify_sampled

MODELS = {
    "mamba2": ("mamba2_test", {}),
    "hybrid": ("mamba2_test", {"attention_layers": (1,), "window": 5}),
    "gpt2": ("gpt2_test", {}),
    "llama": ("llama_test", {}),
}
SMALL = Tree(((0, 0, 0), (0, 0, 1)))


@pytest.fixture(scope="module", params=["hybrid", "gpt2"])
def system(request):
    name, fields = MODELS[request.param]
    model = zoo.create(name, **fields)
    return model, filled(model)


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(97, size=(1, length)).astype(np.int32)


def test_every_node_sees_its_own_path(system):
    """And what is kept of a tree is the state after that path."""
    model, variables = system
    call = jax.jit(model.apply, static_argnames="method")
    prefix, drafts, parents = tokens(9), tokens(7, 1), (-1, 0, 0, 1, 1, 2, 2)
    state, _ = call(variables, model.init_state(1, 24), prefix, method="step")
    nodes, logits = call(variables, state, drafts, jnp.array(parents), method="branch")
    paths = ([0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6])
    for path in paths:
        _, want = call(variables, state, drafts[:, path], method="step")
        assert_trees_close(logits[:, path], want, 2e-5)
    path, accepted = np.array([[0, 2, 6]]), np.array([[True, True, False]])
    kept = model.keep(state, nodes, path, accepted)
    direct, _ = call(variables, state, drafts[:, [0, 2]], method="step")
    more = tokens(3, 2)
    got = call(variables, kept, more, method="step")[1]
    assert_trees_close(got, call(variables, direct, more, method="step")[1], 2e-5)


@pytest.mark.parametrize(
    "name, tree",
    [
        ("hybrid", SMALL),
        ("gpt2", chain(3)),
        pytest.param("mamba2", SMALL, marks=pytest.mark.slow),
        pytest.param("mamba2", chain(3), marks=pytest.mark.slow),
        pytest.param("llama", SMALL, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_plain_decoding(name, tree):
    """With a drafter of other weights, and with the model itself, which is always right."""
    variant, fields = MODELS[name]
    model = zoo.create(variant, **fields)
    variables = filled(model)
    other = jax.tree.map(lambda p: p * 0.97 + 0.03 * jnp.sin(37.0 * p), variables)
    prompts = [[5, 17, 42, 8], [61]]
    plain = generate(model, variables, prompts, steps=24)
    drafted = speculate(model, variables, model, other, prompts, steps=24, tree=tree)
    np.testing.assert_array_equal(drafted.tokens, plain)
    assert (drafted.passes <= 24).all()
    itself = speculate(model, variables, model, variables, prompts, steps=24, tree=tree)
    np.testing.assert_array_equal(itself.tokens, plain)
    each = len(tree.levels) + 1
    assert (itself.passes == -(-24 // each)).all()


def test_a_walk_ends_where_no_child_holds_the_likeliest_token():
    logits = jnp.eye(6)[jnp.array([4, 1, 2, 5, 0])] * 3.0  # likeliest behind each node
    found = verify_greedy(jnp.array([0, 3, 4, 2, 1]), logits, (-1, 0, 0, 2, 2))
    assert found.path[: int(found.count)].tolist() == [0, 2, 3] and int(found.token) == 5
    found = verify_greedy(jnp.array([0, 3, 4, 1, 1]), logits, (-1, 0, 0, 2, 2))
    assert found.path[: int(found.count)].tolist() == [0, 2] and int(found.token) == 2


@pytest.mark.parametrize("parents", [(-1, 0, 0, 1, 1, 2), (-1, 0, 1, 2)], ids=["tree", "chain"])
def test_sampled_tokens_have_the_models_distribution(parents):
    """Chi-square of the first two tokens over a vocabulary of 4, from a drafter that differs."""
    rng, vocab, draws = np.random.default_rng(0), 4, 20_000
    target, draft = (jnp.array(rng.dirichlet(np.ones(vocab), vocab), "f") for _ in range(2))

    def one(key):
        """The distribution behind a node depends on its token alone."""
        keys = jax.random.split(key, 4)
        drafted = [jnp.zeros((), int)]
        for node in range(1, len(parents)):
            parent = parents[node]
            noise = jax.random.gumbel(jax.random.fold_in(keys[0], parent), (vocab,))
            order = jnp.argsort(-(jnp.log(draft[drafted[parent]]) + noise))
            drafted.append(order[parents[:node].count(parent)])
        drafted = jnp.stack(drafted)
        found = verify_sampled(keys[1], drafted, target[drafted], draft[drafted], parents)
        text = jnp.append(drafted[found.path[1:]], found.token).at[found.count - 1].set(found.token)
        late = jax.random.categorical(keys[2], jnp.log(target[found.token]))
        return text[0], jnp.where(found.count > 1, text[1], late), found.count

    first, second, count = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
    seen = np.zeros((vocab, vocab))
    np.add.at(seen, (np.asarray(first), np.asarray(second)), 1)
    expected = np.asarray(draws * target[0][:, None] * target)
    chi = ((seen - expected) ** 2 / expected).sum()
    assert chi < 37.7  # 15 degrees of freedom: one of a thousand right programs fails
    assert np.mean(np.asarray(count) > 1) > 0.3


@pytest.mark.slow
def test_sampling_is_a_function_of_the_key():
    model = zoo.create("mamba2_test")
    variables = filled(model)
    run = lambda key: speculate(  # noqa: E731
        model, variables, model, variables, [[1, 2]], steps=9, tree=SMALL, filters=(),
        rng=jax.random.key(key),
    ).tokens  # fmt: skip
    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()


def test_trees_have_the_parents_that_they_say():
    assert SMALL.parents == (-1, 0, 0, 0, 1, 1, 2)
    assert SMALL.children(1) == (4, 5) and chain(2).parents == (-1, 0, 1)
    assert len(STREE.parents) == 18 and depth_of(STREE.parents) == 4
    with pytest.raises(ValueError, match="should name parents among 0 to 2"):
        Tree(((0, 0, 0), (3,)))
    with pytest.raises(ValueError, match="are no tree"):
        depth_of((-1, 2, 0))


def test_what_does_not_fit_is_one_sentence():
    model = zoo.create("mamba2_test")
    run = lambda a, b, **k: speculate(a, {}, b, {}, [[1]], steps=2, **k)  # noqa: E731
    with pytest.raises(ValueError, match="has 97 tokens and the drafter 50;"):
        run(model, model.clone(vocab_size=50))
    with pytest.raises(ValueError, match="Bert has no branch"):
        run(zoo.create("bert_test"), model)
    with pytest.raises(ValueError, match="needs rng="):
        run(model, model, filters=())
    gla = zoo.create("gla_test")
    with pytest.raises(ValueError, match="GatedLinearAttention cannot continue a state by a tree"):
        speculate(gla, filled(gla), gla, filled(gla), [[1]], steps=2)
