"""What the cache promises, for every mixer: a state machine, and errors that it finds."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.key_values import KeyValues
from llmnorm.nn.places import Places
from llmnorm.nn.recurrent_cache import RecurrentCache
from llmnorm.nn.states import RowMarks
from tests.models.cache_rounds import MODELS, BrokenPromiseError, play

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_sequence_of_verbs_equals_passes_without_a_cache(
    name: str, data: st.DataObject
) -> None:
    """Oracle: full passes in float64, within 1e-12 (states: 1e-10); tools/campaigns/cache.py plays
    hundreds of rounds."""
    reserve = data.draw(st.booleans())
    play(name, 8, lambda low, high: data.draw(st.integers(low, high)), reserve=reserve)


@every_model
def test_forty_rounds(name: str) -> None:
    """Oracle: as above; rows of a hundred tokens, which hypothesis seldom makes."""
    play(name, 40, random.Random(7).randint, reserve=len(name) % 2 == 0)


def hole_in_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens behind the twentieth are numbered three too high."""
    from llmnorm.models import modeling

    right = modeling.with_cache

    def wrong(*args: Any) -> Any:
        visibility, positions, order = right(*args)
        return visibility, positions + 3 * (positions >= 20), order

    monkeypatch.setattr(modeling, "with_cache", wrong)


def rejected_token_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query sees one slot more than its own."""
    right = Places.mask

    def wrong(self: Places, *args: Any) -> Any:
        mask = right(self, *args)
        return None if mask is None else torch.cat((mask[..., :1], mask[..., :-1]), -1)

    monkeypatch.setattr(Places, "mask", wrong)


def crop_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token less goes than was asked for."""
    right = RaggedCache.rollback
    monkeypatch.setattr(
        RaggedCache, "rollback", lambda self, counts: right(self, [max(0, n - 1) for n in counts])
    )


def layers_go_back_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that refuses does so after others have changed."""

    def wrong(self: RaggedCache, counts: Any) -> None:
        for layer in self.layers:
            layer.rollback(counts)

    monkeypatch.setattr(RaggedCache, "rollback", wrong)


def state_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths go back, and the state stays."""
    monkeypatch.setattr(RecurrentCache, "_replay", lambda *_: None)


def replay_from_the_wrong_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both snapshots are taken for each other."""
    right = RecurrentCache.rollback

    def wrong(self: RecurrentCache, counts: Any) -> None:
        for row in self._rows:
            row.plane = 1 - row.plane
        right(self, counts)
        for row in self._rows:
            row.plane = 1 - row.plane

    monkeypatch.setattr(RecurrentCache, "rollback", wrong)


def replay_of_the_whole_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback within the last pass starts from a snapshot, and costs more than the pass."""
    right = RecurrentCache.rollback

    def wrong(self: RecurrentCache, counts: Any) -> None:
        for row in self._rows:
            row.began = None
        right(self, counts)

    monkeypatch.setattr(RecurrentCache, "rollback", wrong)


def neighbours_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row goes on from the state of the row before."""
    right = RecurrentCache.before

    def wrong(self: RecurrentCache, places: Places) -> Any:
        state = right(self, places)
        return None if state is None else tuple(t.roll(1, 0) for t in state)

    monkeypatch.setattr(RecurrentCache, "before", wrong)


def inputs_in_the_slot_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token's inputs stand one slot too early in the ring."""
    right = Places.ring

    def wrong(self: Places, size: int) -> Any:
        slots = right(self, size).view_as(self.index)
        return (slots - slots % (size + 1) + (self.index - 1) % size).flatten()

    monkeypatch.setattr(Places, "ring", wrong)


def stale_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a released row held stays where it was."""

    def forgotten(self: RecurrentCache, row: int) -> None:
        self._rows[row] = RowMarks()

    monkeypatch.setattr(RecurrentCache, "_empty", forgotten)
    monkeypatch.setattr(KeyValues, "_wipe", lambda *_: None)


def copy_forgets_its_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """An admitted row cannot be taken back."""
    right = RecurrentCache.admit

    def wrong(self: RecurrentCache, row: int, source: Any, source_row: int) -> None:
        right(self, row, source, source_row)
        self._rows[row].older = self._rows[row].newer = self.lengths[row]

    monkeypatch.setattr(RecurrentCache, "admit", wrong)


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (hole_in_positions, "softmax"),
    (hole_in_positions, "linear"),
    (rejected_token_is_visible, "softmax"),
    (rejected_token_is_visible, "window"),
    (crop_is_off_by_one, "softmax"),
    (layers_go_back_one_by_one, "softmax before nala"),
    (state_is_not_replayed, "gla"),
    (replay_from_the_wrong_snapshot, "gated_delta"),
    (replay_of_the_whole_ring, "linear"),
    (neighbours_state, "ssd"),
    (inputs_in_the_slot_before, "gla"),
    (stale_nan, "softmax"),
    (stale_nan, "window"),
    (stale_nan, "nala"),
    (copy_forgets_its_snapshots, "linear"),
]


@pytest.mark.parametrize(
    ("plant", "name"), PLANTED, ids=[f"{plant.__name__} {name}" for plant, name in PLANTED]
)
def test_planted_errors_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the machine, which passes without them, within thirty plays (most: in the first)."""
    plant(monkeypatch)
    with pytest.raises(BrokenPromiseError):
        for seed in range(30):
            play(name, 40, random.Random(seed).randint, reserve=seed % 2 == 1)
