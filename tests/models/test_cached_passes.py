"""Passes of the model with a cache, where numbers from the host say which tokens are real."""

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmnorm.models import LlmNormForCausalLM
from llmnorm.models.building import class_of
from llmnorm.part import InputError
from tests.models.test_generation import build, every_mixer

CPU = torch.device("cpu")
KINDS = torch.Tensor, torch.nn.Parameter
WINDOW = {"name": "softmax", "sliding_window": 5}
ATTENTION: dict[str, Any] = {
    "softmax": "softmax",
    "window": WINDOW,
    "both": [WINDOW, "softmax", {"name": "softmax", "sliding_window": 9}, WINDOW],
}
attention_mixers = pytest.mark.parametrize("mixer", ATTENTION.values(), ids=ATTENTION)


class Rows:
    """A model's cache, and what its rows hold; a pass is held to full passes without a cache."""

    def __init__(self, model: LlmNormForCausalLM, count: int) -> None:
        self.model, self.cache = model, model.model.new_cache()
        self.rows: list[list[int]] = [[] for _ in range(count)]
        self.generator = torch.Generator().manual_seed(count)

    @torch.no_grad()
    def feed(self, counts: Sequence[int], new: int | None = None) -> None:
        """A pass of the first rows, of random tokens, `counts` of which are real."""
        new = max(counts) if new is None else new
        ids = torch.randint(3, 61, (len(counts), new), generator=self.generator)
        got = self.model(ids, past_key_values=self.cache, counts=counts).logits
        for row, count in enumerate(counts):
            self.rows[row] += ids[row, :count].tolist()
            if count:
                whole = self.model(torch.tensor([self.rows[row]])).logits[0, -count:]
                torch.testing.assert_close(got[row, :count], whole, rtol=0, atol=1e-10)
        assert self.cache.slots.lengths == [len(row) for row in self.rows]

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of the first rows."""
        self.cache.slots.rollback(counts)
        for row, count in enumerate(counts):
            self.rows[row] = self.rows[row][: len(self.rows[row]) - count]


def addresses(slots: Any) -> list[tuple[int, int]]:
    """Where the buffers of layers of keys and values begin."""
    return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in slots.layers]


@every_mixer
def test_counts_say_which_tokens_are_real(mixer: Any) -> None:
    """Oracle: full passes over each row alone; prompts of three lengths in one pass, a row without
    a token, a verification of uneven drafts, and one token a row."""
    rows = Rows(build(mixer=mixer), 3)
    rows.feed([17, 3, 0])
    rows.feed([2, 9, 40])
    rows.feed([4, 1, 3], new=6)
    rows.rollback([3, 0, 2])
    rows.feed([1, 1, 1])
    rows.feed([0, 1, 1])


@attention_mixers
@pytest.mark.parametrize("reserved", [False, True])
def test_a_pass_takes_the_first_rows(mixer: Any, reserved: bool) -> None:
    """Oracle: full passes; rows behind them keep what they hold, and a gap is filled from behind.
    Buffers that were reserved stay where they are."""
    rows = Rows(build(mixer=mixer), 4)
    slots = rows.cache.slots
    if reserved:
        slots.reserve(4, 300, 5, dtype=torch.float64, device=CPU)
    rows.feed([6, 80, 1, 30])
    before = addresses(slots)
    rows.feed([1])
    rows.feed([2, 5], new=6)
    rows.rollback([1, 5])
    slots.release(1)
    rows.rows[1] = []
    assert slots.admit(slots, 3) == 1
    rows.rows[1] = list(rows.rows[3])
    slots.release(3)
    rows.rows[3] = []
    rows.feed([40, 50, 20])
    rows.feed([50, 70, 45])
    rows.feed([1, 1, 1])
    rows.rollback([1, 64, 3])
    rows.feed([1, 1, 1])
    rows.feed([1, 1])
    assert (addresses(slots) == before) == reserved


def test_nothing_is_kept_beyond_what_was_reserved() -> None:
    """Oracle: bytes of all tensors that are alive after a pass, over 30 passes; those without
    memory, which other tests may have left, are not counted."""
    model = build(mixer=ATTENTION["both"])
    cache, alive = model.model.new_cache(), []
    told = cache.slots.reserve(2, 400, 5, dtype=torch.float64, device=CPU)
    assert told == sum(2 * layer.keys.nbytes for layer in cache.slots.layers)  # type: ignore[attr-defined]
    with torch.no_grad():
        model(torch.randint(3, 61, (2, 30)), past_key_values=cache, counts=[30, 7])
        for step in range(30):
            model(torch.randint(3, 61, (2, 3)), past_key_values=cache, counts=[3, 2])
            cache.slots.rollback([step % 3, 0])
            if step % 15 == 14:
                gc.collect()
                tensors = [t for t in gc.get_objects() if type(t) in KINDS and t.device == CPU]
                tensors = [t for t in tensors if t.layout == torch.strided]
                alive.append(
                    sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())
                )
                del tensors
    assert len(set(alive)) == 1


@every_mixer
def test_counts_ask_a_device_nothing(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the meta device, which has no values to read: a mask is read, counts are not."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has none for meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    config = build(mixer=mixer).config
    with torch.device("meta"):
        model = class_of(config)(config).eval()
        ids = torch.zeros(3, 4, dtype=torch.long)
        mask = torch.ones(3, 4)
    cache = model.model.new_cache()
    with torch.no_grad():
        for counts in ([4, 0, 2], [1, 4, 4], None):
            out = model(ids, past_key_values=cache, counts=counts)
            assert out.logits.is_meta
        assert cache.slots.lengths == [9, 8, 10]
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            model(ids, past_key_values=cache, attention_mask=mask)


def test_masks_are_made_once_for_all_layers() -> None:
    """Oracle: calls that make a mask, in a model of one layer and in one of four."""

    class Calls(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.made += func in (torch.ops.aten.masked_fill_.Scalar, torch.ops.aten.arange.default)
            return func(*args, **(kwargs or {}))

    made = []
    for layers in (1, 4):
        model = build(mixer=[WINDOW] * layers)
        cache = model.model.new_cache()
        with torch.no_grad():
            model(torch.randint(3, 61, (2, 9)), past_key_values=cache, counts=[9, 4])
            with Calls() as calls:
                model(torch.randint(3, 61, (2, 3)), past_key_values=cache, counts=[3, 2])
        made.append(calls.made)
    assert made[0] == made[1] > 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"counts": [3]}, "counts: must be 2 numbers from 0 to 3"),
        ({"counts": [3, 4]}, "counts: must be 2 numbers from 0 to 3"),
        ({"counts": [3, -1]}, "counts: must be 2 numbers from 0 to 3"),
        ({"counts": torch.tensor([3, 3])}, "counts: must be a list of numbers, on the host"),
        (
            {"counts": [3, 3], "attention_mask": torch.ones(2, 3)},
            "counts: say which tokens are real",
        ),
        ({"counts": [3, 3], "past_key_values": None}, "counts: are of a pass with a cache"),
        (
            {"counts": [2, 3], "position_ids": torch.tensor([[0, 1, 2]] * 2)},
            "restart at 0 in row 0",
        ),
    ],
)
def test_counts_that_say_nothing_sensible_are_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: the message, and the cache as it was."""
    model = build()
    cache = model.model.new_cache()
    with torch.no_grad():
        model(torch.tensor([[3, 4]] * 2), past_key_values=cache)
        with pytest.raises(InputError, match=words):
            model(torch.tensor([[3, 4, 5]] * 2), **{"past_key_values": cache} | keys)
    assert cache.slots.lengths == [2, 2]


def test_padding_behind_may_have_any_position() -> None:
    """Oracle: the same pass without positions; those of padding are not looked at."""
    model, ids = build(), torch.randint(3, 61, (2, 4))
    caches = [model.model.new_cache() for _ in range(2)]
    positions = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])
    with torch.no_grad():
        given = model(ids, past_key_values=caches[0], counts=[2, 4], position_ids=positions).logits
        expected = model(ids, past_key_values=caches[1], counts=[2, 4]).logits
    assert torch.equal(given[0, :2], expected[0, :2]) and torch.equal(given[1], expected[1])


def test_hugging_faces_verbs_change_all_layers_or_none() -> None:
    """Oracle: rows of all layers, and the free ones, which follow the rows."""
    model = build(mixer=ATTENTION["both"])
    cache = model.model.new_cache()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(3, 61, (2, 100)), past_key_values=cache)
    with pytest.raises(ValueError, match="a window"):
        cache.crop(-200)
    assert all(layer.lengths == [300, 300] for layer in cache.slots.layers)
    cache.crop(-64)
    assert all(layer.lengths == [236, 236] for layer in cache.slots.layers)
    cache.slots.release(0)
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    assert cache.slots.free == [1, 2] and cache.slots.lengths == [236, 0, 0]
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    assert cache.slots.free == [2, 3] and cache.slots.lengths == [236, 236, 0, 0]
    cache.reset()
    assert cache.slots.free == [] and cache.slots.lengths == []
