"""The recurrent layers' cache by itself, on a recurrence that is written down by hand."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.layer_cache import KEPT, PADDING
from llmnorm.nn.recurrent_cache import RING, InputShape, RecurrentCache

WIDTH = 3
CPU = torch.device("cpu")


def advance(state: Any, inputs: Any, counts: Tensor) -> Any:
    """S <- exp(g) S + x, which the order of the tokens matters to; zeros leave S as it is."""
    x, g = inputs
    (s,) = (x.new_zeros(len(x), WIDTH),) if state is None else state
    for token in range(x.shape[1]):
        s = g[:, token].exp()[:, None] * s + x[:, token]
    return (s,)


class Layer:
    """A cache of one layer, beside the inputs of each row as lists.

    Attributes:
        widths: of all calls of `advance` by the cache.
    """

    def __init__(self, rows: int, *, reserve: bool = False) -> None:
        self.widths: list[int] = []
        self.cache = RaggedCache(
            [
                RecurrentCache(
                    self.noting, (InputShape((WIDTH,), wide=True), InputShape((), wide=True))
                )
            ]
        )
        if reserve:
            self.cache.reserve(rows, 10_000, PADDING, dtype=torch.float64, device=CPU)
        for _ in range(rows):
            self.cache.admit()
        self.tokens: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(1)
        self.widths.clear()

    @property
    def layer(self) -> Any:
        return self.cache.layers[0]

    def noting(self, state: Any, inputs: Any, counts: Tensor) -> Any:
        self.widths.append(inputs[0].shape[1])
        return advance(state, inputs, counts)

    def append(self, counts: list[int], new: int | None = None) -> None:
        new = max(counts) if new is None else new
        places = self.cache.places(len(counts), new, CPU, counts)
        x = torch.randn(len(counts), new, WIDTH, generator=self.generator, dtype=torch.float64)
        g = -torch.rand(len(counts), new, generator=self.generator, dtype=torch.float64)
        real = torch.arange(new) < torch.tensor(counts)[:, None]
        after = advance(self.layer.before(places), (x * real[..., None], g * real), real.sum(1))
        # Padding's inputs are anything.
        x = torch.where(real[..., None], x, torch.nan)
        self.layer.append((x, g), after, places)
        for row, count in enumerate(counts):
            self.tokens[row] += zip(x[row, :count], g[row, :count], strict=True)

    def rollback(self, counts: list[int]) -> None:
        self.cache.rollback(counts)
        for row, count in zip(self.tokens, counts, strict=False):
            del row[len(row) - count :]

    def check(self) -> None:
        assert self.cache.lengths == [len(row) for row in self.tokens]
        for row, state in zip(self.tokens, self.layer.state[0], strict=True):
            expected = torch.zeros(WIDTH, dtype=torch.float64)
            for x, g in row:
                expected = g.exp() * expected + x
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-13)


def buffers(layer: Any) -> list[int]:
    return [t.data_ptr() for t in (*layer._kept, *layer._ring)]


def test_a_rollback_replays_what_stays_of_the_last_pass() -> None:
    """Oracle: the recurrence by hand; over 300 rounds of which every one rejects, no replay is
    wider than the accepted tokens, and the buffers stay where they are."""
    layer, chance = Layer(3, reserve=True), random.Random(1)
    places = buffers(layer.layer)
    for _ in range(300):
        layer.append([5, 5, 5])
        layer.widths.clear()
        counts = [chance.randint(1, 4) for _ in range(3)]
        layer.rollback(counts)
        assert layer.widths == [5 - min(counts)]
        assert buffers(layer.layer) == places
    layer.check()


@pytest.mark.parametrize("step", [1, 5, PADDING, PADDING + 1, 40, KEPT, KEPT + 1, 200])
def test_the_last_64_tokens_can_be_taken_back_at_any_length(step: int) -> None:
    """Oracle: the recurrence by hand, from every length that passes of this many tokens reach."""
    layer = Layer(1)
    for _ in range(2 + 300 // step):
        layer.append([step])
        copy = Layer(0)
        assert copy.cache.admit(layer.cache, 0) == 0
        copy.tokens = [list(layer.tokens[0])]
        copy.widths.clear()
        copy.rollback([min(KEPT, len(copy.tokens[0]))])
        assert max(copy.widths, default=0) <= 2 * KEPT
        copy.check()


def test_rejected_tokens_use_nothing_up() -> None:
    """Oracle: after verifications that reject nearly all, 64 of the tokens before can still go."""
    layer = Layer(1)
    for _ in range(100):
        layer.append([1])
    for _ in range(40):
        layer.append([PADDING])
        layer.rollback([PADDING])
    layer.rollback([KEPT])
    layer.check()


def test_a_row_that_gets_padding_keeps_its_tokens() -> None:
    """Oracle: row 0 catches up on a prompt in chunks, and row 1 can be taken back 64 tokens."""
    layer = Layer(2)
    layer.append([3, 90])
    for chunk in (50, 50, 50, 150):
        layer.append([chunk, 0])
    layer.rollback([64, 64])
    layer.check()


def test_admission_and_release_of_a_row_leave_the_others_alone() -> None:
    """Oracle: the others go back 64 tokens after it; a copy goes back as far as its source."""
    layer, other = Layer(3), Layer(1)
    other.append([100])
    for _ in range(90):
        layer.append([1, 1, 1])
    layer.cache.release(1)
    layer.tokens[1] = []
    assert layer.cache.admit(other.cache, 0) == 1
    layer.tokens[1] = list(other.tokens[0])
    layer.rollback([64, 64, 64])
    layer.check()
    layer.append([2, 1, 0])
    assert layer.cache.admit(layer.cache, 0) == 3
    layer.tokens.append(list(layer.tokens[0]))
    layer.cache.select([3, 2, 0, 0])
    layer.tokens = [list(layer.tokens[n]) for n in (3, 2, 0, 0)]
    layer.append([1, 2, 3, 4])
    layer.rollback([1, 1, 3, 2])
    layer.check()


def test_a_pass_of_the_first_rows_leaves_the_others_alone() -> None:
    """Oracle: the recurrence by hand, for passes of every number of rows in turn."""
    layer = Layer(4, reserve=True)
    for rows in (4, 1, 2, 1, 4, 3, 3, 1, 4, 2):
        layer.append([rows] * rows)
        layer.check()
        layer.rollback([1] * rows)
        layer.check()


def test_copies_of_rows_go_back_within_the_last_pass() -> None:
    """Oracle: the recurrence by hand; more copies than the pass had rows."""
    layer = Layer(2)
    layer.append([6, 6])
    layer.cache.select([0, 1, 1, 0])
    layer.tokens = [list(layer.tokens[n]) for n in (0, 1, 1, 0)]
    layer.rollback([1, 2, 3, 4])
    layer.check()


@pytest.mark.parametrize("counts", [[KEPT + 1, 0], [0, 1], [1, 1, 1], [-1, 0]])
def test_a_refused_rollback_changes_nothing(counts: list[int]) -> None:
    """Oracle: the message, and the states and lengths as they were."""
    layer = Layer(2)
    for _ in range(3):
        layer.append([PADDING * 4, 0])
    with pytest.raises(ValueError, match="rollback of"):
        layer.cache.rollback(counts)
    layer.check()


def test_what_is_made_in_inference_mode_can_be_changed_outside() -> None:
    """Oracle: torch refuses such writes; the cache's verbs have no mode of their own."""
    layer = Layer(3)
    with torch.inference_mode():
        layer.append([4, 4, 4])
    layer.rollback([1, 0, 0])
    layer.cache.release(2)
    layer.tokens[2] = []
    layer.cache.admit()
    layer.check()


def test_what_was_reserved_is_what_is_held() -> None:
    """Oracle: the bytes of the tensors, for a state of 3 and inputs of 3 + 1 float64 numbers."""
    state, ring = 3 * 8, (RING + 1) * 4 * 8
    layer = RecurrentCache(advance, (InputShape((WIDTH,), wide=True), InputShape((), wide=True)))
    expected = 5 * (3 * state + ring) + 2 * 5 * state
    assert layer.reserve(5, 1000, PADDING, torch.float64, CPU) == expected


def test_the_state_is_held_without_what_it_was_cut_from() -> None:
    """Oracle: bytes of the storage; a view would keep the states of all chunks of a prompt."""
    layer = Layer(1)
    places = layer.cache.places(1, 2, CPU)
    inputs = torch.zeros(1, 2, WIDTH), torch.zeros(1, 2)
    layer.layer.append(inputs, (torch.zeros(100, 1, WIDTH)[7],), places)
    assert layer.layer.state[0].untyped_storage().nbytes() == WIDTH * 4
