"""The ragged slot cache against a cache that keeps every row as a list of its own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.nn.cache import KEPT, KeyValues, RaggedCache

LAYERS, HEADS, DIM = 2, 2, 3
CPU = torch.device("cpu")


def layers(window: int | None = None) -> list[KeyValues]:
    """Layers whose shapes are known; the last one has the window."""
    windows = [None] * (LAYERS - 1) + [window]
    return [KeyValues(some, heads=HEADS, head_dim=DIM) for some in windows]


def check(cache: RaggedCache, rows: list[list[float]]) -> None:
    """Each row holds exactly its tokens, in every layer; a token's keys and values carry its id."""
    assert cache.lengths == [len(row) for row in rows]
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, KeyValues)
        if layer.keys is not None and layer.values is not None:
            assert layer.keys.isfinite().all() and layer.values.isfinite().all()
        for row, tokens in enumerate(rows):
            tokens = tokens[layer.dropped[row] :]
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
        assert isinstance(layer, KeyValues)
        keys_seen, values_seen = layer.append(values + 1000 * number, -values, places)
        shape = (len(tokens), HEADS, layer.width(places), DIM)
        assert keys_seen.shape == values_seen.shape == shape
    return places


def seen_tokens(layer: KeyValues, places: Any, row: int, query: int) -> list[float]:
    """What a query of the last pass sees: the values of the slots that its mask leaves."""
    assert layer.values is not None
    mask, width = layer.mask(places, torch.float32), layer.width(places)
    visible = torch.ones(width, dtype=torch.bool)
    if mask is not None:
        visible = mask.expand(len(places.lengths), -1, -1, -1)[row, 0, query] == 0
    elif places.fills_empty_rows:
        visible = torch.arange(width) <= query
        if layer.window is not None:
            visible &= torch.arange(width) > query - layer.window
    return (-layer.values[row, 0, :width, 0][visible]).tolist()


@settings(max_examples=150)
@given(data=st.data())
def test_any_sequence_of_verbs_equals_plain_lists(data: st.DataObject) -> None:
    """Oracle: Python lists, one a row, under the same verbs (a small state machine). A pass takes
    the first rows; what a query sees is read off its mask; rows are full of nan when released."""
    window = data.draw(st.sampled_from([None, 4]))
    cache = RaggedCache(layers(window))
    rows: list[list[float]] = [[] for _ in range(data.draw(st.integers(1, 3)))]
    peaks = [0] * len(rows)  # of a window, the last KEPT tokens before the longest row stay
    free: set[int] = set()
    reserved = data.draw(st.booleans())
    if reserved:
        cache.reserve(12, 500, 17, dtype=torch.float32, device=CPU)
    addresses = [buffers(layer) for layer in cache.layers]
    for _ in rows:
        cache.admit()
    fresh = iter(range(1, 100_000))
    if data.draw(st.booleans()):  # so that a window's next passes drop something
        counts = [data.draw(st.integers(80, 130)) for _ in rows]
        tokens = torch.tensor([[float(next(fresh)) for _ in range(130)] for _ in rows])
        append(cache, tokens, counts)
        rows = [some[:count] for some, count in zip(tokens.tolist(), counts, strict=True)]
        peaks = counts
    for _ in range(data.draw(st.integers(1, 8))):
        verbs = ["append", "rollback", "admit", "fill a gap", "release", "select"]
        verb = data.draw(st.sampled_from(verbs))
        if verb == "append":
            new = data.draw(st.sampled_from([1, 1, 2, 5, 40]))
            first = data.draw(st.integers(1, len(rows)))
            tokens = torch.tensor([[float(next(fresh)) for _ in range(new)] for _ in range(first)])
            counts = [new] * first
            if data.draw(st.booleans()):
                counts = [data.draw(st.integers(0, new)) for _ in range(first)]
            places = append(cache, tokens, counts)
            for row, count in enumerate(counts):
                if row in free:
                    continue
                rows[row] += tokens[row][:count].tolist()
                for layer in cache.layers:
                    assert isinstance(layer, KeyValues)
                    for query in range(count):
                        end = len(rows[row]) - count + query + 1
                        begin = 0 if layer.window is None else max(0, end - layer.window)
                        assert seen_tokens(layer, places, row, query) == rows[row][begin:end]
        elif verb == "rollback":
            first = data.draw(st.integers(1, len(rows)))
            most = [len(row) for row in rows]
            if window is not None:
                kept = [KEPT - peak + len(row) for row, peak in zip(rows, peaks, strict=True)]
                most = [max(0, min(pair)) for pair in zip(most, kept, strict=True)]
            counts = [data.draw(st.integers(0, most[row])) for row in range(first)]
            cache.rollback(counts)
            for row, count in enumerate(counts):
                rows[row] = rows[row][: len(rows[row]) - count]
        elif verb == "admit":
            source = RaggedCache(layers(window))
            prompt = [float(next(fresh)) for _ in range(data.draw(st.integers(0, 70)))]
            if prompt:
                append(source, torch.tensor([[0.0] * len(prompt), prompt]))
            number = cache.admit(source, 1) if prompt else cache.admit()
            assert number == (min(free) if free else len(rows))
            free.discard(number)
            rows[number : number + 1], peaks[number : number + 1] = [prompt], [len(prompt)]
        elif verb == "fill a gap" and len(free) < len(rows):
            last = max(set(range(len(rows))) - free)
            number = cache.admit(cache, last)
            assert number == (min(free) if free else len(rows))
            cache.release(last)
            free = (free | {last}) - {number}
            rows[number : number + 1], peaks[number : number + 1] = [rows[last]], [peaks[last]]
            rows[last], peaks[last] = [], 0
        elif verb == "release" and len(free) < len(rows):
            number = data.draw(st.sampled_from(sorted(set(range(len(rows))) - free)))
            for layer in cache.layers:
                spoil(layer, number)
            cache.release(number)
            rows[number], peaks[number] = [], 0
            free.add(number)
        elif verb == "select":
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            cache.select(order)
            free = {new for new, old in enumerate(order) if old in free}
            rows, peaks = [list(rows[old]) for old in order], [peaks[old] for old in order]
        peaks = [max(peak, len(row)) for peak, row in zip(peaks, rows, strict=True)]
        check(cache, rows)
        if reserved:
            assert [buffers(layer) for layer in cache.layers] == addresses


def buffers(layer: Any) -> list[tuple[int, int]]:
    """Addresses and bytes of a layer's buffers."""
    return [(t.data_ptr(), t.nbytes) for t in (layer.keys, layer.values) if t is not None]


def spoil(layer: Any, row: int) -> None:
    """Nan wherever the row has tokens."""
    used = layer.lengths[row] - layer.dropped[row]
    for kept in (layer.keys, layer.values):
        if used:
            kept[row, :, :used] = torch.nan


def test_a_window_drops_what_is_behind_of_each_row_by_itself() -> None:
    """Oracle: Python lists; how much each row holds, over 400 passes; the last KEPT go back."""
    cache = RaggedCache(layers(4))
    rows: list[list[float]] = [[], [], []]
    cache.reserve(3, 900, 17, dtype=torch.float32, device=CPU)
    addresses, dropped = [buffers(layer) for layer in cache.layers], set()
    fresh = iter(range(10_000))
    for _ in rows:
        cache.admit()
    for step in range(400):
        counts = [2, 1, 1] if step % 50 == 0 else [2, 1]
        tokens = torch.tensor([[float(next(fresh)) for _ in range(2)] for _ in counts])
        append(cache, tokens, counts)
        for row, count in enumerate(counts):
            rows[row] += tokens[row, :count].tolist()
        layer = cache.layers[1]
        assert isinstance(layer, KeyValues)
        held = [a - b for a, b in zip(layer.lengths, layer.dropped, strict=True)]
        assert max(held) <= 2 * (4 + KEPT)
        assert [buffers(layer) for layer in cache.layers] == addresses
        dropped.add(tuple(layer.dropped))
        if step % 100 == 99:
            check(cache, rows)
            cache.rollback([KEPT, KEPT])
            rows = [row[: len(row) - n] for row, n in zip(rows, (KEPT, KEPT, 0), strict=True)]
            check(cache, rows)
    assert len({a for a, _, _ in dropped}) > 4 and len({b for _, b, _ in dropped}) > 2
    assert {c for _, _, c in dropped} == {0}


def test_a_source_whose_window_was_never_full_is_copied_in_part() -> None:
    """Oracle: the prompt's last tokens, of which KEPT can be taken back."""
    source, cache = RaggedCache(layers(4)), RaggedCache(layers(4))
    cache.reserve(1, 400, 17, dtype=torch.float32, device=CPU)
    prompt = [float(n) for n in range(300)]
    append(source, torch.tensor([prompt]))
    cache.admit(source, 0)
    check(cache, [prompt])
    cache.rollback([KEPT])
    check(cache, [prompt[:-KEPT]])
    places = append(cache, torch.tensor([[7.0]]))
    layer = cache.layers[1]
    assert isinstance(layer, KeyValues)
    assert seen_tokens(layer, places, 0, 0) == [*prompt[: 300 - KEPT], 7.0][-4:]


@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("how", ["released", "padding of a free row", "left out by select"])
def test_nothing_of_a_row_is_left_for_the_next(how: str, reserved: bool) -> None:
    """Oracle: nan everywhere in the old row, none in the slots of the next one."""
    cache = RaggedCache(layers(4))
    if reserved:
        cache.reserve(2, 200, 17, dtype=torch.float32, device=CPU)
    append(cache, torch.full((2, 9), 3.0))
    if how != "padding of a free row":
        append(cache, torch.tensor([[3.0] * 5, [torch.nan] * 5]))
        cache.rollback([0, 3])
    if how == "left out by select":
        cache.select([0])
    else:
        cache.release(1)
    if how == "padding of a free row":
        append(cache, torch.tensor([[3.0] * 5, [torch.nan] * 5]))
    assert cache.admit() == 1
    append(cache, torch.full((2, 1), 3.0))
    for layer in cache.layers:
        assert isinstance(layer, KeyValues) and layer.keys is not None and layer.values is not None
        assert not layer.keys[1, :, 1:].any() and not layer.values[1, :, 1:].any()


def test_a_rollback_that_one_layer_refuses_changes_none() -> None:
    """Oracle: all layers as they were; the windowed one is the last."""
    cache = RaggedCache(layers(4))
    for _ in range(30):
        append(cache, torch.ones(2, 10), [10, 9])
    with pytest.raises(ValueError, match="layers with a window the last 68 tokens"):
        cache.rollback([1, 200])
    assert [layer.lengths for layer in cache.layers] == [[300, 270]] * 2
    cache.rollback([1])
    assert [layer.lengths for layer in cache.layers] == [[299, 270]] * 2


def test_a_pass_of_the_first_rows_leaves_the_others() -> None:
    """Oracle: addresses and bytes of the rows behind, and what a pass over all rows returns."""
    cache = RaggedCache(layers())
    append(cache, torch.arange(12.0).view(3, 4))
    before = [layer.keys[1:].clone() for layer in cache.layers]  # type: ignore[attr-defined]
    places = append(cache, torch.tensor([[50.0, 51.0]]))
    assert (places.lengths, places.start, places.width) == ([4], 4, 6)
    check(cache, [[0.0, 1, 2, 3, 50, 51], [4.0, 5, 6, 7], [8.0, 9, 10, 11]])
    for layer, kept in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[1:], kept)  # type: ignore[attr-defined]


def test_a_row_without_a_token_can_be_selected() -> None:
    """Oracle: plain lists; the buffers have no slots for the row yet."""
    cache = RaggedCache(layers())
    append(cache, torch.ones(2, 3))
    assert cache.admit() == 2
    cache.select([2, 0, 2])
    check(cache, [[], [1.0] * 3, []])
    append(cache, torch.full((3, 1), 2.0))
    check(cache, [[2.0], [1.0, 1, 1, 2], [2.0]])


def test_reserve_tells_its_bytes_and_refuses_what_does_not_fit() -> None:
    """Oracle: nbytes of the buffers; the cache as it was after every refusal."""
    cache = RaggedCache(layers(4))
    keys = {"dtype": torch.float64, "device": CPU}
    told = cache.reserve(2, 100, 5, **keys)  # type: ignore[arg-type]
    assert told == sum(size for layer in cache.layers for _, size in buffers(layer))
    addresses = [buffers(layer) for layer in cache.layers]
    append(cache, torch.ones(2, 96))
    for refused in (
        lambda: cache.places(2, 5, CPU),
        lambda: cache.places(2, 40, CPU, [1, 1]),
        lambda: cache.places(2, 1, CPU, width=200),
        lambda: cache.admit(),
        lambda: cache.select([0, 1, 1]),
        lambda: cache.reserve(2, 100, 5, **keys),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="reserve|select"):
            refused()
    append(cache, torch.full((2, 9), 2.0), [4, 3])
    check(cache, [[1.0] * 96 + [2.0] * 4, [1.0] * 96 + [2.0] * 3])
    assert [buffers(layer) for layer in cache.layers] == addresses


@pytest.mark.parametrize(
    ("rows", "tokens", "padding"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 18)]
)
def test_room_that_cannot_be_reserved_is_refused(rows: int, tokens: int, padding: int) -> None:
    """Oracle: the message, and no buffer; layers of unknown shape give up what others made."""
    cache, unknown = RaggedCache(layers()), RaggedCache([*layers(), KeyValues()])
    with pytest.raises(ValueError, match=f"{rows} rows of {tokens} tokens and {padding} columns"):
        cache.reserve(rows, tokens, padding, dtype=torch.float32, device=CPU)
    for _ in range(2):
        unknown.admit()
    unknown.release(0)
    with pytest.raises(ValueError, match="without heads and head_dim"):
        unknown.reserve(2, 1, 0, dtype=torch.float32, device=CPU)
    assert unknown.lengths == [0, 0] and unknown.free == [0] and unknown.reserved is None
    assert not any(buffers(layer) for layer in [*cache.layers, *unknown.layers])


def test_a_prompt_too_long_for_a_reserved_window_is_refused() -> None:
    """Oracle: the message with the room there is; the same prompt in two parts fits."""
    cache = RaggedCache(layers(4))
    cache.reserve(1, 400, 17, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="window of 4 have reserved room for 192"):
        cache.places(1, 250, CPU)
    assert cache.lengths in ([], [0])
    prompt = torch.arange(250.0).view(1, -1)
    append(cache, prompt[:, :150])
    append(cache, prompt[:, 150:])
    check(cache, prompt.tolist())


def test_a_width_of_the_callers_changes_no_token_that_is_seen() -> None:
    """Oracle: the same passes without it; every shape is that of the first pass."""
    ours, theirs = RaggedCache(layers(4)), RaggedCache(layers(4))
    ours.reserve(2, 300, 4, dtype=torch.float32, device=CPU)
    shapes = set()
    for step in range(250):
        tokens, counts = torch.full((2, 1), float(step)), [1, step % 3 != 0]
        append(theirs, tokens, counts)
        places = ours.places(2, 1, CPU, counts, width=320)
        values = tokens[:, :, None, None].expand(-1, -1, HEADS, DIM)
        assert places.start is None and places.real is not None
        for layer in ours.layers:
            assert isinstance(layer, KeyValues)
            keys, _ = layer.append(values, -values, places)
            mask = layer.mask(places, torch.float32)
            assert mask is not None
            shapes.add((tuple(keys.shape), tuple(mask.shape)))
        if step % 25 == 24:
            again = theirs.places(2, 1, CPU)
            for mine, other in zip(ours.layers, theirs.layers, strict=True):
                assert isinstance(mine, KeyValues) and isinstance(other, KeyValues)
                assert mine.lengths == other.lengths
                assert mine.dropped == other.dropped
                end = [n - d for n, d in zip(mine.lengths, mine.dropped, strict=True)]
                for row, n in enumerate(end):
                    assert torch.equal(mine.values[row, 0, :n, 0], other.values[row, 0, :n, 0])
            assert again.width == max(theirs.lengths) + 1
    assert len(shapes) == 2  # of the layer with a window, and of the other


def test_masks_are_made_once_a_pass() -> None:
    """Oracle: identity; one mask for the layers of each window, and one for the others."""
    windows = [None, 4, 9, 4, None]
    cache = RaggedCache([KeyValues(some, heads=HEADS, head_dim=DIM) for some in windows])
    append(cache, torch.ones(2, 20), [20, 13])
    places = append(cache, torch.ones(2, 3))
    made = [layer.mask(places, torch.float32) for layer in cache.layers]  # type: ignore[attr-defined]
    assert made[0] is made[4] and made[1] is made[3]
    assert len({id(mask) for mask in made}) == 3


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
    for counts in ([0, 0, 0], [-1]):
        with pytest.raises(ValueError, match="rollback"):
            cache.rollback(counts)
    for counts in ([1], [2, 0], [0, -1]):
        with pytest.raises(ValueError, match="counts: must have the real ones of 1 new tokens"):
            cache.places(2, 1, CPU, counts)
    with pytest.raises(ValueError, match="width: must be at least 4"):
        cache.places(2, 1, CPU, width=3)
    with pytest.raises(ValueError, match="select"):
        cache.select([2])
    for source, words in ((cache, "row 2 of the source"), (RaggedCache(1), "row 2 of the source")):
        with pytest.raises(ValueError, match=words):
            cache.admit(source, 2)
    other = RaggedCache(layers(4))
    append(other, torch.ones(1, 3))
    with pytest.raises(ValueError, match="keep other things"):
        cache.admit(other)
    check(cache, [[1.0] * 3] * 2)
    cache.release(1)
    with pytest.raises(ValueError, match="row 1"):
        cache.release(1)
