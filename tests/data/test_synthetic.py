import numpy as np

from zoo.data.synthetic import PeriodicText


def test_text_repeats_itself_and_depends_on_seed_and_index_alone():
    text = PeriodicText(5, length=11, period=3, vocab_size=50)
    rows = [text[i]["tokens"] for i in range(len(text))]
    for i, row in enumerate(rows):
        assert row.shape == (11,) and row.min() >= 1 and row.max() < 50
        np.testing.assert_array_equal(row[3:], row[:-3])
        np.testing.assert_array_equal(row, text[i]["tokens"])
    assert len({tuple(row) for row in rows}) == 5
    other = PeriodicText(5, length=11, period=3, vocab_size=50, seed=1)[0]["tokens"]
    assert not np.array_equal(other, rows[0])


def test_a_markov_chain_is_as_random_as_it_says():
    from zoo.data.synthetic import MarkovText

    source = MarkovText(300, length=40, vocab_size=5)
    chances, rows = source.chances, [source[i] for i in range(300)]
    tokens = np.stack([row["tokens"] for row in rows])
    assert tokens.min() == 0 and tokens.max() == 4
    np.testing.assert_allclose(chances.sum(1), 1)
    surprise = -np.log(chances[tokens[:, :-1], tokens[:, 1:]]).mean()
    assert abs(surprise - np.mean([row["entropy"] for row in rows])) < 0.03
    assert np.any(tokens[0] != tokens[1])
