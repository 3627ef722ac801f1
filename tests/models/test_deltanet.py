import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, filled

import zoo
from zoo.models.language.deltanet import DeltaRule, unit_length


def mix(x, **fields):
    """The mixer alone with unit-scale weights: its variables and output."""
    module = DeltaRule(num_heads=2, **fields)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda p: p * 20 if p.ndim > 1 else p, variables)
    return variables, jax.jit(module.apply)(variables, x)[0]


def test_the_mixer_equals_its_parallel_form():
    """O = tril(Q K^T) (I + strict_tril(beta K K^T))^-1 beta V, dense and in float64."""
    x = jax.random.normal(jax.random.key(1), (1, 40, 16))
    variables, got = mix(x)
    p = jax.tree.map(lambda t: np.asarray(t, np.float64), variables["params"])
    x = np.asarray(x[0], np.float64)

    def silu(t):
        return t / (1 + np.exp(-t))

    def project(name):
        y = x @ p[name]["kernel"]
        taps = p[f"{name}_conv"]["kernel"][:, 0]
        padded = np.concatenate([np.zeros((3, 16)), y])
        y = silu(sum(taps[j] * padded[j : j + 40] for j in range(4)))
        return y.reshape(40, 2, 8).transpose(1, 0, 2)

    def unit(t):
        return t / np.sqrt((t * t).sum(-1, keepdims=True) + 1e-6)

    q, k, v = unit(project("query")), unit(project("key")), project("value")
    beta = 1 / (1 + np.exp(-(x @ p["beta"]["kernel"]).T))[..., None]
    system = np.eye(40) + np.tril(beta * (k @ k.transpose(0, 2, 1)), -1)
    out = np.tril(q @ k.transpose(0, 2, 1)) / np.sqrt(8) @ np.linalg.solve(system, beta * v)
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    want = out.transpose(1, 0, 2).reshape(40, 16) @ p["out"]["kernel"]
    assert_trees_close(got[0], want, 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        dict(output_gate=True, expand_value=2.0),
        dict(conv_size=0, activation="elu", normalise="sum"),
        dict(write_strength=False, activation="identity"),
        dict(negative_eigenvalues=True, activation="relu"),
    ],
    ids=lambda f: ",".join(f),
)
def test_every_option_is_the_same_in_steps(fields):
    model = zoo.create("deltanet_test", depth=1, **fields)
    variables = filled(model)
    x = np.random.default_rng(0).integers(97, size=(2, 12)).astype(np.int32)
    whole = jax.jit(model.apply)(variables, x)
    step = jax.jit(functools.partial(model.apply, method="step"))
    state, first = step(variables, model.init_state(2, 12), x[:, :10])
    _, second = step(variables, state, x[:, 10:])
    assert_trees_close(jnp.concatenate([first, second], axis=1), whole, 1e-5)


def test_unit_length_has_its_epsilon_inside_the_root():
    x = jnp.array([[3e-4, 4e-4]])
    np.testing.assert_allclose(unit_length(x), x / np.sqrt(25e-8 + 1e-6), rtol=1e-6)


def recall_batch(rng, pairs, batch=64, vocab=64):
    """Multi-query associative recall: key value ... then each key again, in another order.

    Tokens `[batch, 4 * pairs]`, and labels that are -1 where nothing is asked.
    """
    half = vocab // 2
    keys = np.argsort(rng.random((batch, half)), axis=1)[:, :pairs]
    values = rng.integers(half, vocab, (batch, pairs))
    order = np.argsort(rng.random((batch, pairs)), axis=1)
    asked, answer = (np.take_along_axis(t, order, 1) for t in (keys, values))
    shown = np.stack([keys, values], 2).reshape(batch, -1)
    again = np.stack([asked, answer], 2).reshape(batch, -1)
    labels = np.full((batch, 4 * pairs), -1)
    labels[:, 2 * pairs :: 2] = answer
    return np.concatenate([shown, again], axis=1).astype(np.int32), labels.astype(np.int32)


def recall(name, steps, pairs=4, **fields):
    """Accuracy of a small model after training on `recall_batch`."""
    model = zoo.create(
        name, vocab_size=64, embed_dim=64, depth=2, num_heads=2, mlp_dim=128, conv_size=4,
        **fields,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), recall_batch(rng, pairs)[0])
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.01)

    def loss(params, tokens, labels):
        logits = model.apply(params, tokens)
        asked = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        correct = (logits.argmax(-1) == labels) & asked
        return (losses * asked).sum() / asked.sum(), correct.sum() / asked.sum()

    @jax.jit
    def update(params, state, tokens, labels):
        grads, _ = jax.grad(loss, has_aux=True)(params, tokens, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = update(params, state, *recall_batch(rng, pairs))
    return float(jax.jit(loss)(params, *recall_batch(rng, pairs, batch=512))[1])


@pytest.mark.slow
@pytest.mark.parametrize("name, pairs", [("deltanet_test", 8), ("gla_test", 4)])
def test_pairs_are_recalled(name, pairs):
    assert recall(name, 1200, pairs) > 0.95
