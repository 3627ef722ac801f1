import numpy as np
import pytest

from kernels_pallas import (
    And,
    Causal,
    Chunked,
    Dilated,
    Full,
    Neighborhood,
    Or,
    PrefixLM,
    SlidingWindow,
)
from kernels_pallas.masks import block_table

MASKS = [
    Full(),
    Causal(),
    Causal(offset=7),
    Causal(offset=-5),
    SlidingWindow(4, 0),
    SlidingWindow(3, None),
    SlidingWindow(None, 2),
    Chunked(6),
    PrefixLM(9),
    Dilated(2, 2, 3),
    Neighborhood((5, 8), 3),
    Neighborhood((40,), 7, dilation=2),
    Causal() & Chunked(10),
    SlidingWindow(2, 2) | PrefixLM(4),
    And(lambda q, k: (q + k) % 2 == 0, Causal()),
]


def dense(mask, queries, keys):
    return np.broadcast_to(
        mask(np.arange(queries)[:, None], np.arange(keys)[None, :]), (queries, keys)
    )


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask).split(" at 0x")[0])
@pytest.mark.parametrize(("block_q", "block_k"), [(8, 8), (7, 12), (40, 3)])
def test_block_tables_never_hide_a_visible_pair(mask, block_q, block_k):
    seen = dense(mask, 40, 40)
    some, every = block_table(mask, 40, 40, block_q, block_k)
    for i in range(some.shape[0]):
        for j in range(some.shape[1]):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            assert some[i, j] or not tile.any()
            assert tile.all() or not every[i, j]
            assert some[i, j] or not every[i, j]


@pytest.mark.parametrize("mask", [Full(), Causal(3), SlidingWindow(4, 1), Chunked(6), PrefixLM(9)])
def test_closed_forms_of_simple_masks_are_exact(mask):
    seen = dense(mask, 40, 40)
    some, every = block_table(mask, 40, 40, 7, 9)
    evaluated = block_table(lambda q, k: mask(q, k), 40, 40, 7, 9)
    np.testing.assert_array_equal(some, evaluated[0])
    np.testing.assert_array_equal(every, evaluated[1])
    assert some.any() and seen.any()


def natten_row(position, size, kernel, dilation):
    """The neighbours of one token by NATTEN's rule, written as a loop."""
    group = list(range(position % dilation, size, dilation))
    at = group.index(position)
    start = min(max(at - kernel // 2, 0), len(group) - kernel)
    return group[start : start + kernel]


@pytest.mark.parametrize(("size", "kernel", "dilation"), [(9, 3, 1), (13, 5, 2), (20, 7, 2)])
def test_neighborhood_follows_the_border_rule(size, kernel, dilation):
    seen = dense(Neighborhood((size,), kernel, dilation), size, size)
    for position in range(size):
        want = natten_row(position, size, kernel, dilation)
        assert np.flatnonzero(seen[position]).tolist() == want


def test_every_query_of_a_grid_sees_a_full_neighbourhood():
    assert (dense(Neighborhood((6, 9, 5), 3), 270, 270).sum(1) == 27).all()


def test_causal_neighbours_lie_behind():
    seen = dense(Neighborhood((12,), 3, dilation=2, causal=True), 12, 12)
    assert np.flatnonzero(seen[7]).tolist() == [3, 5, 7]
    assert np.flatnonzero(seen[1]).tolist() == [1]


def test_a_window_larger_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="choose at most 3"):
        Neighborhood((7, 9), 5, dilation=2)


def test_equal_masks_are_equal_keys():
    assert hash(Causal() & Chunked(4)) == hash(And(Causal(), Chunked(4)))
    assert (Causal() & Chunked(4)) == And(Causal(), Chunked(4))
    assert (Causal() & Chunked(4)) != Or(Causal(), Chunked(4))
