"""Windows of bytes of whole documents, and counting as the baseline of a language model."""

import math

import numpy as np
import pytest

from zoo.data.ngrams import NGram
from zoo.data.speeches import Speeches


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / f"{1900 + i}.txt").write_bytes(bytes([65 + i]) * (10 + i))
    return str(tmp_path)


def test_a_window_lies_within_one_address_and_every_tenth_is_held_out(folder):
    train, test = (Speeches(split, 4, folder=folder) for split in ("train", "test"))
    letters = [set(source[i]["tokens"].tolist()) for source in (train, test) for i in
               range(len(source))]  # fmt: skip
    assert all(len(each) == 1 for each in letters)
    assert {t for each in letters[len(train) :] for t in each} == {65 + 9, 65 + 19}
    assert len(train) + len(test) == sum((10 + i) // 4 for i in range(20))
    assert len(Speeches("train", 4, limit=5, folder=folder)) == 5
    assert train[0]["tokens"].dtype == np.int32


def test_a_folder_without_addresses_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no addresses in"):
        len(Speeches(folder=str(tmp_path)))


def test_counts_are_witten_and_bells():
    """`ab ab ac`: by hand."""
    model = NGram([b"ababac"], order=2)
    # one byte: a 3 times, b 2, c 1 of 6, three kinds
    p1 = {w: (c + 3 / 256) / 9 for w, c in ((97, 3), (98, 2), (99, 1), (100, 0))}
    # after a: b twice, c once, two kinds
    p2 = {w: (c + 2 * p1[w]) / 5 for w, c in ((98, 2), (99, 1), (100, 0))}
    for last, p in p2.items():
        got = model.bits(np.array([97, last], np.uint8))
        np.testing.assert_allclose(got, [-math.log2(p)], rtol=1e-12)
    # nothing followed c: one byte is all there is
    got = model.bits(np.array([99, 97], np.uint8))
    np.testing.assert_allclose(got, [-math.log2(p1[97])], rtol=1e-12)


def test_probabilities_of_all_bytes_add_up_to_one():
    text = bytes(np.random.default_rng(0).integers(97, 103, 400).astype(np.uint8))
    model = NGram([text[:200], text[200:]], order=4)
    history = np.frombuffer(text[50:60], np.uint8)
    rows = (np.append(history, np.uint8(w)) for w in range(256))
    assert math.isclose(sum(2 ** -model.bits(row)[-1] for row in rows), 1.0, rel_tol=1e-9)


def test_no_run_goes_from_one_document_to_the_next():
    apart, joined = NGram([b"aaaa", b"bbbb"], order=2), NGram([b"aaaabbbb"], order=2)
    row = np.frombuffer(b"ab", np.uint8)
    assert apart.bits(row) > joined.bits(row)
