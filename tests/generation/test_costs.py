"""How many tokens are drafted: the speed-up by a table of costs, from measured acceptance."""

import itertools
import json
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmnorm.generation import costs as module
from llmnorm.generation.contract import Sampling
from llmnorm.generation.cost_table import MACHINES, TABLE
from llmnorm.generation.costs import (
    LENGTHS,
    RETRY,
    Costs,
    DraftLengths,
    Size,
    best_length,
    costs_for,
    expected_tokens,
    size_of,
    speed_up,
)
from llmnorm.machine.processor import Processor
from llmnorm.models import LlmNormConfig
from llmnorm.models.building import build_model
from tests.running import ROOT

TARGET, DRAFT = Size(8, 26.0), Size(1, 0.7)
FLAT = {1: {1: (1.0, 0.0), 17: (1.0, 0.0)}, 16: {1: (1.0, 0.0), 17: (1.0, 0.0)}}
STEEP = {1: {1: (1.0, 0.0), 17: (17.0, 0.0)}, 16: {1: (16.0, 0.0), 17: (272.0, 0.0)}}


@dataclass
class Row:
    slot: int
    speculative: bool = True
    ids: list[int] = field(default_factory=list)

    @property
    def chooser(self) -> Any:
        return SimpleNamespace(sampling=Sampling(temperature=0, speculative=self.speculative))


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_are_those_of_every_outcome(acceptance: float) -> None:
    """Oracle: each number of accepted drafts by its probability, and one more token."""
    for drafted in range(6):
        outcomes = [acceptance**a * (1 - acceptance) for a in range(drafted)]
        outcomes.append(acceptance**drafted)
        expected = sum(p * (a + 1) for a, p in enumerate(outcomes))
        assert expected_tokens(acceptance, drafted) == pytest.approx(expected)


def test_costs_between_measured_points_lie_on_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: 10 layers and 100 million weights at 2 batches and 2 numbers of tokens."""
    times = {1: {1: (1.0, 0.1), 5: (2.0, 0.2)}, 3: {1: (2.0, 0.3), 5: (4.0, 0.9)}}
    some = Costs([times], Size(10, 100.0), Size(2, 10.0))
    # 1 row: 20 -> 40; 3 rows: 50 -> 130.
    assert some.v(1, 5) == pytest.approx(2.0)
    assert some.v(1, 3) == pytest.approx(1.5)
    assert some.v(2, 3) == pytest.approx((30 + 90) / 2 / 35)
    assert some.v(5, 1) == 1.0
    assert some.v(1, 9) == pytest.approx(3.0)
    assert some.v(5, 5) == pytest.approx(220 / 80)
    assert some.c(1) == pytest.approx((3 + module.PASS) / 20)
    assert some.c(3) == pytest.approx((7 + module.PASS) / 50)
    assert Costs([times], Size(10, 100.0)).c(3) == 0
    again = Costs([times], Size(10, 100.0), recurrent=True)
    assert again.v(1, 5) == pytest.approx(2.0 * (1 + module.ROLLBACK)) and again.v(1, 1) == 1
    assert Costs([times, FLAT], Size(10, 100.0)).v(1, 5) == pytest.approx(2.0), "the dearest"
    assert Costs([{1: {1: (1.0, 0), 5: (0.9, 0)}}], Size(1, 1)).v(1, 5) == 1.0, "noise"
    monkeypatch.setattr(module, "DRAWN", 0.5)
    drawn = Costs([times], Size(10, 100.0, 2000), Size(2, 10.0, 2000))
    assert drawn.v(1, 5) == pytest.approx(2.0)
    assert drawn.v(1, 5, 1) == pytest.approx((40 + 5) / (20 + 1))
    assert drawn.v(3, 5, 2) == pytest.approx((130 + 10) / (50 + 2))
    assert drawn.c(3, 2) == pytest.approx((7 + module.PASS + 2) / (50 + 2))


times = st.builds(
    lambda step, slopes: {
        b: {1: (step * b**0.5, 0.0), 17: (step * b**0.5 * (1 + s), 0.0)}
        for b, s in zip((1, 4), slopes, strict=True)
    },
    st.floats(0.5, 2),
    st.lists(st.floats(0, 12), min_size=2, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(
    times,
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(0, 2),
    st.floats(0.01, 0.5),
)
def test_the_best_length_is_that_of_all_ways_to_draft(
    table: Any, acceptances: list[float], riding: int, share: float
) -> None:
    """Oracle: every combination of lengths of the rows; a pass is as wide as its longest row."""
    some = Costs([table], Size(1, 0.0), Size(1, 0.0))
    object.__setattr__(some, "c", lambda batch, drawn: share)
    batch = len(acceptances) + riding

    def gain(lengths: tuple[int, ...]) -> float:
        pairs = zip(acceptances, lengths, strict=True)
        made = sum(expected_tokens(p, k) for p, k in pairs) + riding
        return made / batch / (max(lengths) * share + some.v(batch, max(lengths) + 1))

    best = max(map(gain, itertools.product((0, *LENGTHS), repeat=len(acceptances))))
    found = best_length(acceptances, some, riding=riding)
    if found:
        assert gain((found,) * len(acceptances)) == pytest.approx(best)
        assert best >= module.ON
    else:
        assert best < module.ON + 1e-9


def test_a_length_in_use_stays_until_another_is_clearly_better() -> None:
    """Oracle: the lengths chosen anew for acceptances that waver, which change often."""
    some = costs_of(Processor("AMD", 25, "AVX2"))
    chosen = [best_length([p / 500] * 4, some) for p in range(500)]
    switch = min(n for n in range(1, 500) if 0 < chosen[n - 1] != chosen[n]) / 500
    wavering = [switch + 0.01 * math.sin(n) for n in range(200)]
    now, kept, anew = 0, [], []
    for p in wavering:
        now = best_length([p] * 4, some, now=now)
        kept.append(now)
        anew.append(best_length([p] * 4, some))
    changes = [sum(a != b for a, b in itertools.pairwise(some)) for some in (kept, anew)]
    assert changes[0] <= 2 < 10 < changes[1]
    between = (module.ON + module.OFF) / 2
    border = next(p / 1000 for p in range(1000) if speed_up(p / 1000, 1, 4, some) >= between)
    assert best_length([border] * 4, some, now=0) == 0
    assert best_length([border] * 4, some, now=1) == 1
    assert best_length([border - 0.1] * 4, some, now=1) == 0


def costs_of(kind: Processor) -> Costs:
    return Costs([TABLE[kind][1]], TARGET, DRAFT)


def test_one_good_row_does_not_make_all_rows_pay() -> None:
    """Oracle: the speed-up of the whole pass, which is below 1 though the row's own is not."""
    table = {1: {1: (1.0, 0.0), 5: (1.2, 0.0)}, 8: {1: (4.0, 0.0), 5: (9.0, 0.0)}}
    some = Costs([table], Size(1, 0.0))
    assert best_length([0.8], some)
    assert not best_length([0.8, *[0.05] * 7], some)
    assert best_length([0.8], some, riding=7) == 0


def simulated(lengths: DraftLengths, acceptance: float, rows: int, rounds: int) -> float:
    """The speed-up over plain decoding, by the costs, of rounds with random acceptance."""
    draws, slots = random.Random(0), [Row(n) for n in range(rows)]
    made = time = 0.0
    for _ in range(rounds):
        counts = lengths.counts(slots)
        for row, count in zip(slots, counts, strict=True):
            run = itertools.takewhile(lambda _: draws.random() < acceptance, range(count))
            accepted = len(list(run))
            lengths.observe(row.slot, count, accepted)
            made += accepted + 1
        most = max(counts)
        time += most * lengths.costs.c(rows) + lengths.costs.v(rows, most + 1)
    return made / rows / time


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", list(TABLE), ids=str)
@pytest.mark.parametrize("acceptance", [0.02, 0.4, 0.7, 0.95])
def test_lengths_come_near_the_best_one(acceptance: float, rows: int, kind: Processor) -> None:
    """Oracle: the best constant length for the true acceptance, none among them."""
    some = costs_of(kind)
    best = max(1.0, *(speed_up(acceptance, k, rows, some) for k in LENGTHS))
    found = simulated(DraftLengths(some, "auto"), acceptance, rows, 1200 // rows)
    assert found >= 0.93 * best
    assert found >= 0.97


def test_what_does_not_pay_is_tried_again_and_comes_back() -> None:
    """Oracle: the rounds, counted: one of RETRY while nothing is accepted, soon all afterwards."""
    lengths, rows = DraftLengths(Costs([STEEP], Size(1, 0)), "auto"), [Row(0)]
    drafted = []
    for _ in range(3 * RETRY + 1):
        (count,) = lengths.counts(rows)
        lengths.observe(0, count, 0)
        drafted.append(count)
    tried = [n for n, count in enumerate(drafted) if count]
    assert set(drafted) == {0, 1} and len(tried) == 4
    assert {b - a for a, b in itertools.pairwise(tried)} == {RETRY}
    lengths.costs = Costs([FLAT], Size(1, 0))
    rounds = 0
    while lengths.length < 6 and rounds < 2 * RETRY:
        (count,) = lengths.counts(rows)
        lengths.observe(0, count, count)
        rounds += 1
    assert lengths.length >= 6


def test_a_lookup_is_tried_until_it_finds_something() -> None:
    """Oracle: the rounds, counted: a try without a match costs nothing and is made again."""
    table = {1: {1: (1.0, 0.0), 2: (1.3, 0.0), 17: (2.0, 0.0)}}
    lengths, rows = DraftLengths(Costs([table], Size(1, 0))), [Row(0)]
    for _ in range(5):
        assert lengths.counts(rows) == [1]
        lengths.observe(0, 0, 0)
    lengths.counts(rows)
    lengths.observe(0, 1, 0)
    assert [lengths.counts(rows)[0] for _ in range(RETRY)] == [0] * (RETRY - 1) + [1]
    for _ in range(30):
        (count,) = lengths.counts(rows)
        lengths.observe(0, count, count)
    assert lengths.length >= 8


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("found", [0.0, 0.3, 1.0])
def test_the_gain_counts_rows_without_drafts(rows: int, found: float) -> None:
    """Oracle: every set of rows for which a lookup has tokens, by its probability."""
    some = Costs([{1: {1: (1.0, 0.0), 17: (9.0, 0.0)}}], Size(1, 0.0), Size(1, 0.0))
    acceptances, made, time = [0.9, 0.5, 0.7][:rows], 0.0, 0.0
    for having in itertools.product((True, False), repeat=rows):
        chance = math.prod(found if has else 1 - found for has in having)
        pairs = zip(acceptances, having, strict=True)
        tokens = [expected_tokens(p, 3) if has else 1 for p, has in pairs]
        made += chance * sum(tokens)
        time += chance * (3 * some.c(rows) + some.v(rows, 4) if any(having) else 1.0)
    expected = made / rows / time
    assert module._gain(acceptances, 3, some, found=found) == pytest.approx(expected)


def test_a_lookup_that_finds_little_is_not_asked_for_long_drafts() -> None:
    """Oracle: the speed-up by the costs of simulated rounds: every token found is accepted.

    With half of the rows found, rounds of 8 rows cost more than they give by this table.
    """
    table = {8: {1: (1.0, 0.0), 2: (1.6, 0.0), 5: (2.6, 0.0), 17: (6.0, 0.0)}}
    some, slots, draws = Costs([table], Size(1, 0.0)), [Row(n) for n in range(8)], random.Random(0)
    lengths, made, time = DraftLengths(some), 0, 0.0
    for _ in range(400):
        counts = lengths.counts(slots)
        drafted = [count * (draws.random() < 0.3) for count in counts]
        if any(counts):
            lengths.proposed(sum(c > 0 for c in counts), sum(d > 0 for d in drafted))
        for row, count in zip(slots, drafted, strict=True):
            lengths.observe(row.slot, count, count)
        made += sum(drafted) + 8
        time += some.v(8, max(drafted) + 1)
    assert made / 8 / time >= 0.97


def test_rows_have_lengths_of_their_own() -> None:
    """Oracle: by hand: none where the request wants none, few where the last would be rejected."""
    lengths = DraftLengths(Costs([FLAT], Size(1, 0)), "auto")
    rows = [Row(0), Row(1), Row(2, speculative=False)]
    for _ in range(20):
        counts = lengths.counts(rows)
        lengths.observe(0, counts[0], counts[0])
        lengths.observe(1, counts[1], 0)
    counts = lengths.counts(rows)
    assert counts[0] == lengths.length > counts[1] > counts[2] == 0
    low = lengths.acceptance(1)
    assert low ** counts[1] >= module.LEAST > low ** (counts[1] + 1)
    lengths.release(0)
    lengths.move(1, 0)
    assert lengths.acceptance(0) == low < lengths.acceptance(1)
    assert DraftLengths(lengths.costs, 3).counts(rows) == [3, 3, 0]
    assert DraftLengths(lengths.costs, "auto").counts([Row(0, speculative=False)]) == [0]


def test_the_table_is_of_costs() -> None:
    """Oracle: what any machine has: times above 0; more tokens in more rows cost more."""
    for kind, by_threads in TABLE.items():
        assert kind in MACHINES
        for table in by_threads.values():
            some = Costs([table], TARGET, DRAFT)
            for batch in (1, 2, 4, 8, 16, 32):
                assert 1 <= some.v(batch, 5) < some.v(batch, 17) < 40
                assert 0.005 < some.c(batch) < 0.2


def test_a_table_is_that_of_the_published_figures() -> None:
    """Oracle: docs/results/draft_costs.json, whose measured times were fitted."""
    file = ROOT / "docs/results/draft_costs.json"
    published = json.loads(file.read_text(encoding="utf-8"))["table"]
    tables = [json.loads(json.dumps(table)) for table in TABLE.values()]
    assert any(published.items() <= table.items() for table in tables)


def test_which_table_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a known processor's, by threads; all of them elsewhere; layers on a GPU."""
    kind = Processor("Intel", 6, "AVX512")
    monkeypatch.setattr(module, "processor", lambda: kind)
    for threads, key in ((1, 1), (2, 2), (7, 2)):
        found = costs_for(TARGET, DRAFT, threads=threads)
        assert found.tables == [TABLE[kind][key]]
        assert found.says == f"draft lengths: costs of {MACHINES[kind]}, {key} thread(s)"
    monkeypatch.setattr(module, "processor", lambda: Processor("", 0, "none"))
    unknown = costs_for(TARGET, DRAFT)
    assert unknown.v(4, 5) == max(costs_of(k).v(4, 5) for k in TABLE) or len(unknown.tables) > 2
    assert "an unknown processor family 0, none has none" in unknown.says
    gpu = costs_for(TARGET, DRAFT, device="cuda")
    assert gpu.v(8, 5) == 1 and 1 / 8 < gpu.c(8) < 1 / 4
    assert "nothing is measured on cuda" in gpu.says


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_counts_what_a_pass_reads(tied: bool) -> None:
    """Oracle: the shapes; an embedding is one row of a table, unless it is the head as well."""
    config = LlmNormConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    weights = 50 * 8 + 3 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
    assert size_of(build_model(config, seed=0)) == Size(3, weights / 1e6, 50)
