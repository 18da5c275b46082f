"""The ragged slot cache against a cache that keeps every row as a list of its own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.nn.cache import RaggedCache

LAYERS, HEADS, DIM = 2, 2, 3
CPU = torch.device("cpu")


def check(cache: RaggedCache, rows: list[list[float]]) -> None:
    """Each row holds exactly its tokens, in every layer; a token's keys and values carry its id."""
    assert cache.lengths == [len(row) for row in rows]
    for number, layer in enumerate(cache.layers):
        for row, tokens in enumerate(rows):
            if not tokens:
                continue
            assert layer.keys is not None and layer.values is not None
            expected = torch.tensor(tokens).view(1, -1, 1).expand(HEADS, -1, DIM)
            assert torch.equal(layer.keys[row, :, : len(tokens)], expected + 1000 * number)
            assert torch.equal(layer.values[row, :, : len(tokens)], -expected)


def append(cache: RaggedCache, tokens: Tensor, counts: list[int] | None = None) -> Any:
    places = cache.places(len(tokens), tokens.shape[1], CPU, counts)
    values = tokens[:, :, None, None].expand(-1, -1, HEADS, DIM)
    for number, layer in enumerate(cache.layers):
        keys_seen, values_seen = layer.append(values + 1000 * number, -values, places)
        assert keys_seen.shape == values_seen.shape == (len(tokens), HEADS, places.width, DIM)
    return places


@settings(max_examples=150)
@given(data=st.data())
def test_any_sequence_of_verbs_equals_plain_lists(data: st.DataObject) -> None:
    """Oracle: Python lists, one a row, under the same verbs (a small state machine)."""
    cache = RaggedCache(LAYERS)
    rows: list[list[float]] = [[] for _ in range(data.draw(st.integers(1, 3)))]
    free: set[int] = set()
    for _ in rows:
        cache.admit()
    fresh = iter(range(1, 100_000))
    for _ in range(data.draw(st.integers(1, 8))):
        verb = data.draw(st.sampled_from(["append", "rollback", "admit", "release", "select"]))
        if verb == "append":
            new = data.draw(st.sampled_from([1, 1, 2, 5, 40]))
            tokens = torch.tensor([[float(next(fresh)) for _ in range(new)] for _ in rows])
            counts = [new] * len(rows)
            if data.draw(st.booleans()):
                counts = [data.draw(st.integers(0, new)) for _ in rows]
            append(cache, tokens, counts)
            for row, kept in enumerate(rows):
                if row not in free:
                    kept += tokens[row][: counts[row]].tolist()
        elif verb == "rollback":
            counts = [data.draw(st.integers(0, len(row))) for row in rows]
            cache.rollback(counts)
            rows = [row[: len(row) - count] for row, count in zip(rows, counts, strict=True)]
        elif verb == "admit":
            source = RaggedCache(LAYERS)
            prompt = [float(next(fresh)) for _ in range(data.draw(st.integers(1, 70)))]
            append(source, torch.tensor([[0.0] * len(prompt), prompt]))
            number = cache.admit(source, 1)
            assert number == (min(free) if free else len(rows))
            free.discard(number)
            rows[number : number + 1] = [prompt]
        elif verb == "release" and len(free) < len(rows):
            number = data.draw(st.sampled_from(sorted(set(range(len(rows))) - free)))
            cache.release(number)
            rows[number] = []
            free.add(number)
        elif verb == "select":
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            cache.select(order)
            free = {new for new, old in enumerate(order) if old in free}
            rows = [list(rows[old]) for old in order]
        check(cache, rows)


def test_places_of_padding() -> None:
    """Oracle: the example of places.py, by hand: padding goes behind the real tokens."""
    cache = RaggedCache(LAYERS)
    append(cache, torch.ones(2, 5))
    cache.rollback([0, 3])
    places = cache.places(2, 3, CPU, [3, 2])
    assert places.index.tolist() == [[5, 6, 7], [2, 3, 4]]
    assert (places.counts, places.start, places.width) == ([3, 2], None, 8)
    assert places.counted.tolist() == [3, 2]
    assert places.real is not None and places.real.tolist() == [[True] * 3, [True, True, False]]
    mask = places.mask(torch.float64)
    assert mask is not None and mask.shape == (2, 1, 3, 8) and mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {-torch.inf, 0.0}
    assert (mask[1, 0] == 0).sum(-1).tolist() == [3, 4, 5]


@pytest.mark.parametrize(("before", "new", "masked"), [(0, 4, False), (4, 1, False), (4, 2, True)])
def test_a_mask_is_made_only_where_it_is_needed(before: int, new: int, masked: bool) -> None:
    """Oracle: rows of one length need none when they are filled, or get one token."""
    cache = RaggedCache(LAYERS)
    if before:
        append(cache, torch.ones(2, before))
    places = cache.places(2, new, CPU)
    assert (places.mask(torch.float32) is not None) == masked
    assert places.fills_empty_rows == (before == 0)


def test_memory_beyond_a_row_is_zero_at_first() -> None:
    """Oracle: a mask multiplies what it hides by 0, and 0 * nan is nan: slots must be finite."""
    cache = RaggedCache(LAYERS)
    append(cache, torch.ones(2, 3))
    for layer in cache.layers:
        assert layer.keys is not None and not layer.keys[:, :, 3:].any()


def test_appending_does_not_move_what_is_there() -> None:
    """Oracle: the buffer's address over 60 tokens: capacity grows in steps, not each token."""
    cache = RaggedCache(1)
    addresses = set()
    for _ in range(60):
        append(cache, torch.ones(2, 1))
        assert cache.layers[0].keys is not None
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


def test_writes_take_the_slots_dtype_and_no_gradient() -> None:
    """Oracle: dtype of the first write; requires_grad off."""
    cache = RaggedCache(1)
    keys = torch.ones(1, 2, HEADS, DIM, dtype=torch.bfloat16)
    cache.layers[0].append(keys, keys, cache.places(1, 2, CPU))
    wide = torch.ones(1, 1, HEADS, DIM, requires_grad=True)
    seen, _ = cache.layers[0].append(wide, wide, cache.places(1, 1, CPU))
    assert seen.dtype == torch.bfloat16 and not seen.requires_grad


def test_misuse_is_refused() -> None:
    """Oracle: ValueError for a batch of another size, too many tokens back, a row not in use."""
    cache = RaggedCache(LAYERS)
    append(cache, torch.ones(2, 3))
    with pytest.raises(ValueError, match="3 rows"):
        cache.places(3, 1, CPU)
    with pytest.raises(ValueError, match="rollback"):
        cache.rollback([4, 0])
    cache.release(1)
    with pytest.raises(ValueError, match="row 1"):
        cache.release(1)
