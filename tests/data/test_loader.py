import dataclasses

import numpy as np
import pytest

from zoo.data import Arrays, Data, Digits, eval_batches, train_iterator
from zoo.data.transforms import MixPairs, Normalize, RandomCrop, RandomFlip, ToRGB


def numbered(count: int, **kwargs) -> Data:
    rows = Arrays(
        image=np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2, 1), label=np.arange(count)
    )
    return Data(rows, rows, **kwargs)


AUGMENTED = Data(
    Digits("train"),
    Digits("test"),
    (ToRGB(), RandomCrop((8, 8), 2), RandomFlip(), Normalize((0.5,) * 3, (0.5,) * 3)),
    batch_size=16,
)


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def assert_equal(a: dict, b: dict):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("pairs", [(), (MixPairs(10),)], ids=["plain", "mixed"])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(processes, pairs):
    data = dataclasses.replace(AUGMENTED, pair_transforms=pairs)
    alone = take(train_iterator(data, seed=3), 5)
    shares = [take(train_iterator(data, 3, p, processes), 5) for p in range(processes)]
    for step, whole in enumerate(alone):
        joined = {k: np.concatenate([s[step][k] for s in shares]) for k in whole}
        assert_equal(joined, whole)


def test_same_seed_same_batches_and_other_seed_others():
    a, b = take(train_iterator(AUGMENTED, 0), 3), take(train_iterator(AUGMENTED, 0), 3)
    for x, y in zip(a, b, strict=True):
        assert_equal(x, y)
    other = next(train_iterator(AUGMENTED, 1))
    assert not np.array_equal(other["labels"], a[0]["labels"])


def test_an_epoch_sees_every_example_once_and_epochs_differ():
    iterator = train_iterator(numbered(20, batch_size=5), seed=0)
    first = np.concatenate([b["labels"] for b in take(iterator, 4)])
    second = np.concatenate([b["labels"] for b in take(iterator, 4)])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)


def test_epochs_run_on_across_batches_without_dropping():
    labels = np.concatenate(
        [b["labels"] for b in take(train_iterator(numbered(7, batch_size=5), seed=0), 7)]
    )
    assert all(sorted(labels[i : i + 7]) == list(range(7)) for i in range(0, 35, 7))


def test_augmentation_differs_between_epochs():
    data = dataclasses.replace(numbered(4, batch_size=4), train_transforms=(RandomCrop((2, 2), 2),))
    batches = take(train_iterator(data, 0), 4)
    by_label = [b["images"][np.argsort(b["labels"])] for b in batches]
    assert any(not np.array_equal(by_label[0], other) for other in by_label[1:])


def test_a_restored_state_goes_on_where_it_was():
    iterator = train_iterator(AUGMENTED, 0)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 2)
    fresh = train_iterator(AUGMENTED, 0)
    fresh.set_state(state)
    for x, y in zip(take(fresh, 2), expected, strict=True):
        assert_equal(x, y)


@pytest.mark.parametrize(
    ("count", "batch", "processes"), [(10, 4, 1), (10, 4, 2), (9, 8, 4), (3, 8, 4)]
)
def test_evaluation_sees_every_example_once_on_any_number_of_processes(count, batch, processes):
    data = numbered(count, eval_batch_size=batch)
    shares = [list(eval_batches(data, p, processes)) for p in range(processes)]
    assert len({len(s) for s in shares}) == 1
    seen = [x for s in shares for b in s for x in b["labels"][b["valid"]]]
    assert sorted(seen) == list(range(count))
    assert {len(b["labels"]) for s in shares for b in s} == {batch // processes}


def test_what_evaluation_draws_differs_between_examples_and_not_between_times():
    draw = lambda example, rng: example | {"draw": rng.random()}  # noqa: E731
    data = numbered(10, eval_batch_size=4, eval_transforms=(draw,))
    first, again = (
        np.concatenate([b["draw"][b["valid"]] for b in eval_batches(data)]) for _ in range(2)
    )
    assert len(set(first)) == 10
    np.testing.assert_array_equal(first, again)


def test_labels_and_images_have_the_types_that_jax_keeps():
    batch = next(train_iterator(AUGMENTED, 0))
    assert batch["labels"].dtype == np.int32 and batch["images"].dtype == np.float32
    assert batch["valid"].all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 10}, "batch_size=10 cannot be shared by 4 processes"),
        ({"batch_size": 0}, "batch_size=0 cannot be shared"),
        ({"pair_transforms": (MixPairs(10),), "batch_size": 4}, "even number of examples"),
        ({"train": Arrays(image=np.zeros((0, 2, 2, 1)))}, "no examples to train on"),
    ],
)
def test_impossible_batches_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_iterator(dataclasses.replace(AUGMENTED, **change), 0, 0, 4)


def test_an_empty_evaluation_set_is_refused():
    data = dataclasses.replace(AUGMENTED, eval=Arrays(image=np.zeros((0, 2, 2, 1))))
    with pytest.raises(ValueError, match="no examples to evaluate on"):
        next(eval_batches(data))


def test_repeated_augmentation_shows_each_example_that_often():
    data = numbered(64, batch_size=32, repeats=3)
    batches = take(train_iterator(data, 0), 6)
    labels = np.concatenate([b["labels"] for b in batches])
    assert np.bincount(labels).tolist() == [3] * 64
    assert all(len(set(b["labels"])) == 32 for b in batches)


def test_examples_of_different_shapes_are_one_sentence():
    class Ragged(Arrays):
        def __getitem__(self, index):
            return {"image": np.zeros((index + 1, 2, 1))}

    rows = Ragged(image=np.zeros(4))
    with pytest.raises(ValueError, match=r"'image' has shapes .* in one batch; add a transform"):
        next(eval_batches(Data(rows, rows, batch_size=4)))
