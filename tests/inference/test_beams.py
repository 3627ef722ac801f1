"""Beam search finds what an exhaustive search finds, if it is wide enough."""

import itertools

import jax
import numpy as np
import pytest
from model_helpers import filled

import zoo
from zoo.inference import beam_search, generate

VOCABULARY, STEPS = 4, 3
PROMPTS = [[1, 2, 0, 3], [2]]


@pytest.fixture(scope="module")
def model():
    model = zoo.create("gpt2_test", vocab_size=VOCABULARY, depth=1, embed_dim=8, num_heads=2)
    return model, filled(model)


@pytest.fixture(scope="module")
def exhaustive(model):
    """The logarithm of the probability of every continuation's every token, by prompt."""
    model, variables = model
    endings = np.array(list(itertools.product(range(VOCABULARY), repeat=STEPS)), np.int32)
    call, found = jax.jit(model.apply), []
    for prompt in PROMPTS:
        texts = np.zeros((len(endings), 4 + STEPS), np.int32)  # one shape for both
        whole = np.concatenate([np.tile(prompt, (len(endings), 1)), endings], 1)
        texts[:, : whole.shape[1]] = whole
        logs = np.asarray(jax.nn.log_softmax(call(variables, texts)))
        logs = logs[:, len(prompt) - 1 : len(prompt) - 1 + STEPS]
        found.append(np.take_along_axis(logs, endings[..., None], 2)[..., 0])
    return endings, found


def test_enough_beams_are_an_exhaustive_search(model, exhaustive):
    endings, logs = exhaustive
    got = beam_search(*model, PROMPTS, steps=STEPS, beams=VOCABULARY ** (STEPS - 1))
    for tokens, scores, each in zip(got.tokens, got.scores, logs, strict=True):
        want = each.sum(1) / STEPS
        order = np.argsort(-want)
        np.testing.assert_allclose(scores, want[order][: len(scores)], rtol=1e-4)
        np.testing.assert_array_equal(tokens[0], endings[order[0]])


def test_a_text_that_ends_keeps_its_score(model, exhaustive):
    endings, logs = exhaustive
    got = beam_search(*model, PROMPTS, steps=STEPS, beams=16, stop=3, length_penalty=0.0)
    for tokens, scores, each in zip(got.tokens, got.scores, logs, strict=True):
        counted = np.cumsum(endings == 3, 1) - (endings == 3) == 0  # up to the first stop token
        best = (each * counted).sum(1).max()
        np.testing.assert_allclose(scores[0], best, rtol=1e-4)
        for row in np.asarray(tokens):
            stopped = np.flatnonzero(row == 3)
            assert not len(stopped) or (row[stopped[0] :] == 3).all()


def test_one_beam_is_greedy(model):
    got = beam_search(*model, PROMPTS, steps=STEPS, beams=1)
    np.testing.assert_array_equal(got.tokens[:, 0], generate(*model, PROMPTS, steps=STEPS))


def test_no_beams_are_one_sentence(model):
    with pytest.raises(ValueError, match="beams=0 should be 1 or more"):
        beam_search(*model, PROMPTS, steps=STEPS, beams=0)
