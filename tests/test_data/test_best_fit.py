"""Examples laid into rows: which go together, and what the model is given of a row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.data.best_fit import best_fit, lay_out

SIZES = st.lists(st.integers(1, 20), max_size=40)


@given(sizes=SIZES)
def test_the_longest_goes_first_where_it_fits_best(sizes: list[int]) -> None:
    """Oracle: the same rule by looking at every row, for every example."""
    expected: list[list[int]] = []
    for example in sorted(range(len(sizes)), key=lambda e: (-sizes[e], e)):
        left = [20 - sum(sizes[other] for other in row) for row in expected]
        fitting = [row for row, room in enumerate(left) if room >= sizes[example]]
        if fitting:
            expected[min(fitting, key=lambda row: left[row])].append(example)
        else:
            expected.append([example])
    assert best_fit(sizes, 20) == expected


@given(sizes=SIZES)
def test_every_example_has_a_place_and_rows_are_few(sizes: list[int]) -> None:
    """Oracle: counting; Johnson's bound of 11/9 of the fewest rows, and 4 more."""
    rows = best_fit(np.array(sizes, np.int64), 20)
    assert sorted(example for row in rows for example in row) == list(range(len(sizes)))
    assert all(sum(sizes[example] for example in row) <= 20 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 20) + 4


# Lengths of examples as logarithmic normal distributions (median, deviation of the logarithm), cut
# at the context: instructions as Alpaca's, chats of a few turns, long chats, and a mixture of them.
# (Where most examples take more than half of a row, as long chats of 2,048, rows hold one each.)
MIXES = {
    "instructions": (2048, [(90, 0.8)]),
    "chats": (2048, [(400, 0.9)]),
    "long chats": (4096, [(1200, 0.7)]),
    "mixture": (2048, [(90, 0.8), (400, 0.9), (1200, 0.7)]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_rows_of_a_step_are_well_filled(mix: str) -> None:
    """Oracle: tokens of examples over tokens of rows, in 50 steps that fill 12 rows on average."""
    generator = np.random.default_rng(0)
    context, kinds_of = MIXES[mix]
    kinds = [generator.lognormal(np.log(m), d, 100_000 // len(kinds_of)) for m, d in kinds_of]
    lengths = np.clip(np.concatenate(kinds), 8, context).astype(np.int64)
    batch = round(12 * context / lengths.mean())
    filled = rows = 0
    for _ in range(50):
        sizes = generator.choice(lengths, batch)
        filled, rows = filled + int(sizes.sum()), rows + len(best_fit(sizes, context))
    assert filled / (rows * context) >= 0.92


def test_a_row_as_the_model_is_given_it() -> None:
    """Oracle: written out by hand."""
    one = np.array([7, 8, 9, 10]), np.array([False, False, True, True])
    two = np.array([5, 6]), np.array([True, True])  # a first token is no label
    found = lay_out([[one, two], []], 6, pad=3)
    assert found["input_ids"].tolist() == [[7, 8, 9, 5, 3, 3], [3] * 6]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert found["shift_labels"].tolist() == [[-100, 9, 10, 6, -100, -100], [-100] * 6]
    assert found["label_positions"].tolist() == [1, 2, 3]
    assert {tensor.dtype for tensor in found.values()} == {torch.int64}
    full = lay_out([[one]], 3, pad=3)
    assert full["position_ids"].tolist() == [[0, 1, 2]]
    end = lay_out([[one]], 4, pad=10)  # padding as a text ends: still a label
    assert end["shift_labels"].tolist() == [[-100, 9, 10, -100]]
    nothing = lay_out([[]], 2, pad=3)
    assert nothing["label_positions"].shape == (0,)
