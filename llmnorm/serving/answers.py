"""What is told of answers: OpenAI's objects, whole or as the pieces of a stream.

    answers = Answers(model, fields, asked)
    answers.around                              what all objects of a stream have but their choice
    choice = answers.piece(number, event)       of a stream's next one, None where nothing is told
    body = answers.whole(ticket)                after the last event
    answers.usage(ticket)

Pieces joined are the whole: both are made of the same parts. Log-probabilities of a token are the
model's own, before temperature and everything else; the chosen token's number is the same float in
`top_logprobs`.
"""

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmnorm.generation.contract import Chosen, Event
from llmnorm.serving.asking import Asked, Model
from llmnorm.serving.fields import ChatFields, CompletionFields
from llmnorm.serving.service import Ticket


@dataclass
class Answer:
    """One answer, as far as it has come.

    Attributes:
        text: with what is echoed before it.
        tokens: the generated ones.
        logprobs: entries for its tokens, those of an echoed prompt first.
        offset: characters of all tokens that entries were made for.
        begun: whether anything was told of it.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Chosen | None]] = field(default_factory=list)
    offset: int = 0
    finish: str | None = None
    begun: bool = False


class Answers:
    """The answers of one request.

    Args:
        model: what is served.
        fields: of the request.
        asked: what the engine was asked.

    Attributes:
        id: of all objects that tell of them.
    """

    def __init__(self, model: Model, fields: CompletionFields | ChatFields, asked: Asked) -> None:
        self._model, self._fields, self._asked = model, fields, asked
        self._chat = isinstance(fields, ChatFields)
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._answers = [Answer() for _ in asked.prompts]
        self._scores: dict[int, list[Chosen]] = {}  # of a prompt's tokens, by its number

    def take(self, number: int, event: Event) -> "Answer":
        """Take in an event; returns what it has added."""
        answer = self._answers[number]
        added = Answer(finish=_finish(event), begun=answer.begun)
        prompt = number // self._fields.n
        if event.prompt is not None:
            self._scores[prompt] = event.prompt
        if not answer.begun:
            added.text = self._asked.heads[number]
            if self._fields.logprobs and not self._chat and prompt in self._scores:
                ids = self._asked.prompts[number]
                added.logprobs = list(zip(ids, [None, *self._scores[prompt]], strict=True))
        added.text += event.text
        added.tokens = event.tokens
        if event.chosen is not None:
            added.logprobs += zip(event.tokens, event.chosen, strict=True)
        added.offset = answer.offset
        answer.begun = True
        answer.text += added.text
        answer.tokens += added.tokens
        answer.logprobs += added.logprobs
        answer.finish = added.finish
        texts = self._model.texts
        answer.offset += sum(len(texts.text(token)) for token, _ in added.logprobs)
        return added

    @property
    def around(self) -> dict[str, Any]:
        """An object of a stream, without choices."""
        return self._object([], stream=True)

    def piece(self, number: int, event: Event) -> dict[str, Any] | None:
        """The choice of a stream's next object; None where the event has nothing that is told."""
        added = self.take(number, event)
        told = added.text or added.logprobs or added.finish is not None
        if not told and not self._fields.return_token_ids and not self._fields.accepted_marks:
            return None
        choice = self._choice(number, added)
        if self._chat:
            choice["delta"] = {"content": added.text} if added.text else {}
        else:
            choice["text"] = added.text
        if self._fields.accepted_marks:
            choice |= {
                "drafted": event.drafted,
                "accepted": event.accepted,
                "tokens": len(event.tokens),
                "accepted_characters": event.accepted_characters,
            }
        if self._fields.return_token_ids and not added.begun:
            choice["prompt_token_ids"] = list(self._asked.prompts[number])
        return choice

    def roles(self) -> list[dict[str, Any]]:
        """The choices of a chat's first objects: who speaks, one for each answer."""
        if not self._chat:
            return []
        begin = {"role": "assistant", "content": ""}
        return [
            {"index": number, "delta": begin, "logprobs": None, "finish_reason": None}
            for number in range(len(self._answers))
        ]

    def whole(self, ticket: Ticket) -> dict[str, Any]:
        """The answers that are not streamed."""
        choices = []
        for number, answer in enumerate(self._answers):
            answer.offset = 0
            choice = self._choice(number, answer)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            if self._fields.return_token_ids:
                choice["prompt_token_ids"] = list(self._asked.prompts[number])
            choices.append(choice)
        return {**self._object(choices, stream=False), "usage": self.usage(ticket)}

    def last(self, ticket: Ticket) -> dict[str, Any]:
        """The object at the end of a stream that tells the usage."""
        return {**self.around, "usage": self.usage(ticket)}

    def usage(self, ticket: Ticket) -> dict[str, Any]:
        """How many tokens there were, what reused rows saved and drafts did."""
        prompt, completion = self._asked.prompt_tokens, sum(len(a.tokens) for a in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": ticket.cached},
            "completion_tokens_details": {"accepted_prediction_tokens": ticket.accepted},
        }

    def _object(self, choices: Sequence[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        found: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "choices": choices,
        }
        options = self._fields.stream_options
        if stream and options is not None and options.include_usage:
            found["usage"] = None
        return found

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "logprobs": None, "finish_reason": answer.finish}
        if answer.logprobs:
            choice["logprobs"] = self._of_chat(answer) if self._chat else self._of_text(answer)
        if self._fields.return_token_ids:
            choice["token_ids"] = answer.tokens
        return choice

    def _of_text(self, answer: Answer) -> dict[str, Any]:
        """Log-probabilities as /v1/completions tells them, a list for each kind of number."""
        text = self._model.texts.text
        tokens = [text(token) for token, _ in answer.logprobs]
        offsets = itertools.accumulate(map(len, tokens[:-1]), initial=answer.offset)
        numbers = [None if chosen is None else chosen.logprob for _, chosen in answer.logprobs]
        tops: list[dict[str, float] | None] = []
        for token, chosen in answer.logprobs:
            top: dict[str, float] | None = None
            if chosen is not None:
                top = {}
                for other, number in chosen.top:  # of two with the same text the likelier counts
                    top.setdefault(text(other), number)
                top[text(token)] = chosen.logprob
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": numbers,
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }

    def _of_chat(self, answer: Answer) -> dict[str, Any]:
        """Log-probabilities as chat tells them, an object for each token."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            texts = self._model.texts
            return {"token": texts.text(token), "logprob": logprob, "bytes": texts.bytes(token)}

        content = [
            {**entry(token, c.logprob), "top_logprobs": [entry(t, number) for t, number in c.top]}
            for token, c in answer.logprobs
            if c is not None
        ]
        return {"content": content, "refusal": None}


def _finish(event: Event) -> str | None:
    """OpenAI's reason; an answer that was aborted or has failed never gets here."""
    assert event.finish in (None, "stop", "length"), event.finish
    return event.finish
