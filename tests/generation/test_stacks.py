"""Rows stacked into batches and taken out again, held to passes without a cache."""

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmnorm.generation.stacks import PaddedStack, PaddedStacks, SlotStacks
from llmnorm.models.decoding import Decoder
from llmnorm.part import InputError
from tests.generation.stacked import (
    CONTEXT,
    KINDS,
    VOCABULARY,
    CheckedStack,
    CheckedStacks,
    WrongLogitsError,
    target,
)
from tests.models.cache_rounds import build
from tests.models.test_foreign_decoding import stock


def rounds(stacks: CheckedStacks, chance: random.Random, count: int) -> None:
    """Rows that change batches: fed uneven blocks, cut, stacked in other orders, taken out."""

    def some(low: int, high: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randint(low, high))]

    places: list[tuple[CheckedStack, int]] = [
        (stacks.prompt(ids), 0) for ids in ([], some(1, 1), some(20, 24), some(2, 9))
    ]
    for number in range(count):
        chance.shuffle(places)
        members = places[: chance.randint(1, 4)]
        batch = stacks.stack(members)
        blocks = [some(1, 4) for _ in members]
        if number % 3 == 2:
            blocks = [block[:1] * 2 for block in blocks]
        batch.feed(blocks)
        if number % 4 == 3:
            batch.drop([1] * len(members) if number % 3 == 2 else [len(b) - 1 for b in blocks])
        else:
            batch.drop([chance.randint(0, len(block)) for block in blocks])
        if batch.aligned:
            batch.feed([some(2, 2) for _ in members])
        fresh = [(batch, row) for row in range(len(members))]
        if number % 2:
            fresh = [(stacks.stack([place]), 0) for place in fresh]
        else:  # row 0 leaves the batch, the last row comes into its place, another is exchanged
            fresh[0] = stacks.stack(fresh[:1]), 0
            others = [place for place in places[len(members) :] if chance.random() < 0.7]
            stay = [fresh[-1], *fresh[1:-1], *others][: chance.randint(1, len(members))]
            out = [place for place in fresh[1:] if place not in stay]
            out = [(stacks.stack([place]), 0) for place in out]
            made, _ = stacks.exchange(batch, stay)
            kept = [place for place in places[len(members) :] if place not in stay]
            kept += [fresh[0]] if fresh[0] not in stay else []
            places[:] = [*((made, row) for row in range(len(stay))), *out, *kept]
            continue
        places[: len(members)] = fresh


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_what_they_hold_in_any_batch(kind: str) -> None:
    """Oracle: passes without a cache over each row's own tokens, 1e-12 and 1e-10."""
    rounds(target(kind).stacks, random.Random(0), 10)


@pytest.mark.parametrize("kind", ["softmax", "GPT2, padded", "GPT2, foreign"])
def test_padding_behind_a_row_of_full_context_does_no_harm(kind: str) -> None:
    """Oracle: passes without a cache; a model with learned positions has none beyond them."""
    stacks = target(kind).stacks
    batch = stacks.stack([(stacks.prompt([1] * (CONTEXT - 1)), 0), (stacks.prompt([2, 3]), 0)])
    batch.feed([[4], [5, 6, 7, 8, 9]])


@pytest.mark.parametrize("error", ["positions", "padding seen", "copied from", "kept"])
def test_a_planted_error_in_padded_batches_is_found(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: none needed: positions that count padding, padding in sight, a row that is copied
    from one column too far, a rejected token that stays."""
    of = target("Llama, padded")
    forward, drop = of.model.forward, PaddedStack.drop

    def planted(*ids: Tensor, **given: Any) -> Any:
        cached = given.get("past_key_values")
        if cached is not None and error == "positions":
            shape, width = given["input_ids"].shape, cached.get_seq_length()
            given["position_ids"] = torch.arange(width, width + shape[1]).expand(shape)
        if error == "padding seen":
            given["attention_mask"] = None
        return forward(*ids, **given)

    def dropped(self: PaddedStack, counts: list[int]) -> None:
        drop(self, [max(0, n - 1) for n in counts] if error == "kept" else counts)
        if error == "copied from" and not self.aligned:
            self.padding = [n + 1 for n in self.padding]

    monkeypatch.setattr(of.model, "forward", planted)
    monkeypatch.setattr(PaddedStack, "drop", dropped)
    with pytest.raises(WrongLogitsError):
        rounds(of.stacks, random.Random(0), 10)


@pytest.mark.parametrize("kind", ["Llama, padded", "softmax before nala"])
def test_a_row_that_holds_nan_does_not_reach_its_neighbour(kind: str) -> None:
    """Oracle: the neighbour's tokens alone, without a cache."""
    plain = target(kind).plain
    batch: Any = plain.stack([(plain.prompt([1, 2, 3]), 0), (plain.prompt([4] * 9), 0)])
    batch.cache.layers[0].keys[0] = torch.nan
    for _ in range(2):
        logits = batch.feed([[5], [4]])
        assert bool(logits[0].isnan().all())
        wanted = target(kind).full([[4] * 10])[0, -1]
        torch.testing.assert_close(logits[1, 0], wanted, rtol=0, atol=1e-10)
        batch.drop([1, 1])
        batch = plain.stack([(batch, 0), (batch, 1)])


def test_what_cannot_be_padded_is_refused() -> None:
    """Oracle: a recurrent model of transformers."""
    config = transformers.MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(InputError, match="MambaForCausalLM: it carries a recurrent state"):
        PaddedStacks(transformers.MambaForCausalLM(config))
    assert PaddedStacks(stock("GPT2")).context == 48
    assert SlotStacks(Decoder(build("softmax"), captured=False)).vocabulary == VOCABULARY
