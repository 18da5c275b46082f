"""A model as a draft: its proposals are what it would say, whatever was accepted and rejected."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from llmnorm.generation import model_draft as module
from llmnorm.generation.contract import Proposal, Sampling
from llmnorm.generation.model_draft import ModelDraft, check_draft
from llmnorm.generation.sampling import RowChooser, verify
from llmnorm.models import LlmNormForCausalLM
from llmnorm.models.decoding import Decoder
from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.layer_cache import KEPT, VERIFIED
from llmnorm.part import InputError
from tests.models.cache_rounds import MODELS, VOCABULARY, build, held

SLOTS, LONGEST = 3, 150
GREEDY = Sampling(temperature=0)


@dataclass
class Row:
    """A row of the target, as a draft sees it."""

    slot: int
    ids: list[int]
    chooser: RowChooser

    def commit(self, tokens: list[int]) -> None:
        self.chooser.settle()
        for token in tokens:
            self.chooser.commit(token)
        self.ids += tokens


def row(slot: int, ids: list[int], sampling: Sampling = GREEDY, vocabulary: int = 0) -> Row:
    chooser = RowChooser(sampling, ids, frozenset(), vocabulary or VOCABULARY)
    return Row(slot, list(ids), chooser)


@cache
def model(name: str) -> LlmNormForCausalLM:
    return build(name)


class Watched:
    """A Decoder that notes the shape of every pass behind a cache of several rows, and others."""

    def __init__(self, name: str) -> None:
        self._decoder = Decoder(model(name), captured=False)
        self.context, self.vocabulary = self._decoder.context, self._decoder.vocabulary
        self.dtype, self.device = self._decoder.dtype, self._decoder.device
        self.says = self._decoder.says
        self.passes: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, int]] = []

    def new_cache(self) -> RaggedCache:
        return self._decoder.new_cache()

    def step(self, ids: Tensor, cache: RaggedCache, counts: Any = None, *, last: bool) -> Tensor:
        if cache.reserved is not None:
            self.passes.append(tuple(ids.shape))
        else:
            self.prompts.append(tuple(ids.shape))
        return self._decoder.step(ids, cache, counts, last=last)


@torch.no_grad()
def check(name: str, rows: list[Row], proposals: list[Proposal]) -> None:
    """Oracle: the model's own passes over row and drafts, without a cache, in float64."""
    for some, proposal in zip(rows, proposals, strict=True):
        if proposal.tokens:
            ids = torch.tensor([some.ids + proposal.tokens[:-1]])
            likeliest = model(name)(ids).logits[0, len(some.ids) - 1 :].argmax(-1).tolist()
            assert proposal.tokens == likeliest


Choose = Callable[[int, int], int]


def play(name: str, choose: Choose, rounds: int) -> Watched:
    """Rounds over rows that come and go, with drafts accepted and rejected as `choose` says."""
    watched = Watched(name)
    draft = ModelDraft(watched, SLOTS, context=LONGEST)

    def some(low: int, high: int) -> list[int]:
        return [choose(0, VOCABULARY - 1) for _ in range(choose(low, high))]

    rows = {slot: row(slot, some(1, 70)) for slot in range(SLOTS)}
    for _ in range(rounds):
        slot = choose(0, SLOTS - 1)
        if slot not in rows:
            rows[slot] = row(slot, some(1, 70))
        elif choose(0, 5) == 0:  # another request in its place, which may begin as it did
            if choose(0, 1):
                draft.release(slot)
            kept = rows[slot].ids[: choose(1, len(rows[slot].ids))]
            rows[slot] = row(slot, kept + some(0, 4))
        elif choose(0, 5) == 0:
            free = [n for n in range(SLOTS) if n not in rows]
            if free:
                rows[free[0]] = rows.pop(slot)
                rows[free[0]].slot = free[0]
                draft.move(slot, free[0])
        asked = list(rows.values())
        counts = [choose(0, 4) for _ in asked]
        proposals = draft.propose(asked, counts)
        assert [len(p.tokens) for p in proposals] == counts
        check(name, asked, proposals)
        for one, proposal in zip(asked, proposals, strict=True):
            accepted = proposal.tokens[: choose(0, len(proposal.tokens))]
            # Rows without drafts may gain more than a draft's row can.
            one.commit([*accepted, *some(1, 1 if proposal.tokens else 40)])
            if len(one.ids) > LONGEST - 45:
                draft.release(one.slot)
                del rows[one.slot]
    return watched


@pytest.mark.parametrize("name", MODELS)
@settings(
    max_examples=5,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shrink a failure takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.randoms(use_true_random=False))
def test_proposals_are_greedy_continuations(name: str, choices: Any) -> None:
    """Oracle: full passes (`check`), after any history of rows, acceptance and rejection."""
    play(name, choices.randint, 12)


def left_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejected token stays in the cache."""
    monkeypatch.setattr(
        module._Row, "common", lambda self, ids: min(len(self.tokens), len(ids) - 1)
    )


def one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback takes one token less back than it should."""
    true = RaggedCache.rollback
    monkeypatch.setattr(
        RaggedCache, "rollback", lambda self, counts: true(self, [max(0, n - 1) for n in counts])
    )


def neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row gets the drafts of the one before it."""
    true = module.draw
    monkeypatch.setattr(module, "draw", lambda rows, logits: true(rows, logits.roll(1, 0)))


def copied_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's row lacks its last token."""
    true = ModelDraft._run_beside

    def run(self: ModelDraft, blocks: dict[int, list[int]]) -> None:
        true(self, {slot: tokens[:-1] for slot, tokens in blocks.items()})
        for slot, tokens in blocks.items():
            self._rows[slot].tokens.append(tokens[-1])

    monkeypatch.setattr(ModelDraft, "_run_beside", run)


def copied_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of prompts that are run beside each other change places."""
    true = ModelDraft._replace

    def replace(self: ModelDraft, slot: int, source: RaggedCache, row: int) -> None:
        true(self, slot, source, len(source.lengths) - 1 - row)

    monkeypatch.setattr(ModelDraft, "_replace", replace)


@pytest.mark.parametrize("plant", [left_in, one_short, neighbour, copied_late, copied_to_another])
@pytest.mark.parametrize("name", ["softmax", "gated_delta"])
def test_planted_errors_are_caught(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `play` passes on the draft as it is, with the same choices."""
    import random

    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(4):
            play(name, random.Random(seed).randint, 12)


def rounds(draft: ModelDraft, rows: list[Row], counts: list[int]) -> Iterator[list[Proposal]]:
    while True:
        yield draft.propose(rows, counts)


@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_a_round_of_four_drafts_has_four_passes(accepted: int) -> None:
    """Oracle: the passes, noted: the first is two tokens wide where all drafts were accepted."""
    watched = Watched("softmax")
    draft = ModelDraft(watched, SLOTS)
    rows = [row(0, [1, 2, 3]), row(1, [4] * 40), row(2, [7])]
    draft.propose(rows, [4, 4, 4])
    assert watched.prompts == [(2, 39)] and watched.passes == [(3, 1)] * 4
    for _ in range(6):
        for some, proposal in zip(rows, draft.propose(rows, [4, 4, 4]), strict=True):
            assert len(proposal.tokens) == 4
            some.commit([*proposal.tokens[:accepted], 5])
        watched.passes.clear()
        draft.propose(rows, [4, 4, 4])
        assert watched.passes == [(3, 1 + (accepted == 4))] + [(3, 1)] * 3
        for some in rows:
            some.chooser.settle()


def test_rows_that_want_fewer_tokens_leave_the_later_passes() -> None:
    """Oracle: the passes, noted: the last row that wants one more is the last of the pass."""
    watched = Watched("softmax")
    draft = ModelDraft(watched, SLOTS)
    rows = [row(0, [1, 2]), row(1, [3, 4]), row(2, [5, 6])]
    proposals = draft.propose(rows, [1, 3, 2])
    assert [len(p.tokens) for p in proposals] == [1, 3, 2]
    assert watched.passes == [(3, 1), (3, 1), (2, 1)]
    watched.passes.clear()
    for some in rows:
        some.commit([9])
    assert draft.propose(rows, [0, 0, 0]) == [Proposal([])] * 3
    assert not watched.passes
    draft.propose([rows[2], rows[0]], [1, 2])  # in any order
    assert watched.passes == [(3, 1), (1, 1)]
    check("softmax", [rows[2]], [Proposal(draft.propose(rows[2:], [3])[0].tokens)])


@pytest.mark.parametrize("name", ["softmax", "nala"])
def test_rows_that_rode_along_catch_up_together(name: str) -> None:
    """Oracle: full passes, and the shapes: 17 tokens a pass up to KEPT, else one row alone."""
    watched = Watched(name)
    draft = ModelDraft(watched, SLOTS)
    rows = [row(n, [n + 1, 5]) for n in range(SLOTS)]
    draft.propose(rows, [1, 1, 1])
    for some, gained in zip(rows, (40, 2, KEPT + 9), strict=True):
        some.commit([(3 * i + some.slot) % VOCABULARY for i in range(gained)])
    watched.passes.clear()
    watched.prompts.clear()
    check(name, rows, draft.propose(rows, [2, 2, 2]))
    assert watched.prompts == [(1, KEPT + 8)]
    assert [shape for shape in watched.passes if shape[1] > 2] == [(1, VERIFIED)] * 3


@pytest.mark.parametrize("name", MODELS)
def test_a_reserved_cache_neither_grows_nor_moves(name: str) -> None:
    """Oracle: the bytes told and the buffers' addresses, up to rows of full context."""
    draft = ModelDraft(Watched(name), SLOTS, context=60)
    rows = [row(n, [n + 1] * 30) for n in range(SLOTS)]
    draft.propose(rows, [1, 1, 1])
    before = {t.data_ptr() for layer in draft._cache.layers for t in buffers(layer)}
    while len(rows[2].ids) < 54:
        for some, proposal in zip(rows, draft.propose(rows, [4, 1, 2]), strict=True):
            some.commit([*proposal.tokens[: some.slot], 3])
    assert 54 <= len(rows[2].ids) <= 58
    rows[1].commit([4] * (60 - len(rows[1].ids)))
    draft.propose(rows, [2, 0, 1])
    assert before == {t.data_ptr() for layer in draft._cache.layers for t in buffers(layer)}
    assert held([draft._cache]) <= draft.bytes


def buffers(layer: Any) -> list[Tensor]:
    return [*layer._kept, *layer._ring] if hasattr(layer, "_ring") else [layer.keys, layer.values]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=7), Sampling(seed=None)])
def test_a_model_that_drafts_for_itself_is_always_accepted(sampling: Sampling) -> None:
    """Oracle: p = q: every draft is accepted, by argmax, by shared noise, by rejection."""
    draft = ModelDraft(Watched("softmax"), SLOTS)
    rows = [row(n, [n + 1, 5], sampling) for n in range(SLOTS)]
    for _ in range(5):
        proposals = draft.propose(rows, [4, 2, 3])
        certain = sampling.temperature == 0 or sampling.seed is not None
        assert all((p.distributions is None) == certain for p in proposals)
        choosers, longest = [some.chooser for some in rows], max(len(r.ids) for r in rows) + 4
        ids = torch.zeros(SLOTS, longest, dtype=torch.long)
        for some, proposal in zip(rows, proposals, strict=True):
            line = some.ids + proposal.tokens
            ids[some.slot, : len(line)] = torch.tensor(line)
        with torch.no_grad():
            logits = model("softmax")(ids).logits
        first = [len(some.ids) - 1 for some in rows]
        for some, verdict in zip(rows, verify(choosers, logits, first, proposals), strict=True):
            assert verdict.accepted == [4, 2, 3][some.slot]
            some.ids += verdict.tokens


def test_a_made_up_draft_is_certain_among_drawn_ones() -> None:
    """Oracle: by hand: of three drafts the second was no draw."""
    laws = [torch.tensor([0.5, 0.5, 0.0]), None, torch.tensor([0.0, 0.0, 1.0])]
    found = module._together([1, 0, 2], laws)
    assert found is not None
    assert found.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert module._together([1, 2], [None, None]) is None


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 6, VOCABULARY + 6])
def test_logits_are_those_of_the_targets_vocabulary(vocabulary: int) -> None:
    """Oracle: the likeliest of the tokens that both have."""
    draft = ModelDraft(Watched("softmax"), SLOTS, vocabulary=vocabulary)
    sampling = Sampling(seed=None)
    rows = [row(n, [n + 1, 5], sampling, vocabulary) for n in range(SLOTS)]
    both = min(vocabulary, VOCABULARY)
    for some, proposal in zip(rows, draft.propose(rows, [1, 1, 1]), strict=True):
        assert proposal.distributions is not None
        with torch.no_grad():
            logits = model("softmax")(torch.tensor([some.ids])).logits[0, -1, :both]
        expected = torch.zeros(vocabulary, dtype=torch.float64)
        expected[:both] = (logits / sampling.temperature).softmax(-1)
        torch.testing.assert_close(proposal.distributions[0].double(), expected, atol=1e-6, rtol=0)


def test_a_draft_that_does_not_fit_is_refused() -> None:
    """Oracle: one line that names the draft, what is wrong and the nearest way."""
    step = Watched("softmax")
    with pytest.raises(InputError, match=rf"takes {step.context} tokens .* a row may have 9000"):
        ModelDraft(step, SLOTS, context=9000)

    def tokenizer(**vocabulary: int) -> Any:
        return SimpleNamespace(get_vocab=lambda: vocabulary)

    check_draft(tokenizer(a=0, b=1), tokenizer(b=1, a=0))
    with pytest.raises(InputError, match=r"^small: .*\(2 tokens, the model's 2; id 1 is 'c', "):
        check_draft(tokenizer(a=0, b=1), tokenizer(a=0, c=1), "small")
    with pytest.raises(InputError, match=r"3 tokens, the model's 2; id 2 is 'c', .* is no token\)"):
        check_draft(tokenizer(a=0, b=1), tokenizer(a=0, b=1, c=2))
