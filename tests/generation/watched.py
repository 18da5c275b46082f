"""Rows of the engine held to full passes without a cache, and drafts that are right when told so.

The oracle of a greedy row is one pass over all of its tokens: each generated token is the likeliest
one there, so by induction the row is what plain decoding gives; and the logits that the engine has
chosen from are those of the pass, in float64, within 1e-12 where all layers keep keys and values
and within 1e-10 where one keeps a state. Equal tokens alone would prove little: a position that is
off by one seldom moves the largest logit.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Draft, DraftedRow, Event, Proposal, Request, Sampling
from llmnorm.generation.engine import Engine
from llmnorm.models import LlmNormForCausalLM
from llmnorm.models.decoding import Decoder
from llmnorm.nn.recurrent_cache import RecurrentCache
from tests.models.cache_rounds import VOCABULARY, build

CONTEXT = 72
GREEDY = Sampling(temperature=0, max_tokens=20)


class WrongTextError(AssertionError):
    """A row is not what full passes give."""


@dataclass
class Answer:
    """What a row has got: its tokens, the logits they were chosen from, its end."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    accepted: int = 0
    finish: str | None = None
    message: str | None = None


class Watched:
    """An engine whose rows are kept, with the logits of every committed token."""

    def __init__(
        self,
        model: LlmNormForCausalLM,
        draft: Draft | None = None,
        *,
        ends: Sequence[int] = (),
        captured: bool = False,
        **settings: Any,
    ) -> None:
        settings = {"slots": 4, "context": CONTEXT, "draft_tokens": 4, **settings}
        # Graphs take seconds to make; that they equal eager steps: tests/models/test_decoding.py.
        step = Decoder(model, captured=captured)
        self.model, self.draft = model, draft
        self.engine = Engine(step, None, GenerationSettings(**settings), draft, ends=ends)
        self.ends = set(ends)
        self.answers: dict[tuple[int, int], Answer] = {}
        self.rounds: list[list[Event]] = []
        self._feed = self.engine._slots.feed
        self._fed: dict[tuple[int, int], Tensor] = {}
        self.engine._slots.feed = self._watch  # type: ignore[method-assign]

    def _watch(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        logits = self._feed(blocks)
        rows = self.engine._rows
        self._fed |= {(r.request, r.row): some for r, some in zip(rows, logits, strict=True)}
        return logits

    def add(self, prompt: Sequence[int], n: int = 1, **sampling: Any) -> int:
        """Queue a greedy request."""
        own = Sampling(**{"temperature": 0, "max_tokens": 20, **sampling})
        return self.add_request(Request(tuple(prompt), own, n))

    def add_request(self, request: Request) -> int:
        """Queue a request, a greedy one."""
        number = self.engine.add(request)
        for row in range(request.n):
            self.answers[number, row] = Answer(request)
        return number

    def step(self) -> list[Event]:
        """One step of the engine, its events kept."""
        return self._kept(self.engine.step())

    def abort(self, number: int) -> None:
        """End a request."""
        self._kept(self.engine.abort(number))

    def _kept(self, events: list[Event]) -> list[Event]:
        for event in events:
            answer = self.answers[event.request, event.row]
            assert answer.finish is None, "an event behind a row's last one"
            answer.tokens += event.tokens
            if event.tokens:
                answer.logits += list(self._fed[event.request, event.row][: len(event.tokens)])
            if event.finish is None and len(event.tokens) != event.accepted + 1:
                raise WrongTextError(f"{event}: not the accepted tokens and the bonus")
            answer.accepted += event.accepted
            answer.finish, answer.message = event.finish, event.message
        self.rounds.append(events)
        return events

    def run(self) -> list[Answer]:
        """Step until nothing is left; all answers, by request."""
        while not self.engine.idle:
            self.step()
        return list(self.answers.values())

    def check(self) -> float:
        """Hold every answer to the oracle; the largest difference of a logit."""
        answers = list(self.answers.values())
        return check(self.model, answers, self.ends, self.engine._context).worst


class Held(NamedTuple):
    """What rows have shown against full passes.

    Attributes:
        worst: the largest difference of a logit.
        ties: rows of float32 that have chosen another token than float64, within their rounding.
    """

    worst: float
    ties: int


@torch.no_grad()
def check(
    model: LlmNormForCausalLM, answers: Sequence[Answer], ends: set[int], context: int
) -> Held:
    """Hold answers to one pass in float64 over all of their tokens.

    A row of a float64 model has the likeliest token everywhere. One of a float32 model may have
    another where the two logits are closer than twice the largest error of a logit of its own
    step; each later token is held to what it follows.
    """
    exact = next(model.parameters()).dtype == torch.float64
    oracle = model if exact else copy.deepcopy(model).double()
    # Without the last token, which no row has run.
    rows = [[*answer.request.prompt, *answer.tokens[:-1]] for answer in answers]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    whole = oracle(ids).logits  # what stands behind a row, it does not see
    states = [isinstance(n, RecurrentCache) for n in model.model.new_cache().slots.layers]
    bound = (1e-10 if any(states) else 1e-12) if exact else 1e-4 * float(whole.std())
    worst, ties = 0.0, 0
    for answer, logits in zip(answers, whole, strict=True):
        prompt = answer.request.prompt
        expected = logits[len(prompt) - 1 :][: len(answer.tokens)]
        if answer.tokens:
            errors = (torch.stack(answer.logits) - expected).abs().amax(-1)
            worst = max(worst, float(errors.max()))
            if not worst <= bound:
                raise WrongTextError(f"{prompt}: logits are off by {worst}")
            chosen = expected.gather(-1, torch.tensor(answer.tokens).unsqueeze(-1)).squeeze(-1)
            margin = expected.amax(-1) - chosen
            if bool((margin > (0.0 if exact else 2 * errors)).any()):
                likeliest = expected.argmax(-1).tolist()
                raise WrongTextError(f"{prompt}: {answer.tokens}, not {likeliest}")
            ties += bool((margin > 0).any())
        _check_end(answer, ends, context)
    return Held(worst, ties)


def _check_end(answer: Answer, ends: set[int], context: int) -> None:
    """Hold an answer to where it must end."""
    prompt, sampling = answer.request.prompt, answer.request.sampling
    stops = (set() if sampling.ignore_end else ends) | sampling.stop_tokens
    if any(token in stops for token in answer.tokens[:-1]):
        raise WrongTextError(f"{prompt}: {answer.tokens} goes on behind an end")
    limit = min(sampling.max_tokens, context - len(prompt) + 1)
    ended = bool(answer.tokens) and answer.tokens[-1] in stops
    full = len(answer.tokens) == limit
    finish = "stop" if ended else "length" if full else None
    if answer.finish not in ("abort", "error") and answer.finish != finish:
        raise WrongTextError(f"{prompt}: finish {answer.finish}, not {finish}")


class KnownDraft:
    """Proposes out of texts that are known, right or wrong as `right` tells.

    It holds the engine to what a draft is promised, too: rows by their slots, which are moved and
    released.

    Args:
        texts: token ids that the target gives.
        right: for each proposed token, whether it shall be the known one.
        fewer: of the tokens asked for, how many are proposed.
        in_front: whether rows are numbered by their order, from 0, as the engine's are.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        right: Callable[[], bool],
        fewer: Callable[[int], int] = lambda count: count,
        *,
        in_front: bool = True,
    ) -> None:
        self._texts = [list(text) for text in texts]
        self._right, self._fewer, self._in_front = right, fewer, in_front
        self._seen: dict[
            int, list[int]
        ] = {}  # what each slot's row had when it was last drafted for
        self.asked: list[list[int]] = []

    def propose(self, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[Proposal]:
        """The known tokens, or others."""
        if self._in_front:
            assert [row.slot for row in rows] == list(range(len(rows))), "rows stand in front"
        self.asked.append(list(counts))
        proposals = []
        for row, count in zip(rows, counts, strict=True):
            seen = self._seen.get(row.slot, [])
            assert row.ids[: len(seen)] == seen, "another row, and no word of it"
            self._seen[row.slot] = list(row.ids)
            known = next((t for t in self._texts if t[: len(row.ids)] == row.ids), row.ids)
            tokens = (known[len(row.ids) :] + [0] * count)[: self._fewer(count)]
            proposals.append(
                Proposal([t if self._right() else (t + 1) % VOCABULARY for t in tokens])
            )
        return proposals

    def move(self, source: int, row: int) -> None:
        """A row has another slot now."""
        assert row not in self._seen, "the slot was free"
        if source in self._seen:
            self._seen[row] = self._seen.pop(source)

    def release(self, row: int) -> None:
        """A slot is free."""
        self._seen.pop(row, None)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Uneven ones, from 1 token to `longest`, both among them."""
    chance = random.Random(seed)
    sizes = [1, longest, *(chance.randint(1, longest) for _ in range(count - 2))][:count]
    return [[chance.randrange(VOCABULARY) for _ in range(size)] for size in sizes]


_BUILT: dict[str, LlmNormForCausalLM] = {}
_TEXTS: dict[Any, list[list[int]]] = {}


def model_of(name: str) -> LlmNormForCausalLM:
    """A model of tests/models/cache_rounds.py, built once."""
    if name not in _BUILT:
        _BUILT[name] = build(name)
    return _BUILT[name]


def texts(
    model: LlmNormForCausalLM, starts: Sequence[Sequence[int]], most: int = 20
) -> list[list[int]]:
    """Each prompt with its greedy continuation, by plain rounds; of a model that is kept."""
    key = id(model), most, tuple(map(tuple, starts))
    if key not in _TEXTS:
        plain = Watched(model, slots=8)
        for start in starts:
            plain.add(start, max_tokens=most)
        plain.run()
        plain.check()
        _TEXTS[key] = [[*a.request.prompt, *a.tokens] for a in plain.answers.values()]
    return _TEXTS[key]


def mixed(seed: int) -> Callable[[], bool]:
    """For `KnownDraft`: right in 60 % of the tokens."""
    chance = random.Random(seed)
    return lambda: chance.random() < 0.6
