"""One loop for every causal model: the same tokens as calls on the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import filled

import zoo
from zoo.inference import Draw, RepetitionPenalty, Temperature, TopK, TopP, generate, greedy

MODELS = {
    "gpt2": ("gpt2_test", {}),
    "gla_hybrid": ("gla_test", {"attention_layers": (1,)}),
    "deltanet": ("deltanet_test", {}),
    "opt": ("opt_test", {}),
    "llama_window": ("llama_test", {"window": 6}),
    "mamba2_hybrid": ("mamba2_test", {"attention_layers": (1,)}),
}
# Models whose steps are tested with one layer, as deeper ones do nothing else.
SMALL = {
    "performer": ("performer_test", {"strict": True, "depth": 1}),
    "nprf": ("nprf_test", {"depth": 1}),
    "sigmoid_alibi": ("sigmoid_attention_test", {"depth": 1, "position": "alibi"}),
    "sigmoid_rope": (
        "sigmoid_attention_test",
        {"depth": 1, "position": "rope", "activation": "seq_len_normalized_sigmoid"},
    ),
    "extractors_relative": ("extractors_test", {"depth": 1}),
    "extractors_absolute": ("extractors_test", {"depth": 1, "index": "absolute"}),
    "combiner": ("combiner_test", {"depth": 1, "span": 4}),
    "combiner_logsparse": ("combiner_test", {"depth": 1, "kind": "logsparse"}),
}
PROMPTS = [[5, 17, 42, 8, 90, 3, 11], [61], [7, 7, 23]]


@pytest.fixture(scope="module", params=[*MODELS, *SMALL])
def system(request):
    name, fields = (MODELS | SMALL)[request.param]
    model = zoo.create(name, **fields)
    return model, filled(model)


@pytest.fixture(scope="module")
def gpt2():
    model = zoo.create("gpt2_test")
    return model, filled(model)


def by_whole_texts(model, variables, prompt, steps):
    """Greedy tokens, each from a call on the whole text, and how clear each choice was."""
    call = jax.jit(model.apply)
    text, margins = list(prompt), []
    length = -(-(len(prompt) + steps) // 16) * 16  # spans and blocks divide it
    for _ in range(steps):
        row = np.zeros((1, length), np.int32)  # one length, one compilation; nobody looks ahead
        row[0, : len(text)] = text
        logits = np.sort(call(variables, row)[0, len(text) - 1])
        margins.append(logits[-1] - logits[-2])
        text.append(int(call(variables, row)[0, len(text) - 1].argmax()))
    return text[len(prompt) :], min(margins)


def test_greedy_tokens_are_those_of_whole_texts(system):
    model, variables = system
    got = generate(model, variables, PROMPTS, steps=9)
    assert got.shape == (3, 9)
    for row, prompt in zip(got, PROMPTS, strict=True):
        want, margin = by_whole_texts(model, variables, prompt, 9)
        assert margin > 1e-4  # else rounding could choose
        assert row.tolist() == want


WHOLE = {
    "routing": ("routing_transformer_test", {"depth": 1, "causal": True}),
    "reformer": ("reformer_test", {}),
    "performer_shifted": ("performer_test", {"depth": 1, "shift_tokens": True, "local_heads": 1}),
}


@pytest.mark.parametrize("key", WHOLE)
def test_models_of_whole_texts_run_them_at_every_step(key):
    """Their layers look at all tokens, so logits are those of the text in the same room."""
    name, fields = WHOLE[key]
    model = zoo.create(name, **fields)
    variables, steps, room = filled(model), 4, 11
    got = generate(model, variables, PROMPTS, steps=steps)
    call = jax.jit(model.apply)
    for row, prompt in zip(got.tolist(), PROMPTS, strict=True):
        text = list(prompt)
        for token in row:
            tokens, mask = np.zeros((1, room), np.int32), np.arange(room)[None] < len(text)
            tokens[0, : len(text)] = text
            logits = np.sort(call(variables, tokens, mask)[0, len(text) - 1])
            assert logits[-1] - logits[-2] > 1e-4  # else rounding could choose
            assert token == call(variables, tokens, mask)[0, len(text) - 1].argmax()
            text.append(token)


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("nprf_test", {"causal": False}, "causal=False and cannot continue"),
        ("combiner_test", {"causal": False}, "causal=False and cannot continue"),
        ("reformer_test", {"head": "classification"}, "says no words"),
        ("performer_test", {"max_length": 8}, "reads at most 8 tokens, not 9"),
    ],
)
def test_a_model_that_cannot_continue_a_text_says_why(name, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        zoo.create(name, **fields).init_state(1, 9)


def test_padding_at_either_side_is_the_same(gpt2):
    model, variables = gpt2
    right, mask = np.array([[5, 17, 42], [61, 0, 0]]), np.array([[1, 1, 1], [1, 0, 0]])
    left, flipped = np.array([[5, 17, 42], [96, 96, 61]]), mask[:, ::-1]
    a = generate(model, variables, right, steps=4, mask=mask)
    b = generate(model, variables, left, steps=4, mask=flipped)
    np.testing.assert_array_equal(a, b)


def test_a_text_ends_at_its_stop_token(gpt2):
    model, variables = gpt2
    free = generate(model, variables, PROMPTS, steps=9)
    stop = int(free[0, 2])
    got = generate(model, variables, PROMPTS, steps=9, stop=stop)
    for row, without in zip(got, free, strict=True):
        found = np.flatnonzero(without == stop)
        end = int(found[0]) if len(found) else 9
        np.testing.assert_array_equal(row[:end], without[:end])
        assert (row[end:] == stop).all()
    several = generate(model, variables, PROMPTS, steps=9, stop=[int(free[0, 0]), int(free[1, 0])])
    np.testing.assert_array_equal(several[0], np.full(9, free[0, 0]))


def test_draws_are_a_function_of_the_key(gpt2):
    model, variables = gpt2
    sampler = Draw(Temperature(2.0), TopK(50), TopP(0.95))
    run = lambda key: generate(  # noqa: E731
        model, variables, PROMPTS, steps=9, rng=jax.random.key(key), sampler=sampler
    )
    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()
    one = Draw(TopK(1))
    top = generate(model, variables, PROMPTS, steps=9, rng=jax.random.key(0), sampler=one)
    np.testing.assert_array_equal(top, generate(model, variables, PROMPTS, steps=9))


def test_a_repetition_penalty_knows_prompt_and_continuation(gpt2):
    model, variables = gpt2
    never = generate(model, variables, PROMPTS, steps=12, adjust=RepetitionPenalty(1e9))
    for row, prompt in zip(never.tolist(), PROMPTS, strict=True):
        assert len(set(row)) == 12 and not set(row) & set(prompt)
    logits, seen = jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]])
    assert RepetitionPenalty(2.0)(logits, seen).tolist() == [[1.0, -4.0, 1.0]]


def test_filters_keep_what_they_say():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.05, 0.2, 0.05]]))
    kept = lambda f: jnp.isfinite(f(logits))[0].tolist()  # noqa: E731
    assert kept(TopK(1)) == [True, False, False, False, False]
    assert kept(TopK(2)) == [True, True, False, True, False]  # two are equally likely
    assert kept(TopP(0.4)) == [True, False, False, False, False]
    assert kept(TopP(0.6)) == [True, True, False, False, False]
    assert kept(TopP(1.0)) == [True] * 5
    drawn = jax.vmap(Draw(TopP(0.6)), in_axes=(0, None))(
        jax.random.split(jax.random.key(0), 4000), logits
    )
    share = np.mean(np.asarray(drawn) == 0)
    assert abs(share - 5 / 7) < 4 * np.sqrt(5 / 7 * 2 / 7 / 4000)
    assert greedy(None, logits).tolist() == [0]


@pytest.mark.parametrize("name", ["gla_test", "deltanet_test", "mamba2_test"])
def test_a_recurrent_state_does_not_grow(name):
    model = zoo.create(name)
    shapes = lambda n: jax.tree.map(jnp.shape, model.init_state(2, n))  # noqa: E731
    assert shapes(10) == shapes(10_000)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"prompt": [[]]}, "A prompt is integers of shape"),
        ({"prompt": [[1], []]}, "Prompt 1 has no token"),
        ({"prompt": [[1.5]]}, "A prompt is integers"),
        ({"prompt": [[1, 97]]}, "knows the tokens 0 to 96, not 97"),
        ({"prompt": [[1]], "steps": 0}, "steps=0 should be 1 or more"),
        ({"prompt": [[1]], "steps": 64}, "has 64 positions, too few for 65"),
        ({"prompt": [[1]], "sampler": Draw()}, "Drawing tokens needs rng="),
        ({"prompt": np.ones((1, 3), int), "mask": np.ones((1, 2))}, "mask has shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(gpt2, arguments, sentence):
    model, variables = gpt2
    with pytest.raises(ValueError, match=sentence):
        generate(model, variables, **{"steps": 1, **arguments})


def test_a_model_without_steps_is_refused():
    with pytest.raises(ValueError, match="Bert has no init_state and step"):
        generate(zoo.create("bert_test"), {}, [[1]], steps=1)


@pytest.mark.parametrize("wrong", [(Temperature, 0.0), (TopK, 0), (TopP, 1.5)])
def test_filters_refuse_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="should"):
        wrong[0](wrong[1])
