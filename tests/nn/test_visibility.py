"""Who may look at whom, counted by hand."""

import pytest
import torch

from llmnorm.nn.places import find_places
from llmnorm.nn.visibility import Cached, Masked, Plain, packed, visible_pairs, visible_tokens

CPU = torch.device("cpu")


def test_visible_tokens() -> None:
    """Oracle: by hand, with padding, and with two documents in a row."""
    real = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    like, masked = torch.empty(2, 5), Masked(real, None)
    assert visible_tokens(like, masked, causal=True).tolist() == [[1, 2, 2, 3, 4], [1, 1, 2, 3, 3]]
    assert visible_tokens(like, masked, causal=False).tolist() == [[4] * 5, [3] * 5]
    two = packed((2, 3, 5), 2, CPU)
    assert visible_tokens(like, two, causal=True).tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 5]]
    assert visible_tokens(like, two, causal=False).tolist() == [[2, 2, 3, 3, 3], [5] * 5]
    assert visible_tokens(like, Plain(), causal=True).tolist() == [[1, 2, 3, 4, 5]]
    assert visible_tokens(like, Plain(), causal=False).tolist() == [[5] * 5]
    cached = Cached(find_places([3, 1], 2, CPU))
    assert visible_tokens(like[:, :2], cached, causal=True).tolist() == [[4, 5], [2, 3]]


@pytest.mark.parametrize("causal", [False, True])
def test_the_pairs_are_as_many_as_are_counted(causal: bool) -> None:
    """Oracle: `visible_tokens`, at real tokens; later ones are seen by none in a causal mixer."""
    like = torch.empty(2, 5)
    real = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    for rows in (Plain(), Masked(real, None), packed((2, 3, 5), 2, CPU)):
        pairs = visible_pairs(like, rows, causal=causal).expand(2, 1, 5, 5)[:, 0]
        counted = visible_tokens(like, rows, causal=causal).expand(2, 5)
        some = real if isinstance(rows, Masked) else real | True
        assert torch.equal(pairs.sum(-1)[some], counted[some])
        assert not (causal and pairs.triu(1).any())


def test_the_matrix_is_that_of_rows_without_a_cache() -> None:
    """Oracle: an assertion, since only a mistake of ours asks for it."""
    with pytest.raises(AssertionError, match="without a cache"):
        visible_pairs(torch.empty(1, 2), Cached(find_places([3], 2, CPU)), causal=True)
