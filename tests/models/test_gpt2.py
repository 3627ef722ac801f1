import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, filled, filled_state_dict, sin_loss

import zoo
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.layers.stack import stack_layers
from zoo.models.language import gpt2


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(97, size=(batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def small():
    """The small GPT-2 with unit-scale weights, and its compiled call."""
    model = zoo.create("gpt2_test")
    return model, filled(model), jax.jit(model.apply)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(gpt2.__doc__)
    model = zoo.create(name)
    tokens = jnp.zeros((1, 128), jnp.int32)
    run = lambda: model.init_with_output(jax.random.key(0), tokens, method="features")[0]  # noqa: E731
    out = jax.eval_shape(run)
    assert {k: out[k].shape[1:] for k in table} == table


def test_steps_and_pieces_equal_the_whole_sequence(small):
    model, variables, call = small
    x = tokens()
    step = jax.jit(lambda v, state, x: model.apply(v, state, x, method="step"))
    state, pieces = model.init_state(2, x.shape[1]), []
    shapes = jax.tree.map(jnp.shape, state)
    for start, end in ((0, 19), (19, 38), (38, 39), (39, 40)):
        out, state = step(variables, state, x[:, start:end])
        pieces.append(out)
    assert jax.tree.map(jnp.shape, state) == shapes
    assert_trees_close(jnp.concatenate(pieces, axis=1), call(variables, x), 1e-5)
    out, _ = step(variables, [s | {"position": jnp.int32(64)} for s in state], x[:, :1])
    assert np.isnan(out).all()  # there are 64 positions


def test_logits_do_not_depend_on_later_tokens(small):
    _, variables, call = small
    x = tokens()
    changed = x.copy()
    changed[:, 25:] = (changed[:, 25:] + 1) % 97
    a, b = call(variables, x), call(variables, changed)
    np.testing.assert_array_equal(a[:, :25], b[:, :25])
    assert np.abs(a[:, 25:] - b[:, 25:]).max(-1).min() > 0


def test_scan_and_loop_and_remat_are_one_model(small):
    model, variables, _ = small
    x = tokens(2, 8)

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, x))))(variables)

    want = gradient(model, variables)
    assert_trees_close(gradient(model.clone(remat=True), variables), want, 1e-5)
    scanned = model.clone(scan_layers=True, remat=True)
    stacked = {"params": stack_layers(variables["params"])}
    got = gradient(scanned, stacked)
    assert_trees_close(got, {"params": stack_layers(want["params"])}, 1e-5)
    with pytest.raises(ValueError, match="scan_layers=True gives no states"):
        scanned.apply(stacked, model.init_state(2, 20), x, method="step")


def test_matrices_into_the_residual_stream_start_smaller():
    model = zoo.create("gpt2_test", embed_dim=128)
    block = jax.jit(model.init)(jax.random.key(0), tokens(1, 4))["params"]["layers_1"]
    for kernel, wanted in (
        (block["attention"]["qkv"]["kernel"], 0.02),
        (block["attention"]["out"]["kernel"], 0.01),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["mlp"]["down"]["kernel"], 0.01),
    ):
        np.testing.assert_allclose(jnp.std(kernel), wanted, rtol=0.05)


@pytest.mark.slow
def test_a_text_is_learned_by_heart():
    """Card: 1,000 characters below 0.1 nats. Which one comes next only attention can tell."""
    text = np.random.default_rng(0).integers(8, size=1025)
    windows = jnp.array(np.lib.stride_tricks.sliding_window_view(text, 33)[::16])
    model = zoo.create("gpt2_test", vocab_size=8, embed_dim=64, dropout=0.0)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, 20, 200))

    def loss(variables):
        logits = model.apply(variables, windows[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return each[:, 8:].mean()  # the first characters of a window say too little of where it is

    @jax.jit
    def train(variables):
        def step(carry, _):
            variables, state = carry
            value, grads = jax.value_and_grad(loss)(variables)
            updates, state = optimizer.update(grads, state, variables)
            return (optax.apply_updates(variables, updates), state), value

        return jax.lax.scan(step, (variables, optimizer.init(variables)), length=200)[1]

    losses = train(jax.jit(model.init)(jax.random.key(0), windows[:1, :-1]))
    assert losses[0] > 2.0 and losses[-1] < 0.1, losses[-1]


# ---------------------------------------------------------------------------- checkpoints


def test_published_matrices_are_not_transposed(small):
    model, variables, _ = small
    state = zoo.export(model, variables)
    block = variables["params"]["layers_1"]
    name = "transformer.h.1.attn.c_attn.weight"
    np.testing.assert_array_equal(state[name], block["attention"]["qkv"]["kernel"])
    assert state[name].shape == (32, 96) and "lm_head.weight" not in state


@pytest.mark.parametrize("layout", gpt2.LAYOUTS)
def test_files_of_every_era_give_the_same_model(small, layout):
    model, variables, _ = small
    state = zoo.export(model, variables, layout)
    masks = {name for name in state if name.endswith(".attn.bias")}
    assert len(masks) == (model.depth if layout in ("hub", "huggingface_v2") else 0)
    for name in masks:
        np.testing.assert_array_equal(state[name], np.tri(64, dtype="f")[None, None])
        state[name.replace(".bias", ".masked_bias")] = np.float32(-1e4)
    assert_trees_close(zoo.convert(model, state), variables, 0)


def test_a_head_that_is_not_the_embedding_is_refused(small):
    model, _, _ = small
    state = filled_state_dict(model, "huggingface_torch")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="tied tensors differ in value"):
        zoo.convert(model, state)


def test_a_deeper_file_is_refused(small):
    model, _, _ = small
    state = filled_state_dict(model)
    with pytest.raises(CheckpointMismatch, match=r"transformer\.h\.1\.mlp"):
        zoo.convert(model.clone(depth=1), state)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, x, sentence",
    [
        ({}, jnp.zeros((1, 4)), "GPT2 takes tokens as integers of shape"),
        ({}, tokens(1, 65), "has 64 positions, too few for 65 tokens; cut the text"),
        ({"num_heads": 5}, tokens(1, 4), "num_heads=5 does not divide 32 channels"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, x, sentence):
    model = zoo.create("gpt2_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x))


def test_a_state_has_room_for_the_positions_at_most():
    with pytest.raises(ValueError, match="has 64 positions, too few for 65"):
        zoo.create("gpt2_test").init_state(1, 65)
