"""Batches that are held to full passes, rows that run in them, and drafts that know the answers.

The oracle of a pass is one without a cache over each row's tokens, in float64: every logit of every
block, within 1e-12 where all layers keep keys and values and within 1e-10 where one keeps a state.
What tokens a batch's rows hold is followed here from the verbs alone, so a batch that holds others,
at other positions, or sees padding, is found in its next pass.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmnorm.generation.contract import DraftedRow, Event, Proposal, Request, Sampling
from llmnorm.generation.row import Row, rows_of
from llmnorm.generation.stacks import PaddedStacks, Place, SlotStacks, Stack, Stacks
from llmnorm.models.decoding import Decoder
from llmnorm.models.foreign_decoding import ForeignStep
from llmnorm.nn.recurrent_cache import RecurrentCache
from tests.models.cache_rounds import MODELS, VOCABULARY, build
from tests.models.test_foreign_decoding import stock

CONTEXT = 96
FOREIGN = ["Llama, padded", "GPT2, padded", "Llama, foreign", "GPT2, foreign"]
KINDS = [*MODELS, *FOREIGN]


class WrongLogitsError(AssertionError):
    """A batch's logits are not those of full passes."""


class Target:
    """A model of KINDS, and its batches, held to passes without a cache.

    Attributes:
        stacks: the batches that were made, one behind the other.
    """

    def __init__(self, kind: str) -> None:
        name, _, where = kind.partition(", ")
        self._bound = 1e-12
        if kind in MODELS:
            model = build(kind)
            # Traced graphs take seconds to make; that they equal eager steps: tests/models.
            self.plain: Stacks = SlotStacks(Decoder(model, captured=False))
            layers = model.model.new_cache().slots.layers
            if any(isinstance(layer, RecurrentCache) for layer in layers):
                self._bound = 1e-10
        else:
            length = "n_positions" if name == "GPT2" else "max_position_embeddings"
            model = stock(name, **{length: CONTEXT})
            self.plain = (
                PaddedStacks(model) if where == "padded" else SlotStacks(ForeignStep(model))
            )
        self.model = model

    @property
    def stacks(self) -> "CheckedStacks":
        """Batches whose passes are checked."""
        return CheckedStacks(self.plain, self)

    @torch.no_grad()
    def full(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (rows, longest, vocabulary); what stands behind a row's end means nothing."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits

    def check(self, row: Sequence[int], found: Tensor, wanted: Tensor) -> None:
        """Compare logits (tokens, vocabulary) of a row's last tokens."""
        off = float((found - wanted).abs().max())
        if not off <= self._bound:
            raise WrongLogitsError(f"row of {len(row)} tokens {list(row)}: logits off by {off}")

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Prompts with their likeliest continuations, by full passes."""
        rows = [list(prompt) for prompt in prompts]
        for _ in range(tokens):
            logits = self.full(rows)
            for row, some in zip(rows, logits, strict=True):
                row.append(int(some[len(row) - 1].argmax()))
        return rows


@cache
def target(kind: str) -> Target:
    """One for all tests."""
    return Target(kind)


class CheckedStacks(Stacks):
    """Batches of a target that follow what tokens their rows hold."""

    def __init__(self, inner: Stacks, of: Target) -> None:
        self._inner, self._of = inner, of
        self.context, self.vocabulary = inner.context, inner.vocabulary
        self.made: list[int] = []

    def prompt(self, ids: Sequence[int]) -> "CheckedStack":
        """A batch of one row."""
        return CheckedStack(self._inner.prompt(ids), [list(ids)], self._of)

    def stack(self, places: Sequence[Place]) -> "CheckedStack":
        """A batch of copies; `made` notes how many."""
        self.made.append(len(places))
        inner, ids = [], []
        for stack, row in places:
            assert isinstance(stack, CheckedStack)
            inner.append((stack.inner, row))
            ids.append(list(stack.ids[row]))
        return CheckedStack(self._inner.stack(inner), ids, self._of)

    def exchange(self, batch: Stack, places: Sequence[Place]) -> tuple[Stack, list[int]]:
        """As above, and the batch that is given up cannot be used again."""
        assert isinstance(batch, CheckedStack)
        inner = [(s.inner, row) for s, row in places if isinstance(s, CheckedStack)]
        ids = [list(s.ids[row]) for s, row in places if isinstance(s, CheckedStack)]
        made, copied = self._inner.exchange(batch.inner, inner)
        del batch.inner
        self.made.append(len(copied))
        return CheckedStack(made, ids, self._of), copied


class CheckedStack(Stack):
    """A batch of which every pass is compared with a full one."""

    def __init__(self, inner: Stack, ids: list[list[int]], of: Target) -> None:
        self.inner, self.ids, self._of = inner, ids, of

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """Tokens that each row holds."""
        assert self.inner.lengths == [len(row) for row in self.ids]
        return self.inner.lengths

    @property
    def aligned(self) -> bool:
        """As the batch says."""
        return self.inner.aligned

    def feed(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """The batch's pass, and a full one."""
        logits = self.inner.feed(blocks)
        for row, block in zip(self.ids, blocks, strict=True):
            row += block
        full = self._of.full(self.ids)
        for row, block, found, wanted in zip(self.ids, blocks, logits, full, strict=True):
            self._of.check(row, found[: len(block)], wanted[len(row) - len(block) : len(row)])
        return logits

    def drop(self, counts: Sequence[int]) -> None:
        """Of both."""
        self.inner.drop(counts)
        self.ids = [row[: len(row) - count] for row, count in zip(self.ids, counts, strict=True)]


class Guesses:
    """A draft that knows the texts, and proposes their tokens or others, as `right` says.

    It follows rows by their slots: a row that comes under the number of another, or a number beyond
    the rows that are under way, is found.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        right: Callable[[], bool] = lambda: True,
        slots: int = 10**6,
    ) -> None:
        self._texts, self._right, self._slots = [list(text) for text in texts], right, slots
        self.seen: dict[int, list[int]] = {}
        self.asked: list[list[int]] = []

    def propose(self, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[Proposal]:
        """The known tokens, or others."""
        self.asked.append(list(counts))
        assert len({row.slot for row in rows}) == len(rows)
        proposals = []
        for row, count in zip(rows, counts, strict=True):
            assert 0 <= row.slot < self._slots and count >= 0
            before = self.seen.get(row.slot, [])
            assert row.ids[: len(before)] == before, "another row, and no word of it"
            self.seen[row.slot] = list(row.ids)
            known = next((t for t in self._texts if t[: len(row.ids)] == row.ids), row.ids)
            tokens = known[len(row.ids) : len(row.ids) + count]
            proposals.append(
                Proposal([t if self._right() else (t + 1) % VOCABULARY for t in tokens])
            )
        return proposals

    def move(self, source: int, row: int) -> None:
        """A row has another number now."""
        assert row not in self.seen, "the number was free"
        if source in self.seen:
            self.seen[row] = self.seen.pop(source)

    def release(self, row: int) -> None:
        """A number is free."""
        self.seen.pop(row, None)


def rows_for(
    prompts: Sequence[Sequence[int]], ends: Sequence[int] = (), **sampling: Any
) -> list[Row]:
    """Greedy rows, request n for prompt n."""
    own = Sampling(**{"temperature": 0, "max_tokens": 12} | sampling)
    rows = []
    for number, prompt in enumerate(prompts):
        rows += rows_of(
            number,
            Request(tuple(prompt), own),
            tokenizer=None,
            ends=ends,
            vocabulary=VOCABULARY,
            context=CONTEXT,
        )
    return rows


def answers(events: Sequence[Event], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each prompt's tokens; every row has one last event, and none behind it."""
    found: list[list[int]] = [[] for _ in prompts]
    finished: set[int] = set()
    for event in events:
        assert event.request not in finished and event.row == 0
        found[event.request] += event.tokens
        if event.finish is not None:
            finished.add(event.request)
    assert finished == set(range(len(prompts)))
    return found


def expected(
    texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], ends: Sequence[int], most: int
) -> list[list[int]]:
    """The answers in greedy texts, up to an end token, included, or `most` tokens."""
    found = []
    for text, prompt in zip(texts, prompts, strict=True):
        answer = list(text[len(prompt) : len(prompt) + most])
        end = next((n for n, token in enumerate(answer) if token in ends), len(answer))
        found.append(answer[: end + 1])
    return found
