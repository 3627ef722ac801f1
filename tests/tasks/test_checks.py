"""What does not fit is said on the host, before a step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks import Classification, Distillation, LayerDistillation, Mean, Regression
from zoo.tasks.task import lower_is_better


class Net(nn.Module):
    num_classes: int = 3

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.float32)}


IMAGES = np.zeros((12, 8, 8, 3), "f")
OUTPUTS = {"probabilities": jax.ShapeDtypeStruct((12, 3), jnp.float32)}
NUMBERS = np.arange(12) % 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (NUMBERS + 1, "4 of 12 labels are outside 0 to 2, such as 3.*seem to count from 1"),
        (NUMBERS - 1, "4 of 12 labels are outside 0 to 2, such as -1.*smallest is -1"),
        (np.arange(12) % 5, "create the model with num_classes=5"),
        (NUMBERS.astype("f"), "Labels are float32 such as 0.0; class numbers are integers"),
        (np.array(list("abc") * 4), "Labels are text such as .*'a'.*; number them"),
        (np.eye(3, dtype=int)[NUMBERS], r"Labels are int64 \[batch, 3\]; distributions .*float32"),
        (np.eye(3, dtype="f")[NUMBERS] + 1, "12 of 12 labels are no distributions .* the sum 4"),
        (NUMBERS[:, None], r"shape \[12, 1\]; a label is one class number"),
    ],
)
def test_labels_that_do_not_fit_are_named_with_a_count(labels, said):
    with pytest.raises(ValueError, match=said) as error:
        Classification().check(Net(), {"images": IMAGES, "labels": labels}, OUTPUTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [Distillation(), LayerDistillation(hidden=1.0)])
def test_labels_of_a_student_are_checked_whatever_it_learns_from(task):
    networks = {"student": Net(), "teacher": Net()}
    assert task.checks_outputs and task.metric == "accuracy"
    task.check(networks, {"images": IMAGES, "labels": NUMBERS}, OUTPUTS)
    with pytest.raises(ValueError, match="4 of 12 labels are outside 0 to 2"):
        task.check(networks, {"images": IMAGES, "labels": NUMBERS + 1}, OUTPUTS)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES.transpose(0, 3, 1, 2), "put the channels last"),
        (IMAGES[..., :1], r"give 3 \(ImageFolder\(\.\.\., channels=3\)\)"),
        (IMAGES[..., 0], r"\[8, 8\] for each example"),
        (IMAGES.astype("u1"), "end the transforms in Normalize"),
    ],
)
def test_images_that_do_not_fit_are_named(images, said):
    with pytest.raises(ValueError, match=said):
        Classification().check(Net(), {"images": images, "labels": NUMBERS}, OUTPUTS)


def test_missing_labels_and_wrong_weights_are_named():
    task = Classification(class_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="needs a label of each example; they have only images"):
        task.check(Net(), {"images": IMAGES}, OUTPUTS)
    with pytest.raises(ValueError, match="class_weights has 2 numbers, and the model has 3"):
        task.check(Net(), {"images": IMAGES, "labels": NUMBERS}, OUTPUTS)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        Classification(label_smoothing=1.5)
    mixed = np.full((12, 3), 1 / 3, "f")
    Classification().check(Net(), {"images": IMAGES, "labels": mixed}, OUTPUTS)


def test_weights_weigh_the_loss_in_training_only():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], "f")
    batch = {"labels": np.array([0, 0, 1]), "valid": np.array([True, True, True])}
    task = Classification(class_weights=(1.0, 3.0))
    each = -jax.nn.log_softmax(logits)[np.arange(3), batch["labels"]]
    loss = task.measure(Net(), logits, batch, True)["loss"]
    np.testing.assert_allclose(loss.compute(), (each * np.array([1, 1, 3])).sum() / 5, rtol=1e-6)
    plain = task.measure(Net(), logits, batch, False)["loss"]
    np.testing.assert_allclose(plain.compute(), each.mean(), rtol=1e-6)
    onehot = {**batch, "labels": np.eye(2, dtype="f")[batch["labels"]]}
    mixed = task.measure(Net(), logits, onehot, True)["loss"]
    np.testing.assert_allclose(mixed.compute(), loss.compute(), rtol=1e-6)
    assert isinstance(loss, Mean)


def test_losses_are_good_where_small():
    assert all(map(lower_is_better, ("loss", "val/mse", "mae", "perplexity", "word_error_rate")))
    assert not any(map(lower_is_better, ("accuracy", "psnr", "adjusted_f1")))


def test_targets_are_one_finite_number_each():
    class Rows(Net):
        def example_inputs(self, batch_size=1):
            return {"x": jax.ShapeDtypeStruct((batch_size, 3), jnp.float32)}

    batch = {"x": np.zeros((4, 3), "f")}
    for target, said in (
        (np.zeros((4, 1), "f"), r"shape \[4, 1\]; a target is one number"),
        (np.array([0, np.nan, 1, 2], "f"), "1 of 4 targets are not finite"),
        (np.array(list("abcd")), "Targets are <U1"),
    ):
        with pytest.raises(ValueError, match=said):
            Regression().check(Rows(), {**batch, "target": target}, {})
    with pytest.raises(ValueError, match="needs a target"):
        Regression().check(Rows(), batch, {})
