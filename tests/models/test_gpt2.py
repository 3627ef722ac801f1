import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_trees_close, documented_shapes, filled, filled_state_dict, sin_loss

import zoo
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.layers.causal import check_tokens, positions_of
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
        state, out = step(variables, state, x[:, start:end])
        pieces.append(out)
    assert jax.tree.map(jnp.shape, state) == shapes
    assert_trees_close(jnp.concatenate(pieces, axis=1), call(variables, x), 1e-5)
    _, out = step(variables, state | {"position": jnp.full(2, 64)}, x[:, :1])
    assert np.isnan(out).all()  # there are 64 positions


def padded(x, lengths, side="left"):
    """Rows of which only so many tokens are text, and the mask."""
    count = np.array(lengths)[:, None]
    place = np.arange(x.shape[1])
    mask = place >= x.shape[1] - count if side == "left" else place < count
    return np.where(mask, x, 96), mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_is_what_it_is_alone(small, side):
    _, variables, call = small
    x, mask = padded(tokens(), (40, 23), side)
    out = call(variables, x, mask, positions_of(mask))
    alone = call(variables, x[1:][:, mask[1]])
    assert_trees_close(out[1:][:, mask[1]], alone, 1e-5)
    assert_trees_close(out[:1], call(variables, x[:1]), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_of_padded_texts_equal_the_whole(small, side):
    model, variables, call = small
    x, mask = padded(tokens(), (19, 11), side)
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, out = step(variables, model.init_state(2, 42), x, mask)
    more = tokens(2, 2, seed=1)
    _, after = step(variables, state, more)
    for row in range(2):
        text = np.concatenate([x[row][mask[row]], more[row]])[None]
        want = call(variables, text)[0]
        assert_trees_close(np.concatenate([out[row][mask[row]], after[row]]), want, 1e-5)


def test_no_number_outside_the_vocabulary_passes_unseen(small):
    model, variables, call = small
    x, mask = padded(tokens(), (40, 23), "right")
    for wrong in (97, -1):
        bad = np.where(mask, x, wrong)
        with pytest.raises(ValueError, match=f"knows the tokens 0 to 96, not {wrong} .text 1, pl"):
            model.apply(variables, bad)
        out = call(variables, bad, mask)  # nobody sees what stands at padding
        assert_trees_close(out[1, :23], call(variables, x, mask)[1, :23], 1e-5)
        assert np.isnan(call(variables, bad)[1]).any()  # a compiled program cannot refuse


def test_a_state_says_what_does_not_fit_into_it(small):
    model, variables, _ = small
    step = jax.jit(lambda v, *a: model.apply(v, *a, method="step"))
    state, out = step(variables, model.init_state(2, 5), tokens(2, 4))
    assert np.isfinite(out).all()
    assert np.isnan(step(variables, state, tokens(2, 2))[1]).all()


def test_options_change_what_they_say(small):
    model, variables, call = small
    x = tokens(1, 8)
    base = call(variables, x)
    for options in (
        {"activation": "relu"},
        {"scale_attention": False},
        {"scale_by_layer": True},
        {"epsilon": 0.1},
    ):
        assert np.abs(model.clone(**options).apply(variables, x) - base).max() > 1e-3
    with pytest.raises(ValueError, match="activation='gelo' is none of 'gelu'"):
        model.clone(activation="gelo").apply(variables, x)


def test_a_memory_is_seen_where_it_is_visible_in_steps_too():
    model = zoo.create("gpt2_test", cross_attention=True, depth=1)
    variables = filled(model)
    x, memory = tokens(2, 6), np.random.default_rng(0).normal(size=(2, 4, model.embed_dim))
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    run = jax.jit(lambda memory: model.apply(variables, x, memory=memory, memory_mask=mask))
    hidden, seen = memory.copy(), memory.copy()
    hidden[0, 2], seen[0, 1] = 7, 7
    found = run(memory)
    np.testing.assert_array_equal(found, run(hidden))
    assert np.abs(found - run(seen))[0].max() > 1e-2
    state = model.init_state(2, 6) | {"memory": memory, "memory_visible": mask != 0}
    step = jax.jit(lambda s, x: model.apply(variables, s, x, method="step"))
    state, first = step(state, x[:, :3])
    _, last = step(state, x[:, 3:])
    both = np.concatenate([first, last], 1)
    np.testing.assert_allclose(both, found, atol=2e-5 * np.abs(found).max())
    with pytest.raises(ValueError, match="cross_attention=False"):
        zoo.create("gpt2_test").apply(variables, x, memory=memory)


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


def test_nanogpt_keeps_matrices_as_torch_does(small):
    model, variables, _ = small
    theirs = zoo.export(model, variables, "nanogpt_compiled")
    name = "_orig_mod.transformer.h.1.mlp.c_proj.weight"
    down = variables["params"]["layers_1"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(theirs[name], down.T)
    assert "_orig_mod.lm_head.weight" in theirs
    bare = model.clone(use_bias=False)
    state = zoo.export(bare, filled(bare), "nanogpt")
    assert not any(name.endswith("bias") for name in state)
    assert_trees_close(zoo.convert(bare, state), filled(bare), 0)


def test_an_untied_head_has_its_own_matrix(small):
    model = small[0].clone(tie_embeddings=False)
    state = filled_state_dict(model)
    assert state["lm_head.weight"].shape == (97, 32)
    variables = zoo.convert(model, state)
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], state["lm_head.weight"].T)


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


@pytest.mark.parametrize("name", ["gpt2_test", "linformer_test", "performer_test"])
def test_a_mask_that_is_added_to_scores_is_refused(name):
    model, tokens = zoo.create(name), jnp.zeros((1, 4), jnp.int32)
    added = np.array([[0.0, 0.0, -1e9, -1e9]], np.float32)
    with pytest.raises(ValueError, match=r"mask has the number -1000000000\.0; give 1 or True"):
        model.init(jax.random.key(0), tokens, mask=added)
    text = np.array([[1.0, 1.0, 0.0, 0.0]], np.float32)
    assert check_tokens(zoo.create("gpt2_test"), tokens, text)[1].tolist() == [[1, 1, 0, 0]]
