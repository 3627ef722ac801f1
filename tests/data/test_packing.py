"""Several documents to a row, none of which knows of the others."""

import jax
import numpy as np
import pytest
from model_helpers import assert_trees_close, filled

import zoo
from zoo.data.packing import Packed, pack
from zoo.tasks import LanguageModelling

LENGTHS = [5, 9, 3, 12, 4, 7, 2]


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 97, n).tolist() for n in LENGTHS]


def test_every_document_is_in_one_row_once_and_rows_are_full():
    rows = pack(LENGTHS, 14)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(LENGTHS[i] for i in row) <= 14 for row in rows)
    assert len(rows) == 3  # 42 tokens
    source = Packed(documents(), 14)
    found = [
        row["tokens"][row["segments"] == n].tolist()
        for row in (source[i] for i in range(len(source)))
        for n in range(1, row["segments"].max() + 1)
    ]
    assert sorted(found) == sorted(documents())


def test_a_longer_document_is_cut_and_bytes_are_tokens():
    source = Packed([b"abcdefgh"], 3)
    texts = sorted(
        bytes(row["tokens"][row["segments"] > 0].tolist())
        for row in (source[i] for i in range(len(source)))
    )
    assert texts == [b"abc", b"def", b"gh"]
    with pytest.raises(ValueError, match="A document of 4 tokens does not fit into rows of 3"):
        pack([2, 4], 3)


@pytest.mark.parametrize("name", ["gpt2_test", "opt_test"])
def test_nothing_leaks_from_one_document_to_another(name):
    """Logits and loss are those of each document alone."""
    model = zoo.create(name, packed=True, dropout=0.0, depth=1)
    variables, source = filled(model), Packed(documents(), 16)
    rows = [source[i] for i in range(len(source))]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    call = jax.jit(lambda v, tokens, segments: model.apply(v, tokens, segments=segments))
    logits = np.asarray(call(variables, **batch))
    alone = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, text in zip(alone, documents(), strict=True):
        row[: len(text)] = text
    whole = np.asarray(call(variables, alone, np.ones_like(alone)))
    seen, total, count = 0, 0.0, 0
    for tokens, segments, out in zip(*batch.values(), logits, strict=True):
        for n in range(1, segments.max() + 1):
            own = segments == n
            i = documents().index(tokens[own].tolist())
            assert_trees_close(out[own], whole[i, : own.sum()], 1e-5)
            log = jax.nn.log_softmax(whole[i, : own.sum() - 1])
            total -= float(np.take_along_axis(log, tokens[own][1:, None], 1).sum())
            count += own.sum() - 1
            seen += 1
    assert seen == len(LENGTHS)
    task, valid = LanguageModelling(), np.ones(len(rows), bool)
    metrics = task.measure(model, logits, {**batch, "valid": valid}, train=False)
    assert int(metrics["loss"].count) == count
    np.testing.assert_allclose(metrics["loss"].total, total, rtol=1e-5)
