"""A language model of bytes beside one that counts, and what it writes."""

import math
import types

import numpy as np
from model_helpers import filled

import zoo
from zoo.data import Data
from zoo.data.ngrams import NGram
from zoo.data.speeches import Speeches
from zoo.evaluators import ByteTexts


def test_bits_are_of_the_loss_and_of_counting_and_a_sample_is_written(tmp_path, capsys):
    for i in range(10):
        (tmp_path / f"{1900 + i}.txt").write_bytes(b"we the people of the union " * 3)
    train, test = (Speeches(split, 16, folder=str(tmp_path)) for split in ("train", "test"))
    network = zoo.create("gpt2_test", vocab_size=256, depth=1, embed_dim=8, num_heads=1)
    program = types.SimpleNamespace(
        networks=network, evaluate=lambda variables: {"loss": math.log(8)}
    )
    evaluator = ByteTexts(prompt="we ", length=4)
    found = evaluator.run(program, filled(network), Data(train, test), tmp_path)
    counted = NGram(train.documents, 5)
    rows = [test[i]["tokens"].astype(np.uint8) for i in range(len(test))]
    bits = np.mean([counted.bits(row) for row in rows])
    assert math.isclose(found["bits_per_byte"], 3)
    assert math.isclose(found["bits_per_byte_5gram"], bits)
    assert bits < 1  # it repeats itself
    text = (tmp_path / "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("we ") and text in capsys.readouterr().out
