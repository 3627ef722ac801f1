import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.data import Arrays, Data, eval_batches
from zoo.tasks import Classification, LanguageModelling, MaskedLanguageModelling, Mean
from zoo.tasks.classification import class_metrics
from zoo.tasks.metrics import merge


class Linear(nn.Module):
    classes: int = 12
    pair: bool = False

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)}

    @nn.compact
    def __call__(self, images, train=False):
        logits = nn.Dense(self.classes)(images)
        return (logits, -logits) if self.pair and train else logits


class Words(nn.Module):
    def example_inputs(self, batch_size=1):
        return {"tokens": jax.ShapeDtypeStruct((batch_size, 6), jnp.int32)}

    @nn.compact
    def __call__(self, tokens, train=False):
        return nn.Embed(9, 9)(tokens)


def rows(count=37, classes=12):
    rng = np.random.default_rng(0)
    return Arrays(
        image=rng.standard_normal((count, 4)).astype("f"), label=rng.integers(0, classes, count)
    )


def ready(model, task):
    return task.init(model, jax.random.key(0))


@pytest.mark.parametrize("batch", [1, 8, 50])
def test_metrics_do_not_depend_on_the_batch_size(batch):
    model, task = Linear(), Classification()
    variables = ready(model, task)

    def evaluated(size):
        data = Data(rows(), rows(), eval_batch_size=size)
        metrics = jax.jit(lambda batch: task.metrics(model, variables, batch))
        parts = [metrics(batch) for batch in eval_batches(data)]
        return {k: float(m.compute()) for k, m in merge(parts).items()}

    whole, parts = evaluated(37), evaluated(batch)
    assert whole.keys() == {"loss", "accuracy", "top5"}
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5)


def test_the_five_best_classes_are_those_of_top_k_ties_included():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.integers(0, 6, (64, 12)), jnp.float32)  # many ties
    labels = jnp.asarray(rng.integers(0, 12, 64))
    found = class_metrics(logits, jnp.zeros(64), {"labels": labels})["top5"]
    expected = (jax.lax.top_k(logits, 5)[1] == labels[:, None]).any(-1).mean()
    assert 0.2 < expected < 0.8
    assert float(found.compute()) == pytest.approx(float(expected))


def test_loss_is_the_cross_entropy_of_valid_examples_only():
    model, task = Linear(), Classification()
    variables = ready(model, task)
    batch = next(eval_batches(Data(rows(3), rows(3), eval_batch_size=5)))
    loss, aux = task.loss(model, variables, {}, batch, jax.random.key(0), "train")
    logits = model.apply(variables, batch["images"][:3])
    expected = -jax.nn.log_softmax(logits)[jnp.arange(3), batch["labels"][:3]].mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert aux.collections == {} and float(aux.metrics["accuracy"].count) == 3


def test_distributions_and_numbers_are_the_same_labels():
    model, smooth = Linear(), Classification(label_smoothing=0.1)
    variables = ready(model, smooth)
    batch = {k: v for k, v in next(eval_batches(Data(rows(), rows()))).items()}
    numbers, _ = smooth.loss(model, variables, {}, batch, jax.random.key(0), "train")
    hot = jax.nn.one_hot(batch["labels"], 12) * 0.9 + 0.1 / 12
    given, _ = smooth.loss(
        model, variables, {}, {**batch, "labels": hot}, jax.random.key(0), "train"
    )
    assert float(numbers) == pytest.approx(float(given), rel=1e-6)
    plain = smooth.metrics(model, variables, batch)["loss"].compute()
    assert float(plain) != pytest.approx(float(numbers), rel=1e-3)


def test_a_distilled_model_is_trained_on_both_heads():
    model, task = Linear(pair=True), Classification()
    variables = ready(model, task)
    batch = next(eval_batches(Data(rows(), rows())))
    both, _ = task.loss(model, variables, {}, batch, jax.random.key(0), "train")
    logits = model.apply(variables, batch["images"])
    each = [-jax.nn.log_softmax(x)[jnp.arange(64), batch["labels"]] for x in (logits, -logits)]
    mean = (sum(each) / 2)[batch["valid"]].mean()
    assert float(both) == pytest.approx(float(mean), rel=1e-6)


def test_a_batch_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="Linear takes images, but the batch has only tokens"):
        Classification().metrics(Linear(), {}, {"tokens": jnp.zeros((1, 2))})


def test_masked_language_modelling_counts_predicted_tokens_only():
    model, task = Words(), MaskedLanguageModelling()
    variables = {"params": {"Embed_0": {"embedding": 50.0 * jnp.eye(9)}}}
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0] * 6])
    labels = jnp.asarray([[1, -100, -100, -100, -100, -100], [-100, 2, 8, -100, 5, -100], [0] * 6])
    batch = {"tokens": tokens, "labels": labels, "valid": jnp.asarray([True, True, False])}
    metrics = task.metrics(model, variables, batch)
    assert float(metrics["accuracy"].compute()) == pytest.approx(3 / 4)
    assert float(metrics["accuracy"].count) == 4
    assert float(metrics["loss"].compute()) == pytest.approx(50 / 4, rel=1e-5)
    np.testing.assert_array_equal(task.predict(model, variables, batch)["tokens"], tokens)


def test_means_merge_and_an_empty_one_is_zero():
    a = Mean.of(jnp.asarray([1.0, 2.0, jnp.nan]), jnp.asarray([True, True, False]))
    b = Mean.of(jnp.asarray([6.0]))
    assert float(a.merge(b).compute()) == 3.0
    assert float(Mean.of(jnp.asarray([5.0]), jnp.asarray([False])).compute()) == 0.0


def test_language_models_are_asked_for_every_token_but_the_first():
    task = LanguageModelling()
    model = zoo.create("gla_test")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 8)), jnp.int32)
    valid = jnp.array([True, True, False])
    mask = jnp.ones((3, 8), bool).at[0, 5:].set(False)
    variables = task.init(model, jax.random.key(0))
    batch = {"tokens": tokens, "valid": valid}
    logits = jax.nn.log_softmax(model.apply(variables, tokens))
    each = -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    found = task.metrics(model, variables, batch)["loss"]
    assert found.count == 14
    np.testing.assert_allclose(found.compute(), each[:2].mean(), rtol=1e-5)
    found = task.metrics(model, variables, {**batch, "mask": mask})["loss"]
    assert found.count == 4 + 7
    expected = (each[0, :4].sum() + each[1].sum()) / 11
    np.testing.assert_allclose(found.compute(), expected, rtol=1e-5)
