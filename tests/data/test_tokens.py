import numpy as np
import pytest

from zoo.data import Data, train_iterator
from zoo.data.text import Tokenizer
from zoo.data.tokens import Tokens, write_tokens

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man is food the".split()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    texts = ["a man is food", b"the man", *["a the"] * 8]
    tokenizer = Tokenizer(tmp_path / "vocab.txt", max_length=3)
    assert write_tokens(texts, tokenizer, "[SEP]", tmp_path / "out") == 5 + 3 + 8 * 3
    return tmp_path / "out"


def test_windows_cut_the_row_of_all_texts_and_hold_out_its_end(folder):
    train, held_out = (Tokens(str(folder), 4, s, 2) for s in ("train", "eval"))
    assert (len(train), len(held_out)) == (6, 2)
    row = np.concatenate(
        [w["tokens"] for part in (train, held_out) for w in map(part.__getitem__, range(len(part)))]
    )
    said = " ".join(WORDS[t] for t in row)
    assert said == "a man is food [SEP] the man [SEP] " + "a the [SEP] " * 7 + "a the [SEP]"
    framed = Tokens(str(folder), 6, held_out=2, first=(2,), last=(3,))
    np.testing.assert_array_equal(framed[0]["tokens"], [2, *train[0]["tokens"], 3])
    assert framed.example()["tokens"].shape == framed[0]["tokens"].shape


def test_windows_make_batches(folder):
    data = Data(Tokens(str(folder), 4, held_out=2), Tokens(str(folder), 4, "eval", 2), batch_size=2)
    batch = next(train_iterator(data, 0))
    assert batch["tokens"].shape == (2, 4) and batch["tokens"].dtype == np.int32


def test_what_is_missing_or_cut_off_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zoo\.data\.tokens"):
        len(Tokens(str(tmp_path / "absent"), 4))
    with pytest.raises(ValueError, match="hold out fewer"):
        len(Tokens(str(folder), 4))
    with pytest.raises(ValueError, match="no token '</s>'"):
        write_tokens([], Tokenizer(tmp_path / "vocab.txt"), "</s>", tmp_path / "other")
    file = folder / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="write them again"):
        len(Tokens(str(folder), 4, held_out=2))
