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
    filled_state_dict,
)

import zoo
from zoo.checkpoints.rules import CheckpointMismatch
from zoo.layers.series import moving_average, standardise
from zoo.methods.lora import merged
from zoo.models.timeseries import tempo
from zoo.tasks import DecomposedForecasting, Forecasting
from zoo.tasks.forecasting import decomposition_error
from zoo.training.groups import assign


def series(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


@pytest.fixture(scope="module")
def small():
    """The small TEMPO with unit-scale weights, and its compiled features."""
    model = zoo.create("tempo_test")
    return model, filled(model), jax.jit(lambda v, x: model.apply(v, x, method="features"))


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(tempo.__doc__)
    shapes = feature_shapes(zoo.create(name))
    assert {key: shapes[key] for key in table} == table


def test_the_parts_add_up_to_the_standardised_series(small):
    _, variables, features = small
    params = variables["params"]
    x = 5 * series(3, 32, 2) + 7
    out = features(variables, x)
    whole = standardise(x)[0] * params["series_scale"] + params["series_shift"]
    np.testing.assert_allclose(sum(out[name] for name in tempo.PARTS), whole, atol=1e-5)
    smooth = moving_average(whole, 9).swapaxes(1, 2)
    trend = smooth @ params["trend"]["kernel"] + params["trend"]["bias"]
    np.testing.assert_allclose(out["trend"], trend.swapaxes(1, 2), atol=1e-5)


def test_trend_sees_neither_season_nor_noise(small):
    """GPT-2 reads the three in this order, and no part sees what comes after it."""
    _, variables, features = small
    x = series(2, 32, 2)
    before = features(variables, x)["norm"]
    each = before.shape[1] // 3
    for i, name in enumerate(tempo.PARTS):
        params = variables["params"]
        prompt = {**params[f"prompt_{name}"], "bias": series(32)}
        changed = {"params": {**params, f"prompt_{name}": prompt}}
        moved = np.abs(features(changed, x)["norm"] - before).max((0, 2))
        assert not moved[: i * each].any() and (moved[i * each :] > 1e-5).all(), (name, moved)


def test_each_variate_is_read_alone_by_the_same_weights(small):
    _, variables, features = small
    x = series(2, 32, 5)
    forecast = features(variables, x)["forecast"]
    assert forecast.shape == (2, 12, 5)
    alone = features(variables, x.swapaxes(1, 2).reshape(10, 32, 1))["forecast"]
    np.testing.assert_allclose(alone[..., 0], forecast.swapaxes(1, 2).reshape(10, 12), atol=1e-4)


def test_merged_lora_gives_the_same(small):
    model, variables, features = small
    x = series(2, 32, 2)
    summed = merged(variables, model.lora().scale)
    plain = model.clone(lora_rank=0)
    got = jax.jit(plain.apply)(summed, x)
    wanted = features(variables, x)["forecast"]
    assert_trees_close(got, wanted, 1e-5)
    none = jax.tree.map(lambda p: p, variables)
    for i in range(model.depth):
        none["params"][f"layers_{i}"]["attention"]["qkv"]["lora_b"] *= 0
    assert np.abs(features(none, x)["forecast"] - wanted).max() > 1e-2


def test_the_authors_train_lora_and_all_that_is_not_gpt2():
    model = zoo.create("tempo_80m_v1")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 336, 1))))["params"]
    groups = assign(shapes, model, freeze=tempo.FROZEN_IN_PAPER)
    counts = {True: [0, 0], False: [0, 0]}
    for (path, leaf), group in zip(jax.tree.leaves_with_path(shapes), groups.values(), strict=True):
        chosen = group is not None
        of_gpt2 = path[0].key.startswith(("layers_", "norm", "position_embedding"))
        counts[of_gpt2 or path[0].key == "embed"][chosen] += leaf.size
    assert counts[True] == [82_207_488 - 308_736, 308_736]  # as peft counts them
    unused = 113_240  # leaves that only keep the file complete
    assert counts[False] == [unused, 94_439_770 - 82_207_488 - unused]


def test_a_pool_gives_the_values_of_the_nearest_keys():
    model = zoo.create("tempo_test", pool=True)
    variables = filled(model)
    out = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, series(2, 32, 2))
    assert out["prompts"].shape == (2, 2, 3, 3)
    pool = variables["params"]["pool"]
    each = out["tokens"].shape[1] // 3
    trend = out["tokens"][:, :each]
    prompt, patches = trend[:, :9], trend[:, 9:]
    chosen = out["prompts"].reshape(4, 3, 3)[:, 0]
    np.testing.assert_array_equal(prompt, pool["value"][chosen].reshape(4, 9, 32))
    summary = patches.reshape(4, 32, -1) @ pool["summary"]["kernel"][:, 0] + pool["summary"]["bias"]
    cosine = summary @ pool["key"].T / jnp.linalg.norm(pool["key"], axis=1)
    np.testing.assert_array_equal(chosen, jnp.argsort(-cosine)[:, :3])
    assert len(np.unique(chosen)) > 3  # examples differ in what they choose


def test_given_parts_are_standardised_before_they_are_compared():
    parts = {name: series(2, 32, 2, key=i) for i, name in enumerate(tempo.PARTS)}
    exact = {name: standardise(part)[0] for name, part in parts.items()}
    targets = {name: 3 * part - 2 for name, part in parts.items()}
    wanted = sum(jnp.mean((parts[name] - exact[name]) ** 2, (1, 2)) for name in tempo.PARTS)
    np.testing.assert_allclose(decomposition_error(parts, targets), wanted, rtol=1e-3)
    assert decomposition_error(exact, targets).max() < 1e-6 < 1e-2 < wanted.min()


def test_what_the_loss_adds_reaches_the_maps_that_take_apart_alone(small):
    model, variables, _ = small
    model = model.clone(dropout=0.0, depth=1)
    batch = {"series": series(4, 32, 2), "target": series(4, 12, 2, key=1)}
    batch |= {name: series(4, 32, 2, key=i + 2) for i, name in enumerate(tempo.PARTS)}
    both, plain = DecomposedForecasting(weight=10.0), Forecasting()

    @jax.jit
    def run(variables):
        def added(variables):
            loss, aux = both.loss(model, variables, {}, batch, jax.random.key(0), "train")
            without, _ = plain.loss(model, variables, {}, batch, jax.random.key(0), "train")
            return loss - without, aux.metrics["decomposition"].compute()

        return jax.value_and_grad(added, has_aux=True)(variables)

    (added, error), grads = run(variables)
    np.testing.assert_allclose(added, 10 * error, rtol=1e-3)
    largest = {name: max(np.abs(g).max() for g in jax.tree.leaves(tree))
               for name, tree in grads["params"].items()}  # fmt: skip
    own = {"trend", "season_mlp", "series_scale", "series_shift"}
    assert all(largest[name] > 0.1 for name in own), largest
    assert all(value < 1e-3 for name, value in largest.items() if name not in own), largest
    lacking = {name: part for name, part in batch.items() if name != "noise"}
    with pytest.raises(ValueError, match="the batch has no 'noise', which Decomposed"):
        jax.eval_shape(
            lambda: both.loss(model, variables, {}, lacking, jax.random.key(0), "train")[0]
        )


# ------------------------------------------------------------------------- a published GPT-2


@pytest.mark.parametrize("layout", ["huggingface_torch", "hub"])
def test_it_starts_from_a_published_gpt2(small, layout):
    """A deeper one: its first blocks are taken."""
    model, _, _ = small
    gpt2 = zoo.create("gpt2_test", depth=3)
    state = zoo.export(gpt2, filled(gpt2), layout)
    params = zoo.convert(model, state, adapt=True)["params"]
    source = filled(gpt2)["params"]
    for name in ("embed", "position_embedding", "norm"):
        assert_trees_close(params[name], source[name], 0)
    for i in range(model.depth):
        block = jax.tree.map(lambda p: p, params[f"layers_{i}"])
        qkv = block["attention"]["qkv"]
        assert not qkv.pop("lora_b").any() and qkv.pop("lora_a").any()
        assert_trees_close(block, source[f"layers_{i}"], 0)
    assert params["head_noise"]["kernel"].any()
    with pytest.raises(CheckpointMismatch, match="adapt=True"):
        zoo.convert(model, state)
    del state[next(name for name in state if name.endswith("h.1.ln_2.bias"))]
    with pytest.raises(CheckpointMismatch, match=r"h\.1\.ln_2\.bias"):
        zoo.convert(model, state, adapt=True)


def test_files_of_an_older_peft_give_the_same(small):
    model, variables, _ = small
    state = filled_state_dict(model)
    base = {name for name in state if ".c_attn.base_layer." in name}
    assert len(base) == 2 * model.depth
    renamed = {name.replace(".base_layer", ""): value for name, value in state.items()}
    assert_trees_close(zoo.convert(model, renamed), variables, 0)
    del renamed["gpt2_trend.base_model.model.h.0.attn.c_attn.lora_B.default.weight"]
    with pytest.raises(CheckpointMismatch, match="lora_B"):  # the official code would not notice
        zoo.convert(model, renamed)


# --------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_it_beats_the_season_before_on_a_trend_with_a_season():
    """Card: mean squared error below that of the season before, after 300 steps."""
    rng = np.random.default_rng(0)
    time = np.arange(108)

    def draw(count):
        slope, phase = rng.uniform(-1, 1, (2, count, 1))
        clean = 3 * slope * time / 48 + np.sin(2 * np.pi * (time / 24 + phase))
        x = (clean + 0.1 * rng.standard_normal(clean.shape)).astype("f")[..., None]
        return {"series": x[:, :96], "target": x[:, 96:], "valid": np.ones(count, bool)}

    model = zoo.create("tempo_test", context_length=96, variates=1, patch_length=16, stride=16,
                       moving_average=25, dropout=0.0)  # fmt: skip
    batch, held_out, task = jax.tree.map(jnp.asarray, draw(512)), draw(128), Forecasting()
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 300))

    @jax.jit
    def train(variables):
        def step(carry, i):
            variables, state = carry
            rows = jax.random.choice(jax.random.key(i), 512, (32,))
            some = jax.tree.map(lambda x: x[rows], batch)
            loss = lambda v: task.metrics(model, v, some)["loss"].compute()  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(variables), state)
            return (optax.apply_updates(variables, updates), state), None

        start = (variables, optimizer.init(variables))
        return jax.lax.scan(step, start, jnp.arange(300))[0][0]

    variables = train(jax.jit(model.init)(jax.random.key(0), batch["series"][:1]))
    forecast = jax.jit(model.apply)(variables, held_out["series"])
    error = np.mean((forecast - held_out["target"]) ** 2)
    before = np.mean((held_out["series"][:, 72:84] - held_out["target"]) ** 2)
    assert error < 0.2 * before, (error, before)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, shape, sentence",
    [
        ({}, (1, 31, 2), r"takes series of shape \(batch, 32, variates\), not"),
        ({"prompts": ((1, 2), (1, 3), (1,))}, (1, 32, 2), "of one length or none at all, not"),
        ({"stride": 1}, (1, 32, 2), "3 tokens of a prompt and 26 patches are 87, more than the 64"),
        ({"patch_length": 33}, (1, 32, 2), "holds no patch of 33"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, shape, sentence):
    model = zoo.create("tempo_test", **fields)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape)))
