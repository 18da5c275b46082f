"""Mask arithmetic, by hand."""

import torch

from llmnorm.nn.masks import (
    document_boundaries,
    document_lengths,
    document_mask,
    document_segments,
    padding_mask,
)

CPU = torch.device("cpu")


def test_document_lengths() -> None:
    """Oracle: by hand; a row without a restart is one document, whatever it starts at."""
    assert document_lengths(torch.tensor([[0, 1, 0], [5, 6, 7]])) == (2, 1, 3)
    assert document_lengths(torch.tensor([[0, 1, 2], [5, 6, 7]])) is None
    assert document_lengths(torch.tensor([[0, 0, 0]])) == (1, 1, 1)
    positions = torch.tensor([[3, 4, 0]])
    assert document_lengths(positions) == (2, 1)
    assert positions.tolist() == [[3, 4, 0]]


def test_padding_counts_as_documents_of_its_own() -> None:
    """Oracle: by hand; None where each row's real tokens are one document."""
    positions = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 1, 2, 3, 4, 5]])
    real = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    assert document_lengths(positions, real) == (1, 2, 1, 2, 5, 1)
    for row in ([0, 0, 0, 1, 2, 3], [1, 1, 0, 1, 2, 3]):  # two ways to count padding in front
        left = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
        assert document_lengths(torch.tensor([row]), left) is None
    between = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    assert document_lengths(torch.tensor([[0, 1, 0, 0, 2, 3]]), between) is None
    assert document_lengths(torch.tensor([[0, 1, 0, 0, 0, 1]]), between) == (2, 2, 2)
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    assert document_lengths(torch.zeros(1, 6, dtype=torch.long), nothing) is None


def test_the_ways_to_write_documents_down() -> None:
    """Oracle: the example of masks.py."""
    boundaries = document_boundaries((2, 1, 3), CPU)
    assert boundaries.tolist() == [0, 2, 3, 6] and boundaries.dtype == torch.int32
    segments = document_segments(boundaries, 2, 3)
    assert segments.tolist() == [[0, 0, 1], [2, 2, 2]] and segments.dtype == torch.int64
    both_ways = document_mask(segments, causal=False)
    assert both_ways[0, 0].tolist() == [[True, True, False]] * 2 + [[False, False, True]]
    assert torch.equal(document_mask(segments), both_ways.tril())


def test_padding_on_the_right_needs_no_mask() -> None:
    """Oracle: by hand."""
    assert padding_mask(torch.tensor([[True, True, False], [True, True, True]])) is None
    right = torch.tensor([[True, True, False]])
    seen = padding_mask(right, causal=False)
    assert seen is not None and seen[0, 0].tolist() == [[True, True, False]] * 2 + [[True] * 3]
    assert padding_mask(right | True, causal=False) is None
    mask = padding_mask(torch.tensor([[False, True, True]]))
    assert mask is not None
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
