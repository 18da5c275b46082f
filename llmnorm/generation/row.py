"""One continuation of a request: its tokens and text, and what ends it.

    row = rows_of(number, request, tokenizer=tokenizer, ends=ends, vocabulary=v, context=c)[0]
    event = row.commit(verdict)     # what a round has decided, cut where the row ends

A row's `ids` are those of the prompt and what is committed; the last one is the pending token,
which no cache holds yet. A row ends at an end token or a stop token, where its text has a stop
string, at `max_tokens`, or where the context is full; what a round decided behind that is dropped.

What would surprise: a row may have one token more than the context, since the last one is not run:
a prompt that fills the context gets one token.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmnorm.generation.contract import (
    Chooser,
    Chosen,
    Event,
    Finish,
    Request,
    Sampling,
    Verdict,
)
from llmnorm.generation.sampling import RowChooser, chosen_of
from llmnorm.generation.text import TextStream
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row:
    """One continuation; `DraftedRow` for drafts.

    Args:
        request: the number of its request.
        row: which of the request's `n` it is.
        prompt: its first tokens, at least one.
        sampling: of this row, with a seed of its own.
        limit: tokens that it may get.
        ends: tokens that end it.
        chooser: what chooses its tokens.
        text: what makes text of them; None: events have no text.

    Attributes:
        slot: its number in the caches; -1 while it waits.
        ids: prompt and committed tokens, the pending one last.
        prompt: how many of `ids` are the prompt's.
        cached: of the prompt's tokens, those that an earlier row's cache has saved.
        drafted, accepted: tokens.
        scores: log-probabilities of the prompt's tokens from the second on, as far as it was run;
            None where the request does not ask for them.
    """

    def __init__(
        self,
        request: int,
        row: int,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        limit: int,
        ends: frozenset[int],
        chooser: Chooser,
        text: TextStream | None,
    ) -> None:
        self.request, self.row = request, row
        self.ids, self.prompt = list(prompt), len(prompt)
        self.sampling, self.limit = sampling, limit
        self.chooser: Chooser = chooser
        self.slot = -1
        self.cached = self.drafted = self.accepted = 0
        self.scores: list[Chosen] | None = None if sampling.prompt_logprobs is None else []
        self._ends, self._text = ends, text
        self._told = False  # whether an event had the scores

    @property
    def remaining(self) -> int:
        """Tokens that the row may still get."""
        return self.limit - (len(self.ids) - self.prompt)

    def commit(self, verdict: Verdict, drafted: int = 0) -> Event:
        """Take in what a round has decided, up to where the row ends.

        Args:
            verdict: the accepted drafts and the bonus token.
            drafted: how many tokens the draft had proposed.
        """
        tokens: list[int] = []
        text, marked = "", 0
        finish: Finish | None = None
        for token in verdict.tokens:
            tokens.append(token)
            self.ids.append(token)
            if token in self._ends:
                finish = "stop"
            elif self._text is not None:
                text += self._text.push(token)
                marked = len(text) if len(tokens) <= verdict.accepted else marked
                finish = "stop" if self._text.stopped else None
            if finish is None and self.remaining == 0:
                finish = "length"
            if finish is not None:
                break
        accepted = min(verdict.accepted, len(tokens))
        self.drafted += drafted
        self.accepted += accepted
        chosen = None if verdict.chosen is None else verdict.chosen[: len(tokens)]
        event = Event(
            *(self.request, self.row, tokens, text, accepted, chosen),
            drafted=drafted,
            cached=self.cached,
            accepted_characters=marked,
        )
        return event if finish is None else self._closed(event, finish)

    def end(self, finish: Finish, message: str | None = None) -> Event:
        """The event of a row that ends without a further token: it was aborted, or has failed."""
        return self._closed(self.begun(), finish, message)

    def begun(self) -> Event:
        """The event of a row that has no token yet; what is known of its prompt is told once."""
        scores, self._told = None if self._told else self.scores, True
        return Event(self.request, self.row, [], "", 0, cached=self.cached, prompt=scores)

    def score(self, logits: Tensor) -> None:
        """Take in the logits (tokens, vocabulary) of the next piece of the prompt."""
        assert self.scores is not None and self.sampling.prompt_logprobs is not None
        following = self.ids[len(self.scores) + 1 :][: len(logits)]
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        self.scores += chosen_of(wide.cpu(), following, self.sampling.prompt_logprobs)

    def _closed(self, event: Event, finish: Finish, message: str | None = None) -> Event:
        rest = "" if self._text is None else self._text.finish()
        return replace(event, text=event.text + rest, finish=finish, message=message)


def rows_of(
    number: int,
    request: Request,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    ends: Collection[int],
    vocabulary: int,
    context: int,
) -> list[Row]:
    """The rows of a request.

    Args:
        number: of the request.
        request: what is asked for.
        tokenizer: makes text of tokens; None: events have no text.
        ends: the model's end tokens.
        vocabulary: tokens that the model knows.
        context: tokens that the model can run.

    Raises:
        InputError: the request asks for what cannot be.
    """
    prompt, sampling = request.prompt, request.sampling
    _check(request, vocabulary, context, with_text=tokenizer is not None)
    stops = frozenset(sampling.stop_tokens)
    known = frozenset(ends)
    rows = []
    for row in range(request.n):
        seed = None if sampling.seed is None else sampling.seed + row
        own = replace(sampling, seed=seed)
        if row:  # one of them tells what the prompt's tokens are worth
            own = replace(own, prompt_logprobs=None)
        rows.append(
            Row(
                number,
                row,
                prompt,
                own,
                limit=min(sampling.max_tokens, context - len(prompt) + 1),
                ends=stops if sampling.ignore_end else stops | known,
                chooser=RowChooser(own, prompt, known, vocabulary),
                text=None
                if tokenizer is None
                else TextStream(
                    tokenizer, sampling.stop, skip_special=sampling.skip_special, before=prompt
                ),
            )
        )
    return rows


def _check(request: Request, vocabulary: int, context: int, *, with_text: bool) -> None:
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise InputError("prompt: has no tokens; a text begins with at least one")
    if len(prompt) > context:
        raise InputError(
            f"prompt: has {len(prompt)} tokens, and the context is {context} tokens "
            "(generation.context, at most the model's); shorten it"
        )
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(f"prompt: token {wrong} is none of the model's {vocabulary} tokens")
    if request.n < 1:
        raise InputError(f"n: must be at least 1, got {request.n}")
    least = 1 if sampling.prompt_logprobs is None else 0
    if sampling.max_tokens < least:
        raise InputError(f"max_tokens: must be at least {least}, got {sampling.max_tokens}")
    if sampling.stop and not with_text:
        raise InputError("stop: needs the engine's tokenizer; stop_tokens needs none")
    if sampling.processors and request.n > 1:
        raise InputError(
            f"n: is {request.n}, and the request has processors, which follow one row's tokens; "
            "add a request for each row, with processors of its own"
        )
