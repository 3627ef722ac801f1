import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    learn,
    token_loss,
)

import zoo
from zoo.layers.causal import Context
from zoo.methods import LoRA
from zoo.models.language import liger
from zoo.models.language.liger import KINDS, linearize


def tokens(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def base():
    """The small LLaMA with unit-scale weights."""
    model = zoo.create("llama_test")
    return model, filled(model)


@pytest.fixture(scope="module", params=KINDS)
def small(request, base):
    """A linearised LLaMA with the LLaMA's own variables, and its compiled call."""
    model = linearize(base[0], request.param, window=6, slots=4)
    return model, base[1], jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(liger.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {k: shapes[k] for k in table} == table


def test_there_is_no_new_parameter(small, base):
    model, variables, call = small
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    assert_trees_close(zoo.convert(model, zoo.export(*base)), variables, 0)
    assert np.abs(call(variables, tokens()) - base[0].apply(variables, tokens())).max() > 0.1


def test_a_wide_window_alone_is_llama(small, base):
    model, variables, _ = small
    whole = model.clone(share=0.0, window=20)
    assert_trees_close(
        jax.jit(whole.apply)(variables, tokens()), base[0].apply(variables, tokens()), 1e-5
    )
    kept = model.clone(attention_layers=(0, 1))
    assert_trees_close(
        jax.jit(kept.apply)(variables, tokens()), base[0].apply(variables, tokens()), 1e-5
    )


def test_steps_of_padded_texts_equal_each_alone(small):
    model, variables, call = small
    x, mask = tokens(), np.arange(20) >= np.array([[0], [7]])
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, first = step(variables, model.init_state(2, 20), x[:, :18], mask[:, :18])
    state, second = step(variables, state, x[:, 18:19])
    _, third = step(variables, state, x[:, 19:])
    got = jnp.concatenate([first, second, third], axis=1)
    assert_trees_close(got[:1], call(variables, x[:1]), 2e-5)
    assert_trees_close(got[1:, 7:], call(variables, x[1:, 7:]), 2e-5)
    shapes = lambda n: jax.tree.map(jnp.shape, model.init_state(1, n))  # noqa: E731
    assert shapes(50) == shapes(5000)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrences_are_the_papers(kind):
    """Token by token in NumPy."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 8)).astype("f") for _ in range(3))
    got, _ = KINDS[kind](*map(jnp.asarray, (q, k, v)), 4, None, Context())
    log_sigmoid = lambda t: -np.log1p(np.exp(-t))  # noqa: E731

    def softmax(t):
        e = np.exp(t - t.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    want = np.zeros((9, 2, 8))
    for h in range(2):
        keys, values = np.zeros((4, 8)), np.zeros((4, 8))
        memory = np.zeros((8, 8))
        for t in range(9):
            key, value, query = (x[0, t, h].astype(float) for x in (k, v, q))
            if kind == "gsa":
                gate = np.exp(log_sigmoid(key.reshape(4, 2).mean(-1)) / 16)[:, None]
                keys = gate * keys + (1 - gate) * key
                values = gate * values + (1 - gate) * value
                want[t, h] = values.T @ softmax(keys @ query)
                continue
            gate = np.exp(log_sigmoid(key) / (16 if kind == "gla" else 1))
            write = softmax(key) if kind == "gla" else 1 - gate
            memory = gate[:, None] * memory + np.outer(write, value)
            want[t, h] = memory.T @ softmax(query)
    assert_trees_close(got[0], want, 1e-5)


def sentences(seed, count, length=32):
    """noun adverb* verb noun stop: the verb is known from the first noun, up to 8 words before."""
    rng, texts = np.random.default_rng(seed), []
    for _ in range(count):
        text = []
        while len(text) < length:
            noun, other = rng.integers(1, 17, 2)
            text += [noun, *rng.integers(17, 21, rng.integers(8)), noun + 20, other, 0]
        texts.append(text[:length])
    return np.array(texts, np.int32)


@pytest.mark.slow
def test_lora_recovers_what_the_recurrence_lost():
    """A LLaMA learns a grammar and is made recurrent; then nothing but rank-8 matrices is trained.

    Two layers with windows of three words see four words back: verbs behind five adverbs and more
    are known from the memory of the recurrence alone. Measured: losses of 1.678 before, 2.754 as
    it is made recurrent and 1.703 behind LoRA (97.7 % recovered); of the far verbs 21 % are right
    before LoRA and all behind it.
    """
    texts, held_out = jnp.asarray(sentences(0, 4096)), sentences(1, 128)
    adverb, verb = (held_out > 16) & (held_out < 21), held_out > 20
    far = verb[:, 5:] & np.all([adverb[:, i : i - 5] for i in range(5)], 0)

    def draw(key):
        return texts[jax.random.randint(key, (16,), 0, len(texts))]

    def loss(model):
        return lambda variables, x: token_loss(model.apply(variables, x), x)

    @jax.jit
    def measured(logits):
        said = 21 + logits[:, 4:-1, 21:].argmax(-1)
        return token_loss(logits, held_out), (said == held_out[:, 5:]).mean(where=far)

    llama = zoo.create("llama_test", vocab_size=37, mlp_dim=64)
    variables = jax.jit(llama.init)(jax.random.key(0), held_out[:1])
    variables, _ = learn(loss(llama), variables, draw, steps=500, rate=1e-2)
    before, known = measured(jax.jit(llama.apply)(variables, held_out))
    assert known > 0.9

    model = linearize(llama, window=3)
    lost, guessed = measured(jax.jit(model.apply)(variables, held_out))
    assert lost > before + 0.3 and guessed < 0.5

    lora = LoRA(rank=8, alpha=8.0, targets=r".*attention/(query|key|value)")
    adapted, start = lora.wrap(model), lora.adapt(model, variables, jax.random.key(2))
    variables, _ = learn(loss(adapted), start, draw, steps=200, rate=1e-2, trains=lora.trains)
    after, known = measured(jax.jit(adapted.apply)(variables, held_out))
    assert lost - after > 0.9 * (lost - before)
    assert known > 0.8


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"kind": "rwkv"}, "kind='rwkv' is none of 'gla', 'hgrn2', 'gsa'"),
        ({"kind": "gsa", "slots": 3}, "slots=3 does not divide 8 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(base, fields, sentence):
    model = linearize(base[0], **{"slots": 4} | fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1, 4)))
