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
