"""Messages -> tokens through a tokenizer's chat template, and which of them are trained.

    template = ChatTemplate(directory)
    template.render([{"role": "user", "content": "2+2?"}], generation_prompt=True)   -> token ids
    template.examples(messages, answers=[1])                                         -> renderings

An answer is trained from the end of the generation prompt to the first special token after it, this
token included. Where the template marks what the model writes (`{% generation %}`), the marks
decide. Else answer i is found by rendering the turns before it with the generation prompt, and the
turns up to it, with the answer as the last one:

    ...<|im_start|>assistant\\n                    the prompt, which the second text begins with
    ...<|im_start|>assistant\\nIt is 4.<|im_end|>   the rest of it, up to the end of the turn

Inside a longer conversation it is trained only where the conversation's text begins with all that,
since that is what the model will be given and has to produce. Where a template renders one answer
of a conversation otherwise (it drops earlier thoughts, or ends the last turn with another token),
every answer becomes an example of its own.

What would surprise:
- A special token that a message spells out is text (spelling.py). The tokenizer adds no token by
  itself: a template writes bos, or there is none.
- Some templates write no end after the last answer (GLM). Inside a conversation the token that
  begins the next turn then is the end of the answer; after the last answer there is none.
"""

import copy
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.runtime import new_context

from llmnorm.data.messages import PLAIN
from llmnorm.data.spelling import BEGIN, END, SPECIAL, Refused, Span, Speller, Tokens
from llmnorm.data.templates import read_template
from llmnorm.data.tokenizer import TextEncoder, special_tokens
from llmnorm.part import InputError

__all__ = ["ChatTemplate", "Messages", "Refused", "Rendering", "Tokens"]

Messages = Sequence[Mapping[str, Any]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them


class Rendering(NamedTuple):
    """A text of the template, in the spelling of `Speller`.

    Attributes:
        text: up to the end of its last trained answer.
        spans: the characters that are trained, in their order.
        unended: trained answers after which the template writes no special token.
    """

    text: str
    spans: list[Span]
    unended: int = 0


class ChatTemplate:
    """A tokenizer directory's chat template.

    Args:
        directory: of the tokenizer; holds tokenizer.json and a template.
        arguments: values for the template, in the place of its defaults.
        key: the configuration key for messages.
        called: what the user calls the directory or the template's file, for messages; left out,
            the directory's own path.

    Attributes:
        stops: ids of tokens that end a turn: what the template writes after an answer, and the
            tokenizer's eos.
        marked: whether the template marks what the model writes.
        dated: whether the template writes the day on which it is rendered.

    Raises:
        InputError: there is no template, or it cannot render a question and an answer.
    """

    def __init__(
        self,
        directory: Path,
        arguments: Mapping[str, Any] | None = None,
        key: str = "tokenizer.chat_template",
        called: str | None = None,
    ) -> None:
        self._source, path = read_template(directory, key, called=called)
        self._with_tools = read_template(directory, key, tools=True)[0]
        self.marked = bool(_MARKS.search(self._source))
        self.dated = "strftime_now" in self._source
        named = special_tokens(directory, key)
        self._arguments = {f"{kind}_token": text for kind, text in named.items()}
        self._arguments |= arguments or {}
        eos = TextEncoder(directory, key).eos
        self._speller = Speller(directory / "tokenizer.json", key)
        self.stops: list[int] = []
        try:
            self.stops = self._ends_of_turns()
        except Refused as error:
            raise InputError(f"{key}: {called or path}: {error}") from None
        if eos not in self.stops:
            self.stops.append(eos)

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> list[int]:
        """The token ids of messages.

        Args:
            messages: `{"role": ..., "content": ...}` and what else the template reads of one.
            tools: JSON schemas of functions, for templates that know them.
            generation_prompt: end with what stands before the next answer.

        Raises:
            Refused: the template cannot render them.
        """
        given, tools = self._given(messages), self._speller.mark(tools)
        text = self._text(given, tools, generation_prompt)[0]
        (tokens,) = self.encode([Rendering(text, [])])
        return [int(number) for number in tokens.ids]

    def begun(self, messages: Messages) -> list[int]:
        """The token ids of messages whose last one, an answer, is to be continued.

        Raises:
            Refused: as `render`.
        """
        *before, last = self._given(messages)
        raw = self._raw(before, None, True, plain=self._is_plain(before, None))[0]
        text = self._speller.respell(raw + str(last["content"]))[0]
        (tokens,) = self.encode([Rendering(text, [])])
        return [int(number) for number in tokens.ids]

    def with_arguments(self, arguments: Mapping[str, Any]) -> "ChatTemplate":
        """The same template, with more values in the place of its defaults."""
        other = copy.copy(self)
        other._arguments = {**self._arguments, **arguments}
        other.__dict__.pop("_compiled", None)
        return other

    def examples(
        self, messages: Messages, answers: Collection[int], tools: Sequence[Any] | None = None
    ) -> list[Rendering]:
        """The examples that a conversation becomes: one, or one for each answer.

        What follows the last trained answer is left out.

        Args:
            messages: the conversation.
            answers: which of the messages are trained, by number.
            tools: as in `render`.

        Raises:
            Refused: the template cannot render them, or its generation prompt is not how an answer
                begins.
        """
        numbers = sorted(answers)
        assert numbers, "a conversation has a trained answer"
        given, tools = self._given(messages[: numbers[-1] + 1]), self._speller.mark(tools)
        if self.marked:
            return [self._by_marks(given, numbers, tools)]
        plain = self._is_plain(given, tools)
        raw = [
            (
                self._raw(given[:number], tools, generation_prompt=True, plain=plain)[0],
                self._raw(given[: number + 1], tools, plain=plain)[0],
            )
            for number in numbers
        ]
        whole = self._together(raw)
        if whole is not None:
            return [whole]
        return [self._as_last(*both, number) for both, number in zip(raw, numbers, strict=True)]

    def encode(self, renderings: Iterable[Rendering]) -> list[Tokens]:
        """The tokens of renderings, and which of them are trained.

        Raises:
            InputError: the tokenizer refuses a text.
        """
        return self._speller.encode([(text, spans) for text, spans, _ in renderings])

    def spell(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones spelled out."""
        return self._speller.decode(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer's tokens, up to the token that ends the turn."""
        before = itertools.takewhile(lambda number: number not in self.stops, ids)
        return self.spell(before)

    def _ends_of_turns(self) -> list[int]:
        """What the template writes after an answer; where it writes nothing, before a question."""
        turn = [
            {"role": "user", "content": "QUESTION"},
            {"role": "assistant", "content": "ANSWER"},
        ]
        text = self._text(turn)[0]
        if "QUESTION" not in text or "ANSWER" not in text:
            raise Refused("the chat template does not write the content of messages that are text")
        end, ended = self._end(text, text.rindex("ANSWER"))
        if ended:
            return [int(token[1]) for token in SPECIAL.finditer(text, 0, end)][-1:]
        longer = self._text([*turn, turn[0]])[0]
        following = SPECIAL.match(longer, len(text)) if longer.startswith(text) else None
        return [int(following[1])] if following else []

    def _together(self, raw: Sequence[tuple[str, str]]) -> Rendering | None:
        """One example of all answers; None where it does not begin as each of them does alone.

        Each text is read once: an answer is looked for in what its text has beyond its prompt.

        Args:
            raw: of every answer, the prompt and the text that ends with it, as `_raw` returns them.
        """
        last = raw[-1][1]
        if not all(text.startswith(p) and last.startswith(p) for p, text in raw):
            return None
        places = [len(prompt) for prompt, _ in raw]
        whole, starts = self._speller.respell(last, [(place, place) for place in places])
        spans, unended = [], 0
        for (_, text), place, (start, _) in zip(raw, places, starts, strict=True):
            answer = self._speller.respell(text[place:])[0]
            end, ended = self._end(answer, 0)
            if not whole.startswith(answer[:end], start):
                return None
            stop = start + end
            if not ended:
                following = SPECIAL.match(whole, stop)
                stop, unended = (following.end(), unended) if following else (stop, unended + 1)
            spans.append((start, stop))
        return Rendering(whole[: spans[-1][1]], spans, unended)

    def _as_last(self, raw_prompt: str, raw_text: str, number: int) -> Rendering:
        """A conversation that ends with the answer that is trained, up to the end of its turn.

        Args:
            raw_prompt, raw_text: the prompt, and the text that ends with the answer.
            number: of the answer's message.
        """
        prompt, text = (self._speller.respell(raw)[0] for raw in (raw_prompt, raw_text))
        if not text.startswith(prompt):
            begins = self._speller.plain(prompt)[-40:]
            raise Refused(
                f"message {number + 1} does not begin as the chat template lets answers begin "
                f"({begins!r}), so the model would not be asked to write what is trained; see "
                "tokenizer.template_arguments, or give the answer its thoughts"
            )
        end, ended = self._end(text, len(prompt))
        return Rendering(text[:end], [(len(prompt), end)], int(not ended))

    def _end(self, text: str, start: int) -> tuple[int, bool]:
        """Where the answer that begins at `start` and is the last one ends, its end included.

        Behind an answer's last letter there are only special tokens and white space. Its end is
        the first of those tokens that ends turns, or else the first of them.

        Returns:
            The end, and whether there is such a token.
        """
        tail = len(text)  # where what stands behind the answer begins
        while (stop := start + len(text[start:tail].rstrip())) > start and text[stop - 1] == END:
            tail = text.rindex(BEGIN, start, stop)
        written = list(SPECIAL.finditer(text, stop))
        if not written:
            return len(text), False
        ends = [token.end() for token in written if int(token[1]) in self.stops]
        return (ends or [written[0].end()])[0], True

    def _by_marks(
        self, messages: Messages, answers: list[int], tools: Sequence[Any] | None
    ) -> Rendering:
        """A conversation whose trained text the template marks."""
        text, marks = self._text(messages, tools)
        written = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
        if written != answers:  # some are context: whose mark is which is told by fewer messages
            before, chosen = 0, []
            for number in written:
                count = len(self._text(messages[: number + 1], tools)[1])
                if number in answers:
                    chosen += marks[before:count]
                before = count
            marks = chosen
        marks = [(start, end) for start, end in marks if start < end]
        return Rendering(text[: marks[-1][1]] if marks else text, marks)

    def _text(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the characters of it that it marks as the model's.

        Args:
            messages, tools: what `_given` and `Speller.mark` made of them.
        """
        plain = self._is_plain(messages, tools)
        raw, marks = self._raw(messages, tools, generation_prompt, plain=plain)
        return self._speller.respell(raw, marks)

    def _raw(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
        *,
        plain: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `_text`, as the template writes it, special tokens in the tokenizer's own spelling.

        Args:
            plain: what `_is_plain` says of messages that these are part of.
        """
        try:
            if plain:
                return self._plain(messages, generation_prompt), []
            from transformers.utils.chat_template_utils import render_jinja_template

            (raw,), marks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._source if tools is None else self._with_tools,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=generation_prompt,
                **self._arguments,
            )
        except Exception as error:  # a template is a program, and may raise anything
            line = getattr(error, "lineno", None)
            where = "" if line is None else f" in line {line}"
            reason = " ".join(str(error).split())[:200]
            raise Refused(f"the chat template fails{where} ({reason})") from None
        return raw, marks[0] if self.marked else []

    def _is_plain(self, messages: Messages, tools: Sequence[Any] | None) -> bool:
        """Whether there is nothing but role and content, and the template has no marks."""
        return tools is None and not self.marked and all(m.keys() <= PLAIN for m in messages)

    def _plain(self, messages: Messages, generation_prompt: bool) -> str:
        """What `render_jinja_template` makes of plain messages (tests/test_data/test_chat.py).

        It copies every message and joins the template's variables anew for each text, which takes
        longer than encoding a short one (tools/bench/conversations.py).
        """
        template, variables = self._compiled
        variables = {**variables, "messages": messages, "add_generation_prompt": generation_prompt}
        context = new_context(template.environment, None, template.blocks, variables, shared=True)
        return template.environment.concat(template.root_render_func(context))

    @cached_property
    def _compiled(self) -> tuple[Any, dict[str, Any]]:
        """The template in transformers' sandbox, and the variables that no message changes."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(self._source)
        without = {"tools": None, "documents": None}
        return template, {**template.globals, **self._arguments, **without}

    def _given(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages without the keys that have no value, as transformers passes them on."""
        mark = self._speller.mark
        return [{k: mark(v) for k, v in m.items() if v is not None} for m in messages]
